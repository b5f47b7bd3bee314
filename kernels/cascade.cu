// The depthwise dilated cascade of an FPE block (paper, section 3.1, Fig. 2). Channel j of all
// branches is a chain: u_i = D_i(s_i), s_1 = x_1, s_i = x_i + y_(i-1) (or x_i without addition),
// D_i a depthwise 3x3 convolution of dilation d_i, padding d_i, stride 1 or 2.
//
// Inference, cascade_forward (cascade_walk.cu is the other way to do it): y_i = relu(D_i(s_i) + bias_i), batch norm folded; all branches in one
// launch. A block takes one chain of one image, either the whole plane (then y may be x) or a tile
// of the output with a halo: branch i is computed as far beyond the tile as the following branches
// read, the sum of their dilations. s_i and y_i are in shared memory, in f32.
// Bytes: x once (plus halos), y once. FLOPs: 18 per output. Shared: 2 regions of f32 (1 where
// nothing is carried from branch to branch). With stride 2 an even dilation reads even rows and
// columns only: a stride-1 convolution of half the dilation on the subsampled plane.
// Launch: block (32, 8, 16 or 32), grid (tiles, chains, N): launch::cascade_forward().
//
// Training goes branch by branch, since batch norm needs the statistics of all of u_i:
// depthwise_forward writes u_i; its backward is depthwise_backward_data (ds_i = D_i^T du_i, gathered)
// and depthwise_backward_weight (nine sums per chain in two levels). They read global memory
// directly, the reuse of the nine taps is L1's.
#include "cascade.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void cascade_forward(const T* x, T* y, const float* RESTRICT params,
                                                int branches, int addition, int stride,
                                                Four dilations, Four weights, Four biases,
                                                int region, int tile_h, int tile_w, int in_h,
                                                int in_w, int out_h, int out_w, int x_batch,
                                                int x_plane, int y_batch, int y_plane) {
    DYNAMIC_SHARED(float, s);
    float* carried = s + region;
    const int chain = blockIdx.y, width = gridDim.y;
    const int tiles_x = (out_w + tile_w - 1) / tile_w;
    const int ty0 = blockIdx.x / tiles_x * tile_h, ty1 = min(ty0 + tile_h, out_h);
    const int tx0 = blockIdx.x % tiles_x * tile_w, tx1 = min(tx0 + tile_w, out_w);

    // How far beyond the tile the following branches read.
    int reach = 0;
    if (addition) {
        for (int i = 1; i < branches; ++i) reach += dilations.at(i);
    }
    start_next();
    wait_for_previous();
    for (int branch = 0; branch < branches; ++branch) {
        const int dilation = dilations.at(branch);
        if (addition && branch > 0) reach -= dilation;
        const int sub = stride == 2 && dilation % 2 == 0 ? 2 : 1;
        const int step = stride / sub, d = dilation / sub;
        const int h = (in_h + sub - 1) / sub, w = (in_w + sub - 1) / sub;
        const int oy0 = max(ty0 - reach, 0), oy1 = min(ty1 + reach, out_h);
        const int ox0 = max(tx0 - reach, 0), ox1 = min(tx1 + reach, out_w);
        // What these outputs read; with addition exactly the region that the branch before made.
        const int iy0 = max(oy0 * step - d, 0), iy1 = min((oy1 - 1) * step + d + 1, h);
        const int ix0 = max(ox0 * step - d, 0), ix1 = min((ox1 - 1) * step + d + 1, w);
        const int pitch = ix1 - ix0;

        const T* plane = x + plane_at(blockIdx.z, x_batch, branch * width + chain, x_plane);
        for (int iy = iy0 + static_cast<int>(threadIdx.y); iy < iy1; iy += blockDim.y) {
            const T* row = plane + static_cast<size_t>(iy) * sub * in_w;
            for (int ix = ix0 + static_cast<int>(threadIdx.x); ix < ix1; ix += blockDim.x) {
                const int at = (iy - iy0) * pitch + ix - ix0;
                float v = load(row + ix * sub);
                if (addition && branch > 0) v += carried[at];
                s[at] = v;
            }
        }
        __syncthreads();

        float k[9];
        const float* kernel = params + weights.at(branch) + 9 * chain;
#pragma unroll
        for (int t = 0; t < 9; ++t) k[t] = kernel[t];
        const float bias = params[biases.at(branch) + chain];
        const bool carry = addition && branch + 1 < branches;
        T* out = y + plane_at(blockIdx.z, y_batch, branch * width + chain, y_plane);
        for (int oy = oy0 + static_cast<int>(threadIdx.y); oy < oy1; oy += blockDim.y) {
            for (int ox = ox0 + static_cast<int>(threadIdx.x); ox < ox1; ox += blockDim.x) {
                float sum = bias;
#pragma unroll
                for (int r = 0; r < 3; ++r) {
                    const int iy = oy * step + (r - 1) * d;
                    if (iy < 0 || iy >= h) continue;
                    const float* line = s + (iy - iy0) * pitch - ix0;
#pragma unroll
                    for (int c = 0; c < 3; ++c) {
                        const int ix = ox * step + (c - 1) * d;
                        if (ix >= 0 && ix < w) sum += k[3 * r + c] * line[ix];
                    }
                }
                const float v = relu(sum);
                if (carry) carried[(oy - oy0) * (ox1 - ox0) + ox - ox0] = v;
                if (oy >= ty0 && oy < ty1 && ox >= tx0 && ox < tx1) {
                    store(out + static_cast<size_t>(oy) * out_w + ox, v);
                }
            }
        }
        __syncthreads();
    }
}

// u = D(x + before), with bias and ReLU where asked for; `before` and `bias` may be null.
template <typename T>
__device__ __forceinline__ void depthwise_forward(const T* RESTRICT x,
                                                  const T* RESTRICT before,
                                                  const float* RESTRICT weights,
                                                  const float* RESTRICT bias,
                                                  T* RESTRICT u, int rectify, int dilation,
                                                  int stride, int in_h, int in_w, int out_h,
                                                  int out_w, int x_batch, int x_plane, int b_batch,
                                                  int b_plane, int u_batch, int u_plane) {
    const int chain = blockIdx.y, tiles_x = (out_w + 31) / 32;
    const int ox = blockIdx.x % tiles_x * 32 + threadIdx.x;
    const int oy = blockIdx.x / tiles_x * 8 + threadIdx.y;
    if (ox >= out_w || oy >= out_h) return;
    x += plane_at(blockIdx.z, x_batch, chain, x_plane);
    if (before != nullptr) before += plane_at(blockIdx.z, b_batch, chain, b_plane);
    float sum = bias != nullptr ? bias[chain] : 0.0f;
#pragma unroll
    for (int t = 0; t < 9; ++t) {
        const int iy = oy * stride + (t / 3 - 1) * dilation;
        const int ix = ox * stride + (t % 3 - 1) * dilation;
        if (iy < 0 || iy >= in_h || ix < 0 || ix >= in_w) continue;
        const size_t at = static_cast<size_t>(iy) * in_w + ix;
        float v = load(x + at);
        if (before != nullptr) v += load(before + at);
        sum += weights[9 * chain + t] * v;
    }
    store(u + plane_at(blockIdx.z, u_batch, chain, u_plane) + static_cast<size_t>(oy) * out_w + ox,
          rectify ? relu(sum) : sum);
}

// ds = D^T du over the input's pixels.
template <typename T>
__device__ __forceinline__ void depthwise_backward_data(const T* RESTRICT du,
                                                        const float* RESTRICT weights,
                                                        T* RESTRICT ds, int dilation,
                                                        int stride, int in_h, int in_w, int out_h,
                                                        int out_w, int du_batch, int du_plane,
                                                        int ds_batch, int ds_plane) {
    const int chain = blockIdx.y, tiles_x = (in_w + 31) / 32;
    const int ix = blockIdx.x % tiles_x * 32 + threadIdx.x;
    const int iy = blockIdx.x / tiles_x * 8 + threadIdx.y;
    if (ix >= in_w || iy >= in_h) return;
    du += plane_at(blockIdx.z, du_batch, chain, du_plane);
    float sum = 0.0f;
#pragma unroll
    for (int t = 0; t < 9; ++t) {
        const int y = iy - (t / 3 - 1) * dilation, x = ix - (t % 3 - 1) * dilation;
        // The stride is 1 or 2: no divisions.
        const int odd = stride - 1, oy = y >> odd, ox = x >> odd;
        if (y < 0 || x < 0 || ((y | x) & odd) != 0 || oy >= out_h || ox >= out_w) continue;
        sum += weights[9 * chain + t] * load(du + static_cast<size_t>(oy) * out_w + ox);
    }
    store(ds + plane_at(blockIdx.z, ds_batch, chain, ds_plane) + static_cast<size_t>(iy) * in_w +
              ix,
          sum);
}

// partial is (N * pieces) x chains x 9: sums of du[p] s[p * stride + (t - 1) * dilation] over 4096
// output pixels, s = x + before.
template <typename T>
__device__ __forceinline__ void depthwise_backward_weight(
    const T* RESTRICT x, const T* RESTRICT before, const T* RESTRICT du,
    float* RESTRICT partial, int dilation, int stride, int in_h, int in_w, int out_h, int out_w,
    int x_batch, int x_plane, int b_batch, int b_plane, int du_batch, int du_plane) {
    __shared__ float shared[9 * 32];
    const int chain = blockIdx.y;
    x += plane_at(blockIdx.z, x_batch, chain, x_plane);
    du += plane_at(blockIdx.z, du_batch, chain, du_plane);
    if (before != nullptr) before += plane_at(blockIdx.z, b_batch, chain, b_plane);
    const int pixels = out_h * out_w, first = blockIdx.x * REDUCTION_PIXELS + threadIdx.x;
    float sums[9] = {};
    for (int k = 0; k < REDUCTION_PER_THREAD; ++k) {
        const int p = first + k * REDUCTION_THREADS;
        if (p >= pixels) break;
        const float g = load(du + p);
        const int oy = p / out_w, ox = p - oy * out_w;
#pragma unroll
        for (int t = 0; t < 9; ++t) {
            const int iy = oy * stride + (t / 3 - 1) * dilation;
            const int ix = ox * stride + (t % 3 - 1) * dilation;
            if (iy < 0 || iy >= in_h || ix < 0 || ix >= in_w) continue;
            const size_t at = static_cast<size_t>(iy) * in_w + ix;
            float v = load(x + at);
            if (before != nullptr) v += load(before + at);
            sums[t] += g * v;
        }
    }
    block_sum(sums, shared);
    if (threadIdx.x == 0) {
        const size_t part = static_cast<size_t>(blockIdx.z) * gridDim.x + blockIdx.x;
        float* out = partial + (part * gridDim.y + chain) * 9;
#pragma unroll
        for (int t = 0; t < 9; ++t) out[t] = sums[t];
    }
}

}  // namespace

// w0 .. w3, b0 .. b3: offsets of the branches' weights and biases in params.
extern "C" __global__ void __launch_bounds__(1024)
    cascade_forward_f32(const float* x, float* y, const float* params, int branches, int addition,
                        int stride, int d0, int d1, int d2, int d3, int w0, int w1, int w2, int w3,
                        int b0, int b1, int b2, int b3, int region, int tile_h, int tile_w,
                        int in_h, int in_w, int out_h, int out_w, int x_batch, int x_plane,
                        int y_batch, int y_plane) {
    cascade_forward(x, y, params, branches, addition, stride, Four{{d0, d1, d2, d3}},
                    Four{{w0, w1, w2, w3}}, Four{{b0, b1, b2, b3}}, region, tile_h, tile_w, in_h,
                    in_w, out_h, out_w, x_batch, x_plane, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(1024)
    cascade_forward_f16(const __half* x, __half* y, const float* params, int branches, int addition,
                        int stride, int d0, int d1, int d2, int d3, int w0, int w1, int w2, int w3,
                        int b0, int b1, int b2, int b3, int region, int tile_h, int tile_w,
                        int in_h, int in_w, int out_h, int out_w, int x_batch, int x_plane,
                        int y_batch, int y_plane) {
    cascade_forward(x, y, params, branches, addition, stride, Four{{d0, d1, d2, d3}},
                    Four{{w0, w1, w2, w3}}, Four{{b0, b1, b2, b3}}, region, tile_h, tile_w, in_h,
                    in_w, out_h, out_w, x_batch, x_plane, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    depthwise_forward_f32(const float* x, const float* before, const float* weights,
                          const float* bias, float* u, int rectify, int dilation, int stride,
                          int in_h, int in_w, int out_h, int out_w, int x_batch, int x_plane,
                          int b_batch, int b_plane, int u_batch, int u_plane) {
    depthwise_forward(x, before, weights, bias, u, rectify, dilation, stride, in_h, in_w, out_h,
                      out_w, x_batch, x_plane, b_batch, b_plane, u_batch, u_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    depthwise_forward_f16(const __half* x, const __half* before, const float* weights,
                          const float* bias, __half* u, int rectify, int dilation, int stride,
                          int in_h, int in_w, int out_h, int out_w, int x_batch, int x_plane,
                          int b_batch, int b_plane, int u_batch, int u_plane) {
    depthwise_forward(x, before, weights, bias, u, rectify, dilation, stride, in_h, in_w, out_h,
                      out_w, x_batch, x_plane, b_batch, b_plane, u_batch, u_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    depthwise_backward_data_f32(const float* du, const float* weights, float* ds, int dilation,
                                int stride, int in_h, int in_w, int out_h, int out_w, int du_batch,
                                int du_plane, int ds_batch, int ds_plane) {
    depthwise_backward_data(du, weights, ds, dilation, stride, in_h, in_w, out_h, out_w, du_batch,
                            du_plane, ds_batch, ds_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    depthwise_backward_data_f16(const __half* du, const float* weights, __half* ds, int dilation,
                                int stride, int in_h, int in_w, int out_h, int out_w, int du_batch,
                                int du_plane, int ds_batch, int ds_plane) {
    depthwise_backward_data(du, weights, ds, dilation, stride, in_h, in_w, out_h, out_w, du_batch,
                            du_plane, ds_batch, ds_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    depthwise_backward_weight_f32(const float* x, const float* before, const float* du, float* partial,
                                  int dilation, int stride, int in_h, int in_w, int out_h,
                                  int out_w, int x_batch, int x_plane, int b_batch, int b_plane,
                                  int du_batch, int du_plane) {
    depthwise_backward_weight(x, before, du, partial, dilation, stride, in_h, in_w, out_h, out_w,
                              x_batch, x_plane, b_batch, b_plane, du_batch, du_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    depthwise_backward_weight_f16(const __half* x, const __half* before, const __half* du, float* partial,
                                  int dilation, int stride, int in_h, int in_w, int out_h,
                                  int out_w, int x_batch, int x_plane, int b_batch, int b_plane,
                                  int du_batch, int du_plane) {
    depthwise_backward_weight(x, before, du, partial, dilation, stride, in_h, in_w, out_h, out_w,
                              x_batch, x_plane, b_batch, b_plane, du_batch, du_plane);
}
