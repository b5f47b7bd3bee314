// What the kernels share: storage types, pixel loops, block reductions.
//
// Tensors are N x C planes of H x W dense elements. A plane starts at
// base + n * batch_stride + c * plane_stride (elements); a stride fits an int, an offset need not.
#pragma once

#ifdef FPENET_HOST
#include "host/cuda_host.h"
#else
#include <cuda_fp16.h>

// Dynamic shared memory under a typed name, aligned to 128 bytes.
#define DYNAMIC_SHARED(type, name)                                             \
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];     \
    type* name = reinterpret_cast<type*>(dynamic_shared_memory)
#endif

// No other pointer of the kernel reaches the same memory. Not on Hopper: there a kernel may start while
// the one before it still writes (wait_for_previous), and what is read only and restricted is loaded
// around the coherent caches (ld.global.nc), which is for memory that nobody writes meanwhile.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RESTRICT
#else
#define RESTRICT __restrict__
#endif

namespace {

// Non-linearities, numbered as in src/backend/gpu/lower/mod.rs.
constexpr int ACT_RELU = 1;
constexpr int ACT_SIGMOID = 2;

// Pixels of a thread in elementwise kernels, and of a block in reductions over pixels
// (src/backend/gpu/launch computes grids by the same numbers).
constexpr int PIXELS_PER_THREAD = 4;
constexpr int REDUCTION_THREADS = 256;
constexpr int REDUCTION_PIXELS = 4096;
constexpr int REDUCTION_PER_THREAD = REDUCTION_PIXELS / REDUCTION_THREADS;

// A thread's pixels lie a block's width apart, so that a warp reads whole lines.
#define FOR_PIXELS(i, pixels)                                                                   \
    for (int i##_k = 0, i = blockIdx.x * (blockDim.x * PIXELS_PER_THREAD) + threadIdx.x;        \
         i##_k < PIXELS_PER_THREAD && i < (pixels); ++i##_k, i += blockDim.x)

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ void store(float* p, float v) { *p = v; }
__device__ __forceinline__ void store(__half* p, float v) { *p = __float2half(v); }

__device__ __forceinline__ size_t plane_at(int n, int batch_stride, int c, int plane_stride) {
    return static_cast<size_t>(n) * batch_stride + static_cast<size_t>(c) * plane_stride;
}

// Programmatic dependent launch: a kernel that is launched so may start while the one before it still
// runs, and reads nothing of that one's before it has waited for its end. `start_next` lets the next
// kernel's blocks start as soon as all blocks of this one have. Every kernel that waits may be
// launched so (src/backend/gpu/cuda/modules.rs finds them); nothing happens before Hopper.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void start_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// max(v, 0) that lets NaN through, so that it shows.
__device__ __forceinline__ float relu(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(v));
    return v;
#else
    return v < 0.0f ? 0.0f : v;
#endif
}

__device__ __forceinline__ float activate(float v, int act) {
    if (act == ACT_RELU) return relu(v);
    if (act == ACT_SIGMOID) return 1.0f / (1.0f + expf(-v));
    return v;
}

template <typename S>
__device__ __forceinline__ S warp_sum(S v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
    return v;
}

// Sums of COUNT values over a one-dimensional block, in the same order on every run; valid in
// thread 0. `shared` has room for COUNT * 32 floats and may be reused on return.
template <int COUNT>
__device__ __forceinline__ void block_sum(float (&v)[COUNT], float* shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        v[i] = warp_sum(v[i]);
        if (lane == 0) shared[warp * COUNT + i] = v[i];
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            v[i] = warp_sum(lane < warps ? shared[lane * COUNT + i] : 0.0f);
        }
    }
    __syncthreads();
}

// The sum in every thread.
__device__ __forceinline__ float block_sum_all(float v, float* shared) {
    float sum[1] = {v};
    block_sum(sum, shared);
    if (threadIdx.x == 0) shared[0] = sum[0];
    __syncthreads();
    const float total = shared[0];
    __syncthreads();
    return total;
}

}  // namespace
