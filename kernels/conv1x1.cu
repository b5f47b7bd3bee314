// What surrounds the matrix product of a 1x1 convolution (the product itself is cuBLAS's):
// y = act(x + bias + residual) with x = W x' in f32: y itself, or scratch where y is stored in half
// precision, so that the sum is rounded once.
//
// Bytes: x read, y written, the residual read; bound by memory.
// Launch: 256 threads, grid (ceil(pixels / 1024), C, N): launch.rs, planes().
#include "common.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void conv1x1_epilogue(const float* x, T* y,
                                                 const float* __restrict__ bias,
                                                 const T* __restrict__ residual, int act,
                                                 int pixels, int x_batch, int x_plane, int y_batch,
                                                 int y_plane, int r_batch, int r_plane) {
    const float shift = bias != nullptr ? bias[blockIdx.y] : 0.0f;
    x += plane_at(blockIdx.z, x_batch, blockIdx.y, x_plane);
    y += plane_at(blockIdx.z, y_batch, blockIdx.y, y_plane);
    if (residual != nullptr) residual += plane_at(blockIdx.z, r_batch, blockIdx.y, r_plane);
    FOR_PIXELS(i, pixels) {
        float v = x[i] + shift;
        if (residual != nullptr) v += load(residual + i);
        store(y + i, activate(v, act));
    }
}

}  // namespace

// y may be x.
extern "C" __global__ void conv1x1_epilogue_f32(const float* x, float* y, const float* bias,
                                                const float* residual, int act, int pixels,
                                                int x_batch, int x_plane, int y_batch, int y_plane,
                                                int r_batch, int r_plane) {
    conv1x1_epilogue(x, y, bias, residual, act, pixels, x_batch, x_plane, y_batch, y_plane, r_batch,
                     r_plane);
}

extern "C" __global__ void conv1x1_epilogue_f16(const float* x, __half* y, const float* bias,
                                                const __half* residual, int act, int pixels,
                                                int x_batch, int x_plane, int y_batch, int y_plane,
                                                int r_batch, int r_plane) {
    conv1x1_epilogue(x, y, bias, residual, act, pixels, x_batch, x_plane, y_batch, y_plane, r_batch,
                     r_plane);
}
