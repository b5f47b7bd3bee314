// One Adam update of all parameters at once (Kingma & Ba 2015), weight decay added to the gradient:
//   g += decay * w;  m += (1 - beta1) (g - m);  v += (1 - beta2) (g^2 - v);
//   w -= rate * m / (sqrt(v) * root + eps),  rate = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t)
//
// Bytes: 4 reads and 3 writes of 4 bytes per parameter. Launch: 256 threads, a thread per parameter.
#include "common.cuh"

extern "C" __global__ void adam_f32(float* __restrict__ weights, const float* __restrict__ grads,
                                    float* __restrict__ moment1, float* __restrict__ moment2,
                                    int len, float rate, float root, float beta1, float beta2,
                                    float eps, float weight_decay) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    const float w = weights[i], g = grads[i] + weight_decay * w;
    const float m = moment1[i] + (1.0f - beta1) * (g - moment1[i]);
    const float v = moment2[i] + (1.0f - beta2) * (g * g - moment2[i]);
    moment1[i] = m;
    moment2[i] = v;
    weights[i] = w - rate * m / (sqrtf(v) * root + eps);
}
