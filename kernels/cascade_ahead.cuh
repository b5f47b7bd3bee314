// What the kernels of the cascade share that have the planes of all branches in shared memory before the
// first begins (cascade_ahead.cu, cascade_mma.cu).
//
// Shared memory: a row of zeros, then every branch's rows, `side` zeros before and behind each. The next
// branch's rows are op.region elements on. launch::ahead_tiling() has the sizes.
#pragma once

#include "cascade_walk.cuh"
#include "tile.cuh"

namespace {

constexpr int AHEAD_THREADS = 512, AHEAD_WARPS = AHEAD_THREADS / 32;

// A block's rows.
struct Rows {
    int tile, tile_end;  // written
    int from, to;        // at hand
    int reach;           // rows beside the tile that the first branch makes for the others
    int side, pitch;

    template <typename T>
    __device__ __forceinline__ explicit Rows(const Cascade<T>& op) {
        constexpr int WIDE = 16 / sizeof(T);
        int halo = 0, largest = 0;
        reach = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i >= op.branches) break;
            largest = max(largest, op.dilations.v[i]);
            halo += op.dilations.v[i];
            if (i > 0) reach += op.dilations.v[i];
        }
        if (!op.addition) halo = largest, reach = 0;
        side = (largest + WIDE - 1) / WIDE * WIDE, pitch = op.w + 2 * side;
        tile = blockIdx.x * op.tile_h, tile_end = min(tile + op.tile_h, op.h);
        from = max(tile - halo, 0), to = min(tile_end + halo, op.h);
    }
};

// The row of zeros, and the zeros beside all rows: before the wait for the kernel before this one.
template <typename T>
__device__ __forceinline__ void clear_around(const Cascade<T>& op, const Rows& rows, T* zeros) {
    constexpr int WIDE = 16 / sizeof(T);
    const int side = rows.side, pitch = rows.pitch;
    const uint4 none = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < pitch / WIDE; i += AHEAD_THREADS) {
        *reinterpret_cast<uint4*>(zeros + i * WIDE) = none;
    }
    // Rows follow each other through all branches.
    T* planes = zeros + pitch;
    for (int row = threadIdx.x; row < op.branches * op.region / pitch; row += AHEAD_THREADS) {
        for (int i = 0; i < side; i += WIDE) {
            *reinterpret_cast<uint4*>(planes + row * pitch + i) = none;
            *reinterpret_cast<uint4*>(planes + row * pitch + side + op.w + i) = none;
        }
    }
}

// All rows of all branches, 16 bytes per load: for the block behind copies_done() and a barrier. Waits
// for the kernel before this one.
template <typename T>
__device__ __forceinline__ void fetch_ahead(const Cascade<T>& op, const Rows& rows, T* planes) {
    constexpr int WIDE = 16 / sizeof(T);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chains = gridDim.y;
    // A warp has a part of up to 32 vectors of a row, or several short rows.
    const int across = op.w / WIDE, parts = (across + 31) / 32;
    const int together = across < 32 ? 32 / across : 1, apart = max(AHEAD_WARPS / parts, 1);
    const int stride = apart * together, column = warp % parts * 32 + lane % (32 / together);
    const bool loads = warp < apart * parts && lane / (32 / together) < together;
    const bool inside = loads && column < across;
    const int row0 = warp / parts * together + lane / (32 / together);
    T* to_row = planes + row0 * rows.pitch + rows.side + column * WIDE;
    wait_for_previous();
    const T* x = op.x + plane_at(blockIdx.z, op.x_batch, blockIdx.y, op.x_plane) +
                 static_cast<size_t>(rows.from + row0) * op.w + column * WIDE;
    const int count = rows.to - rows.from;
#pragma unroll 1
    for (int branch = 0; inside && branch < op.branches; ++branch) {
        const T* source = x + static_cast<size_t>(branch) * chains * op.x_plane;
        T* target = to_row + branch * op.region;
#pragma unroll 4
        for (int row = row0; row < count; row += stride) {
            copy_ahead<16>(target, source);
            source += static_cast<size_t>(stride) * op.w, target += stride * rows.pitch;
        }
    }
}

}  // namespace
