// Bilinear resize; for labels fused with the argmax over classes, so that the resized scores are
// never in memory.
//
// Forward: a thread makes one pixel of 8 channels (the positions are computed once for all);
// reads in_h * in_w per channel from DRAM, the rest from L1, writes out_h * out_w.
// Backward: the transpose, gathered: a thread per input pixel sums the outputs that read it.
// Argmax: a thread per output pixel; reads the scores, writes a byte per pixel.
// Launch: block (32, 8), grid (tiles of 32 x 8, groups of 8 channels or channels, N). No shared
// memory.
#include "bilinear.cuh"

namespace {

constexpr int RESIZE_CHANNELS = 8;

template <typename T>
__device__ __forceinline__ void resize_forward(const T* RESTRICT x, T* RESTRICT y,
                                               int channels, int in_h, int in_w, int out_h,
                                               int out_w, int x_batch, int x_plane, int y_batch,
                                               int y_plane) {
    const int tiles_x = (out_w + 31) / 32;
    const int ox = blockIdx.x % tiles_x * 32 + threadIdx.x;
    const int oy = blockIdx.x / tiles_x * 8 + threadIdx.y;
    if (ox >= out_w || oy >= out_h) return;
    const Tap row = tap(oy, in_h, out_h), column = tap(ox, in_w, out_w);
    const int last = min(channels, (static_cast<int>(blockIdx.y) + 1) * RESIZE_CHANNELS);
    for (int c = blockIdx.y * RESIZE_CHANNELS; c < last; ++c) {
        const float v = sample(x + plane_at(blockIdx.z, x_batch, c, x_plane), in_w, row, column);
        store(y + plane_at(blockIdx.z, y_batch, c, y_plane) + static_cast<size_t>(oy) * out_w + ox,
              v);
    }
}

// in_h, in_w: size of dx; out_h, out_w: size of dy. grid.y is the channel.
template <typename T>
__device__ __forceinline__ void resize_backward(const T* RESTRICT dy, T* dx, int accumulate,
                                                int in_h, int in_w, int out_h, int out_w,
                                                int dy_batch, int dy_plane, int dx_batch,
                                                int dx_plane) {
    const int tiles_x = (in_w + 31) / 32;
    const int qx = blockIdx.x % tiles_x * 32 + threadIdx.x;
    const int qy = blockIdx.x / tiles_x * 8 + threadIdx.y;
    if (qx >= in_w || qy >= in_h) return;
    dy += plane_at(blockIdx.z, dy_batch, blockIdx.y, dy_plane);
    T* target = dx + plane_at(blockIdx.z, dx_batch, blockIdx.y, dx_plane) +
                static_cast<size_t>(qy) * in_w + qx;
    const T* no_gate = nullptr;
    const float g = sample_transposed(dy, no_gate, qy, qx, in_h, in_w, out_h, out_w);
    store(target, accumulate ? load(target) + g : g);
}

template <typename T>
__device__ __forceinline__ void resize_argmax(const T* RESTRICT scores,
                                              unsigned char* RESTRICT labels, int classes,
                                              int in_h, int in_w, int out_h, int out_w,
                                              int x_batch, int x_plane) {
    const int tiles_x = (out_w + 31) / 32;
    const int ox = blockIdx.x % tiles_x * 32 + threadIdx.x;
    const int oy = blockIdx.x / tiles_x * 8 + threadIdx.y;
    if (ox >= out_w || oy >= out_h) return;
    const Tap row = tap(oy, in_h, out_h), column = tap(ox, in_w, out_w);
    const T* plane = scores + plane_at(blockIdx.z, x_batch, 0, 0);
    float best = sample(plane, in_w, row, column);
    int label = 0;
    for (int c = 1; c < classes; ++c) {
        plane += x_plane;
        const float v = sample(plane, in_w, row, column);
        if (v > best) {
            best = v;
            label = c;
        }
    }
    const size_t image = static_cast<size_t>(blockIdx.z) * out_h * out_w;
    labels[image + static_cast<size_t>(oy) * out_w + ox] = static_cast<unsigned char>(label);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    resize_forward_f32(const float* x, float* y, int channels, int in_h, int in_w, int out_h,
                       int out_w, int x_batch, int x_plane, int y_batch, int y_plane) {
    resize_forward(x, y, channels, in_h, in_w, out_h, out_w, x_batch, x_plane, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    resize_forward_f16(const __half* x, __half* y, int channels, int in_h, int in_w, int out_h,
                       int out_w, int x_batch, int x_plane, int y_batch, int y_plane) {
    resize_forward(x, y, channels, in_h, in_w, out_h, out_w, x_batch, x_plane, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    resize_backward_f32(const float* dy, float* dx, int accumulate, int in_h, int in_w, int out_h,
                        int out_w, int dy_batch, int dy_plane, int dx_batch, int dx_plane) {
    resize_backward(dy, dx, accumulate, in_h, in_w, out_h, out_w, dy_batch, dy_plane, dx_batch,
                    dx_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    resize_backward_f16(const __half* dy, __half* dx, int accumulate, int in_h, int in_w, int out_h,
                        int out_w, int dy_batch, int dy_plane, int dx_batch, int dx_plane) {
    resize_backward(dy, dx, accumulate, in_h, in_w, out_h, out_w, dy_batch, dy_plane, dx_batch,
                    dx_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    resize_argmax_f32(const float* scores, unsigned char* labels, int classes, int in_h, int in_w,
                      int out_h, int out_w, int x_batch, int x_plane) {
    resize_argmax(scores, labels, classes, in_h, in_w, out_h, out_w, x_batch, x_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    resize_argmax_f16(const __half* scores, unsigned char* labels, int classes, int in_h, int in_w,
                      int out_h, int out_w, int x_batch, int x_plane) {
    resize_argmax(scores, labels, classes, in_h, in_w, out_h, out_w, x_batch, x_plane);
}
