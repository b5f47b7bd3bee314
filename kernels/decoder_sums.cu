// All that every pixel of the collapsed decoder has to wait for, in one launch
// (graph/passes/collapse.rs; decoder.cu does the same in four):
//   sa2 = act(w x2 + b), kept on chip; means over pixels of s3, x2, sa2 and of s3 under U^T sa2;
//   t = B s3 + b, the high-level features as class scores, MAP_ROWS to a pixel;
//   with the means of the whole image the channel attentions of both modules, and with these the maps
//   of both onto class scores, [A diag(ca) Wl; w], with the weights w of the spatial attention as one
//   more row: what decoder_labels.cu reads.
//
// A block of 512 threads has 32 x 8 pixels of x2 and those of s3 at half the size around them: s3 is
// linear in the weighted mean, so that a block adds up what its own pixels of sa2 weigh. A lane has
// eight neighbouring pixels, a warp every 16th channel, and all of a block's loads are under way before
// the first of them is used. It leaves one partial sum per mean. The last block of an image to come adds
// these up, always in the same order whichever block it is, and goes on to the gates; their weights and
// those of the maps come to the first level of caches meanwhile. It is told by a counter per image, which
// goes back to zero; so a launch can be replayed.
// Bytes: x2 once, s3 once and half again out of L2, t; 4 (2 c3 + c2 + 1) per block there and back.
// FLOPs: per pixel 3 c2 + 1 of x2, 2 c3 (classes + 2) of s3. Tensor cores make t in f16.
// The end, one block's: 128 partial sums of 321 means at 1024 x 512, 30 k products of gates, 90 k of
// maps. Shared: the larger of what tiles and end need, 35 KB in f16 and 47 KB in f32:
// launch::DecoderShape::tiling().
// Launch: 512 threads, grid (tiles of x2, 1, N): launch::decoder_sums().
#include "bilinear.cuh"
#include "decoder_sums.cuh"

namespace {

constexpr int TILE_W = 32, TILE_H = 8, TILE_PIXELS = TILE_W * TILE_H;
static_assert(TILE_PIXELS == 32 * 8, "a warp has the tile's pixels of a channel, eight to a lane");
// Most rows of s3 around a tile, and columns from a multiple of 8 on.
constexpr int LOW_ROWS = 7, LOW_W = 32;

// Eight neighbours of a plane as they are in memory.
template <typename T>
struct Eight {
    static constexpr int WORDS = sizeof(T) / 2;
    uint4 words[WORDS];

    __device__ __forceinline__ void unpack(float (&v)[8]) const;
};
template <>
__device__ __forceinline__ void Eight<__half>::unpack(float (&v)[8]) const {
    v[0] = low_half(words[0].x), v[1] = high_half(words[0].x);
    v[2] = low_half(words[0].y), v[3] = high_half(words[0].y);
    v[4] = low_half(words[0].z), v[5] = high_half(words[0].z);
    v[6] = low_half(words[0].w), v[7] = high_half(words[0].w);
}
template <>
__device__ __forceinline__ void Eight<float>::unpack(float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        v[4 * i] = __uint_as_float(words[i].x), v[4 * i + 1] = __uint_as_float(words[i].y);
        v[4 * i + 2] = __uint_as_float(words[i].z), v[4 * i + 3] = __uint_as_float(words[i].w);
    }
}

__device__ __forceinline__ uint4 pack_four(const __half* v) {
    const auto two = [v](int i) {
        return __half_as_ushort(v[i]) | static_cast<unsigned>(__half_as_ushort(v[i + 1])) << 16;
    };
    return {two(0), two(2), two(4), two(6)};
}
__device__ __forceinline__ uint4 pack_four(const float* v) {
    return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
            __float_as_uint(v[3])};
}

// The lane's eight pixels of channels first, first + WARPS, ..: `count` of them exist, of others and
// of channels beyond there are zeros. `aligned`: eight can be loaded at once wherever they exist.
template <typename T, int N>
__device__ __forceinline__ void fetch(const T* from, int plane, int first, int channels, int count,
                                      bool aligned, Eight<T> (&to)[N]) {
    constexpr int PER_WORD = 16 / sizeof(T);
    from += static_cast<size_t>(first) * plane;
    const size_t step = static_cast<size_t>(plane) * WARPS;
    if (aligned) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const bool here = count > 0 && first + j * WARPS < channels;
#pragma unroll
            for (int i = 0; i < Eight<T>::WORDS; ++i) {
                to[j].words[i] = here ? reinterpret_cast<const uint4*>(from)[i] : uint4{0, 0, 0, 0};
            }
            from += step;
        }
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int here = first + j * WARPS < channels ? count : 0;
            T v[8];
#pragma unroll
            for (int p = 0; p < 8; ++p) {
                store(v + p, 0.0f);
                if (p < here) v[p] = from[p];
            }
#pragma unroll
            for (int i = 0; i < Eight<T>::WORDS; ++i) to[j].words[i] = pack_four(v + i * PER_WORD);
            from += step;
        }
    }
}

// Pixels of s3 that a tile's pixels of x2 are interpolated from, and within them those that belong
// to the tile: where the pixel of x2 in their middle is its own.
struct Range {
    int from, to, own_from, own_to;
};

__device__ __forceinline__ Range low_range(int first, int end, int in, int out) {
    // The first one whose middle (2 q + 1) out / (2 in) is not below x.
    const auto owned = [in, out](int x) {
        return static_cast<int>((2u * in * x + out - 1u) / (2u * out));
    };
    Range r;
    r.from = tap(first, in, out).lo;
    r.to = tap(end - 1, in, out).hi + 1;
    r.own_from = min(owned(first), in);
    r.own_to = min(owned(end), in);
    return r;
}

// A block's pixels of x2 and of s3. Sums over them: c3 of s3, c2 of x2, c3 of s3 under the weights, 1
// of the weights.
struct Tile {
    int x0, y0, x1, y1;
    Range column, row;
    // Where columns of s3 begin, a multiple of 8, and how many eights there are.
    int low_x0, eights;

    template <typename T>
    __device__ __forceinline__ explicit Tile(const Decoder<T>& op) {
        const int tiles_x = (op.high_w + TILE_W - 1) / TILE_W, tile_y = blockIdx.x / tiles_x;
        x0 = (blockIdx.x - tile_y * tiles_x) * TILE_W, y0 = tile_y * TILE_H;
        x1 = min(x0 + TILE_W, op.high_w), y1 = min(y0 + TILE_H, op.high_h);
        column = low_range(x0, x1, op.low_w, op.high_w);
        row = low_range(y0, y1, op.low_h, op.high_h);
        low_x0 = column.from / 8 * 8;
        eights = (column.to - low_x0 + 7) / 8;
    }
    __device__ __forceinline__ int own_columns() const { return column.own_to - column.own_from; }
    __device__ __forceinline__ int own_pixels() const {
        return own_columns() * (row.own_to - row.own_from);
    }
};

// A lane's eight pixels of s3: where they are and which of them are the tile's own.
struct LowPixels {
    int y, x, count, own_at;
    unsigned own;

    __device__ __forceinline__ LowPixels(const Tile& tile, int low_w) {
        const int lane = threadIdx.x % 32, row = lane / tile.eights;
        y = tile.row.from + row, x = tile.low_x0 + (lane - row * tile.eights) * 8;
        const bool here = y < tile.row.to;
        count = here ? max(min(low_w - x, 8), 0) : 0;
        const int from = max(tile.column.own_from - x, 0);
        const int to = min(tile.column.own_to - x, 8);
        const bool owned = here && y >= tile.row.own_from && y < tile.row.own_to && from < to;
        own = owned ? (0xffu >> (8 - to + from)) << from : 0u;
        own_at = (y - tile.row.own_from) * tile.own_columns() + x - tile.column.own_from;
        if (!here) y = tile.row.from, x = tile.low_x0;
    }
};

// Positions in s3 of the tile's columns, then of its rows.
struct Tables {
    Tap columns[TILE_W], rows[TILE_H];
};

template <typename T>
__device__ __forceinline__ void fill(const Decoder<T>& op, const Tile& tile, Tables& tables) {
    const int i = threadIdx.x;
    if (i < TILE_W) {
        tables.columns[i] = tap(min(tile.x0 + i, op.high_w - 1), op.low_w, op.high_w);
    } else if (i < TILE_W + TILE_H) {
        const int y = tile.y0 + i - TILE_W;
        tables.rows[i - TILE_W] = tap(min(y, op.high_h - 1), op.low_h, op.high_h);
    }
}

// How much of input q what has this tap takes.
__device__ __forceinline__ float weight_of(const Tap& t, int q) {
    return (t.lo == q ? 1.0f - t.frac : 0.0f) + (t.hi == q ? t.frac : 0.0f);
}

// Sums of x2 and, in `attention`, sa2 of the tile's pixels with zeros outside of the plane.
template <typename T>
__device__ __forceinline__ void sum_x2(const Decoder<T>& op, const Tile& tile, bool aligned,
                                       float* dots, float* attention, float* sums) {
    constexpr int AT_ONCE = 4;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c2 = op.two.in;
    const int y = tile.y0 + lane / (TILE_W / 8), x = tile.x0 + lane % (TILE_W / 8) * 8;
    const int count = y < tile.y1 ? max(min(tile.x1 - x, 8), 0) : 0;
    const T* from = op.x2 + plane_at(blockIdx.z, op.x_batch, 0, 0) +
                    (count > 0 ? static_cast<size_t>(y) * op.high_w + x : 0);
    const float bias = op.two.gate.b[0];
    float dot[8] = {};
    for (int c0 = warp; c0 < c2; c0 += AT_ONCE * WARPS) {
        Eight<T> eights[AT_ONCE];
        fetch(from, op.x_plane, c0, c2, count, aligned, eights);
        float sum[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const float w = op.two.gate.w[min(c0 + j * WARPS, c2 - 1)];
            float v[8];
            eights[j].unpack(v);
            sum[j] = 0.0f;
#pragma unroll
            for (int p = 0; p < 8; ++p) {
                sum[j] += v[p];
                dot[p] += w * v[p];
            }
        }
        const float total = warp_sums(sum);
        const int c = c0 + lane / (32 / AT_ONCE) * WARPS;
        if (lane % (32 / AT_ONCE) == 0 && c < c2) sums[op.c3 + c] = total;
    }
    float* mine = dots + warp * TILE_PIXELS + lane * 8;
    store_four(mine, {dot[0], dot[1], dot[2], dot[3]});
    store_four(mine + 4, {dot[4], dot[5], dot[6], dot[7]});
    __syncthreads();
    const int pixel = threadIdx.x;
    if (pixel < TILE_PIXELS) {
        float v = bias;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) v += dots[w * TILE_PIXELS + pixel];
        const bool inside =
            tile.x0 + pixel % TILE_W < tile.x1 && tile.y0 + pixel / TILE_W < tile.y1;
        attention[pixel] = inside ? activate(v, op.act_s2) : 0.0f;
    }
    __syncthreads();
}

// U^T sa2 of the tile's pixels on LOW_ROWS x LOW_W pixels of s3, rows first. s3 being half as large as
// x2, its pixel q is read by pixels from 2 q - 2 to 2 q + 2 at most. `attention` has zeros beyond the
// plane.
__device__ __forceinline__ void gather(const Tile& tile, const Tables& tables,
                                       const float* attention, float* across, float* gathered) {
    const int i = threadIdx.x, column = i % LOW_W, row = i / LOW_W;
    if (row < TILE_H) {
        const int q = tile.low_x0 + column;
        float sum = 0.0f;
#pragma unroll
        for (int k = -2; k <= 2; ++k) {
            const int x = 2 * q + k - tile.x0;
            if (x < 0 || x >= TILE_W) continue;
            sum += weight_of(tables.columns[x], q) * attention[row * TILE_W + x];
        }
        across[i] = sum;
    }
    __syncthreads();
    if (row < LOW_ROWS) {
        const int q = tile.row.from + row;
        float sum = 0.0f;
#pragma unroll
        for (int k = -2; k <= 2; ++k) {
            const int y = 2 * q + k - tile.y0;
            if (y < 0 || y >= TILE_H) continue;
            sum += weight_of(tables.rows[y], q) * across[y * LOW_W + column];
        }
        gathered[i] = sum;
    }
    __syncthreads();
}

// Channels of s3 that a warp has under way at a time.
template <typename T>
constexpr int S3_AT_ONCE = 16 / sizeof(T);

// Sums of s3, plain over the tile's own pixels and under the weights. Its own pixels go to `own`, rows of
// `own_pitch`, for t. `eights`: the first channels.
template <typename T>
__device__ __forceinline__ void sum_s3(const Decoder<T>& op, const LowPixels& pixels,
                                       const T* from, bool aligned, const float* gathered,
                                       Eight<T> (&eights)[S3_AT_ONCE<T>], float* sums, T* own,
                                       int own_pitch, bool own_aligned) {
    constexpr int AT_ONCE = S3_AT_ONCE<T>, PER_WORD = 16 / sizeof(T);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float g[8] = {};
    if (pixels.count > 0) {
        const float4 low = load_four(gathered), high = load_four(gathered + 4);
        g[0] = low.x, g[1] = low.y, g[2] = low.z, g[3] = low.w;
        g[4] = high.x, g[5] = high.y, g[6] = high.z, g[7] = high.w;
    }
    for (int c0 = warp; c0 < op.c3; c0 += AT_ONCE * WARPS) {
        if (c0 != warp) fetch(from, op.s_plane, c0, op.c3, pixels.count, aligned, eights);
        float both[2 * AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            float v[8];
            eights[j].unpack(v);
            float plain = 0.0f, weighted = 0.0f;
#pragma unroll
            for (int p = 0; p < 8; ++p) {
                plain += pixels.own >> p & 1u ? v[p] : 0.0f;
                weighted += g[p] * v[p];
            }
            both[2 * j] = plain, both[2 * j + 1] = weighted;
            const int c = c0 + j * WARPS;
            if (pixels.own == 0 || c >= op.c3) continue;
            T* to = own + c * own_pitch + pixels.own_at;
            if (own_aligned) {
#pragma unroll
                for (int i = 0; i < Eight<T>::WORDS; ++i) {
                    reinterpret_cast<uint4*>(to + i * PER_WORD)[0] = eights[j].words[i];
                }
            } else {
#pragma unroll
                for (int p = 0; p < 8; ++p) {
                    if (pixels.own >> p & 1u) store(to + p, v[p]);
                }
            }
        }
        const float total = warp_sums(both);
        const int slot = lane / (16 / AT_ONCE), c = c0 + slot / 2 * WARPS;
        if (lane % (16 / AT_ONCE) == 0 && c < op.c3) {
            sums[(slot % 2 == 0 ? 0 : op.c3 + op.two.in) + c] = total;
        }
    }
}

// The weights of t as tensor cores read them, zeros for the rows that there are not; floats turned
// over.
template <typename T>
__device__ __forceinline__ void stage_t_map(const Decoder<T>& op, T* map) {
    constexpr int ROWS = sizeof(T) == 2 ? 8 * ROW_TILES : MAP_ROWS;
    constexpr int PER_WARP = (ROWS + WARPS - 1) / WARPS, STEPS = 4;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int k0 = lane; k0 < op.c3; k0 += 32 * STEPS) {
        T v[PER_WARP][STEPS];
#pragma unroll
        for (int i = 0; i < PER_WARP; ++i) {
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const int r = warp + i * WARPS, k = k0 + 32 * s;
                store(&v[i][s], 0.0f);
                if (r < op.classes && k < op.c3) v[i][s] = op.t_weights[r * op.c3 + k];
            }
        }
#pragma unroll
        for (int i = 0; i < PER_WARP; ++i) {
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const int r = warp + i * WARPS, k = k0 + 32 * s;
                if (r >= ROWS || k >= op.c3) continue;
                map[sizeof(T) == 2 ? r * (op.c3 + HALF_PAD) + k : k * MAP_ROWS + r] = v[i][s];
            }
        }
    }
}

// Four scores of a pixel of t with their biases.
template <typename T>
__device__ __forceinline__ void write_t(const Decoder<T>& op, const Tile& tile,
                                        const float* bias, int pixel, int r, float4 v) {
    const int row = pixel / tile.own_columns(), column = pixel - row * tile.own_columns();
    const size_t at = static_cast<size_t>(blockIdx.z) * op.low_h * op.low_w +
                      static_cast<size_t>(tile.row.own_from + row) * op.low_w +
                      tile.column.own_from + column;
    store_four(op.t + at * MAP_ROWS + r,
               {v.x + bias[r], v.y + bias[r + 1], v.z + bias[r + 2], v.w + bias[r + 3]});
}

// t of the tile's own pixels. `products`: 24 floats for each of them, in whole groups.
__device__ __forceinline__ void scores_s3(const Decoder<__half>& op, const Tile& tile,
                                          const __half* own, int own_pitch, const __half* map,
                                          const float* bias, float* products) {
    constexpr int ROWS = 8 * ROW_TILES;
    const int pixels = tile.own_pixels(), groups = (pixels + GROUP - 1) / GROUP;
    const int map_pitch = op.c3 + HALF_PAD;
    // A warp per tile of rows.
    for (int i = threadIdx.x / 32; i < ROW_TILES * groups; i += WARPS) {
        const int group = i / ROW_TILES, r0 = (i - group * ROW_TILES) * 8;
        Scores acc;
        wmma::fill_fragment(acc, 0.0f);
#pragma unroll 4
        for (int k = 0; k < op.c3; k += 16) {
            Rows a;
            Columns b;
            wmma::load_matrix_sync(a, map + r0 * map_pitch + k, map_pitch);
            wmma::load_matrix_sync(b, own + k * own_pitch + group * GROUP, own_pitch);
            wmma::mma_sync(acc, a, b, acc);
        }
        wmma::store_matrix_sync(products + group * GROUP * ROWS + r0, acc, ROWS,
                                wmma::mem_col_major);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < pixels * MAP_QUADS; i += THREADS) {
        const int pixel = i / MAP_QUADS, r = (i - pixel * MAP_QUADS) * 4;
        write_t(op, tile, bias, pixel, r, load_four(products + pixel * ROWS + r));
    }
}
__device__ __forceinline__ void scores_s3(const Decoder<float>& op, const Tile& tile,
                                          const float* own, int own_pitch, const float* map,
                                          const float* bias, float*) {
    const int pixels = tile.own_pixels();
    for (int i = threadIdx.x; i < pixels * MAP_QUADS; i += THREADS) {
        const int quad = i / pixels, pixel = i - quad * pixels;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
        for (int k = 0; k < op.c3; ++k) {
            const float v = own[k * own_pitch + pixel];
            const float4 w = load_four(map + k * MAP_ROWS + 4 * quad);
            sum.x += w.x * v;
            sum.y += w.y * v;
            sum.z += w.z * v;
            sum.w += w.w * v;
        }
        write_t(op, tile, bias, pixel, 4 * quad, sum);
    }
}

// Writes this block's sums.
template <typename T>
__device__ __forceinline__ void leave_sums(const Decoder<T>& op, const float* sums) {
    const int pitch = op.pitch();
    float* mine = op.partial + (static_cast<size_t>(blockIdx.z) * gridDim.x + blockIdx.x) * pitch;
    for (int i = threadIdx.x; i < op.means(); i += THREADS) mine[i] = sums[i];
}

// Whether this block is the last one of its image to come and sees what the others have written: one
// thread finds out once all of the block have written their sums.
template <typename T>
__device__ __forceinline__ bool is_last(const Decoder<T>& op) {
    __threadfence();
    const bool last = atomicInc(op.counters + blockIdx.z, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
    return last;
}

// Floats of shared memory: `own_len` for the tile's own pixels of s3, rows of `own_pitch`, and what is
// done before these; `products` for t; `room` for both with the weights of t, or for the last block.
struct Shared {
    int own_pitch, own_len, products, room;
};

template <typename T>
__device__ __forceinline__ void decoder_sums(const Decoder<T>& op, const Shared& lens, int map2_len,
                                             int map1_len) {
    DYNAMIC_SHARED(float, shared);
    __shared__ float warps[32], t_bias[MAP_ROWS], inverses[2];
    __shared__ bool last;
    __shared__ Tables tables;
    float* products = shared + lens.own_len;
    T* t_map = reinterpret_cast<T*>(products + lens.products);
    T* own = reinterpret_cast<T*>(shared);
    float* attention = shared + lens.room;
    float* across = attention + TILE_PIXELS;
    float* gathered = across + TILE_H * LOW_W;
    float* sums = gathered + LOW_ROWS * LOW_W;
    float* gates = sums + op.pitch();
    stage_t_map(op, t_map);
    if (threadIdx.x < MAP_ROWS) {
        const int r = threadIdx.x;
        t_bias[r] = r < op.classes ? op.t_bias[r] : 0.0f;
    } else if (threadIdx.x < MAP_ROWS + 2) {
        const bool low = threadIdx.x == MAP_ROWS;
        inverses[low ? 0 : 1] = 1.0f / (low ? op.low_h * op.low_w : op.high_h * op.high_w);
    }
    const Tile tile(op);
    fill(op, tile, tables);
    const LowPixels pixels(tile, op.low_w);
    const bool x2_aligned = op.high_w % 8 == 0 && wide(op.x2, op.x_batch, op.x_plane);
    const bool s3_aligned = op.low_w % 8 == 0 && wide(op.s3, op.s_batch, op.s_plane);
    const bool own_aligned =
        tile.column.own_from % 8 == 0 && tile.column.own_to % 8 == 0;
    const T* s3 = op.s3 + plane_at(blockIdx.z, op.s_batch, 0, 0) +
                  static_cast<size_t>(pixels.y) * op.low_w + pixels.x;
    const int low_at = (pixels.y - tile.row.from) * LOW_W + pixels.x - tile.low_x0;
    wait_for_previous();
    // No earlier: decoder_labels.cu reads what kernels before this one wrote without waiting.
    start_next();

    Eight<T> eights[S3_AT_ONCE<T>];
    fetch(s3, op.s_plane, threadIdx.x / 32, op.c3, pixels.count, s3_aligned, eights);
    sum_x2(op, tile, x2_aligned, shared, attention, sums);
    float total[1] = {threadIdx.x < TILE_PIXELS ? attention[threadIdx.x] : 0.0f};
    block_sum(total, warps);
    if (threadIdx.x == 0) sums[op.means() - 1] = total[0];
    gather(tile, tables, attention, across, gathered);
    sum_s3(op, pixels, s3, s3_aligned, gathered + low_at, eights, sums, own, lens.own_pitch,
           own_aligned);
    __syncthreads();
    leave_sums(op, sums);
    __syncthreads();
    // A thread of the warp that has least to do for t, meanwhile.
    if (threadIdx.x == THREADS - 32) last = is_last(op);
    scores_s3(op, tile, own, lens.own_pitch, t_map, t_bias, products);
    __syncthreads();
    if (!last) return;
    finish(op, inverses, shared, attention, sums, gates, op.map2 + static_cast<size_t>(blockIdx.z) * map2_len,
           op.map1 + static_cast<size_t>(blockIdx.z) * map1_len);
}

}  // namespace

// t_w .. sa1_b: parameters; lm, hm give the means of decoder2's low and high part. own_pitch ..
// room: struct Shared; map2_len, map1_len: elements of an image's map.
extern "C" __global__ void __launch_bounds__(512, 1)
    decoder_sums_f32(const float* s3, const float* x2, const float* t_w, const float* t_b, float* t,
                     float* partial, unsigned* counters, const float* sa2_w, const float* sa2_b,
                     const float* ca2_w, const float* ca2_b, const float* lm_w, const float* lm_b,
                     const float* hm_w, const float* hm_b, const float* ca1_w,
                     const float* ca1_b, const float* mix2, const float* wl2, const float* bl2,
                     const float* bias2, const float* mix1, const float* wl1, const float* bl1,
                     const float* bias1, const float* sa1_w, const float* sa1_b, float* map2,
                     float* map1, int act_s2, int act_c2, int act_c1, int c3, int c2, int width2,
                     int width1, int c1, int classes, int low_h, int low_w, int high_h, int high_w,
                     int own_pitch, int own_len, int products, int room, int map2_len, int map1_len,
                     int s_batch, int s_plane, int x_batch, int x_plane) {
    const Module two = {mix2, wl2, bl2, bias2, {sa2_w, sa2_b}, c2, width2};
    const Module one = {mix1, wl1, bl1, bias1, {sa1_w, sa1_b}, c1, width1};
    const Decoder<float> op = {s3, x2, t_w, t_b, t, partial, counters, {ca2_w, ca2_b},
                               {lm_w, lm_b}, {hm_w, hm_b}, {ca1_w, ca1_b}, two, one, map2,
                               map1, act_s2, act_c2, act_c1, c3, classes, low_h, low_w, high_h,
                               high_w, s_batch, s_plane, x_batch, x_plane};
    decoder_sums(op, {own_pitch, own_len, products, room}, map2_len, map1_len);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    decoder_sums_f16(const __half* s3, const __half* x2, const __half* t_w, const float* t_b,
                     __half* t, float* partial, unsigned* counters, const float* sa2_w,
                     const float* sa2_b, const float* ca2_w, const float* ca2_b, const float* lm_w,
                     const float* lm_b, const float* hm_w, const float* hm_b,
                     const float* ca1_w, const float* ca1_b, const float* mix2, const float* wl2,
                     const float* bl2, const float* bias2, const float* mix1, const float* wl1,
                     const float* bl1, const float* bias1, const float* sa1_w, const float* sa1_b,
                     __half* map2, __half* map1, int act_s2, int act_c2, int act_c1, int c3, int c2,
                     int width2, int width1, int c1, int classes, int low_h, int low_w, int high_h,
                     int high_w, int own_pitch, int own_len, int products, int room, int map2_len,
                     int map1_len, int s_batch, int s_plane, int x_batch, int x_plane) {
    const Module two = {mix2, wl2, bl2, bias2, {sa2_w, sa2_b}, c2, width2};
    const Module one = {mix1, wl1, bl1, bias1, {sa1_w, sa1_b}, c1, width1};
    const Decoder<__half> op = {s3, x2, t_w, t_b, t, partial, counters, {ca2_w, ca2_b},
                                {lm_w, lm_b}, {hm_w, hm_b}, {ca1_w, ca1_b}, two, one, map2,
                                map1, act_s2, act_c2, act_c1, c3, classes, low_h, low_w, high_h,
                                high_w, s_batch, s_plane, x_batch, x_plane};
    decoder_sums(op, {own_pitch, own_len, products, room}, map2_len, map1_len);
}
