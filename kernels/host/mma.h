// mma.sync (m16n8k8, halves in, f32 sums) for g++: a warp's work, with the elements in the lanes that
// PTX says (kernels/mma.cuh).
#pragma once

#include "cuda_host.h"

namespace fpenet_host {

// What one lane brings to a product.
struct MmaOperands {
    float* d;
    unsigned a0, a1, b0;
};

inline float half_of(unsigned pair, int i) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> (16 * i))));
}

// The warp's product, made once for all lanes while they wait.
inline void multiply_16x8x8(const uint64_t (&lanes)[32]) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* mine = reinterpret_cast<const MmaOperands*>(lanes[lane]);
        for (int i = 0; i < 2; ++i) {
            const int k = lane % 4 * 2 + i, at = lane / 4;
            a[at][k] = half_of(mine->a0, i);
            a[at + 8][k] = half_of(mine->a1, i);
            b[k][at] = half_of(mine->b0, i);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const auto* mine = reinterpret_cast<const MmaOperands*>(lanes[lane]);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 8; ++k) mine->d[i] += a[row][k] * b[k][column];
        }
    }
}

inline void mma_16x8x8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0,
                       int line = __builtin_LINE()) {
    const MmaOperands mine = {d, a0, a1, b0};
    uint64_t all[32];
    if (gather(reinterpret_cast<uint64_t>(&mine), all, line)) multiply_16x8x8(all);
}

}  // namespace fpenet_host
