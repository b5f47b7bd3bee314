// Batch norm with batch statistics, and what is fused around it:
//   y = act(weight * (x - mean) * invstd + bias + residual).
//
// Statistics in two levels without cancellation: a block takes 4096 pixels of one plane into
// registers, finds their mean and the squares around it; a warp per channel merges the pieces in
// double, in a fixed order: M2 = sum of (M2_i + n_i (mean_i - mean)^2). One read of x.
// Backward, x_hat = (x - mean) invstd over M values, g = dy (+ dy2), passed where y > 0 with a ReLU:
//   dweight = sum g x_hat,  dbias = sum g,
//   dx = weight * invstd * (g - dbias / M - x_hat * dweight / M),  dresidual = g.
// dy2 is the gradient that comes back from the next branch of a cascade.
//
// Bytes per element: forward x twice, y once (residual once); backward x, dy, y twice, dx once.
// Launch: statistics and sums 256 threads, grid (pieces, C, N), 32 or 64 floats of shared memory;
// finalize one warp per channel; apply as elementwise kernels.
#include "common.cuh"

namespace {

__device__ __forceinline__ int piece_size(int piece, int pixels) {
    return min(REDUCTION_PIXELS, pixels - piece * REDUCTION_PIXELS);
}

// dy (+ dy2), passed where y > 0. y and dy2 may be null.
template <typename T>
__device__ __forceinline__ float gated(const T* dy, const T* dy2, const T* y, int i) {
    float g = load(dy + i);
    if (dy2 != nullptr) g += load(dy2 + i);
    if (y != nullptr) g = load(y + i) > 0.0f ? g : 0.0f;
    return g;
}

// partial is C x (N * pieces) x 2: mean and squares around it of each piece.
template <typename T>
__device__ __forceinline__ void batch_norm_statistics(
    const T* RESTRICT x, float* RESTRICT partial, int pixels, int x_batch, int x_plane) {
    __shared__ float shared[32];
    x += plane_at(blockIdx.z, x_batch, blockIdx.y, x_plane);
    const int first = blockIdx.x * REDUCTION_PIXELS + threadIdx.x;
    float values[REDUCTION_PER_THREAD];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < REDUCTION_PER_THREAD; ++k) {
        const int i = first + k * REDUCTION_THREADS;
        values[k] = i < pixels ? load(x + i) : 0.0f;
        sum += values[k];
    }
    const float mean = block_sum_all(sum, shared) / piece_size(blockIdx.x, pixels);
    float squares[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < REDUCTION_PER_THREAD; ++k) {
        const float d = values[k] - mean;
        if (first + k * REDUCTION_THREADS < pixels) squares[0] += d * d;
    }
    block_sum(squares, shared);
    if (threadIdx.x == 0) {
        const size_t part = static_cast<size_t>(blockIdx.z) * gridDim.x + blockIdx.x;
        const size_t parts = static_cast<size_t>(gridDim.z) * gridDim.x;
        float* out = partial + 2 * (blockIdx.y * parts + part);
        out[0] = mean;
        out[1] = squares[0];
    }
}

template <typename T>
__device__ __forceinline__ void batch_norm_apply(
    const T* x, const T* residual, T* y, const float* RESTRICT weight,
    const float* RESTRICT bias, const float* RESTRICT mean,
    const float* RESTRICT invstd, int act, int pixels, int x_batch, int x_plane, int r_batch,
    int r_plane, int y_batch, int y_plane) {
    const int c = blockIdx.y;
    const float scale = weight[c] * invstd[c], shift = bias[c] - mean[c] * scale;
    x += plane_at(blockIdx.z, x_batch, c, x_plane);
    y += plane_at(blockIdx.z, y_batch, c, y_plane);
    if (residual != nullptr) residual += plane_at(blockIdx.z, r_batch, c, r_plane);
    FOR_PIXELS(i, pixels) {
        float v = load(x + i) * scale + shift;
        if (residual != nullptr) v += load(residual + i);
        store(y + i, act == ACT_RELU ? relu(v) : v);
    }
}

// partial is C x (N * pieces) x 2: sum of g, sum of g (x - mean). y is null without a ReLU.
template <typename T>
__device__ __forceinline__ void batch_norm_backward_sums(
    const T* RESTRICT x, const T* RESTRICT y, const T* RESTRICT dy,
    const T* RESTRICT dy2, const float* RESTRICT mean, float* RESTRICT partial,
    int pixels, int x_batch, int x_plane, int y_batch, int y_plane, int dy_batch, int dy_plane,
    int dy2_batch, int dy2_plane) {
    __shared__ float shared[2 * 32];
    const int c = blockIdx.y;
    x += plane_at(blockIdx.z, x_batch, c, x_plane);
    dy += plane_at(blockIdx.z, dy_batch, c, dy_plane);
    if (y != nullptr) y += plane_at(blockIdx.z, y_batch, c, y_plane);
    if (dy2 != nullptr) dy2 += plane_at(blockIdx.z, dy2_batch, c, dy2_plane);
    const float centre = mean[c];
    const int first = blockIdx.x * REDUCTION_PIXELS + threadIdx.x;
    float sums[2] = {0.0f, 0.0f};
#pragma unroll 4
    for (int k = 0; k < REDUCTION_PER_THREAD; ++k) {
        const int i = first + k * REDUCTION_THREADS;
        if (i < pixels) {
            const float g = gated(dy, dy2, y, i);
            sums[0] += g;
            sums[1] += g * (load(x + i) - centre);
        }
    }
    block_sum(sums, shared);
    if (threadIdx.x == 0) {
        const size_t part = static_cast<size_t>(blockIdx.z) * gridDim.x + blockIdx.x;
        const size_t parts = static_cast<size_t>(gridDim.z) * gridDim.x;
        float* out = partial + 2 * (c * parts + part);
        out[0] = sums[0];
        out[1] = sums[1];
    }
}

// dx, and the residual's gradient where there is one; both may be accumulated.
template <typename T>
__device__ __forceinline__ void batch_norm_backward_apply(
    const T* x, const T* y, const T* dy, const T* dy2, const float* RESTRICT weight,
    const float* RESTRICT mean, const float* RESTRICT invstd,
    const float* RESTRICT coefficients, T* dx, T* dresidual, int accumulate,
    int accumulate_residual, int pixels, int x_batch, int x_plane, int y_batch, int y_plane,
    int dy_batch, int dy_plane, int dy2_batch, int dy2_plane, int dx_batch, int dx_plane,
    int dr_batch, int dr_plane) {
    const int c = blockIdx.y;
    x += plane_at(blockIdx.z, x_batch, c, x_plane);
    dy += plane_at(blockIdx.z, dy_batch, c, dy_plane);
    dx += plane_at(blockIdx.z, dx_batch, c, dx_plane);
    if (y != nullptr) y += plane_at(blockIdx.z, y_batch, c, y_plane);
    if (dy2 != nullptr) dy2 += plane_at(blockIdx.z, dy2_batch, c, dy2_plane);
    if (dresidual != nullptr) dresidual += plane_at(blockIdx.z, dr_batch, c, dr_plane);
    const float scale = weight[c] * invstd[c], centre = mean[c];
    const float mean_g = coefficients[2 * c], slope = coefficients[2 * c + 1];
    FOR_PIXELS(i, pixels) {
        const float g = gated(dy, dy2, y, i);
        const float v = scale * (g - mean_g - (load(x + i) - centre) * slope);
        if (dresidual != nullptr) {
            store(dresidual + i, accumulate_residual ? load(dresidual + i) + g : g);
        }
        store(dx + i, accumulate ? load(dx + i) + v : v);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    batch_norm_statistics_f32(const float* x, float* partial, int pixels, int x_batch, int x_plane) {
    batch_norm_statistics(x, partial, pixels, x_batch, x_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    batch_norm_statistics_f16(const __half* x, float* partial, int pixels, int x_batch, int x_plane) {
    batch_norm_statistics(x, partial, pixels, x_batch, x_plane);
}

extern "C" __global__ void batch_norm_apply_f32(
    const float* x, const float* residual, float* y, const float* weight, const float* bias,
    const float* mean, const float* invstd, int act, int pixels, int x_batch, int x_plane,
    int r_batch, int r_plane, int y_batch, int y_plane) {
    batch_norm_apply(x, residual, y, weight, bias, mean, invstd, act, pixels, x_batch, x_plane,
                     r_batch, r_plane, y_batch, y_plane);
}

extern "C" __global__ void batch_norm_apply_f16(
    const __half* x, const __half* residual, __half* y, const float* weight, const float* bias,
    const float* mean, const float* invstd, int act, int pixels, int x_batch, int x_plane,
    int r_batch, int r_plane, int y_batch, int y_plane) {
    batch_norm_apply(x, residual, y, weight, bias, mean, invstd, act, pixels, x_batch, x_plane,
                     r_batch, r_plane, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    batch_norm_backward_sums_f32(const float* x, const float* y, const float* dy, const float* dy2,
                                 const float* mean, float* partial, int pixels, int x_batch,
                                 int x_plane, int y_batch, int y_plane, int dy_batch, int dy_plane,
                                 int dy2_batch, int dy2_plane) {
    batch_norm_backward_sums(x, y, dy, dy2, mean, partial, pixels, x_batch, x_plane, y_batch,
                             y_plane, dy_batch, dy_plane, dy2_batch, dy2_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    batch_norm_backward_sums_f16(const __half* x, const __half* y, const __half* dy, const __half* dy2,
                                 const float* mean, float* partial, int pixels, int x_batch,
                                 int x_plane, int y_batch, int y_plane, int dy_batch, int dy_plane,
                                 int dy2_batch, int dy2_plane) {
    batch_norm_backward_sums(x, y, dy, dy2, mean, partial, pixels, x_batch, x_plane, y_batch,
                             y_plane, dy_batch, dy_plane, dy2_batch, dy2_plane);
}

extern "C" __global__ void batch_norm_backward_apply_f32(
    const float* x, const float* y, const float* dy, const float* dy2, const float* weight,
    const float* mean, const float* invstd, const float* coefficients, float* dx, float* dresidual,
    int accumulate, int accumulate_residual, int pixels, int x_batch, int x_plane, int y_batch,
    int y_plane, int dy_batch, int dy_plane, int dy2_batch, int dy2_plane, int dx_batch,
    int dx_plane, int dr_batch, int dr_plane) {
    batch_norm_backward_apply(x, y, dy, dy2, weight, mean, invstd, coefficients, dx, dresidual,
                              accumulate, accumulate_residual, pixels, x_batch, x_plane, y_batch,
                              y_plane, dy_batch, dy_plane, dy2_batch, dy2_plane, dx_batch, dx_plane,
                              dr_batch, dr_plane);
}

extern "C" __global__ void batch_norm_backward_apply_f16(
    const __half* x, const __half* y, const __half* dy, const __half* dy2, const float* weight,
    const float* mean, const float* invstd, const float* coefficients, __half* dx, __half* dresidual,
    int accumulate, int accumulate_residual, int pixels, int x_batch, int x_plane, int y_batch,
    int y_plane, int dy_batch, int dy_plane, int dy2_batch, int dy2_plane, int dx_batch,
    int dx_plane, int dr_batch, int dr_plane) {
    batch_norm_backward_apply(x, y, dy, dy2, weight, mean, invstd, coefficients, dx, dresidual,
                              accumulate, accumulate_residual, pixels, x_batch, x_plane, y_batch,
                              y_plane, dy_batch, dy_plane, dy2_batch, dy2_plane, dx_batch, dx_plane,
                              dr_batch, dr_plane);
}
// Mean and 1 / sqrt(var + eps) of each channel; updates the running statistics (the variance
// unbiased, as PyTorch keeps it). One warp per channel.
extern "C" __global__ void batch_norm_finalize_f32(const float* RESTRICT partial,
                                                   float* RESTRICT mean,
                                                   float* RESTRICT invstd, float* running_mean,
                                                   float* running_var, int batch, int pieces,
                                                   int pixels, float eps, float momentum) {
    const int c = blockIdx.x, parts = batch * pieces;
    partial += 2 * static_cast<size_t>(c) * parts;
    const double count = static_cast<double>(batch) * pixels;
    double sum = 0.0;
    for (int i = threadIdx.x; i < parts; i += 32) {
        sum += static_cast<double>(partial[2 * i]) * piece_size(i % pieces, pixels);
    }
    const float rounded =
        static_cast<float>(__shfl_sync(0xffffffffu, warp_sum(sum), 0) / count);
    double squares = 0.0;
    for (int i = threadIdx.x; i < parts; i += 32) {
        const double d = static_cast<double>(partial[2 * i]) - rounded;
        squares += partial[2 * i + 1] + d * d * piece_size(i % pieces, pixels);
    }
    squares = warp_sum(squares);
    if (threadIdx.x != 0) return;
    mean[c] = rounded;
    invstd[c] = static_cast<float>(1.0 / sqrt(squares / count + eps));
    const float unbiased = static_cast<float>(squares / (count > 1.0 ? count - 1.0 : 1.0));
    running_mean[c] += momentum * (rounded - running_mean[c]);
    running_var[c] += momentum * (unbiased - running_var[c]);
}

// dweight, dbias, and per channel the two coefficients of apply: mean of g, and what (x - mean) is
// multiplied by. One warp per channel.
extern "C" __global__ void batch_norm_backward_finalize_f32(
    const float* RESTRICT partial, const float* RESTRICT invstd,
    float* RESTRICT dweight, float* RESTRICT dbias, float* RESTRICT coefficients,
    int batch, int pieces, int pixels) {
    const int c = blockIdx.x, parts = batch * pieces;
    partial += 2 * static_cast<size_t>(c) * parts;
    double sum_g = 0.0, sum_gx = 0.0;
    for (int i = threadIdx.x; i < parts; i += 32) {
        sum_g += partial[2 * i];
        sum_gx += partial[2 * i + 1];
    }
    sum_g = warp_sum(sum_g);
    sum_gx = warp_sum(sum_gx);
    if (threadIdx.x != 0) return;
    const double count = static_cast<double>(batch) * pixels, slope = sum_gx * invstd[c];
    dweight[c] = static_cast<float>(slope);
    dbias[c] = static_cast<float>(sum_g);
    coefficients[2 * c] = static_cast<float>(sum_g / count);
    coefficients[2 * c + 1] = static_cast<float>(slope / count * invstd[c]);
}
