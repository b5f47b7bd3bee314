// Tensors in 8 bits, without a sign and with a scale per channel: value = scale * byte. Arithmetic is
// in f32 or halves as ever; this is how values come and go (lower/bytes.rs says which tensors).
#pragma once

#include "tile.cuh"

namespace {

using Byte = unsigned char;

// The byte next to v / scale for v >= 0, in the low bits of what is returned: so the sum with 2^23
// rounds. What is above 255 steps is cut off there, and NaN with it.
__device__ __forceinline__ unsigned to_byte(float v, float inverse) {
    return __float_as_uint(fminf(v * inverse, 255.0f) + 8388608.0f);
}

// One of four bytes, exactly, the other way round.
__device__ __forceinline__ float byte_of(unsigned four, int i) {
    return __uint_as_float(__byte_perm(four, 0x4b000000u, 0x7440u | i)) - 8388608.0f;
}

__device__ __forceinline__ unsigned pack_bytes(unsigned a, unsigned b, unsigned c, unsigned d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

__device__ __forceinline__ __half2 bits_half2(unsigned bits) {
    return *reinterpret_cast<__half2*>(&bits);
}

__device__ __forceinline__ unsigned half2_bits(__half2 halves) {
    return *reinterpret_cast<unsigned*>(&halves);
}

// Two of four bytes, times the scale: 0x6400 | byte is 1024 + byte in halves.
__device__ __forceinline__ unsigned halves_of(unsigned four, unsigned selector, __half2 scale) {
    return half2_bits(__hmul2(__hsub2(bits_half2(__byte_perm(four, 0x64646464u, selector)),
                                      bits_half2(0x64006400u)), scale));
}

// Eight neighbours, or those of them that are inside.
__device__ __forceinline__ void write_eight(Byte* to, const float (&v)[8], float inverse,
                                            bool aligned, int count) {
    unsigned q[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] = to_byte(v[i], inverse);
    if (aligned) {
        *reinterpret_cast<uint2*>(to) =
            uint2{pack_bytes(q[0], q[1], q[2], q[3]), pack_bytes(q[4], q[5], q[6], q[7])};
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i < count) to[i] = static_cast<Byte>(q[i] & 0xffu);
        }
    }
}

// Sixteen neighbours as halves.
__device__ __forceinline__ void widen_sixteen(const uint4& bytes, __half2 scale, __half* to) {
    constexpr unsigned LOW = 0x4140, HIGH = 0x4342;
    uint4* halves = reinterpret_cast<uint4*>(to);
    halves[0] = uint4{halves_of(bytes.x, LOW, scale), halves_of(bytes.x, HIGH, scale),
                      halves_of(bytes.y, LOW, scale), halves_of(bytes.y, HIGH, scale)};
    halves[1] = uint4{halves_of(bytes.z, LOW, scale), halves_of(bytes.z, HIGH, scale),
                      halves_of(bytes.w, LOW, scale), halves_of(bytes.w, HIGH, scale)};
}

// One value as `halves_of` makes it: the product of a byte and a half is exact in f32.
__device__ __forceinline__ __half widen(Byte byte, float scale) {
    return __float2half(static_cast<float>(byte) * __half2float(__float2half(scale)));
}

// Pixels `first` to `first + P` of `rows` planes into shared memory, zeros behind the last of
// `pixels`. `all`: memory has all P pixels, and every sixteen of them can be moved at once.
template <int P, int PITCH, int AT_ONCE, int THREADS = TILE_THREADS>
__device__ __forceinline__ void stage_bytes(const Byte* from, const float* RESTRICT scales,
                                            int plane_stride, int rows, int first, int pixels,
                                            bool all, __half* to) {
    if (all) {
        constexpr int SIXTEENS = P / 16;
        move_vectors<AT_ONCE, THREADS>(
            rows * SIXTEENS,
            [=](int i) {
                const int r = i / SIXTEENS, p = i % SIXTEENS * 16;
                return *reinterpret_cast<const uint4*>(
                    from + static_cast<size_t>(r) * plane_stride + first + p);
            },
            [=](int i, const uint4& v) {
                const int r = i / SIXTEENS, p = i % SIXTEENS * 16;
                widen_sixteen(v, __float2half2_rn(scales[r]), to + r * PITCH + p);
            });
    } else {
        for (int i = threadIdx.x; i < rows * P; i += THREADS) {
            const int r = i / P, p = i % P;
            to[r * PITCH + p] =
                first + p < pixels
                    ? widen(from[static_cast<size_t>(r) * plane_stride + first + p], scales[r])
                    : __float2half(0.0f);
        }
    }
}

}  // namespace
