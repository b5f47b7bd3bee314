//! Bilinear resize with half-pixel centres (align_corners = false), as torch's interpolate.

use rayon::prelude::*;

use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::simd::{Isa, Kernel, Simd};
use crate::backend::cpu::{View, ViewMut, planes};
use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [x, like] if x.n == like.n => Ok(Shape { c: x.c, ..*like }),
        _ => Err("an operand and one that lends its height and width".into()),
    }
}

/// Source positions along one axis: `out[i] = in[lo] + frac * (in[hi] - in[lo])`.
#[derive(Debug, Clone)]
pub struct Axis {
    input: usize,
    lo: Vec<u32>,
    hi: Vec<u32>,
    frac: Vec<f32>,
}

impl Axis {
    /// Half-pixel centres: output i reads position (i + 0.5) * input / output - 0.5, clamped.
    pub fn new(input: usize, output: usize) -> Self {
        let scale = input as f64 / output as f64;
        let last = (input - 1) as f64;
        let position = |i: usize| ((i as f64 + 0.5) * scale - 0.5).clamp(0.0, last);
        let lo: Vec<u32> = (0..output).map(|i| position(i) as u32).collect();
        let frac = (0..output).map(|i| position(i).fract() as f32).collect();
        let hi = lo.iter().map(|&l| (l + 1).min(input as u32 - 1)).collect();
        Axis { input, lo, hi, frac }
    }

    /// Stretches a row of `input` elements.
    fn stretch(&self, row: &[f32], out: &mut [f32]) {
        let row = &row[..self.input];
        for (((y, &lo), &hi), &frac) in out.iter_mut().zip(&self.lo).zip(&self.hi).zip(&self.frac) {
            let a = row[lo as usize];
            *y = a + frac * (row[hi as usize] - a);
        }
    }

    /// Adds the transpose of [`Axis::stretch`].
    fn shrink_transposed(&self, isa: Isa, grad: &[f32], row: &mut [f32]) {
        if grad.len() == 2 * self.input {
            return unsafe { isa.run(ShrinkTwofold { grad, row: &mut row[..self.input] }) };
        }
        for (((g, &lo), &hi), &frac) in grad.iter().zip(&self.lo).zip(&self.hi).zip(&self.frac) {
            row[lo as usize] += (1.0 - frac) * g;
            row[hi as usize] += frac * g;
        }
    }
}

/// The common case without index tables, from the two rows to be blended to the output row, twice as
/// long: a lies between before + 3 (a - before) / 4 and a + (behind - a) / 4, rounded as everywhere else.
struct RowTwofold<'a> {
    rows: [&'a [f32]; 2],
    /// Weight of the second row.
    frac: f32,
    /// Room for the blended row and what is beside it, [`Bilinear::scratch_len`].
    scratch: &'a mut [f32],
    /// What the row is multiplied with, and what is added then.
    gated: Option<[&'a [f32]; 2]>,
    out: &'a mut [f32],
}

impl Kernel for RowTwofold<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let RowTwofold { rows: [above, below], frac, scratch, gated, out } = self;
        let len = above.len();
        assert!(below.len() == len && out.len() == 2 * len && scratch.len() > LINE + len);
        assert!(gated.is_none_or(|two| two.iter().all(|row| row.len() == 2 * len)));
        unsafe {
            let frac = S::splat(frac);
            for at in (0..len).step_by(S::LANES) {
                let lanes = (len - at).min(S::LANES);
                let a = S::load_up_to(above.as_ptr().add(at), lanes);
                let difference = S::load_up_to(below.as_ptr().add(at), lanes).sub(a);
                let blended = scratch.as_mut_ptr().add(LINE + at);
                difference.mul_add(frac, a).store_up_to(blended, lanes);
            }
            // The ends are their own neighbours.
            scratch[LINE - 1] = scratch[LINE];
            scratch[LINE + len] = scratch[LINE + len - 1];
            let finish = |v: S, at: usize| match gated {
                Some([gate, add]) => {
                    v.mul_add(S::load(gate.as_ptr().add(at)), S::load(add.as_ptr().add(at)))
                }
                None => v,
            };
            let (quarter, three_quarters) = (S::splat(0.25), S::splat(0.75));
            let mut at = 0;
            while at < len && len >= S::LANES {
                // The last vector may do again what the one before it did.
                at = at.min(len - S::LANES);
                let p = scratch.as_ptr().add(LINE - 1 + at);
                let (before, a, behind) = (S::load(p), S::load(p.add(1)), S::load(p.add(2)));
                let even = a.sub(before).mul_add(three_quarters, before);
                let odd = behind.sub(a).mul_add(quarter, a);
                let (first, second) = even.interleave(odd);
                finish(first, 2 * at).store(out.as_mut_ptr().add(2 * at));
                let next = 2 * at + S::LANES;
                finish(second, next).store(out.as_mut_ptr().add(next));
                at += S::LANES;
            }
            for at in 2 * at..out.len() {
                // The two that it lies between, and how far it is from the first.
                let left = LINE - 1 + at / 2 + at % 2;
                let share = if at % 2 == 0 { 0.75 } else { 0.25 };
                let v = scratch[left] + share * (scratch[left + 1] - scratch[left]);
                out[at] = gated.map_or(v, |[gate, add]| v * gate[at] + add[at]);
            }
        }
    }
}

/// The transpose of [`RowTwofold`]'s second half, added to `row`: three quarters of the two elements that lie
/// around one, a quarter of the next two.
struct ShrinkTwofold<'a> {
    grad: &'a [f32],
    row: &'a mut [f32],
}

impl Kernel for ShrinkTwofold<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (grad, row) = (self.grad, self.row);
        let last = row.len() - 1;
        let one = |at: usize| {
            // The ends are their own neighbours.
            let before = if at == 0 { grad[0] } else { grad[2 * at - 1] };
            let behind = if at == last { grad[2 * last + 1] } else { grad[2 * at + 2] };
            0.75 * (grad[2 * at] + grad[2 * at + 1]) + 0.25 * (before + behind)
        };
        row[0] += one(0);
        let mut at = 1;
        while at + S::LANES <= last {
            unsafe {
                let g = grad.as_ptr().add(2 * at);
                let pair = |p: *const f32| (S::load(p), S::load(p.add(S::LANES)));
                let ((a, b), (c, d), (e, f)) = (pair(g), pair(g.sub(1)), pair(g.add(2)));
                let (even, odd) = a.deinterleave(b);
                let next = c.deinterleave(d).0.add(e.deinterleave(f).0);
                let out = row.as_mut_ptr().add(at);
                let sum = even.add(odd).mul_add(S::splat(0.75), S::load(out));
                next.mul_add(S::splat(0.25), sum).store(out);
            }
            at += S::LANES;
        }
        for (at, out) in row.iter_mut().enumerate().skip(at) {
            *out += one(at);
        }
    }
}

/// Elements of a cache line.
const LINE: usize = 16;

/// Bilinear map from planes of one size to planes of another.
#[derive(Debug, Clone)]
pub struct Bilinear {
    rows: Axis,
    columns: Axis,
}

impl Bilinear {
    /// Both sizes as (height, width).
    pub fn new(input: (usize, usize), output: (usize, usize)) -> Self {
        Bilinear { rows: Axis::new(input.0, output.0), columns: Axis::new(input.1, output.1) }
    }

    /// Elements of scratch that [`Bilinear::row`] and [`Bilinear::transpose_row`] need.
    pub fn scratch_len(&self) -> usize {
        LINE + self.columns.input + 1
    }

    /// Output row `y` of a plane: `plane` is input height x width, `out` one row of the output's width.
    pub fn row(&self, isa: Isa, plane: &[f32], y: usize, scratch: &mut [f32], out: &mut [f32]) {
        self.row_then(isa, (plane, y), scratch, None, out);
    }

    /// The same, multiplied with `gate`, with `add` added.
    pub fn row_gated(
        &self,
        isa: Isa,
        (plane, y): (&[f32], usize),
        scratch: &mut [f32],
        (gate, add): (&[f32], &[f32]),
        out: &mut [f32],
    ) {
        self.row_then(isa, (plane, y), scratch, Some([gate, add]), out);
    }

    fn row_then(
        &self,
        isa: Isa,
        (plane, y): (&[f32], usize),
        scratch: &mut [f32],
        gated: Option<[&[f32]; 2]>,
        out: &mut [f32],
    ) {
        let w = self.columns.input;
        let (lo, hi) = (self.rows.lo[y] as usize, self.rows.hi[y] as usize);
        let rows = [&plane[lo * w..][..w], &plane[hi * w..][..w]];
        let frac = self.rows.frac[y];
        if out.len() == 2 * w {
            return unsafe { isa.run(RowTwofold { rows, frac, scratch, gated, out }) };
        }
        let blended = &mut scratch[..w];
        planes::blend(isa, rows[0], rows[1], frac, blended);
        self.columns.stretch(blended, out);
        if let Some([gate, add]) = gated {
            planes::multiply(isa, gate, out);
            planes::add_scaled(isa, add, 1.0, out);
        }
    }

    /// Adds the gradient of output row `y`, one row of the output's width, to the gradient of the
    /// input plane, input height x width.
    pub fn transpose_row(
        &self,
        isa: Isa,
        grad: &[f32],
        y: usize,
        scratch: &mut [f32],
        plane: &mut [f32],
    ) {
        let w = self.columns.input;
        let blended = &mut scratch[..w];
        blended.fill(0.0);
        self.columns.shrink_transposed(isa, grad, blended);
        let (lo, hi) = (self.rows.lo[y] as usize, self.rows.hi[y] as usize);
        let frac = self.rows.frac[y];
        planes::add_scaled(isa, blended, 1.0 - frac, &mut plane[lo * w..][..w]);
        planes::add_scaled(isa, blended, frac, &mut plane[hi * w..][..w]);
    }
}

fn map_of(small: Shape, large: Shape) -> Bilinear {
    Bilinear::new((small.h, small.w), (large.h, large.w))
}

/// Resizes every plane: N x C x h x w -> N x C x H x W.
pub fn forward(isa: Isa, x: View, y: ViewMut) {
    /// Rows of a task: planes are too few to share out evenly.
    const BAND: usize = 32;
    let map = map_of(x.shape(), y.shape());
    let (channels, h, w) = (x.shape().c, y.shape().h, y.shape().w);
    let bands = h.div_ceil(BAND);
    (0..x.shape().n * channels * bands).into_par_iter().with_max_len(1).for_each(|task| {
        let (n, c) = (task / bands / channels, task / bands % channels);
        let first = task % bands * BAND;
        let rows = BAND.min(h - first);
        // One task per band of a plane.
        let out = unsafe { y.pixels_mut(n, c, first * w..(first + rows) * w) };
        with_scratch(map.scratch_len(), |scratch| {
            for (row, out) in out.chunks_mut(w).enumerate() {
                map.row(isa, x.plane(n, c), first + row, scratch, out);
            }
        });
    });
}

/// The map is linear, so dX is its transpose applied to dY.
pub fn backward(isa: Isa, dy: View, dx: ViewMut, accumulate: bool) {
    let map = map_of(dx.shape(), dy.shape());
    let (channels, w) = (dx.shape().c, dy.shape().w);
    (0..dx.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        // One task per plane.
        let plane = unsafe { dx.plane_mut(n, c) };
        if !accumulate {
            plane.fill(0.0);
        }
        with_scratch(map.scratch_len(), |scratch| {
            for (row, grad) in dy.plane(n, c).chunks(w).enumerate() {
                map.transpose_row(isa, grad, row, scratch, plane);
            }
        });
    });
}

/// Keeps the larger of two scores and its class; a tie keeps the class that was there. Classes are kept as f32 as
/// the scores are: elements of one width make vectors of one length.
struct KeepLarger<'a> {
    class: f32,
    candidate: &'a [f32],
    best: &'a mut [f32],
    classes: &'a mut [f32],
}

impl Kernel for KeepLarger<'_> {
    /// A plain loop: the compiler turns it into vectors of whatever instruction set it is for.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for ((class, best), &v) in self.classes.iter_mut().zip(self.best).zip(self.candidate) {
            let larger = v > *best;
            *class = if larger { self.class } else { *class };
            *best = if larger { v } else { *best };
        }
    }
}

/// Resizes scores to `out_h` x `out_w` and takes the class of the largest, row by row, without
/// ever holding the resized scores. `labels` is N x out_h x out_w; ties go to the smaller class.
pub fn argmax(isa: Isa, scores: View, out_h: usize, out_w: usize, labels: &mut [u8]) {
    let shape = scores.shape();
    assert_eq!(labels.len(), shape.n * out_h * out_w);
    let map = Bilinear::new((shape.h, shape.w), (out_h, out_w));
    labels.par_chunks_mut(out_w).enumerate().for_each(|(i, labels)| {
        let (n, row) = (i / out_h, i % out_h);
        with_scratch(map.scratch_len() + 3 * out_w, |scratch| {
            let (scratch, rest) = scratch.split_at_mut(map.scratch_len());
            let (best, rest) = rest.split_at_mut(out_w);
            let (classes, candidate) = rest.split_at_mut(out_w);
            map.row(isa, scores.plane(n, 0), row, scratch, best);
            classes.fill(0.0);
            for c in 1..shape.c {
                map.row(isa, scores.plane(n, c), row, scratch, candidate);
                unsafe { isa.run(KeepLarger { class: c as f32, candidate, best, classes }) }
            }
            for (label, class) in labels.iter_mut().zip(classes) {
                *label = *class as u8;
            }
        });
    });
}

/// [`argmax`] over a dense NCHW array of logits of the given shape; labels are N x `out_h` x `out_w`.
pub fn argmax_nchw(logits: &[f32], shape: Shape, out_h: usize, out_w: usize, labels: &mut [u8]) {
    argmax(Isa::detect(), View::dense(logits, shape), out_h, out_w, labels);
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ops::testing::*;

    /// Bilinear with half-pixel centres, straight from its definition: a hat of width 1 around
    /// the source position, with positions outside clamped to the border.
    pub(crate) fn naive_resize(input: &T64, h: usize, w: usize) -> T64 {
        let s = input.shape;
        let hat = |i: usize, out: usize, size: usize, j: usize| {
            let position = (i as f64 + 0.5) * size as f64 / out as f64 - 0.5;
            (1.0 - (position.clamp(0.0, (size - 1) as f64) - j as f64).abs()).max(0.0)
        };
        T64::from_fn(Shape { h, w, ..s }, |n, c, y, x| {
            let rows = (0..s.h).filter(|&j| hat(y, h, s.h, j) > 0.0);
            rows.map(|j| {
                let row = (0..s.w).map(|k| hat(x, w, s.w, k) * input.at(n, c, j, k)).sum::<f64>();
                hat(y, h, s.h, j) * row
            })
            .sum()
        })
    }

    /// (h, w) of source and target: twice as large, odd ratios, equal, smaller, one pixel.
    const SIZES: [((usize, usize), (usize, usize)); 8] = [
        ((3, 4), (6, 8)),
        ((3, 4), (5, 7)),
        ((5, 7), (5, 7)),
        ((6, 5), (3, 2)),
        ((1, 1), (1, 1)),
        ((1, 1), (4, 2)),
        ((2, 9), (17, 18)),
        ((3, 2), (23, 37)),
    ];

    #[test]
    fn forward_and_backward_agree_with_the_definition() {
        for (((h, w), (oh, ow)), n) in SIZES.into_iter().flat_map(|s| [(s, 1), (s, 3)]) {
            let mut rng = rng(40);
            let x = [T64::random(Shape::new(n, 2, h, w), &mut rng)];
            let f = |x: &[T64]| naive_resize(&x[0], oh, ow);
            let expected = f(&x);
            let dy = T64::random(expected.shape, &mut rng);
            let gradient = central_difference(f, &x, 0, &dy);
            everywhere(|isa, layout, label| {
                let what = format!("{h}x{w} -> {oh}x{ow}, {label}");
                let mut y = Buffer::unwritten(expected.shape, layout);
                forward(isa, Buffer::new(&x[0], layout).view(), y.view_mut());
                assert_close(&what, &y.read(), &expected, FORWARD);
                let dy = Buffer::new(&dy, layout);
                check_gradient(&what, &gradient, layout, |dx, accumulate| {
                    backward(isa, dy.view(), dx, accumulate);
                });
            });
        }
    }

    #[test]
    fn labels_are_the_largest_of_the_resized_scores() {
        for ((h, w), (oh, ow)) in SIZES {
            let scores = T64::random(Shape::new(3, 5, h, w), &mut rng(41));
            let resized = naive_resize(&scores, oh, ow);
            everywhere(|isa, layout, label| {
                let mut labels = vec![255u8; 3 * oh * ow];
                argmax(isa, Buffer::new(&scores, layout).view(), oh, ow, &mut labels);
                for (i, &found) in labels.iter().enumerate() {
                    let (n, y, x) = (i / ow / oh, i / ow % oh, i % ow);
                    let at = |c: usize| resized.at(n, c, y, x);
                    let best = (0..5).map(at).fold(f64::MIN, f64::max);
                    // f32 may swap classes that are equal up to its rounding.
                    assert!(at(usize::from(found)) > best - 1e-6, "{h}x{w} -> {oh}x{ow}, {label}");
                }
            });
        }
    }

    #[test]
    fn ties_go_to_the_smaller_class() {
        let scores = T64::from_fn(Shape::new(1, 4, 2, 3), |_, c, _, _| [0.0, 1.0, 1.0, 0.5][c]);
        let mut labels = vec![255u8; 5 * 7];
        argmax_nchw(&scores.f32(), scores.shape, 5, 7, &mut labels);
        assert!(labels.iter().all(|&l| l == 1), "{labels:?}");
    }
}
