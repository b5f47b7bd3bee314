// Projection of an FPE block with the expansion of the next one (paper, section 3.1): two 1x1
// convolutions back to back, the block's output between them kept on chip.
//
//   y = act1(W1 x + b1 + residual)     E = 4 C channels to C: the block's output, written
//   z = act2(W2 y + b2)                C channels to E: what the next cascade reads
//
// A block of 256 threads, or 512 of 64 x 64 outputs, makes P pixels of all channels, so that x is read once and y and z are
// written once. Launch: grid (ceil(pixels / P), 1, N): launch::pair().
// Bytes: (2 E + 2 C) per pixel in the tensors' storage, plus the weights, 2 C E per block out of
// L2. FLOPs: 4 C E per pixel: 51 per byte in f16 at C = 64.
//
// f16, tensor cores: the tile of x (E x P) in shared memory is the second operand of the first
// product as it lies there, since planes are its rows. Each warp makes one or
// two tiles of 16 x 16; bias and residual are on their way meanwhile. The sums go through shared memory (over x, which is spent), get bias and residual in
// f32, and are rounded to f16 once, for memory and as operand of the second product alike. Weights
// come through L1, or are staged in shared memory first, where they fit.
// Shared memory in KB, without / with staged weights:
//   C = 32: P = 64: 22.5 / 41.0, P = 128: 42.5 / 61.0.   C = 64: P = 32: 25.0 / 94.0, P = 64: 45.0 /
//   114.0. So two blocks or more fit into a TITAN V's 96 KB and one into a TITAN RTX's 64 KB.
//
// f32, CUDA cores: tiles of 64 pixels, 4 x 4 (2 x 4) sums per thread; x and the weights pass through
// shared memory 16 channels at a time, y stays: 4 (C (P + 4) + 32 (P + 4)) bytes, 25.5 KB at C = 64.
#include "pe.cuh"

namespace {

template <int C, int P>
__device__ __forceinline__ void pair_f16(const ProjectExpand<__half>& op, int staged) {
    DYNAMIC_SHARED(__half, shared);
    start_next();
    constexpr int THREADS = PAIR_THREADS<C, P>;
    if (staged) stage_pair_weights<C, P, THREADS>(op.w1, op.w2, shared);
    wait_for_previous();
    if (staged) {
        pair_tile<C, P, true, THREADS>(op, blockIdx.x, blockIdx.z, shared);
    } else {
        pair_tile<C, P, false, THREADS>(op, blockIdx.x, blockIdx.z, shared);
    }
}

template <int C>
__device__ __forceinline__ void pair_f32(const ProjectExpand<float>& op) {
    DYNAMIC_SHARED(float, shared);
    start_next();
    wait_for_previous();
    pair_tile<C>(op, blockIdx.x, blockIdx.z, shared);
}

}  // namespace

// Operands: ProjectExpand of pe.cuh.
extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c32_p64(const __half* x, const __half* w1, const float* b1, const __half* residual,
                     __half* y, const __half* w2, const float* b2, __half* z, int act1, int act2,
                     int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                     int y_plane, int z_batch, int z_plane, int staged) {
    pair_f16<32, 64>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels, {x_batch, x_plane},
                      {r_batch, r_plane}, {y_batch, y_plane}, {z_batch, z_plane}}, staged);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c32_p128(const __half* x, const __half* w1, const float* b1, const __half* residual,
                      __half* y, const __half* w2, const float* b2, __half* z, int act1, int act2,
                      int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                      int y_plane, int z_batch, int z_plane, int staged) {
    pair_f16<32, 128>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels, {x_batch, x_plane},
                       {r_batch, r_plane}, {y_batch, y_plane}, {z_batch, z_plane}}, staged);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c64_p32(const __half* x, const __half* w1, const float* b1, const __half* residual,
                     __half* y, const __half* w2, const float* b2, __half* z, int act1, int act2,
                     int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                     int y_plane, int z_batch, int z_plane, int staged) {
    pair_f16<64, 32>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels, {x_batch, x_plane},
                      {r_batch, r_plane}, {y_batch, y_plane}, {z_batch, z_plane}}, staged);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    pair_f16_c64_p64(const __half* x, const __half* w1, const float* b1, const __half* residual,
                     __half* y, const __half* w2, const float* b2, __half* z, int act1, int act2,
                     int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                     int y_plane, int z_batch, int z_plane, int staged) {
    pair_f16<64, 64>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels, {x_batch, x_plane},
                      {r_batch, r_plane}, {y_batch, y_plane}, {z_batch, z_plane}}, staged);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f32_c32(const float* x, const float* w1, const float* b1, const float* residual, float* y,
                 const float* w2, const float* b2, float* z, int act1, int act2, int pixels,
                 int x_batch, int x_plane, int r_batch, int r_plane, int y_batch, int y_plane,
                 int z_batch, int z_plane) {
    pair_f32<32>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels, {x_batch, x_plane},
                  {r_batch, r_plane}, {y_batch, y_plane}, {z_batch, z_plane}});
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f32_c64(const float* x, const float* w1, const float* b1, const float* residual, float* y,
                 const float* w2, const float* b2, float* z, int act1, int act2, int pixels,
                 int x_batch, int x_plane, int r_batch, int r_plane, int y_batch, int y_plane,
                 int z_batch, int z_plane) {
    pair_f32<64>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels, {x_batch, x_plane},
                  {r_batch, r_plane}, {y_batch, y_plane}, {z_batch, z_plane}});
}
