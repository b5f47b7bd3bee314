// nvcuda::wmma for g++: products of halves of 16 x 16 x 16 and 8 x 32 x 16, summed up in f32.
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
    static_assert((m == 16 && n == 16 && k == 16) || (m == 8 && n == 32 && k == 16),
                  "add other shapes as the kernels need them");
    static constexpr int rows = std::is_same_v<Use, matrix_b> ? k : m;
    static constexpr int columns = std::is_same_v<Use, matrix_a> ? k : n;
    static constexpr int num_elements = rows * columns / 32;
    T x[num_elements];
};

namespace host {

// A lane's elements are scattered over a matrix of `size`, in a way of their own for every use.
template <typename Use>
inline int element(int lane, int slot, int size) {
    constexpr int step = std::is_same_v<Use, matrix_a> ? 167 : std::is_same_v<Use, matrix_b> ? 93 : 59;
    return ((slot * 32 + lane) * step + step / 3) & (size - 1);
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

template <typename Use, int m, int n, int k, typename T, typename Layout>
void load(fragment<Use, m, n, k, T, Layout>& to, const T* at, unsigned row_stride, bool rows,
          int line) {
    using Fragment = fragment<Use, m, n, k, T, Layout>;
    T values[Fragment::num_elements];
    for (int slot = 0; slot < Fragment::num_elements; ++slot) {
        const int e = element<Use>(fpenet_host::lane(), slot, Fragment::rows * Fragment::columns);
        const int r = e / Fragment::columns, c = e % Fragment::columns;
        values[slot] = rows ? at[r * row_stride + c] : at[c * row_stride + r];
    }
    check(at, row_stride, line);
    for (int slot = 0; slot < Fragment::num_elements; ++slot) to.x[slot] = values[slot];
}

// What one lane brings to a product.
struct Operands {
    const __half* a;
    const __half* b;
    const float* c;
    float* d;
};

// The warp's product, made once for all lanes while they wait.
template <int m, int n, int k>
inline void multiply(const uint64_t (&lanes)[32]) {
    float a[m * k], b[k * n], c[m * n];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* mine = reinterpret_cast<const Operands*>(lanes[lane]);
        for (int slot = 0; slot < m * k / 32; ++slot) {
            a[element<matrix_a>(lane, slot, m * k)] = __half2float(mine->a[slot]);
        }
        for (int slot = 0; slot < k * n / 32; ++slot) {
            b[element<matrix_b>(lane, slot, k * n)] = __half2float(mine->b[slot]);
        }
        for (int slot = 0; slot < m * n / 32; ++slot) {
            c[element<accumulator>(lane, slot, m * n)] = mine->c[slot];
        }
    }
    for (int r = 0; r < m; ++r) {
        for (int i = 0; i < k; ++i) {
            for (int col = 0; col < n; ++col) c[n * r + col] += a[k * r + i] * b[n * i + col];
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const auto* mine = reinterpret_cast<const Operands*>(lanes[lane]);
        for (int slot = 0; slot < m * n / 32; ++slot) {
            mine->d[slot] = c[element<accumulator>(lane, slot, m * n)];
        }
    }
}

}  // namespace host

template <typename Use, int m, int n, int k, typename T, typename Layout>
void fill_fragment(fragment<Use, m, n, k, T, Layout>& f, T value) {
    for (T& x : f.x) x = value;
}

template <typename Use, int m, int n, int k, typename Layout>
void load_matrix_sync(fragment<Use, m, n, k, __half, Layout>& to, const __half* at,
                      unsigned row_stride, int line = __builtin_LINE()) {
    host::load(to, at, row_stride, Layout::rows, line);
}

template <int m, int n, int k>
void load_matrix_sync(fragment<accumulator, m, n, k, float>& to, const float* at,
                      unsigned row_stride, layout_t layout, int line = __builtin_LINE()) {
    host::load(to, at, row_stride, layout == mem_row_major, line);
}

template <int m, int n, int k>
void store_matrix_sync(float* at, const fragment<accumulator, m, n, k, float>& from,
                       unsigned row_stride, layout_t layout, int line = __builtin_LINE()) {
    host::check(at, row_stride, line);
    for (int slot = 0; slot < from.num_elements; ++slot) {
        const int e = host::element<accumulator>(fpenet_host::lane(), slot, m * n);
        const int r = e / n, c = e % n;
        at[layout == mem_row_major ? r * row_stride + c : c * row_stride + r] = from.x[slot];
    }
}

template <int m, int n, int k, typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, m, n, k, float>& d,
              const fragment<matrix_a, m, n, k, __half, LayoutA>& a,
              const fragment<matrix_b, m, n, k, __half, LayoutB>& b,
              const fragment<accumulator, m, n, k, float>& c, int line = __builtin_LINE()) {
    const host::Operands mine = {a.x, b.x, c.x, d.x};
    uint64_t all[32];
    if (fpenet_host::gather(reinterpret_cast<uint64_t>(&mine), all, line)) {
        host::multiply<m, n, k>(all);
    }
}

}  // namespace wmma
}  // namespace nvcuda
