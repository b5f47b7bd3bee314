// Means over pixels (global average pooling) and over channels.
//
// global_pool: y[n][c] = mean of a plane. A block of 256 threads per plane, grid (1, C, N), 32
// floats of shared memory; every element read once. Backward: dx = dy / pixels, elementwise.
// channel_mean: y[n][p] = mean over c. A thread per pixel walks the channels, neighbours read
// neighbours; grid (ceil(pixels / 256), 1, N). Backward: dx[c] = dy / C, elementwise.
#include "common.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void global_pool_forward(const T* RESTRICT x, T* RESTRICT y,
                                                    int pixels, int x_batch, int x_plane,
                                                    int y_batch, int y_plane) {
    __shared__ float shared[32];
    x += plane_at(blockIdx.z, x_batch, blockIdx.y, x_plane);
    float sum[1] = {0.0f};
    for (int i = threadIdx.x; i < pixels; i += blockDim.x) sum[0] += load(x + i);
    block_sum(sum, shared);
    if (threadIdx.x == 0) {
        store(y + plane_at(blockIdx.z, y_batch, blockIdx.y, y_plane), sum[0] / pixels);
    }
}

template <typename T>
__device__ __forceinline__ void channel_mean_forward(const T* RESTRICT x, T* RESTRICT y,
                                                     int channels, int pixels, int x_batch,
                                                     int x_plane, int y_batch) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pixels) return;
    x += plane_at(blockIdx.z, x_batch, 0, 0) + i;
    float sum = 0.0f;
#pragma unroll 8
    for (int c = 0; c < channels; ++c) sum += load(x + static_cast<size_t>(c) * x_plane);
    store(y + plane_at(blockIdx.z, y_batch, 0, 0) + i, sum / channels);
}

template <typename T>
__device__ __forceinline__ void global_pool_backward(const T* RESTRICT dy, T* dx,
                                                     int accumulate, int pixels, int dy_batch,
                                                     int dy_plane, int dx_batch, int dx_plane) {
    const float g = load(dy + plane_at(blockIdx.z, dy_batch, blockIdx.y, dy_plane)) / pixels;
    dx += plane_at(blockIdx.z, dx_batch, blockIdx.y, dx_plane);
    FOR_PIXELS(i, pixels) store(dx + i, accumulate ? load(dx + i) + g : g);
}

template <typename T>
__device__ __forceinline__ void channel_mean_backward(const T* RESTRICT dy, T* dx,
                                                      int accumulate, int channels, int pixels,
                                                      int dy_batch, int dx_batch, int dx_plane) {
    const float share = 1.0f / channels;
    dy += plane_at(blockIdx.z, dy_batch, 0, 0);
    dx += plane_at(blockIdx.z, dx_batch, blockIdx.y, dx_plane);
    FOR_PIXELS(i, pixels) {
        const float g = load(dy + i) * share;
        store(dx + i, accumulate ? load(dx + i) + g : g);
    }
}

}  // namespace

extern "C" __global__ void global_pool_forward_f32(const float* x, float* y, int pixels,
                                                   int x_batch, int x_plane, int y_batch,
                                                   int y_plane) {
    global_pool_forward(x, y, pixels, x_batch, x_plane, y_batch, y_plane);
}

extern "C" __global__ void global_pool_forward_f16(const __half* x, __half* y, int pixels,
                                                   int x_batch, int x_plane, int y_batch,
                                                   int y_plane) {
    global_pool_forward(x, y, pixels, x_batch, x_plane, y_batch, y_plane);
}

extern "C" __global__ void global_pool_backward_f32(const float* dy, float* dx, int accumulate,
                                                    int pixels, int dy_batch, int dy_plane,
                                                    int dx_batch, int dx_plane) {
    global_pool_backward(dy, dx, accumulate, pixels, dy_batch, dy_plane, dx_batch, dx_plane);
}

extern "C" __global__ void global_pool_backward_f16(const __half* dy, __half* dx, int accumulate,
                                                    int pixels, int dy_batch, int dy_plane,
                                                    int dx_batch, int dx_plane) {
    global_pool_backward(dy, dx, accumulate, pixels, dy_batch, dy_plane, dx_batch, dx_plane);
}

extern "C" __global__ void channel_mean_forward_f32(const float* x, float* y, int channels,
                                                    int pixels, int x_batch, int x_plane,
                                                    int y_batch) {
    channel_mean_forward(x, y, channels, pixels, x_batch, x_plane, y_batch);
}

extern "C" __global__ void channel_mean_forward_f16(const __half* x, __half* y, int channels,
                                                    int pixels, int x_batch, int x_plane,
                                                    int y_batch) {
    channel_mean_forward(x, y, channels, pixels, x_batch, x_plane, y_batch);
}

extern "C" __global__ void channel_mean_backward_f32(const float* dy, float* dx, int accumulate,
                                                     int channels, int pixels, int dy_batch,
                                                     int dx_batch, int dx_plane) {
    channel_mean_backward(dy, dx, accumulate, channels, pixels, dy_batch, dx_batch, dx_plane);
}

extern "C" __global__ void channel_mean_backward_f16(const __half* dy, __half* dx, int accumulate,
                                                     int channels, int pixels, int dy_batch,
                                                     int dx_batch, int dx_plane) {
    channel_mean_backward(dy, dx, accumulate, channels, pixels, dy_batch, dx_batch, dx_plane);
}
