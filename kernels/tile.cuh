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

// pack_halves() of what relu() makes of both.
__device__ __forceinline__ unsigned relu_halves(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return pack_halves(relu(low), relu(high));
#endif
}

// Four halves to memory at once; nvcc makes two stores of a plain assignment.
__device__ __forceinline__ void store_two(__half* to, uint2 pairs) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(pairs.x), "r"(pairs.y)
                 : "memory");
#else
    *reinterpret_cast<uint2*>(to) = pairs;
#endif
}

__device__ __forceinline__ float low_half(unsigned pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffffu)));
}

__device__ __forceinline__ float high_half(unsigned pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}

// Eight neighbours in one access of 16 bytes.
__device__ __forceinline__ void widen_eight(const uint4& bits, float (&v)[8]) {
    v[0] = low_half(bits.x), v[1] = high_half(bits.x);
    v[2] = low_half(bits.y), v[3] = high_half(bits.y);
    v[4] = low_half(bits.z), v[5] = high_half(bits.z);
    v[6] = low_half(bits.w), v[7] = high_half(bits.w);
}

__device__ __forceinline__ void load_eight(const __half* from, float (&v)[8]) {
    widen_eight(*reinterpret_cast<const uint4*>(from), v);
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

// Copies `bytes` (4 or 16) into shared memory while the thread goes on; they are there for the block
// behind copies_done() and a barrier. Past the first level of caches for 16 bytes.
template <int BYTES>
__device__ __forceinline__ void copy_ahead(void* to, const void* from) {
    static_assert(BYTES == 4 || BYTES == 16, "sizes that kernels ask for");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
    }
#else
    if (BYTES == 16) {
        *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
    } else {
        *static_cast<unsigned*>(to) = *static_cast<const unsigned*>(from);
    }
#endif
}

__device__ __forceinline__ void copies_done() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Moves `count` vectors of 16 bytes, AT_ONCE of a thread's loads under way at a time. A loop that is
// merely unrolled waits for every load of its remainder.
template <int AT_ONCE, int THREADS, typename Load, typename Store>
__device__ __forceinline__ void move_vectors(int count, const Load& load, const Store& store) {
#pragma unroll 1
    for (int first = threadIdx.x; first < count; first += AT_ONCE * THREADS) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (first + j * THREADS < count) v[j] = load(first + j * THREADS);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (first + j * THREADS < count) store(first + j * THREADS, v[j]);
        }
    }
}

// A row-major matrix of halves into shared memory, rows of `pitch`; all threads of the block.
template <int ROWS, int COLUMNS, int PITCH, int THREADS = TILE_THREADS, int MOST = 8>
__device__ __forceinline__ void stage_matrix(const __half* RESTRICT from, __half* to) {
    constexpr int EIGHTS = COLUMNS / 8, EACH = (ROWS * EIGHTS + THREADS - 1) / THREADS;
    move_vectors<(EACH < MOST ? EACH : MOST), THREADS>(
        ROWS * EIGHTS,
        [from](int i) {
            return *reinterpret_cast<const uint4*>(from + i / EIGHTS * COLUMNS + i % EIGHTS * 8);
        },
        [to](int i, const uint4& v) {
            *reinterpret_cast<uint4*>(to + i / EIGHTS * PITCH + i % EIGHTS * 8) = v;
        });
}

// Where a pixel of the tile is in a plane that is read pixel by pixel.
struct Dense {
    __device__ __forceinline__ int source(int p) const { return p; }
};

// Pixels `first` to `first + P` of `rows` planes into shared memory. There are `depth` planes and
// `pixels` pixels; beyond them are zeros. `all`: all P pixels exist, at Dense's places, and every
// eight of them can be moved at once.
template <int P, int PITCH, int AT_ONCE, int THREADS = TILE_THREADS, typename Places = Dense>
__device__ __forceinline__ void stage_pixels(const __half* from, int plane_stride, int rows,
                                             int depth, int first, int pixels, bool all,
                                             __half* to, const Places& places = {}) {
    if (all) {
        constexpr int EIGHTS = P / 8;
        move_vectors<AT_ONCE, THREADS>(
            rows * EIGHTS,
            [=](int i) {
                const int r = i / EIGHTS, p = i % EIGHTS * 8;
                const uint4 none = {0, 0, 0, 0};
                if (r >= depth) return none;
                return *reinterpret_cast<const uint4*>(
                    from + static_cast<size_t>(r) * plane_stride + first + p);
            },
            [=](int i, const uint4& v) {
                *reinterpret_cast<uint4*>(to + i / EIGHTS * PITCH + i % EIGHTS * 8) = v;
            });
    } else {
        for (int i = threadIdx.x; i < rows * P; i += THREADS) {
            const int r = i / P, p = i % P;
            const bool inside = r < depth && first + p < pixels;
            to[r * PITCH + p] = inside ? from[static_cast<size_t>(r) * plane_stride +
                                              places.source(first + p)]
                                       : __float2half(0.0f);
        }
    }
}

// Those of eight neighbours that are inside; zeros for the others.
template <typename T>
__device__ __forceinline__ void load_inside(const T* from, float (&v)[8], int count) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < count ? load(from + i) : 0.0f;
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
            load_inside(residual, r, count);
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

// The sums of a warp: tiles of 16 x 16 side by side.
template <int TILES>
__device__ __forceinline__ void clear_sums(Sums (&acc)[TILES]) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) wmma::fill_fragment(acc[t], 0.0f);
}

template <int TILES>
__device__ __forceinline__ void store_sums(const Sums (&acc)[TILES], float* to, int pitch) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        wmma::store_matrix_sync(to + 16 * t, acc[t], pitch, wmma::mem_row_major);
    }
}

// acc += 16 rows of `a` times the columns of `b` that the sums are of; `depth` is a multiple of 16.
template <int UNROLL, int TILES>
__device__ __forceinline__ void multiply_f16(const __half* a, int a_pitch, const __half* b,
                                             int b_pitch, int depth, Sums (&acc)[TILES]) {
#pragma unroll UNROLL
    for (int k = 0; k < depth; k += 16) {
        FragmentA rows;
        wmma::load_matrix_sync(rows, a + k, a_pitch);
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            FragmentB columns;
            wmma::load_matrix_sync(columns, b + k * b_pitch + 16 * t, b_pitch);
            wmma::mma_sync(acc[t], rows, columns, acc[t]);
        }
    }
}

// f32 tiles: 64 pixels, 16 channels of the sum at a time.
constexpr int PIXELS = 64, DEPTH = 16, PITCH_F32 = PIXELS + FLOAT_PAD;

// acc += W[row0 ..][k0 ..] times 16 rows of `xs`; ws holds the weights as [k][row], rows of W_PITCH.
// Thread (ty, tx) owns R neighbouring rows and 4 pixels.
template <int R, int W_PITCH = PITCH_F32>
__device__ __forceinline__ void multiply_f32(const float* ws, const float* xs, float (&acc)[R][4]) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
        const float4 v = *reinterpret_cast<const float4*>(xs + k * PITCH_F32 + 4 * tx);
        float weights[R];
        if (R == 4) {
            const float4 w = *reinterpret_cast<const float4*>(ws + k * W_PITCH + R * ty);
            weights[0] = w.x, weights[1 % R] = w.y, weights[2 % R] = w.z, weights[3 % R] = w.w;
        } else {
#pragma unroll
            for (int r = 0; r < R; ++r) weights[r] = ws[k * W_PITCH + R * ty + r];
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float w = weights[r];
            acc[r][0] += w * v.x;
            acc[r][1] += w * v.y;
            acc[r][2] += w * v.z;
            acc[r][3] += w * v.w;
        }
    }
}

// R rows for every 16 threads, and 16 columns of a row-major matrix, as [column][row] in shared memory;
// zeros beyond `rows`, `depth`. Loads of the next columns are under way while these are worked on.
template <int R, int W_PITCH = PITCH_F32, int THREADS = TILE_THREADS>
struct WeightColumns {
    float v[R];

    __device__ __forceinline__ void load(const float* RESTRICT w, int columns, int rows,
                                         int depth) {
#pragma unroll
        for (int j = 0; j < R; ++j) {
            const int i = threadIdx.x + j * THREADS, row = i / DEPTH, k = i % DEPTH;
            v[j] = row < rows && k < depth ? w[row * columns + k] : 0.0f;
        }
    }
    __device__ __forceinline__ void store(float* ws) const {
#pragma unroll
        for (int j = 0; j < R; ++j) {
            const int i = threadIdx.x + j * THREADS;
            ws[i % DEPTH * W_PITCH + i / DEPTH] = v[j];
        }
    }
};

// A pixel of every few of 16 channels, the same way.
template <int THREADS = TILE_THREADS>
struct PixelColumns {
    static constexpr int EACH = DEPTH * PIXELS / THREADS;
    float v[EACH];

    // `x`: this thread's pixel of its own first channel, if it is `inside`.
    __device__ __forceinline__ void load(const float* RESTRICT x, int plane, bool inside,
                                         int depth) {
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int on = j * (THREADS / PIXELS), k = threadIdx.x / PIXELS + on;
            v[j] = inside && k < depth ? x[static_cast<size_t>(on) * plane] : 0.0f;
        }
    }
    __device__ __forceinline__ void store(float* xs) const {
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int k = threadIdx.x / PIXELS + j * (THREADS / PIXELS);
            xs[k * PITCH_F32 + threadIdx.x % PIXELS] = v[j];
        }
    }
};

}  // namespace
