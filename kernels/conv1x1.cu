// 1x1 convolutions: y = act(W x + b + residual), x read at every stride-th row and column.
//
// conv1x1_f16, tensor cores: a block of 256 threads makes a tile of R output channels (16, 32, 64)
// and P pixels (64; 128 with 16 channels), 64 input channels at a time: x (64 x P) and weights
// (R x 64) in shared memory, sums through shared memory to bias, residual and act, rounded once.
// Where all input channels are one step, x stays for all tiles of outputs that the block makes.
// conv1x1_f32, CUDA cores: tiles of 64 channels and 64 pixels, 4 x 4 sums per thread, 16 input
// channels at a time.
// Bytes: x once per block of outputs (once in all where grid.y is 1), residual and y once; weights
// per block out of L2. FLOPs: 2 * in per output.
// Shared memory: f16: 128 (P + 8) + max(144 R, 4 R (P + 4)) bytes, 26 KB; f32: 8.7 KB.
// Launch: grid (ceil(pixels / P), rows of output tiles, N): launch::conv1x1_f16() and its neighbours.
//
// conv1x1_thin: a thread per pixel and output channel with a warp's lanes along the pixels; for the
// gates of one channel. conv1x1_vector: a warp per output channel of one pixel; for pooled vectors.
//
// conv1x1_epilogue: what surrounds the product where cuBLAS makes it:
// y = act(x + bias + residual) with x = W x' in f32: y itself, or scratch where y is stored in half
// precision, so that the sum is rounded once. Bytes: x read, y written, the residual read.
// Launch: 256 threads, grid (ceil(pixels / 1024), C, N): launch::planes().
#include "tile.cuh"

namespace {

// Where the operands of a convolution are; `in_w` and `out_w` matter for stride 2 only.
struct Conv {
    int in_c, out_c, stride, in_w, out_w, pixels;
    int x_batch, x_plane, r_batch, r_plane, y_batch, y_plane;

    // The input pixel of an output pixel.
    __device__ __forceinline__ int source(int p) const {
        if (stride == 1) return p;
        const int row = p / out_w;
        return stride * (row * in_w + p - row * out_w);
    }
};

template <int R, int P>
__device__ __forceinline__ void conv1x1_f16(const __half* RESTRICT x,
                                            const __half* RESTRICT w,
                                            const float* RESTRICT bias,
                                            const __half* residual, __half* y, int act, Conv op) {
    constexpr int DEPTH_F16 = 64, PITCH = P + HALF_PAD, W_PITCH = DEPTH_F16 + HALF_PAD;
    constexpr int SUM_PITCH = P + FLOAT_PAD;
    constexpr int ROWS = R / 16, ACROSS = TILE_WARPS / ROWS, TILES = P / 16 / ACROSS;
    DYNAMIC_SHARED(__half, xs);
    __half* ws = xs + DEPTH_F16 * PITCH;
    float* sums = reinterpret_cast<float*>(ws);
    const int warp = threadIdx.x / 32, first = blockIdx.x * P;
    const int row = warp % ROWS * 16, column = warp / ROWS * TILES * 16;
    const bool x_wide = wide(x, op.x_batch, op.x_plane) && op.stride == 1 && first + P <= op.pixels;
    const bool y_wide = wide(y, op.y_batch, op.y_plane) &&
                        wide(residual, op.r_batch, op.r_plane) && first + P <= op.pixels;
    const bool w_wide = op.in_c % 8 == 0 && reinterpret_cast<size_t>(w) % 16 == 0;
    x += plane_at(blockIdx.z, op.x_batch, 0, 0);
    y += plane_at(blockIdx.z, op.y_batch, 0, 0);
    if (residual != nullptr) residual += plane_at(blockIdx.z, op.r_batch, 0, 0);

    start_next();
    wait_for_previous();
    int staged = -1;
    for (int tile = blockIdx.y; tile * R < op.out_c; tile += gridDim.y) {
        Sums acc[TILES];
        clear_sums(acc);
        for (int k0 = 0; k0 < op.in_c; k0 += DEPTH_F16) {
            const int depth = min(DEPTH_F16, op.in_c - k0), steps = (depth + 15) / 16;
            if (staged != k0) {
                staged = k0;
                const __half* from = x + static_cast<size_t>(k0) * op.x_plane;
                stage_pixels<P, PITCH, 2>(from, op.x_plane, 16 * steps, depth, first, op.pixels,
                                          x_wide, xs, op);
            }
            if (w_wide) {
                for (int i = threadIdx.x; i < R * (DEPTH_F16 / 8); i += TILE_THREADS) {
                    const int r = i / (DEPTH_F16 / 8), k = i % (DEPTH_F16 / 8) * 8;
                    uint4 v = {0, 0, 0, 0};
                    if (tile * R + r < op.out_c && k < depth) {
                        v = *reinterpret_cast<const uint4*>(w + (tile * R + r) * op.in_c + k0 + k);
                    }
                    *reinterpret_cast<uint4*>(ws + r * W_PITCH + k) = v;
                }
            } else {
                for (int i = threadIdx.x; i < R * DEPTH_F16; i += TILE_THREADS) {
                    const int r = i / DEPTH_F16, k = i % DEPTH_F16;
                    const bool inside = tile * R + r < op.out_c && k < depth;
                    ws[r * W_PITCH + k] =
                        inside ? w[(tile * R + r) * op.in_c + k0 + k] : __float2half(0.0f);
                }
            }
            __syncthreads();
            multiply_f16<4>(ws + row * W_PITCH, W_PITCH, xs + column, PITCH, 16 * steps, acc);
            __syncthreads();
        }
        store_sums(acc, sums + row * SUM_PITCH + column, SUM_PITCH);
        __syncthreads();
        for (int i = threadIdx.x; i < R * P / 8; i += TILE_THREADS) {
            const int r = i / (P / 8), c = tile * R + r, p = i % (P / 8) * 8;
            if (c >= op.out_c) break;
            float v[8];
            load_eight(sums + r * SUM_PITCH + p, v);
            const __half* before = residual;
            if (before != nullptr) before += static_cast<size_t>(c) * op.r_plane + first + p;
            const int count = op.pixels - first - p;
            finish_eight(v, bias != nullptr ? bias[c] : 0.0f, before, act, y_wide, count);
            write_eight(y + static_cast<size_t>(c) * op.y_plane + first + p, v, y_wide, count);
        }
        __syncthreads();
    }
}

__device__ __forceinline__ void conv1x1_f32(const float* RESTRICT x,
                                            const float* RESTRICT w,
                                            const float* RESTRICT bias, const float* residual,
                                            float* y, int act, Conv op) {
    DYNAMIC_SHARED(float, xs);
    float* ws = xs + DEPTH * PITCH_F32;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, first = blockIdx.x * PIXELS;
    const int count = op.pixels - first;
    x += plane_at(blockIdx.z, op.x_batch, 0, 0);
    y += plane_at(blockIdx.z, op.y_batch, 0, 0) + first;
    if (residual != nullptr) residual += plane_at(blockIdx.z, op.r_batch, 0, 0) + first;
    start_next();
    wait_for_previous();
    // A thread stages the same pixel of every fourth channel.
    const int staged = threadIdx.x % PIXELS;
    const int from = staged < count ? op.source(first + staged) : 0;
    for (int row = blockIdx.y * 64; row < op.out_c; row += gridDim.y * 64) {
        float acc[4][4] = {};
        PixelColumns<> pixels;
        WeightColumns<4> weights;
        const auto fetch = [&](int k0) {
            const float* planes = x + static_cast<size_t>(k0 + threadIdx.x / PIXELS) * op.x_plane;
            pixels.load(planes + from, op.x_plane, staged < count, op.in_c - k0);
            weights.load(w + row * op.in_c + k0, op.in_c, op.out_c - row, op.in_c - k0);
        };
        fetch(0);
        for (int k0 = 0; k0 < op.in_c; k0 += DEPTH) {
            pixels.store(xs);
            weights.store(ws);
            __syncthreads();
            if (k0 + DEPTH < op.in_c) fetch(k0 + DEPTH);
            multiply_f32<4>(ws, xs, acc);
            __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int c = row + 4 * ty + r;
            if (c >= op.out_c) break;
            const float shift = bias != nullptr ? bias[c] : 0.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int p = 4 * tx + i;
                if (p >= count) break;
                float v = acc[r][i] + shift;
                if (residual != nullptr) v += residual[static_cast<size_t>(c) * op.r_plane + p];
                y[static_cast<size_t>(c) * op.y_plane + p] = activate(v, act);
            }
        }
    }
}

// A thread makes one pixel of one output channel; blockIdx.y is the channel.
template <typename T>
__device__ __forceinline__ void conv1x1_thin(const T* RESTRICT x, const float* RESTRICT w,
                                             const float* RESTRICT bias, const T* residual,
                                             T* y, int act, Conv op) {
    start_next();
    wait_for_previous();
    const int p = blockIdx.x * blockDim.x + threadIdx.x, c = blockIdx.y;
    if (p >= op.pixels) return;
    const T* from = x + plane_at(blockIdx.z, op.x_batch, 0, 0) + op.source(p);
    float v = bias != nullptr ? bias[c] : 0.0f;
    for (int k = 0; k < op.in_c; ++k) {
        v += w[c * op.in_c + k] * load(from + static_cast<size_t>(k) * op.x_plane);
    }
    if (residual != nullptr) v += load(residual + plane_at(blockIdx.z, op.r_batch, c, op.r_plane) + p);
    store(y + plane_at(blockIdx.z, op.y_batch, c, op.y_plane) + p, activate(v, act));
}

// A warp makes one output channel of an image of one pixel; grid (ceil(out / 8), 1, N).
template <typename T>
__device__ __forceinline__ void conv1x1_vector(const T* RESTRICT x,
                                               const float* RESTRICT w,
                                               const float* RESTRICT bias, const T* residual,
                                               T* y, int act, Conv op) {
    start_next();
    wait_for_previous();
    const int c = blockIdx.x * TILE_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (c >= op.out_c) return;
    float v = 0.0f;
    for (int k = lane; k < op.in_c; k += 32) {
        v += w[c * op.in_c + k] * load(x + plane_at(blockIdx.z, op.x_batch, k, op.x_plane));
    }
    v = warp_sum(v);
    if (lane != 0) return;
    if (bias != nullptr) v += bias[c];
    if (residual != nullptr) v += load(residual + plane_at(blockIdx.z, op.r_batch, c, op.r_plane));
    store(y + plane_at(blockIdx.z, op.y_batch, c, op.y_plane), activate(v, act));
}

template <typename T>
__device__ __forceinline__ void conv1x1_epilogue(const float* x, T* y,
                                                 const float* RESTRICT bias,
                                                 const T* RESTRICT residual, int act,
                                                 int pixels, int x_batch, int x_plane, int y_batch,
                                                 int y_plane, int r_batch, int r_plane) {
    const float shift = bias != nullptr ? bias[blockIdx.y] : 0.0f;
    x += plane_at(blockIdx.z, x_batch, blockIdx.y, x_plane);
    y += plane_at(blockIdx.z, y_batch, blockIdx.y, y_plane);
    if (residual != nullptr) residual += plane_at(blockIdx.z, r_batch, blockIdx.y, r_plane);
    FOR_PIXELS(i, pixels) {
        float v = x[i] + shift;
        if (residual != nullptr) v += load(residual + i);
        store(y + i, activate(v, act));
    }
}

}  // namespace

// Weights are halves for conv1x1_f16, f32 for the others; bias and residual may be null.
extern "C" __global__ void __launch_bounds__(256, 2)
    conv1x1_f16_r16(const __half* x, const __half* w, const float* bias, const __half* residual,
                    __half* y, int act, int in_c, int out_c, int stride, int in_w, int out_w,
                    int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                    int y_plane) {
    conv1x1_f16<16, 128>(x, w, bias, residual, y, act, {in_c, out_c, stride, in_w, out_w, pixels,
                         x_batch, x_plane, r_batch, r_plane, y_batch, y_plane});
}

extern "C" __global__ void __launch_bounds__(256, 2)
    conv1x1_f16_r32(const __half* x, const __half* w, const float* bias, const __half* residual,
                    __half* y, int act, int in_c, int out_c, int stride, int in_w, int out_w,
                    int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                    int y_plane) {
    conv1x1_f16<32, 64>(x, w, bias, residual, y, act, {in_c, out_c, stride, in_w, out_w, pixels,
                        x_batch, x_plane, r_batch, r_plane, y_batch, y_plane});
}

extern "C" __global__ void __launch_bounds__(256, 2)
    conv1x1_f16_r64(const __half* x, const __half* w, const float* bias, const __half* residual,
                    __half* y, int act, int in_c, int out_c, int stride, int in_w, int out_w,
                    int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                    int y_plane) {
    conv1x1_f16<64, 64>(x, w, bias, residual, y, act, {in_c, out_c, stride, in_w, out_w, pixels,
                        x_batch, x_plane, r_batch, r_plane, y_batch, y_plane});
}

extern "C" __global__ void __launch_bounds__(256, 2)
    conv1x1_tile_f32(const float* x, const float* w, const float* bias, const float* residual,
                     float* y, int act, int in_c, int out_c, int stride, int in_w, int out_w,
                     int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                     int y_plane) {
    conv1x1_f32(x, w, bias, residual, y, act, {in_c, out_c, stride, in_w, out_w, pixels, x_batch,
                x_plane, r_batch, r_plane, y_batch, y_plane});
}

extern "C" __global__ void __launch_bounds__(256)
    conv1x1_thin_f32(const float* x, const float* w, const float* bias, const float* residual,
                     float* y, int act, int in_c, int out_c, int stride, int in_w, int out_w,
                     int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                     int y_plane) {
    conv1x1_thin(x, w, bias, residual, y, act, {in_c, out_c, stride, in_w, out_w, pixels, x_batch,
                 x_plane, r_batch, r_plane, y_batch, y_plane});
}

extern "C" __global__ void __launch_bounds__(256)
    conv1x1_thin_f16(const __half* x, const float* w, const float* bias, const __half* residual,
                     __half* y, int act, int in_c, int out_c, int stride, int in_w, int out_w,
                     int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                     int y_plane) {
    conv1x1_thin(x, w, bias, residual, y, act, {in_c, out_c, stride, in_w, out_w, pixels, x_batch,
                 x_plane, r_batch, r_plane, y_batch, y_plane});
}

extern "C" __global__ void __launch_bounds__(256)
    conv1x1_vector_f32(const float* x, const float* w, const float* bias, const float* residual,
                       float* y, int act, int in_c, int out_c, int stride, int in_w, int out_w,
                       int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                       int y_plane) {
    conv1x1_vector(x, w, bias, residual, y, act, {in_c, out_c, stride, in_w, out_w, pixels, x_batch,
                   x_plane, r_batch, r_plane, y_batch, y_plane});
}

extern "C" __global__ void __launch_bounds__(256)
    conv1x1_vector_f16(const __half* x, const float* w, const float* bias, const __half* residual,
                       __half* y, int act, int in_c, int out_c, int stride, int in_w, int out_w,
                       int pixels, int x_batch, int x_plane, int r_batch, int r_plane, int y_batch,
                       int y_plane) {
    conv1x1_vector(x, w, bias, residual, y, act, {in_c, out_c, stride, in_w, out_w, pixels, x_batch,
                   x_plane, r_batch, r_plane, y_batch, y_plane});
}

// y may be x.
extern "C" __global__ void conv1x1_epilogue_f32(const float* x, float* y, const float* bias,
                                                const float* residual, int act, int pixels,
                                                int x_batch, int x_plane, int y_batch, int y_plane,
                                                int r_batch, int r_plane) {
    conv1x1_epilogue(x, y, bias, residual, act, pixels, x_batch, x_plane, y_batch, y_plane, r_batch,
                     r_plane);
}

extern "C" __global__ void conv1x1_epilogue_f16(const float* x, __half* y, const float* bias,
                                                const __half* residual, int act, int pixels,
                                                int x_batch, int x_plane, int y_batch, int y_plane,
                                                int r_batch, int r_plane) {
    conv1x1_epilogue(x, y, bias, residual, act, pixels, x_batch, x_plane, y_batch, y_plane, r_batch,
                     r_plane);
}
