// What the kernels of the collapsed decoder share (graph/passes/collapse.rs).
#pragma once

#include "tile.cuh"

namespace {

// y = act(W x + b), all in shared memory but W and b; a warp per row.
__device__ __forceinline__ void rows(const float* RESTRICT w, const float* RESTRICT b,
                                     const float* x, float* y, int out, int in, int act) {
    const int lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < out; r += blockDim.x / 32) {
        float v = 0.0f;
        for (int k = lane; k < in; k += 32) v += w[r * in + k] * x[k];
        v = warp_sum(v);
        if (lane == 0) y[r] = activate(v + b[r], act);
    }
}

// Rows of a module's map: class scores, and in the last one the spatial attention before its
// non-linearity. So up to 19 classes.
constexpr int MAP_ROWS = 20, GATE = MAP_ROWS - 1;

// A map of `channels` values to MAP_ROWS, and what a warp has made with it of PIXELS pixels. A lane
// holds, for one of the pixels, the rows row(0), row(1) .. row(STEPS - 1).
template <typename T>
struct PixelMap;

// f32, CUDA cores: a pixel per lane. The map is [channels][MAP_ROWS], at 16 bytes' alignment.
template <>
struct PixelMap<float> {
    static constexpr int PIXELS = 32, STEPS = MAP_ROWS, WARP_FLOATS = 0;
    float sums[MAP_ROWS];

    __device__ __forceinline__ void apply(const float* map, const float* x, int plane, int channels,
                                          size_t pixel, bool inside, float*) {
#pragma unroll
        for (int r = 0; r < MAP_ROWS; ++r) sums[r] = 0.0f;
        x += pixel;
#pragma unroll 2
        for (int k = 0; k < channels; ++k) {
            const float v = inside ? *x : 0.0f;
            x += plane;
#pragma unroll
            for (int r = 0; r < MAP_ROWS; r += 4) {
                const float4 w = *reinterpret_cast<const float4*>(map + k * MAP_ROWS + r);
                sums[r] += w.x * v;
                sums[r + 1] += w.y * v;
                sums[r + 2] += w.z * v;
                sums[r + 3] += w.w * v;
            }
        }
    }
    __device__ __forceinline__ int row(int i) const { return i; }
    __device__ __forceinline__ float value(int i, const float*) const { return sums[i]; }
    __device__ __forceinline__ float gate(const float*) const { return sums[GATE]; }
    // Where element (r, k) of the map is, and the shifts of the rows behind it.
    static __device__ __forceinline__ int at(int r, int k, int) { return k * MAP_ROWS + r; }
    static __device__ __forceinline__ const float* shifts(const float* map, int channels) {
        return map + channels * MAP_ROWS;
    }
};

// f16, tensor cores: 16 pixels, two lanes each, which have the even and the odd rows. The map is
// [32][channels], channels a multiple of 16, at 32 bytes' alignment; what its rows from MAP_ROWS on
// hold does not matter. `own`, the warp's: 32 channels of the pixels, then the sums.
template <>
struct PixelMap<__half> {
    static constexpr int PIXELS = 16, STEPS = MAP_ROWS / 2, WARP_FLOATS = 20 * MAP_ROWS;
    static constexpr int PITCH = PIXELS + HALF_PAD, SUM_PITCH = PIXELS + FLOAT_PAD, CHUNK = 32;
    static_assert(CHUNK * PITCH * 2 <= WARP_FLOATS * 4, "a chunk of x");
    static_assert(MAP_ROWS * SUM_PITCH <= WARP_FLOATS, "the sums");

    __device__ __forceinline__ void apply(const __half* map, const __half* x, int plane,
                                          int channels, size_t pixel, bool inside, float* own) {
        const int lane = threadIdx.x % 32, p = lane % PIXELS, odd = lane / PIXELS;
        __half* xs = reinterpret_cast<__half*>(own);
        x += pixel;
        Sums acc[2];
        wmma::fill_fragment(acc[0], 0.0f);
        wmma::fill_fragment(acc[1], 0.0f);
#pragma unroll 1
        for (int k0 = 0; k0 < channels; k0 += CHUNK) {
            __syncwarp();
#pragma unroll
            for (int j = 0; j < CHUNK; j += 2) {
                const int k = k0 + j + odd;
                xs[(j + odd) * PITCH + p] = inside && k < channels
                                                ? x[static_cast<size_t>(k) * plane]
                                                : __float2half(0.0f);
            }
            __syncwarp();
            // Both halves of the chunk at once spill on sm_70.
#pragma unroll 1
            for (int k = 0; k < CHUNK; k += 16) {
                if (k0 + k >= channels) break;
                FragmentB b;
                wmma::load_matrix_sync(b, xs + k * PITCH, PITCH);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    FragmentA a;
                    wmma::load_matrix_sync(a, map + 16 * r * channels + k0 + k, channels);
                    wmma::mma_sync(acc[r], a, b, acc[r]);
                }
            }
        }
        __syncwarp();
        // Of the second tile four rows matter: there is no room for the others.
        wmma::store_matrix_sync(own, acc[1], SUM_PITCH, wmma::mem_row_major);
        __syncwarp();
        const float third = own[2 * odd * SUM_PITCH + p];
        const float fourth = own[(2 * odd + 1) * SUM_PITCH + p];
        __syncwarp();
        wmma::store_matrix_sync(own, acc[0], SUM_PITCH, wmma::mem_row_major);
        own[(16 + 2 * odd) * SUM_PITCH + p] = third;
        own[(17 + 2 * odd) * SUM_PITCH + p] = fourth;
        __syncwarp();
    }
    __device__ __forceinline__ int row(int i) const {
        return 2 * i + static_cast<int>(threadIdx.x) % 32 / PIXELS;
    }
    __device__ __forceinline__ float value(int i, const float* own) const {
        return own[row(i) * SUM_PITCH + threadIdx.x % PIXELS];
    }
    __device__ __forceinline__ float gate(const float* own) const {
        return own[GATE * SUM_PITCH + threadIdx.x % PIXELS];
    }
    static __device__ __forceinline__ int at(int r, int k, int channels) {
        return r * channels + k;
    }
    static __device__ __forceinline__ const float* shifts(const __half* map, int channels) {
        return reinterpret_cast<const float*>(map + 32 * channels);
    }
};

}  // namespace
