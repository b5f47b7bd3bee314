// The depthwise dilated cascade of an FPE block in inference (cascade.cu has the maths), stride 1,
// dilations of 1 or even, with the inputs of all branches fetched ahead: a block waits for memory once,
// where cascade_walk.cu does in every branch and row.
//
// A block takes whole rows of one chain of one image, with the rows around them that its branches read
// (then y must not be x, unless the tile is the whole plane). All branches' planes of them go to shared
// memory at once, 16 bytes per load, as they are stored, between columns of zeros as wide as the largest
// dilation: no tap asks whether it is inside. A row outside of the plane is a row of zeros. A warp
// walks 64 columns of rows r, r + d, r + 2 d, ...; of the nine taps of an output six are those of the
// output before. The result goes to memory, and onto the next branch's input where that lies, rounded
// to the storage type, as in cascade_walk.cu: bit for bit the same. A barrier per branch.
//
// Bytes: x once and the rows around the tiles again, y once. FLOPs: 18 per output.
// Shared: (branches * rows + 1) * (w + 2 * largest dilation) elements: 70 KB for four branches of half a
// plane of 128 x 64 halves, with 14 rows around it at one side.
// Launch: 512 threads, grid (tiles, chains, N): launch::cascade_warps().
#include "cascade_ahead.cuh"

namespace {

// A block's rows of the planes, and what of them a warp takes: 64 columns, shared with `sharers` warps,
// of which it is number `sharer`.
template <typename T>
struct Walk {
    const T* zeros;      // a row of zeros, at the warp's columns, as are all of these
    T* planes;           // the first branch's rows
    int region, pitch;   // from branch to branch, from row to row
    int from, to;        // rows that are at hand
    int tile, tile_end;  // rows that are written
    int w, sharer, sharers;
};

// D: the dilation; 0 for one that is even and not known before.
template <int D, typename T>
__device__ __forceinline__ Row taps_at(const T* at, int d) {
    if (D == 1) {
        const Pair middle = load_pair(at);
        return {{load(at - 1), middle.a}, middle, {middle.b, load(at + 2)}};
    }
    const int far = D > 0 ? D : d;
    return {load_pair(at - far), load_pair(at), load_pair(at + far)};
}

// Rows first .. end of a branch: to memory, and, where it CARRIES, onto the next branch's input.
template <int D, bool CARRIES, typename T>
__device__ __forceinline__ void walk_rows(const Walk<T>& op, const T* in, T* out, int dilation,
                                          int first_row, int end_row, const float* params) {
    const int d = D > 0 ? D : dilation;
    // As many pieces of a line as give every sharer one.
    const int pieces = max(op.sharers / d, 1);
    const int length = ((end_row - first_row + d - 1) / d + pieces - 1) / pieces;
    float k[9];
#pragma unroll
    for (int t = 0; t < 9; ++t) k[t] = params[t];
    const float bias = params[9];
    const int step = d * op.pitch, out_step = d * op.w, last_inside = op.to - d;
    const unsigned tile_rows = op.tile_end - op.tile;
#pragma unroll 1
    for (int line = op.sharer; line < d * pieces; line += op.sharers) {
        const int first = first_row + line % d + line / d * length * d;
        const int end = min(end_row, first + length * d);
        if (first >= end) continue;
        const T* at = in + (first - op.from) * op.pitch;
        T* to = out + first * op.w;
        Row above = taps_at<D>(first - d >= op.from ? at - step : op.zeros, d);
        Row here = taps_at<D>(at, d);
#pragma unroll 3
        for (int y = first; y < end; y += d) {
            const T* next = at + step;
            const Row below = taps_at<D>(y < last_inside ? next : op.zeros, d);
            const Pair v = nine_taps(above, here, below, k, bias);
            if (CARRIES) {
                // Only rows that others read are beside the tile; the last branch has none.
                if (static_cast<unsigned>(y - op.tile) < tile_rows) store_pair(to, v);
                T* carried = const_cast<T*>(at) + op.region;
                const Pair before = load_pair(carried);
                store_pair(carried, Pair{before.a + v.a, before.b + v.b});
            } else {
                store_pair(to, v);
            }
            to += out_step;
            at = next;
            above = here;
            here = below;
        }
    }
}

template <bool CARRIES, typename T>
__device__ __forceinline__ void walk_branch(const Walk<T>& op, const T* in, T* out, int d,
                                            int first_row, int end_row, const float* params) {
    switch (d) {
        case 1: walk_rows<1, CARRIES>(op, in, out, d, first_row, end_row, params); break;
        case 2: walk_rows<2, CARRIES>(op, in, out, d, first_row, end_row, params); break;
        case 4: walk_rows<4, CARRIES>(op, in, out, d, first_row, end_row, params); break;
        case 8: walk_rows<8, CARRIES>(op, in, out, d, first_row, end_row, params); break;
        default: walk_rows<0, CARRIES>(op, in, out, d, first_row, end_row, params);
    }
}

template <typename T>
__device__ __forceinline__ void cascade_ahead(const Cascade<T>& op) {
    DYNAMIC_SHARED(T, zeros);
    __shared__ float params[4][10];
    const int chain = blockIdx.y, chains = gridDim.y, image = blockIdx.z;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Rows rows(op);
    T* planes = zeros + rows.pitch;

    // Up to here and to the wait nothing is another kernel's: parameters, zeros, who takes what.
    start_next();
    if (threadIdx.x < 10 * op.branches) {
        const int branch = threadIdx.x / 10, t = threadIdx.x % 10;
        const int at = t < 9 ? op.weights.at(branch) + 9 * chain + t : op.biases.at(branch) + chain;
        params[branch][t] = op.params[at];
    }
    clear_around(op, rows, zeros);
    // Groups of 64 columns for the walk: a power of two of warps each.
    const int groups = (op.w + 63) / 64;
    Walk<T> walk;
    walk.sharers = 1;
    while (2 * walk.sharers * groups <= AHEAD_WARPS) walk.sharers *= 2;
    walk.sharer = warp % walk.sharers;
    walk.zeros = zeros + rows.side;
    walk.planes = planes + rows.side;
    walk.region = op.region, walk.pitch = rows.pitch;
    walk.from = rows.from, walk.to = rows.to, walk.tile = rows.tile, walk.tile_end = rows.tile_end;
    walk.w = op.w;

    fetch_ahead(op, rows, planes);
    copies_done();
    __syncthreads();

    int reach = rows.reach;
#pragma unroll 1
    for (int branch = 0; branch < op.branches; ++branch) {
        const int d = op.dilations.at(branch);
        const bool carries = op.addition && branch + 1 < op.branches;
        const int first_row = max(rows.tile - reach, 0), end_row = min(rows.tile_end + reach, op.h);
        T* y = op.y + plane_at(image, op.y_batch, branch * chains + chain, op.y_plane);
#pragma unroll 1
        for (int group = warp / walk.sharers; group < groups; group += AHEAD_WARPS / walk.sharers) {
            const int x0 = group * 64 + 2 * lane;
            if (x0 >= op.w) continue;
            Walk<T> mine = walk;
            mine.zeros += x0;
            const T* in = walk.planes + branch * op.region + x0;
            if (carries) {
                walk_branch<true>(mine, in, y + x0, d, first_row, end_row, params[branch]);
            } else {
                walk_branch<false>(mine, in, y + x0, d, first_row, end_row, params[branch]);
            }
        }
        if (carries) reach -= op.dilations.at(branch + 1);
        __syncthreads();
    }
}

}  // namespace

// w0 .. w3, b0 .. b3: offsets of the branches' weights and biases in params; region: elements from one
// branch's rows in shared memory to the next one's; tile_w is w.
extern "C" __global__ void __launch_bounds__(512, 1)
    cascade_ahead_f32(const float* x, float* y, const float* params, int branches, int addition,
                      int d0, int d1, int d2, int d3, int w0, int w1, int w2, int w3, int b0,
                      int b1, int b2, int b3, int region, int tile_h, int tile_w, int h, int w,
                      int x_batch, int x_plane, int y_batch, int y_plane) {
    cascade_ahead<float>({x, y, params, branches, addition, {{d0, d1, d2, d3}}, {{w0, w1, w2, w3}},
                          {{b0, b1, b2, b3}}, region, tile_h, tile_w, h, w, x_batch, x_plane,
                          y_batch, y_plane});
}

extern "C" __global__ void __launch_bounds__(512, 1)
    cascade_ahead_f16(const __half* x, __half* y, const float* params, int branches, int addition,
                      int d0, int d1, int d2, int d3, int w0, int w1, int w2, int w3, int b0,
                      int b1, int b2, int b3, int region, int tile_h, int tile_w, int h, int w,
                      int x_batch, int x_plane, int y_batch, int y_plane) {
    cascade_ahead<__half>({x, y, params, branches, addition, {{d0, d1, d2, d3}}, {{w0, w1, w2, w3}},
                           {{b0, b1, b2, b3}}, region, tile_h, tile_w, h, w, x_batch, x_plane,
                           y_batch, y_plane});
}
