// Expansion and branches of a strided block on the even grid (graph/passes/even_grid.rs), f16:
//   e_b = relu(We_b x + be_b),  y_b = relu(D_b(e_b) + bd_b)     per branch b, C channels each
// with D_b a depthwise 3x3 convolution, of stride 2 on all pixels of x (fine branches) or of stride 1
// on its even rows and columns (coarse ones). The expanded tensor, 5 C values per four pixels of x, is
// never in memory.
//
// A block of 256 threads makes 8 x 8 outputs of one branch: the pixels of x that they need, all C
// channels, in shared memory; then 16 channels at a time the expansion by tensor cores (wmma, weights
// through L1), bias and ReLU in f32, halves in shared memory with zeros outside of the plane, and nine
// taps from there. Expanded pixels per output, with the halo: fine 17^2 / 64 = 4.5, coarse 1.6, 2.3
// and 4 for dilations 1, 2, 4.
// Bytes: x per branch out of L2 with that halo, y once. FLOPs: 2 C per expanded value, 18 per output.
// Shared: 2 (C + 16) (pixels + 8) + 10 KB of sums: 40 KB for C = 32, 59 KB for C = 64.
// Launch: grid (tiles, branches, N): launch::strided_block().
#include "cascade.cuh"
#include "tile.cuh"

namespace {

constexpr int TILE = 8, SUM_PITCH = 16 + FLOAT_PAD;

template <int C>
__device__ __forceinline__ void strided_block(const __half* __restrict__ x,
                                              const __half* __restrict__ half_params,
                                              const float* __restrict__ params,
                                              __half* __restrict__ y, int fine, Four dilations,
                                              int fine_w, int coarse_w, int fine_b, int coarse_b,
                                              Four weights, Four biases, int in_h, int in_w, int h,
                                              int w, int x_batch, int x_plane, int y_batch,
                                              int y_plane) {
    DYNAMIC_SHARED(float, sums);
    const int branch = blockIdx.y, d = dilations.at(branch), warp = threadIdx.x / 32;
    const bool is_fine = branch < fine;
    // The grid that the branch works on: every `step`-th row and column of x, outputs `stride` apart.
    const int step = is_fine ? 1 : 2, stride = is_fine ? 2 : 1;
    const int grid_h = (in_h + step - 1) / step, grid_w = (in_w + step - 1) / step;
    const int tiles_x = (w + TILE - 1) / TILE;
    const int ox0 = blockIdx.x % tiles_x * TILE, oy0 = blockIdx.x / tiles_x * TILE;
    const int gx0 = ox0 * stride - d, gy0 = oy0 * stride - d;
    const int side = (TILE - 1) * stride + 2 * d + 1, count = (side * side + 15) / 16 * 16;
    const int pitch = count + HALF_PAD;
    __half* xs = reinterpret_cast<__half*>(sums + TILE_WARPS * 16 * SUM_PITCH);
    __half* es = xs + C * pitch;

    start_next();
    wait_for_previous();
    x += plane_at(blockIdx.z, x_batch, 0, 0);
    for (int q = threadIdx.x; q < count; q += TILE_THREADS) {
        const int gy = gy0 + q / side, gx = gx0 + q % side;
        const bool inside =
            q < side * side && gy >= 0 && gy < grid_h && gx >= 0 && gx < grid_w;
        const __half* from = x + static_cast<size_t>(gy * step) * in_w + gx * step;
#pragma unroll 8
        for (int c = 0; c < C; ++c) {
            xs[c * pitch + q] =
                inside ? from[static_cast<size_t>(c) * x_plane] : __float2half(0.0f);
        }
    }
    __syncthreads();

    const int row0 = (is_fine ? branch : branch - fine) * C;
    const __half* expand = half_params + (is_fine ? fine_w : coarse_w) + row0 * C;
    const float* expand_bias = params + (is_fine ? fine_b : coarse_b) + row0;
    const float* taps = params + weights.at(branch);
    const float* bias = params + biases.at(branch);
    float* own = sums + warp * 16 * SUM_PITCH;
    y += plane_at(blockIdx.z, y_batch, branch * C, y_plane);
    for (int row = 0; row < C; row += 16) {
        FragmentA a[C / 16];
#pragma unroll
        for (int k = 0; k < C / 16; ++k) {
            wmma::load_matrix_sync(a[k], expand + row * C + 16 * k, C);
        }
        for (int column = warp * 16; column < count; column += TILE_WARPS * 16) {
            Sums acc;
            wmma::fill_fragment(acc, 0.0f);
#pragma unroll
            for (int k = 0; k < C / 16; ++k) {
                FragmentB b;
                wmma::load_matrix_sync(b, xs + 16 * k * pitch + column, pitch);
                wmma::mma_sync(acc, a[k], b, acc);
            }
            wmma::store_matrix_sync(own, acc, SUM_PITCH, wmma::mem_row_major);
            __syncwarp();
            const int q = column + static_cast<int>(threadIdx.x % 16);
            const int gy = gy0 + q / side, gx = gx0 + q % side;
            const bool inside =
                q < side * side && gy >= 0 && gy < grid_h && gx >= 0 && gx < grid_w;
#pragma unroll
            for (int r = threadIdx.x % 32 / 16; r < 16; r += 2) {
                const float v = own[r * SUM_PITCH + threadIdx.x % 16] + expand_bias[row + r];
                store(es + r * pitch + q, inside ? relu(v) : 0.0f);
            }
            __syncwarp();
        }
        __syncthreads();
#pragma unroll
        for (int i = threadIdx.x; i < 16 * TILE * TILE; i += TILE_THREADS) {
            const int r = i / (TILE * TILE), c = row + r;
            const int ty = i / TILE % TILE, tx = i % TILE, oy = oy0 + ty, ox = ox0 + tx;
            const __half* from = es + r * pitch + ty * stride * side + tx * stride;
            float v = bias[c];
#pragma unroll
            for (int t = 0; t < 9; ++t) {
                v += taps[9 * c + t] * load(from + (t / 3 * side + t % 3) * d);
            }
            if (oy < h && ox < w) {
                store(y + static_cast<size_t>(c) * y_plane + static_cast<size_t>(oy) * w + ox,
                      relu(v));
            }
        }
        __syncthreads();
    }
}

}  // namespace

// fine: branches on all pixels, which come first; fine_w .. coarse_b: offsets of the expansions'
// weights in half_params and of their biases in params; w0 .. b3 those of the branches in params.
extern "C" __global__ void __launch_bounds__(256, 2)
    strided_block_f16_c32(const __half* x, const __half* half_params, const float* params,
                          __half* y, int fine, int d0, int d1, int d2, int d3, int fine_w,
                          int coarse_w, int fine_b, int coarse_b, int w0, int w1, int w2, int w3,
                          int b0, int b1, int b2, int b3, int in_h, int in_w, int h, int w,
                          int x_batch, int x_plane, int y_batch, int y_plane) {
    strided_block<32>(x, half_params, params, y, fine, Four{{d0, d1, d2, d3}}, fine_w, coarse_w,
                      fine_b, coarse_b, Four{{w0, w1, w2, w3}}, Four{{b0, b1, b2, b3}}, in_h, in_w,
                      h, w, x_batch, x_plane, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    strided_block_f16_c64(const __half* x, const __half* half_params, const float* params,
                          __half* y, int fine, int d0, int d1, int d2, int d3, int fine_w,
                          int coarse_w, int fine_b, int coarse_b, int w0, int w1, int w2, int w3,
                          int b0, int b1, int b2, int b3, int in_h, int in_w, int h, int w,
                          int x_batch, int x_plane, int y_batch, int y_plane) {
    strided_block<64>(x, half_params, params, y, fine, Four{{d0, d1, d2, d3}}, fine_w, coarse_w,
                      fine_b, coarse_b, Four{{w0, w1, w2, w3}}, Four{{b0, b1, b2, b3}}, in_h, in_w,
                      h, w, x_batch, x_plane, y_batch, y_plane);
}
