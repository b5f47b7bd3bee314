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
// Launch: 512 threads, grid (tiles, chains, N): launch::cascade_ahead().
#include "cascade_walk.cuh"

namespace {

constexpr int AHEAD_THREADS = 512, AHEAD_WARPS = AHEAD_THREADS / 32;

// A branch's part of a tile, in planes with `side` columns of zeros left and right.
template <typename T>
struct Rows {
    const T* in;
    T* carried;       // the next branch's input, which takes this one's result in; null where none does
    const T* zeros;   // a row
    T* out;           // the branch's plane in memory
    int first, end;   // rows that are computed
    int tile, tile_end;  // and of those written
    int from, to;     // rows that are at hand
    int pitch, side, w;
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

template <int D, typename T>
__device__ __forceinline__ void walk_rows(const Rows<T>& op, int dilation, const float* params) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int d = D > 0 ? D : dilation;
    const int groups = (op.w + 63) / 64, lines = groups * d;
    // As many pieces of a line as give every warp one.
    const int pieces = (AHEAD_WARPS + lines - 1) / lines;
    const int length = ((op.end - op.first + d - 1) / d + pieces - 1) / pieces;
    float k[9];
#pragma unroll
    for (int t = 0; t < 9; ++t) k[t] = params[t];
    const float bias = params[9];
#pragma unroll 1
    for (int task = warp; task < lines * pieces; task += AHEAD_WARPS) {
        const int x = task % groups * 64 + 2 * lane, line = task / groups;
        const int first = op.first + line % d + line / d * length * d;
        const int end = min(op.end, first + length * d);
        if (first >= end || x >= op.w) continue;
        const int column = op.side + x, step = d * op.pitch;
        const T* zeros = op.zeros + column;
        const T* at = op.in + (first - op.from) * op.pitch + column;
        T* carried = op.carried + (at - op.in);
        T* out = op.out + static_cast<size_t>(first) * op.w + x;
        Row above = taps_at<D>(first - d >= op.from ? at - step : zeros, d);
        Row here = taps_at<D>(at, d);
#pragma unroll 3
        for (int y = first; y < end; y += d) {
            at += step;
            const Row below = taps_at<D>(y + d < op.to ? at : zeros, d);
            float a = bias, b = bias;
            a += k[0] * above.left.a, b += k[0] * above.left.b;
            a += k[1] * above.middle.a, b += k[1] * above.middle.b;
            a += k[2] * above.right.a, b += k[2] * above.right.b;
            a += k[3] * here.left.a, b += k[3] * here.left.b;
            a += k[4] * here.middle.a, b += k[4] * here.middle.b;
            a += k[5] * here.right.a, b += k[5] * here.right.b;
            a += k[6] * below.left.a, b += k[6] * below.left.b;
            a += k[7] * below.middle.a, b += k[7] * below.middle.b;
            a += k[8] * below.right.a, b += k[8] * below.right.b;
            const Pair v = {relu(a), relu(b)};
            if (y >= op.tile && y < op.tile_end) store_pair(out, v);
            if (op.carried != nullptr) {
                const Pair next = load_pair(carried);
                store_pair(carried, Pair{next.a + v.a, next.b + v.b});
                carried += step;
            }
            out += static_cast<size_t>(d) * op.w;
            above = here;
            here = below;
        }
    }
}

// Rows `from` .. `to` of the planes of all branches, and zeros beside them.
template <typename T>
__device__ __forceinline__ void fetch_ahead(const Cascade<T>& op, const T* x, int chains, int from,
                                            int to, int pitch, int side, T* planes) {
    constexpr int WIDE = 16 / sizeof(T), AT_ONCE = 8;
    const int across = op.w / WIDE, plane = (to - from) * across, count = op.branches * plane;
    const int rows_on = AHEAD_THREADS / across, columns_on = AHEAD_THREADS % across;
    // One division; then steps.
    int column = threadIdx.x % across, row = threadIdx.x / across, branch = 0;
#pragma unroll 1
    for (int first = threadIdx.x; first < count; first += AT_ONCE * AHEAD_THREADS) {
        uint4 values[AT_ONCE];
        int to_at[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            while (row >= to - from) row -= to - from, ++branch;
            to_at[i] = branch * op.region + row * pitch + side + column * WIDE;
            if (first + i * AHEAD_THREADS < count) {
                const T* plane_of = x + static_cast<size_t>(branch) * chains * op.x_plane;
                values[i] = *reinterpret_cast<const uint4*>(
                    plane_of + static_cast<size_t>(from + row) * op.w + column * WIDE);
            }
            column += columns_on, row += rows_on;
            if (column >= across) column -= across, ++row;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (first + i * AHEAD_THREADS < count) {
                *reinterpret_cast<uint4*>(planes + to_at[i]) = values[i];
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void cascade_ahead(const Cascade<T>& op) {
    constexpr int WIDE = 16 / sizeof(T);
    DYNAMIC_SHARED(T, zeros);
    __shared__ float params[4][10];
    const int chain = blockIdx.y, chains = gridDim.y, image = blockIdx.z;
    int halo = 0, largest = 0, reach = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i >= op.branches) break;
        largest = max(largest, op.dilations.v[i]);
        halo += op.dilations.v[i];
        if (i > 0) reach += op.dilations.v[i];
    }
    if (!op.addition) halo = largest, reach = 0;
    const int side = (largest + WIDE - 1) / WIDE * WIDE, pitch = op.w + 2 * side;
    const int tile = blockIdx.x * op.tile_h, tile_end = min(tile + op.tile_h, op.h);
    const int from = max(tile - halo, 0), to = min(tile_end + halo, op.h);
    T* planes = zeros + pitch;

    // Parameters and zeros are no other kernel's.
    start_next();
    if (threadIdx.x < 10 * op.branches) {
        const int branch = threadIdx.x / 10, t = threadIdx.x % 10;
        const int at = t < 9 ? op.weights.at(branch) + 9 * chain + t : op.biases.at(branch) + chain;
        params[branch][t] = op.params[at];
    }
    const uint4 none = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < pitch / WIDE; i += AHEAD_THREADS) {
        *reinterpret_cast<uint4*>(zeros + i * WIDE) = none;
    }
    const int beside = side / WIDE;
    for (int i = threadIdx.x; i < op.branches * (to - from) * 2 * beside; i += AHEAD_THREADS) {
        const int row = i / (2 * beside), part = i % (2 * beside);
        const int column = part < beside ? part * WIDE : side + op.w + (part - beside) * WIDE;
        const int branch = row / (to - from);
        T* line = planes + branch * op.region + (row - branch * (to - from)) * pitch;
        *reinterpret_cast<uint4*>(line + column) = none;
    }
    wait_for_previous();
    const T* x = op.x + plane_at(image, op.x_batch, chain, op.x_plane);
    fetch_ahead(op, x, chains, from, to, pitch, side, planes);
    __syncthreads();

#pragma unroll 1
    for (int branch = 0; branch < op.branches; ++branch) {
        const int d = op.dilations.at(branch);
        Rows<T> rows;
        rows.in = planes + branch * op.region;
        const bool carries = op.addition && branch + 1 < op.branches;
        rows.carried = carries ? planes + (branch + 1) * op.region : nullptr;
        rows.zeros = zeros;
        rows.out = op.y + plane_at(image, op.y_batch, branch * chains + chain, op.y_plane);
        rows.first = max(tile - reach, 0), rows.end = min(tile_end + reach, op.h);
        rows.tile = tile, rows.tile_end = tile_end;
        rows.from = from, rows.to = to;
        rows.pitch = pitch, rows.side = side, rows.w = op.w;
        switch (d) {
            case 1: walk_rows<1>(rows, d, params[branch]); break;
            case 2: walk_rows<2>(rows, d, params[branch]); break;
            case 4: walk_rows<4>(rows, d, params[branch]); break;
            case 8: walk_rows<8>(rows, d, params[branch]); break;
            default: walk_rows<0>(rows, d, params[branch]);
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
