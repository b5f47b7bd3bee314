// Both modules of the collapsed decoder as maps onto class scores (graph/passes/collapse.rs), with
// resize and argmax, in one launch; maps and t come from decoder_sums.cu:
//   sa2 = act(w2 x2 + b2),  z = M2 x2 + m2 + sa2 * upsample(t)            at a quarter of the size
//   sa1 = act(w1 x1 + b1),  scores = M1 x1 + m1 + sa1 * upsample(z)       at half the size
//   label = argmax of resize(scores)
//
// A block of 256 threads makes 64 x 16 labels: z with what the interpolation reads around it, then the
// scores, both in shared memory, then the labels from there. Neither is ever in memory, nor are the
// attentions, which are one more row of the maps.
//   1. A warp makes the products of 32 pixels at a time, z's pixels first and the scores' with them,
//      since M1 x1 waits for nothing: tensor cores in f16 (the maps are rounded to halves), or CUDA
//      cores. They stay where x was staged: 20 floats per pixel, the attention the last of them.
//   2. The scores get what they take of z, a pixel per thread.
//   3. Where the labels have twice the scores' size, the four labels between four pixels are made by a
//      thread together and the tiles begin in the middle of two pixels: 2 x 2 scores are read once for
//      four labels, and a tile's halo is smaller. A label by itself otherwise.
// All positions come from tables of a tile's rows and columns, made before the kernel has to wait. So
// are the first pixels loaded: x1 and x2 were complete when decoder_sums let this kernel start.
// Bytes: x1 1.2 times and x2 1.7 times with their halos, mostly out of L2, t, a byte per label. FLOPs:
// 2 (channels + 4) (classes + 1) per pixel of z and scores, 8 classes per label.
// Shared: 81 bytes per pixel of z and of scores, the maps: 43 KB in f16, 44 KB in f32, for factors of
// two. Registers are held to what lets four blocks live on a multiprocessor from Ampere on: an H100 has
// all blocks of 1024 x 512 at once.
// Launch: 256 threads, grid (tiles of labels, 1, N): launch::decoder_labels().
#include "bilinear.cuh"
#include "decoder.cuh"

namespace {

constexpr int LABELS_W = 64, LABELS_H = 16, WARPS = TILE_WARPS;

// Blocks that are to fit on a multiprocessor: before Ampere there is shared memory for two at most.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int BLOCKS = 2;
#else
constexpr int BLOCKS = 4;
#endif

// Rows and columns of a plane that lie in [y0, y1) x [x0, x1), its pixels numbered row by row.
struct Region {
    int y0, y1, x0, x1;

    __device__ __forceinline__ int rows() const { return y1 - y0; }
    __device__ __forceinline__ int columns() const { return x1 - x0; }
    __device__ __forceinline__ int pixels() const { return rows() * columns(); }
    __device__ __forceinline__ int groups() const { return (pixels() + GROUP - 1) / GROUP; }
    // What an interpolation from in_h x in_w to h x w reads for these.
    __device__ __forceinline__ Region source(int in_h, int in_w, int h, int w) const {
        return {tap(y0, in_h, h).lo, tap(y1 - 1, in_h, h).hi + 1, tap(x0, in_w, w).lo,
                tap(x1 - 1, in_w, w).hi + 1};
    }
};

// i / columns; exact as long as i * columns is below 2^31.
__device__ __forceinline__ unsigned inverse_of(int columns) { return 0x80000000u / columns + 1u; }
__device__ __forceinline__ int row_of(int i, unsigned inverse) {
    return static_cast<int>(static_cast<unsigned long long>(i) * inverse >> 31);
}

// What the pixels of a region are interpolated from: a tap per row, then one per column, counted from
// (from_y, from_x), those of rows times the `pitch` of the coarse plane. Thread `first` of the block.
__device__ __forceinline__ void fill_taps(Tap* taps, const Region& region, int h, int w, int in_h,
                                          int in_w, int from_y, int from_x, int pitch, int first) {
    const int rows = region.rows(), all = rows + region.columns();
    for (int i = first; i < all; i += TILE_THREADS) {
        const bool row = i < rows;
        Tap t = row ? tap(region.y0 + i, in_h, h) : tap(region.x0 + i - rows, in_w, w);
        const int from = row ? from_y : from_x, scale = row ? pitch : 1;
        t.lo = (t.lo - from) * scale, t.hi = (t.hi - from) * scale;
        taps[i] = t;
    }
}

// One value of a plane between four: rows first, as the CPU does.
__device__ __forceinline__ float between(float above_left, float above_right, float below_left,
                                         float below_right, float keep, float down, float across) {
    const float left = keep * above_left + down * below_left;
    const float right = keep * above_right + down * below_right;
    return left + across * (right - left);
}

__device__ __forceinline__ float4 between(float4 a, float4 b, float4 c, float4 d, float keep,
                                          float down, float across) {
    return {between(a.x, b.x, c.x, d.x, keep, down, across),
            between(a.y, b.y, c.y, d.y, keep, down, across),
            between(a.z, b.z, c.z, d.z, keep, down, across),
            between(a.w, b.w, c.w, d.w, keep, down, across)};
}

// v + shift + gate * coarse
__device__ __forceinline__ float4 gated_sum(float4 v, float4 shift, float gate, float4 coarse) {
    return {v.x + shift.x + gate * coarse.x, v.y + shift.y + gate * coarse.y,
            v.z + shift.z + gate * coarse.z, v.w + shift.w + gate * coarse.w};
}

// Channels of x that are staged at a time for tensor cores, in the slot where the products go later.
constexpr int CHUNK = 32, CHUNK_PITCH = GROUP + HALF_PAD;
static_assert(CHUNK * CHUNK_PITCH * 2 <= SLOT * 4, "a chunk of x");

// COUNT channels of a lane's pixel, all under way at once; out of L2, since the first ones are read
// before the kernel waits for the one before it.
template <int COUNT>
__device__ __forceinline__ void stage_channels(const __half* x, int plane, __half* to) {
    __half v[COUNT];
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
        v[j] = __ldcg(x);
        x += plane;
    }
#pragma unroll
    for (int j = 0; j < COUNT; ++j) to[j * CHUNK_PITCH] = v[j];
}

// The next up to CHUNK channels, of which there are whole sixteens.
__device__ __forceinline__ void stage_chunk(const __half* x, int plane, int count, float* slot) {
    __half* to = reinterpret_cast<__half*>(slot) + threadIdx.x % 32;
    if (count >= CHUNK) {
        stage_channels<CHUNK>(x, plane, to);
    } else {
        stage_channels<16>(x, plane, to);
    }
}
__device__ __forceinline__ void stage_chunk(const float*, int, int, float*) {}

// The map times x of a warp's pixels, into their slot; the first chunk is there already. All lanes see
// their pixels' products then.
__device__ __forceinline__ void multiply(const __half* map, int channels, const __half* x, int plane,
                                         float* slot) {
    const __half* xs = reinterpret_cast<const __half*>(slot);
    Scores acc[ROW_TILES];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) wmma::fill_fragment(acc[r], 0.0f);
#pragma unroll 1
    for (int k0 = 0; k0 < channels; k0 += CHUNK) {
        if (k0 > 0) {
            __syncwarp();
            stage_chunk(x + static_cast<size_t>(k0) * plane, plane, channels - k0, slot);
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < CHUNK; k += 16) {
            if (k0 + k >= channels) break;
            Columns b;
            wmma::load_matrix_sync(b, xs + k * CHUNK_PITCH, CHUNK_PITCH);
            multiply_rows(map + k0 + k, channels + HALF_PAD, b, acc);
        }
    }
    __syncwarp();
    // From the last rows on: what they leave with the next pixel is overwritten.
#pragma unroll
    for (int r = ROW_TILES - 1; r >= 0; --r) {
        wmma::store_matrix_sync(slot + 8 * r, acc[r], MAP_ROWS, wmma::mem_col_major);
        __syncwarp();
    }
}

// The same with a pixel per lane.
__device__ __forceinline__ void multiply(const float* map, int channels, const float* x, int plane,
                                         float* slot) {
    constexpr int AT_ONCE = 4;
    float sums[MAP_ROWS] = {};
#pragma unroll 1
    for (int k0 = 0; k0 < channels; k0 += AT_ONCE) {
        float v[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            v[j] = k0 + j < channels ? __ldcg(x) : 0.0f;
            x += plane;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const float* row = map + min(k0 + j, channels - 1) * MAP_ROWS;
#pragma unroll
            for (int r = 0; r < MAP_ROWS; r += 4) {
                const float4 w = load_four(row + r);
                sums[r] += w.x * v[j];
                sums[r + 1] += w.y * v[j];
                sums[r + 2] += w.z * v[j];
                sums[r + 3] += w.w * v[j];
            }
        }
    }
    float* own = slot + threadIdx.x % 32 * MAP_ROWS;
#pragma unroll
    for (int r = 0; r < MAP_ROWS; r += 4) {
        store_four(own + r, {sums[r], sums[r + 1], sums[r + 2], sums[r + 3]});
    }
}

// The largest of the scores so far.
struct Best {
    float value;
    int label;

    __device__ __forceinline__ void see(float v, int c) {
        if (c == 0 || v > value) value = v, label = c;
    }
};

__device__ __forceinline__ float part(const float4& v, int j) {
    return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
}

// A tile of scores in slots, and what it is of.
struct ScoreTile {
    const float* scores;
    Region region;
    int h, w, classes;

    __device__ __forceinline__ const float* at(int y, int x) const {
        return scores + slot_at((y - region.y0) * region.columns() + x - region.x0);
    }
};

// Labels of `tile`, each by itself.
__device__ __forceinline__ void label_each(const ScoreTile& from, const Region& tile, int out_h,
                                           int out_w, unsigned char* labels) {
    const int ox = tile.x0 + static_cast<int>(threadIdx.x) % LABELS_W;
    if (ox >= out_w) return;
    const Tap column = tap(ox, from.w, out_w);
    for (int oy = tile.y0 + static_cast<int>(threadIdx.x) / LABELS_W; oy < tile.y1;
         oy += TILE_THREADS / LABELS_W) {
        const Tap row = tap(oy, from.h, out_h);
        const float *a = from.at(row.lo, column.lo), *b = from.at(row.lo, column.hi);
        const float *c = from.at(row.hi, column.lo), *d = from.at(row.hi, column.hi);
        Best best = {0.0f, 0};
#pragma unroll 1
        for (int r = 0; r < MAP_ROWS; r += 4) {
            const float4 v =
                between(load_four(a + r), load_four(b + r), load_four(c + r), load_four(d + r),
                        1.0f - row.frac, row.frac, column.frac);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (r + j < from.classes) best.see(part(v, j), r + j);
            }
        }
        labels[static_cast<size_t>(oy) * out_w + ox] = static_cast<unsigned char>(best.label);
    }
}

// Labels of the cells [y0, y1) x [x0, x1) where there are twice as many labels as scores: cell (y, x)
// has the labels between the scores (y, x) and (y + 1, x + 1), a quarter and three quarters of the way
// on either side; beyond the plane there is nothing to go to.
__device__ __forceinline__ void label_cells(const ScoreTile& from, const Region& cells,
                                            unsigned char* labels) {
    const unsigned inverse = inverse_of(cells.columns());
    const int out_w = 2 * from.w;
    for (int i = threadIdx.x; i < cells.pixels(); i += TILE_THREADS) {
        const int row = row_of(i, inverse);
        const int y = cells.y0 + row, x = cells.x0 + i - row * cells.columns();
        const int y0 = max(y, 0), y1 = min(y + 1, from.h - 1);
        const int x0 = max(x, 0), x1 = min(x + 1, from.w - 1);
        const float *a = from.at(y0, x0), *b = from.at(y0, x1);
        const float *c = from.at(y1, x0), *d = from.at(y1, x1);
        const float down = y0 < y1 ? 1.0f : 0.0f, across = x0 < x1 ? 1.0f : 0.0f;
        Best best[2][2] = {};
#pragma unroll
        for (int r = 0; r < MAP_ROWS; r += 4) {
            const float4 va = load_four(a + r), vb = load_four(b + r);
            const float4 vc = load_four(c + r), vd = load_four(d + r);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (r + j >= from.classes) continue;
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    const float below = (q < 2 ? 0.25f : 0.75f) * down;
                    const float right = (q % 2 == 0 ? 0.25f : 0.75f) * across;
                    const float v = between(part(va, j), part(vb, j), part(vc, j), part(vd, j),
                                            1.0f - below, below, right);
                    best[q / 2][q % 2].see(v, r + j);
                }
            }
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int oy = 2 * y + 1 + q / 2, ox = 2 * x + 1 + q % 2;
            if (oy < 0 || ox < 0 || oy >= 2 * from.h || ox >= out_w) continue;
            labels[static_cast<size_t>(oy) * out_w + ox] =
                static_cast<unsigned char>(best[q / 2][q % 2].label);
        }
    }
}

// A map into shared memory, on its own while the block goes on.
template <typename T>
__device__ __forceinline__ void copy_map(const T* map, int len, T* to) {
    constexpr int AT_ONCE = 16 / sizeof(T);
    for (int i = threadIdx.x * AT_ONCE; i < len; i += TILE_THREADS * AT_ONCE) {
        copy_ahead<16>(to + i, map + i);
    }
}

// What a block works on: labels, cells where `doubled`, the scores and the pixels of z that they read.
struct Tile {
    bool doubled;
    Region labels, cells, fine, coarse;

    __device__ __forceinline__ Tile(int h2, int w2, int h1, int w1, int out_h, int out_w) {
        const int tiles_x = (out_w + LABELS_W - 1) / LABELS_W;
        const int tile_y = blockIdx.x / tiles_x, tile_x = blockIdx.x - tile_y * tiles_x;
        const int oy = tile_y * LABELS_H, ox = tile_x * LABELS_W;
        labels = {oy, min(oy + LABELS_H, out_h), ox, min(ox + LABELS_W, out_w)};
        doubled = out_h == 2 * h1 && out_w == 2 * w1;
        // The last row and column of tiles have the half cell at the end, too.
        cells = {oy / 2 - 1, labels.y1 == out_h ? h1 : labels.y1 / 2 - 1, ox / 2 - 1,
                 labels.x1 == out_w ? w1 : labels.x1 / 2 - 1};
        if (doubled) {
            fine = {max(cells.y0, 0), min(cells.y1 + 1, h1), max(cells.x0, 0),
                    min(cells.x1 + 1, w1)};
        } else {
            fine = labels.source(h1, w1, out_h, out_w);
        }
        coarse = fine.source(h2, w2, h1, w1);
    }
};

// The warp's next group: warps that are done early take more of them, z's take longest.
__device__ __forceinline__ int take(unsigned* next) {
    unsigned group = 0;
    if (threadIdx.x % 32 == 0) group = atomicAdd(next, 1u);
    return static_cast<int>(__shfl_sync(0xffffffffu, group, 0));
}

// `slots`: how many shared memory has room for.
template <typename T>
__device__ __forceinline__ void decoder_labels(const T* RESTRICT t, const T* RESTRICT x2,
                                               const T* RESTRICT x1, const T* map2,
                                               const T* map1, unsigned char* RESTRICT labels,
                                               int act2, int act1, int classes, int c2, int c1,
                                               int low_h, int low_w, int h2, int w2, int h1, int w1,
                                               int out_h, int out_w, int slots, int map2_len,
                                               int map1_len, int x2_batch, int x2_plane,
                                               int x1_batch, int x1_plane) {
    DYNAMIC_SHARED(float, shared);
    // The first group of pixels that no warp has yet.
    __shared__ unsigned next;
    if (threadIdx.x == 0) next = WARPS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T* staged2 = reinterpret_cast<T*>(shared + slots * SLOT);
    T* staged1 = staged2 + map2_len;
    Tap* taps2 = reinterpret_cast<Tap*>(staged1 + map1_len);
    start_next();
    const Tile tile(h2, w2, h1, w1, out_h, out_w);
    const Region fine = tile.fine, coarse = tile.coarse;
    Tap* taps1 = taps2 + coarse.rows() + coarse.columns();
    fill_taps(taps2, coarse, h2, w2, low_h, low_w, 0, 0, low_w, threadIdx.x);
    // Beginning with the last threads: the first ones have the others.
    fill_taps(taps1, fine, h1, w1, h2, w2, coarse.y0, coarse.x0, coarse.columns(),
              TILE_THREADS - 1 - threadIdx.x);
    const float* shifts2 = MapLayout<T>::shifts(staged2, c2);
    const float* shifts1 = MapLayout<T>::shifts(staged1, c1);
    const int groups2 = coarse.groups(), groups = groups2 + fine.groups();
    const unsigned inverse2 = inverse_of(coarse.columns()), inverse1 = inverse_of(fine.columns());
    float* scores = shared + groups2 * SLOT;
    t += static_cast<size_t>(blockIdx.z) * low_h * low_w * MAP_ROWS;
    x2 += plane_at(blockIdx.z, x2_batch, 0, 0);
    x1 += plane_at(blockIdx.z, x1_batch, 0, 0);

    bool first = true;
#pragma unroll 1
    for (int group = warp; first || group < groups; group = take(&next)) {
        const bool of_z = group < groups2;
        const int i = (of_z ? group : group - groups2) * GROUP + lane;
        const int channels = of_z ? c2 : c1, plane = of_z ? x2_plane : x1_plane;
        const int columns = of_z ? coarse.columns() : fine.columns();
        const bool inside = i < (of_z ? coarse.pixels() : fine.pixels());
        // Beyond the last pixel lanes have the first one: their products are not used.
        const int row = inside ? row_of(i, of_z ? inverse2 : inverse1) : 0;
        const int column = inside ? i - row * columns : 0;
        const int y = row + (of_z ? coarse.y0 : fine.y0);
        const T* x = (of_z ? x2 : x1) + static_cast<size_t>(y) * (of_z ? w2 : w1) + column +
                     (of_z ? coarse.x0 : fine.x0);
        float* slot = shared + group * SLOT;
        if (group < groups) stage_chunk(x, plane, channels, slot);
        if (first) {
            wait_for_previous();
            copy_map(map2 + static_cast<size_t>(blockIdx.z) * map2_len, map2_len, staged2);
            copy_map(map1 + static_cast<size_t>(blockIdx.z) * map1_len, map1_len, staged1);
            copies_done();
            __syncthreads();
            first = false;
        }
        if (group >= groups) break;
        multiply(of_z ? staged2 : staged1, channels, x, plane, slot);
        if (!inside) continue;
        float* own = slot + lane * MAP_ROWS;
        const float gate =
            activate(own[GATE] + (of_z ? shifts2 : shifts1)[GATE], of_z ? act2 : act1);
        if (!of_z) {
            own[GATE] = gate;
            continue;
        }
        const Tap down = taps2[row], across = taps2[coarse.rows() + column];
        const T* a = t + static_cast<size_t>(down.lo + across.lo) * MAP_ROWS;
        const T* b = t + static_cast<size_t>(down.lo + across.hi) * MAP_ROWS;
        const T* c = t + static_cast<size_t>(down.hi + across.lo) * MAP_ROWS;
        const T* d = t + static_cast<size_t>(down.hi + across.hi) * MAP_ROWS;
        // All of t at once, but in f32, where that spills.
#pragma unroll (sizeof(T) == 2 ? MAP_QUADS : 2)
        for (int r = 0; r < MAP_ROWS; r += 4) {
            const float4 up =
                between(load_four(a + r), load_four(b + r), load_four(c + r), load_four(d + r),
                        1.0f - down.frac, down.frac, across.frac);
            store_four(own + r, gated_sum(load_four(own + r), load_four(shifts2 + r), gate, up));
        }
    }
    __syncthreads();

    // Slots of 20 floats: eight neighbours' quads of classes are in all 32 banks.
#pragma unroll 1
    for (int pixel = threadIdx.x; pixel < fine.pixels(); pixel += TILE_THREADS) {
        const int row = row_of(pixel, inverse1), column = pixel - row * fine.columns();
        const Tap down = taps1[row], across = taps1[fine.rows() + column];
        const float *a = shared + slot_at(down.lo + across.lo);
        const float *b = shared + slot_at(down.lo + across.hi);
        const float *c = shared + slot_at(down.hi + across.lo);
        const float *d = shared + slot_at(down.hi + across.hi);
        float* own = scores + slot_at(pixel);
        const float gate = own[GATE];
#pragma unroll
        for (int r = 0; r < MAP_ROWS; r += 4) {
            const float4 up =
                between(load_four(a + r), load_four(b + r), load_four(c + r), load_four(d + r),
                        1.0f - down.frac, down.frac, across.frac);
            store_four(own + r, gated_sum(load_four(own + r), load_four(shifts1 + r), gate, up));
        }
    }
    __syncthreads();

    labels += static_cast<size_t>(blockIdx.z) * out_h * out_w;
    const ScoreTile from = {scores, fine, h1, w1, classes};
    if (tile.doubled) {
        label_cells(from, tile.cells, labels);
    } else {
        label_each(from, tile.labels, out_h, out_w, labels);
    }
}

}  // namespace

// low_h .. out_w: sizes of t, x2, x1 and the labels; map2_len, map1_len: elements from one image's map
// to the next one's.
extern "C" __global__ void __launch_bounds__(256, BLOCKS)
    decoder_labels_f32(const float* t, const float* x2, const float* x1, const float* map2,
                       const float* map1, unsigned char* labels, int act2, int act1, int classes,
                       int c2, int c1, int low_h, int low_w, int h2, int w2, int h1, int w1,
                       int out_h, int out_w, int slots, int map2_len, int map1_len,
                       int x2_batch, int x2_plane, int x1_batch, int x1_plane) {
    decoder_labels(t, x2, x1, map2, map1, labels, act2, act1, classes, c2, c1, low_h, low_w, h2, w2,
                   h1, w1, out_h, out_w, slots, map2_len, map1_len, x2_batch, x2_plane,
                   x1_batch, x1_plane);
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS)
    decoder_labels_f16(const __half* t, const __half* x2, const __half* x1, const __half* map2,
                       const __half* map1, unsigned char* labels, int act2, int act1, int classes,
                       int c2, int c1, int low_h, int low_w, int h2, int w2, int h1, int w1,
                       int out_h, int out_w, int slots, int map2_len, int map1_len,
                       int x2_batch, int x2_plane, int x1_batch, int x1_plane) {
    decoder_labels(t, x2, x1, map2, map1, labels, act2, act1, classes, c2, c1, low_h, low_w, h2, w2,
                   h1, w1, out_h, out_w, slots, map2_len, map1_len, x2_batch, x2_plane,
                   x1_batch, x1_plane);
}
