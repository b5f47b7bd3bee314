// A barrier for all blocks of a cooperative launch: they are resident at the same time, so that they
// can wait for each other.
#pragma once

#include "common.cuh"

namespace {

// Between two looks at what another block writes.
__device__ __forceinline__ void wait_for_others() {
#ifdef FPENET_HOST
    fpenet_host::wait_for_others(__LINE__);
#endif
}

// Waits until every block of the grid (one-dimensional) is here; what they wrote before, all see
// afterwards, in loads that do not take the read-only path (ld.global.nc): pointers to what is
// written in the same launch must not be const RESTRICT.
//
// `state` belongs to this launch, and starts at zero. Each barrier adds 2^31 to it in all: the first
// block adds that less the others, who add one each, so that the highest bit turns when the last one
// has arrived. The barrier leaves it ready for the next, in this launch or in another.
__device__ __forceinline__ void grid_barrier(unsigned* state) {
    constexpr unsigned TURN = 0x80000000u;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        const unsigned before = atomicAdd(state, blockIdx.x == 0 ? TURN - (gridDim.x - 1) : 1u);
        while (((*static_cast<volatile unsigned*>(state) ^ before) & TURN) == 0) wait_for_others();
        __threadfence();
    }
    __syncthreads();
}

}  // namespace
