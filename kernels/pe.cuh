// Device code of kernels that make a projection and the next expansion (pe.cu says how). Blocks have
// one dimension, of THREADS threads.
#pragma once

#include "bytes.cuh"

namespace {

struct Planes {
    int batch, plane;
};

// y = act1(w1 x + b1 + residual), z = act2(w2 y + b2), in the order of the kernels' parameters.
// Biases and the residual may be null, and w2 with z: then there is no second product. z may be x, tensor
// for tensor; nothing else may overlap. X and Z are what x and z are stored in.
template <typename T, typename X = T, typename Z = T>
struct ProjectExpand {
    const X* x;
    const T* w1;
    const float* b1;
    const T* residual;
    T* y;
    const T* w2;
    const float* b2;
    Z* z;
    int act1, act2, pixels;
    Planes xs, rs, ys, zs;
    const float* x_scales = nullptr;    // of x in bytes: a scale per channel
    const float* z_inverses = nullptr;  // of z in bytes: one over them
};

// Whether all P pixels from `first` on are there, and can be moved 16 bytes at a time. Of bytes there
// may be more pixels than the planes have.
template <int P>
__device__ __forceinline__ bool whole_tile(const __half* base, Planes at, int first, int pixels) {
    return first + P <= pixels && wide(base, at.batch, at.plane);
}

template <int P>
__device__ __forceinline__ bool whole_tile(const Byte* base, Planes at, int first, int pixels) {
    return first + P <= at.plane && wide(base, at.batch, at.plane);
}

// x of a tile into shared memory, as halves.
template <int P, int PITCH, int AT_ONCE, int THREADS, typename Op>
__device__ __forceinline__ void stage_x(const Op& op, const __half* x, int rows, int first,
                                        bool all, __half* to) {
    stage_pixels<P, PITCH, AT_ONCE, THREADS>(x, op.xs.plane, rows, rows, first, op.pixels, all, to);
}

template <int P, int PITCH, int AT_ONCE, int THREADS, typename Op>
__device__ __forceinline__ void stage_x(const Op& op, const Byte* x, int rows, int first, bool all,
                                        __half* to) {
    stage_bytes<P, PITCH, (AT_ONCE + 1) / 2, THREADS>(x, op.x_scales, op.xs.plane, rows, first, op.pixels,
                                               all, to);
}

// Eight pixels of channel `c` of z.
template <typename Op>
__device__ __forceinline__ void write_z(const Op&, int, __half* to, const float (&v)[8], bool all,
                                        int count) {
    write_eight(to, v, all, count);
}

template <typename Op>
__device__ __forceinline__ void write_z(const Op& op, int c, Byte* to, const float (&v)[8],
                                        bool all, int count) {
    write_eight(to, v, op.z_inverses[c], all, count);
}

// Threads of a block by itself: twice as many where every one of them still has an eight of y, and the
// warps' own sums room.
template <int C, int P>
constexpr int PAIR_THREADS = C == 64 && P == 64 ? 2 * TILE_THREADS : TILE_THREADS;

// Where the halves of a tile are in shared memory: x, over it the sums, then y, then the weights
// where they are staged.
template <int C, int P, bool STAGED>
struct PairLayout {
    static constexpr int E = 4 * C, PITCH = P + HALF_PAD, SUM_PITCH = P + FLOAT_PAD;
    static constexpr int PITCH1 = STAGED ? E + HALF_PAD : E, PITCH2 = STAGED ? C + HALF_PAD : C;
    static constexpr int Y = E * PITCH, W1 = Y + C * PITCH, W2 = W1 + C * PITCH1;
};

// The weights of both products into shared memory; nothing of this waits for another kernel. The
// tiles need a barrier behind it, which they have.
// MOST: vectors of a thread under way at a time.
template <int C, int P, int THREADS = TILE_THREADS, int MOST = 8>
__device__ __forceinline__ void stage_pair_weights(const __half* w1, const __half* w2,
                                                   __half* shared) {
    using L = PairLayout<C, P, true>;
    stage_matrix<C, L::E, L::PITCH1, THREADS, MOST>(w1, shared + L::W1);
    if (w2 == nullptr) return;
    stage_matrix<L::E, C, L::PITCH2, THREADS, MOST>(w2, shared + L::W2);
}

// Where the pixels of a tile are in a plane, eight at a time, and how many of them are inside.
struct Line {
    int first, pixels;

    __device__ __forceinline__ size_t at(int p) const { return first + p; }
    __device__ __forceinline__ int count(int p) const { return pixels - first - p; }
};

// Both products of a tile whose x is in shared memory, once all threads are here. `inside`: every
// eight pixels are there, and can be moved at once in the residual and y; `z_inside`: in z.
template <int C, int P, bool STAGED, int THREADS = TILE_THREADS, typename X, typename Z,
          typename Places>
__device__ __forceinline__ void pair_products(const ProjectExpand<__half, X, Z>& op,
                                              const Places& places, bool inside, bool z_inside,
                                              int image, __half* shared) {
    using L = PairLayout<C, P, STAGED>;
    constexpr int E = L::E, PITCH = L::PITCH, SUM_PITCH = L::SUM_PITCH;
    constexpr int PITCH1 = L::PITCH1, PITCH2 = L::PITCH2, WARPS = THREADS / 32;
    constexpr int ROWS = C / 16, ACROSS = WARPS / ROWS, TILES = P / 16 / ACROSS;
    constexpr int WARP_PITCH = 32 + FLOAT_PAD;
    static_assert(TILES > 0, "a warp has at least one tile of 16 x 16");
    static_assert(C * SUM_PITCH * 4 <= E * PITCH * 2, "the sums lie over x");
    static_assert(WARPS * 16 * WARP_PITCH * 4 <= E * PITCH * 2, "and so do the warps' own");
    __half* xs = shared;
    __half* ys = shared + L::Y;
    float* sums = reinterpret_cast<float*>(xs);
    const __half* w1 = STAGED ? shared + L::W1 : op.w1;
    const __half* w2 = STAGED ? shared + L::W2 : op.w2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __half* y = op.y + plane_at(image, op.ys.batch, 0, 0);
    Z* z = op.z != nullptr ? op.z + plane_at(image, op.zs.batch, 0, 0) : nullptr;
    const __half* residual =
        op.residual != nullptr ? op.residual + plane_at(image, op.rs.batch, 0, 0) : nullptr;

    // What is added to the sums, on its way while the products are made.
    constexpr int GROUPS = C * P / 8 / THREADS, ROUNDS = (E / 16 + WARPS - 1) / WARPS;
    static_assert(C * P / 8 % THREADS == 0, "every thread has as many eights of y");
    uint4 before[GROUPS] = {};
    float shift1[GROUPS], shift2[ROUNDS][2];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int i = threadIdx.x + g * THREADS, c = i / (P / 8), p = i % (P / 8) * 8;
        shift1[g] = op.b1 != nullptr ? op.b1[c] : 0.0f;
        if (residual != nullptr && inside) {
            before[g] = *reinterpret_cast<const uint4*>(
                residual + static_cast<size_t>(c) * op.rs.plane + places.at(p));
        }
    }
#pragma unroll
    for (int g = 0; g < ROUNDS; ++g) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int c = (g * WARPS + warp) * 16 + i * 8 + lane / 4;
            shift2[g][i] = op.b2 != nullptr && c < E ? op.b2[c] : 0.0f;
        }
    }

    {
        const int row = warp % ROWS * 16, column = warp / ROWS * TILES * 16;
        Sums acc[TILES];
        clear_sums(acc);
        multiply_f16<4>(w1 + row * PITCH1, PITCH1, xs + column, PITCH, E, acc);
        __syncthreads();
        store_sums(acc, sums + row * SUM_PITCH + column, SUM_PITCH);
        __syncthreads();
    }
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int i = threadIdx.x + g * THREADS;
        const int c = i / (P / 8), p = i % (P / 8) * 8, count = places.count(p);
        const size_t at = places.at(p);
        float v[8];
        load_eight(sums + c * SUM_PITCH + p, v);
        if (residual != nullptr) {
            float r[8];
            if (inside) {
                widen_eight(before[g], r);
            } else {
                load_inside(residual + static_cast<size_t>(c) * op.rs.plane + at, r, count);
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] += r[j];
        }
        finish_eight<__half>(v, shift1[g], nullptr, op.act1, inside, count);
        write_eight(y + static_cast<size_t>(c) * op.ys.plane + at, v, inside, count);
        store_eight(ys + c * PITCH + p, v);
    }
    __syncthreads();
    if (z == nullptr) return;

    float* own = sums + warp * 16 * WARP_PITCH;
#pragma unroll
    for (int g = 0; g < ROUNDS; ++g) {
        const int row = (g * WARPS + warp) * 16;
        if (row >= E) break;
        FragmentA a[C / 16];
#pragma unroll
        for (int k = 0; k < C / 16; ++k) {
            wmma::load_matrix_sync(a[k], w2 + row * PITCH2 + 16 * k, PITCH2);
        }
        for (int column = 0; column < P; column += 32) {
            Sums acc[2];
            clear_sums(acc);
#pragma unroll
            for (int k = 0; k < C / 16; ++k) {
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    FragmentB b;
                    wmma::load_matrix_sync(b, ys + 16 * k * PITCH + column + 16 * t, PITCH);
                    wmma::mma_sync(acc[t], a[k], b, acc[t]);
                }
            }
            store_sums(acc, own, WARP_PITCH);
            __syncwarp();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = half * 32 + lane;
                const int c = row + i / 4, p = column + i % 4 * 8, count = places.count(p);
                const size_t at = places.at(p);
                float v[8];
                load_eight(own + i / 4 * WARP_PITCH + i % 4 * 8, v);
                finish_eight<__half>(v, shift2[g][half], nullptr, op.act2, inside, count);
                write_z(op, c, z + static_cast<size_t>(c) * op.zs.plane + at, v, z_inside, count);
            }
            __syncwarp();
        }
    }
}

// Pixels `tile * P` and following of an image. Between two tiles of a block is a barrier.
template <int C, int P, bool STAGED, int THREADS = TILE_THREADS, int MOST = 8, typename X,
          typename Z>
__device__ __forceinline__ void pair_tile(const ProjectExpand<__half, X, Z>& op, int tile,
                                          int image, __half* shared) {
    using L = PairLayout<C, P, STAGED>;
    const int first = tile * P, pixels = op.pixels;
    // Halves go together, bytes each by itself.
    constexpr bool X_BYTES = sizeof(X) == 1, Z_BYTES = sizeof(Z) == 1;
    const bool x_whole = whole_tile<P>(op.x, op.xs, first, pixels);
    const bool z_whole = whole_tile<P>(op.z, op.zs, first, pixels);
    const bool inside = whole_tile<P>(op.residual, op.rs, first, pixels) &&
                        whole_tile<P>(op.y, op.ys, first, pixels) && (X_BYTES || x_whole) &&
                        (Z_BYTES || z_whole);
    const X* x = op.x + plane_at(image, op.xs.batch, 0, 0);
    constexpr int EACH = L::E * P / 8 / THREADS;
    stage_x<P, L::PITCH, (EACH < MOST ? EACH : MOST), THREADS>(op, x, L::E, first, X_BYTES ? x_whole : inside, shared);
    __syncthreads();
    pair_products<C, P, STAGED, THREADS>(op, Line{first, pixels}, inside,
                                         Z_BYTES ? z_whole : inside, image, shared);
}

// Pixels `tile * 64` and following of an image. Between two tiles of a block is a barrier.
template <int C, int THREADS = TILE_THREADS>
__device__ __forceinline__ void pair_tile(const ProjectExpand<float>& op, int tile, int image,
                                          float* shared) {
    constexpr int E = 4 * C, GROUP = THREADS / 16, R = C / GROUP, W_PITCH = 4 * GROUP + FLOAT_PAD;
    static_assert(R > 0, "a thread has at least one row");
    float* ys = shared;
    float* xs = ys + C * PITCH_F32;
    float* ws = xs + DEPTH * PITCH_F32;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, first = tile * PIXELS;
    const int count = op.pixels - first;
    const float* x = op.x + plane_at(image, op.xs.batch, 0, 0) + first;
    float* y = op.y + plane_at(image, op.ys.batch, 0, 0) + first;
    const float* residual =
        op.residual != nullptr ? op.residual + plane_at(image, op.rs.batch, 0, 0) + first : nullptr;

    float acc[R][4] = {};
    {
        const int staged = threadIdx.x % PIXELS;
        PixelColumns<THREADS> pixels;
        WeightColumns<R, W_PITCH, THREADS> weights;
        const auto fetch = [&](int k0) {
            const float* planes = x + static_cast<size_t>(k0 + threadIdx.x / PIXELS) * op.xs.plane;
            pixels.load(planes + staged, op.xs.plane, staged < count, DEPTH);
            weights.load(op.w1 + k0, E, C, DEPTH);
        };
        fetch(0);
        for (int k0 = 0; k0 < E; k0 += DEPTH) {
            pixels.store(xs);
            weights.store(ws);
            __syncthreads();
            if (k0 + DEPTH < E) fetch(k0 + DEPTH);
            multiply_f32<R, W_PITCH>(ws, xs, acc);
            __syncthreads();
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const int c = R * ty + r;
        const float shift = op.b1 != nullptr ? op.b1[c] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int p = 4 * tx + i;
            float v = acc[r][i] + shift;
            if (p < count) {
                if (residual != nullptr) v += residual[static_cast<size_t>(c) * op.rs.plane + p];
                v = activate(v, op.act1);
                y[static_cast<size_t>(c) * op.ys.plane + p] = v;
            }
            ys[c * PITCH_F32 + p] = v;
        }
    }
    if (op.z == nullptr) return;
    float* z = op.z + plane_at(image, op.zs.batch, 0, 0) + first;
    for (int row = 0; row < E; row += 4 * GROUP) {
        float sums[4][4] = {};
        WeightColumns<4, W_PITCH, THREADS> weights;
        weights.load(op.w2 + row * C, C, 4 * GROUP, DEPTH);
        for (int k0 = 0; k0 < C; k0 += DEPTH) {
            weights.store(ws);
            __syncthreads();
            if (k0 + DEPTH < C) weights.load(op.w2 + row * C + k0 + DEPTH, C, 4 * GROUP, DEPTH);
            multiply_f32<4, W_PITCH>(ws, ys + k0 * PITCH_F32, sums);
            __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int c = row + 4 * ty + r;
            const float shift = op.b2 != nullptr ? op.b2[c] : 0.0f;
            float* out = z + static_cast<size_t>(c) * op.zs.plane + 4 * tx;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (4 * tx + i < count) out[i] = activate(sums[r][i] + shift, op.act2);
            }
        }
    }
}

}  // namespace
