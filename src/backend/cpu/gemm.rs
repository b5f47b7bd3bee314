//! The matrix product behind the 1x1 convolutions, with its epilogue fused:
//! ```text
//! Y[m][p] = act(sum_k W[m][k] X[k][p] + bias[m] + R[m][p])
//! ```
//! for M x K weights and K planes of P pixels. [`multiply`] runs one product, or two back to back.
//!
//! Pixels are cut into tiles of [`TILE`]: whole cache lines of every plane. The inner loop reads a
//! tile of X where it is; what is not in memory as planes is written down first, tile by tile
//! ([`TileSource`]). A tile stays in cache while all panels of MR rows of W pass over it (in L1 up to
//! K = 128; the loop runs as fast from L2). Register block: MR = 6 rows x 2 vectors of AVX2 (12
//! accumulators, 2 pixels, 1 weight: 15 of 16 registers), or x 4 of AVX-512 (29 of 32). 4 x 3 would
//! need all 16, and the compiler spilled one: half the speed.
//!
//! The `gemm` crate serves the weight gradients ([`dot_pixels`]), where there is no epilogue.

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::scratch::with_scratch;
use super::simd::{Isa, Kernel, Simd};
use crate::graph::Shape;

/// Rows of a register block.
pub const MR: usize = 6;
/// Pixels of a tile; a multiple of the register block's on every instruction set.
pub const TILE: usize = 64;
/// Elements from row to row of a tile that was written down: an odd number of cache lines, so that
/// rows spread over all cache sets.
const PITCH: usize = TILE + 16;

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
        for (panel, data) in data.chunks_exact_mut((k * MR).max(1)).enumerate() {
            let rows = MR.min(m - panel * MR);
            for (col, data) in data.chunks_exact_mut(MR).enumerate() {
                for (i, value) in data[..rows].iter_mut().enumerate() {
                    *value = at(panel * MR + i, col);
                }
            }
        }
        PackedWeights { data, m, k }
    }
}

/// The operand X of a product: K rows of pixels.
pub trait TileSource: Sync {
    /// Writes pixels `start .. start + count` of all rows, `pitch` elements from row to row.
    fn pack(&self, isa: Isa, start: usize, count: usize, pitch: usize, packed: &mut [f32]);

    /// Where the rows of the tile at `start` lie, if the whole tile is in memory as it is.
    fn rows(&self, start: usize) -> Option<Rows> {
        let _ = start;
        None
    }

    /// What will be read soon when the tile at `start` is worked on: two tiles further, since the next
    /// one has been asked for already.
    fn ahead(&self, start: usize) -> Option<Rows> {
        self.rows(start + 2 * TILE)
    }
}

/// Rows of a tile in memory.
#[derive(Clone, Copy)]
pub struct Rows {
    /// First row.
    pub base: *const f32,
    /// Number of rows.
    pub count: usize,
    /// Elements from row to row.
    pub stride: usize,
}

/// K planes at a fixed stride.
pub struct Planes {
    /// First plane.
    pub base: *const f32,
    /// Number of planes.
    pub k: usize,
    /// Elements between planes.
    pub stride: usize,
    /// Pixels from `base` to the planes' end, the range to be multiplied and what follows it: the
    /// next range that a thread is given is mostly the one behind, and is asked for ahead of time.
    pub pixels: usize,
}

unsafe impl Sync for Planes {}

impl TileSource for Planes {
    fn pack(&self, _: Isa, start: usize, count: usize, pitch: usize, packed: &mut [f32]) {
        assert!(start + count <= self.pixels);
        for (row, packed) in packed.chunks_mut(pitch).take(self.k).enumerate() {
            let pixels = self.base.wrapping_add(row * self.stride + start);
            unsafe { pixels.copy_to_nonoverlapping(packed[..count].as_mut_ptr(), count) }
        }
    }

    fn rows(&self, start: usize) -> Option<Rows> {
        let rows = Rows { base: self.base.wrapping_add(start), count: self.k, stride: self.stride };
        (start + TILE <= self.pixels).then_some(rows)
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
    /// The same for the pixels from `start` on.
    pub fn at(self, start: usize) -> Self {
        let residual = match self.residual.is_null() {
            true => self.residual,
            false => self.residual.wrapping_add(start),
        };
        Epilogue { out: self.out.wrapping_add(start), residual, ..self }
    }

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

/// A matrix product: its weights and what follows it.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// M x K weights.
    pub weights: &'a PackedWeights,
    /// What is done with the M rows.
    pub epilogue: Epilogue,
}

/// Computes pixels `range` of all rows of `first`, and of `second`, whose operand is what `first`
/// yields (after its epilogue), tile by tile: that operand is read from cache, not from its planes.
/// All of a tile's pixels are read before any is written, so `second` may write over the source.
///
/// # Safety
/// The source covers those pixels; the epilogues' planes hold them, and no other thread touches
/// them meanwhile.
pub unsafe fn multiply(
    isa: Isa,
    source: &dyn TileSource,
    range: Range<usize>,
    first: Product,
    second: Option<Product>,
) {
    let (k, m) = (first.weights.k, first.weights.m);
    assert!(second.is_none_or(|second| second.weights.k == m));
    with_scratch(k * PITCH, |packed| {
        for start in range.clone().step_by(TILE) {
            if range.end - start < TILE {
                return unsafe { multiply_edge(isa, source, start..range.end, first, second) };
            }
            let x = source.rows(start).unwrap_or_else(|| {
                source.pack(isa, start, TILE, PITCH, packed);
                Rows { base: packed.as_ptr(), count: k, stride: PITCH }
            });
            let mut ahead = Ahead::new(source.ahead(start));
            let (weights, epilogue) = (first.weights, first.epilogue.at(start));
            unsafe { isa.run(TileKernel { weights, x, epilogue, ahead: &mut ahead }) }
            if let Some(Product { weights, epilogue: second }) = second {
                let x = Rows { base: epilogue.out, count: m, stride: epilogue.out_stride };
                let epilogue = second.at(start);
                unsafe { isa.run(TileKernel { weights, x, epilogue, ahead: &mut ahead }) }
            }
        }
    });
}

/// [`multiply`] for less than a tile: once per range at most, and out of the way of the others. Works
/// on copies that are as wide as a tile, with zeros past the end.
#[cold]
unsafe fn multiply_edge(
    isa: Isa,
    source: &dyn TileSource,
    pixels: Range<usize>,
    first: Product,
    second: Option<Product>,
) {
    let (k, m) = (first.weights.k, first.weights.m);
    let last = second.map_or(0, |second| second.weights.m);
    with_scratch((k + m + last) * PITCH, |scratch| {
        scratch.fill(0.0);
        let (x, rest) = scratch.split_at_mut(k * PITCH);
        let (between, y) = rest.split_at_mut(m * PITCH);
        source.pack(isa, pixels.start, pixels.len(), PITCH, x);
        unsafe {
            product_of_copy(isa, first, &pixels, x, between);
            if let Some(second) = second {
                product_of_copy(isa, second, &pixels, between, y);
            }
        }
    });
}

/// One product of a copied operand, by way of `y`: M rows of [`PITCH`], zero.
unsafe fn product_of_copy(
    isa: Isa,
    Product { weights, epilogue }: Product,
    pixels: &Range<usize>,
    x: &[f32],
    y: &mut [f32],
) {
    let planes = epilogue.at(pixels.start);
    let count = pixels.len();
    let x = Rows { base: x.as_ptr(), count: weights.k, stride: PITCH };
    let mut epilogue = Epilogue { out: y.as_mut_ptr(), out_stride: PITCH, ..planes };
    unsafe {
        if !planes.residual.is_null() {
            for (row, y) in y.chunks_exact_mut(PITCH).enumerate() {
                let residual = planes.residual.add(row * planes.residual_stride);
                residual.copy_to_nonoverlapping(y.as_mut_ptr(), count);
            }
            (epilogue.residual, epilogue.residual_stride) = (epilogue.out, PITCH);
        }
        isa.run(TileKernel { weights, x, epilogue, ahead: &mut Ahead::new(None) });
        for (row, y) in y.chunks_exact(PITCH).enumerate() {
            let out = planes.out.add(row * planes.out_stride);
            y.as_ptr().copy_to_nonoverlapping(out, count);
        }
    }
}

/// Hands out all pixels of all images of a shape in runs of whole tiles, to all threads: (image,
/// pixels). Runs are long enough to hide the cost of scheduling them, and short enough for every
/// thread to get a few.
pub fn for_runs(shape: Shape, work: impl Fn(usize, Range<usize>) + Sync) {
    const LONGEST: usize = 16;
    let tiles = (shape.n * shape.plane()).div_ceil(16 * rayon::current_num_threads() * TILE);
    let run = tiles.clamp(1, LONGEST) * TILE;
    let runs = shape.plane().div_ceil(run);
    (0..shape.n * runs).into_par_iter().with_max_len(1).for_each(|task| {
        let (image, start) = (task / runs, task % runs * run);
        work(image, start..(start + run).min(shape.plane()));
    });
}

/// Rows of a later tile that are still to be asked for. A tile touches a few lines of every plane: too
/// short a run for the processor to see it coming by itself.
#[derive(Clone, Copy)]
struct Ahead {
    next: *const f32,
    left: usize,
    stride: usize,
}

impl Ahead {
    fn new(rows: Option<Rows>) -> Self {
        match rows {
            Some(rows) => Ahead { next: rows.base, left: rows.count, stride: rows.stride },
            None => Ahead { next: std::ptr::null(), left: 0, stride: 0 },
        }
    }

    /// Asks for one more row.
    #[inline(always)]
    unsafe fn fetch<S: Simd>(&mut self) {
        if self.left > 0 {
            for line in 0..TILE / 16 {
                unsafe { S::prefetch(self.next.wrapping_add(16 * line)) }
            }
            self.next = self.next.wrapping_add(self.stride);
            self.left -= 1;
        }
    }
}

/// A product over one tile.
struct TileKernel<'a> {
    weights: &'a PackedWeights,
    x: Rows,
    /// From the tile's first pixel on.
    epilogue: Epilogue,
    ahead: &'a mut Ahead,
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
        let PackedWeights { data, m, k } = self.weights;
        let mut ahead = *self.ahead;
        for strip in (0..TILE).step_by(NV * S::LANES) {
            let x = Rows { base: self.x.base.wrapping_add(strip), ..self.x };
            let epilogue = self.epilogue.at(strip);
            for row in (0..*m).step_by(MR) {
                unsafe {
                    let w = data.as_ptr().add(row * k);
                    match m - row {
                        1 => block::<S, NV, 1>(w, x, &epilogue, row, &mut ahead),
                        2 => block::<S, NV, 2>(w, x, &epilogue, row, &mut ahead),
                        3 => block::<S, NV, 3>(w, x, &epilogue, row, &mut ahead),
                        4 => block::<S, NV, 4>(w, x, &epilogue, row, &mut ahead),
                        5 => block::<S, NV, 5>(w, x, &epilogue, row, &mut ahead),
                        _ => block::<S, NV, MR>(w, x, &epilogue, row, &mut ahead),
                    }
                }
            }
        }
        *self.ahead = ahead;
    }
}

/// A register block of ROWS x NV vectors: product, then residual, ReLU and store. The sums stay in
/// registers until they are stored: each question is asked once for all of them.
#[inline(always)]
unsafe fn block<S: Simd, const NV: usize, const ROWS: usize>(
    w: *const f32,
    x: Rows,
    e: &Epilogue,
    row: usize,
    ahead: &mut Ahead,
) {
    let out = e.out.wrapping_add(row * e.out_stride);
    let residual = e.residual.wrapping_add(row * e.residual_stride);
    unsafe {
        for i in 0..ROWS {
            for j in 0..NV {
                S::prefetch_write(out.wrapping_add(i * e.out_stride + j * S::LANES));
            }
        }
        if !e.residual.is_null() {
            for i in 0..ROWS {
                for j in 0..NV {
                    S::prefetch(residual.wrapping_add(i * e.residual_stride + j * S::LANES));
                }
            }
        }
        let mut acc = [[S::zero(); NV]; ROWS];
        if !e.bias.is_null() {
            for (i, sums) in acc.iter_mut().enumerate() {
                *sums = [S::splat(*e.bias.add(row + i)); NV];
            }
        }
        let mut acc = product(acc, w, x, ahead);
        if !e.residual.is_null() {
            for (i, sums) in acc.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.add(S::load(residual.add(i * e.residual_stride + j * S::LANES)));
                }
            }
        }
        if e.relu {
            for sums in acc.iter_mut() {
                for sum in sums {
                    *sum = S::zero().max(*sum);
                }
            }
        }
        for (i, sums) in acc.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                sum.store(out.add(i * e.out_stride + j * S::LANES));
            }
        }
    }
}

/// `acc[i][j] + sum over k of w[k][i] * x[k][j]`. Requests for a later tile in between, a row at a
/// time: many at once would hold up the loads behind them.
#[inline(always)]
unsafe fn product<S: Simd, const NV: usize, const ROWS: usize>(
    mut acc: [[S; NV]; ROWS],
    mut w: *const f32,
    rows: Rows,
    ahead: &mut Ahead,
) -> [[S; NV]; ROWS] {
    /// Steps between requests.
    const STEPS: usize = 4;
    let mut x = rows.base;
    let mut step = || unsafe {
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
        x = x.wrapping_add(rows.stride);
    };
    for _ in 0..rows.count / STEPS {
        unsafe { ahead.fetch::<S>() }
        for _ in 0..STEPS {
            step();
        }
    }
    for _ in 0..rows.count % STEPS {
        step();
    }
    acc
}

/// `C[m][k] = sum_p A[m][p] B[k][p]` over `pixels` of two sets of planes: the weight gradient of a
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

#[cfg(test)]
#[path = "gemm_tests.rs"]
mod tests;
