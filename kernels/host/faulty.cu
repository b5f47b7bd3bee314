// Kernels with one mistake each, for the tests of the emulation: it has to find them.
// Built for the host only.
#include "common.cuh"

// Reverses a block's values through shared memory; right with `barrier`, a race without.
extern "C" __global__ void faulty_reverse(const float* x, float* y, int barrier) {
    DYNAMIC_SHARED(float, shared);
    shared[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncthreads();
    y[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// Half of the threads pass by a barrier.
extern "C" __global__ void faulty_barrier(float* y) {
    if (threadIdx.x < blockDim.x / 2) __syncthreads();
    y[threadIdx.x] = 1.0f;
}

// Writes one element past `len`, in global or in shared memory.
extern "C" __global__ void faulty_bounds(float* y, int len, int in_shared) {
    DYNAMIC_SHARED(float, shared);
    if (in_shared) {
        shared[threadIdx.x + 1] = 1.0f;
    } else if (threadIdx.x == 0) {
        y[len] = 1.0f;
    }
}

// Sums a block's values, then lets every lane take the value of the next one.
extern "C" __global__ void warp_exchange(const float* x, float* sum, float* next) {
    __shared__ float shared[32];
    float v[1] = {x[threadIdx.x]};
    const int neighbour = static_cast<int>(threadIdx.x + 1) & 31;
    next[threadIdx.x] = __shfl_sync(0xffffffffu, v[0], neighbour);
    block_sum(v, shared);
    if (threadIdx.x == 0) *sum = v[0];
}
