// A strided block on the even grid (graph/passes/even_grid.rs), f16:
//   e_b = relu(We_b x + be_b),  y_b = relu(D_b(e_b) + bd_b)     per branch b, C channels each
// with D_b a depthwise 3x3 convolution, of stride 2 on all pixels of x (fine branches) or of stride 1
// on its even rows and columns (coarse ones). The expanded tensor, 5 C values per four pixels of x, is
// never in memory.
//
// strided_block makes y; a block of 256 threads has 8 rows of 16 outputs of one branch (of 8, where
// shared memory is short). The pixels of x that they need come into shared memory with a pixel's C
// channels together, two pixels of 8 channels per thread and load, any value where the plane ends. A warp expands 16 pixels at once
// by tensor cores (mma.cuh, weights in registers, biases where the sums start) and puts e where their
// x was, zeros outside of the plane. Then a thread makes 8 neighbouring outputs of two channels, from
// taps that it reads once for all three columns they are in.
// Rows of the region are as long as it takes for the lanes' banks to differ, and begin at even columns,
// for pairs of x to be loads of 4 bytes, or of 8 with every other pixel between them.
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
// Blocks of 32 and of 64 channels on a multiprocessor. Volta, without mma.cuh's products, needs more
// registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
constexpr int NARROW_BLOCKS = 2, WIDE_BLOCKS = 1;
#else
constexpr int NARROW_BLOCKS = 4, WIDE_BLOCKS = 2;
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

// Dividing whole numbers below 4096, by the reciprocal of the divisor: a half more than the dividend is
// far enough from where the quotient would change.
struct Divisor {
    int by;
    float inverse;

    __device__ __forceinline__ explicit Divisor(int by)
        : by(by), inverse(__fdividef(1.0f, static_cast<float>(by))) {}
    __device__ __forceinline__ int operator()(int i) const {
        return static_cast<int>((static_cast<float>(i) + 0.5f) * inverse);
    }
};

// The pixels that a branch's taps reach from a tile of outputs, on the grid that it works on: every
// `step`-th row and column of x, outputs `stride` apart. `lead` columns before the first tap, with which
// the first column is even.
template <int C>
struct Region {
    int step, stride, d, lead, rows, pitch, y0, x0, h, w;

    __device__ __forceinline__ Region(const Branches& op, int branch, int tile_w, int oy0, int ox0) {
        const bool fine = branch < op.fine;
        step = fine ? 1 : 2, stride = fine ? 2 : 1, d = op.dilations.at(branch);
        lead = d & 1;
        rows = (TILE - 1) * stride + 2 * d + 1;
        // launch::strided_pixels() has the same.
        const int span = lead + (tile_w - 1) * stride + 2 * d + 1;
        pitch = span + (fine ? (2 - span) & 3 : C == 32 ? (4 - span) & 7 : span & 1);
        y0 = oy0 * stride - d, x0 = ox0 * stride - d - lead;
        const int shift = step - 1;
        h = (op.in_h + shift) >> shift, w = (op.in_w + shift) >> shift;
    }
    __device__ __forceinline__ int count() const { return rows * pitch; }
    __device__ __forceinline__ bool inside(int q, const Divisor& across) const {
        const int row = across(q), y = y0 + row, x = x0 + q - row * pitch;
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

// A branch's parameters, none of which waits for another kernel: into registers, all loads under way,
// and from there, after x, into shared memory.
template <int C>
struct Parameters {
    static constexpr int TAPS = (9 * C + TILE_THREADS - 1) / TILE_THREADS;
    float taps[TAPS], bias;

    __device__ __forceinline__ Parameters(const Branches& op, int branch, Expansion<C>& expand) {
        const bool fine = branch < op.fine;
        const int row0 = (fine ? branch : branch - op.fine) * C;
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const __half* w = op.half_params + (fine ? op.fine_w : op.coarse_w) + (row0 + g) * C + 2 * t;
        const float* from = op.params + op.weights.at(branch) + threadIdx.x;
#pragma unroll
        for (int k = 0; k < TAPS; ++k) {
            taps[k] = threadIdx.x + k * TILE_THREADS < 9 * C ? from[k * TILE_THREADS] : 0.0f;
        }
        // The first C threads have the expansion's biases, the next C the branch's.
        const int first = threadIdx.x < C ? (fine ? op.fine_b : op.coarse_b) + row0
                                          : op.biases.at(branch) - C;
        bias = threadIdx.x < 2 * C ? op.params[first + static_cast<int>(threadIdx.x)] : 0.0f;
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
    }
    __device__ __forceinline__ void store(BranchParams<C>& params) const {
#pragma unroll
        for (int k = 0; k < TAPS; ++k) {
            const int i = threadIdx.x + k * TILE_THREADS;
            if (i < 9 * C) params.taps[i % 9][i / 9] = taps[k];
        }
        if (threadIdx.x < 2 * C) {
            (threadIdx.x < C ? params.expand_bias : params.bias)[threadIdx.x % C] = bias;
        }
    }
};

// Two neighbouring pixels of 8 channels as they are loaded; of pixels outside of the plane, any value
// inside. STEP: in one load, of the pixel between them too where that is 2; 0: one by one.
template <int STEP>
struct Two {
    uint2 v[8];

    template <int C>
    __device__ __forceinline__ void load(const Branches& op, const Region<C>& at, const __half* x,
                                         int row, int column) {
        const int line = min(max(at.y0 + row, 0), at.h - 1) * at.step * op.in_w;
        const int left = at.x0 + column;
        int from = line + min(max(left, 0), at.w - (STEP == 0 ? 1 : 2)) * at.step;
        int second = line + min(max(left + 1, 0), at.w - 1) * at.step;
#pragma unroll
        for (int c = 0; c < 8; ++c, from += op.x_plane, second += op.x_plane) {
            if (STEP == 1) {
                v[c].x = *reinterpret_cast<const unsigned*>(x + from);
            } else if (STEP == 2) {
                v[c] = *reinterpret_cast<const uint2*>(x + from);
            } else {
                v[c] = uint2{__half_as_ushort(x[from]), __half_as_ushort(x[second])};
            }
        }
    }
    // A register per channel.
    __device__ __forceinline__ void pairs(unsigned (&pair)[8]) const {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            pair[c] = STEP == 1 ? v[c].x : __byte_perm(v[c].x, v[c].y, 0x5410);
        }
    }
};

__device__ __forceinline__ void store_two(__half* to, int pixel, const unsigned (&v)[8]) {
    *reinterpret_cast<uint4*>(to) =
        uint4{__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410),
              __byte_perm(v[4], v[5], 0x5410), __byte_perm(v[6], v[7], 0x5410)};
    *reinterpret_cast<uint4*>(to + pixel) =
        uint4{__byte_perm(v[0], v[1], 0x7632), __byte_perm(v[2], v[3], 0x7632),
              __byte_perm(v[4], v[5], 0x7632), __byte_perm(v[6], v[7], 0x7632)};
}

// All channels of the region's pixels into shared memory.
template <int C, int STEP>
__device__ __forceinline__ void stage_region(const Branches& op, const Region<C>& at,
                                             __half* pixels) {
    constexpr int ACROSS = TILE_THREADS / (C / 8), AT_ONCE = (STEP == 1) + (C == 64 ? 2 : 1);
    const int c0 = threadIdx.x / ACROSS * 8, first = threadIdx.x % ACROSS;
    const Divisor across(at.pitch / 2);
    const __half* x = op.x + plane_at(blockIdx.z, op.x_batch, c0, op.x_plane);
    const int rows = across(ACROSS), columns = ACROSS - rows * across.by;
    int row = across(first), column = first - row * across.by;
#pragma unroll 1
    while (row < at.rows) {
        Two<STEP> two[AT_ONCE];
        int to[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            to[i] = row < at.rows ? (row * at.pitch + 2 * column) * PIXEL<C> : -1;
            two[i].load(op, at, x, row, 2 * column);
            row += rows, column += columns;
            if (column >= across.by) column -= across.by, ++row;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            unsigned pairs[8];
            two[i].pairs(pairs);
            if (to[i] >= 0) store_two(pixels + to[i] + c0, PIXEL<C>, pairs);
        }
    }
}

// e in the place of x.
template <int C>
__device__ __forceinline__ void expand_region(const Region<C>& at, const Expansion<C>& expand,
                                              const float* bias, __half* pixels) {
    // Columns of 8 channels whose sums a warp has at once.
    constexpr int COLUMNS = 4;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int count = at.count();
    const bool whole = at.whole();
    const Divisor across(at.pitch);
#pragma unroll 1
    for (int q = threadIdx.x / 32 * 16; q < count; q += TILE_WARPS * 16) {
        __half* tile = pixels + q * PIXEL<C>;
        unsigned a[C / 16][4];
#pragma unroll
        for (int k = 0; k < C / 16; ++k) load_operand(tile + 16 * k, PIXEL<C>, a[k]);
        const bool top = whole || at.inside(q + g, across);
        const bool bottom = whole || at.inside(q + g + 8, across);
        __syncwarp();
        __half* mine = tile + g * PIXEL<C> + 2 * t;
#pragma unroll
        for (int n0 = 0; n0 < C / 8; n0 += COLUMNS) {
            float d[COLUMNS][4];
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) {
                const float2 start = *reinterpret_cast<const float2*>(bias + 8 * (n0 + n) + 2 * t);
                d[n][0] = d[n][2] = start.x, d[n][1] = d[n][3] = start.y;
            }
#pragma unroll
            for (int k = 0; k < C / 16; ++k) {
#pragma unroll
                for (int n = 0; n < COLUMNS; ++n) mma_16(d[n], a[k], expand.b[n0 + n][k]);
            }
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) {
                __half* to = mine + 8 * (n0 + n);
                *reinterpret_cast<unsigned*>(to) =
                    top ? pack_halves(relu(d[n][0]), relu(d[n][1])) : 0u;
                *reinterpret_cast<unsigned*>(to + 8 * PIXEL<C>) =
                    bottom ? pack_halves(relu(d[n][2]), relu(d[n][3])) : 0u;
            }
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
    const int off =
        static_cast<int>(reinterpret_cast<size_t>(op.x) / 2 | op.in_w | op.x_batch | op.x_plane) % 4;
    Expansion<C> expand;
    const Parameters<C> own(op, branch, expand);
    if (previous) wait_for_previous();
    if (at.step == 1 && off % 2 == 0) {
        stage_region<C, 1>(op, at, pixels);
    } else if (at.step == 2 && off == 0) {
        stage_region<C, 2>(op, at, pixels);
    } else {
        stage_region<C, 0>(op, at, pixels);
    }
    own.store(params);
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
    // A tile has 8 or 16 columns.
    const unsigned shift = tile_w == TILE ? 3 : 4;
    const unsigned tiles_x = (op.w + tile_w - 1) >> shift, tile_y = blockIdx.x / tiles_x;
    const int branch = blockIdx.y, oy0 = tile_y * TILE;
    const int ox0 = (blockIdx.x - tile_y * tiles_x) << shift;
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

extern "C" __global__ void __launch_bounds__(256, WIDE_BLOCKS)
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
