// Elementwise kernels: non-linearity, sum of two tensors, copy.
//
// Maths: y = act(x); y = a + b; y = x or y += x. Backward of the non-linearity from its output:
// ReLU passes dy where y > 0, the sigmoid has dx = dy * y * (1 - y).
// Bytes: one read per operand and one write per element (one more read where it accumulates);
// one FLOP or so per element: bound by memory. No shared memory.
// Launch: 256 threads, grid (ceil(pixels / 1024), C, N): launch::planes().
#include "common.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void activation_forward(const T* x, T* y, int act, int pixels,
                                                   int x_batch, int x_plane, int y_batch,
                                                   int y_plane) {
    x += plane_at(blockIdx.z, x_batch, blockIdx.y, x_plane);
    y += plane_at(blockIdx.z, y_batch, blockIdx.y, y_plane);
    FOR_PIXELS(i, pixels) store(y + i, activate(load(x + i), act));
}

template <typename T>
__device__ __forceinline__ void activation_backward(const T* y, const T* dy, T* dx, int act,
                                                    int accumulate, int pixels, int y_batch,
                                                    int y_plane, int dy_batch, int dy_plane,
                                                    int dx_batch, int dx_plane) {
    y += plane_at(blockIdx.z, y_batch, blockIdx.y, y_plane);
    dy += plane_at(blockIdx.z, dy_batch, blockIdx.y, dy_plane);
    dx += plane_at(blockIdx.z, dx_batch, blockIdx.y, dx_plane);
    FOR_PIXELS(i, pixels) {
        const float out = load(y + i);
        float g = load(dy + i);
        if (act == ACT_RELU) g = out > 0.0f ? g : 0.0f;
        if (act == ACT_SIGMOID) g *= out * (1.0f - out);
        store(dx + i, accumulate ? load(dx + i) + g : g);
    }
}

template <typename T>
__device__ __forceinline__ void add_forward(const T* a, const T* b, T* y, int pixels, int a_batch,
                                            int a_plane, int b_batch, int b_plane, int y_batch,
                                            int y_plane) {
    a += plane_at(blockIdx.z, a_batch, blockIdx.y, a_plane);
    b += plane_at(blockIdx.z, b_batch, blockIdx.y, b_plane);
    y += plane_at(blockIdx.z, y_batch, blockIdx.y, y_plane);
    FOR_PIXELS(i, pixels) store(y + i, load(a + i) + load(b + i));
}

template <typename T>
__device__ __forceinline__ void copy(const T* x, T* y, int accumulate, int pixels, int x_batch,
                                     int x_plane, int y_batch, int y_plane) {
    x += plane_at(blockIdx.z, x_batch, blockIdx.y, x_plane);
    y += plane_at(blockIdx.z, y_batch, blockIdx.y, y_plane);
    FOR_PIXELS(i, pixels) {
        const float v = load(x + i);
        store(y + i, accumulate ? load(y + i) + v : v);
    }
}

}  // namespace

// y may be x.
extern "C" __global__ void activation_forward_f32(const float* x, float* y, int act, int pixels,
                                                  int x_batch, int x_plane, int y_batch,
                                                  int y_plane) {
    activation_forward(x, y, act, pixels, x_batch, x_plane, y_batch, y_plane);
}

extern "C" __global__ void activation_forward_f16(const __half* x, __half* y, int act, int pixels,
                                                  int x_batch, int x_plane, int y_batch,
                                                  int y_plane) {
    activation_forward(x, y, act, pixels, x_batch, x_plane, y_batch, y_plane);
}

extern "C" __global__ void activation_backward_f32(const float* y, const float* dy, float* dx,
                                                   int act, int accumulate, int pixels,
                                                   int y_batch, int y_plane, int dy_batch,
                                                   int dy_plane, int dx_batch, int dx_plane) {
    activation_backward(y, dy, dx, act, accumulate, pixels, y_batch, y_plane, dy_batch, dy_plane,
                        dx_batch, dx_plane);
}

extern "C" __global__ void activation_backward_f16(const __half* y, const __half* dy, __half* dx,
                                                   int act, int accumulate, int pixels,
                                                   int y_batch, int y_plane, int dy_batch,
                                                   int dy_plane, int dx_batch, int dx_plane) {
    activation_backward(y, dy, dx, act, accumulate, pixels, y_batch, y_plane, dy_batch, dy_plane,
                        dx_batch, dx_plane);
}

extern "C" __global__ void add_forward_f32(const float* a, const float* b, float* y, int pixels,
                                           int a_batch, int a_plane, int b_batch, int b_plane,
                                           int y_batch, int y_plane) {
    add_forward(a, b, y, pixels, a_batch, a_plane, b_batch, b_plane, y_batch, y_plane);
}

extern "C" __global__ void add_forward_f16(const __half* a, const __half* b, __half* y, int pixels,
                                           int a_batch, int a_plane, int b_batch, int b_plane,
                                           int y_batch, int y_plane) {
    add_forward(a, b, y, pixels, a_batch, a_plane, b_batch, b_plane, y_batch, y_plane);
}

extern "C" __global__ void copy_f32(const float* x, float* y, int accumulate, int pixels,
                                    int x_batch, int x_plane, int y_batch, int y_plane) {
    copy(x, y, accumulate, pixels, x_batch, x_plane, y_batch, y_plane);
}

extern "C" __global__ void copy_f16(const __half* x, __half* y, int accumulate, int pixels,
                                    int x_batch, int x_plane, int y_batch, int y_plane) {
    copy(x, y, accumulate, pixels, x_batch, x_plane, y_batch, y_plane);
}
