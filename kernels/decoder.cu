// The gates of the collapsed decoder (graph/passes/collapse.rs), a launch for each thing that all
// pixels have to be known for, instead of one for every small operator (decoder_sums.cu: one for all):
//   decoder_spatial: sa1 = act(w1 x1 + b1), sa2 = act(w2 x2 + b2), a thread per pixel of either.
//     Bytes: x1, x2 once. Launch: 256 threads, grid (blocks of both, 1, N).
//   (weighted_pool_gather, weighted_pool.cu: g = U^T sa2.)
//   decoder_means: means of s3 and x2 over pixels, of s3 under the weights g, of sa2: a block per
//     channel of s3, of x2, and one; f32. Bytes: s3, x2, sa2 once, g per channel out of L2. Launch:
//     256 threads, grid (1, c3 + c2 + 1, N).
//   decoder_gates: with those means, all in shared memory, a warp per row of a matrix:
//     ca2 = act(Wca2 mean(s3)), low = Wl2 mean(x2), high = [Wh2 bh2] weighted, each with its bias,
//     ca1 = act(Wca1 (high + low ca2)); then the composed maps of both modules (meu_scores.cu).
//     Every block computes the gates, and 256 elements of the maps. Launch: 256 threads, grid
//     (elements of both maps / 256, 1, N). Shared: (2 c3 + c2 + 1 + 3 width2 + width1) floats.
#include "decoder.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void decoder_spatial(const T* RESTRICT x1, const T* RESTRICT x2,
                                                const float* RESTRICT w1,
                                                const float* RESTRICT b1,
                                                const float* RESTRICT w2,
                                                const float* RESTRICT b2, T* RESTRICT y1,
                                                T* RESTRICT y2, int act1, int act2, int c1,
                                                int c2, int pixels1, int pixels2, int x1_batch,
                                                int x1_plane, int x2_batch, int x2_plane,
                                                int y1_batch, int y2_batch) {
    start_next();
    wait_for_previous();
    const int blocks1 = (pixels1 + blockDim.x - 1) / blockDim.x;
    const bool one = blockIdx.x < blocks1;
    const int p = (one ? blockIdx.x : blockIdx.x - blocks1) * blockDim.x + threadIdx.x;
    if (p >= (one ? pixels1 : pixels2)) return;
    const T* from = one ? x1 + plane_at(blockIdx.z, x1_batch, 0, 0) + p
                        : x2 + plane_at(blockIdx.z, x2_batch, 0, 0) + p;
    const float* w = one ? w1 : w2;
    const int channels = one ? c1 : c2, plane = one ? x1_plane : x2_plane;
    float v = one ? b1[0] : b2[0];
#pragma unroll 8
    for (int c = 0; c < channels; ++c) v += w[c] * load(from + static_cast<size_t>(c) * plane);
    T* to = one ? y1 + plane_at(blockIdx.z, y1_batch, 0, 0) : y2 + plane_at(blockIdx.z, y2_batch, 0, 0);
    store(to + p, activate(v, one ? act1 : act2));
}

// means: c3 of s3, c2 of x2, c3 of s3 under the weights, 1 of the weights. low, high: pixels of s3,
// and of x2 and the weights.
template <typename T>
__device__ __forceinline__ void decoder_means(const T* RESTRICT s3, const T* RESTRICT x2,
                                              const T* RESTRICT weights,
                                              const float* RESTRICT gathered,
                                              float* RESTRICT means, int c3, int c2, int low,
                                              int high, int s_batch, int s_plane, int x_batch,
                                              int x_plane, int w_batch) {
    __shared__ float shared[2 * 32];
    start_next();
    wait_for_previous();
    const int row = blockIdx.y;
    means += static_cast<size_t>(blockIdx.z) * (2 * c3 + c2 + 1);
    float sums[2] = {0.0f, 0.0f};
    if (row < c3) {
        s3 += plane_at(blockIdx.z, s_batch, row, s_plane);
        gathered += static_cast<size_t>(blockIdx.z) * low;
        for (int i = threadIdx.x; i < low; i += blockDim.x) {
            const float v = load(s3 + i);
            sums[0] += v;
            sums[1] += v * gathered[i];
        }
    } else {
        const T* plane = row < c3 + c2 ? x2 + plane_at(blockIdx.z, x_batch, row - c3, x_plane)
                                       : weights + plane_at(blockIdx.z, w_batch, 0, 0);
        for (int i = threadIdx.x; i < high; i += blockDim.x) sums[0] += load(plane + i);
    }
    block_sum(sums, shared);
    if (threadIdx.x != 0) return;
    if (row < c3) {
        means[row] = sums[0] / low;
        means[c3 + c2 + row] = sums[1] / high;
    } else {
        means[row < c3 + c2 ? row : 2 * c3 + c2] = sums[0] / high;
    }
}

// Element i of A diag(ca) [Wl bl] + [0 b], transposed: [in + 1][classes].
__device__ __forceinline__ void compose(const float* RESTRICT mix,
                                        const float* RESTRICT low,
                                        const float* RESTRICT low_bias,
                                        const float* RESTRICT bias, const float* ca,
                                        float* RESTRICT composed, int i, int classes, int width,
                                        int in) {
    const int c = i / (in + 1), k = i % (in + 1);
    float sum = k == in ? bias[c] : 0.0f;
    for (int o = 0; o < width; ++o) {
        sum += mix[c * width + o] * ca[o] * (k == in ? low_bias[o] : low[o * in + k]);
    }
    composed[k * classes + c] = sum;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    decoder_spatial_f32(const float* x1, const float* x2, const float* w1, const float* b1,
                        const float* w2, const float* b2, float* y1, float* y2, int act1, int act2,
                        int c1, int c2, int pixels1, int pixels2, int x1_batch, int x1_plane,
                        int x2_batch, int x2_plane, int y1_batch, int y2_batch) {
    decoder_spatial(x1, x2, w1, b1, w2, b2, y1, y2, act1, act2, c1, c2, pixels1, pixels2, x1_batch,
                    x1_plane, x2_batch, x2_plane, y1_batch, y2_batch);
}

extern "C" __global__ void __launch_bounds__(256)
    decoder_spatial_f16(const __half* x1, const __half* x2, const float* w1, const float* b1,
                        const float* w2, const float* b2, __half* y1, __half* y2, int act1,
                        int act2, int c1, int c2, int pixels1, int pixels2, int x1_batch,
                        int x1_plane, int x2_batch, int x2_plane, int y1_batch, int y2_batch) {
    decoder_spatial(x1, x2, w1, b1, w2, b2, y1, y2, act1, act2, c1, c2, pixels1, pixels2, x1_batch,
                    x1_plane, x2_batch, x2_plane, y1_batch, y2_batch);
}

extern "C" __global__ void __launch_bounds__(256)
    decoder_means_f32(const float* s3, const float* x2, const float* weights, const float* gathered,
                      float* means, int c3, int c2, int low, int high, int s_batch, int s_plane,
                      int x_batch, int x_plane, int w_batch) {
    decoder_means(s3, x2, weights, gathered, means, c3, c2, low, high, s_batch, s_plane, x_batch,
                  x_plane, w_batch);
}

extern "C" __global__ void __launch_bounds__(256)
    decoder_means_f16(const __half* s3, const __half* x2, const __half* weights,
                      const float* gathered, float* means, int c3, int c2, int low, int high,
                      int s_batch, int s_plane, int x_batch, int x_plane, int w_batch) {
    decoder_means(s3, x2, weights, gathered, means, c3, c2, low, high, s_batch, s_plane, x_batch,
                  x_plane, w_batch);
}

// x2 has c2 channels, x1 has in1.
extern "C" __global__ void __launch_bounds__(256)
    decoder_gates_f32(const float* RESTRICT means, const float* RESTRICT ca2_w,
                      const float* RESTRICT ca2_b, const float* RESTRICT low_w,
                      const float* RESTRICT low_b, const float* RESTRICT high_w,
                      const float* RESTRICT high_b, const float* RESTRICT ca1_w,
                      const float* RESTRICT ca1_b, const float* RESTRICT mix2,
                      const float* RESTRICT wl2, const float* RESTRICT bl2,
                      const float* RESTRICT bias2, const float* RESTRICT mix1,
                      const float* RESTRICT wl1, const float* RESTRICT bl1,
                      const float* RESTRICT bias1, float* RESTRICT composed2,
                      float* RESTRICT composed1, int act2, int act1, int c3, int c2, int width2,
                      int width1, int in1, int classes) {
    DYNAMIC_SHARED(float, pooled);
    start_next();
    wait_for_previous();
    const int count = 2 * c3 + c2 + 1;
    float* ca2 = pooled + count;
    float* low = ca2 + width2;
    float* high = low + width2;
    float* ca1 = high + width2;
    means += static_cast<size_t>(blockIdx.z) * count;
    for (int i = threadIdx.x; i < count; i += blockDim.x) pooled[i] = means[i];
    __syncthreads();
    rows(ca2_w, ca2_b, pooled, ca2, width2, c3, act2);
    rows(low_w, low_b, pooled + c3, low, width2, c2, 0);
    rows(high_w, high_b, pooled + c3 + c2, high, width2, c3 + 1, 0);
    __syncthreads();
    for (int i = threadIdx.x; i < width2; i += blockDim.x) high[i] += low[i] * ca2[i];
    __syncthreads();
    rows(ca1_w, ca1_b, high, ca1, width1, width2, act1);
    __syncthreads();
    const int elements2 = classes * (c2 + 1), elements1 = classes * (in1 + 1);
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < elements2) {
        composed2 += static_cast<size_t>(blockIdx.z) * elements2;
        compose(mix2, wl2, bl2, bias2, ca2, composed2, i, classes, width2, c2);
    } else if (i < elements2 + elements1) {
        composed1 += static_cast<size_t>(blockIdx.z) * elements1;
        compose(mix1, wl1, bl1, bias1, ca1, composed1, i - elements2, classes, width1, in1);
    }
}
