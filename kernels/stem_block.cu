// The stem and the block of stage 1 (paper, Table 1) in one launch, batch norms folded, f32
// (stem_block_half.cu is the same in f16):
//   s = relu(3x3, stride 2 (x) + b)      3 -> 16 channels, x stored values or 8-bit RGB
//   e = relu(We s + be),  d = relu(3x3 depthwise (e) + bd),  y = act(Wp d + bp + s)
//
// A block of 256 threads makes 30 x 14 pixels of s and y. It computes s and e on the 32 x 16 pixels
// that the depthwise taps reach, two per thread, s in registers on the way to e, which goes to
// shared memory (zeros outside of the plane: the padding is e's); d and y come pixel by pixel from
// there, with s read back as the residual. Weights in shared memory, read by broadcast.
// Bytes: x with a halo (1.2), s and y once each: a third of what four launches move, whose e and d
// go to memory and back. FLOPs: per pixel 2 * 1088, with 1.22 of the first 688 products.
// Shared: 16 x 512 of e and 3 x 33 x 66 of x in f32, 1152 floats of weights: 61 KB.
// Launch: block (256), grid (tiles, 1, N): launch::stem_block().
#include "image.cuh"

namespace {

constexpr int CHANNELS = 16, IMAGE_CHANNELS = 3;
constexpr int REACH_W = 32, REACH_H = 16, TILE_W = REACH_W - 2, TILE_H = REACH_H - 2;
constexpr int IMAGE_W = 2 * REACH_W + 1, IMAGE_H = 2 * REACH_H + 1, IMAGE_PITCH = IMAGE_W + 1;

// Weights as [in][out], so that the outputs of one input lie together, then the biases.
struct Weights {
    float stem[IMAGE_CHANNELS * 9][CHANNELS];
    float expand[CHANNELS][CHANNELS];
    float depth[9][CHANNELS];
    float project[CHANNELS][CHANNELS];
    float stem_b[CHANNELS], expand_b[CHANNELS], depth_b[CHANNELS], project_b[CHANNELS];
};

// sums[o] += w[o] * v.
__device__ __forceinline__ void add_row(const float* w, float v, float (&sums)[CHANNELS]) {
#pragma unroll
    for (int o = 0; o < CHANNELS; o += 4) {
        const float4 k = *reinterpret_cast<const float4*>(w + o);
        sums[o] += k.x * v;
        sums[o + 1] += k.y * v;
        sums[o + 2] += k.z * v;
        sums[o + 3] += k.w * v;
    }
}

__device__ __forceinline__ void start(const float* b, float (&sums)[CHANNELS]) {
#pragma unroll
    for (int o = 0; o < CHANNELS; ++o) sums[o] = b[o];
}

template <typename Source>
__device__ __forceinline__ void stem_block(Source source, const float* RESTRICT stem_w,
                                           const float* RESTRICT stem_b,
                                           const float* RESTRICT expand_w,
                                           const float* RESTRICT expand_b,
                                           const float* RESTRICT depth_w,
                                           const float* RESTRICT depth_b,
                                           const float* RESTRICT project_w,
                                           const float* RESTRICT project_b, float* s, float* y, int act,
                                           int in_h, int in_w, int h, int w, int s_batch,
                                           int s_plane, int y_batch, int y_plane) {
    DYNAMIC_SHARED(float, shared);
    Weights& k = *reinterpret_cast<Weights*>(shared);
    float* image = shared + sizeof(Weights) / sizeof(float);
    float* e = image + IMAGE_CHANNELS * IMAGE_H * IMAGE_PITCH;
    const int tiles_x = (w + TILE_W - 1) / TILE_W, thread = threadIdx.x;
    const int x0 = blockIdx.x % tiles_x * TILE_W, y0 = blockIdx.x / tiles_x * TILE_H;

    start_next();
    for (int i = thread; i < IMAGE_CHANNELS * 9 * CHANNELS; i += 256) {
        k.stem[i / CHANNELS][i % CHANNELS] =
            stem_w[i % CHANNELS * IMAGE_CHANNELS * 9 + i / CHANNELS];
    }
    k.expand[thread % CHANNELS][thread / CHANNELS] = expand_w[thread];
    k.project[thread % CHANNELS][thread / CHANNELS] = project_w[thread];
    if (thread < 9 * CHANNELS) k.depth[thread % 9][thread / 9] = depth_w[thread];
    if (thread < CHANNELS) {
        k.stem_b[thread] = stem_b[thread];
        k.expand_b[thread] = expand_b[thread];
        k.depth_b[thread] = depth_b[thread];
        k.project_b[thread] = project_b[thread];
    }
    wait_for_previous();
    // Pixel (0, 0) of the reach is (y0 - 1, x0 - 1); its first tap is one pixel before 2 (y0 - 1).
    for (int c = 0; c < IMAGE_CHANNELS; ++c) {
        const typename Source::Channel plane = source.channel(blockIdx.z, c);
        for (int i = thread; i < IMAGE_H * IMAGE_W; i += 256) {
            const int r = i / IMAGE_W, column = i % IMAGE_W;
            const int iy = 2 * y0 - 3 + r, ix = 2 * x0 - 3 + column;
            const bool inside = iy >= 0 && iy < in_h && ix >= 0 && ix < in_w;
            store(image + (c * IMAGE_H + r) * IMAGE_PITCH + column,
                  inside ? plane.at(iy, ix) : 0.0f);
        }
    }
    __syncthreads();

    s += plane_at(blockIdx.z, s_batch, 0, 0);
    for (int i = thread; i < REACH_W * REACH_H; i += 256) {
        const int row = i / REACH_W, column = i % REACH_W;
        const int oy = y0 - 1 + row, ox = x0 - 1 + column;
        const bool inside = oy >= 0 && oy < h && ox >= 0 && ox < w;
        float sums[CHANNELS], expanded[CHANNELS];
        start(k.stem_b, sums);
        for (int c = 0; c < IMAGE_CHANNELS; ++c) {
#pragma unroll
            for (int t = 0; t < 9; ++t) {
                const int at = (c * IMAGE_H + 2 * row + t / 3) * IMAGE_PITCH + 2 * column + t % 3;
                add_row(k.stem[9 * c + t], load(image + at), sums);
            }
        }
        const bool mine = inside && row >= 1 && row <= TILE_H && column >= 1 && column <= TILE_W;
        float* out = s + static_cast<size_t>(oy) * w + ox;
        start(k.expand_b, expanded);
#pragma unroll
        for (int o = 0; o < CHANNELS; ++o) {
            const float v = relu(sums[o]);
            if (mine) store(out + static_cast<size_t>(o) * s_plane, v);
            add_row(k.expand[o], v, expanded);
        }
#pragma unroll
        for (int o = 0; o < CHANNELS; ++o) {
            store(e + o * REACH_W * REACH_H + i, inside ? relu(expanded[o]) : 0.0f);
        }
    }
    __syncthreads();

    y += plane_at(blockIdx.z, y_batch, 0, 0);
    for (int i = thread; i < TILE_W * TILE_H; i += 256) {
        const int row = i / TILE_W, column = i % TILE_W, oy = y0 + row, ox = x0 + column;
        if (oy >= h || ox >= w) continue;
        const size_t p = static_cast<size_t>(oy) * w + ox;
        float sums[CHANNELS];
        start(k.project_b, sums);
#pragma unroll 4
        for (int c = 0; c < CHANNELS; ++c) {
            const float* from = e + c * REACH_W * REACH_H + row * REACH_W + column;
            float v = k.depth_b[c];
#pragma unroll
            for (int t = 0; t < 9; ++t) {
                v += k.depth[t][c] * load(from + t / 3 * REACH_W + t % 3);
            }
            add_row(k.project[c], relu(v), sums);
        }
#pragma unroll
        for (int o = 0; o < CHANNELS; ++o) {
            const float v = sums[o] + load(s + static_cast<size_t>(o) * s_plane + p);
            store(y + static_cast<size_t>(o) * y_plane + p, activate(v, act));
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256, 2)
    stem_block_f32(const float* x, int x_batch, int x_plane, const float* stem_w,
                   const float* stem_b, const float* expand_w, const float* expand_b,
                   const float* depth_w, const float* depth_b, const float* project_w,
                   const float* project_b, float* s, float* y, int act, int in_h, int in_w, int h,
                   int w, int s_batch, int s_plane, int y_batch, int y_plane) {
    stem_block(Planes<float>{x, x_batch, x_plane, in_w}, stem_w, stem_b, expand_w, expand_b,
               depth_w, depth_b, project_w, project_b, s, y, act, in_h, in_w, h, w, s_batch,
               s_plane, y_batch, y_plane);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    stem_block_rgb_f32(const unsigned char* rgb, const float* normalisation, const float* stem_w,
                       const float* stem_b, const float* expand_w, const float* expand_b,
                       const float* depth_w, const float* depth_b, const float* project_w,
                       const float* project_b, float* s, float* y, int act, int in_h, int in_w,
                       int h, int w, int s_batch, int s_plane, int y_batch, int y_plane) {
    stem_block(Pixels{rgb, normalisation, in_h, in_w}, stem_w, stem_b, expand_w, expand_b, depth_w,
               depth_b, project_w, project_b, s, y, act, in_h, in_w, h, w, s_batch, s_plane,
               y_batch, y_plane);
}
