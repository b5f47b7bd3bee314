// A mutual-embedding upsampling module as a linear map onto class scores (ops/meu_scores.rs):
//   y = M x + m + sa * upsample(t),   M = A diag(ca) Wl,   m = A diag(ca) bl + b, per image.
//
// compose: M and m in f32, transposed, [in + 1][classes]: a thread per element. A few thousand
// elements of `width` products each. Launch: 256 threads, grid (elements / 256, 1, N).
// scores: a thread per pixel, 20 classes in registers, M in shared memory, read by broadcast, 16
// bytes for four classes. Bytes: x, sa and y once, t once (its reuse is L1's). FLOPs: 2 in + 8 per
// output. Shared: 80 (in + 1) bytes. Launch: block (32, 8), grid (tiles, groups of 20 classes, N).
// scores_argmax: the same for a tile of 64 x 16 pixels of the label image, at the resolution of x
// with what the interpolation reads around it, kept in shared memory; then bilinear resize and
// argmax out of there: the scores are never written. Bytes: x, sa, t with a halo (a third more for
// a factor of two), a byte per label. Shared: 80 (in + 1) + 80 (region) bytes: 30 KB for a factor of
// two and 32 channels. Launch: block (32, 8), grid (tiles, 1, N): launch::scores_argmax().
#include "bilinear.cuh"

namespace {

constexpr int CLASSES = 20;  // of a group
constexpr int LABELS_W = 64, LABELS_H = 16;

template <typename T>
__device__ __forceinline__ void meu_compose(const float* RESTRICT mix,
                                            const float* RESTRICT low,
                                            const float* RESTRICT low_bias,
                                            const float* RESTRICT bias,
                                            const T* RESTRICT ca, float* RESTRICT composed,
                                            int classes, int width, int in_c, int ca_batch,
                                            int ca_plane) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= classes * (in_c + 1)) return;
    start_next();
    wait_for_previous();
    const int c = i / (in_c + 1), k = i % (in_c + 1);
    ca += plane_at(blockIdx.z, ca_batch, 0, 0);
    float sum = k == in_c ? bias[c] : 0.0f;
    for (int o = 0; o < width; ++o) {
        const float gated = mix[c * width + o] * load(ca + static_cast<size_t>(o) * ca_plane);
        sum += gated * (k == in_c ? low_bias[o] : low[o * in_c + k]);
    }
    composed[(static_cast<size_t>(blockIdx.z) * (in_c + 1) + k) * classes + c] = sum;
}

// The operands of one image.
template <typename T>
struct Scores {
    const T *t, *x, *sa;
    const float* composed;
    int classes, in_c, in_h, in_w, h, w, t_plane, x_plane;

    // A group's columns of M and m, zeros beyond the last class; all threads of the block.
    __device__ __forceinline__ void stage(int first, float* m) const {
        const int threads = blockDim.x * blockDim.y;
        for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < (in_c + 1) * CLASSES;
             i += threads) {
            const int k = i / CLASSES, c = first + i % CLASSES;
            m[i] = c < classes ? composed[static_cast<size_t>(k) * classes + c] : 0.0f;
        }
    }

    // M x + m at a pixel.
    __device__ __forceinline__ void product(const float* m, size_t p, float (&acc)[CLASSES]) const {
#pragma unroll
        for (int c = 0; c < CLASSES; ++c) acc[c] = m[in_c * CLASSES + c];
        const T* from = x + p;
#pragma unroll 2
        for (int k = 0; k < in_c; ++k) {
            const float v = load(from);
            from += x_plane;
#pragma unroll
            for (int c = 0; c < CLASSES; c += 4) {
                const float4 w = *reinterpret_cast<const float4*>(m + k * CLASSES + c);
                acc[c] += w.x * v;
                acc[c + 1] += w.y * v;
                acc[c + 2] += w.z * v;
                acc[c + 3] += w.w * v;
            }
        }
    }
};

template <typename T>
__device__ __forceinline__ void meu_scores(const T* t, const T* x, const T* sa,
                                           const float* composed, T* RESTRICT y, int classes,
                                           int in_c, int in_h, int in_w, int h, int w, int t_batch,
                                           int t_plane, int x_batch, int x_plane, int sa_batch,
                                           int y_batch, int y_plane) {
    DYNAMIC_SHARED(float, m);
    const Scores<T> op = {t + plane_at(blockIdx.z, t_batch, 0, 0),
                          x + plane_at(blockIdx.z, x_batch, 0, 0),
                          sa + plane_at(blockIdx.z, sa_batch, 0, 0),
                          composed + static_cast<size_t>(blockIdx.z) * (in_c + 1) * classes,
                          classes, in_c, in_h, in_w, h, w, t_plane, x_plane};
    start_next();
    wait_for_previous();
    const int first = blockIdx.y * CLASSES;
    op.stage(first, m);
    __syncthreads();
    const int tiles_x = (w + 31) / 32;
    const int ox = blockIdx.x % tiles_x * 32 + threadIdx.x;
    const int oy = blockIdx.x / tiles_x * 8 + threadIdx.y;
    if (ox >= w || oy >= h) return;
    const size_t p = static_cast<size_t>(oy) * w + ox;
    float acc[CLASSES];
    op.product(m, p, acc);
    const Tap row = tap(oy, in_h, h), column = tap(ox, in_w, w);
    const float gate = load(op.sa + p);
    y += plane_at(blockIdx.z, y_batch, first, y_plane) + p;
#pragma unroll
    for (int c = 0; c < CLASSES; ++c) {
        if (first + c >= classes) break;
        const T* plane = op.t + static_cast<size_t>(first + c) * t_plane;
        store(y + static_cast<size_t>(c) * y_plane,
              acc[c] + gate * sample(plane, in_w, row, column));
    }
}

// `pitch`: room for the pixels of a region, per class.
template <typename T>
__device__ __forceinline__ void scores_argmax(const T* t, const T* x, const T* sa,
                                              const float* composed,
                                              unsigned char* RESTRICT labels, int classes,
                                              int in_c, int in_h, int in_w, int h, int w, int out_h,
                                              int out_w, int pitch, int t_batch, int t_plane,
                                              int x_batch, int x_plane, int sa_batch) {
    constexpr int PER_THREAD = LABELS_W * LABELS_H / 256;
    DYNAMIC_SHARED(float, m);
    float* scores = m + (in_c + 1) * CLASSES;
    const Scores<T> op = {t + plane_at(blockIdx.z, t_batch, 0, 0),
                          x + plane_at(blockIdx.z, x_batch, 0, 0),
                          sa + plane_at(blockIdx.z, sa_batch, 0, 0),
                          composed + static_cast<size_t>(blockIdx.z) * (in_c + 1) * classes,
                          classes, in_c, in_h, in_w, h, w, t_plane, x_plane};
    const int tiles_x = (out_w + LABELS_W - 1) / LABELS_W;
    const int ox0 = blockIdx.x % tiles_x * LABELS_W, oy0 = blockIdx.x / tiles_x * LABELS_H;
    // The pixels of x that the tile's labels are interpolated from.
    const int x0 = tap(ox0, w, out_w).lo, x1 = tap(min(ox0 + LABELS_W, out_w) - 1, w, out_w).hi + 1;
    const int y0 = tap(oy0, h, out_h).lo, y1 = tap(min(oy0 + LABELS_H, out_h) - 1, h, out_h).hi + 1;
    const int columns = x1 - x0, region = columns * (y1 - y0);
    const int thread = threadIdx.y * 32 + threadIdx.x;

    start_next();
    wait_for_previous();
    float best[PER_THREAD];
    int label[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) best[i] = 0.0f, label[i] = 0;
    for (int first = 0; first < classes; first += CLASSES) {
        op.stage(first, m);
        __syncthreads();
        for (int i = thread; i < region; i += 256) {
            const int iy = y0 + i / columns, ix = x0 + i % columns;
            const size_t p = static_cast<size_t>(iy) * w + ix;
            float acc[CLASSES];
            op.product(m, p, acc);
            const Tap row = tap(iy, in_h, h), column = tap(ix, in_w, w);
            const float gate = load(op.sa + p);
#pragma unroll
            for (int c = 0; c < CLASSES; ++c) {
                if (first + c >= classes) break;
                const T* plane = op.t + static_cast<size_t>(first + c) * t_plane;
                scores[c * pitch + i] = acc[c] + gate * sample(plane, in_w, row, column);
            }
        }
        __syncthreads();
        const int group = min(CLASSES, classes - first);
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) {
            const int ox = ox0 + threadIdx.x + i % (LABELS_W / 32) * 32;
            const int oy = oy0 + threadIdx.y + i / (LABELS_W / 32) * 8;
            if (ox >= out_w || oy >= out_h) continue;
            Tap row = tap(oy, h, out_h), column = tap(ox, w, out_w);
            row.lo -= y0, row.hi -= y0, column.lo -= x0, column.hi -= x0;
            for (int c = 0; c < group; ++c) {
                const float v = sample(scores + c * pitch, columns, row, column);
                if (first + c == 0 || v > best[i]) best[i] = v, label[i] = first + c;
            }
        }
        __syncthreads();
    }
    labels += static_cast<size_t>(blockIdx.z) * out_h * out_w;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const int ox = ox0 + threadIdx.x + i % (LABELS_W / 32) * 32;
        const int oy = oy0 + threadIdx.y + i / (LABELS_W / 32) * 8;
        if (ox >= out_w || oy >= out_h) continue;
        labels[static_cast<size_t>(oy) * out_w + ox] = static_cast<unsigned char>(label[i]);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    meu_compose_f32(const float* mix, const float* low, const float* low_bias, const float* bias,
                    const float* ca, float* composed, int classes, int width, int in_c,
                    int ca_batch, int ca_plane) {
    meu_compose(mix, low, low_bias, bias, ca, composed, classes, width, in_c, ca_batch, ca_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    meu_compose_f16(const float* mix, const float* low, const float* low_bias, const float* bias,
                    const __half* ca, float* composed, int classes, int width, int in_c,
                    int ca_batch, int ca_plane) {
    meu_compose(mix, low, low_bias, bias, ca, composed, classes, width, in_c, ca_batch, ca_plane);
}

// in_h, in_w: size of t; h, w: size of x and y.
extern "C" __global__ void __launch_bounds__(256, 2)
    meu_scores_f32(const float* t, const float* x, const float* sa, const float* composed, float* y,
                   int classes, int in_c, int in_h, int in_w, int h, int w, int t_batch,
                   int t_plane, int x_batch, int x_plane, int sa_batch, int y_batch, int y_plane) {
    meu_scores(t, x, sa, composed, y, classes, in_c, in_h, in_w, h, w, t_batch, t_plane, x_batch,
               x_plane, sa_batch, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    meu_scores_f16(const __half* t, const __half* x, const __half* sa, const float* composed,
                   __half* y, int classes, int in_c, int in_h, int in_w, int h, int w, int t_batch,
                   int t_plane, int x_batch, int x_plane, int sa_batch, int y_batch, int y_plane) {
    meu_scores(t, x, sa, composed, y, classes, in_c, in_h, in_w, h, w, t_batch, t_plane, x_batch,
               x_plane, sa_batch, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    scores_argmax_f32(const float* t, const float* x, const float* sa, const float* composed,
                      unsigned char* labels, int classes, int in_c, int in_h, int in_w, int h,
                      int w, int out_h, int out_w, int pitch, int t_batch, int t_plane, int x_batch,
                      int x_plane, int sa_batch) {
    scores_argmax(t, x, sa, composed, labels, classes, in_c, in_h, in_w, h, w, out_h, out_w, pitch,
                  t_batch, t_plane, x_batch, x_plane, sa_batch);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    scores_argmax_f16(const __half* t, const __half* x, const __half* sa, const float* composed,
                      unsigned char* labels, int classes, int in_c, int in_h, int in_w, int h,
                      int w, int out_h, int out_w, int pitch, int t_batch, int t_plane, int x_batch,
                      int x_plane, int sa_batch) {
    scores_argmax(t, x, sa, composed, labels, classes, in_c, in_h, in_w, h, w, out_h, out_w, pitch,
                  t_batch, t_plane, x_batch, x_plane, sa_batch);
}
