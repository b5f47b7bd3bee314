// A strided block on the even grid (graph/passes/even_grid.rs), f16:
//   e_b = relu(We_b x + be_b),  y_b = relu(D_b(e_b) + bd_b)     per branch b, C channels each
// with D_b a depthwise 3x3 convolution, of stride 2 on all pixels of x (fine branches) or of stride 1
// on its even rows and columns (coarse ones). The expanded tensor, 5 C values per four pixels of x, is
// never in memory.
//
// strided_block makes y; a block of 256 threads has 8 rows of 16 outputs of one branch (of 8, where
// shared memory is short). The pixels of x that they need come into shared memory with a pixel's C
// channels together, two pixels of 8 channels per thread at a time. A warp expands 16 pixels at once
// by tensor cores (mma.cuh, weights in registers, biases where the sums start) and puts e where their
// x was, zeros outside of the plane. Then a thread makes 8 neighbouring outputs of two channels, from
// taps that it reads once for all three columns they are in.
// Rows of the region are as long as it takes for the lanes' banks to differ, and, on all pixels, for
// pairs of x to lie on addresses of 4 bytes.
// Expanded pixels per output: fine 4.5, coarse 1.6, 1.9 and 3.5 for dilations 1, 2, 4 (C = 32).
// Bytes: x per branch out of L2 with that halo, y once. FLOPs: 2 C per expanded value, 18 per output.
// Shared: 2 (C + 8) per pixel and 44 C: 48 KB for C = 32, 86 KB for C = 64.
// Launch: 256 threads, grid (tiles, branches, N): launch::strided_block().
//
// strided_pair goes on to the projection and the next block's expansion (pe.cuh): a block makes all
// four branches of its 8 x 8 outputs one after the other, and keeps their 4 C values as the operand of
// the projection. y is never in memory either: of 4 C values per pixel written and read, C written.
// Bytes: x per branch out of L2 with its halo, output and next expanded tensor; weights, 12 C^2 halves,
// per block out of L2. FLOPs: as above, with the halos of 8 x 8, and 16 C^2 per output.
// Shared: 8 C (64 + 8) more than for a branch of 8 x 8: 45 KB for C = 32, 86 KB for C = 64.
// Launch: 256 threads, grid (tiles, 1, N): launch::strided_pair().
#include "cascade.cuh"
#include "mma.cuh"
#include "pe.cuh"

namespace {

constexpr int TILE = 8;
// Blocks of 32 channels on a multiprocessor. Volta, without mma.cuh's products, needs more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
constexpr int NARROW_BLOCKS = 2;
#else
constexpr int NARROW_BLOCKS = 4;
#endif

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

// The pixels that a branch's taps reach from a tile of outputs, on the grid that it works on: every
// `step`-th row and column of x, outputs `stride` apart. `lead` columns before the first tap.
template <int C>
struct Region {
    int step, stride, d, lead, rows, pitch, y0, x0, h, w;

    __device__ __forceinline__ Region(const Branches& op, int branch, int tile_w, int oy0, int ox0) {
        const bool fine = branch < op.fine;
        step = fine ? 1 : 2, stride = fine ? 2 : 1, d = op.dilations.at(branch);
        lead = fine ? d % 2 : 0;
        rows = (TILE - 1) * stride + 2 * d + 1;
        // launch::strided_pixels() has the same.
        const int span = lead + (tile_w - 1) * stride + 2 * d + 1;
        pitch = span + (fine ? (2 - span) & 3 : C == 32 ? (4 - span) & 7 : span & 1);
        y0 = oy0 * stride - d, x0 = ox0 * stride - d - lead;
        h = (op.in_h + step - 1) / step, w = (op.in_w + step - 1) / step;
    }
    __device__ __forceinline__ int count() const { return rows * pitch; }
    __device__ __forceinline__ bool inside(int q) const {
        const int y = y0 + q / pitch, x = x0 + q % pitch;
        return y >= 0 && y < h && x >= 0 && x < w;
    }
    __device__ __forceinline__ bool whole() const {
        return y0 >= 0 && x0 >= 0 && y0 + rows <= h && x0 + pitch <= w;
    }
};

// In shared memory: a branch's parameters, then its pixels.
template <int C>
struct BranchParams {
    float expand_bias[C], taps[9][C], bias[C];
};

// Halves from one pixel to the next.
template <int C>
constexpr int PIXEL = C + HALF_PAD;

// The weights of a branch's expansion, a column of 8 channels after the other, as operands B.
template <int C>
struct Expansion {
    unsigned b[C / 8][C / 16][2];
};

// A branch's parameters, none of which waits for another kernel.
template <int C>
__device__ __forceinline__ void load_params(const Branches& op, int branch, Expansion<C>& expand,
                                            BranchParams<C>& params) {
    const bool fine = branch < op.fine;
    const int row0 = (fine ? branch : branch - op.fine) * C;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const __half* w = op.half_params + (fine ? op.fine_w : op.coarse_w) + (row0 + g) * C + 2 * t;
#pragma unroll
    for (int n = 0; n < C / 8; ++n) {
#pragma unroll
        for (int k = 0; k < C / 16; ++k) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                expand.b[n][k][i] = *reinterpret_cast<const unsigned*>(w + 8 * n * C + 16 * k + 8 * i);
            }
        }
    }
    const float* expand_bias = op.params + (fine ? op.fine_b : op.coarse_b) + row0;
    const float* taps = op.params + op.weights.at(branch);
    const float* bias = op.params + op.biases.at(branch);
    for (int i = threadIdx.x; i < 9 * C; i += TILE_THREADS) params.taps[i % 9][i / 9] = taps[i];
    if (threadIdx.x < C) {
        params.expand_bias[threadIdx.x] = expand_bias[threadIdx.x];
        params.bias[threadIdx.x] = bias[threadIdx.x];
    }
}

// Two neighbouring pixels of 8 channels, a register per channel. PAIRED: in one load.
template <int C, bool PAIRED>
__device__ __forceinline__ void load_two(const Branches& op, const Region<C>& at, const __half* x,
                                         int row, int column, unsigned (&v)[8]) {
    const int y = at.y0 + row, left = at.x0 + column;
    const bool in_row = y >= 0 && y < at.h, first = in_row && left >= 0 && left < at.w;
    const bool second = in_row && left + 1 >= 0 && left + 1 < at.w;
    const __half* from = x + static_cast<ptrdiff_t>(y * at.step) * op.in_w + left * at.step;
    unsigned short low[8], high[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const __half* channel = from + static_cast<size_t>(c) * op.x_plane;
        if (PAIRED) {
            v[c] = first ? *reinterpret_cast<const unsigned*>(channel) : 0u;
        } else {
            low[c] = first ? __half_as_ushort(channel[0]) : 0;
            high[c] = second ? __half_as_ushort(channel[at.step]) : 0;
        }
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        if (!PAIRED) v[c] = low[c] | static_cast<unsigned>(high[c]) << 16;
    }
}

__device__ __forceinline__ void store_two(__half* to, int pixel, const unsigned (&v)[8]) {
    *reinterpret_cast<uint4*>(to) =
        uint4{__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410),
              __byte_perm(v[4], v[5], 0x5410), __byte_perm(v[6], v[7], 0x5410)};
    *reinterpret_cast<uint4*>(to + pixel) =
        uint4{__byte_perm(v[0], v[1], 0x7632), __byte_perm(v[2], v[3], 0x7632),
              __byte_perm(v[4], v[5], 0x7632), __byte_perm(v[6], v[7], 0x7632)};
}

// All channels of the region's pixels into shared memory, 16 loads of a thread under way.
template <int C, bool PAIRED>
__device__ __forceinline__ void stage_region(const Branches& op, const Region<C>& at,
                                             __half* pixels) {
    constexpr int ACROSS = TILE_THREADS / (C / 8), AT_ONCE = PAIRED ? 2 : 1;
    const int c0 = threadIdx.x / ACROSS * 8, first = threadIdx.x % ACROSS, across = at.pitch / 2;
    const __half* x = op.x + plane_at(blockIdx.z, op.x_batch, c0, op.x_plane);
    const int rows = ACROSS / across, columns = ACROSS % across;
    int row = first / across, column = first % across;
#pragma unroll 1
    while (row < at.rows) {
        unsigned v[AT_ONCE][8];
        int to[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            to[i] = row < at.rows ? (row * at.pitch + 2 * column) * PIXEL<C> : -1;
            load_two<C, PAIRED>(op, at, x, row, 2 * column, v[i]);
            row += rows, column += columns;
            if (column >= across) column -= across, ++row;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (to[i] >= 0) store_two(pixels + to[i] + c0, PIXEL<C>, v[i]);
        }
    }
}

// e in the place of x.
template <int C>
__device__ __forceinline__ void expand_region(const Region<C>& at, const Expansion<C>& expand,
                                              const float* bias, __half* pixels) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int count = at.count();
    const bool whole = at.whole();
    for (int q = threadIdx.x / 32 * 16; q < count; q += TILE_WARPS * 16) {
        __half* mine = pixels + (q + g) * PIXEL<C> + 2 * t;
        const auto word = [&](int pixel, int channel) -> unsigned& {
            return *reinterpret_cast<unsigned*>(mine + pixel * PIXEL<C> + channel);
        };
        unsigned a[C / 16][4];
#pragma unroll
        for (int k = 0; k < C / 16; ++k) {
            a[k][0] = word(0, 16 * k), a[k][1] = word(8, 16 * k);
            a[k][2] = word(0, 16 * k + 8), a[k][3] = word(8, 16 * k + 8);
        }
        const bool top = whole || at.inside(q + g), bottom = whole || at.inside(q + g + 8);
        __syncwarp();
#pragma unroll
        for (int n = 0; n < C / 8; ++n) {
            const float low = bias[8 * n + 2 * t], high = bias[8 * n + 2 * t + 1];
            float d[4] = {low, high, low, high};
#pragma unroll
            for (int k = 0; k < C / 16; ++k) mma_16(d, a[k], expand.b[n][k]);
            word(0, 8 * n) = top ? pack_halves(relu(d[0]), relu(d[1])) : 0u;
            word(8, 8 * n) = bottom ? pack_halves(relu(d[2]), relu(d[3])) : 0u;
        }
    }
}

// Eight neighbouring outputs of two channels from their first tap, `line` halves between rows of taps;
// STRIDE and D of the branch, or neither.
template <int C, int STRIDE, int D>
__device__ __forceinline__ void eight_outputs(const __half* from, int line, int stride, int d,
                                              const BranchParams<C>& params, int c,
                                              float (&first)[8], float (&second)[8]) {
    constexpr bool KNOWN = D > 0;
    constexpr int TAPS = KNOWN ? (TILE - 1) * STRIDE + 2 * D + 1 : 3 * TILE;
#pragma unroll
    for (int o = 0; o < 8; ++o) first[o] = params.bias[c], second[o] = params.bias[c + 1];
#pragma unroll
    for (int ky = 0; ky < 3; ++ky) {
        float low[3], high[3];
#pragma unroll
        for (int kx = 0; kx < 3; ++kx) {
            low[kx] = params.taps[3 * ky + kx][c], high[kx] = params.taps[3 * ky + kx][c + 1];
        }
#pragma unroll
        for (int i = 0; i < TAPS; ++i) {
            const int column = KNOWN ? i : i / 3 * stride + i % 3 * d;
            const unsigned v = *reinterpret_cast<const unsigned*>(from + column * PIXEL<C>);
#pragma unroll
            for (int kx = 0; kx < 3; ++kx) {
                // The output that has this tap as its kx-th.
                const int o = KNOWN ? (i - kx * D) / (KNOWN ? STRIDE : 1) : i / 3;
                const bool reads = KNOWN ? i >= kx * D && (i - kx * D) % (KNOWN ? STRIDE : 1) == 0 && o < 8
                                         : i % 3 == kx;
                if (reads) {
                    first[o] += low[kx] * low_half(v);
                    second[o] += high[kx] * high_half(v);
                }
            }
        }
        from += line;
    }
#pragma unroll
    for (int o = 0; o < 8; ++o) first[o] = relu(first[o]), second[o] = relu(second[o]);
}

// The depthwise convolution of a tile: `out(c, row, column, v)` for 8 outputs of channel c from
// `column` on. Those outside of the plane are of no use.
template <int C, int STRIDE, int D, typename Out>
__device__ __forceinline__ void depthwise(const Region<C>& at, const BranchParams<C>& params,
                                          const __half* pixels, int tile_w, const Out& out) {
#pragma unroll 1
    for (int i = threadIdx.x; i < C / 2 * tile_w; i += TILE_THREADS) {
        const int c = i % (C / 2) * 2, row = i / (C / 2) % TILE, column = i / (C / 2) / TILE * 8;
        const int q = row * at.stride * at.pitch + column * at.stride + at.lead;
        float first[8], second[8];
        eight_outputs<C, STRIDE, D>(pixels + q * PIXEL<C> + c, at.d * at.pitch * PIXEL<C>, at.stride,
                                    at.d, params, c, first, second);
        out(c, row, column, first);
        out(c + 1, row, column, second);
    }
}

// One branch of a tile of 8 rows of `tile_w` outputs. `previous`: whether to wait for the kernel before.
template <int C, typename Out>
__device__ __forceinline__ void make_branch(const Branches& op, int branch, int tile_w, int oy0,
                                            int ox0, bool previous, void* shared, const Out& out) {
    BranchParams<C>& params = *static_cast<BranchParams<C>*>(shared);
    __half* pixels = reinterpret_cast<__half*>(&params + 1);
    const Region<C> at(op, branch, tile_w, oy0, ox0);
    const bool paired = at.step == 1 && reinterpret_cast<size_t>(op.x) % 4 == 0 &&
                        (op.in_w | op.x_batch | op.x_plane) % 2 == 0;
    Expansion<C> expand;
    load_params<C>(op, branch, expand, params);
    if (previous) wait_for_previous();
    if (paired) {
        stage_region<C, true>(op, at, pixels);
    } else {
        stage_region<C, false>(op, at, pixels);
    }
    __syncthreads();
    expand_region<C>(at, expand, params.expand_bias, pixels);
    __syncthreads();
    if (at.stride == 2 && at.d == 1) {
        depthwise<C, 2, 1>(at, params, pixels, tile_w, out);
    } else if (at.stride == 1 && at.d == 1) {
        depthwise<C, 1, 1>(at, params, pixels, tile_w, out);
    } else if (at.stride == 1 && at.d == 2) {
        depthwise<C, 1, 2>(at, params, pixels, tile_w, out);
    } else if (at.stride == 1 && at.d == 4) {
        depthwise<C, 1, 4>(at, params, pixels, tile_w, out);
    } else {
        depthwise<C, 0, 0>(at, params, pixels, tile_w, out);
    }
}

template <int C>
__device__ __forceinline__ void strided_block(const Branches& op, __half* RESTRICT y, int tile_w,
                                              int y_batch, int y_plane) {
    DYNAMIC_SHARED(float, shared);
    const int tiles_x = (op.w + tile_w - 1) / tile_w, branch = blockIdx.y;
    const int ox0 = blockIdx.x % tiles_x * tile_w, oy0 = blockIdx.x / tiles_x * TILE;
    const bool aligned = op.w % 8 == 0 && wide(y, y_batch, y_plane);
    start_next();
    y += plane_at(blockIdx.z, y_batch, branch * C, y_plane);
    make_branch<C>(op, branch, tile_w, oy0, ox0, true, shared,
                   [&](int c, int row, int column, const float (&v)[8]) {
                       const int oy = oy0 + row, ox = ox0 + column;
                       if (oy >= op.h || ox >= op.w) return;
                       __half* to = y + static_cast<size_t>(c) * y_plane +
                                    static_cast<size_t>(oy) * op.w + ox;
                       write_eight(to, v, aligned, op.w - ox);
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
#pragma unroll 1
    for (int branch = 0; branch < 4; ++branch) {
        // A branch works where the projection's result comes, when all are done.
        make_branch<C>(op, branch, TILE, oy0, ox0, branch == 0, shared + L::Y,
                       [&](int c, int row, int, const float (&v)[8]) {
                           store_eight(shared + (branch * C + c) * L::PITCH + row * TILE, v);
                       });
        __syncthreads();
    }
    const bool inside = oy0 + TILE <= op.h && ox0 + TILE <= op.w && op.w % TILE == 0 &&
                        wide(pair.y, pair.ys.batch, pair.ys.plane) &&
                        wide(pair.z, pair.zs.batch, pair.zs.plane);
    pair_products<C, TILE * TILE, false>(pair, Square{oy0, ox0, op.h, op.w}, inside, inside,
                                         blockIdx.z, shared);
}

}  // namespace

// fine .. x_plane: see Branches. tile_w: 8 or 16.
extern "C" __global__ void __launch_bounds__(256, NARROW_BLOCKS)
    strided_block_f16_c32(const __half* x, const __half* half_params, const float* params,
                          __half* y, int fine, int d0, int d1, int d2, int d3, int fine_w,
                          int coarse_w, int fine_b, int coarse_b, int w0, int w1, int w2, int w3,
                          int b0, int b1, int b2, int b3, int in_h, int in_w, int h, int w,
                          int x_batch, int x_plane, int tile_w, int y_batch,
                          int y_plane) {
    const Branches op = {x, half_params, params, fine, {{d0, d1, d2, d3}}, fine_w, coarse_w,
                         fine_b, coarse_b, {{w0, w1, w2, w3}}, {{b0, b1, b2, b3}}, in_h, in_w, h, w,
                         x_batch, x_plane};
    strided_block<32>(op, y, tile_w, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    strided_block_f16_c64(const __half* x, const __half* half_params, const float* params,
                          __half* y, int fine, int d0, int d1, int d2, int d3, int fine_w,
                          int coarse_w, int fine_b, int coarse_b, int w0, int w1, int w2, int w3,
                          int b0, int b1, int b2, int b3, int in_h, int in_w, int h, int w,
                          int x_batch, int x_plane, int tile_w, int y_batch,
                          int y_plane) {
    const Branches op = {x, half_params, params, fine, {{d0, d1, d2, d3}}, fine_w, coarse_w,
                         fine_b, coarse_b, {{w0, w1, w2, w3}}, {{b0, b1, b2, b3}}, in_h, in_w, h, w,
                         x_batch, x_plane};
    strided_block<64>(op, y, tile_w, y_batch, y_plane);
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
