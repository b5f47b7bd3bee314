// One Adam update of all parameters at once (Kingma & Ba 2015), weight decay added to the gradient:
//   g += decay * w;  m += (1 - beta1) (g - m);  v += (1 - beta2) (g^2 - v);
//   w -= rate * m / (sqrt(v) * root + eps),  rate = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t)
// t counts the updates that were made. Weights and moments are f32; what the matrix products of
// half-precision tensors read is a rounded copy of the weights.
//
// Loss scaling (Micikevicius et al. 2018): gradients in half precision are those of scale * loss.
// unscale divides the parameters' gradients, which are f32, and notes one that is not finite;
// prepare then leaves the update out and halves the scale, or doubles it after 2000 good updates.
// All of it on the device: the host launches the same three kernels whatever they find.
//
// Bytes: unscale 1 read and 1 write per parameter, adam 4 reads and 3 writes of 4 bytes.
// Launch: 256 threads, a thread per parameter; prepare one warp, one thread of which works.
#include "control.cuh"

namespace {

constexpr int GROWTH_INTERVAL = 2000;
constexpr float SMALLEST_SCALE = 1.0f, LARGEST_SCALE = 16777216.0f;

}  // namespace

extern "C" __global__ void unscale_f32(float* RESTRICT grads, Control* control, int len) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    const float g = grads[i] / control->loss_scale;
    grads[i] = g;
    // False for infinity and NaN. Whoever finds one writes the same.
    if (!(fabsf(g) <= 3.4028235e38f)) control->overflow = 1;
}

// `scaled`: whether gradients were scaled, and the scale is to be kept up.
extern "C" __global__ void adam_prepare(Control* control, int scaled) {
    if (threadIdx.x != 0) return;
    const int skip = scaled && control->overflow;
    control->skip = skip;
    if (skip) {
        control->skipped += 1;
        control->good_steps = 0;
        control->loss_scale = fmaxf(0.5f * control->loss_scale, SMALLEST_SCALE);
        return;
    }
    const double t = control->step - control->skipped;
    const double correction1 = 1.0 - pow(static_cast<double>(control->beta1), t);
    const double correction2 = 1.0 - pow(static_cast<double>(control->beta2), t);
    control->rate = static_cast<float>(control->lr / correction1);
    control->root = static_cast<float>(1.0 / sqrt(correction2));
    if (scaled && ++control->good_steps >= GROWTH_INTERVAL) {
        control->good_steps = 0;
        control->loss_scale = fminf(2.0f * control->loss_scale, LARGEST_SCALE);
    }
}

// `rounded` is null where no product reads half precision.
extern "C" __global__ void adam_f32(float* RESTRICT weights, __half* RESTRICT rounded,
                                    const float* RESTRICT grads, float* RESTRICT moment1,
                                    float* RESTRICT moment2,
                                    const Control* RESTRICT control, int len) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len || control->skip) return;
    const float w = weights[i], g = grads[i] + control->weight_decay * w;
    const float m = moment1[i] + (1.0f - control->beta1) * (g - moment1[i]);
    const float v = moment2[i] + (1.0f - control->beta2) * (g * g - moment2[i]);
    const float next = w - control->rate * m / (sqrtf(v) * control->root + control->eps);
    moment1[i] = m;
    moment2[i] = v;
    weights[i] = next;
    if (rounded != nullptr) rounded[i] = __float2half(next);
}
