// The depthwise dilated cascade of an FPE block in inference (cascade.cu has the maths), stride 1,
// dilations of 1 or even, with its planes in shared memory as they are stored: halves stay halves,
// sums are f32.
//
// A block takes one chain of one image, the whole plane (then y may be x) or a tile with a halo. A
// thread owns two neighbouring columns and walks rows r, r + d, r + 2 d, ...: of the nine taps of an
// output six are those of the output before, so that a row costs three reads of a pair. The result
// goes to memory, and with the next branch's input, read while it is made, to the other plane:
// s_(i+1) = x_(i+1) + y_i, rounded to the storage type. So a branch is one pass and one barrier.
// Bytes: x once (plus halos), y once. FLOPs: 18 per output. Shared memory accesses: 2 per output.
// Shared: 2 regions in the tensors' storage (1 where nothing is carried from branch to branch): 32 KB
// for two planes of 128 x 64 halves: three times into a TITAN V; registers keep it to one block of 512
// threads or two of 256.
// Launch: 256 or 512 threads, grid (tiles, chains, N): launch::cascade_warps().
#include "cascade_walk.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void cascade_walk(const Cascade<T>& cascade) {
    DYNAMIC_SHARED(T, shared);
    start_next();
    wait_for_previous();
    cascade_tile(cascade, blockIdx.x, blockIdx.y, gridDim.y, blockIdx.z, shared);
}

}  // namespace

// w0 .. w3, b0 .. b3: offsets of the branches' weights and biases in params.
extern "C" __global__ void __launch_bounds__(512, 1)
    cascade_walk_f32(const float* x, float* y, const float* params, int branches, int addition,
                     int d0, int d1, int d2, int d3, int w0, int w1, int w2, int w3, int b0, int b1,
                     int b2, int b3, int region, int tile_h, int tile_w, int h, int w, int x_batch,
                     int x_plane, int y_batch, int y_plane) {
    cascade_walk<float>({x, y, params, branches, addition, {{d0, d1, d2, d3}}, {{w0, w1, w2, w3}},
                     {{b0, b1, b2, b3}}, region, tile_h, tile_w, h, w, x_batch, x_plane, y_batch,
                     y_plane});
}

extern "C" __global__ void __launch_bounds__(512, 1)
    cascade_walk_f16(const __half* x, __half* y, const float* params, int branches, int addition,
                     int d0, int d1, int d2, int d3, int w0, int w1, int w2, int w3, int b0, int b1,
                     int b2, int b3, int region, int tile_h, int tile_w, int h, int w, int x_batch,
                     int x_plane, int y_batch, int y_plane) {
    cascade_walk<__half>({x, y, params, branches, addition, {{d0, d1, d2, d3}}, {{w0, w1, w2, w3}},
                     {{b0, b1, b2, b3}}, region, tile_h, tile_w, h, w, x_batch, x_plane, y_batch,
                     y_plane});
}
