// Tensor cores by mma.sync, whose fragments are in known lanes: sums become the next product's operand,
// or memory, without a way through shared memory as wmma (tile.cuh) needs one.
//
// Lane = 4 g + t, two halves in a register. A is 16 x 16: a[0] holds row g, columns 2t and 2t + 1; a[1]
// row g + 8; a[2] and a[3] the same 8 columns on. B is 16 x 8: b[0] holds rows 2t and 2t + 1 of column g,
// b[1] those 8 rows on. D is 16 x 8: d[0], d[1] are row g, columns 2t and 2t + 1; d[2], d[3] row g + 8.
#pragma once

#include "common.cuh"

#ifdef FPENET_HOST
#include "host/mma.h"
#endif

namespace {

// d += A B for 8 columns of A: a0, a1 and b0 as above.
__device__ __forceinline__ void mma_8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
#ifdef FPENET_HOST
    fpenet_host::mma_16x8x8(d, a0, a1, b0);
#elif __CUDA_ARCH__ >= 750
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
#else
    // Volta's fragments are others: the lanes ask each other, and multiply on their own.
    const int lane = threadIdx.x % 32, t = lane % 4;
    const auto low = [](unsigned pair) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffffu)));
    };
    const auto high = [](unsigned pair) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
    };
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const unsigned top = __shfl_sync(0xffffffffu, a0, lane - t + k);
        const unsigned bottom = __shfl_sync(0xffffffffu, a1, lane - t + k);
        const unsigned left = __shfl_sync(0xffffffffu, b0, 8 * t + k);
        const unsigned right = __shfl_sync(0xffffffffu, b0, 8 * t + 4 + k);
        d[0] += low(top) * low(left) + high(top) * high(left);
        d[1] += low(top) * low(right) + high(top) * high(right);
        d[2] += low(bottom) * low(left) + high(bottom) * high(left);
        d[3] += low(bottom) * low(right) + high(bottom) * high(right);
    }
#endif
}

// A from shared memory, rows `pitch` halves apart, each 16 bytes aligned.
__device__ __forceinline__ void load_operand(const __half* tile, int pitch, unsigned (&a)[4]) {
    const int lane = threadIdx.x % 32;
#if !defined(FPENET_HOST) && __CUDA_ARCH__ >= 750
    // Lanes name the rows: 8 by 8 halves after the other, rows first.
    const unsigned row = static_cast<unsigned>(
        __cvta_generic_to_shared(tile + lane % 16 * pitch + lane / 16 * 8));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(row)
                 : "memory");
#else
    const __half* mine = tile + lane / 4 * pitch + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i] = *reinterpret_cast<const unsigned*>(mine + i % 2 * 8 * pitch + i / 2 * 8);
    }
#endif
}

// d += A B.
__device__ __forceinline__ void mma_16(float (&d)[4], const unsigned (&a)[4],
                                       const unsigned (&b)[2]) {
#if !defined(FPENET_HOST) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_8(d, a[0], a[1], b[0]);
    mma_8(d, a[2], a[3], b[1]);
#endif
}

}  // namespace
