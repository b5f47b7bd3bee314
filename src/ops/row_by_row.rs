//! A 1x1 convolution and the depthwise 3x3 convolution of dilation 1 that reads its result, row by row.
//!
//! The result of the first is never in memory: the three rows that the second needs stay in cache. Nor
//! need the result of the second be, where a third, 1x1 again, reads it.
//! Inference only (`graph/passes/join.rs`).

use std::ops::Range;

use rayon::prelude::*;

use super::Act;
use super::cascade::Cascade;
use super::conv1x1::{Pointwise, epilogue, planes_of};
use crate::backend::cpu::gemm::{self, Epilogue, PackedWeights, Planes, Product, TILE};
use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::simd::{Isa, Kernel, Simd};
use crate::backend::cpu::{View, ViewMut};
use crate::graph::Shape;

/// Columns before the first one of a kept row, one of which is looked at; a cache line.
const LEFT: usize = 16;
/// Columns that vectors may read past a kept row: two of the longest, and one.
const SLACK: usize = 33;

/// Whether branches are made for it: each by itself, of dilation 1.
pub fn near(cascade: &Cascade) -> bool {
    let alone = !cascade.addition || cascade.dilations.len() == 1;
    alone && cascade.dilations.iter().all(|&d| d == 1)
}

/// Whether it pays for rows of a width: they are multiplied in whole tiles.
pub fn suits(cascade: &Cascade, width: usize) -> bool {
    near(cascade) && width.next_multiple_of(TILE) - width <= width / 8
}

/// A 1x1 convolution without a residual.
#[derive(Clone, Copy)]
pub struct Expand<'a> {
    /// Weights, out x in.
    pub weight: &'a [f32],
    /// Bias, out.
    pub bias: Option<&'a [f32]>,
    /// None or ReLU.
    pub act: Act,
}

/// What becomes of the cascade's result.
#[derive(Clone, Copy)]
pub enum Then<'a> {
    /// It is written.
    Store(ViewMut<'a>),
    /// Another 1x1 convolution reads it, and it is not.
    Project(Pointwise<'a>),
}

/// The convolution, the cascade with batch norm folded into weights and biases (one pair per branch),
/// and what comes then.
pub fn forward(
    isa: Isa,
    x: View,
    expand: Expand,
    cascade: &Cascade,
    (weights, biases): (&[&[f32]], &[&[f32]]),
    then: Then,
) {
    let channels = cascade.channels;
    let branch = |channel: usize| (channel / cascade.width(), channel % cascade.width());
    let tap = |(branch, chain): (usize, usize), t: usize| weights[branch][9 * chain + t];
    let Shape { n, h, w, .. } = x.shape();
    let (rows, width) = (h.div_ceil(cascade.stride), w.div_ceil(cascade.stride));
    // An odd number of cache lines: channels spread over all cache sets.
    let odd_lines = |len: usize| len.next_multiple_of(32) + 16;
    let chain = Chain {
        isa,
        x,
        expand,
        packed: PackedWeights::new(expand.weight, channels, x.shape().c),
        stride: cascade.stride,
        taps: (0..channels).map(|c| std::array::from_fn(|t| tap(branch(c), t))).collect(),
        biases: (0..channels).map(branch).map(|(branch, chain)| biases[branch][chain]).collect(),
        then,
        project: match then {
            Then::Store(_) => None,
            Then::Project(p) => Some(PackedWeights::new(p.weight, p.y.shape().c, channels)),
        },
        width,
        pitch: odd_lines(LEFT + w.next_multiple_of(TILE) + SLACK),
        line_pitch: odd_lines(width),
    };
    let band = rows.div_ceil(4 * rayon::current_num_threads());
    let bands = rows.div_ceil(band);
    (0..n * bands).into_par_iter().with_max_len(1).for_each(|task| {
        let (image, first) = (task / bands, task % bands * band);
        // A task owns its rows of all output planes.
        unsafe { chain.band(image, first..(first + band).min(rows)) }
    });
}

struct Chain<'a> {
    isa: Isa,
    x: View<'a>,
    expand: Expand<'a>,
    packed: PackedWeights,
    stride: usize,
    taps: Vec<[f32; 9]>,
    biases: Vec<f32>,
    then: Then<'a>,
    project: Option<PackedWeights>,
    /// Columns of the cascade's result.
    width: usize,
    /// Elements from channel to channel of a kept row, and of a row to be projected.
    pitch: usize,
    line_pitch: usize,
}

impl Chain<'_> {
    /// Output rows of an image.
    ///
    /// # Safety
    /// No other thread writes them.
    unsafe fn band(&self, image: usize, rows: Range<usize>) {
        let (isa, channels) = (self.isa, self.taps.len());
        let Shape { h, w, .. } = self.x.shape();
        let kept_len = channels * self.pitch;
        with_scratch(self.pitch + 3 * kept_len + channels * self.line_pitch, |scratch| {
            let (kept, line) = scratch.split_at_mut(self.pitch + 3 * kept_len);
            for row in kept.chunks_exact_mut(self.pitch) {
                row[..LEFT].fill(0.0);
                row[LEFT + w..].fill(0.0);
            }
            // A row outside of the image, and the three of it at hand.
            let (zeros, kept) = kept.split_at_mut(self.pitch);
            zeros.fill(0.0);
            let mut next = (rows.start * self.stride).saturating_sub(1);
            for row in rows {
                let centre = row * self.stride;
                while next < h.min(centre + 2) {
                    self.expand_row(image, next, &mut kept[next % 3 * kept_len..][..kept_len]);
                    next += 1;
                }
                let inputs = [centre.checked_sub(1), Some(centre), Some(centre + 1)].map(|row| {
                    let inside = row.filter(|&row| row < h);
                    inside.map_or((zeros.as_ptr(), 0), |row| {
                        (kept[row % 3 * kept_len..].as_ptr(), self.pitch)
                    })
                });
                let start = row * self.width;
                let (out, out_stride) = match self.then {
                    Then::Store(y) => (y.image(image).wrapping_add(start), y.plane_stride()),
                    Then::Project(_) => (line.as_mut_ptr(), self.line_pitch),
                };
                let (taps, biases) = (&self.taps[..], &self.biases[..]);
                let (stride, width) = (self.stride, self.width);
                unsafe { isa.run(Row { inputs, taps, biases, stride, out, out_stride, width }) }
                if let (Then::Project(p), Some(weights)) = (self.then, &self.project) {
                    let epilogue = epilogue(image, p.bias, p.residual, p.act, p.y).at(start);
                    let (base, k) = (line.as_ptr(), channels);
                    let line = Planes { base, k, stride: self.line_pitch, pixels: width };
                    unsafe {
                        gemm::multiply(isa, &line, 0..width, Product { weights, epilogue }, None);
                    }
                }
            }
        });
    }

    /// A row of the first convolution's result.
    fn expand_row(&self, image: usize, row: usize, kept: &mut [f32]) {
        let Shape { h, w, .. } = self.x.shape();
        let pixels = row * w..(row * w + w.next_multiple_of(TILE)).min(h * w);
        let epilogue = Epilogue {
            out: kept.as_mut_ptr().wrapping_add(LEFT).wrapping_sub(pixels.start),
            bias: self.expand.bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
            relu: self.expand.act == Act::Relu,
            ..Epilogue::store(std::ptr::null_mut(), self.pitch)
        };
        let product = Product { weights: &self.packed, epilogue };
        let source = planes_of(self.x, image);
        // The kept row is the caller's own, and longer than whole tiles.
        unsafe { gemm::multiply(self.isa, &source, pixels, product, None) }
        // The last tile may have gone on into the row behind.
        for channel in kept.chunks_exact_mut(self.pitch) {
            channel[LEFT + w] = 0.0;
        }
    }
}

/// A row of the depthwise convolution, all channels.
struct Row<'a> {
    /// The kept rows above, at and below, with the distance between their channels.
    inputs: [(*const f32, usize); 3],
    taps: &'a [[f32; 9]],
    biases: &'a [f32],
    stride: usize,
    out: *mut f32,
    out_stride: usize,
    width: usize,
}

impl Kernel for Row<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe { if self.stride == 1 { self.channels::<S, 1>() } else { self.channels::<S, 2>() } }
    }
}

impl Row<'_> {
    #[inline(always)]
    unsafe fn channels<S: Simd, const STRIDE: usize>(&self) {
        for (channel, (taps, &bias)) in self.taps.iter().zip(self.biases).enumerate() {
            unsafe {
                let mut w = [S::zero(); 9];
                for (w, &tap) in w.iter_mut().zip(taps) {
                    *w = S::splat(tap);
                }
                // From the column before the first one.
                let [above, at, below] =
                    self.inputs.map(|(base, stride)| base.add(channel * stride + LEFT - 1));
                let out = self.out.add(channel * self.out_stride);
                for column in (0..self.width).step_by(S::LANES) {
                    // The next channel's line.
                    S::prefetch_write(out.wrapping_add(self.out_stride + column));
                    let a = columns::<S, STRIDE>(above.add(STRIDE * column));
                    let b = columns::<S, STRIDE>(at.add(STRIDE * column));
                    let c = columns::<S, STRIDE>(below.add(STRIDE * column));
                    // Three chains of additions, to halve the latency of nine in a row; the longest is waited for last.
                    let a =
                        w[2].mul_add(a[2], w[1].mul_add(a[1], w[0].mul_add(a[0], S::splat(bias))));
                    let b = w[5].mul_add(b[2], w[4].mul_add(b[1], w[3].mul(b[0])));
                    let c = w[8].mul_add(c[2], w[7].mul_add(c[1], w[6].mul(c[0])));
                    let lanes = (self.width - column).min(S::LANES);
                    S::zero().max(a.add(b.add(c))).store_up_to(out.add(column), lanes);
                }
            }
        }
    }
}

/// The left, middle and right columns of a vector of outputs, the first of which is left at `p`.
#[inline(always)]
unsafe fn columns<S: Simd, const STRIDE: usize>(p: *const f32) -> [S; 3] {
    unsafe {
        if STRIDE == 1 {
            return [S::load(p), S::load(p.add(1)), S::load(p.add(2))];
        }
        let (left, middle) = S::load(p).deinterleave(S::load(p.add(S::LANES)));
        let (right, _) = S::load(p.add(2)).deinterleave(S::load(p.add(2 + S::LANES)));
        [left, middle, right]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::ParamId;
    use crate::ops::testing::*;
    use crate::ops::{Norm, conv1x1};

    fn cascade(channels: usize, branches: usize, stride: usize) -> Cascade {
        Cascade {
            channels,
            stride,
            dilations: vec![1; branches],
            addition: false,
            weights: vec![ParamId(0); branches],
            norm: Norm::Folded(vec![ParamId(0); branches]),
        }
    }

    #[test]
    fn rows_agree_with_one_operator_after_the_other() {
        // One pixel, one row or column, widths around vectors and tiles, more rows than tasks.
        let sizes = [(1, 1), (1, 9), (9, 1), (5, 15), (4, 33), (7, 64), (37, 66), (6, 130)];
        for (h, w) in sizes {
            for (stride, branches) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
                let (inp, channels) = (5, 4 * branches);
                let op = cascade(channels, branches, stride);
                let mut rng = rng(60);
                let mut random = |n, c, h, w| T64::random(Shape::new(n, c, h, w), &mut rng);
                let x = random(2, inp, h, w);
                let (weight, bias) =
                    (random(channels, inp, 1, 1).f32(), random(1, 1, 1, channels).f32());
                let kernels: Vec<Vec<f32>> =
                    (0..branches).map(|_| random(4, 1, 3, 3).f32()).collect();
                let biases: Vec<Vec<f32>> =
                    (0..branches).map(|_| random(1, 1, 1, 4).f32()).collect();
                let kernels: Vec<&[f32]> = kernels.iter().map(|v| &v[..]).collect();
                let biases: Vec<&[f32]> = biases.iter().map(|v| &v[..]).collect();
                let between = x.shape.with_channels(channels);
                let result = op.shape(&[between]).unwrap();
                let residual = random(2, 3, result.h, result.w);
                everywhere(|isa, layout, label| {
                    let x = Buffer::new(&x, layout);
                    let mut e = Buffer::unwritten(between, layout);
                    let mut expected = Buffer::unwritten(result, layout);
                    let mut y = Buffer::unwritten(result, layout);
                    conv1x1::forward(
                        isa,
                        x.view(),
                        &weight,
                        Some(&bias),
                        None,
                        Act::Relu,
                        e.view_mut(),
                    );
                    op.forward(isa, e.view(), &kernels, &biases, expected.view_mut());
                    let expand = Expand { weight: &weight, bias: Some(&bias), act: Act::Relu };
                    forward(
                        isa,
                        x.view(),
                        expand,
                        &op,
                        (&kernels, &biases),
                        Then::Store(y.view_mut()),
                    );
                    let what = format!("{h}x{w}, stride {stride}, {branches} branches, {label}");
                    assert_close(&what, &y.read(), &expected.read(), FORWARD);

                    // A projection with a residual behind it.
                    let residual = Buffer::new(&residual, layout);
                    let mut projected = Buffer::unwritten(residual.view().shape(), layout);
                    let (bias, r) = (Some(&bias[..3]), Some(residual.view()));
                    let y = expected.view();
                    conv1x1::forward(
                        isa,
                        y,
                        &weight[..3 * channels],
                        bias,
                        r,
                        Act::None,
                        projected.view_mut(),
                    );
                    let mut y = Buffer::unwritten(residual.view().shape(), layout);
                    let then = Then::Project(Pointwise {
                        weight: &weight[..3 * channels],
                        bias,
                        residual: r,
                        act: Act::None,
                        y: y.view_mut(),
                    });
                    forward(isa, x.view(), expand, &op, (&kernels, &biases), then);
                    assert_close(
                        &format!("projected, {what}"),
                        &y.read(),
                        &projected.read(),
                        FORWARD,
                    );
                });
            }
        }
    }

    #[test]
    fn only_branches_of_their_own_and_dilation_1_suit() {
        let op = cascade(8, 2, 2);
        assert!(suits(&op, 128) && suits(&op, 60));
        assert!(!suits(&op, 65), "almost half of every product would be for nothing");
        assert!(!suits(&Cascade { addition: true, ..op.clone() }, 128));
        assert!(!suits(&Cascade { dilations: vec![1, 2], ..op }, 128));
    }
}
