// The cascade of an FPE block (cascade_walk.cu) over an expanded tensor in 8 bits (lower/bytes.rs).
//
// Planes in shared memory are halves as there: a byte gets its scale as it is loaded, a whole plane's
// 16 at a time; a result goes on to the next branch as it is, and to memory as a byte.
// Bytes: 1 per input (plus halos), 1 per output. FLOPs: 18 per output and 4 for the scales. Shared
// memory and launch as in cascade_walk.cu.
#include "cascade_walk.cuh"

namespace {

__device__ __forceinline__ void cascade_bytes(const Cascade<__half, Byte>& cascade) {
    DYNAMIC_SHARED(__half, shared);
    start_next();
    wait_for_previous();
    cascade_tile(cascade, blockIdx.x, blockIdx.y, gridDim.y, blockIdx.z, shared);
}

}  // namespace

// Operands: Cascade of cascade_walk.cuh. y may be x where tiles are whole planes.
extern "C" __global__ void __launch_bounds__(512, 1)
    cascade_walk_f16_u8(const Byte* x, Byte* y, const float* params, int branches, int addition,
                        int d0, int d1, int d2, int d3, int w0, int w1, int w2, int w3, int b0,
                        int b1, int b2, int b3, int region, int tile_h, int tile_w, int h, int w,
                        int x_batch, int x_plane, int y_batch, int y_plane, const float* x_scales,
                        const float* y_inverses) {
    cascade_bytes({x, y, params, branches, addition, {{d0, d1, d2, d3}}, {{w0, w1, w2, w3}},
                         {{b0, b1, b2, b3}}, region, tile_h, tile_w, h, w, x_batch, x_plane,
                         y_batch, y_plane, x_scales, y_inverses});
}
