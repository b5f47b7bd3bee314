// What the kernels of the cascade share.
#pragma once

#include "common.cuh"

namespace {

// One value per branch.
struct Four {
    int v[4];
    // Unrolled selection: a dynamically indexed array would live in local memory.
    __device__ __forceinline__ int at(int i) const {
        return i == 0 ? v[0] : i == 1 ? v[1] : i == 2 ? v[2] : v[3];
    }
};

}  // namespace
