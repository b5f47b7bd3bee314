// Fusion of a mutual-embedding upsampling module (paper, section 3.2):
// out = l * ca + upsample(h) * sa, with U = upsample(h)
//   dl = dy * ca,  dca[c] = sum over p of dy * l,  dsa[p] = sum over c of dy * U,
//   dh = upsample^T(dy * sa).
//
// Forward: a thread makes one pixel of 8 channels. Bytes: l and out once, h once (its reuse is in
// L1), sa once per 8 channels. Block (32, 8), grid (tiles, groups of 8 channels, N).
// Backward: low (dl and dca: a block of 256 threads per plane, 32 floats of shared memory), spatial
// (dsa: a thread per pixel over all channels), high (dh: a thread per low-resolution pixel gathers).
// `sa` is null without spatial attention (then 1). Bound by memory throughout.
#include "bilinear.cuh"

namespace {

constexpr int MEU_CHANNELS = 8;

template <typename T>
__device__ __forceinline__ void meu_fuse_forward(const T* RESTRICT h, const T* RESTRICT l,
                                                 const T* RESTRICT ca,
                                                 const T* RESTRICT sa, T* RESTRICT y,
                                                 int channels, int in_h, int in_w, int out_h,
                                                 int out_w, int h_batch, int h_plane, int l_batch,
                                                 int l_plane, int ca_batch, int ca_plane,
                                                 int sa_batch, int y_batch, int y_plane) {
    const int tiles_x = (out_w + 31) / 32;
    const int ox = blockIdx.x % tiles_x * 32 + threadIdx.x;
    const int oy = blockIdx.x / tiles_x * 8 + threadIdx.y;
    if (ox >= out_w || oy >= out_h) return;
    const Tap row = tap(oy, in_h, out_h), column = tap(ox, in_w, out_w);
    const size_t p = static_cast<size_t>(oy) * out_w + ox;
    const float gate = sa != nullptr ? load(sa + plane_at(blockIdx.z, sa_batch, 0, 0) + p) : 1.0f;
    const int last = min(channels, (static_cast<int>(blockIdx.y) + 1) * MEU_CHANNELS);
    for (int c = blockIdx.y * MEU_CHANNELS; c < last; ++c) {
        const float up = sample(h + plane_at(blockIdx.z, h_batch, c, h_plane), in_w, row, column);
        const float low = load(l + plane_at(blockIdx.z, l_batch, c, l_plane) + p);
        const float open = load(ca + plane_at(blockIdx.z, ca_batch, c, ca_plane));
        store(y + plane_at(blockIdx.z, y_batch, c, y_plane) + p, up * gate + low * open);
    }
}

template <typename T>
__device__ __forceinline__ void meu_fuse_backward_low(const T* RESTRICT dy,
                                                      const T* RESTRICT l,
                                                      const T* RESTRICT ca, T* dl, T* dca,
                                                      int accumulate_l, int accumulate_ca,
                                                      int pixels, int dy_batch, int dy_plane,
                                                      int l_batch, int l_plane, int ca_batch,
                                                      int ca_plane, int dl_batch, int dl_plane,
                                                      int dca_batch, int dca_plane) {
    __shared__ float shared[32];
    dy += plane_at(blockIdx.z, dy_batch, blockIdx.y, dy_plane);
    l += plane_at(blockIdx.z, l_batch, blockIdx.y, l_plane);
    dl += plane_at(blockIdx.z, dl_batch, blockIdx.y, dl_plane);
    const float open = load(ca + plane_at(blockIdx.z, ca_batch, blockIdx.y, ca_plane));
    float sum[1] = {0.0f};
    for (int i = threadIdx.x; i < pixels; i += blockDim.x) {
        const float g = load(dy + i);
        sum[0] += g * load(l + i);
        store(dl + i, accumulate_l ? load(dl + i) + g * open : g * open);
    }
    block_sum(sum, shared);
    if (threadIdx.x == 0) {
        T* target = dca + plane_at(blockIdx.z, dca_batch, blockIdx.y, dca_plane);
        store(target, accumulate_ca ? load(target) + sum[0] : sum[0]);
    }
}

template <typename T>
__device__ __forceinline__ void meu_fuse_backward_spatial(const T* RESTRICT dy,
                                                          const T* RESTRICT h, T* dsa,
                                                          int accumulate, int channels, int in_h,
                                                          int in_w, int out_h, int out_w,
                                                          int dy_batch, int dy_plane, int h_batch,
                                                          int h_plane, int dsa_batch) {
    const int tiles_x = (out_w + 31) / 32;
    const int ox = blockIdx.x % tiles_x * 32 + threadIdx.x;
    const int oy = blockIdx.x / tiles_x * 8 + threadIdx.y;
    if (ox >= out_w || oy >= out_h) return;
    const Tap row = tap(oy, in_h, out_h), column = tap(ox, in_w, out_w);
    const size_t p = static_cast<size_t>(oy) * out_w + ox;
    float sum = 0.0f;
    for (int c = 0; c < channels; ++c) {
        const float up = sample(h + plane_at(blockIdx.z, h_batch, c, h_plane), in_w, row, column);
        sum += load(dy + plane_at(blockIdx.z, dy_batch, c, dy_plane) + p) * up;
    }
    T* target = dsa + plane_at(blockIdx.z, dsa_batch, 0, 0) + p;
    store(target, accumulate ? load(target) + sum : sum);
}

template <typename T>
__device__ __forceinline__ void meu_fuse_backward_high(const T* RESTRICT dy,
                                                       const T* RESTRICT sa, T* dh,
                                                       int accumulate, int in_h, int in_w,
                                                       int out_h, int out_w, int dy_batch,
                                                       int dy_plane, int sa_batch, int dh_batch,
                                                       int dh_plane) {
    const int tiles_x = (in_w + 31) / 32;
    const int qx = blockIdx.x % tiles_x * 32 + threadIdx.x;
    const int qy = blockIdx.x / tiles_x * 8 + threadIdx.y;
    if (qx >= in_w || qy >= in_h) return;
    dy += plane_at(blockIdx.z, dy_batch, blockIdx.y, dy_plane);
    if (sa != nullptr) sa += plane_at(blockIdx.z, sa_batch, 0, 0);
    T* target = dh + plane_at(blockIdx.z, dh_batch, blockIdx.y, dh_plane) +
                static_cast<size_t>(qy) * in_w + qx;
    const float g = sample_transposed(dy, sa, qy, qx, in_h, in_w, out_h, out_w);
    store(target, accumulate ? load(target) + g : g);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    meu_fuse_forward_f32(const float* h, const float* l, const float* ca, const float* sa, float* y,
                         int channels, int in_h, int in_w, int out_h, int out_w, int h_batch,
                         int h_plane, int l_batch, int l_plane, int ca_batch, int ca_plane,
                         int sa_batch, int y_batch, int y_plane) {
    meu_fuse_forward(h, l, ca, sa, y, channels, in_h, in_w, out_h, out_w, h_batch, h_plane, l_batch,
                     l_plane, ca_batch, ca_plane, sa_batch, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    meu_fuse_forward_f16(const __half* h, const __half* l, const __half* ca, const __half* sa,
                         __half* y, int channels, int in_h, int in_w, int out_h, int out_w,
                         int h_batch, int h_plane, int l_batch, int l_plane, int ca_batch,
                         int ca_plane, int sa_batch, int y_batch, int y_plane) {
    meu_fuse_forward(h, l, ca, sa, y, channels, in_h, in_w, out_h, out_w, h_batch, h_plane, l_batch,
                     l_plane, ca_batch, ca_plane, sa_batch, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    meu_fuse_backward_low_f32(const float* dy, const float* l, const float* ca, float* dl, float* dca,
                              int accumulate_l, int accumulate_ca, int pixels, int dy_batch,
                              int dy_plane, int l_batch, int l_plane, int ca_batch, int ca_plane,
                              int dl_batch, int dl_plane, int dca_batch, int dca_plane) {
    meu_fuse_backward_low(dy, l, ca, dl, dca, accumulate_l, accumulate_ca, pixels, dy_batch,
                          dy_plane, l_batch, l_plane, ca_batch, ca_plane, dl_batch, dl_plane,
                          dca_batch, dca_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    meu_fuse_backward_low_f16(const __half* dy, const __half* l, const __half* ca, __half* dl, __half* dca,
                              int accumulate_l, int accumulate_ca, int pixels, int dy_batch,
                              int dy_plane, int l_batch, int l_plane, int ca_batch, int ca_plane,
                              int dl_batch, int dl_plane, int dca_batch, int dca_plane) {
    meu_fuse_backward_low(dy, l, ca, dl, dca, accumulate_l, accumulate_ca, pixels, dy_batch,
                          dy_plane, l_batch, l_plane, ca_batch, ca_plane, dl_batch, dl_plane,
                          dca_batch, dca_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    meu_fuse_backward_spatial_f32(const float* dy, const float* h, float* dsa, int accumulate,
                                  int channels, int in_h, int in_w, int out_h, int out_w,
                                  int dy_batch, int dy_plane, int h_batch, int h_plane,
                                  int dsa_batch) {
    meu_fuse_backward_spatial(dy, h, dsa, accumulate, channels, in_h, in_w, out_h, out_w, dy_batch,
                              dy_plane, h_batch, h_plane, dsa_batch);
}

extern "C" __global__ void __launch_bounds__(256)
    meu_fuse_backward_spatial_f16(const __half* dy, const __half* h, __half* dsa, int accumulate,
                                  int channels, int in_h, int in_w, int out_h, int out_w,
                                  int dy_batch, int dy_plane, int h_batch, int h_plane,
                                  int dsa_batch) {
    meu_fuse_backward_spatial(dy, h, dsa, accumulate, channels, in_h, in_w, out_h, out_w, dy_batch,
                              dy_plane, h_batch, h_plane, dsa_batch);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    meu_fuse_backward_high_f32(const float* dy, const float* sa, float* dh, int accumulate, int in_h,
                               int in_w, int out_h, int out_w, int dy_batch, int dy_plane,
                               int sa_batch, int dh_batch, int dh_plane) {
    meu_fuse_backward_high(dy, sa, dh, accumulate, in_h, in_w, out_h, out_w, dy_batch, dy_plane,
                           sa_batch, dh_batch, dh_plane);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    meu_fuse_backward_high_f16(const __half* dy, const __half* sa, __half* dh, int accumulate, int in_h,
                               int in_w, int out_h, int out_w, int dy_batch, int dy_plane,
                               int sa_batch, int dh_batch, int dh_plane) {
    meu_fuse_backward_high(dy, sa, dh, accumulate, in_h, in_w, out_h, out_w, dy_batch, dy_plane,
                           sa_batch, dh_batch, dh_plane);
}
