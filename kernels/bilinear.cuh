// Bilinear interpolation with half-pixel centres (align_corners = false), its positions in exact
// integer arithmetic: output i of an axis reads position ((2 i + 1) in - out) / (2 out), clamped.
// Products stay below 2^32 for sides up to 32768 (graph::MAX_SIDE).
#pragma once

#include "common.cuh"

namespace {

// out[i] = in[lo] + frac * (in[hi] - in[lo])
struct Tap {
    int lo, hi;
    float frac;
};

__device__ __forceinline__ Tap tap(int i, int in, int out) {
    const unsigned centre = (2u * i + 1u) * in, denominator = 2u * out;
    const unsigned numerator = centre > static_cast<unsigned>(out) ? centre - out : 0u;
    const unsigned lo = numerator / denominator;
    Tap t;
    if (lo + 1u >= static_cast<unsigned>(in)) {
        t.lo = t.hi = in - 1;
        t.frac = 0.0f;
    } else {
        t.lo = static_cast<int>(lo);
        t.hi = t.lo + 1;
        t.frac = static_cast<float>(numerator - lo * denominator) / static_cast<float>(denominator);
    }
    return t;
}

// How much of input q output i takes.
__device__ __forceinline__ float tap_weight(int q, int i, int in, int out) {
    const Tap t = tap(i, in, out);
    return (t.lo == q ? 1.0f - t.frac : 0.0f) + (t.hi == q ? t.frac : 0.0f);
}

// The outputs that read input q lie in [first, last]; a few that do not may be among them.
__device__ __forceinline__ void readers(int q, int in, int out, int* first, int* last) {
    const unsigned two_in = 2u * in;
    const int below = q > 0 ? static_cast<int>((2u * q - 1u) * out / two_in) - 1 : 0;
    *first = max(below, 0);
    *last = min(static_cast<int>((2u * q + 3u) * out / two_in) + 1, out - 1);
}

// Interpolates a plane of width in_w: rows first, as the CPU does.
template <typename T>
__device__ __forceinline__ float sample(const T* plane, int in_w, Tap row, Tap column) {
    const T* above = plane + static_cast<size_t>(row.lo) * in_w;
    const T* below = plane + static_cast<size_t>(row.hi) * in_w;
    const float keep = 1.0f - row.frac;
    const float left = keep * load(above + column.lo) + row.frac * load(below + column.lo);
    const float right = keep * load(above + column.hi) + row.frac * load(below + column.hi);
    return left + column.frac * (right - left);
}

// dx[q] = sum over outputs of weight * dy (* gate): the transpose of the interpolation, gathered,
// so that no two threads write one element.
template <typename T>
__device__ __forceinline__ float sample_transposed(const T* RESTRICT dy,
                                                   const T* RESTRICT gate, int qy, int qx,
                                                   int in_h, int in_w, int out_h, int out_w) {
    // Rows whose weights are at hand at once: of those that read a row of a doubled plane, half.
    constexpr int AT_ONCE = 3;
    int y0, y1, x0, x1;
    readers(qy, in_h, out_h, &y0, &y1);
    readers(qx, in_w, out_w, &x0, &x1);
    float sum = 0.0f;
    for (int first = y0; first <= y1; first += AT_ONCE) {
        float down[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            down[j] = first + j <= y1 ? tap_weight(qy, first + j, in_h, out_h) : 0.0f;
        }
        for (int x = x0; x <= x1; ++x) {
            const float across = tap_weight(qx, x, in_w, out_w);
            if (across == 0.0f) continue;
            float column = 0.0f;
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                if (down[j] == 0.0f) continue;
                const size_t p = static_cast<size_t>(first + j) * out_w + x;
                const float g = gate != nullptr ? load(dy + p) * load(gate + p) : load(dy + p);
                column += down[j] * g;
            }
            sum += across * column;
        }
    }
    return sum;
}

}  // namespace
