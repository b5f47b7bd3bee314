//! The matrix product behind the 1x1 convolutions, with its epilogue fused:
//! ```text
//! Y[m][p] = act(sum_k W[m][k] X[k][p] + bias[m] + R[m][p])
//! ```
//! for M x K weights and K planes of P pixels. [`multiply`] runs one product, or two back to back.
//!
//! Pixels are cut into tiles of [`TILE`]. A tile of X is packed into strips of NR pixels, each
//! K x NR and contiguous, so that the inner loop reads memory in order whatever the plane
//! stride. A strip stays in cache while all panels of MR rows of W pass over it (in L1 up to K =
//! 128; the loop runs as fast from L2, read in order), and every store fills whole cache lines.
//! Register block: MR = 6 rows x 2 vectors of AVX2 (12 accumulators, 2 pixels, 1 weight: 15 of 16
//! registers), or x 4 of AVX-512 (29 of 32). 4 x 3 would need all 16, and the compiler spilled one:
//! half the speed.
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

/// Fills the packed tile: K rows of `TILE` pixels from pixel `start`, as strips of `nr`.
pub trait TileSource: Sync {
    /// Writes `packed[(strip * k + row) * nr ..][..nr]`; pixels past the end must be finite.
    fn pack(&self, isa: Isa, start: usize, count: usize, nr: usize, packed: &mut [f32]);

    /// Where the rows of the tile at `start` lie, if the whole tile is in memory as it is.
    fn rows(&self, start: usize) -> Option<Rows> {
        let _ = start;
        None
    }
}

/// Rows of a tile in memory.
#[derive(Clone, Copy)]
pub struct Rows {
    base: *const f32,
    count: usize,
    stride: usize,
}

impl Rows {
    const NONE: Rows = Rows { base: std::ptr::null(), count: 0, stride: 0 };
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
    fn pack(&self, isa: Isa, start: usize, count: usize, nr: usize, packed: &mut [f32]) {
        assert!(packed.len() >= count.div_ceil(nr) * nr * self.k);
        let base = unsafe { self.base.add(start) };
        unsafe {
            isa.run(PackPlanes { planes: self, base, count, nr, packed: packed.as_mut_ptr() })
        }
    }

    fn rows(&self, start: usize) -> Option<Rows> {
        let rows = Rows { base: self.base.wrapping_add(start), count: self.k, stride: self.stride };
        (start + TILE <= self.pixels).then_some(rows)
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
                    let v = S::load_up_to(p, lanes);
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
    let nr = match isa {
        Isa::Avx512 => 64,
        Isa::Avx2 | Isa::Portable => 16,
    };
    let (k, m) = (first.weights.k, first.weights.m);
    assert!(second.is_none_or(|second| second.weights.k == m));
    let between = if second.is_some() { m * TILE } else { 0 };
    with_scratch(k * TILE + between, |scratch| {
        let (packed, between) = scratch.split_at_mut(k * TILE);
        let kept = if second.is_some() { between.as_mut_ptr() } else { std::ptr::null_mut() };
        for start in range.clone().step_by(TILE) {
            let count = TILE.min(range.end - start);
            // The first panel of a whole tile packs it in passing.
            let rows = source.rows(start).filter(|_| count == TILE);
            if rows.is_none() {
                source.pack(isa, start, count, nr, packed);
            }
            // Two tiles ahead: the next one has been asked for already.
            let ahead = source.rows(start + 2 * TILE);
            let x = packed.as_mut_ptr();
            let tile = TileKernel { product: &first, x, rows, start, count, kept, ahead };
            unsafe { isa.run(tile) }
            if let Some(second) = &second {
                let nowhere = std::ptr::null_mut();
                let (x, product) = (kept, second);
                let tile =
                    TileKernel { product, x, rows: None, kept: nowhere, ahead: None, ..tile };
                unsafe { isa.run(tile) }
            }
        }
    });
}

/// Hands out all pixels of all images of a shape in runs of whole tiles, to all threads: (image,
/// pixels). Runs are long enough to hide the cost of scheduling them, and short enough for every
/// thread to get a few.
pub fn for_runs(shape: Shape, work: impl Fn(usize, Range<usize>) + Sync) {
    const LONGEST: usize = 16;
    let tiles = (shape.n * shape.plane()).div_ceil(4 * rayon::current_num_threads() * TILE);
    let run = tiles.clamp(1, LONGEST) * TILE;
    let runs = shape.plane().div_ceil(run);
    (0..shape.n * runs).into_par_iter().for_each(|task| {
        let (image, start) = (task / runs, task % runs * run);
        work(image, start..(start + run).min(shape.plane()));
    });
}

#[derive(Clone, Copy)]
struct TileKernel<'a> {
    product: &'a Product<'a>,
    /// The packed tile.
    x: *mut f32,
    /// Where its rows are, if it has not been packed yet.
    rows: Option<Rows>,
    start: usize,
    count: usize,
    /// Where the result is kept as a packed tile as well, or null.
    kept: *mut f32,
    /// Rows of a later tile. A tile touches a few lines of every plane: too short a run for the
    /// processor to see it coming by itself.
    ahead: Option<Rows>,
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
        let weights = self.product.weights;
        let (m, k, nr) = (weights.m, weights.k, NV * S::LANES);
        let (strips, panels) = (self.count.div_ceil(nr), m.div_ceil(MR));
        for strip in 0..strips {
            let first = strip * nr;
            let pixels = Pixels { start: self.start + first, valid: (self.count - first).min(nr) };
            for panel in 0..panels {
                let row = panel * MR;
                unsafe {
                    let ahead = self.share(strip * panels + panel, strips * panels);
                    let w = weights.data.as_ptr().add(row * k);
                    let x = self.x.add(first * k);
                    let kept = if self.kept.is_null() {
                        self.kept
                    } else {
                        self.kept.add(first * m + row * nr)
                    };
                    let unpacked = self.rows.filter(|_| panel == 0);
                    let rows =
                        unpacked.map(|rows| Rows { base: rows.base.wrapping_add(first), ..rows });
                    let at = Block { w, x, rows, row, pixels, kept, ahead };
                    match m - row {
                        1 => self.block::<S, NV, 1>(at),
                        2 => self.block::<S, NV, 2>(at),
                        3 => self.block::<S, NV, 3>(at),
                        4 => self.block::<S, NV, 4>(at),
                        5 => self.block::<S, NV, 5>(at),
                        _ => self.block::<S, NV, MR>(at),
                    }
                }
            }
        }
    }

    /// The `part`-th of `parts` shares of a later tile's rows.
    #[inline(always)]
    fn share(&self, part: usize, parts: usize) -> Rows {
        let Some(ahead) = self.ahead else { return Rows::NONE };
        let first = part * ahead.count / parts;
        let count = (part + 1) * ahead.count / parts - first;
        Rows { base: ahead.base.wrapping_add(first * ahead.stride), count, ..ahead }
    }

    /// A register block of ROWS x NR: product, then residual, ReLU and store. The sums stay in
    /// registers until they are stored: each question is asked once for all of them.
    #[inline(always)]
    unsafe fn block<S: Simd, const NV: usize, const ROWS: usize>(&self, at: Block) {
        let Block { w, x, rows, row, pixels, kept, ahead } = at;
        let (e, k) = (&self.product.epilogue, self.product.weights.k);
        let out = e.out.wrapping_add(row * e.out_stride + pixels.start);
        let residual = e.residual.wrapping_add(row * e.residual_stride + pixels.start);
        unsafe {
            for (i, j) in (0..ROWS).flat_map(|i| (0..NV).map(move |j| (i, j))) {
                S::prefetch_write(out.wrapping_add(i * e.out_stride + j * S::LANES));
            }
            if !e.residual.is_null() {
                for (i, j) in (0..ROWS).flat_map(|i| (0..NV).map(move |j| (i, j))) {
                    S::prefetch(residual.wrapping_add(i * e.residual_stride + j * S::LANES));
                }
            }
            let bias = |i: usize| if e.bias.is_null() { 0.0 } else { *e.bias.add(row + i) };
            let acc = std::array::from_fn(|i| [S::splat(bias(i)); NV]);
            let mut acc = match rows {
                // The first panel is a whole one if others follow; else nobody needs the packed tile.
                Some(rows) if ROWS == MR => product::<S, NV, ROWS, true>(acc, w, rows, x, ahead),
                Some(rows) => product::<S, NV, ROWS, false>(acc, w, rows, x, ahead),
                None => {
                    let rows = Rows { base: x, count: k, stride: NV * S::LANES };
                    product::<S, NV, ROWS, false>(acc, w, rows, x, ahead)
                }
            };
            if pixels.valid < NV * S::LANES {
                let mut sums = [0.0; MR * TILE];
                store(&acc, sums.as_mut_ptr(), NV * S::LANES);
                self.finish_partial(&mut sums[..ROWS * NV * S::LANES], at);
                return;
            }
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
            store(&acc, out, e.out_stride);
            if !kept.is_null() {
                store(&acc, kept, NV * S::LANES);
            }
        }
    }

    /// The same for a strip that ends outside the range, from the sums of its rows: the last strip of
    /// a range at most, and out of the way of the others.
    #[inline(never)]
    unsafe fn finish_partial(&self, sums: &mut [f32], at: Block) {
        let Block { row, pixels, kept, .. } = at;
        let e = &self.product.epilogue;
        let rows = self.product.weights.m.min(row + MR) - row;
        for (i, sums) in sums.chunks_exact_mut(sums.len() / rows).enumerate() {
            let out = e.out.wrapping_add((row + i) * e.out_stride + pixels.start);
            let residual = e.residual.wrapping_add((row + i) * e.residual_stride + pixels.start);
            for (p, sum) in sums[..pixels.valid].iter_mut().enumerate() {
                unsafe {
                    if !e.residual.is_null() {
                        *sum += *residual.add(p);
                    }
                    // Not f32::max, which drops a NaN.
                    if e.relu && *sum <= 0.0 {
                        *sum = 0.0;
                    }
                    *out.add(p) = *sum;
                }
            }
            if !kept.is_null() {
                // Past the plane's end too: finite, and never looked at.
                unsafe { kept.add(i * sums.len()).copy_from(sums.as_ptr(), sums.len()) }
            }
        }
    }
}

/// Writes the rows of a register block to memory.
#[inline(always)]
unsafe fn store<S: Simd, const NV: usize, const ROWS: usize>(
    sums: &[[S; NV]; ROWS],
    out: *mut f32,
    stride: usize,
) {
    for (i, sums) in sums.iter().enumerate() {
        for (j, sum) in sums.iter().enumerate() {
            unsafe { sum.store(out.add(i * stride + j * S::LANES)) }
        }
    }
}

/// A register block's place.
#[derive(Clone, Copy)]
struct Block {
    /// Its panel of weights.
    w: *const f32,
    /// Its strip of the packed tile.
    x: *mut f32,
    /// Where the strip's rows are, if they are yet to be packed.
    rows: Option<Rows>,
    /// First output row.
    row: usize,
    pixels: Pixels,
    kept: *mut f32,
    /// Rows to ask for meanwhile.
    ahead: Rows,
}

/// Pixels of a strip: the first, and how many are inside the plane.
#[derive(Clone, Copy)]
struct Pixels {
    start: usize,
    valid: usize,
}

/// ROWS x NR register block: `acc[i][j] + sum over k of w[k][i] * x[k][j]`. With PACK the strip of x
/// is packed for the panels to come: what the processor waits for is hidden behind the products.
#[inline(always)]
unsafe fn product<S: Simd, const NV: usize, const ROWS: usize, const PACK: bool>(
    mut acc: [[S; NV]; ROWS],
    mut w: *const f32,
    rows: Rows,
    mut packed: *mut f32,
    ahead: Rows,
) -> [[S; NV]; ROWS] {
    let mut x = rows.base;
    // Requests in between, a row at a time: many at once would hold up the loads behind them.
    let (step, mut fetched) = (rows.count / (ahead.count + 1), ahead.base);
    for turn in 0..=ahead.count {
        let steps = if turn < ahead.count { step } else { rows.count - step * ahead.count };
        for _ in 0..steps {
            unsafe {
                let mut columns = [S::zero(); NV];
                for (j, c) in columns.iter_mut().enumerate() {
                    *c = S::load(x.add(j * S::LANES));
                    if PACK {
                        c.store(packed.add(j * S::LANES));
                    }
                }
                for (i, row) in acc.iter_mut().enumerate() {
                    let weight = S::splat(*w.add(i));
                    for (a, c) in row.iter_mut().zip(columns) {
                        *a = weight.mul_add(c, *a);
                    }
                }
                w = w.add(MR);
                x = x.wrapping_add(rows.stride);
                if PACK {
                    packed = packed.add(NV * S::LANES);
                }
            }
        }
        if turn < ahead.count {
            for line in 0..TILE / 16 {
                unsafe { S::prefetch(fetched.wrapping_add(16 * line)) }
            }
            fetched = fetched.wrapping_add(ahead.stride);
        }
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
