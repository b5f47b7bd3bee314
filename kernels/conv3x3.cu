// Dense 3x3 convolution, padding 1, stride 1 or 2: the stem. y = relu?(W * x + bias), x stored values
// or 8-bit RGB that is normalised on the way, a quarter of the bytes to copy and to read.
//
// Forward. Bytes: x once (plus a halo of (2 s / tile)), y once. FLOPs: 18 * in per output.
// A block makes 32 x 8 pixels of 16 output channels, a thread one pixel: 16 sums in registers.
// Shared: one input channel's tile at a time, ((8 - 1) s + 3) x ((32 - 1) s + 3) floats, and the
// weights of the 16 outputs for it, read by broadcast.
// Launch: block (32, 8), grid (tiles, groups of 16 outputs, N): launch::conv3x3_forward().
//
// Backward: dW[o][i][t] = sum over n, p of dY[n][o][p] x[n][i][p * s + t - 1] in two levels; a
// block sums 4096 pixels of one (o, i) pair, nine sums per thread. x is read nine times per o, from
// L1 mostly. No data gradient: the stem reads the image.
#include "image.cuh"

namespace {

constexpr int TILE_W = 32, TILE_H = 8, GROUP = 16;

template <typename Source, typename T>
__device__ __forceinline__ void conv3x3_forward(Source source, const float* RESTRICT weights,
                                                const float* RESTRICT bias, T* RESTRICT y,
                                                int in_c, int out_c, int in_h, int in_w, int out_h,
                                                int out_w, int stride, int rectify, int y_batch,
                                                int y_plane) {
    const int tile_w = (TILE_W - 1) * stride + 3, tile_h = (TILE_H - 1) * stride + 3;
    DYNAMIC_SHARED(float, shared);
    float* tile = shared;
    float* w = shared + tile_w * tile_h;

    const int tiles_x = (out_w + TILE_W - 1) / TILE_W;
    const int ox0 = blockIdx.x % tiles_x * TILE_W, oy0 = blockIdx.x / tiles_x * TILE_H;
    const int first = blockIdx.y * GROUP, group = min(GROUP, out_c - first);
    const int ox = ox0 + threadIdx.x, oy = oy0 + threadIdx.y;
    const int thread = threadIdx.y * TILE_W + threadIdx.x;

    float sums[GROUP];
#pragma unroll
    for (int o = 0; o < GROUP; ++o) sums[o] = bias != nullptr && o < group ? bias[first + o] : 0.0f;

    for (int i = 0; i < in_c; ++i) {
        const typename Source::Channel plane = source.channel(blockIdx.z, i);
        for (int r = threadIdx.y; r < tile_h; r += TILE_H) {
            const int iy = oy0 * stride - 1 + r;
            for (int c = threadIdx.x; c < tile_w; c += TILE_W) {
                const int ix = ox0 * stride - 1 + c;
                const bool inside = iy >= 0 && iy < in_h && ix >= 0 && ix < in_w;
                tile[r * tile_w + c] = inside ? plane.at(iy, ix) : 0.0f;
            }
        }
        // w[t][o], so that the outputs of one tap lie together.
        if (thread < 9 * GROUP) {
            const int o = thread % GROUP, t = thread / GROUP;
            w[thread] = o < group ? weights[((first + o) * in_c + i) * 9 + t] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < 9; ++t) {
            const float v = tile[(threadIdx.y * stride + t / 3) * tile_w + threadIdx.x * stride +
                                 t % 3];
#pragma unroll
            for (int o = 0; o < GROUP; ++o) sums[o] += w[t * GROUP + o] * v;
        }
        __syncthreads();
    }
    if (ox >= out_w || oy >= out_h) return;
    T* out = y + plane_at(blockIdx.z, y_batch, first, y_plane) + static_cast<size_t>(oy) * out_w + ox;
#pragma unroll
    for (int o = 0; o < GROUP; ++o) {
        if (o < group) store(out + static_cast<size_t>(o) * y_plane, rectify ? relu(sums[o]) : sums[o]);
    }
}

// partial is (N * pieces) x out x in x 9; grid (pieces, out * in, N).
template <typename T>
__device__ __forceinline__ void conv3x3_backward_weight(const T* RESTRICT x,
                                                        const T* RESTRICT dy,
                                                        float* RESTRICT partial, int in_c,
                                                        int in_h, int in_w, int out_h, int out_w,
                                                        int stride, int x_batch, int x_plane,
                                                        int dy_batch, int dy_plane) {
    __shared__ float shared[9 * 32];
    const int o = blockIdx.y / in_c, i = blockIdx.y % in_c;
    x += plane_at(blockIdx.z, x_batch, i, x_plane);
    dy += plane_at(blockIdx.z, dy_batch, o, dy_plane);
    const int pixels = out_h * out_w, first = blockIdx.x * REDUCTION_PIXELS + threadIdx.x;
    float sums[9] = {};
    for (int k = 0; k < REDUCTION_PER_THREAD; ++k) {
        const int p = first + k * REDUCTION_THREADS;
        if (p >= pixels) break;
        const float g = load(dy + p);
        const int oy = p / out_w, iy0 = oy * stride - 1, ix0 = (p - oy * out_w) * stride - 1;
#pragma unroll
        for (int t = 0; t < 9; ++t) {
            const int iy = iy0 + t / 3, ix = ix0 + t % 3;
            if (iy >= 0 && iy < in_h && ix >= 0 && ix < in_w) {
                sums[t] += g * load(x + static_cast<size_t>(iy) * in_w + ix);
            }
        }
    }
    block_sum(sums, shared);
    if (threadIdx.x == 0) {
        const size_t part = static_cast<size_t>(blockIdx.z) * gridDim.x + blockIdx.x;
        float* out = partial + (part * gridDim.y + blockIdx.y) * 9;
#pragma unroll
        for (int t = 0; t < 9; ++t) out[t] = sums[t];
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256, 4)
    conv3x3_forward_f32(const float* x, const float* weights, const float* bias, float* y, int in_c,
                        int out_c, int in_h, int in_w, int out_h, int out_w, int stride,
                        int rectify, int x_batch, int x_plane, int y_batch, int y_plane) {
    conv3x3_forward(Planes<float>{x, x_batch, x_plane, in_w}, weights, bias, y, in_c, out_c, in_h,
                    in_w, out_h, out_w, stride, rectify, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    conv3x3_forward_f16(const __half* x, const float* weights, const float* bias, __half* y,
                        int in_c, int out_c, int in_h, int in_w, int out_h, int out_w, int stride,
                        int rectify, int x_batch, int x_plane, int y_batch, int y_plane) {
    conv3x3_forward(Planes<__half>{x, x_batch, x_plane, in_w}, weights, bias, y, in_c, out_c, in_h,
                    in_w, out_h, out_w, stride, rectify, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    conv3x3_rgb_f32(const unsigned char* rgb, const float* normalisation, const float* weights,
                    const float* bias, float* y, int out_c, int in_h, int in_w, int out_h, int out_w,
                    int stride, int rectify, int y_batch, int y_plane) {
    conv3x3_forward(Pixels{rgb, normalisation, in_h, in_w}, weights, bias, y, 3, out_c, in_h, in_w,
                    out_h, out_w, stride, rectify, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    conv3x3_rgb_f16(const unsigned char* rgb, const float* normalisation, const float* weights,
                    const float* bias, __half* y, int out_c, int in_h, int in_w, int out_h, int out_w,
                    int stride, int rectify, int y_batch, int y_plane) {
    conv3x3_forward(Pixels{rgb, normalisation, in_h, in_w}, weights, bias, y, 3, out_c, in_h, in_w,
                    out_h, out_w, stride, rectify, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    conv3x3_backward_weight_f32(const float* x, const float* dy, float* partial, int in_c, int in_h,
                                int in_w, int out_h, int out_w, int stride, int x_batch,
                                int x_plane, int dy_batch, int dy_plane) {
    conv3x3_backward_weight(x, dy, partial, in_c, in_h, in_w, out_h, out_w, stride, x_batch,
                            x_plane, dy_batch, dy_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    conv3x3_backward_weight_f16(const __half* x, const __half* dy, float* partial, int in_c, int in_h,
                                int in_w, int out_h, int out_w, int stride, int x_batch,
                                int x_plane, int dy_batch, int dy_plane) {
    conv3x3_backward_weight(x, dy, partial, in_c, in_h, in_w, out_h, out_w, stride, x_batch,
                            x_plane, dy_batch, dy_plane);
}
