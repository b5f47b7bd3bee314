// Sums in two levels, both in a fixed order: the same result on every run, no atomics.
//
// channel_sum: partial[part][c] = sum of a piece of 4096 pixels of channel c; a part is an image's
// piece. Reads every element once. 256 threads, grid (pieces, C, N), 32 floats of shared memory.
// sum_partials: out[i] = sum over parts of partial[part][i], in double. A thread per i.
#include "common.cuh"

namespace {

// partial is (N * pieces) x C.
template <typename T>
__device__ __forceinline__ void channel_sum(const T* RESTRICT x, float* RESTRICT partial,
                                            int pixels, int x_batch, int x_plane) {
    __shared__ float shared[32];
    x += plane_at(blockIdx.z, x_batch, blockIdx.y, x_plane);
    const int first = blockIdx.x * REDUCTION_PIXELS + threadIdx.x;
    float sum[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < REDUCTION_PER_THREAD; ++k) {
        const int i = first + k * REDUCTION_THREADS;
        if (i < pixels) sum[0] += load(x + i);
    }
    block_sum(sum, shared);
    if (threadIdx.x == 0) {
        const size_t part = static_cast<size_t>(blockIdx.z) * gridDim.x + blockIdx.x;
        partial[part * gridDim.y + blockIdx.y] = sum[0];
    }
}

}  // namespace

extern "C" __global__ void channel_sum_f32(const float* x, float* partial, int pixels, int x_batch,
                                           int x_plane) {
    channel_sum(x, partial, pixels, x_batch, x_plane);
}

extern "C" __global__ void channel_sum_f16(const __half* x, float* partial, int pixels, int x_batch,
                                           int x_plane) {
    channel_sum(x, partial, pixels, x_batch, x_plane);
}

extern "C" __global__ void sum_partials_f32(const float* RESTRICT partial,
                                            float* RESTRICT out, int parts, int len) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    double sum = 0.0;
#pragma unroll 8
    for (int part = 0; part < parts; ++part) sum += partial[static_cast<size_t>(part) * len + i];
    out[i] = static_cast<float>(sum);
}
