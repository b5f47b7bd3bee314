// The stride-1 blocks of a stage in one cooperative launch (paper, section 3.1): by turns the cascade of
// all blocks' chains (cascade_walk.cuh) and the projection with residual and next expansion
// (pe.cuh), with a grid barrier (grid.cuh) in between, where there would be a launch each. The list may
// begin with a projection, and ends with one that nothing is expanded behind.
//
// A block of threads takes every gridDim.x-th piece of a phase: a tile of a chain, or 64 pixels of an
// image. All 512 threads work on the piece: 16 warps with 4 x 4 tiles of 16 x 16 sums (f32: 8 sums
// and then 16 per thread). Weights are staged for all of a block's pieces before the barrier, where
// they fit: their loads overlap with the wait.
//
// Bytes and FLOPs: those of the launches in whose place it is. Per phase but the first a barrier:
// one atomic add per block, then reads of one word until it turns.
// Shared memory: the most of any phase. f16, C = 64: projection and expansion 45 KB, with staged weights
// 114 KB; cascade 32 KB for planes of 128 x 64. f32: 29 KB; 64 KB.
// Registers: launch bounds allow 128, one block per multiprocessor; more than one load of a thread under way
// would spill.
// Launch: cooperative, 512 threads, grid (pieces of the largest phase, at most what is resident):
// launch::stage_blocks().
#include "cascade_walk.cuh"
#include "grid.cuh"
#include "pe.cuh"

namespace {

constexpr int STAGE_THREADS = 512;
// Blocks of the network in one launch: as many as fit into 4 KB of parameters. Tensors are as the
// arithmetic has them: expanded tensors in bytes take a launch after another.
constexpr int MOST_BLOCKS = 15;

// A block of the network; without a cascade its x is null.
template <typename T>
struct StageBlock {
    Cascade<T> cascade;
    ProjectExpand<T> pair;
};

template <typename T>
struct StageBlocks {
    StageBlock<T> block[MOST_BLOCKS];
};

template <int C>
__device__ __noinline__ void stage_weights(const ProjectExpand<__half>& op) {
    DYNAMIC_SHARED(__half, shared);
    stage_pair_weights<C, 64, STAGE_THREADS, 1>(op.w1, op.w2, shared);
}

template <int C>
__device__ __forceinline__ void project_expand(const ProjectExpand<__half>& op, int staged,
                                               int tile, int image, __half* shared) {
    if (staged) {
        pair_tile<C, 64, true, STAGE_THREADS, 1>(op, tile, image, shared);
    } else {
        pair_tile<C, 64, false, STAGE_THREADS, 1>(op, tile, image, shared);
    }
}

// f32 weights pass through shared memory with the channels of x.
template <int C>
__device__ __forceinline__ void stage_weights(const ProjectExpand<float>&) {}

template <int C>
__device__ __forceinline__ void project_expand(const ProjectExpand<float>& op, int, int tile,
                                               int image, float* shared) {
    pair_tile<C, STAGE_THREADS>(op, tile, image, shared);
}

// The phases are functions of their own: in one piece, what the compiler keeps of one during the other
// exceeds the registers.
template <typename T>
__device__ __noinline__ void cascade_phase(const Cascade<T>& cascade, int chains, int images) {
    DYNAMIC_SHARED(T, shared);
    const int tiles = cascade.tiles(), pieces = tiles * chains * images;
#pragma unroll 1
    for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        cascade_tile(cascade, piece % tiles, piece / tiles % chains, chains,
                     piece / tiles / chains, shared);
    }
}

template <int C, typename T>
__device__ __noinline__ void pair_phase(const ProjectExpand<T>& pair, int images, int staged) {
    DYNAMIC_SHARED(T, shared);
    const int tiles = (pair.pixels + 63) / 64, pieces = tiles * images;
#pragma unroll 1
    for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        project_expand<C>(pair, staged, piece % tiles, piece / tiles, shared);
        __syncthreads();
    }
}

template <int C, typename T>
__device__ __forceinline__ void stage_blocks(unsigned* barrier, int blocks, int chains, int images,
                                             int staged, const StageBlocks<T>& list) {
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
        const Cascade<T>& cascade = list.block[i].cascade;
        const ProjectExpand<T>& pair = list.block[i].pair;
        const bool cascaded = cascade.x != nullptr;
        if (cascaded) {
            if (i > 0) grid_barrier(barrier);
            cascade_phase(cascade, chains, images);
        }
        if (staged) stage_weights<C>(pair);
        if (cascaded) grid_barrier(barrier);
        pair_phase<C>(pair, images, staged);
    }
}

}  // namespace

// `barrier` is one counter of the launch's own.
extern "C" __global__ void __launch_bounds__(512, 1)
    stage_blocks_f16_c64(unsigned* barrier, int blocks, int chains, int images, int staged,
                         const __grid_constant__ StageBlocks<__half> list) {
    stage_blocks<64>(barrier, blocks, chains, images, staged, list);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    stage_blocks_f32_c64(unsigned* barrier, int blocks, int chains, int images, int staged,
                         const __grid_constant__ StageBlocks<float> list) {
    stage_blocks<64>(barrier, blocks, chains, images, staged, list);
}
