// The depthwise dilated cascade of an FPE block in inference (cascade.cu has the maths) on tensor cores, for
// tensors of halves: cascade_ahead.cu with another walk. That kernel issues instructions for more than half of its
// time on an H100; its inner loops have 36 to 48 per 64 outputs on sm_90, these have 17 to 21. Not timed yet.
//
// A row of a depthwise convolution is a product with a banded matrix. A warp makes 16 rows of 16 columns
// x .. x + 15: for each of the three rows of taps a product of 16 rows of the window x - 8 .. x + 23 with
// 32 x 16 weights, most of them zero:
//
//     y[r][x + c] = bias + sum over i, j of in[r + (i - 1) d][x - 8 + j] * B_i[j][c]
//     B_i[j][c] = w[i][k] where j - 8 - c = (k - 1) d for a k of 0, 1, 2, else 0
//
// so dilations are up to 8, and even but for 1 as for the other walks. Weights are rounded to halves, sums
// are f32. Which column an index of the product stands for is free, and chosen so that a lane has four
// neighbours of a row, to be moved at once: of the window, j = 16 b + 4 t + 2 r + e in register r of lane 4 g
// + t, where mma.cuh has it in column 8 r + 2 t + e; of the result, c = 4 t + 2 m + e for m = 0, 1. The
// weights are the same for all warps: made once per block, in shared memory.
//
// The result goes onto the next branch's input as it is stored, rounded: two halves per addition.
// Bytes: as in cascade_ahead.cu, and 3 KB of shared memory per branch. FLOPs: 18 per output are of use, 192 are done.
// Launch: 512 threads, grid (tiles, chains, N): launch::cascade_warps().
#include "cascade_ahead.cuh"
#include "mma.cuh"

namespace {

// A lane's weights per branch: for each row of taps and either half of the window a vector of the registers
// of m = 0 and those of m = 1.
constexpr int BANDS = 2, WEIGHTS = 3 * BANDS;
// Columns of the window before those of the result: as many as there are zeros beside the planes.
constexpr int BEFORE = 8;

// All branches' weights as operands, [branch][row of taps][half of the window][lane][m][r].
__device__ __forceinline__ void make_bands(const Cascade<__half>& op, uint4* bands) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int i = warp; i < 4 * BANDS * op.branches; i += AHEAD_WARPS) {
        const int branch = i / 8, half = i / 4 % 2, m = i / 2 % 2, r = i % 2;
        const int d = op.dilations.at(branch);
        const float* w = op.params + op.weights.at(branch) + 9 * blockIdx.y;
        // Columns from the output, c = 4 (g / 2) + 2 m + g % 2, to the tap in the register's low half.
        const int away = 16 * half + 4 * t + 2 * r - BEFORE - (g / 2 * 4 + 2 * m + g % 2);
        uint4* vector = bands + (branch * WEIGHTS + half) * 32 + lane;
        unsigned* to = reinterpret_cast<unsigned*>(vector) + 2 * m + r;
#pragma unroll
        for (int row = 0; row < 3; ++row) {
            const float before = w[3 * row], middle = w[3 * row + 1], after = w[3 * row + 2];
            float v[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int tap = away + e;
                v[e] = tap == -d ? before : tap == 0 ? middle : tap == d ? after : 0.0f;
            }
            to[row * BANDS * 32 * 4] = pack_halves(v[0], v[1]);
        }
    }
}

// One branch: where it reads and writes, and how far.
struct Work {
    const __half* in;  // its first row at hand, at the first of its zeros
    __half* out;       // its plane
    int region;        // to the next branch's row
    int w, d, first_row, end_row;
    int across;        // 1 << across warps are side by side
};

template <bool CARRIES>
__device__ __forceinline__ void multiply_branch(const Rows& rows, const Work& op, const __half* zeros,
                                                const uint4* bands, float bias) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const unsigned tile_rows = rows.tile_end - rows.tile, held = rows.to - rows.from;
    uint4 taps[3][BANDS];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
#pragma unroll
        for (int half = 0; half < BANDS; ++half) taps[i][half] = bands[(i * BANDS + half) * 32 + lane];
    }
    const int across = 16 << op.across, down = 16 * AHEAD_WARPS >> op.across;
    const int x0 = 16 * warp & (across - 1), y0 = op.first_row + 16 * (warp >> op.across);
#pragma unroll 1
    for (int y = y0 + g; y - g < op.end_row; y += down) {
        // Rows of taps of the lane's two rows, y and y + 8; those that are not there are zeros.
        const unsigned* line[3][2];
#pragma unroll
        for (int i = 0; i < 3; ++i) {
#pragma unroll
            for (int low = 0; low < 2; ++low) {
                const int row = y + 8 * low + (i - 1) * op.d - rows.from;
                const __half* at = static_cast<unsigned>(row) < held ? op.in + row * rows.pitch : zeros;
                line[i][low] = reinterpret_cast<const unsigned*>(at + x0 + 4 * t);
            }
        }
        __half* out[2] = {op.out + y * op.w + x0 + 4 * t, op.out + (y + 8) * op.w + x0 + 4 * t};
        const bool made[2] = {y < op.end_row, y + 8 < op.end_row};
        // Only rows that others read are beside the tile; the last branch has none.
        const bool written[2] = {
            made[0] && (!CARRIES || static_cast<unsigned>(y - rows.tile) < tile_rows),
            made[1] && (!CARRIES || static_cast<unsigned>(y + 8 - rows.tile) < tile_rows)};
#pragma unroll 1
        for (int x = x0; x < op.w; x += across) {
            float left[4] = {bias, bias, bias, bias}, right[4] = {bias, bias, bias, bias};
#pragma unroll
            for (int i = 0; i < 3; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const unsigned window[4] = {line[i][0][8 * half], line[i][1][8 * half],
                                                line[i][0][8 * half + 1], line[i][1][8 * half + 1]};
                    mma_16(left, window, {taps[i][half].x, taps[i][half].y});
                    mma_16(right, window, {taps[i][half].z, taps[i][half].w});
                }
            }
#pragma unroll
            for (int low = 0; low < 2; ++low) {
                const uint2 v = {relu_halves(left[2 * low], left[2 * low + 1]),
                                 relu_halves(right[2 * low], right[2 * low + 1])};
                if (written[low]) store_two(out[low], v);
                if (CARRIES && made[low]) {
                    const __half* below = reinterpret_cast<const __half*>(line[1][low]) + BEFORE;
                    uint2* carried = reinterpret_cast<uint2*>(const_cast<__half*>(below) + op.region);
                    const uint2 sum = *carried;
                    *carried = uint2{half2_bits(__hadd2(bits_half2(sum.x), bits_half2(v.x))),
                                     half2_bits(__hadd2(bits_half2(sum.y), bits_half2(v.y)))};
                }
                out[low] += across;
            }
#pragma unroll
            for (int i = 0; i < 3; ++i) line[i][0] += across / 2, line[i][1] += across / 2;
        }
    }
}

}  // namespace

// Parameters: as those of cascade_ahead_f16, and the binary logarithm of how many warps are side by side
// in each branch. w is a multiple of 16.
extern "C" __global__ void __launch_bounds__(512, 1)
    cascade_mma_f16(const __half* x, __half* y, const float* params, int branches, int addition,
                    int d0, int d1, int d2, int d3, int w0, int w1, int w2, int w3, int b0, int b1,
                    int b2, int b3, int region, int tile_h, int tile_w, int h, int w, int x_batch,
                    int x_plane, int y_batch, int y_plane, int a0, int a1, int a2, int a3) {
    const Cascade<__half> op = {x, y, params, branches, addition, {{d0, d1, d2, d3}},
                                {{w0, w1, w2, w3}}, {{b0, b1, b2, b3}}, region, tile_h, tile_w, h, w,
                                x_batch, x_plane, y_batch, y_plane};
    const Four across = {{a0, a1, a2, a3}};
    DYNAMIC_SHARED(__half, zeros);
    Rows rows(op);
    // As it is for every dilation up to 8, known to the compiler.
    rows.side = BEFORE, rows.pitch = w + 2 * BEFORE;
    __half* planes = zeros + rows.pitch;
    uint4* bands = reinterpret_cast<uint4*>(planes + branches * region);
    const int chain = blockIdx.y, chains = gridDim.y;

    start_next();
    clear_around(op, rows, zeros);
    make_bands(op, bands);
    fetch_ahead(op, rows, planes);
    Work work;
    work.w = w, work.region = region;
    copies_done();
    __syncthreads();

    int reach = rows.reach;
#pragma unroll 1
    for (int branch = 0; branch < branches; ++branch) {
        const bool carries = addition && branch + 1 < branches;
        work.in = planes + branch * region;
        work.out = y + plane_at(blockIdx.z, y_batch, branch * chains + chain, y_plane);
        work.d = op.dilations.at(branch), work.across = across.at(branch);
        work.first_row = max(rows.tile - reach, 0), work.end_row = min(rows.tile_end + reach, h);
        const uint4* mine = bands + branch * WEIGHTS * 32;
        const float bias = params[op.biases.at(branch) + chain];
        if (carries) {
            multiply_branch<true>(rows, work, zeros, mine, bias);
            reach -= op.dilations.at(branch + 1);
        } else {
            multiply_branch<false>(rows, work, zeros, mine, bias);
        }
        __syncthreads();
    }
}
