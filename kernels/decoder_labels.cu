// Both modules of the collapsed decoder as maps onto class scores (graph/passes/collapse.rs), with
// resize and argmax, in one launch; maps and t come from decoder_sums.cu:
//   sa2 = act(w2 x2 + b2),  z = M2 x2 + m2 + sa2 * upsample(t)            at a quarter of the size
//   sa1 = act(w1 x1 + b1),  scores = M1 x1 + m1 + sa1 * upsample(z)       at half the size
//   label = argmax of resize(scores)
//
// A block of 256 threads makes 64 x 16 labels: z with what the interpolation reads around it, then the
// scores, both in shared memory, then the labels from there. Neither is ever in memory, nor are the
// attentions, which are one more row of the maps. A warp works on 16 pixels at a time with the tensor
// cores (f16; the maps are rounded to halves), or on 32 (f32).
// Bytes: x1 1.3 times and x2 2.1 times with their halos, mostly out of L2, t, a byte per label. FLOPs:
// 2 (channels + 4) (classes + 1) per pixel of z and scores, 8 classes per label.
// Shared: scores in f32, z as the tensors are stored, 1.6 KB per warp for tensor cores: 47 KB in f16,
// 40 KB in f32, for 19 classes and factors of two.
// Launch: 256 threads, grid (tiles of labels, 1, N): launch::decoder_labels().
#include "bilinear.cuh"
#include "decoder.cuh"

namespace {

constexpr int LABELS_W = 64, LABELS_H = 16, WARPS = TILE_WARPS;

// Rows and columns of a plane that lie in [y0, y1) x [x0, x1).
struct Region {
    int y0, y1, x0, x1;

    __device__ __forceinline__ int columns() const { return x1 - x0; }
    __device__ __forceinline__ int pixels() const { return (y1 - y0) * columns(); }
    // What an interpolation from in_h x in_w to h x w reads for these.
    __device__ __forceinline__ Region source(int in_h, int in_w, int h, int w) const {
        return {tap(y0, in_h, h).lo, tap(y1 - 1, in_h, h).hi + 1, tap(x0, in_w, w).lo,
                tap(x1 - 1, in_w, w).hi + 1};
    }
};

// Planes of which a region is at hand: all of it in memory, or only that in shared memory.
template <typename T>
struct Coarse {
    const T* values;
    int plane, h, w;  // of the whole plane
    int y0, x0, pitch;

    __device__ __forceinline__ float at(int c, Tap row, Tap column) const {
        return sample(values + static_cast<size_t>(c) * plane, pitch, row, column);
    }
    __device__ __forceinline__ Tap row(int y, int out) const {
        Tap t = tap(y, h, out);
        t.lo -= y0, t.hi -= y0;
        return t;
    }
    __device__ __forceinline__ Tap column(int x, int out) const {
        Tap t = tap(x, w, out);
        t.lo -= x0, t.hi -= x0;
        return t;
    }
};

// y = M x + m + act(gate) * upsample(coarse) in a region of an h x w plane; plane c of y starts at
// c * pitch.
template <typename T, typename From, typename To>
__device__ __forceinline__ void module(const T* map, int channels, int classes, int act,
                                       const T* x, int plane, int h, int w, Region region,
                                       const Coarse<From>& coarse, To* y, int pitch, float* own) {
    using Map = PixelMap<T>;
    const float* shifts = Map::shifts(map, channels);
    const int pixels = region.pixels(), columns = region.columns(), warp = threadIdx.x / 32;
    for (int first = warp * Map::PIXELS; first < pixels; first += WARPS * Map::PIXELS) {
        const int i = first + static_cast<int>(threadIdx.x) % Map::PIXELS;
        const bool inside = i < pixels;
        const int iy = inside ? region.y0 + i / columns : 0;
        const int ix = inside ? region.x0 + i % columns : 0;
        Map scores;
        scores.apply(map, x, plane, channels, static_cast<size_t>(iy) * w + ix, inside, own);
        if (!inside) continue;
        const Tap row = coarse.row(iy, h), column = coarse.column(ix, w);
        const float gate = activate(scores.gate(own) + shifts[GATE], act);
#pragma unroll
        for (int j = 0; j < Map::STEPS; ++j) {
            const int r = scores.row(j);
            if (r >= classes) break;
            store(y + r * pitch + i,
                  scores.value(j, own) + shifts[r] + gate * coarse.at(r, row, column));
        }
    }
}

// `pitch`, `z_pitch`: room for the pixels of a tile's scores and of its z, per class.
template <typename T>
__device__ __forceinline__ void decoder_labels(const T* RESTRICT t, const T* RESTRICT x2,
                                               const T* RESTRICT x1, const T* map2,
                                               const T* map1, unsigned char* RESTRICT labels,
                                               int act2, int act1, int classes, int c2, int c1,
                                               int low_h, int low_w, int h2, int w2, int h1, int w1,
                                               int out_h, int out_w, int pitch, int z_pitch,
                                               int map2_len, int map1_len, int x2_batch,
                                               int x2_plane, int x1_batch, int x1_plane) {
    using Map = PixelMap<T>;
    DYNAMIC_SHARED(float, shared);
    float* own = shared + threadIdx.x / 32 * Map::WARP_FLOATS;
    float* scores = shared + WARPS * Map::WARP_FLOATS;
    T* z = reinterpret_cast<T*>(scores + classes * pitch);
    const int tiles_x = (out_w + LABELS_W - 1) / LABELS_W;
    const int ox0 = blockIdx.x % tiles_x * LABELS_W, oy0 = blockIdx.x / tiles_x * LABELS_H;
    const Region tile = {oy0, min(oy0 + LABELS_H, out_h), ox0, min(ox0 + LABELS_W, out_w)};
    const Region fine = tile.source(h1, w1, out_h, out_w), half = fine.source(h2, w2, h1, w1);
    start_next();
    wait_for_previous();

    t += static_cast<size_t>(blockIdx.z) * classes * low_h * low_w;
    const Coarse<T> low = {t, low_h * low_w, low_h, low_w, 0, 0, low_w};
    module(map2 + static_cast<size_t>(blockIdx.z) * map2_len, c2, classes, act2,
           x2 + plane_at(blockIdx.z, x2_batch, 0, 0), x2_plane, h2, w2, half, low, z, z_pitch, own);
    __syncthreads();
    const Coarse<T> middle = {z, z_pitch, h2, w2, half.y0, half.x0, half.columns()};
    module(map1 + static_cast<size_t>(blockIdx.z) * map1_len, c1, classes, act1,
           x1 + plane_at(blockIdx.z, x1_batch, 0, 0), x1_plane, h1, w1, fine, middle, scores, pitch,
           own);
    __syncthreads();

    const Coarse<float> high = {scores, pitch, h1, w1, fine.y0, fine.x0, fine.columns()};
    labels += static_cast<size_t>(blockIdx.z) * out_h * out_w;
    const int ox = ox0 + threadIdx.x % LABELS_W;
    if (ox >= out_w) return;
    const Tap column = high.column(ox, out_w);
    for (int oy = oy0 + threadIdx.x / LABELS_W; oy < tile.y1; oy += TILE_THREADS / LABELS_W) {
        const Tap row = high.row(oy, out_h);
        float best = high.at(0, row, column);
        int label = 0;
        for (int c = 1; c < classes; ++c) {
            const float v = high.at(c, row, column);
            if (v > best) best = v, label = c;
        }
        labels[static_cast<size_t>(oy) * out_w + ox] = static_cast<unsigned char>(label);
    }
}

}  // namespace

// low_h .. out_w: sizes of t, x2, x1 and the labels; map2_len, map1_len: elements from one image's map
// to the next one's.
extern "C" __global__ void __launch_bounds__(256, 2)
    decoder_labels_f32(const float* t, const float* x2, const float* x1, const float* map2,
                       const float* map1, unsigned char* labels, int act2, int act1, int classes,
                       int c2, int c1, int low_h, int low_w, int h2, int w2, int h1, int w1,
                       int out_h, int out_w, int pitch, int z_pitch, int map2_len, int map1_len,
                       int x2_batch, int x2_plane, int x1_batch, int x1_plane) {
    decoder_labels(t, x2, x1, map2, map1, labels, act2, act1, classes, c2, c1, low_h, low_w, h2, w2,
                   h1, w1, out_h, out_w, pitch, z_pitch, map2_len, map1_len, x2_batch, x2_plane,
                   x1_batch, x1_plane);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    decoder_labels_f16(const __half* t, const __half* x2, const __half* x1, const __half* map2,
                       const __half* map1, unsigned char* labels, int act2, int act1, int classes,
                       int c2, int c1, int low_h, int low_w, int h2, int w2, int h1, int w1,
                       int out_h, int out_w, int pitch, int z_pitch, int map2_len, int map1_len,
                       int x2_batch, int x2_plane, int x1_batch, int x1_plane) {
    decoder_labels(t, x2, x1, map2, map1, labels, act2, act1, classes, c2, c1, low_h, low_w, h2, w2,
                   h1, w1, out_h, out_w, pitch, z_pitch, map2_len, map1_len, x2_batch, x2_plane,
                   x1_batch, x1_plane);
}
