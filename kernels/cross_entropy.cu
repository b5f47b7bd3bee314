// Softmax cross-entropy, mean over labelled pixels, and its gradient. With z the logits of a pixel
// of class t, M labelled pixels, p = softmax(z):
//   loss = 1 / M * sum of (log sum_c exp(z_c) - z_t),  dz_c = (p_c - [c = t]) / M, 0 where void.
// A label not below the number of classes is void. 1 / M comes from memory: no launch depends on it.
//
// Bytes: z three times (the second and third from L2 mostly), dz once. A thread per pixel, 256 per
// block, grid (ceil(pixels / 256), 1, N); partial losses of the blocks are added in their order.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_f32(const float* __restrict__ logits, const unsigned char* __restrict__ labels,
                      float* __restrict__ dlogits, float* __restrict__ partial,
                      const float* __restrict__ inverse_count, int classes, int pixels, int z_batch,
                      int z_plane, int dz_batch, int dz_plane) {
    __shared__ float shared[32];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float loss[1] = {0.0f};
    if (i < pixels) {
        const int label = labels[static_cast<size_t>(blockIdx.z) * pixels + i];
        const float* z = logits + plane_at(blockIdx.z, z_batch, 0, 0) + i;
        float* dz = dlogits + plane_at(blockIdx.z, dz_batch, 0, 0) + i;
        if (label < classes) {
            float largest = z[0];
            for (int c = 1; c < classes; ++c) {
                const float v = z[static_cast<size_t>(c) * z_plane];
                largest = v > largest ? v : largest;
            }
            float sum = 0.0f;
            for (int c = 0; c < classes; ++c) {
                sum += expf(z[static_cast<size_t>(c) * z_plane] - largest);
            }
            loss[0] = logf(sum) + largest - z[static_cast<size_t>(label) * z_plane];
            const float scale = *inverse_count, share = scale / sum;
            for (int c = 0; c < classes; ++c) {
                const float e = expf(z[static_cast<size_t>(c) * z_plane] - largest);
                dz[static_cast<size_t>(c) * dz_plane] = e * share - (c == label ? scale : 0.0f);
            }
        } else {
            for (int c = 0; c < classes; ++c) dz[static_cast<size_t>(c) * dz_plane] = 0.0f;
        }
    }
    block_sum(loss, shared);
    if (threadIdx.x == 0) {
        partial[static_cast<size_t>(blockIdx.z) * gridDim.x + blockIdx.x] = loss[0];
    }
}

// loss = sum of the partial losses / M; one warp.
extern "C" __global__ void cross_entropy_finish_f32(const float* __restrict__ partial,
                                                    const float* __restrict__ inverse_count,
                                                    float* __restrict__ loss, int parts) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < parts; i += 32) sum += partial[i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) *loss = static_cast<float>(sum * *inverse_count);
}
