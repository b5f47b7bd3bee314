// Every second row and column, y[n][c][i][j] = x[n][c][2 i][2 j]: what the even-dilated branches of a
// strided block read. Where a 1x1 convolution follows, it reads so itself (conv1x1.cu) instead.
// Bytes: y written, twice as much of x touched (half of every even row). No shared memory.
// Launch: 256 threads, grid (ceil(pixels of y / 1024), C, N): launch::planes().
#include "common.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void subsample(const T* RESTRICT x, T* RESTRICT y, int in_w,
                                          int out_w, int pixels, int x_batch, int x_plane,
                                          int y_batch, int y_plane) {
    x += plane_at(blockIdx.z, x_batch, blockIdx.y, x_plane);
    y += plane_at(blockIdx.z, y_batch, blockIdx.y, y_plane);
    FOR_PIXELS(i, pixels) {
        const int row = i / out_w;
        y[i] = x[static_cast<size_t>(2 * row) * in_w + 2 * (i - row * out_w)];
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    subsample_f32(const float* x, float* y, int in_w, int out_w, int pixels, int x_batch,
                  int x_plane, int y_batch, int y_plane) {
    subsample(x, y, in_w, out_w, pixels, x_batch, x_plane, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    subsample_f16(const __half* x, __half* y, int in_w, int out_w, int pixels, int x_batch,
                  int x_plane, int y_batch, int y_plane) {
    subsample(x, y, in_w, out_w, pixels, x_batch, x_plane, y_batch, y_plane);
}
