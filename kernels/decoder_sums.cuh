// What decoder_sums.cu works on, and what its last block does: means of the image, channel attentions,
// maps.
//
// The last block's work runs once, so that fetching an instruction for the first time costs more than
// executing it: small loops in place of unrolled ones.
#pragma once

#include "decoder.cuh"

namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;

// A 1x1 convolution.
struct Affine {
    const float *w, *b;
};

// A module's map (ops/meu_scores.rs): A, Wl, bl and b; the spatial attention's weights.
struct Module {
    const float *mix, *low, *low_bias, *bias;
    Affine gate;
    int in, width;
};

template <typename T>
struct Decoder {
    const T *s3, *x2, *t_weights;
    const float* t_bias;
    T* t;
    float* partial;
    unsigned* counters;
    Affine ca2, low, high, ca1;
    Module two, one;
    T *map2, *map1;
    int act_s2, act_c2, act_c1, c3, classes, low_h, low_w, high_h, high_w;
    int s_batch, s_plane, x_batch, x_plane;

    __device__ __forceinline__ int means() const { return 2 * c3 + two.in + 1; }
    // Of partial sums, in whole quads.
    __device__ __forceinline__ int pitch() const { return (means() + 3) / 4 * 4; }
};

// The warp's sums of N values (a power of two): lane l gets that of v[l / (32 / N)]. Half of the lanes
// go on with half of the values each time.
template <int N, int OFFSET = 16>
__device__ __forceinline__ float warp_sums(float (&v)[N]) {
    if constexpr (N == 1) {
        float sum = v[0];
#pragma unroll
        for (int offset = OFFSET; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
        return sum;
    } else {
        const bool upper = (threadIdx.x & OFFSET) != 0;
        float half[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float kept = upper ? v[i + N / 2] : v[i], sent = upper ? v[i] : v[i + N / 2];
            half[i] = kept + __shfl_xor_sync(0xffffffffu, sent, OFFSET);
        }
        return warp_sums<N / 2, OFFSET / 2>(half);
    }
}

// Has the first TIMES * 4096 floats brought into the first level of caches, a word of every 32 bytes, and
// does not wait for them. `spare`: a word of shared memory per thread.
template <int TIMES>
__device__ __forceinline__ void touch(const float* from, int count, float* spare) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#pragma unroll
    for (int j = 0; j < TIMES; ++j) {
        const int i = (j * THREADS + threadIdx.x) * 8;
        if (i < count) copy_ahead<4>(spare + threadIdx.x, from + i);
    }
#endif
}

// Keeps the compiler from making a loop of its own for each value of v.
__device__ __forceinline__ void opaque(int& v) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(v));
#endif
}

// Means of the image from the blocks' sums: a warp adds up every WARPS'th block, `parts` has a row of
// `pitch` for each. `inverses`: of pixels of s3 and of x2.
template <typename T>
__device__ __forceinline__ void add_up(const Decoder<T>& op, const float* inverses, float* parts,
                                       float* means) {
    constexpr int AT_ONCE = 8;
    const int pitch = op.pitch(), blocks = gridDim.x, step = WARPS * pitch;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* partial = op.partial + static_cast<size_t>(blockIdx.z) * blocks * pitch;
#pragma unroll 1
    for (int at = warp * pitch + 4 * lane; at < (warp + 1) * pitch; at += 4 * 32) {
        const float* from = partial + at;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
        int b = warp;
#pragma unroll 1
        for (; b + (AT_ONCE - 1) * WARPS < blocks; b += AT_ONCE * WARPS) {
            float4 v[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                v[j] = __ldcg(reinterpret_cast<const float4*>(from));
                from += step;
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                sum.x += v[j].x, sum.y += v[j].y, sum.z += v[j].z, sum.w += v[j].w;
            }
        }
#pragma unroll 1
        for (; b < blocks; b += WARPS) {
            const float4 v = __ldcg(reinterpret_cast<const float4*>(from));
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            from += step;
        }
        store_four(parts + at, sum);
    }
    copies_done();
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < op.means(); i += THREADS) {
        float sum = 0.0f;
#pragma unroll 4
        for (int w = 0; w < WARPS; ++w) sum += parts[w * pitch + i];
        means[i] = sum * inverses[i < op.c3 ? 0 : 1];
    }
    __syncthreads();
}

// Channel attentions of both modules, decoder2's by the means of its inputs, decoder1's by that of its
// high-level features: `high`, the mean of the high part, plus the low part's under the attention. The
// biases are there already. A warp has four rows of a matrix at a time.
template <typename T>
__device__ __forceinline__ void attentions(const Decoder<T>& op, const float* means, float* ca2,
                                           float* ca1, float* low, float* high) {
    constexpr int R = 4;
    const int lane = threadIdx.x % 32, row = lane / (32 / R), width2 = op.two.width;
#pragma unroll 1
    for (int kind = 0; kind < 4; ++kind) {
        const float* w = op.ca2.w;
        const float* x = means;
        float* y = ca2;
        int in = op.c3, out = width2, act = op.act_c2;
        if (kind == 1) w = op.low.w, x = means + op.c3, y = low, in = op.two.in, act = 0;
        // The high part has a channel more: the attention itself.
        if (kind == 2) w = op.high.w, x = means + op.c3 + op.two.in, y = high, ++in, act = 0;
        if (kind == 3) {
            w = op.ca1.w, x = high, y = ca1, in = width2, out = op.one.width, act = op.act_c1;
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < width2; i += THREADS) high[i] += low[i] * ca2[i];
            __syncthreads();
        }
#pragma unroll 1
        for (int r0 = threadIdx.x / 32 * R; r0 < out; r0 += WARPS * R) {
            float v[R] = {};
            int at[R];
#pragma unroll
            for (int r = 0; r < R; ++r) at[r] = min(r0 + r, out - 1) * in;
#pragma unroll 1
            for (int k = lane; k < in; k += 32) {
                const float xk = x[k];
#pragma unroll
                for (int r = 0; r < R; ++r) v[r] += w[at[r] + k] * xk;
            }
            const float sum = warp_sums(v);
            opaque(act);
            if (lane % (32 / R) == 0 && r0 + row < out) {
                y[r0 + row] = activate(sum + y[r0 + row], act);
            }
        }
    }
    __syncthreads();
}

// A diag(ca) of both modules, as [width][MAP_ROWS]. `ca`: of both.
template <typename T>
__device__ __forceinline__ void gate_mix(const Decoder<T>& op, const float* ca, float* gated) {
    const int width2 = op.two.width, widths = width2 + op.one.width;
#pragma unroll 1
    for (int r = threadIdx.x / 32; r < MAP_ROWS; r += WARPS) {
#pragma unroll 1
        for (int o = threadIdx.x % 32; o < widths; o += 32) {
            const float* mix = o < width2 ? op.two.mix + r * width2 + o
                                          : op.one.mix + r * op.one.width + (o - width2);
            gated[o * MAP_ROWS + r] = r < op.classes ? *mix * ca[o] : 0.0f;
        }
    }
    __syncthreads();
}

// The maps of both modules, four rows of a column per thread.
template <typename T>
__device__ __forceinline__ void compose(const Decoder<T>& op, const float* gated, T* map2, T* map1) {
    using Layout = MapLayout<T>;
    const int of_two = MAP_QUADS * (op.two.in + 1), all = of_two + MAP_QUADS * (op.one.in + 1);
#pragma unroll 1
    for (int i = threadIdx.x; i < all; i += THREADS) {
        const bool second = i >= of_two;
        const Module m = second ? op.one : op.two;
        T* map = second ? map1 : map2;
        int k = second ? i - of_two : i, r0 = 0;
        while (k > m.in) k -= m.in + 1, r0 += 4;
        const bool shift = k == m.in;
        // What comes to the products; loaded before them.
        float sum[4] = {}, more[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int r = r0 + j;
            more[j] = 0.0f;
            if (shift && r < op.classes) more[j] = m.bias[r];
            if (r == GATE) more[j] = shift ? m.gate.b[0] : m.gate.w[k];
        }
        const float* column = shift ? m.low_bias : m.low + k;
        const int step = shift ? 1 : m.in;
        const float* weights = gated + (second ? MAP_ROWS * op.two.width : 0) + r0;
#pragma unroll 4
        for (int o = 0; o < m.width; ++o) {
            const float v = *column;
            const float4 g = load_four(weights);
            sum[0] += g.x * v;
            sum[1] += g.y * v;
            sum[2] += g.z * v;
            sum[3] += g.w * v;
            column += step, weights += MAP_ROWS;
        }
        float* shifts = const_cast<float*>(Layout::shifts(map, m.in)) + r0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            sum[j] += more[j];
            if (shift) {
                shifts[j] = sum[j];
            } else {
                store(map + Layout::at(r0 + j, k, m.in), sum[j]);
            }
        }
    }
}

// What the last block does. `room`: shared memory that the tiles are done with, as is `spare`.
template <typename T>
__device__ __forceinline__ void finish(const Decoder<T>& op, const float* inverses, float* room,
                                       float* spare, float* sums, float* gates, T* map2, T* map1) {
    const int width2 = op.two.width, width1 = op.one.width;
    touch<2>(op.ca2.w, width2 * op.c3, spare);
    touch<1>(op.low.w, width2 * op.two.in, spare);
    touch<3>(op.high.w, width2 * (op.c3 + 1), spare);
    touch<1>(op.ca1.w, width1 * width2, spare);
    touch<1>(op.two.low, width2 * op.two.in, spare);
    touch<1>(op.two.mix, op.classes * width2, spare);
    touch<1>(op.one.mix, op.classes * width1, spare);
    touch<1>(op.one.low, width1 * op.one.in, spare);
    float *ca2 = gates, *ca1 = ca2 + width2;
    float *low = ca1 + width1, *high = low + width2;
#pragma unroll 1
    for (int i = threadIdx.x; i < width2; i += THREADS) {
        copy_ahead<4>(ca2 + i, op.ca2.b + i);
        copy_ahead<4>(low + i, op.low.b + i);
        copy_ahead<4>(high + i, op.high.b + i);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < width1; i += THREADS) copy_ahead<4>(ca1 + i, op.ca1.b + i);
    add_up(op, inverses, room, sums);
    attentions(op, sums, ca2, ca1, low, high);
    gate_mix(op, gates, room);
    compose(op, room, map2, map1);
}

}  // namespace
