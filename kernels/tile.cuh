// What the kernels that multiply matrices share: tiles of pixels in shared memory, tensor cores.
//
// A tile is rows (channels) of P pixels, neighbours in memory as in a plane. Tensor cores are asked
// for by wmma (16 x 16 x 16, halves in, f32 sums), which every card from sm_70 on has.
#pragma once

#include "common.cuh"

#ifdef FPENET_HOST
#include "host/wmma.h"
#else
#include <mma.h>
#endif

namespace {

namespace wmma = nvcuda::wmma;
using FragmentA = wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major>;
using FragmentB = wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major>;
using Sums = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

constexpr int TILE_THREADS = 256, TILE_WARPS = 8;
// Elements that a row of halves, or of floats, is longer in shared memory than in the tile: rows
// start in different banks, at addresses that wmma can load from.
constexpr int HALF_PAD = 8, FLOAT_PAD = 4;

// Whether 8 halves (4 floats) of every plane can be moved at once, at any multiple of 8 pixels.
template <typename T>
__device__ __forceinline__ bool wide(const T* base, int batch_stride, int plane_stride) {
    constexpr int lanes = 16 / sizeof(T);
    return base == nullptr || (reinterpret_cast<size_t>(base) % 16 == 0 &&
                               batch_stride % lanes == 0 && plane_stride % lanes == 0);
}

__device__ __forceinline__ unsigned pack_halves(float low, float high) {
    return __half_as_ushort(__float2half(low)) |
           static_cast<unsigned>(__half_as_ushort(__float2half(high))) << 16;
}

__device__ __forceinline__ float low_half(unsigned pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffffu)));
}

__device__ __forceinline__ float high_half(unsigned pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}

// Eight neighbours in one access of 16 bytes.
__device__ __forceinline__ void load_eight(const __half* from, float (&v)[8]) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    v[0] = low_half(bits.x), v[1] = high_half(bits.x);
    v[2] = low_half(bits.y), v[3] = high_half(bits.y);
    v[4] = low_half(bits.z), v[5] = high_half(bits.z);
    v[6] = low_half(bits.w), v[7] = high_half(bits.w);
}

__device__ __forceinline__ void store_eight(__half* to, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(to) = uint4{pack_halves(v[0], v[1]), pack_halves(v[2], v[3]),
                                          pack_halves(v[4], v[5]), pack_halves(v[6], v[7])};
}

__device__ __forceinline__ void store_eight(float* to, const float (&v)[8]) {
    *reinterpret_cast<float4*>(to) = float4{v[0], v[1], v[2], v[3]};
    *reinterpret_cast<float4*>(to + 4) = float4{v[4], v[5], v[6], v[7]};
}

__device__ __forceinline__ void load_eight(const float* from, float (&v)[8]) {
    const float4 a = *reinterpret_cast<const float4*>(from);
    const float4 b = *reinterpret_cast<const float4*>(from + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// A row-major matrix of halves into shared memory, rows of `pitch`; all threads of the block.
template <int ROWS, int COLUMNS, int PITCH>
__device__ __forceinline__ void stage_matrix(const __half* __restrict__ from, __half* to) {
    constexpr int EIGHTS = COLUMNS / 8;
#pragma unroll 8
    for (int i = threadIdx.x; i < ROWS * EIGHTS; i += TILE_THREADS) {
        const int r = i / EIGHTS, c = i % EIGHTS * 8;
        *reinterpret_cast<uint4*>(to + r * PITCH + c) =
            *reinterpret_cast<const uint4*>(from + r * COLUMNS + c);
    }
}

// ROWS planes' pixels from `first` on into shared memory, zeros beyond the end.
template <int ROWS, int P, int PITCH>
__device__ __forceinline__ void stage_pixels(const __half* __restrict__ from, int plane_stride,
                                             int first, int pixels, bool aligned, __half* to) {
    if (aligned && first + P <= pixels) {
        constexpr int EIGHTS = P / 8;
#pragma unroll 8
        for (int i = threadIdx.x; i < ROWS * EIGHTS; i += TILE_THREADS) {
            const int r = i / EIGHTS, p = i % EIGHTS * 8;
            *reinterpret_cast<uint4*>(to + r * PITCH + p) = *reinterpret_cast<const uint4*>(
                from + static_cast<size_t>(r) * plane_stride + first + p);
        }
    } else {
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * P; i += TILE_THREADS) {
            const int r = i / P, p = i % P;
            to[r * PITCH + p] = first + p < pixels
                                    ? from[static_cast<size_t>(r) * plane_stride + first + p]
                                    : __float2half(0.0f);
        }
    }
}

// v = act(v + bias + residual) for eight neighbours, of which `count` are inside.
template <typename T>
__device__ __forceinline__ void finish_eight(float (&v)[8], float shift, const T* residual,
                                             int act, bool aligned, int count) {
    if (residual != nullptr) {
        float r[8];
        if (aligned) {
            load_eight(residual, r);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) r[i] = i < count ? load(residual + i) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += r[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = activate(v[i] + shift, act);
}

// Writes eight neighbours, or those that are inside.
template <typename T>
__device__ __forceinline__ void write_eight(T* to, const float (&v)[8], bool aligned, int count) {
    if (aligned) {
        store_eight(to, v);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i < count) store(to + i, v[i]);
        }
    }
}

// f32 tiles: 64 pixels, 16 channels of the sum at a time.
constexpr int PIXELS = 64, DEPTH = 16, PITCH_F32 = PIXELS + FLOAT_PAD;

// acc += W[row0 ..][k0 ..] times 16 rows of `xs`; ws holds the weights as [k][row]. Thread (ty, tx)
// owns R neighbouring rows and 4 pixels.
template <int R>
__device__ __forceinline__ void multiply_f32(const float* ws, const float* xs, float (&acc)[R][4]) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
        const float4 v = *reinterpret_cast<const float4*>(xs + k * PITCH_F32 + 4 * tx);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float w = ws[k * PITCH_F32 + R * ty + r];
            acc[r][0] += w * v.x;
            acc[r][1] += w * v.y;
            acc[r][2] += w * v.z;
            acc[r][3] += w * v.w;
        }
    }
}

// 16 R rows and 16 columns of a row-major matrix, as [column][row]; zeros beyond `rows`, `depth`.
template <int R>
__device__ __forceinline__ void stage_weights_f32(const float* __restrict__ w, int columns,
                                                  int rows, int depth, float* ws) {
    for (int i = threadIdx.x; i < 16 * R * DEPTH; i += TILE_THREADS) {
        const int row = i / DEPTH, k = i % DEPTH;
        ws[k * PITCH_F32 + row] = row < rows && k < depth ? w[row * columns + k] : 0.0f;
    }
}

}  // namespace
