// Where a network's first convolution reads its image from.
#pragma once

#include "common.cuh"

namespace {

// Planes of stored values.
template <typename T>
struct Planes {
    const T* x;
    int batch, plane, width;

    struct Channel {
        const T* values;
        int width;
        __device__ __forceinline__ float at(int y, int x) const {
            return load(values + static_cast<size_t>(y) * width + x);
        }
    };
    __device__ __forceinline__ Channel channel(int n, int c) const {
        return {x + plane_at(n, batch, c, plane), width};
    }
};

// Interleaved 8-bit RGB, normalised on the way: value * scale + shift, in one rounding as the CPU
// does it. normalisation holds three scales and three shifts.
struct Pixels {
    const unsigned char* rgb;
    const float* normalisation;
    int height, width;

    struct Channel {
        const unsigned char* values;
        int width;
        float scale, shift;
        __device__ __forceinline__ float at(int y, int x) const {
            return fmaf(values[3 * (static_cast<size_t>(y) * width + x)], scale, shift);
        }
    };
    __device__ __forceinline__ Channel channel(int n, int c) const {
        const size_t image = static_cast<size_t>(n) * height * width;
        return {rgb + 3 * image + c, width, normalisation[c], normalisation[3 + c]};
    }
};

}  // namespace
