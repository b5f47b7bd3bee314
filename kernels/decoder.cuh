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
constexpr int MAP_ROWS = 20, GATE = MAP_ROWS - 1, MAP_QUADS = MAP_ROWS / 4;

// Pixels that a warp makes scores of at a time, and the shared memory for them: 20 rows of a pixel, then
// those of the next one. Tensor cores write 24 rows, in tiles of 8: the last four of them go to the next
// pixel, which gets its own afterwards, or behind the last one.
constexpr int GROUP = 32, SLOT = GROUP * MAP_ROWS + 8, ROW_TILES = 3;
using Rows = wmma::fragment<wmma::matrix_a, 8, GROUP, 16, __half, wmma::row_major>;
using Columns = wmma::fragment<wmma::matrix_b, 8, GROUP, 16, __half, wmma::row_major>;
using Scores = wmma::fragment<wmma::accumulator, 8, GROUP, 16, float>;

// Pixel i's scores in a row of slots.
__device__ __forceinline__ int slot_at(int i) {
    return i * MAP_ROWS + i / GROUP * (SLOT - GROUP * MAP_ROWS);
}

// acc += 24 rows of `map`, 16 columns of it, times `b`.
__device__ __forceinline__ void multiply_rows(const __half* map, int pitch, const Columns& b,
                                              Scores (&acc)[ROW_TILES]) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
        Rows a;
        wmma::load_matrix_sync(a, map + 8 * r * pitch, pitch);
        wmma::mma_sync(acc[r], a, b, acc[r]);
    }
}

// How a map of `channels` values to MAP_ROWS lies in memory: element (r, k), and behind all of them what
// is added to the rows (f32). Whole 16 bytes, and whole 32 for tensor cores.
template <typename T>
struct MapLayout;

// [channels][MAP_ROWS]
template <>
struct MapLayout<float> {
    static __device__ __forceinline__ int at(int r, int k, int) { return k * MAP_ROWS + r; }
    static __device__ __forceinline__ const float* shifts(const float* map, int channels) {
        return map + channels * MAP_ROWS;
    }
};

// [24][channels + HALF_PAD], as tensor cores read it from shared memory; channels are a multiple of 16.
// What the rows from MAP_ROWS on hold does not matter.
template <>
struct MapLayout<__half> {
    static __device__ __forceinline__ int at(int r, int k, int channels) {
        return r * (channels + HALF_PAD) + k;
    }
    static __device__ __forceinline__ const float* shifts(const __half* map, int channels) {
        return reinterpret_cast<const float*>(map + 8 * ROW_TILES * (channels + HALF_PAD));
    }
};

__device__ __forceinline__ float4 load_four(const float* from) {
    return *reinterpret_cast<const float4*>(from);
}
__device__ __forceinline__ float4 load_four(const __half* from) {
    const uint2 bits = *reinterpret_cast<const uint2*>(from);
    return {low_half(bits.x), high_half(bits.x), low_half(bits.y), high_half(bits.y)};
}
__device__ __forceinline__ void store_four(float* to, float4 v) {
    *reinterpret_cast<float4*>(to) = v;
}
__device__ __forceinline__ void store_four(__half* to, float4 v) {
    *reinterpret_cast<uint2*>(to) = uint2{pack_halves(v.x, v.y), pack_halves(v.z, v.w)};
}

}  // namespace
