// nvcuda::wmma for g++: 16 x 16 x 16 products of halves, summed up in f32.
//
// As on a GPU these are a warp's work: all 32 lanes must come to the same call with the same
// address, aligned to 32 bytes and with rows of whole 16 bytes; which lane holds which element is
// nobody's business. A load reads before the lanes meet and a store writes after it, so that a
// missing __syncwarp() shows.
#pragma once

#include "cuda_host.h"

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major {
    static constexpr bool rows = true;
};
struct col_major {
    static constexpr bool rows = false;
};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int m, int n, int k, typename T, typename Layout = void>
struct fragment {
    static_assert(m == 16 && n == 16 && k == 16, "add other shapes as the kernels need them");
    static constexpr int num_elements = 8;
    T x[num_elements];
};

namespace host {

// A lane's elements are scattered over the matrix, in a way of their own for every use.
template <typename Use>
inline int element(int lane, int slot) {
    constexpr int step = std::is_same_v<Use, matrix_a> ? 167 : std::is_same_v<Use, matrix_b> ? 93 : 59;
    return ((slot * 32 + lane) * step + step / 3) & 255;
}

template <typename T>
void check(const T* at, unsigned row_stride, int line) {
    const uint64_t address = reinterpret_cast<uint64_t>(at);
    if (address % 32 != 0) fpenet_host::fail("wmma address is not aligned to 32 bytes", line);
    if (row_stride * sizeof(T) % 16 != 0) {
        fpenet_host::fail("wmma rows are not whole 16 bytes", line);
    }
    if (fpenet_host::exchange(0xffffffffu, address, 0, line) != address) {
        fpenet_host::fail("wmma address differs between lanes", line);
    }
}

template <typename Use, typename T, typename Layout>
void load(fragment<Use, 16, 16, 16, T, Layout>& to, const T* at, unsigned row_stride, bool rows,
          int line) {
    T values[8];
    for (int slot = 0; slot < 8; ++slot) {
        const int e = element<Use>(fpenet_host::lane(), slot), r = e / 16, c = e % 16;
        values[slot] = rows ? at[r * row_stride + c] : at[c * row_stride + r];
    }
    check(at, row_stride, line);
    for (int slot = 0; slot < 8; ++slot) to.x[slot] = values[slot];
}

// What one lane brings to a product.
struct Operands {
    const __half* a;
    const __half* b;
    const float* c;
    float* d;
};

// The warp's product, made once for all lanes while they wait.
inline void multiply(const uint64_t (&lanes)[32]) {
    float a[256], b[256], c[256];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* mine = reinterpret_cast<const Operands*>(lanes[lane]);
        for (int slot = 0; slot < 8; ++slot) {
            a[element<matrix_a>(lane, slot)] = __half2float(mine->a[slot]);
            b[element<matrix_b>(lane, slot)] = __half2float(mine->b[slot]);
            c[element<accumulator>(lane, slot)] = mine->c[slot];
        }
    }
    for (int r = 0; r < 16; ++r) {
        for (int k = 0; k < 16; ++k) {
            for (int col = 0; col < 16; ++col) c[16 * r + col] += a[16 * r + k] * b[16 * k + col];
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const auto* mine = reinterpret_cast<const Operands*>(lanes[lane]);
        for (int slot = 0; slot < 8; ++slot) {
            mine->d[slot] = c[element<accumulator>(lane, slot)];
        }
    }
}

}  // namespace host

template <typename Use, int m, int n, int k, typename T, typename Layout>
void fill_fragment(fragment<Use, m, n, k, T, Layout>& f, T value) {
    for (T& x : f.x) x = value;
}

template <typename Use, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, __half, Layout>& to, const __half* at,
                      unsigned row_stride, int line = __builtin_LINE()) {
    host::load(to, at, row_stride, Layout::rows, line);
}

inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& to, const float* at,
                             unsigned row_stride, layout_t layout, int line = __builtin_LINE()) {
    host::load(to, at, row_stride, layout == mem_row_major, line);
}

inline void store_matrix_sync(float* at, const fragment<accumulator, 16, 16, 16, float>& from,
                              unsigned row_stride, layout_t layout, int line = __builtin_LINE()) {
    host::check(at, row_stride, line);
    for (int slot = 0; slot < 8; ++slot) {
        const int e = host::element<accumulator>(fpenet_host::lane(), slot), r = e / 16, c = e % 16;
        at[layout == mem_row_major ? r * row_stride + c : c * row_stride + r] = from.x[slot];
    }
}

template <typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d,
              const fragment<matrix_a, 16, 16, 16, __half, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, __half, LayoutB>& b,
              const fragment<accumulator, 16, 16, 16, float>& c, int line = __builtin_LINE()) {
    const host::Operands mine = {a.x, b.x, c.x, d.x};
    uint64_t all[32];
    if (fpenet_host::gather(reinterpret_cast<uint64_t>(&mine), all, line)) host::multiply(all);
}

}  // namespace wmma
}  // namespace nvcuda
