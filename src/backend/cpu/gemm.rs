//! The matrix product behind the 1x1 convolutions, with its epilogue fused:
//!   Y[m][p] = act(sum_k W[m][k] X[k][p] + bias[m] + R[m][p])
//! for M x K weights and K planes of P pixels.
//!
//! Pixels are cut into tiles of [`TILE`]. A tile of X is packed into strips of NR pixels, each
//! K x NR and contiguous, so that the inner loop reads memory in order whatever the plane
//! stride. A strip stays in L1 while all panels of MR rows of W pass over it, and every store
//! fills whole cache lines. Register block: MR = 6 rows x 2 vectors of AVX2 (12 accumulators, 2
//! pixels, 1 weight: 15 of 16 registers), or x 4 of AVX-512 (29 of 32). 4 x 3 would need all 16,
//! and the compiler spilled one: half the speed.
//!
//! The `gemm` crate serves the weight gradients ([`dot_pixels`]), where there is no epilogue.

use gemm::Parallelism;

use super::scratch::with_scratch;
use super::simd::{Isa, Kernel, Simd};

/// Rows of a register block.
pub const MR: usize = 6;
/// Pixels of a tile; a multiple of NR on every instruction set.
pub const TILE: usize = 64;

/// Weights in panels of MR rows: `[panel][k][MR]`, missing rows zero.
pub struct PackedWeights {
    data: Vec<f32>,
    m: usize,
    k: usize,
}

impl PackedWeights {
    /// Packs a row-major M x K matrix.
    pub fn new(w: &[f32], m: usize, k: usize) -> Self {
        Self::from_fn(m, k, |row, col| w[row * k + col])
    }

    /// Packs the transpose of a row-major K x M matrix, for the data gradient.
    pub fn transposed(w: &[f32], m: usize, k: usize) -> Self {
        Self::from_fn(m, k, |row, col| w[col * m + row])
    }

    fn from_fn(m: usize, k: usize, at: impl Fn(usize, usize) -> f32) -> Self {
        let panels = m.div_ceil(MR);
        let mut data = vec![0.0; panels * k * MR];
        for (row, col) in (0..m).flat_map(|r| (0..k).map(move |c| (r, c))) {
            data[(row / MR * k + col) * MR + row % MR] = at(row, col);
        }
        PackedWeights { data, m, k }
    }
}

/// Fills the packed tile: K rows of `TILE` pixels from pixel `start`, as strips of `nr`.
pub trait TileSource: Sync {
    /// Writes `packed[(strip * k + row) * nr ..][..nr]`; pixels past the end must be finite.
    fn pack(&self, isa: Isa, start: usize, count: usize, nr: usize, packed: &mut [f32]);
}

/// K planes at a fixed stride.
pub struct Planes {
    /// First plane.
    pub base: *const f32,
    /// Number of planes.
    pub k: usize,
    /// Elements between planes.
    pub stride: usize,
}

unsafe impl Sync for Planes {}

impl TileSource for Planes {
    fn pack(&self, isa: Isa, start: usize, count: usize, nr: usize, packed: &mut [f32]) {
        assert!(packed.len() >= count.div_ceil(nr) * nr * self.k);
        let base = unsafe { self.base.add(start) };
        unsafe {
            isa.run(PackPlanes { planes: self, base, count, nr, packed: packed.as_mut_ptr() })
        }
    }
}

struct PackPlanes<'a> {
    planes: &'a Planes,
    base: *const f32,
    count: usize,
    nr: usize,
    packed: *mut f32,
}

impl Kernel for PackPlanes<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (k, nr) = (self.planes.k, self.nr);
        for row in 0..k {
            unsafe {
                let source = self.base.add(row * self.planes.stride);
                let mut at = 0;
                while at < self.count {
                    let lanes = (self.count - at).min(S::LANES);
                    let p = source.add(at);
                    let v = if lanes == S::LANES { S::load(p) } else { S::load_first(p, lanes) };
                    v.store(self.packed.add((at / nr * k + row) * nr + at % nr));
                    at += S::LANES;
                }
                // The rest of the last strip, where its vectors hold no pixel at all.
                while at % nr != 0 {
                    S::zero().store(self.packed.add((at / nr * k + row) * nr + at % nr));
                    at += S::LANES;
                }
            }
        }
    }
}

/// Where a product goes and what is done to it on the way.
#[derive(Clone, Copy)]
pub struct Epilogue {
    /// First output plane.
    pub out: *mut f32,
    /// Elements between output planes.
    pub out_stride: usize,
    /// M values, or null.
    pub bias: *const f32,
    /// M planes added before the activation, or null; may be `out` itself (accumulation).
    pub residual: *const f32,
    /// Elements between residual planes.
    pub residual_stride: usize,
    /// Non-linearity; the sigmoid is left to the caller.
    pub relu: bool,
}

unsafe impl Send for Epilogue {}
unsafe impl Sync for Epilogue {}

impl Epilogue {
    /// Plain product into planes.
    pub fn store(out: *mut f32, out_stride: usize) -> Self {
        Epilogue {
            out,
            out_stride,
            bias: std::ptr::null(),
            residual: std::ptr::null(),
            residual_stride: 0,
            relu: false,
        }
    }
}

/// Computes pixels `start .. start + count` (at most [`TILE`]) of all M rows.
///
/// # Safety
/// The source covers those pixels; the epilogue's planes hold them, and no other thread touches
/// them meanwhile.
pub unsafe fn gemm_tile(
    isa: Isa,
    w: &PackedWeights,
    x: &dyn TileSource,
    start: usize,
    count: usize,
    epilogue: &Epilogue,
) {
    let nr = match isa {
        Isa::Avx512 => 64,
        Isa::Avx2 | Isa::Portable => 16,
    };
    with_scratch(w.k * TILE, |packed| {
        x.pack(isa, start, count, nr, packed);
        let kernel = TileKernel { w, x: packed.as_ptr(), start, count, epilogue };
        unsafe { isa.run(kernel) }
    });
}

struct TileKernel<'a> {
    w: &'a PackedWeights,
    x: *const f32,
    start: usize,
    count: usize,
    epilogue: &'a Epilogue,
}

impl Kernel for TileKernel<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe { if S::LANES == 16 { self.tile::<S, 4>() } else { self.tile::<S, 2>() } }
    }
}

impl TileKernel<'_> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const NV: usize>(self) {
        let (m, k, nr) = (self.w.m, self.w.k, NV * S::LANES);
        for strip in 0..self.count.div_ceil(nr) {
            let first = strip * nr;
            let pixels = Pixels { start: self.start + first, valid: (self.count - first).min(nr) };
            for panel in 0..m.div_ceil(MR) {
                let row = panel * MR;
                unsafe {
                    let w = self.w.data.as_ptr().add(row * k);
                    let x = self.x.add(first * k);
                    match m - row {
                        1 => self.block::<S, NV, 1>(w, x, row, pixels),
                        2 => self.block::<S, NV, 2>(w, x, row, pixels),
                        3 => self.block::<S, NV, 3>(w, x, row, pixels),
                        4 => self.block::<S, NV, 4>(w, x, row, pixels),
                        5 => self.block::<S, NV, 5>(w, x, row, pixels),
                        _ => self.block::<S, NV, MR>(w, x, row, pixels),
                    }
                }
            }
        }
    }

    /// A register block of ROWS x NR: product, then bias, residual, ReLU and store.
    #[inline(always)]
    unsafe fn block<S: Simd, const NV: usize, const ROWS: usize>(
        &self,
        w: *const f32,
        x: *const f32,
        row: usize,
        pixels: Pixels,
    ) {
        let e = self.epilogue;
        unsafe {
            let acc = product::<S, NV, ROWS>(w, x, self.w.k);
            for (i, vectors) in acc.iter().enumerate() {
                let bias = S::splat(if e.bias.is_null() { 0.0 } else { *e.bias.add(row + i) });
                let out = e.out.add((row + i) * e.out_stride + pixels.start);
                let residual =
                    e.residual.wrapping_add((row + i) * e.residual_stride + pixels.start);
                for (j, &v) in vectors.iter().enumerate() {
                    let at = j * S::LANES;
                    if at >= pixels.valid {
                        break;
                    }
                    let lanes = (pixels.valid - at).min(S::LANES);
                    let full = lanes == S::LANES;
                    let mut y = v.add(bias);
                    if !e.residual.is_null() {
                        let p = residual.add(at);
                        y = y.add(if full { S::load(p) } else { S::load_first(p, lanes) });
                    }
                    if e.relu {
                        y = S::zero().max(y);
                    }
                    if full { y.store(out.add(at)) } else { y.store_first(out.add(at), lanes) }
                }
            }
        }
    }
}

/// Pixels of a strip: the first, and how many are inside the plane.
#[derive(Clone, Copy)]
struct Pixels {
    start: usize,
    valid: usize,
}

/// ROWS x NR register block: sum over k of w[k][i] * x[k][j].
#[inline(always)]
unsafe fn product<S: Simd, const NV: usize, const ROWS: usize>(
    mut w: *const f32,
    mut x: *const f32,
    k: usize,
) -> [[S; NV]; ROWS] {
    unsafe {
        let mut acc = [[S::zero(); NV]; ROWS];
        for _ in 0..k {
            let mut columns = [S::zero(); NV];
            for (j, c) in columns.iter_mut().enumerate() {
                *c = S::load(x.add(j * S::LANES));
            }
            for (i, row) in acc.iter_mut().enumerate() {
                let weight = S::splat(*w.add(i));
                for (a, c) in row.iter_mut().zip(columns) {
                    *a = weight.mul_add(c, *a);
                }
            }
            w = w.add(MR);
            x = x.add(NV * S::LANES);
        }
        acc
    }
}

/// C[m][k] = sum_p A[m][p] B[k][p] over `pixels` of two sets of planes: the weight gradient of a
/// 1x1 convolution for one image. `out` is row-major M x K and is overwritten.
///
/// # Safety
/// `a` and `b` point to M and K planes of `pixels` elements at the given strides.
#[allow(clippy::too_many_arguments)]
pub unsafe fn dot_pixels(
    m: usize,
    k: usize,
    pixels: usize,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    out: &mut [f32],
) {
    assert_eq!(out.len(), m * k);
    unsafe {
        gemm::gemm(
            m,
            k,
            pixels,
            out.as_mut_ptr(),
            1,
            k as isize,
            false,
            a,
            1,
            a_stride as isize,
            b,
            b_stride as isize,
            1,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            Parallelism::None,
        )
    }
}
