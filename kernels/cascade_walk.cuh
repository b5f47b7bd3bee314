// Device code of kernels that run the cascade of an FPE block over planes in the tensors' storage
// (cascade_walk.cu says how). Blocks have one dimension, of whole warps.
#pragma once

#include "bytes.cuh"
#include "cascade.cuh"

namespace {

// Two neighbouring columns.
struct Pair {
    float a, b;
};

__device__ __forceinline__ Pair load_pair(const float* at) { return {at[0], at[1]}; }
__device__ __forceinline__ void store_pair(float* at, Pair v) { at[0] = v.a, at[1] = v.b; }

// The address of a pair of halves is a multiple of 4.
__device__ __forceinline__ Pair load_pair(const __half* at) {
    const unsigned bits = *reinterpret_cast<const unsigned*>(at);
    return {__half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffffu))),
            __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)))};
}

__device__ __forceinline__ void store_pair(__half* at, Pair v) {
    *reinterpret_cast<unsigned*>(at) =
        __half_as_ushort(__float2half(v.a)) |
        static_cast<unsigned>(__half_as_ushort(__float2half(v.b))) << 16;
}

// Values of a plane in memory, by the scale of a plane of bytes.
template <typename T>
__device__ __forceinline__ Pair read_pair(const T* at, float) {
    return load_pair(at);
}

template <typename T>
__device__ __forceinline__ float read_one(const T* at, float) {
    return load(at);
}

__device__ __forceinline__ Pair read_pair(const Byte* at, float scale) {
    const unsigned bits = *reinterpret_cast<const unsigned short*>(at);
    return {byte_of(bits, 0) * scale, byte_of(bits, 1) * scale};
}

__device__ __forceinline__ float read_one(const Byte* at, float scale) {
    return static_cast<float>(*at) * scale;
}

// Values into a plane in memory, by one over its scale.
template <typename T>
__device__ __forceinline__ void write_pair(T* at, Pair v, float) {
    store_pair(at, v);
}

template <typename T>
__device__ __forceinline__ void write_one(T* at, float v, float) {
    store(at, v);
}

__device__ __forceinline__ void write_pair(Byte* at, Pair v, float inverse) {
    *reinterpret_cast<unsigned short*>(at) = static_cast<unsigned short>(
        __byte_perm(to_byte(v.a, inverse), to_byte(v.b, inverse), 0x0040));
}

__device__ __forceinline__ void write_one(Byte* at, float v, float inverse) {
    *at = static_cast<Byte>(to_byte(v, inverse) & 0xffu);
}

// What of a plane is in shared memory: rows y0 .. y1, columns x0 .. x0 + pitch, both even. A column
// beyond the plane's width holds zeros.
struct Region {
    int y0, y1, x0, pitch;
};

// The taps of columns x and x + 1 in one row: left, middle, right of each.
struct Row {
    Pair left, middle, right;
};

// A row of taps: `column` is that of x in the region. NEXT: dilation 1, whose taps are in the pairs
// on both sides; else d is even and pairs stay pairs.
template <bool NEXT, typename T>
__device__ __forceinline__ Row read_row(const T* line, bool inside, int column, int pitch, int d) {
    const Pair none = {0.0f, 0.0f};
    if (!inside) return {none, none, none};
    const int far = NEXT ? 2 : d;
    const Pair before = column >= far ? load_pair(line - far) : none;
    const Pair middle = load_pair(line);
    const Pair after = column + far < pitch ? load_pair(line + far) : none;
    if (NEXT) return {{before.b, middle.a}, middle, {middle.b, after.a}};
    return {before, middle, after};
}

// Two outputs from three rows of taps: an order of additions that all kernels of the cascade share.
__device__ __forceinline__ Pair nine_taps(const Row& above, const Row& here, const Row& below,
                                          const float (&k)[9], float bias) {
    float a = bias, b = bias;
    a += k[0] * above.left.a, b += k[0] * above.left.b;
    a += k[1] * above.middle.a, b += k[1] * above.middle.b;
    a += k[2] * above.right.a, b += k[2] * above.right.b;
    a += k[3] * here.left.a, b += k[3] * here.left.b;
    a += k[4] * here.middle.a, b += k[4] * here.middle.b;
    a += k[5] * here.right.a, b += k[5] * here.right.b;
    a += k[6] * below.left.a, b += k[6] * below.left.b;
    a += k[7] * below.middle.a, b += k[7] * below.middle.b;
    a += k[8] * below.right.a, b += k[8] * below.right.b;
    return {relu(a), relu(b)};
}

// Outputs of one branch, and what becomes of them. M is what planes in memory hold.
template <typename T, typename M>
struct Branch {
    int y0, y1, x0, x1;      // computed
    int ty0, ty1, tx0, tx1;  // written to memory
    int d, w;
    M* out;          // the branch's plane
    const M* next;   // the next branch's input, where it takes this one in
    T* carried;      // the region that this makes of it
    float out_inverse, next_scale;
};

// PAIRED: pairs of columns can be moved at once in memory.
template <bool NEXT, bool PAIRED, typename T, typename M>
__device__ __forceinline__ void walk(const T* s, const Region& in, const Branch<T, M>& op,
                                     const float (&k)[9], float bias) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int d = op.d, segments = (warps + d - 1) / d;
    const int length = ((op.y1 - op.y0 + d - 1) / d + segments - 1) / segments;
    for (int walk = warp; walk < d * segments; walk += warps) {
        const int first = op.y0 + walk % d + walk / d * length * d;
        const int last = min(op.y1, first + length * d);
        if (first >= last) continue;
        for (int x = op.x0 + 2 * lane; x < op.x1; x += 64) {
            const int column = x - in.x0;
            const bool written = x >= op.tx0 && x < op.tx1;
            const T* line = s + (first - in.y0) * in.pitch + column;
            int p = first * op.w + x;
            Row above = read_row<NEXT>(line - d * in.pitch, first - d >= in.y0, column, in.pitch, d);
            Row here = read_row<NEXT>(line, true, column, in.pitch, d);
#pragma unroll 1
            for (int y = first; y < last; y += d, p += d * op.w) {
                Pair next = {0.0f, 0.0f};
                if (op.next != nullptr) {
                    if (PAIRED) {
                        next = read_pair(op.next + p, op.next_scale);
                    } else {
                        next.a = read_one(op.next + p, op.next_scale);
                        if (x + 1 < op.w) next.b = read_one(op.next + p + 1, op.next_scale);
                    }
                }
                line += d * in.pitch;
                const Row below = read_row<NEXT>(line, y + d < in.y1, column, in.pitch, d);
                const Pair v = nine_taps(above, here, below, k, bias);
                if (written && y >= op.ty0 && y < op.ty1) {
                    if (PAIRED) {
                        write_pair(op.out + p, v, op.out_inverse);
                    } else {
                        write_one(op.out + p, v.a, op.out_inverse);
                        if (x + 1 < op.tx1) write_one(op.out + p + 1, v.b, op.out_inverse);
                    }
                }
                if (op.next != nullptr) {
                    const float second = PAIRED || x + 1 < op.w ? next.b + v.b : 0.0f;
                    store_pair(op.carried + (y - in.y0) * in.pitch + column,
                               Pair{next.a + v.a, second});
                }
                above = here;
                here = below;
            }
        }
    }
}

// A region of a plane into shared memory.
template <typename T, typename M>
__device__ __forceinline__ void fetch(const M* plane, float scale, const Region& in, int w,
                                      bool paired, T* s) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int y = in.y0 + warp; y < in.y1; y += warps) {
        const M* row = plane + static_cast<size_t>(y) * w + in.x0;
        T* to = s + (y - in.y0) * in.pitch;
        for (int x = 2 * lane; x < in.pitch; x += 64) {
            Pair v;
            if (paired) {
                v = read_pair(row + x, scale);
            } else {
                v.a = read_one(row + x, scale);
                v.b = in.x0 + x + 1 < w ? read_one(row + x + 1, scale) : 0.0f;
            }
            store_pair(to + x, v);
        }
    }
}

// A whole plane of bytes is one row, to be moved 16 pixels at a time.
template <typename T, typename M>
__device__ __forceinline__ bool fetch_wide(const M*, float, const Region&, int, int, T*) {
    return false;
}

__device__ __forceinline__ bool fetch_wide(const Byte* plane, float scale, const Region& in, int w,
                                           int pixels, __half* s) {
    const bool all = in.pitch == w && (in.y1 - in.y0) * w == pixels;
    if (!all || pixels % 16 != 0 || reinterpret_cast<size_t>(plane) % 16 != 0) return false;
    const __half2 scales = __float2half2_rn(scale);
#pragma unroll 2
    for (int p = 16 * threadIdx.x; p < pixels; p += 16 * blockDim.x) {
        widen_sixteen(*reinterpret_cast<const uint4*>(plane + p), scales, s + p);
    }
    return true;
}

// A cascade's operands, in the order of the kernels' parameters. T is what shared memory holds, M what
// memory does.
template <typename T, typename M = T>
struct Cascade {
    const M* x;
    M* y;
    const float* params;
    int branches, addition;
    Four dilations, weights, biases;  // offsets of weights and biases in params
    int region;                       // elements of a plane with its halo in shared memory
    int tile_h, tile_w;               // tile_w is even unless the tile is the whole plane
    int h, w, x_batch, x_plane, y_batch, y_plane;
    const float* x_scales = nullptr;    // of x in bytes: a scale per channel
    const float* y_inverses = nullptr;  // of y in bytes: one over them

    __device__ __forceinline__ int tiles() const {
        return ((h + tile_h - 1) / tile_h) * ((w + tile_w - 1) / tile_w);
    }
};

// One tile of one of `chains` chains; `s` is shared memory of two regions.
template <typename T, typename M>
__device__ __forceinline__ void cascade_tile(const Cascade<T, M>& cascade, int tile, int chain,
                                             int chains, int image, T* s) {
    constexpr bool BYTES = sizeof(M) == 1;
    const M* x = cascade.x;
    M* y = cascade.y;
    const int h = cascade.h, w = cascade.w, tile_h = cascade.tile_h, tile_w = cascade.tile_w;
    const int branches = cascade.branches, addition = cascade.addition;
    const int x_batch = cascade.x_batch, x_plane = cascade.x_plane;
    const int y_batch = cascade.y_batch, y_plane = cascade.y_plane;
    const Four& dilations = cascade.dilations;
    T* other = s + cascade.region;
    const int tiles_x = (w + tile_w - 1) / tile_w;
    Branch<T, M> op;
    op.ty0 = tile / tiles_x * tile_h, op.ty1 = min(op.ty0 + tile_h, h);
    op.tx0 = tile % tiles_x * tile_w, op.tx1 = min(op.tx0 + tile_w, w);
    op.w = w;
    const bool paired = w % 2 == 0 && (x_batch | x_plane | y_batch | y_plane) % 2 == 0 &&
                (reinterpret_cast<size_t>(x) | reinterpret_cast<size_t>(y)) % (2 * sizeof(M)) == 0;

    // How far beyond the tile the following branches read, and the first branch with them.
    int reach = 0, halo = 0;
    for (int i = 0; i < branches; ++i) {
        if (addition && i > 0) reach += dilations.at(i);
        halo = addition ? halo + dilations.at(i) : max(halo, dilations.at(i));
    }
    Region in;
    in.y0 = max(op.ty0 - halo, 0), in.y1 = min(op.ty1 + halo, h);
    in.x0 = max(op.tx0 - halo, 0) & ~1;
    in.pitch = (min(op.tx1 + halo, w) - in.x0 + 1) & ~1;

    const float scale = BYTES ? cascade.x_scales[chain] : 1.0f;
    const M* plane = x + plane_at(image, x_batch, chain, x_plane);
    if (!fetch_wide(plane, scale, in, w, h * w, s)) fetch(plane, scale, in, w, paired, s);
    __syncthreads();
    for (int branch = 0; branch < branches; ++branch) {
        op.d = dilations.at(branch);
        if (addition && branch > 0) reach -= op.d;
        op.y0 = max(op.ty0 - reach, 0), op.y1 = min(op.ty1 + reach, h);
        op.x0 = max(op.tx0 - reach, 0) & ~1, op.x1 = min(op.tx1 + reach, w);
        op.out = y + plane_at(image, y_batch, branch * chains + chain, y_plane);
        const bool more = branch + 1 < branches;
        const M* next = more ? x + plane_at(image, x_batch, (branch + 1) * chains + chain,
                                            x_plane)
                             : nullptr;
        op.next = addition ? next : nullptr;
        op.carried = other;
        const int channel = branch * chains + chain;
        op.out_inverse = BYTES ? cascade.y_inverses[channel] : 1.0f;
        op.next_scale = BYTES && more ? cascade.x_scales[channel + chains] : 1.0f;

        float k[9];
        const float* kernel = cascade.params + cascade.weights.at(branch) + 9 * chain;
#pragma unroll
        for (int t = 0; t < 9; ++t) k[t] = kernel[t];
        const float bias = cascade.params[cascade.biases.at(branch) + chain];
        if (paired && op.d == 1) {
            walk<true, true>(s, in, op, k, bias);
        } else if (paired) {
            walk<false, true>(s, in, op, k, bias);
        } else if (op.d == 1) {
            walk<true, false>(s, in, op, k, bias);
        } else {
            walk<false, false>(s, in, op, k, bias);
        }
        __syncthreads();
        if (!more) break;
        if (addition) {
            T* made = other;
            other = s;
            s = made;
        } else {
            fetch(next, op.next_scale, in, w, paired, s);
            __syncthreads();
        }
    }
}

}  // namespace
