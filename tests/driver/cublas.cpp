// The one product of cuBLAS that fpenet calls, by its definition: column-major, C = alpha op(A) op(B) + beta C,
// operands in f32 or f16, sums in f32.
#include "driver.h"
#include "host/cuda_host.h"

#include <algorithm>
#include <set>

namespace {

enum Status : int { OK = 0, NOT_SET_UP = 1, INVALID = 7, EXECUTION_FAILED = 13, UNSUPPORTED = 15 };
enum Type : int { R_32F = 0, R_16F = 2 };
constexpr int COMPUTE_32F = 68, OP_N = 0, OP_T = 1, DEFAULT_ALGORITHM = -1;
constexpr int NO_REDUCED_PRECISION = 16;

struct Handle {
    void* stream = nullptr;
    CUdeviceptr workspace = 0;
};

std::set<void*> handles;

size_t size_of(int type) { return type == R_32F ? 4 : 2; }

float load(const void* at, int type, long long index) {
    if (type == R_32F) return static_cast<const float*>(at)[index];
    return __half2float(static_cast<const __half*>(at)[index]);
}

void store(void* at, int type, long long index, float value) {
    if (type == R_32F) {
        static_cast<float*>(at)[index] = value;
    } else {
        static_cast<__half*>(at)[index] = __float2half(value);
    }
}

// One operand: `rows` x `columns` as it lies in memory.
struct Matrix {
    CUdeviceptr at;
    int type, rows, columns, leading;
    long long step;

    bool sound(int batch) const {
        if (leading < (rows > 1 ? rows : 1) || (type != R_32F && type != R_16F)) return false;
        const long long last = step * (batch - 1) + 1ll * leading * (columns - 1) + rows;
        return driver::on_device(at, static_cast<size_t>(last) * size_of(type));
    }
    // Element (r, c) of op(matrix), widened, for the whole of a batch item.
    std::vector<float> widen(int item, bool transposed) const {
        std::vector<float> values(static_cast<size_t>(rows) * static_cast<size_t>(columns));
        const void* base = reinterpret_cast<const void*>(at);
        for (long long c = 0; c < columns; ++c) {
            for (long long r = 0; r < rows; ++r) {
                const long long to = transposed ? r * columns + c : c * rows + r;
                values[static_cast<size_t>(to)] = load(base, type, step * item + c * leading + r);
            }
        }
        return values;
    }
};

struct Product {
    int m, n, k, batch;
    bool a_transposed, b_transposed;
    Matrix a, b, c;
    float alpha, beta;

    void operator()() const {
        if (!driver::works()) return;
        std::vector<float> column(static_cast<size_t>(m));
        for (int item = 0; item < batch; ++item) {
            // op(A) is m x k and op(B) k x n, both column by column now.
            const std::vector<float> left = a.widen(item, a_transposed), right = b.widen(item, b_transposed);
            for (long long j = 0; j < n; ++j) {
                std::fill(column.begin(), column.end(), 0.0f);
                for (long long p = 0; p < k; ++p) {
                    const float factor = right[static_cast<size_t>(j * k + p)];
                    const float* from = left.data() + p * m;
                    for (long long i = 0; i < m; ++i) column[static_cast<size_t>(i)] += from[i] * factor;
                }
                void* out = reinterpret_cast<void*>(c.at);
                for (long long i = 0; i < m; ++i) {
                    const long long to = c.step * item + j * c.leading + i;
                    // With beta 0, C is not read: it may hold NaN.
                    const float before = beta == 0.0f ? 0.0f : beta * load(out, c.type, to);
                    store(out, c.type, to, alpha * column[static_cast<size_t>(i)] + before);
                }
            }
        }
    }
};

}  // namespace

API int cublasCreate_v2(void** handle) {
    driver::Call call;
    if (!call) return NOT_SET_UP;
    *handle = *handles.insert(new Handle).first;
    return OK;
}

API int cublasDestroy_v2(void* handle) {
    driver::Call call;
    if (handles.erase(handle) == 0) return NOT_SET_UP;
    delete static_cast<Handle*>(handle);
    return OK;
}

API int cublasSetStream_v2(void* handle, void* stream) {
    driver::Call call;
    if (handles.count(handle) == 0) return NOT_SET_UP;
    // The manual: this resets the workspace to the default one.
    *static_cast<Handle*>(handle) = Handle{stream, 0};
    return OK;
}

API int cublasSetWorkspace_v2(void* handle, void* workspace, size_t bytes) {
    driver::Call call;
    if (handles.count(handle) == 0) return NOT_SET_UP;
    const auto address = reinterpret_cast<CUdeviceptr>(workspace);
    if (address % 256 != 0 || !driver::on_device(address, bytes)) return INVALID;
    static_cast<Handle*>(handle)->workspace = address;
    return OK;
}

API int cublasSetMathMode(void* handle, int mode) {
    driver::Call call;
    if (handles.count(handle) == 0) return NOT_SET_UP;
    // Default math: no TF32.
    return mode == NO_REDUCED_PRECISION ? OK : INVALID;
}

API int cublasGemmStridedBatchedEx(void* handle, int a_op, int b_op, int m, int n, int k, const void* alpha,
                                   const void* a, int a_type, int lda, long long a_step, const void* b, int b_type,
                                   int ldb, long long b_step, const void* beta, void* c, int c_type, int ldc,
                                   long long c_step, int batch, int compute, int algorithm) {
    driver::Call call;
    if (!call) return EXECUTION_FAILED;
    if (handles.count(handle) == 0) return NOT_SET_UP;
    const auto* blas = static_cast<Handle*>(handle);
    if (driver::capturing(blas->stream) && blas->workspace == 0) {
        driver::misuse("a product is captured without a workspace of its own: cuBLAS would reserve memory");
    }
    const auto at = [](const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); };
    const bool known = (a_op == OP_N || a_op == OP_T) && (b_op == OP_N || b_op == OP_T) && compute == COMPUTE_32F &&
                       algorithm == DEFAULT_ALGORITHM && a_type == b_type && (c_type == a_type || c_type == R_32F);
    if (!known) return UNSUPPORTED;
    if (m <= 0 || n <= 0 || k <= 0 || batch <= 0) driver::misuse("an empty product: %d x %d x %d", m, n, k);
    const bool a_t = a_op == OP_T, b_t = b_op == OP_T;
    const Product product{m, n, k, batch, a_t, b_t,
                          Matrix{at(a), a_type, a_t ? k : m, a_t ? m : k, lda, a_step},
                          Matrix{at(b), b_type, b_t ? n : k, b_t ? k : n, ldb, b_step},
                          Matrix{at(c), c_type, m, n, ldc, c_step},
                          // Host pointers, read by the call itself; f32 as the sums are.
                          *static_cast<const float*>(alpha), *static_cast<const float*>(beta)};
    if (!product.a.sound(batch) || !product.b.sound(batch) || !product.c.sound(batch)) return INVALID;
    return driver::enqueue(blas->stream, driver::Op{product, {}, {}}) == SUCCESS ? OK : EXECUTION_FAILED;
}
