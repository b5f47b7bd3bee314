// Softmax cross-entropy, weighted mean over labelled pixels, and its gradient. With z the logits of a
// pixel of class t, w_t that class's weight, M = sum of w_t over labelled pixels, p = softmax(z):
//   loss = 1 / M * sum of w_t (log sum_c exp(z_c) - z_t),  dz_c = (p_c - [c = t]) w_t / M, 0 where void.
// A label not below the number of classes is void. 1 / M comes from memory: no launch depends on it.
// In half precision dz is stored times the loss scale (adam.cu).
//
// Bytes: z three times (the second and third from L2 mostly), dz once. A thread per pixel, 256 per
// block, grid (ceil(pixels / 256), 1, N); partial losses of the blocks are added in their order.
#include "control.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void cross_entropy(const T* RESTRICT logits,
                                              const unsigned char* RESTRICT labels,
                                              T* RESTRICT dlogits, float* RESTRICT partial,
                                              const float* RESTRICT class_weights,
                                              float gradient_scale, int classes, int pixels,
                                              int z_batch, int z_plane, int dz_batch,
                                              int dz_plane) {
    __shared__ float shared[32];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float loss[1] = {0.0f};
    if (i < pixels) {
        const int label = labels[static_cast<size_t>(blockIdx.z) * pixels + i];
        const T* z = logits + plane_at(blockIdx.z, z_batch, 0, 0) + i;
        T* dz = dlogits + plane_at(blockIdx.z, dz_batch, 0, 0) + i;
        if (label < classes) {
            float largest = load(z);
            for (int c = 1; c < classes; ++c) {
                const float v = load(z + static_cast<size_t>(c) * z_plane);
                largest = v > largest ? v : largest;
            }
            float sum = 0.0f;
            for (int c = 0; c < classes; ++c) {
                sum += expf(load(z + static_cast<size_t>(c) * z_plane) - largest);
            }
            const float weight = class_weights[label];
            loss[0] = logf(sum) + largest - load(z + static_cast<size_t>(label) * z_plane);
            loss[0] *= weight;
            const float scale = gradient_scale * weight;
            const float share = scale / sum;
            for (int c = 0; c < classes; ++c) {
                const float e = expf(load(z + static_cast<size_t>(c) * z_plane) - largest);
                store(dz + static_cast<size_t>(c) * dz_plane,
                      e * share - (c == label ? scale : 0.0f));
            }
        } else {
            for (int c = 0; c < classes; ++c) store(dz + static_cast<size_t>(c) * dz_plane, 0.0f);
        }
    }
    block_sum(loss, shared);
    if (threadIdx.x == 0) {
        partial[static_cast<size_t>(blockIdx.z) * gridDim.x + blockIdx.x] = loss[0];
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_f32(const float* logits, const unsigned char* labels, float* dlogits,
                      float* partial, const Control* control, int classes, int pixels, int z_batch,
                      int z_plane, int dz_batch, int dz_plane) {
    cross_entropy(logits, labels, dlogits, partial, control->class_weights, control->inverse_total,
                  classes, pixels, z_batch, z_plane, dz_batch, dz_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_f16(const __half* logits, const unsigned char* labels, __half* dlogits,
                      float* partial, const Control* control, int classes, int pixels, int z_batch,
                      int z_plane, int dz_batch, int dz_plane) {
    const float scale = control->inverse_total * control->loss_scale;
    cross_entropy(logits, labels, dlogits, partial, control->class_weights, scale, classes, pixels,
                  z_batch, z_plane, dz_batch, dz_plane);
}

// loss = sum of the partial losses / M, added to the sum over steps; one warp.
extern "C" __global__ void cross_entropy_finish_f32(const float* RESTRICT partial,
                                                    Control* control, int parts) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < parts; i += 32) sum += partial[i];
    sum = warp_sum(sum);
    if (threadIdx.x != 0) return;
    control->loss = static_cast<float>(sum * control->inverse_total);
    control->loss_sum += control->loss;
    control->overflow = 0;
}
