// What nvcc gives, for g++: the same kernels run on the CPU, a fiber per CUDA thread
// (scheduler.cpp). Only what the kernels use is here; add to it as they grow.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
// Static shared memory: one block runs at a time on an OS thread. Not for cooperative kernels, whose
// blocks would share it.
#define __shared__ static thread_local
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(fpenet_host::dynamic_shared())

struct HostIndex {
    unsigned x, y, z;
};
extern __thread HostIndex threadIdx, blockIdx, blockDim, gridDim;

namespace fpenet_host {

// Poisoned with NaN at the start of every block, canaries behind it.
void* dynamic_shared();

// The calling fiber waits until all threads of the block are at this very barrier.
void block_barrier(int line);
// The same for the lanes in `mask`.
void warp_barrier(unsigned mask, int line);
// The lanes exchange 8-byte values; returns the one of `source`.
uint64_t exchange(unsigned mask, uint64_t value, int source, int line);
// The whole warp meets; `all` gets every lane's value. True for the one lane that goes on first:
// what it does then, the others find done.
bool gather(uint64_t value, uint64_t (&all)[32], int line);
// Lets other blocks run: the caller has looked for what one of them writes, in vain.
void wait_for_others(int line);
// Ends the launch with an error.
void fail(const char* problem, int line);
// Lane of the calling thread.
int lane();

template <typename T>
T shuffle(unsigned mask, T value, int source, int line) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "values of up to 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = exchange(mask, bits, source, line);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

// Lane `lane() + delta`, or the caller's own value beyond the warp's end.
template <typename T>
T shuffle_down(unsigned mask, T value, unsigned delta, int line) {
    const int source = lane() + static_cast<int>(delta);
    return shuffle(mask, value, source < 32 ? source : lane(), line);
}

// How the launcher sees a kernel.
struct KernelEntry {
    const char* name;
    const char* signature;  // p pointer, i int, f float, s struct, per parameter
    const size_t* sizes;    // of the parameters
    void (*invoke)(void* const* args);
};

template <typename P>
constexpr char code() {
    if (std::is_pointer_v<P>) return 'p';
    if (std::is_same_v<P, int>) return 'i';
    if (std::is_same_v<P, float>) return 'f';
    if (std::is_class_v<P>) return 's';
    return '?';
}

template <auto F>
struct Kernel;

template <typename... P, void (*F)(P...)>
struct Kernel<F> {
    static constexpr char signature[] = {code<std::remove_cv_t<P>>()..., 0};
    static constexpr size_t sizes[] = {sizeof(P)..., 0};

    template <size_t... I>
    static void call(void* const* args, std::index_sequence<I...>) {
        F(*static_cast<std::remove_cv_t<P>*>(args[I])...);
    }
    static void invoke(void* const* args) { call(args, std::index_sequence_for<P...>{}); }
};

}  // namespace fpenet_host

#define __syncthreads() fpenet_host::block_barrier(__LINE__)
#define __syncwarp(...) fpenet_host::warp_barrier(0xffffffffu, __LINE__)
#define __shfl_down_sync(mask, value, delta) \
    fpenet_host::shuffle_down(mask, value, delta, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
    fpenet_host::shuffle(mask, value, fpenet_host::lane() ^ (bits), __LINE__)
#define __shfl_sync(mask, value, source) fpenet_host::shuffle(mask, value, source, __LINE__)

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
template <typename T>
T __ldg(const T* p) {
    return *p;
}
template <typename T>
T __ldcg(const T* p) {
    return *p;
}

// All threads of a launch take turns on one OS thread: memory is one, and nothing comes between.
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at = before + value;
    return before;
}
// Adds one, or starts again at zero behind `last`; the value before.
inline unsigned atomicInc(unsigned* at, unsigned last) {
    const unsigned before = *at;
    *at = before >= last ? 0 : before + 1;
    return before;
}

// Vectors, for loads and stores of 8 and 16 bytes (common.cuh, load_wide, store_wide).
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline unsigned __float_as_uint(float f) {
    unsigned bits;
    std::memcpy(&bits, &f, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Half precision by its bits, rounded to nearest even as the hardware does.
struct __half {
    uint16_t bits;
};

inline float __half2float(__half h) {
    const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
    const uint32_t rest = h.bits & 0x7fff;
    uint32_t bits;
    if (rest >= 0x7c00) {  // infinity, NaN
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + ((127 - 15) << 23));
    } else {  // zero, subnormal: rest * 2^-24
        const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline __half __float2half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7fff)};   // NaN
    if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
    if (bits < 0x38800000) {  // subnormal: adding 0.5 aligns the last bit kept with 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &magnitude, 4);
        return {static_cast<uint16_t>(sign | (rounded - 0x3f000000))};
    }
    const uint32_t odd = bits >> 13 & 1;
    bits += 0xfff + odd - ((127 - 15) << 23);
    return {static_cast<uint16_t>(sign | bits >> 13)};
}

// Two halves, each as the hardware has it: computed exactly, rounded once.
struct __half2 {
    __half x, y;
};
inline __half2 __hsub2(__half2 a, __half2 b) {
    return {__float2half(__half2float(a.x) - __half2float(b.x)),
            __float2half(__half2float(a.y) - __half2float(b.y))};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
    return {__float2half(__half2float(a.x) * __half2float(b.x)),
            __float2half(__half2float(a.y) * __half2float(b.y))};
}
inline __half2 __hadd2(__half2 a, __half2 b) {
    return {__float2half(__half2float(a.x) + __half2float(b.x)),
            __float2half(__half2float(a.y) + __half2float(b.y))};
}
inline __half2 __float2half2_rn(float v) { return {__float2half(v), __float2half(v)}; }

inline float __fdividef(float a, float b) { return a / b; }

// Bytes 0 to 3 are those of a, 4 to 7 those of b; four bits of the selector name one of them.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned from = selector >> (4 * i) & 7;
        result |= static_cast<unsigned>(bytes >> (8 * from) & 0xff) << (8 * i);
    }
    return result;
}

inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
