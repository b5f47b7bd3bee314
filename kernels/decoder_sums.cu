// All that every pixel of the collapsed decoder has to wait for, in one launch
// (graph/passes/collapse.rs; decoder.cu does the same in four):
//   sa2 = act(w x2 + b), kept on chip; means over pixels of s3, x2, sa2 and of s3 under U^T sa2;
//   t = B s3 + b, the high-level features as class scores;
//   with the means of the whole image the channel attentions of both modules, and with these the maps
//   of both onto class scores, [A diag(ca) Wl; w], with the weights w of the spatial attention as one
//   more row: what decoder_labels.cu reads.
//
// A block of 256 threads has 32 x 8 pixels of x2 and those of s3 at half the size around them: s3 is
// linear in the weighted mean, so that a block adds up what its own pixels of sa2 weigh. It leaves one
// partial sum per mean. The last block of an image to come adds these up, always in the same order
// whichever block it is, and goes on to the gates. It is told by a counter per image, which goes back
// to zero; so a launch can be replayed.
// Bytes: x2 once, s3 once and 0.7 times again out of L2, t; 4 (2 c3 + c2 + 1) per block there and
// back. FLOPs: per pixel 3 c2 + 1 of x2, 2 c3 (classes + 2) of s3. Tensor cores make t in f16.
// The end, one block's: 128 partial sums of 321 means at 1024 x 512, 30 k products of gates, 90 k of
// maps. Shared: the largest of what the phases need, about 20 KB.
// Launch: 256 threads, grid (tiles of x2, 1, N): launch::decoder_sums().
#include "bilinear.cuh"
#include "decoder.cuh"

namespace {

constexpr int TILE_W = 32, TILE_H = 8, WARPS = TILE_WARPS;
static_assert(TILE_W * TILE_H == TILE_THREADS, "a thread per pixel of x2");

// A 1x1 convolution.
struct Affine {
    const float *w, *b;
};

// A module's map (ops/meu_scores.rs): A, Wl, bl and b; the spatial attention's weights.
struct Module {
    const float *mix, *low, *low_bias, *bias;
    Affine gate;
    int in, width;
};

template <typename T>
struct Decoder {
    const T *s3, *x2, *t_weights;
    const float* t_bias;
    T* t;
    float* partial;
    unsigned* counters;
    Affine ca2, low, high, ca1;
    Module two, one;
    T *map2, *map1;
    int act_s2, act_c2, act_c1, c3, classes, low_h, low_w, high_h, high_w;
    int s_batch, s_plane, x_batch, x_plane;

    __device__ __forceinline__ int means() const { return 2 * c3 + two.in + 1; }
};

// Pixels of s3 that a tile's pixels of x2 are interpolated from, and within them those that belong
// to the tile: where the pixel of x2 in their middle is its own.
struct Range {
    int from, to, own_from, own_to;
};

__device__ __forceinline__ Range low_range(int first, int end, int in, int out) {
    Range r;
    r.from = tap(first, in, out).lo;
    r.to = tap(end - 1, in, out).hi + 1;
    const auto middle = [in, out](int q) {
        return min(static_cast<int>((2u * q + 1u) * out / (2u * in)), out - 1);
    };
    r.own_from = r.from;
    while (r.own_from < r.to && middle(r.own_from) < first) ++r.own_from;
    r.own_to = r.to;
    while (r.own_to > r.own_from && middle(r.own_to - 1) >= end) --r.own_to;
    return r;
}

// A block's pixels of x2 and of s3. Sums over them: c3 of s3, c2 of x2, c3 of s3 under the weights, 1
// of the weights.
template <typename T>
struct Tile {
    int x0, y0, x1, y1;
    Range column, row;

    __device__ __forceinline__ Tile(const Decoder<T>& op) {
        const int tiles_x = (op.high_w + TILE_W - 1) / TILE_W;
        x0 = blockIdx.x % tiles_x * TILE_W, y0 = blockIdx.x / tiles_x * TILE_H;
        x1 = min(x0 + TILE_W, op.high_w), y1 = min(y0 + TILE_H, op.high_h);
        column = low_range(x0, x1, op.low_w, op.high_w);
        row = low_range(y0, y1, op.low_h, op.high_h);
    }
};

// Sums of x2 and, in `attention`, sa2 of the tile's pixels with zeros outside of the plane.
template <typename T>
__device__ __forceinline__ void sum_x2(const Decoder<T>& op, const Tile<T>& tile, float* dots,
                                       float* attention, float* sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c2 = op.two.in;
    const int x = tile.x0 + lane, rows_here = tile.y1 - tile.y0;
    const bool here = x < tile.x1;
    const T* from = op.x2 + plane_at(blockIdx.z, op.x_batch, 0, 0) +
                    static_cast<size_t>(tile.y0) * op.high_w + x;
    float dot[TILE_H] = {};
#pragma unroll 2
    for (int c = warp; c < c2; c += WARPS) {
        const T* plane = from + static_cast<size_t>(c) * op.x_plane;
        const float w = op.two.gate.w[c];
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < TILE_H; ++r) {
            const float v =
                here && r < rows_here ? load(plane + static_cast<size_t>(r) * op.high_w) : 0.0f;
            sum += v;
            dot[r] += w * v;
        }
        sum = warp_sum(sum);
        if (lane == 0) sums[op.c3 + c] = sum;
    }
#pragma unroll
    for (int r = 0; r < TILE_H; ++r) dots[(warp * TILE_H + r) * TILE_W + lane] = dot[r];
    __syncthreads();
    const int thread = threadIdx.x;
    float v = op.two.gate.b[0];
#pragma unroll
    for (int w = 0; w < WARPS; ++w) v += dots[w * TILE_THREADS + thread];
    const bool inside = here && thread / TILE_W < rows_here;
    attention[thread] = inside ? activate(v, op.act_s2) : 0.0f;
    __syncthreads();
}

// U^T sa2 of the tile's pixels, rows first.
template <typename T>
__device__ __forceinline__ void gather(const Decoder<T>& op, const Tile<T>& tile,
                                       const float* attention, float* across, float* gathered) {
    const int columns = tile.column.to - tile.column.from, rows_low = tile.row.to - tile.row.from;
    for (int i = threadIdx.x; i < TILE_H * columns; i += TILE_THREADS) {
        const int y = i / columns, q = tile.column.from + i % columns;
        int first, last;
        readers(q, op.low_w, op.high_w, &first, &last);
        first = max(first, tile.x0), last = min(last, tile.x1 - 1);
        float sum = 0.0f;
        for (int x = first; x <= last; ++x) {
            sum += tap_weight(q, x, op.low_w, op.high_w) * attention[y * TILE_W + x - tile.x0];
        }
        across[i] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows_low * columns; i += TILE_THREADS) {
        const int q = tile.row.from + i / columns;
        int first, last;
        readers(q, op.low_h, op.high_h, &first, &last);
        first = max(first, tile.y0), last = min(last, tile.y1 - 1);
        float sum = 0.0f;
        for (int y = first; y <= last; ++y) {
            sum += tap_weight(q, y, op.low_h, op.high_h) *
                   across[(y - tile.y0) * columns + i % columns];
        }
        gathered[i] = sum;
    }
    __syncthreads();
}

// Sums of s3, plain over the tile's own pixels and under the weights; eight channels at a time.
template <typename T>
__device__ __forceinline__ void sum_s3(const Decoder<T>& op, const Tile<T>& tile,
                                       const float* gathered, float* sums) {
    constexpr int AT_ONCE = 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int columns = tile.column.to - tile.column.from;
    const int region = columns * (tile.row.to - tile.row.from);
    const T* s3 = op.s3 + plane_at(blockIdx.z, op.s_batch, 0, 0);
    for (int c0 = warp * AT_ONCE; c0 < op.c3; c0 += WARPS * AT_ONCE) {
        float plain[AT_ONCE] = {}, weighted[AT_ONCE] = {};
        for (int i = lane; i < region; i += 32) {
            const int y = tile.row.from + i / columns, x = tile.column.from + i % columns;
            const bool own = y >= tile.row.own_from && y < tile.row.own_to &&
                             x >= tile.column.own_from && x < tile.column.own_to;
            const float g = gathered[i];
            const T* from = s3 + static_cast<size_t>(y) * op.low_w + x;
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const int c = min(c0 + j, op.c3 - 1);
                const float v = load(from + static_cast<size_t>(c) * op.s_plane);
                plain[j] += own ? v : 0.0f;
                weighted[j] += g * v;
            }
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const float a = warp_sum(plain[j]), b = warp_sum(weighted[j]);
            if (lane == 0 && c0 + j < op.c3) {
                sums[c0 + j] = a;
                sums[op.c3 + op.two.in + c0 + j] = b;
            }
        }
    }
}

// The weights of t as PixelMap reads them: halves as they are; floats turned over, to `staged`.
__device__ __forceinline__ const __half* t_map(const Decoder<__half>& op, float*) {
    return op.t_weights;
}
__device__ __forceinline__ const float* t_map(const Decoder<float>& op, float* staged) {
    for (int i = threadIdx.x; i < op.c3 * MAP_ROWS; i += TILE_THREADS) {
        const int k = i / MAP_ROWS, r = i % MAP_ROWS;
        staged[i] = r < op.classes ? op.t_weights[r * op.c3 + k] : 0.0f;
    }
    __syncthreads();
    return staged;
}

template <typename T>
__device__ __forceinline__ void scores_s3(const Decoder<T>& op, const Tile<T>& tile,
                                          float* staged) {
    using Map = PixelMap<T>;
    const int warp = threadIdx.x / 32, columns = tile.column.own_to - tile.column.own_from;
    const int own_pixels = columns * (tile.row.own_to - tile.row.own_from);
    const int plane = op.low_h * op.low_w;
    const T* s3 = op.s3 + plane_at(blockIdx.z, op.s_batch, 0, 0);
    T* t = op.t + static_cast<size_t>(blockIdx.z) * op.classes * plane;
    float* own = staged + warp * Map::WARP_FLOATS;
    const T* map = t_map(op, staged);
    for (int first = warp * Map::PIXELS; first < own_pixels; first += WARPS * Map::PIXELS) {
        const int i = first + static_cast<int>(threadIdx.x) % Map::PIXELS;
        const bool inside = i < own_pixels;
        const size_t pixel =
            inside ? static_cast<size_t>(tile.row.own_from + i / columns) * op.low_w +
                         tile.column.own_from + i % columns
                   : 0;
        Map scores;
        scores.apply(map, s3, op.s_plane, op.c3, pixel, inside, own);
#pragma unroll
        for (int j = 0; j < Map::STEPS; ++j) {
            const int r = scores.row(j);
            if (!inside || r >= op.classes) continue;
            store(t + static_cast<size_t>(r) * plane + pixel,
                  scores.value(j, own) + op.t_bias[r]);
        }
    }
}

// Writes this block's sums; true in the block that comes last, which sees everybody's.
template <typename T>
__device__ __forceinline__ bool last_to_come(const Decoder<T>& op, const float* sums) {
    __shared__ bool last;
    const int count = op.means();
    float* mine = op.partial + (static_cast<size_t>(blockIdx.z) * gridDim.x + blockIdx.x) * count;
    for (int i = threadIdx.x; i < count; i += TILE_THREADS) mine[i] = sums[i];
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicInc(op.counters + blockIdx.z, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// Means of the image from the blocks' sums: every warp adds up every eighth, then the eight.
template <typename T>
__device__ __forceinline__ void add_up(const Decoder<T>& op, float* of_warps, float* means) {
    constexpr int AT_ONCE = 4;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = op.means();
    const int blocks = gridDim.x;
    const float* partial = op.partial + static_cast<size_t>(blockIdx.z) * blocks * count;
    for (int i0 = lane; i0 < count; i0 += 32 * AT_ONCE) {
        float sum[AT_ONCE] = {};
#pragma unroll 4
        for (int b = warp; b < blocks; b += WARPS) {
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const int i = min(i0 + 32 * j, count - 1);
                sum[j] += __ldcg(partial + static_cast<size_t>(b) * count + i);
            }
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (i0 + 32 * j < count) of_warps[warp * count + i0 + 32 * j] = sum[j];
        }
    }
    __syncthreads();
    const float low = op.low_h * op.low_w, high = op.high_h * op.high_w;
    for (int i = threadIdx.x; i < count; i += TILE_THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += of_warps[w * count + i];
        means[i] = sum / (i < op.c3 ? low : high);
    }
    __syncthreads();
}

// Channel attentions of both modules.
template <typename T>
__device__ __forceinline__ void channel_gates(const Decoder<T>& op, const float* means, float* ca2,
                                              float* ca1, float* low, float* high) {
    const int width2 = op.two.width, width1 = op.one.width, c2 = op.two.in;
    rows(op.ca2.w, op.ca2.b, means, ca2, width2, op.c3, op.act_c2);
    rows(op.low.w, op.low.b, means + op.c3, low, width2, c2, 0);
    rows(op.high.w, op.high.b, means + op.c3 + c2, high, width2, op.c3 + 1, 0);
    __syncthreads();
    for (int i = threadIdx.x; i < width2; i += TILE_THREADS) high[i] += low[i] * ca2[i];
    __syncthreads();
    rows(op.ca1.w, op.ca1.b, high, ca1, width1, width2, op.act_c1);
    __syncthreads();
}

// A module's map with its channel attention, four rows of a column per thread. `gated`: room for
// width * MAP_ROWS floats.
template <typename T>
__device__ __forceinline__ void compose(const Module& op, int classes, const float* ca,
                                        float* gated, T* map) {
    using Map = PixelMap<T>;
    for (int i = threadIdx.x; i < op.width * MAP_ROWS; i += TILE_THREADS) {
        const int o = i / MAP_ROWS, r = i % MAP_ROWS;
        gated[i] = r < classes ? op.mix[r * op.width + o] * ca[o] : 0.0f;
    }
    __syncthreads();
    float* shifts = const_cast<float*>(Map::shifts(map, op.in));
    for (int i = threadIdx.x; i < MAP_ROWS / 4 * (op.in + 1); i += TILE_THREADS) {
        const int k = i % (op.in + 1), r0 = i / (op.in + 1) * 4;
        const bool shift = k == op.in;
        float sum[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int r = r0 + j;
            if (r == GATE) {
                sum[j] = shift ? op.gate.b[0] : op.gate.w[k];
            } else {
                sum[j] = shift && r < classes ? op.bias[r] : 0.0f;
            }
        }
#pragma unroll 8
        for (int o = 0; o < op.width; ++o) {
            const float v = shift ? op.low_bias[o] : op.low[o * op.in + k];
            const float4 g = *reinterpret_cast<const float4*>(gated + o * MAP_ROWS + r0);
            sum[0] += g.x * v;
            sum[1] += g.y * v;
            sum[2] += g.z * v;
            sum[3] += g.w * v;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (shift) {
                shifts[r0 + j] = sum[j];
            } else {
                store(map + Map::at(r0 + j, k, op.in), sum[j]);
            }
        }
    }
    __syncthreads();
}

// `phase` floats for what only one phase needs, `region` pixels of s3 around a tile.
template <typename T>
__device__ __forceinline__ void decoder_sums(const Decoder<T>& op, int phase, int region,
                                             int map2_len, int map1_len) {
    DYNAMIC_SHARED(float, temporary);
    __shared__ float warps[32];
    float* attention = temporary + phase;
    float* across = attention + TILE_THREADS;
    float* gathered = across + TILE_H * region;
    float* sums = gathered + region;
    float* gates = sums + op.means();
    start_next();
    wait_for_previous();
    const Tile<T> tile(op);
    sum_x2(op, tile, temporary, attention, sums);
    float total[1] = {attention[threadIdx.x]};
    block_sum(total, warps);
    if (threadIdx.x == 0) sums[op.means() - 1] = total[0];
    gather(op, tile, attention, across, gathered);
    sum_s3(op, tile, gathered, sums);
    scores_s3(op, tile, temporary);
    __syncthreads();
    if (!last_to_come(op, sums)) return;

    add_up(op, temporary, sums);
    float* ca2 = gates;
    float* ca1 = ca2 + op.two.width;
    float* low = ca1 + op.one.width;
    channel_gates(op, sums, ca2, ca1, low, low + op.two.width);
    compose(op.two, op.classes, ca2, temporary,
            op.map2 + static_cast<size_t>(blockIdx.z) * map2_len);
    compose(op.one, op.classes, ca1, temporary,
            op.map1 + static_cast<size_t>(blockIdx.z) * map1_len);
}

}  // namespace

// t_w .. sa1_b: parameters; lm, hm give the means of decoder2's low and high part. phase, region:
// floats and pixels that shared memory has room for; map2_len, map1_len: elements of an image's map.
extern "C" __global__ void __launch_bounds__(256, 2)
    decoder_sums_f32(const float* s3, const float* x2, const float* t_w, const float* t_b, float* t,
                     float* partial, unsigned* counters, const float* sa2_w, const float* sa2_b,
                     const float* ca2_w, const float* ca2_b, const float* lm_w, const float* lm_b,
                     const float* hm_w, const float* hm_b, const float* ca1_w,
                     const float* ca1_b, const float* mix2, const float* wl2, const float* bl2,
                     const float* bias2, const float* mix1, const float* wl1, const float* bl1,
                     const float* bias1, const float* sa1_w, const float* sa1_b, float* map2,
                     float* map1, int act_s2, int act_c2, int act_c1, int c3, int c2, int width2,
                     int width1, int c1, int classes, int low_h, int low_w, int high_h, int high_w,
                     int phase, int region, int map2_len, int map1_len, int s_batch, int s_plane,
                     int x_batch, int x_plane) {
    const Module two = {mix2, wl2, bl2, bias2, {sa2_w, sa2_b}, c2, width2};
    const Module one = {mix1, wl1, bl1, bias1, {sa1_w, sa1_b}, c1, width1};
    const Decoder<float> op = {s3, x2, t_w, t_b, t, partial, counters, {ca2_w, ca2_b},
                               {lm_w, lm_b}, {hm_w, hm_b}, {ca1_w, ca1_b}, two, one, map2,
                               map1, act_s2, act_c2, act_c1, c3, classes, low_h, low_w, high_h,
                               high_w, s_batch, s_plane, x_batch, x_plane};
    decoder_sums(op, phase, region, map2_len, map1_len);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    decoder_sums_f16(const __half* s3, const __half* x2, const __half* t_w, const float* t_b,
                     __half* t, float* partial, unsigned* counters, const float* sa2_w,
                     const float* sa2_b, const float* ca2_w, const float* ca2_b, const float* lm_w,
                     const float* lm_b, const float* hm_w, const float* hm_b,
                     const float* ca1_w, const float* ca1_b, const float* mix2, const float* wl2,
                     const float* bl2, const float* bias2, const float* mix1, const float* wl1,
                     const float* bl1, const float* bias1, const float* sa1_w, const float* sa1_b,
                     __half* map2, __half* map1, int act_s2, int act_c2, int act_c1, int c3, int c2,
                     int width2, int width1, int c1, int classes, int low_h, int low_w, int high_h,
                     int high_w, int phase, int region, int map2_len, int map1_len, int s_batch,
                     int s_plane, int x_batch, int x_plane) {
    const Module two = {mix2, wl2, bl2, bias2, {sa2_w, sa2_b}, c2, width2};
    const Module one = {mix1, wl1, bl1, bias1, {sa1_w, sa1_b}, c1, width1};
    const Decoder<__half> op = {s3, x2, t_w, t_b, t, partial, counters, {ca2_w, ca2_b},
                                {lm_w, lm_b}, {hm_w, hm_b}, {ca1_w, ca1_b}, two, one, map2,
                                map1, act_s2, act_c2, act_c1, c3, classes, low_h, low_w, high_h,
                                high_w, s_batch, s_plane, x_batch, x_plane};
    decoder_sums(op, phase, region, map2_len, map1_len);
}
