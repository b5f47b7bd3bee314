// The stem and the block of stage 1 in one launch as in stem_block.cu, in f16, by tensor cores:
//   s = relu(3x3, stride 2 (x) + b)      3 -> 16 channels, x stored values or 8-bit RGB
//   e = relu(We s + be),  d = relu(3x3 depthwise (e) + bd),  y = act(Wp d + bp + s)
//
// A block of 512 threads makes 64 x 8 pixels of s and y: at 1024 x 512, two blocks for each
// multiprocessor of an H100. It computes s and e on the 68 x 10 pixels around them (the taps reach 66;
// pairs of pixels begin at even columns). A warp has 16 pixels at a time, row g of a product (mma.cuh)
// being pixel 2g and row g + 8 its right neighbour, so that a lane has two neighbours of a channel to
// write at once. Products: 16 pixels times 3 channels x 3 rows x 4 taps (of which the first is none,
// zero, so that taps go in pairs from even columns); the sums of s are the operand of e's product. e
// goes to shared memory, 16 channels of a pixel together, zeros outside of the plane (the padding is
// e's). The lanes make d as the projection's operand, their taps in f32, from there.
// Weights stay f32 in effect: products take their halves, and then the halves of what those leave over.
// Rows of x, and pixels of e, are as long as it takes for the lanes' banks to differ.
// Bytes: x with a halo (1.4), s and y once each, s read again. FLOPs: per pixel 2 * 1088, with 1.33 of
// the first 688 products, and the zeros; 4 times 944 products by tensor cores.
// Shared: 3 x 21 x 160 of x, 688 x 20 of e, 208 floats: 48 KB. Launch: block (512), grid (tiles, 1, N):
// launch::stem_block().
#include "image.cuh"
#include "mma.cuh"
#include "tile.cuh"

namespace {

constexpr int CHANNELS = 16, IMAGE_CHANNELS = 3, THREADS = 512, WARPS = THREADS / 32;
constexpr int TILE_W = 64, TILE_H = 8, REACH_W = TILE_W + 4, REACH_H = TILE_H + 2;
constexpr int REACH = REACH_W * REACH_H;
// Columns from 2 x0 - 8 on, rows from 2 y0 - 3 on.
constexpr int IMAGE_W = 2 * TILE_W + 16, IMAGE_H = 2 * REACH_H + 1, IMAGE_PITCH = 160;
constexpr int IMAGE_ROWS = IMAGE_CHANNELS * IMAGE_H, PIXEL = 20;

// Blocks on a multiprocessor. Shared memory of Turing has room for one, and Volta, without mma.cuh's
// products, needs more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int BLOCKS = 1;
#else
constexpr int BLOCKS = 2;
#endif

struct Shared {
    float taps[9][CHANNELS];
    // Of s, e, d and y.
    float biases[4][CHANNELS];
    __half image[IMAGE_ROWS * IMAGE_PITCH];
    __half e[(REACH + 15) / 16 * 16 * PIXEL];
};

// Two neighbours in k of a B operand: halves of the weights, and of what they leave over.
struct Weights {
    unsigned whole, rest;
};

__device__ __forceinline__ Weights split(float low, float high) {
    const unsigned whole = pack_halves(low, high);
    return {whole, pack_halves(low - low_half(whole), high - high_half(whole))};
}

// 16 x 16 weights as operands B, 8 columns each.
struct Matrix {
    unsigned whole[2][2], rest[2][2];

    __device__ __forceinline__ Matrix(const float* w, int g, int t) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float* from = w + (8 * n + g) * CHANNELS + 2 * t + 8 * i;
                const Weights k = split(from[0], from[1]);
                whole[n][i] = k.whole, rest[n][i] = k.rest;
            }
        }
    }
    __device__ __forceinline__ void multiply(const unsigned (&a)[4], float (&d)[2][4]) const {
#pragma unroll
        for (int n = 0; n < 2; ++n) mma_16(d[n], a, rest[n]), mma_16(d[n], a, whole[n]);
    }
};

// Sums at the biases of a lane's channels: 2t and 2t + 1, and those 8 on.
__device__ __forceinline__ void start(const float* bias, int t, float (&d)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        d[n][0] = d[n][2] = bias[8 * n + 2 * t];
        d[n][1] = d[n][3] = bias[8 * n + 2 * t + 1];
    }
}

// Relu of sums as the next operand A.
__device__ __forceinline__ void relu_operand(const float (&d)[2][4], unsigned (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i] = pack_halves(relu(d[i / 2][i % 2 * 2]), relu(d[i / 2][i % 2 * 2 + 1]));
    }
}

// Planes of s or y, from a lane's first channel on; pairs of pixels where `paired`.
struct Outputs {
    __half* base;
    int plane;
    bool paired;

    // Two neighbours of channels 8n + 2t (in the low halves of both) and 8n + 2t + 1; `second`: whether
    // the right one is inside.
    __device__ __forceinline__ void write(int p, int n, unsigned left, unsigned right,
                                          bool second) const {
        int at = 8 * n * plane + p;
        const unsigned pairs[2] = {__byte_perm(left, right, 0x5410),
                                   __byte_perm(left, right, 0x7632)};
#pragma unroll
        for (int c = 0; c < 2; ++c, at += plane) {
            __half* to = base + at;
            if (paired) {
                *reinterpret_cast<unsigned*>(to) = pairs[c];
            } else {
                to[0] = __ushort_as_half(static_cast<unsigned short>(pairs[c] & 0xffffu));
                if (second) to[1] = __ushort_as_half(static_cast<unsigned short>(pairs[c] >> 16));
            }
        }
    }
    // Two neighbours of channel 8n + 2t + c.
    __device__ __forceinline__ unsigned read(int p, int n, int c, bool second) const {
        const __half* from = base + ((8 * n + c) * plane + p);
        if (paired) return *reinterpret_cast<const unsigned*>(from);
        const unsigned right = second ? __half_as_ushort(from[1]) : 0;
        return __half_as_ushort(from[0]) | right << 16;
    }
};

__device__ __forceinline__ Outputs outputs(__half* base, int batch, int plane, int w, int t) {
    const bool paired = reinterpret_cast<size_t>(base) % 4 == 0 && (w | batch | plane) % 2 == 0;
    return {base + plane_at(blockIdx.z, batch, 2 * t, plane), plane, paired};
}

// The image around a tile into shared memory, zeros outside: 8 pixels of a channel at a time, all loads
// of a thread under way.
__device__ __forceinline__ void stage_image(const Planes<__half>& source, int y0, int x0, int in_h,
                                            int in_w, __half* image) {
    constexpr int EIGHTS = IMAGE_W / 8, ITEMS = IMAGE_ROWS * EIGHTS;
    constexpr int AT_ONCE = (ITEMS + THREADS - 1) / THREADS;
    const bool whole = in_w % 8 == 0 && wide(source.x, source.batch, source.plane);
    uint4 v[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
        const int i = threadIdx.x + k * THREADS, row = i / EIGHTS;
        const int c = row / IMAGE_H, y = 2 * y0 - 3 + row % IMAGE_H, x = 2 * x0 - 8 + i % EIGHTS * 8;
        v[k] = uint4{0, 0, 0, 0};
        if (i >= ITEMS || y < 0 || y >= in_h) continue;
        const __half* from = source.x + plane_at(blockIdx.z, source.batch, c, source.plane) +
                             static_cast<size_t>(y) * in_w;
        if (whole) {
            if (x >= 0 && x < in_w) v[k] = *reinterpret_cast<const uint4*>(from + x);
        } else {
            unsigned pairs[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int left = x + 2 * j, right = left + 1;
                const unsigned low =
                    left >= 0 && left < in_w ? __half_as_ushort(from[left]) : 0;
                const unsigned high =
                    right >= 0 && right < in_w ? __half_as_ushort(from[right]) : 0;
                pairs[j] = low | high << 16;
            }
            v[k] = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
        const int i = threadIdx.x + k * THREADS;
        if (i >= ITEMS) break;
        *reinterpret_cast<uint4*>(image + i / EIGHTS * IMAGE_PITCH + i % EIGHTS * 8) = v[k];
    }
}

// The same from bytes, 4 pixels of all channels at a time.
__device__ __forceinline__ void stage_image(const Pixels& source, int y0, int x0, int in_h, int in_w,
                                            __half* image) {
    constexpr int FOURS = IMAGE_W / 4, ITEMS = IMAGE_H * FOURS;
    constexpr int AT_ONCE = (ITEMS + THREADS - 1) / THREADS;
    const bool whole = in_w % 4 == 0 && reinterpret_cast<size_t>(source.rgb) % 4 == 0;
    const unsigned char* photo =
        source.rgb + static_cast<size_t>(blockIdx.z) * in_h * in_w * IMAGE_CHANNELS;
    float scale[IMAGE_CHANNELS], shift[IMAGE_CHANNELS];
#pragma unroll
    for (int c = 0; c < IMAGE_CHANNELS; ++c) {
        scale[c] = source.normalisation[c], shift[c] = source.normalisation[3 + c];
    }
    unsigned v[AT_ONCE][3];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
        const int i = threadIdx.x + k * THREADS;
        const int y = 2 * y0 - 3 + i / FOURS, x = 2 * x0 - 8 + i % FOURS * 4;
        v[k][0] = v[k][1] = v[k][2] = 0;
        if (i >= ITEMS || y < 0 || y >= in_h || x + 3 < 0 || x >= in_w) continue;
        const unsigned char* from = photo + (static_cast<ptrdiff_t>(y) * in_w + x) * IMAGE_CHANNELS;
        if (whole) {
#pragma unroll
            for (int j = 0; j < 3; ++j) v[k][j] = reinterpret_cast<const unsigned*>(from)[j];
        } else {
#pragma unroll
            for (int j = 0; j < 12; ++j) {
                const bool inside = x + j / 3 >= 0 && x + j / 3 < in_w;
                const unsigned byte = inside ? from[j] : 0;
                v[k][j / 4] |= byte << (j % 4 * 8);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
        const int i = threadIdx.x + k * THREADS;
        if (i >= ITEMS) break;
        const int y = 2 * y0 - 3 + i / FOURS, x = 2 * x0 - 8 + i % FOURS * 4;
#pragma unroll
        for (int c = 0; c < IMAGE_CHANNELS; ++c) {
            float values[4];
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                const int j = 3 * p + c;
                const unsigned byte = v[k][j / 4] >> (j % 4 * 8) & 0xffu;
                const bool inside = y >= 0 && y < in_h && x + p >= 0 && x + p < in_w;
                values[p] = inside ? fmaf(static_cast<float>(byte), scale[c], shift[c]) : 0.0f;
            }
            *reinterpret_cast<uint2*>(image + (c * IMAGE_H + i / FOURS) * IMAGE_PITCH +
                                      i % FOURS * 4) =
                uint2{pack_halves(values[0], values[1]), pack_halves(values[2], values[3])};
        }
    }
}

template <typename Source>
__device__ __forceinline__ void stem_block(const Source& source, const float* RESTRICT stem_w,
                                           const float* RESTRICT stem_b,
                                           const float* RESTRICT expand_w,
                                           const float* RESTRICT expand_b,
                                           const float* RESTRICT depth_w,
                                           const float* RESTRICT depth_b,
                                           const float* RESTRICT project_w,
                                           const float* RESTRICT project_b, __half* s, __half* y,
                                           int act, int in_h, int in_w, int h, int w, int s_batch,
                                           int s_plane, int y_batch, int y_plane) {
    DYNAMIC_SHARED(Shared, shared);
    const int tiles_x = (w + TILE_W - 1) / TILE_W, thread = threadIdx.x, warp = thread / 32;
    const int x0 = blockIdx.x % tiles_x * TILE_W, y0 = blockIdx.x / tiles_x * TILE_H;
    const int g = thread % 32 / 4, t = thread % 4;

    start_next();
    // What goes to shared memory, on its way while the weights are: a tap, or one of the biases.
    const int bias = thread / CHANNELS - 9, channel = thread % CHANNELS;
    const float* const own = bias < 0    ? depth_w + thread
                             : bias == 0 ? stem_b + channel
                             : bias == 1 ? expand_b + channel
                             : bias == 2 ? depth_b + channel
                                         : project_b + channel;
    const float kept = *own;
    // Rows of taps, channel by channel, are two pairs each: none and the first, the second and third.
    constexpr int STEPS = 5;
    unsigned whole[2][STEPS], rest[2][STEPS];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            // What is multiplied where there is no tap, or row of taps, is zero: any weight will do.
            const int row = min(2 * k + t / 2, 3 * IMAGE_CHANNELS - 1);
            const float* from = stem_w + (8 * n + g) * 9 * IMAGE_CHANNELS + 3 * row;
            const Weights pair = split(from[t % 2], from[t % 2 * 2]);
            whole[n][k] = pair.whole, rest[n][k] = pair.rest;
        }
    }
    const Outputs s_out = outputs(s, s_batch, s_plane, w, t);
    {
        const Matrix expand(expand_w, g, t);
        wait_for_previous();
        stage_image(source, y0, x0, in_h, in_w, shared->image);
        if (bias < 0) {
            shared->taps[thread % 9][thread / 9] = kept;
        } else if (bias < 4) {
            shared->biases[bias][channel] = kept;
        }
        __syncthreads();

        // Of the pair that begins with no tap, nothing but the second counts.
        const unsigned mask = t % 2 == 0 ? 0xffff0000u : 0xffffffffu;
        const auto row_of = [](int row) { return (row / 3 * IMAGE_H + row % 3) * IMAGE_PITCH / 2; };
#pragma unroll 1
        for (int q = 16 * warp + 2 * g; q - 2 * g < REACH; q += 16 * WARPS) {
            // Lanes beyond the last pixel work on it once more.
            const int at = min(q, REACH - 2), row = at / REACH_W, column = at % REACH_W;
            const unsigned* words = reinterpret_cast<const unsigned*>(shared->image) +
                                    row * IMAGE_PITCH + column + 1 + t % 2;
            float sums[2][4];
            start(shared->biases[0], t, sums);
            unsigned a[2][STEPS];
#pragma unroll
            for (int k = 0; k < STEPS; ++k) {
                // Rows 2k and 2k + 1 of the taps; there is no tenth.
                const bool last = k == STEPS - 1;
                const int line = t / 2 == 0 || last ? row_of(2 * k) : row_of(2 * k + 1);
                const unsigned keep = last && t / 2 != 0 ? 0u : mask;
                a[0][k] = words[line] & keep, a[1][k] = words[line + 1] & keep;
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int k = 0; k + 1 < STEPS; k += 2) {
                    const unsigned operand[4] = {a[0][k], a[1][k], a[0][k + 1], a[1][k + 1]};
                    const unsigned much[2] = {whole[n][k], whole[n][k + 1]};
                    const unsigned little[2] = {rest[n][k], rest[n][k + 1]};
                    mma_16(sums[n], operand, little);
                    mma_16(sums[n], operand, much);
                }
                mma_8(sums[n], a[0][STEPS - 1], a[1][STEPS - 1], rest[n][STEPS - 1]);
                mma_8(sums[n], a[0][STEPS - 1], a[1][STEPS - 1], whole[n][STEPS - 1]);
            }
            unsigned made[4];
            relu_operand(sums, made);
            const int oy = y0 - 1 + row, ox = x0 - 2 + column;
            const bool in_row = oy >= 0 && oy < h && q < REACH;
            if (in_row && row >= 1 && row <= TILE_H && column >= 2 && column < TILE_W + 2 && ox < w) {
                const int p = oy * w + ox;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    s_out.write(p, n, made[2 * n], made[2 * n + 1], ox + 1 < w);
                }
            }
            float expanded[2][4];
            start(shared->biases[1], t, expanded);
            expand.multiply(made, expanded);
            relu_operand(expanded, made);
            const bool left = in_row && ox >= 0 && ox < w;
            const bool right = in_row && ox + 1 >= 0 && ox + 1 < w;
            __half* to = shared->e + q * PIXEL + 2 * t;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                *reinterpret_cast<unsigned*>(to + 8 * n) = left ? made[2 * n] : 0u;
                *reinterpret_cast<unsigned*>(to + PIXEL + 8 * n) = right ? made[2 * n + 1] : 0u;
            }
        }
    }
    const Matrix project(project_w, g, t);
    const Outputs y_out = outputs(y, y_batch, y_plane, w, t);
    __syncthreads();

#pragma unroll 1
    for (int tile = warp; tile < TILE_W / 16 * TILE_H; tile += WARPS) {
        const int row = tile / (TILE_W / 16), column = tile % (TILE_W / 16) * 16;
        if (y0 + row >= h || x0 + column >= w) continue;
        const int oy = y0 + row, ox = x0 + column + 2 * g;
        const bool left = ox < w, right = ox + 1 < w;
        const int p = oy * w + ox;
        unsigned before[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            before[i / 2][i % 2] = left ? s_out.read(p, i / 2, i % 2, right) : 0u;
        }
        unsigned a[4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int c = 8 * n + 2 * t;
            const float low = shared->biases[2][c], high = shared->biases[2][c + 1];
            float d[4] = {low, high, low, high};
            // The left pixel's first tap is a column before it, which the region has at column + 1.
            const __half* from = shared->e + (row * REACH_W + column + 2 * g + 1) * PIXEL + c;
#pragma unroll
            for (int ky = 0; ky < 3; ++ky, from += REACH_W * PIXEL) {
                unsigned v[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    v[i] = *reinterpret_cast<const unsigned*>(from + i * PIXEL);
                }
#pragma unroll
                for (int kx = 0; kx < 3; ++kx) {
                    const float k_low = shared->taps[3 * ky + kx][c];
                    const float k_high = shared->taps[3 * ky + kx][c + 1];
                    d[0] += k_low * low_half(v[kx]), d[1] += k_high * high_half(v[kx]);
                    d[2] += k_low * low_half(v[kx + 1]), d[3] += k_high * high_half(v[kx + 1]);
                }
            }
            a[2 * n] = pack_halves(relu(d[0]), relu(d[1]));
            a[2 * n + 1] = pack_halves(relu(d[2]), relu(d[3]));
        }
        float sums[2][4];
        start(shared->biases[3], t, sums);
        project.multiply(a, sums);
        if (!left) continue;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const unsigned residual = before[n][i % 2];
                const float added = i < 2 ? low_half(residual) : high_half(residual);
                v[i] = activate(sums[n][i] + added, act);
            }
            y_out.write(p, n, pack_halves(v[0], v[1]), pack_halves(v[2], v[3]), right);
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, BLOCKS)
    stem_block_f16(const __half* x, int x_batch, int x_plane, const float* stem_w,
                   const float* stem_b, const float* expand_w, const float* expand_b,
                   const float* depth_w, const float* depth_b, const float* project_w,
                   const float* project_b, __half* s, __half* y, int act, int in_h, int in_w, int h,
                   int w, int s_batch, int s_plane, int y_batch, int y_plane) {
    stem_block(Planes<__half>{x, x_batch, x_plane, in_w}, stem_w, stem_b, expand_w, expand_b,
               depth_w, depth_b, project_w, project_b, s, y, act, in_h, in_w, h, w, s_batch,
               s_plane, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(512, BLOCKS)
    stem_block_rgb_f16(const unsigned char* rgb, const float* normalisation, const float* stem_w,
                       const float* stem_b, const float* expand_w, const float* expand_b,
                       const float* depth_w, const float* depth_b, const float* project_w,
                       const float* project_b, __half* s, __half* y, int act, int in_h, int in_w,
                       int h, int w, int s_batch, int s_plane, int y_batch, int y_plane) {
    stem_block(Pixels{rgb, normalisation, in_h, in_w}, stem_w, stem_b, expand_w, expand_b, depth_w,
               depth_b, project_w, project_b, s, y, act, in_h, in_w, h, w, s_batch, s_plane,
               y_batch, y_plane);
}
