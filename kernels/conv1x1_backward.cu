// Gradient of the weights of a 1x1 convolution, f32:
//   dW[r][c] = sum over images and pixels of dy[r][p] x[c][p]
//
// The results are few (16 to 256 channels each way) and the sums long (a plane, 10^3 to 10^5 pixels): a
// BLAS makes a block per tile of results and image, and leaves most multiprocessors idle. Here a
// block has a tile of results and a piece of an image's pixels; reduce.cu adds up the pieces, in their
// order, so that results do not depend on the run.
//
// A block of 256 threads has a tile of 16 R x 16 R results, R x R per thread, R = 1, 2 or 4, and goes
// through its pixels 32 at a time: both operands pass through shared memory as they lie, a row per
// channel, four pixels per load from there, while the next 32 are on their way.
// Bytes: 4 (out + in) pixels, times the tiles across the other side (up to 4), and 4 R^2 256 per block
// there and back. FLOPs: 2 out in pixels. Shared: 8 * 16 R * 36 bytes: 18 KB for R = 4.
// Launch: 256 threads, grid (tiles, pieces, N): launch::conv1x1_backward_weight().
#include "common.cuh"

namespace {

constexpr int DEPTH = 32, PITCH = DEPTH + 4, THREADS = 256;

// Pixels first .. first + DEPTH of ROWS channels from `row` on; zeros beyond `end` and `rows`.
template <int ROWS>
struct Stage {
    static constexpr int EACH = ROWS * DEPTH / THREADS;
    float v[EACH];

    __device__ __forceinline__ void load(const float* planes, int plane, int row, int rows,
                                         int first, int end) {
        const int p = first + threadIdx.x % DEPTH;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int r = row + threadIdx.x / DEPTH + j * (THREADS / DEPTH);
            v[j] = r < rows && p < end ? planes[static_cast<size_t>(r) * plane + p] : 0.0f;
        }
    }
    __device__ __forceinline__ void store(float* to) const {
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int r = threadIdx.x / DEPTH + j * (THREADS / DEPTH);
            to[r * PITCH + threadIdx.x % DEPTH] = v[j];
        }
    }
};

template <int R>
__device__ __forceinline__ void backward_weight(const float* dy, const float* x, float* partial,
                                                int out, int in, int pixels, int piece,
                                                int dy_batch, int dy_plane, int x_batch,
                                                int x_plane) {
    constexpr int ROWS = 16 * R;
    __shared__ float4 wide_a[ROWS * PITCH / 4], wide_b[ROWS * PITCH / 4];
    float* a = reinterpret_cast<float*>(wide_a);
    float* b = reinterpret_cast<float*>(wide_b);
    const int across = (in + ROWS - 1) / ROWS;
    const int row = blockIdx.x / across * ROWS, column = blockIdx.x % across * ROWS;
    const int begin = blockIdx.y * piece, end = min(begin + piece, pixels);
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    dy += plane_at(blockIdx.z, dy_batch, 0, 0);
    x += plane_at(blockIdx.z, x_batch, 0, 0);

    float sums[R][R] = {};
    Stage<ROWS> of_dy, of_x;
    of_dy.load(dy, dy_plane, row, out, begin, end);
    of_x.load(x, x_plane, column, in, begin, end);
    for (int first = begin; first < end; first += DEPTH) {
        of_dy.store(a);
        of_x.store(b);
        __syncthreads();
        if (first + DEPTH < end) {
            of_dy.load(dy, dy_plane, row, out, first + DEPTH, end);
            of_x.load(x, x_plane, column, in, first + DEPTH, end);
        }
#pragma unroll
        for (int p = 0; p < DEPTH; p += 4) {
            float4 u[R], v[R];
#pragma unroll
            for (int i = 0; i < R; ++i) {
                u[i] = *reinterpret_cast<const float4*>(a + (ty + 16 * i) * PITCH + p);
                v[i] = *reinterpret_cast<const float4*>(b + (tx + 16 * i) * PITCH + p);
            }
#pragma unroll
            for (int i = 0; i < R; ++i) {
#pragma unroll
                for (int j = 0; j < R; ++j) {
                    sums[i][j] += u[i].x * v[j].x;
                    sums[i][j] += u[i].y * v[j].y;
                    sums[i][j] += u[i].z * v[j].z;
                    sums[i][j] += u[i].w * v[j].w;
                }
            }
        }
        __syncthreads();
    }
    const size_t part = static_cast<size_t>(blockIdx.z) * gridDim.y + blockIdx.y;
    partial += part * out * in;
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
        for (int j = 0; j < R; ++j) {
            const int r = row + ty + 16 * i, c = column + tx + 16 * j;
            if (r < out && c < in) partial[r * in + c] = sums[i][j];
        }
    }
}

}  // namespace

// partial is (N * pieces) x out x in; `piece`: pixels of a piece.
extern "C" __global__ void __launch_bounds__(256)
    conv1x1_backward_weight_r16_f32(const float* dy, const float* x, float* partial, int out,
                                    int in, int pixels, int piece, int dy_batch, int dy_plane,
                                    int x_batch, int x_plane) {
    backward_weight<1>(dy, x, partial, out, in, pixels, piece, dy_batch, dy_plane, x_batch,
                       x_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    conv1x1_backward_weight_r32_f32(const float* dy, const float* x, float* partial, int out,
                                    int in, int pixels, int piece, int dy_batch, int dy_plane,
                                    int x_batch, int x_plane) {
    backward_weight<2>(dy, x, partial, out, in, pixels, piece, dy_batch, dy_plane, x_batch,
                       x_plane);
}

extern "C" __global__ void __launch_bounds__(256)
    conv1x1_backward_weight_r64_f32(const float* dy, const float* x, float* partial, int out,
                                    int in, int pixels, int piece, int dy_batch, int dy_plane,
                                    int x_batch, int x_plane) {
    backward_weight<4>(dy, x, partial, out, in, pixels, piece, dy_batch, dy_plane, x_batch,
                       x_plane);
}
