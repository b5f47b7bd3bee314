//! Matrix products through cuBLAS.

use std::ffi::c_void;

use cudarc::cublas::result::{self, CublasError};
use cudarc::cublas::sys::{
    self, cublasComputeType_t, cublasGemmAlgo_t, cublasHandle_t, cublasMath_t, cublasOperation_t,
    cudaDataType,
};
use cudarc::driver::sys::{CUdeviceptr, CUstream};

use super::super::{Element, Gemm, Matrix};
use crate::error::{Error, Result};

/// Name of the library call, for messages.
pub(super) const CALL: &str = "cublasGemmStridedBatchedEx";

/// A cuBLAS handle on one stream with a workspace of its own: what cuBLAS allocates by itself it
/// may not allocate while a graph is captured.
pub(super) struct Blas {
    handle: cublasHandle_t,
}

impl Blas {
    /// Opens cuBLAS; the context must be current. `workspace` must outlive the handle.
    pub(super) fn new(
        stream: CUstream,
        workspace: CUdeviceptr,
        workspace_bytes: usize,
    ) -> Result<Self, CublasError> {
        let blas = Blas { handle: result::create_handle()? };
        // Default math without TF32: f32 products are f32 products. The flag keeps the sums of
        // f16 products in f32 where cuBLAS splits k.
        let math = cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        unsafe {
            result::set_stream(blas.handle, stream.cast())?;
            // After the stream: setting a stream resets the workspace.
            sys::cublasSetWorkspace_v2(blas.handle, workspace as *mut c_void, workspace_bytes)
                .result()?;
            sys::cublasSetMathMode(blas.handle, math).result()?;
        }
        Ok(blas)
    }

    /// Launches a product; `a`, `b`, `c` are the addresses of its operands.
    pub(super) fn gemm(&self, gemm: &Gemm, [a, b, c]: [CUdeviceptr; 3]) -> Result<()> {
        let alpha = 1.0f32;
        let data_type = |element| match element {
            Element::F32 => cudaDataType::CUDA_R_32F,
            Element::F16 => cudaDataType::CUDA_R_16F,
        };
        // Half-precision operands may have a product in f32, which is rounded once, after bias
        // and residual.
        let (data, result_data) = (data_type(gemm.element), data_type(gemm.result));
        let Sizes { m, n, k, batch } = Sizes::of(gemm)?;
        let (a_op, a_stride, a_step) = operand(&gemm.a)?;
        let (b_op, b_stride, b_step) = operand(&gemm.b)?;
        let (_, c_stride, c_step) = operand(&gemm.c)?;
        // Row-major C = A B is column-major C^T = B^T A^T: B goes first, m and n change places.
        let status = unsafe {
            result::gemm_strided_batched_ex(
                self.handle,
                b_op,
                a_op,
                n,
                m,
                k,
                (&raw const alpha).cast(),
                b as *const c_void,
                data,
                b_stride,
                b_step,
                a as *const c_void,
                data,
                a_stride,
                a_step,
                (&raw const gemm.beta).cast(),
                c as *mut c_void,
                result_data,
                c_stride,
                c_step,
                batch,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        status.map_err(|error| Error::Kernel {
            kernel: CALL.into(),
            problem: format!("{m} x {k} by {k} x {n}, batch {batch}: {error}"),
        })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // An error would be one of an earlier kernel, which has been reported.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Sizes as cuBLAS takes them.
struct Sizes {
    m: i32,
    n: i32,
    k: i32,
    batch: i32,
}

impl Sizes {
    fn of(gemm: &Gemm) -> Result<Self> {
        Ok(Sizes { m: int(gemm.m)?, n: int(gemm.n)?, k: int(gemm.k)?, batch: int(gemm.batch)? })
    }
}

/// Operation, row stride and batch stride. A row-major matrix is the column-major transpose,
/// which is what the transposed product wants of it; only a stored transpose is turned.
fn operand(matrix: &Matrix) -> Result<(cublasOperation_t, i32, i64)> {
    let operation = match matrix.transposed {
        false => cublasOperation_t::CUBLAS_OP_N,
        true => cublasOperation_t::CUBLAS_OP_T,
    };
    Ok((operation, int(matrix.row_stride)?, matrix.batch_stride as i64))
}

fn int(value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::Kernel {
        kernel: CALL.into(),
        problem: format!("sizes up to {} are possible, found {value}", i32::MAX),
    })
}
