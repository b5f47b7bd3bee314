// Kernels with one mistake each, for the tests of the emulation: it has to find them.
// Built for the host only.
#include "common.cuh"
#include "grid.cuh"
#include "host/wmma.h"

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

// Every block takes the value that its neighbour wrote and adds it to its own, `rounds` times. `fault`
// 1: no barrier between writing and reading; 2: the last block stays away from the last barrier.
extern "C" __global__ void faulty_neighbours(float* x, float* y, unsigned* barrier, int rounds,
                                             int fault) {
    DYNAMIC_SHARED(float, sum);
    const int neighbour = static_cast<int>((blockIdx.x + 1) % gridDim.x);
    sum[threadIdx.x] = static_cast<float>(blockIdx.x);
    for (int round = 0; round < rounds; ++round) {
        float* written = x + round % 2 * gridDim.x;
        __syncthreads();
        if (threadIdx.x == 0) written[blockIdx.x] = sum[0];
        if (fault == 2 && round + 1 == rounds && blockIdx.x + 1 == gridDim.x) return;
        if (fault != 1) grid_barrier(barrier);
        sum[threadIdx.x] += written[neighbour];
    }
    y[blockIdx.x * blockDim.x + threadIdx.x] = sum[threadIdx.x];
}

// What a struct holds, as a parameter.
struct Members {
    const float* from;
    int index;
    float factor;
    struct {
        int a, b;
    } inner[2];
    float* to;
};
extern "C" __global__ void struct_parameter(int before, const __grid_constant__ Members members) {
    members.to[threadIdx.x] = members.factor * members.from[members.index] + before +
                              10 * members.inner[0].b + 100 * members.inner[1].a;
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

// c = a b + c for 16 x 16 matrices of halves by each warp, a by rows and b by rows or columns,
// through wmma. `fault` 1: a lane stays away from the product; 2: the lanes' addresses differ;
// 3: an address is not aligned; 4: shared memory that another lane wrote, read without a barrier.
extern "C" __global__ void warp_product(const float* a, const float* b, float* c, int columns,
                                        int fault) {
    using namespace nvcuda::wmma;
    DYNAMIC_SHARED(float, shared);
    float* sums = shared + 512 * (threadIdx.x / 32);
    __half* left = reinterpret_cast<__half*>(sums + 256);
    __half* right = left + 256;
    const int lane = threadIdx.x % 32;
    for (int i = lane; i < 256; i += 32) {
        sums[i] = c[i];
        left[i] = __float2half(a[i]);
        right[i] = __float2half(b[i]);
    }
    if (fault != 4) __syncwarp();
    fragment<matrix_a, 16, 16, 16, __half, row_major> fa;
    fragment<matrix_b, 16, 16, 16, __half, row_major> fb_rows;
    fragment<matrix_b, 16, 16, 16, __half, col_major> fb_columns;
    fragment<accumulator, 16, 16, 16, float> fc;
    load_matrix_sync(fa, left + (fault == 3 ? 8 : fault == 2 ? 16 * (lane / 16) : 0), 16);
    load_matrix_sync(fc, sums, 16, mem_row_major);
    if (fault == 1 && lane == 17) return;
    if (columns) {
        load_matrix_sync(fb_columns, right, 16);
        mma_sync(fc, fa, fb_columns, fc);
    } else {
        load_matrix_sync(fb_rows, right, 16);
        mma_sync(fc, fa, fb_rows, fc);
    }
    store_matrix_sync(sums, fc, 16, mem_row_major);
    __syncwarp();
    for (int i = lane; i < 256; i += 32) c[i] = sums[i];
}
