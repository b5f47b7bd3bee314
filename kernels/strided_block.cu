// A strided block on the even grid (graph/passes/even_grid.rs), f16:
//   e_b = relu(We_b x + be_b),  y_b = relu(D_b(e_b) + bd_b)     per branch b, C channels each
// with D_b a depthwise 3x3 convolution, of stride 2 on all pixels of x (fine branches) or of stride 1
// on its even rows and columns (coarse ones). The expanded tensor, 5 C values per four pixels of x, is
// never in memory.
//
// strided_block makes y; a block of 256 threads has 8 x 8 outputs of one branch: the pixels of x that
// they need, all C channels, in shared memory; then 16 channels at a time the expansion by tensor
// cores (wmma, weights through L1), bias and ReLU in f32, halves in shared memory with zeros outside
// of the plane, and nine taps from there. Expanded pixels per output, with the halo: fine 17^2 / 64 =
// 4.5, coarse 1.6, 2.3 and 4 for dilations 1, 2, 4.
// Bytes: x per branch out of L2 with that halo, y once. FLOPs: 2 C per expanded value, 18 per output.
// Shared: 2 (C + 16) (pixels + 8) + 10 KB of sums: 40 KB for C = 32, 59 KB for C = 64.
// Launch: 256 threads, grid (tiles, branches, N): launch::strided_block().
//
// strided_pair goes on to the projection and the next block's expansion (pe.cuh): a block makes all
// four branches of its 8 x 8 outputs one after the other, and keeps their 4 C values as the operand of
// the projection. y is never in memory either: of 4 C values per pixel written and read, C written.
// The coarse branches share the pixels that the farthest of them needs, and expand all of these.
// Bytes: x twice with its halos out of L2, output and next expanded tensor; weights, 12 C^2 halves,
// per block out of L2. FLOPs: as above, 4 expanded pixels per output for every coarse branch, and
// 16 C^2 per output.
// Shared: 8 C (64 + 8) more than above: 57 KB for C = 32, 95 KB for C = 64, which a TITAN RTX has not.
// Launch: 256 threads, grid (tiles, 1, N): launch::strided_pair().
#include "cascade.cuh"
#include "pe.cuh"

namespace {

constexpr int TILE = 8, SUM_PITCH = 16 + FLOAT_PAD;

// Offsets of the expansions' weights in half_params and of their biases in params; those of the
// branches in params. `fine` branches are on all pixels, and come first.
struct Branches {
    const __half* x;
    const __half* half_params;
    const float* params;
    int fine;
    Four dilations;
    int fine_w, coarse_w, fine_b, coarse_b;
    Four weights, biases;
    int in_h, in_w, h, w, x_batch, x_plane;
};

// The pixels around a tile of outputs, as far as dilation `reach` goes, on the grid that its branches
// work on: every `step`-th row and column of x, outputs `stride` apart.
struct Around {
    int step, stride, reach, side, count, pitch, y0, x0, h, w;

    __device__ __forceinline__ Around(const Branches& op, bool fine, int reach, int oy0, int ox0)
        : step(fine ? 1 : 2), stride(fine ? 2 : 1), reach(reach) {
        side = (TILE - 1) * stride + 2 * reach + 1;
        count = (side * side + 15) / 16 * 16;
        pitch = count + HALF_PAD;
        y0 = oy0 * stride - reach, x0 = ox0 * stride - reach;
        h = (op.in_h + step - 1) / step, w = (op.in_w + step - 1) / step;
    }
    __device__ __forceinline__ bool inside(int q) const {
        const int y = y0 + q / side, x = x0 + q % side;
        return q < side * side && y >= 0 && y < h && x >= 0 && x < w;
    }
};

// All C channels of these pixels into shared memory, a warp's share of the channels at a time.
template <int C>
__device__ __forceinline__ void stage_around(const Branches& op, const Around& at, __half* xs) {
    constexpr int CHANNELS = C / TILE_WARPS, AT_ONCE = 16 / CHANNELS;
    const int lane = threadIdx.x % 32, c0 = threadIdx.x / 32 * CHANNELS;
    const __half* x = op.x + plane_at(blockIdx.z, op.x_batch, c0, op.x_plane);
    for (int first = lane; first < at.count; first += 32 * AT_ONCE) {
        __half v[AT_ONCE][CHANNELS];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int q = first + 32 * i;
            const bool inside = at.inside(q);
            const __half* from =
                x + static_cast<size_t>((at.y0 + q / at.side) * at.step) * op.in_w +
                (at.x0 + q % at.side) * at.step;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                v[i][c] = inside ? from[static_cast<size_t>(c) * op.x_plane] : __float2half(0.0f);
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int q = first + 32 * i;
            if (q >= at.count) break;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) xs[(c0 + c) * at.pitch + q] = v[i][c];
        }
    }
}

// One branch of a tile from the pixels around it: `out(c, p, v)` for channel c of its pixel p. Those
// outside of the plane are of no use. `sums`: a tile of 16 x 16 per warp, then the pixels of x, then
// 16 channels of the expansion.
template <int C, typename Out>
__device__ __forceinline__ void make_branch(const Branches& op, int branch, const Around& at,
                                            float* sums, Out out) {
    const int d = op.dilations.at(branch), warp = threadIdx.x / 32;
    const bool is_fine = branch < op.fine;
    const int pitch = at.pitch, side = at.side;
    const bool whole =
        at.y0 >= 0 && at.x0 >= 0 && at.y0 + side <= at.h && at.x0 + side <= at.w;
    const __half* xs = reinterpret_cast<const __half*>(sums + TILE_WARPS * 16 * SUM_PITCH);
    __half* es = reinterpret_cast<__half*>(sums + TILE_WARPS * 16 * SUM_PITCH) + C * pitch;
    const int row0 = (is_fine ? branch : branch - op.fine) * C;
    const __half* expand = op.half_params + (is_fine ? op.fine_w : op.coarse_w) + row0 * C;
    const float* expand_bias = op.params + (is_fine ? op.fine_b : op.coarse_b) + row0;
    const float* taps = op.params + op.weights.at(branch);
    const float* bias = op.params + op.biases.at(branch);
    float* own = sums + warp * 16 * SUM_PITCH;
    for (int row = 0; row < C; row += 16) {
        FragmentA a[C / 16];
#pragma unroll
        for (int k = 0; k < C / 16; ++k) {
            wmma::load_matrix_sync(a[k], expand + row * C + 16 * k, C);
        }
        for (int column = warp * 16; column < at.count; column += TILE_WARPS * 16) {
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
            // Eight pixels of a row per lane.
            const int r = threadIdx.x % 32 / 2, eight = threadIdx.x % 2 * 8;
            const float shift = expand_bias[row + r];
            float v[8];
            load_eight(own + r * SUM_PITCH + eight, v);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                v[i] = whole || at.inside(column + eight + i) ? relu(v[i] + shift) : 0.0f;
            }
            store_eight(es + r * pitch + column + eight, v);
            __syncwarp();
        }
        __syncthreads();
        // The first tap of pixel (0, 0), from where the farthest branch's would be.
        const __half* start = es + (at.reach - d) * (side + 1);
#pragma unroll
        for (int i = threadIdx.x; i < 16 * TILE * TILE; i += TILE_THREADS) {
            const int r = i / (TILE * TILE), c = row + r, p = i % (TILE * TILE);
            const __half* from =
                start + r * pitch + p / TILE * at.stride * side + p % TILE * at.stride;
            float v = bias[c];
#pragma unroll
            for (int t = 0; t < 9; ++t) {
                v += taps[9 * c + t] * load(from + (t / 3 * side + t % 3) * d);
            }
            out(c, p, relu(v));
        }
        __syncthreads();
    }
}

template <int C>
__device__ __forceinline__ void strided_block(const Branches& op, __half* RESTRICT y,
                                              int y_batch, int y_plane) {
    DYNAMIC_SHARED(float, sums);
    const int tiles_x = (op.w + TILE - 1) / TILE, branch = blockIdx.y;
    const int ox0 = blockIdx.x % tiles_x * TILE, oy0 = blockIdx.x / tiles_x * TILE;
    start_next();
    wait_for_previous();
    const Around at(op, branch < op.fine, op.dilations.at(branch), oy0, ox0);
    stage_around<C>(op, at, reinterpret_cast<__half*>(sums + TILE_WARPS * 16 * SUM_PITCH));
    __syncthreads();
    y += plane_at(blockIdx.z, y_batch, branch * C, y_plane);
    make_branch<C>(op, branch, at, sums, [&](int c, int p, float v) {
        const int oy = oy0 + p / TILE, ox = ox0 + p % TILE;
        if (oy >= op.h || ox >= op.w) return;
        store(y + static_cast<size_t>(c) * y_plane + static_cast<size_t>(oy) * op.w + ox, v);
    });
}

// Eight pixels of a tile are a row of it.
struct Square {
    int oy0, ox0, h, w;

    __device__ __forceinline__ size_t at(int p) const {
        return static_cast<size_t>(oy0 + p / TILE) * w + ox0;
    }
    __device__ __forceinline__ int count(int p) const {
        return oy0 + p / TILE < h ? w - ox0 : 0;
    }
};

template <int C>
__device__ __forceinline__ void strided_pair(const Branches& op,
                                             const ProjectExpand<__half>& pair) {
    using L = PairLayout<C, TILE * TILE, false>;
    DYNAMIC_SHARED(__half, shared);
    const int tiles_x = (op.w + TILE - 1) / TILE;
    const int ox0 = blockIdx.x % tiles_x * TILE, oy0 = blockIdx.x / tiles_x * TILE;
    start_next();
    wait_for_previous();
    // What the branches work in lies where the projection's result comes, when they are done.
    float* sums = reinterpret_cast<float*>(shared + L::Y);
    for (int first = 0; first < 4; first = first < op.fine ? op.fine : 4) {
        const int end = first < op.fine ? op.fine : 4;
        int reach = 0;
        for (int branch = first; branch < end; ++branch) {
            reach = max(reach, op.dilations.at(branch));
        }
        const Around at(op, first < op.fine, reach, oy0, ox0);
        stage_around<C>(op, at, reinterpret_cast<__half*>(sums + TILE_WARPS * 16 * SUM_PITCH));
        __syncthreads();
        for (int branch = first; branch < end; ++branch) {
            make_branch<C>(op, branch, at, sums, [&](int c, int p, float v) {
                store(shared + (branch * C + c) * L::PITCH + p, v);
            });
        }
    }
    const bool inside = oy0 + TILE <= op.h && ox0 + TILE <= op.w && op.w % TILE == 0 &&
                        wide(pair.y, pair.ys.batch, pair.ys.plane) &&
                        wide(pair.z, pair.zs.batch, pair.zs.plane);
    pair_products<C, TILE * TILE, false>(pair, Square{oy0, ox0, op.h, op.w}, inside, inside,
                                         blockIdx.z, shared);
}

}  // namespace

// fine .. x_plane: see Branches.
extern "C" __global__ void __launch_bounds__(256, 2)
    strided_block_f16_c32(const __half* x, const __half* half_params, const float* params,
                          __half* y, int fine, int d0, int d1, int d2, int d3, int fine_w,
                          int coarse_w, int fine_b, int coarse_b, int w0, int w1, int w2, int w3,
                          int b0, int b1, int b2, int b3, int in_h, int in_w, int h, int w,
                          int x_batch, int x_plane, int y_batch, int y_plane) {
    const Branches op = {x, half_params, params, fine, {{d0, d1, d2, d3}}, fine_w, coarse_w,
                         fine_b, coarse_b, {{w0, w1, w2, w3}}, {{b0, b1, b2, b3}}, in_h, in_w, h, w,
                         x_batch, x_plane};
    strided_block<32>(op, y, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    strided_block_f16_c64(const __half* x, const __half* half_params, const float* params,
                          __half* y, int fine, int d0, int d1, int d2, int d3, int fine_w,
                          int coarse_w, int fine_b, int coarse_b, int w0, int w1, int w2, int w3,
                          int b0, int b1, int b2, int b3, int in_h, int in_w, int h, int w,
                          int x_batch, int x_plane, int y_batch, int y_plane) {
    const Branches op = {x, half_params, params, fine, {{d0, d1, d2, d3}}, fine_w, coarse_w,
                         fine_b, coarse_b, {{w0, w1, w2, w3}}, {{b0, b1, b2, b3}}, in_h, in_w, h, w,
                         x_batch, x_plane};
    strided_block<64>(op, y, y_batch, y_plane);
}

// w_project .. z: the projection and the next expansion, biases may be null.
extern "C" __global__ void __launch_bounds__(256, 2)
    strided_pair_f16_c32(const __half* x, const __half* half_params, const float* params,
                         const __half* w_project, const float* b_project, __half* y,
                         const __half* w_expand, const float* b_expand, __half* z, int act1,
                         int act2, int fine, int d0, int d1, int d2, int d3, int fine_w,
                         int coarse_w, int fine_b, int coarse_b, int w0, int w1, int w2, int w3,
                         int b0, int b1, int b2, int b3, int in_h, int in_w, int h, int w,
                         int x_batch, int x_plane, int y_batch, int y_plane, int z_batch,
                         int z_plane) {
    const Branches op = {x, half_params, params, fine, {{d0, d1, d2, d3}}, fine_w, coarse_w,
                         fine_b, coarse_b, {{w0, w1, w2, w3}}, {{b0, b1, b2, b3}}, in_h, in_w, h, w,
                         x_batch, x_plane};
    ProjectExpand<__half> pair = {};
    pair.w1 = w_project, pair.b1 = b_project, pair.y = y, pair.act1 = act1;
    pair.w2 = w_expand, pair.b2 = b_expand, pair.z = z, pair.act2 = act2;
    pair.ys = {y_batch, y_plane}, pair.zs = {z_batch, z_plane};
    strided_pair<32>(op, pair);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    strided_pair_f16_c64(const __half* x, const __half* half_params, const float* params,
                         const __half* w_project, const float* b_project, __half* y,
                         const __half* w_expand, const float* b_expand, __half* z, int act1,
                         int act2, int fine, int d0, int d1, int d2, int d3, int fine_w,
                         int coarse_w, int fine_b, int coarse_b, int w0, int w1, int w2, int w3,
                         int b0, int b1, int b2, int b3, int in_h, int in_w, int h, int w,
                         int x_batch, int x_plane, int y_batch, int y_plane, int z_batch,
                         int z_plane) {
    const Branches op = {x, half_params, params, fine, {{d0, d1, d2, d3}}, fine_w, coarse_w,
                         fine_b, coarse_b, {{w0, w1, w2, w3}}, {{b0, b1, b2, b3}}, in_h, in_w, h, w,
                         x_batch, x_plane};
    ProjectExpand<__half> pair = {};
    pair.w1 = w_project, pair.b1 = b_project, pair.y = y, pair.act1 = act1;
    pair.w2 = w_expand, pair.b2 = b_expand, pair.z = z, pair.act2 = act2;
    pair.ys = {y_batch, y_plane}, pair.zs = {z_batch, z_plane};
    strided_pair<64>(op, pair);
}
