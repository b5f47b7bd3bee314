// Means of an upsampled tensor under per-pixel weights, without upsampling it (ops/weighted_pool.rs):
//   y[c] = mean over p of s[p] upsample(x)[c][p] = sum over q of (U^T s)[q] x[c][q] / pixels,
//   y[C] = mean of s.
// gather: g = U^T s, a thread per low-resolution pixel; reads s about 9 times out of L1, writes g
// (f32). Launch: block (32, 8), grid (tiles, 1, N): launch::tiles().
// weighted_pool: a block per channel adds up g * x, one more adds up s: x and s once, g per channel
// out of L2. Launch: 256 threads, grid (1, C + 1, N): launch::block_per_plane(). 128 bytes of
// shared memory.
#include "bilinear.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void weighted_pool_gather(const T* RESTRICT weights,
                                                     float* RESTRICT gathered, int in_h,
                                                     int in_w, int out_h, int out_w, int w_batch) {
    const int tiles_x = (in_w + 31) / 32;
    const int qx = blockIdx.x % tiles_x * 32 + threadIdx.x;
    const int qy = blockIdx.x / tiles_x * 8 + threadIdx.y;
    if (qx >= in_w || qy >= in_h) return;
    start_next();
    wait_for_previous();
    weights += plane_at(blockIdx.z, w_batch, 0, 0);
    const size_t image = static_cast<size_t>(blockIdx.z) * in_h * in_w;
    gathered[image + static_cast<size_t>(qy) * in_w + qx] =
        sample_transposed<T>(weights, nullptr, qy, qx, in_h, in_w, out_h, out_w);
}

template <typename T>
__device__ __forceinline__ void weighted_pool(const T* RESTRICT x,
                                              const T* RESTRICT weights,
                                              const float* RESTRICT gathered,
                                              T* RESTRICT y, int channels, int low, int high,
                                              int x_batch, int x_plane, int w_batch, int y_batch,
                                              int y_plane) {
    __shared__ float shared[32];
    start_next();
    wait_for_previous();
    const int c = blockIdx.y;
    float sum[1] = {0.0f};
    if (c < channels) {
        x += plane_at(blockIdx.z, x_batch, c, x_plane);
        gathered += static_cast<size_t>(blockIdx.z) * low;
        for (int i = threadIdx.x; i < low; i += blockDim.x) sum[0] += gathered[i] * load(x + i);
    } else {
        weights += plane_at(blockIdx.z, w_batch, 0, 0);
        for (int i = threadIdx.x; i < high; i += blockDim.x) sum[0] += load(weights + i);
    }
    block_sum(sum, shared);
    if (threadIdx.x == 0) store(y + plane_at(blockIdx.z, y_batch, c, y_plane), sum[0] / high);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    weighted_pool_gather_f32(const float* weights, float* gathered, int in_h, int in_w, int out_h,
                             int out_w, int w_batch) {
    weighted_pool_gather(weights, gathered, in_h, in_w, out_h, out_w, w_batch);
}

extern "C" __global__ void __launch_bounds__(256)
    weighted_pool_gather_f16(const __half* weights, float* gathered, int in_h, int in_w, int out_h,
                             int out_w, int w_batch) {
    weighted_pool_gather(weights, gathered, in_h, in_w, out_h, out_w, w_batch);
}

// low, high: pixels of x and of the weights.
extern "C" __global__ void __launch_bounds__(256)
    weighted_pool_f32(const float* x, const float* weights, const float* gathered, float* y,
                      int channels, int low, int high, int x_batch, int x_plane, int w_batch,
                      int y_batch, int y_plane) {
    weighted_pool(x, weights, gathered, y, channels, low, high, x_batch, x_plane, w_batch, y_batch,
                  y_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    weighted_pool_f16(const __half* x, const __half* weights, const float* gathered, __half* y,
                      int channels, int low, int high, int x_batch, int x_plane, int w_batch,
                      int y_batch, int y_plane) {
    weighted_pool(x, weights, gathered, y, channels, low, high, x_batch, x_plane, w_batch, y_batch,
                  y_plane);
}
