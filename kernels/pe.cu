// Projection of an FPE block with the expansion of the next one (paper, section 3.1): two 1x1
// convolutions back to back, the block's output between them kept on chip.
//
//   y = act1(W1 x + b1 + residual)     E = 4 C channels to C: the block's output, written
//   z = act2(W2 y + b2)                C channels to E: what the next cascade reads
//
// A block of 256 threads makes P pixels of all channels, so that x is read once and y and z are
// written once. Launch: grid (ceil(pixels / P), 1, N): launch.rs, pair().
// Bytes: (2 E + 2 C) per pixel in the tensors' storage, plus the weights, 2 C E per block out of
// L2. FLOPs: 4 C E per pixel: 51 per byte in f16 at C = 64.
//
// f16, tensor cores: the tile of x (E x P) in shared memory is the second operand of the first
// product as it lies there, since planes are its rows. Each of 8 warps makes C P / 2048 tiles of
// 16 x 16. The sums go through shared memory (over x, which is spent), get bias and residual in
// f32, and are rounded to f16 once, for memory and as operand of the second product alike. Weights
// come through L1, or are staged in shared memory first, where they fit.
// Shared memory in KB, without / with staged weights:
//   C = 32: P = 64: 22.5 / 41.0, P = 128: 42.5 / 61.0.   C = 64: P = 32: 25.0 / 94.0, P = 64: 45.0 /
//   114.0. So two blocks or more fit into a TITAN V's 96 KB and one into a TITAN RTX's 64 KB.
//
// f32, CUDA cores: tiles of 64 pixels, 4 x 4 (2 x 4) sums per thread; x and the weights pass through
// shared memory 16 channels at a time, y stays: 4 (C (P + 4) + 32 (P + 4)) bytes, 25.5 KB at C = 64.
#include "tile.cuh"

namespace {

struct Planes {
    int batch, plane;
};

template <int C, int P, bool STAGED>
__device__ __forceinline__ void pair_f16(const __half* __restrict__ x, const __half* w1,
                                         const float* __restrict__ b1, const __half* residual,
                                         __half* y, const __half* w2,
                                         const float* __restrict__ b2, __half* z, int act1,
                                         int act2, int pixels, int x_plane, int r_plane,
                                         int y_plane, int z_plane, bool aligned, __half* shared) {
    constexpr int E = 4 * C, PITCH = P + HALF_PAD, SUM_PITCH = P + FLOAT_PAD;
    constexpr int PITCH1 = STAGED ? E + HALF_PAD : E, PITCH2 = STAGED ? C + HALF_PAD : C;
    constexpr int ROWS = C / 16, ACROSS = TILE_WARPS / ROWS, TILES = P / 16 / ACROSS;
    constexpr int WARP_PITCH = 32 + FLOAT_PAD;
    static_assert(C * SUM_PITCH * 4 <= E * PITCH * 2, "the sums lie over x");
    static_assert(TILE_WARPS * 16 * WARP_PITCH * 4 <= E * PITCH * 2, "and so do the warps' own");
    __half* xs = shared;
    __half* ys = xs + E * PITCH;
    float* sums = reinterpret_cast<float*>(xs);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * P;
    const bool inside = aligned && first + P <= pixels;

    start_next();
    if (STAGED) {
        __half* staged1 = ys + C * PITCH;
        __half* staged2 = staged1 + C * PITCH1;
        stage_matrix<C, E, PITCH1>(w1, staged1);
        stage_matrix<E, C, PITCH2>(w2, staged2);
        w1 = staged1;
        w2 = staged2;
    }
    wait_for_previous();
    stage_pixels<E, P, PITCH>(x, x_plane, first, pixels, aligned, xs);
    __syncthreads();

    {
        const int row = warp % ROWS * 16, column = warp / ROWS * TILES * 16;
        Sums acc[TILES];
#pragma unroll
        for (int t = 0; t < TILES; ++t) wmma::fill_fragment(acc[t], 0.0f);
#pragma unroll 4
        for (int k = 0; k < E; k += 16) {
            FragmentA a;
            wmma::load_matrix_sync(a, w1 + row * PITCH1 + k, PITCH1);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                FragmentB b;
                wmma::load_matrix_sync(b, xs + k * PITCH + column + 16 * t, PITCH);
                wmma::mma_sync(acc[t], a, b, acc[t]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            wmma::store_matrix_sync(sums + row * SUM_PITCH + column + 16 * t, acc[t], SUM_PITCH,
                                    wmma::mem_row_major);
        }
        __syncthreads();
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < C * P / 8; i += TILE_THREADS) {
        const int c = i / (P / 8), p = i % (P / 8) * 8, count = pixels - first - p;
        float v[8];
        load_eight(sums + c * SUM_PITCH + p, v);
        const __half* before = residual;
        if (before != nullptr) before += static_cast<size_t>(c) * r_plane + first + p;
        finish_eight(v, b1 != nullptr ? b1[c] : 0.0f, before, act1, inside, count);
        write_eight(y + static_cast<size_t>(c) * y_plane + first + p, v, inside, count);
        store_eight(ys + c * PITCH + p, v);
    }
    __syncthreads();

    float* own = sums + warp * 16 * WARP_PITCH;
    for (int row = warp * 16; row < E; row += TILE_WARPS * 16) {
        FragmentA a[C / 16];
#pragma unroll
        for (int k = 0; k < C / 16; ++k) {
            wmma::load_matrix_sync(a[k], w2 + row * PITCH2 + 16 * k, PITCH2);
        }
        for (int column = 0; column < P; column += 32) {
            Sums acc[2];
#pragma unroll
            for (int t = 0; t < 2; ++t) wmma::fill_fragment(acc[t], 0.0f);
#pragma unroll
            for (int k = 0; k < C / 16; ++k) {
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    FragmentB b;
                    wmma::load_matrix_sync(b, ys + 16 * k * PITCH + column + 16 * t, PITCH);
                    wmma::mma_sync(acc[t], a[k], b, acc[t]);
                }
            }
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                wmma::store_matrix_sync(own + 16 * t, acc[t], WARP_PITCH, wmma::mem_row_major);
            }
            __syncwarp();
#pragma unroll
            for (int i = lane; i < 64; i += 32) {
                const int c = row + i / 4, p = column + i % 4 * 8, count = pixels - first - p;
                float v[8];
                load_eight(own + i / 4 * WARP_PITCH + i % 4 * 8, v);
                finish_eight<__half>(v, b2 != nullptr ? b2[c] : 0.0f, nullptr, act2, inside, count);
                write_eight(z + static_cast<size_t>(c) * z_plane + first + p, v, inside, count);
            }
            __syncwarp();
        }
    }
}

template <int C, int P>
__device__ __forceinline__ void pair_f16(const __half* x, const __half* w1, const float* b1,
                                         const __half* residual, __half* y, const __half* w2,
                                         const float* b2, __half* z, int act1, int act2, int staged,
                                         int pixels, Planes xs, Planes rs, Planes ys, Planes zs) {
    DYNAMIC_SHARED(__half, shared);
    const bool aligned = wide(x, xs.batch, xs.plane) && wide(residual, rs.batch, rs.plane) &&
                         wide(y, ys.batch, ys.plane) && wide(z, zs.batch, zs.plane);
    x += plane_at(blockIdx.z, xs.batch, 0, 0);
    y += plane_at(blockIdx.z, ys.batch, 0, 0);
    z += plane_at(blockIdx.z, zs.batch, 0, 0);
    if (residual != nullptr) residual += plane_at(blockIdx.z, rs.batch, 0, 0);
    if (staged) {
        pair_f16<C, P, true>(x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels, xs.plane,
                             rs.plane, ys.plane, zs.plane, aligned, shared);
    } else {
        pair_f16<C, P, false>(x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels, xs.plane,
                              rs.plane, ys.plane, zs.plane, aligned, shared);
    }
}

template <int C>
__device__ __forceinline__ void pair_f32(const float* __restrict__ x,
                                         const float* __restrict__ w1,
                                         const float* __restrict__ b1,
                                         const float* residual, float* y,
                                         const float* __restrict__ w2,
                                         const float* __restrict__ b2, float* z, int act1, int act2,
                                         int pixels, Planes px, Planes pr, Planes py, Planes pz) {
    constexpr int E = 4 * C, R = C / 16;
    start_next();
    wait_for_previous();
    DYNAMIC_SHARED(float, shared);
    float* ys = shared;
    float* xs = ys + C * PITCH_F32;
    float* ws = xs + DEPTH * PITCH_F32;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, first = blockIdx.x * PIXELS;
    const int count = pixels - first;
    x += plane_at(blockIdx.z, px.batch, 0, 0) + first;
    y += plane_at(blockIdx.z, py.batch, 0, 0) + first;
    z += plane_at(blockIdx.z, pz.batch, 0, 0) + first;
    if (residual != nullptr) residual += plane_at(blockIdx.z, pr.batch, 0, 0) + first;

    float acc[R][4] = {};
    for (int k0 = 0; k0 < E; k0 += DEPTH) {
#pragma unroll
        for (int i = threadIdx.x; i < DEPTH * PIXELS; i += TILE_THREADS) {
            const int k = i / PIXELS, p = i % PIXELS;
            xs[k * PITCH_F32 + p] =
                p < count ? x[static_cast<size_t>(k0 + k) * px.plane + p] : 0.0f;
        }
        stage_weights_f32<R>(w1 + k0, E, C, DEPTH, ws);
        __syncthreads();
        multiply_f32<R>(ws, xs, acc);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const int c = R * ty + r;
        const float shift = b1 != nullptr ? b1[c] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int p = 4 * tx + i;
            float v = acc[r][i] + shift;
            if (p < count) {
                if (residual != nullptr) v += residual[static_cast<size_t>(c) * pr.plane + p];
                v = activate(v, act1);
                y[static_cast<size_t>(c) * py.plane + p] = v;
            }
            ys[c * PITCH_F32 + p] = v;
        }
    }
    for (int row = 0; row < E; row += 64) {
        float sums[4][4] = {};
        for (int k0 = 0; k0 < C; k0 += DEPTH) {
            stage_weights_f32<4>(w2 + row * C + k0, C, 64, DEPTH, ws);
            __syncthreads();
            multiply_f32<4>(ws, ys + k0 * PITCH_F32, sums);
            __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int c = row + 4 * ty + r;
            const float shift = b2 != nullptr ? b2[c] : 0.0f;
            float* out = z + static_cast<size_t>(c) * pz.plane + 4 * tx;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (4 * tx + i < count) out[i] = activate(sums[r][i] + shift, act2);
            }
        }
    }
}

}  // namespace

// Biases and the residual may be null. z may be x, tensor for tensor; nothing else may overlap.
extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c32_p64(const __half* x, const __half* w1, const float* b1, const __half* residual,
                     __half* y, const __half* w2, const float* b2, __half* z, int act1, int act2,
                     int staged, int pixels, int x_batch, int x_plane, int r_batch, int r_plane,
                     int y_batch, int y_plane, int z_batch, int z_plane) {
    pair_f16<32, 64>(x, w1, b1, residual, y, w2, b2, z, act1, act2, staged, pixels,
                     {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                     {z_batch, z_plane});
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c32_p128(const __half* x, const __half* w1, const float* b1, const __half* residual,
                      __half* y, const __half* w2, const float* b2, __half* z, int act1, int act2,
                      int staged, int pixels, int x_batch, int x_plane, int r_batch, int r_plane,
                      int y_batch, int y_plane, int z_batch, int z_plane) {
    pair_f16<32, 128>(x, w1, b1, residual, y, w2, b2, z, act1, act2, staged, pixels,
                      {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                      {z_batch, z_plane});
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c64_p32(const __half* x, const __half* w1, const float* b1, const __half* residual,
                     __half* y, const __half* w2, const float* b2, __half* z, int act1, int act2,
                     int staged, int pixels, int x_batch, int x_plane, int r_batch, int r_plane,
                     int y_batch, int y_plane, int z_batch, int z_plane) {
    pair_f16<64, 32>(x, w1, b1, residual, y, w2, b2, z, act1, act2, staged, pixels,
                     {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                     {z_batch, z_plane});
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f16_c64_p64(const __half* x, const __half* w1, const float* b1, const __half* residual,
                     __half* y, const __half* w2, const float* b2, __half* z, int act1, int act2,
                     int staged, int pixels, int x_batch, int x_plane, int r_batch, int r_plane,
                     int y_batch, int y_plane, int z_batch, int z_plane) {
    pair_f16<64, 64>(x, w1, b1, residual, y, w2, b2, z, act1, act2, staged, pixels,
                     {x_batch, x_plane}, {r_batch, r_plane}, {y_batch, y_plane},
                     {z_batch, z_plane});
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f32_c32(const float* x, const float* w1, const float* b1, const float* residual, float* y,
                 const float* w2, const float* b2, float* z, int act1, int act2, int pixels,
                 int x_batch, int x_plane, int r_batch, int r_plane, int y_batch, int y_plane,
                 int z_batch, int z_plane) {
    pair_f32<32>(x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels, {x_batch, x_plane},
                 {r_batch, r_plane}, {y_batch, y_plane}, {z_batch, z_plane});
}

extern "C" __global__ void __launch_bounds__(256, 2)
    pair_f32_c64(const float* x, const float* w1, const float* b1, const float* residual, float* y,
                 const float* w2, const float* b2, float* z, int act1, int act2, int pixels,
                 int x_batch, int x_plane, int r_batch, int r_plane, int y_batch, int y_plane,
                 int z_batch, int z_plane) {
    pair_f32<64>(x, w1, b1, residual, y, w2, b2, z, act1, act2, pixels, {x_batch, x_plane},
                 {r_batch, r_plane}, {y_batch, y_plane}, {z_batch, z_plane});
}
