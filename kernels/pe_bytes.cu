// Projection with the next expansion (pe.cu) around expanded tensors in 8 bits: halves to bytes in a
// stage's first pair, bytes to bytes in the others, and without z a stage's last projection
// (lower/bytes.rs).
//
// x comes 16 pixels at a time and goes into shared memory as halves, times its channel's scale; z gets
// its scale in f32, behind bias and ReLU. All between is pe.cu's, launch and shared memory as well.
// Bytes per pixel, where pe.cu moves 20 C: 16 C from halves to bytes, 12 C from bytes to bytes.
// FLOPs: 4 C E per pixel.
#include "pe.cuh"

namespace {

template <int C, int P, typename X>
__device__ __forceinline__ void pair_bytes(const ProjectExpand<__half, X, Byte>& op, int staged) {
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

}  // namespace

// Operands: ProjectExpand of pe.cuh. z may be x where both are bytes.
extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c32_p64_to_u8(const __half* x, const __half* w1, const float* b1,
                           const __half* residual, __half* y, const __half* w2, const float* b2,
                           Byte* z, int act1, int act2, int pixels, int x_batch, int x_plane,
                           int r_batch, int r_plane, int y_batch, int y_plane, int z_batch,
                           int z_plane, int staged, const float* x_scales,
                           const float* z_inverses) {
    pair_bytes<32, 64, __half>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels,
                                {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                                {z_batch, z_plane}, x_scales, z_inverses}, staged);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c32_p64_u8(const Byte* x, const __half* w1, const float* b1, const __half* residual,
                        __half* y, const __half* w2, const float* b2, Byte* z, int act1, int act2,
                        int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                        int y_plane, int z_batch, int z_plane, int staged, const float* x_scales,
                        const float* z_inverses) {
    pair_bytes<32, 64, Byte>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels,
                              {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                              {z_batch, z_plane}, x_scales, z_inverses}, staged);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c32_p128_to_u8(const __half* x, const __half* w1, const float* b1,
                            const __half* residual, __half* y, const __half* w2, const float* b2,
                            Byte* z, int act1, int act2, int pixels, int x_batch, int x_plane,
                            int r_batch, int r_plane, int y_batch, int y_plane, int z_batch,
                            int z_plane, int staged, const float* x_scales,
                            const float* z_inverses) {
    pair_bytes<32, 128, __half>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels,
                                 {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                                 {z_batch, z_plane}, x_scales, z_inverses}, staged);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c32_p128_u8(const Byte* x, const __half* w1, const float* b1, const __half* residual,
                         __half* y, const __half* w2, const float* b2, Byte* z, int act1, int act2,
                         int pixels, int x_batch, int x_plane, int r_batch, int r_plane,
                         int y_batch, int y_plane, int z_batch, int z_plane, int staged,
                         const float* x_scales, const float* z_inverses) {
    pair_bytes<32, 128, Byte>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels,
                               {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                               {z_batch, z_plane}, x_scales, z_inverses}, staged);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c64_p32_to_u8(const __half* x, const __half* w1, const float* b1,
                           const __half* residual, __half* y, const __half* w2, const float* b2,
                           Byte* z, int act1, int act2, int pixels, int x_batch, int x_plane,
                           int r_batch, int r_plane, int y_batch, int y_plane, int z_batch,
                           int z_plane, int staged, const float* x_scales,
                           const float* z_inverses) {
    pair_bytes<64, 32, __half>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels,
                                {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                                {z_batch, z_plane}, x_scales, z_inverses}, staged);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c64_p32_u8(const Byte* x, const __half* w1, const float* b1, const __half* residual,
                        __half* y, const __half* w2, const float* b2, Byte* z, int act1, int act2,
                        int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                        int y_plane, int z_batch, int z_plane, int staged, const float* x_scales,
                        const float* z_inverses) {
    pair_bytes<64, 32, Byte>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels,
                              {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                              {z_batch, z_plane}, x_scales, z_inverses}, staged);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    pair_f16_c64_p64_to_u8(const __half* x, const __half* w1, const float* b1,
                           const __half* residual, __half* y, const __half* w2, const float* b2,
                           Byte* z, int act1, int act2, int pixels, int x_batch, int x_plane,
                           int r_batch, int r_plane, int y_batch, int y_plane, int z_batch,
                           int z_plane, int staged, const float* x_scales,
                           const float* z_inverses) {
    pair_bytes<64, 64, __half>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels,
                                {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                                {z_batch, z_plane}, x_scales, z_inverses}, staged);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    pair_f16_c64_p64_u8(const Byte* x, const __half* w1, const float* b1, const __half* residual,
                        __half* y, const __half* w2, const float* b2, Byte* z, int act1, int act2,
                        int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                        int y_plane, int z_batch, int z_plane, int staged, const float* x_scales,
                        const float* z_inverses) {
    pair_bytes<64, 64, Byte>({x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels,
                              {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                              {z_batch, z_plane}, x_scales, z_inverses}, staged);
}
