//! Commands for a [`GpuDevice`](super::GpuDevice), and the one place that decides launch shapes:
//! grid, block and shared memory are the same on a real and on the emulated device.

use super::device::{Buffer, Element, Place};

/// An argument of a kernel, in the order of its declaration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// Pointer into device memory (8 bytes).
    Pointer(Place),
    /// Null pointer (8 bytes): an operand that is absent.
    Null,
    /// int (4 bytes).
    I32(i32),
    /// float (4 bytes).
    F32(f32),
}

impl From<Place> for Arg {
    fn from(place: Place) -> Self {
        Arg::Pointer(place)
    }
}

impl From<Option<Place>> for Arg {
    fn from(place: Option<Place>) -> Self {
        place.map_or(Arg::Null, Arg::Pointer)
    }
}

impl From<Buffer> for Arg {
    fn from(buffer: Buffer) -> Self {
        Arg::Pointer(buffer.into())
    }
}

impl From<usize> for Arg {
    fn from(value: usize) -> Self {
        // Sizes and strides of one image; the plan refuses what does not fit (`check_sizes`).
        Arg::I32(value as i32)
    }
}

impl From<bool> for Arg {
    fn from(value: bool) -> Self {
        Arg::I32(i32::from(value))
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Arg::F32(value)
    }
}

/// One kernel launch.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Entry point in `kernels/*.cu`.
    pub kernel: &'static str,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z; their product is a multiple of 32.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// Arguments.
    pub args: Vec<Arg>,
}

/// A row-major matrix operand, one per element of the batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Matrix {
    /// First element of the first matrix.
    pub at: Place,
    /// Elements from one stored row to the next.
    pub row_stride: usize,
    /// Elements from one matrix of the batch to the next; 0 shares one.
    pub batch_stride: usize,
    /// Whether memory holds the transpose of the operand (never for C).
    pub transposed: bool,
}

/// C = A B + beta C for row-major matrices: A is m x k, B is k x n, C is m x n. All three are
/// stored as `element`; products are added up in f32 (TF32 off).
///
/// For a column-major BLAS: C^T = B^T A^T, so pass B first, A second, with n and m swapped.
#[derive(Debug, Clone, PartialEq)]
pub struct Gemm {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// Number of products.
    pub batch: usize,
    /// Left operand.
    pub a: Matrix,
    /// Right operand.
    pub b: Matrix,
    /// Result.
    pub c: Matrix,
    /// 0 to overwrite C (which may hold anything, NaN included), 1 to add to it.
    pub beta: f32,
    /// Storage of all three.
    pub element: Element,
}

/// What a step of a plan becomes.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// A kernel.
    Launch(Launch),
    /// A matrix product.
    Gemm(Gemm),
}
