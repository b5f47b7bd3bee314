// The stem and the block of stage 1 (paper, Table 1) in one launch, batch norms folded, f32
// (stem_block_half.cu is the same in f16):
//   s = relu(3x3, stride 2 (x) + b)      3 -> 16 channels, x stored values or 8-bit RGB
//   e = relu(We s + be),  d = relu(3x3 depthwise (e) + bd),  y = act(Wp d + bp + s)
//
// A block of 256 threads makes 30 x 14 pixels of s and y. It computes s and e on the 32 x 16 pixels
// that the depthwise taps reach, two per thread, s in registers on the way to e, which goes to
// shared memory (zeros outside of the plane: the padding is e's); d and y, two pixels per thread, come
// from there, with s read back as the residual. Weights in shared memory, read by broadcast, once for
// two pixels.
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

// Pixels of a thread at a time: a weight comes out of shared memory once for all of them.
constexpr int AT_ONCE = 2, THREADS = 256;

// sums[i][o] += w[o] * v[i].
__device__ __forceinline__ void add_row(const float* w, const float (&v)[AT_ONCE],
                                        float (&sums)[AT_ONCE][CHANNELS]) {
#pragma unroll
    for (int o = 0; o < CHANNELS; o += 4) {
        const float4 k = *reinterpret_cast<const float4*>(w + o);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            sums[i][o] += k.x * v[i];
            sums[i][o + 1] += k.y * v[i];
            sums[i][o + 2] += k.z * v[i];
            sums[i][o + 3] += k.w * v[i];
        }
    }
}

__device__ __forceinline__ void start(const float* b, float (&sums)[AT_ONCE][CHANNELS]) {
#pragma unroll
    for (int o = 0; o < CHANNELS; ++o) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) sums[i][o] = b[o];
    }
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
    for (int i = thread; i < IMAGE_CHANNELS * 9 * CHANNELS; i += THREADS) {
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
    // Pixel (0, 0) of the reach is (y0 - 1, x0 - 1); its first tap is one pixel before 2 (y0 - 1). All
    // loads of a channel are under way before the first is used.
    for (int c = 0; c < IMAGE_CHANNELS; ++c) {
        const typename Source::Channel plane = source.channel(blockIdx.z, c);
        constexpr int LOADS = (IMAGE_H * IMAGE_W + THREADS - 1) / THREADS;
        float v[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int i = thread + k * THREADS;
            const int iy = 2 * y0 - 3 + i / IMAGE_W, ix = 2 * x0 - 3 + i % IMAGE_W;
            const bool inside = iy >= 0 && iy < in_h && ix >= 0 && ix < in_w;
            v[k] = inside && i < IMAGE_H * IMAGE_W ? plane.at(iy, ix) : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int i = thread + k * THREADS;
            if (i >= IMAGE_H * IMAGE_W) break;
            image[(c * IMAGE_H + i / IMAGE_W) * IMAGE_PITCH + i % IMAGE_W] = v[k];
        }
    }
    __syncthreads();

    s += plane_at(blockIdx.z, s_batch, 0, 0);
    {
        static_assert(REACH_W * REACH_H == AT_ONCE * THREADS, "all pixels at once");
        const int row = thread / REACH_W, column = thread % REACH_W, ox = x0 - 1 + column;
        constexpr int ROWS = THREADS / REACH_W;
        float sums[AT_ONCE][CHANNELS], expanded[AT_ONCE][CHANNELS];
        start(k.stem_b, sums);
#pragma unroll 1
        for (int c = 0; c < IMAGE_CHANNELS; ++c) {
            const float* from = image + (c * IMAGE_H + 2 * row) * IMAGE_PITCH + 2 * column;
#pragma unroll
            for (int t = 0; t < 9; ++t) {
                float v[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    v[i] = from[(2 * ROWS * i + t / 3) * IMAGE_PITCH + t % 3];
                }
                add_row(k.stem[9 * c + t], v, sums);
            }
        }
        bool inside[AT_ONCE], mine[AT_ONCE];
        float* out[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int at = row + ROWS * i, oy = y0 - 1 + at;
            inside[i] = oy >= 0 && oy < h && ox >= 0 && ox < w;
            mine[i] = inside[i] && at >= 1 && at <= TILE_H && column >= 1 && column <= TILE_W;
            out[i] = s + static_cast<size_t>(oy) * w + ox;
        }
        start(k.expand_b, expanded);
#pragma unroll
        for (int o = 0; o < CHANNELS; ++o) {
            float v[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                v[i] = relu(sums[i][o]);
                if (mine[i]) out[i][static_cast<size_t>(o) * s_plane] = v[i];
            }
            add_row(k.expand[o], v, expanded);
        }
#pragma unroll
        for (int o = 0; o < CHANNELS; ++o) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                e[o * REACH_W * REACH_H + thread + i * THREADS] =
                    inside[i] ? relu(expanded[i][o]) : 0.0f;
            }
        }
    }
    __syncthreads();

    static_assert(TILE_W * TILE_H <= AT_ONCE * THREADS, "all pixels at once");
    y += plane_at(blockIdx.z, y_batch, 0, 0);
    const float* from[AT_ONCE];
    size_t p[AT_ONCE];
    bool inside[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
        const int at = thread + i * THREADS, row = at / TILE_W, column = at % TILE_W;
        inside[i] = row < TILE_H && y0 + row < h && x0 + column < w;
        p[i] = static_cast<size_t>(y0 + row) * w + x0 + column;
        // Of threads without a second pixel, the first one again.
        from[i] = row < TILE_H ? e + row * REACH_W + column : from[0];
    }
    float sums[AT_ONCE][CHANNELS];
    start(k.project_b, sums);
#pragma unroll 2
    for (int c = 0; c < CHANNELS; ++c) {
        float v[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) v[i] = k.depth_b[c];
#pragma unroll
        for (int t = 0; t < 9; ++t) {
            const float tap = k.depth[t][c];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                v[i] += tap * from[i][c * REACH_W * REACH_H + t / 3 * REACH_W + t % 3];
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) v[i] = relu(v[i]);
        add_row(k.project[c], v, sums);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
        if (!inside[i]) continue;
        float residual[CHANNELS];
#pragma unroll
        for (int o = 0; o < CHANNELS; ++o) {
            residual[o] = s[static_cast<size_t>(o) * s_plane + p[i]];
        }
#pragma unroll
        for (int o = 0; o < CHANNELS; ++o) {
            y[static_cast<size_t>(o) * y_plane + p[i]] = activate(sums[i][o] + residual[o], act);
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
