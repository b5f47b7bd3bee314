//! Dense 3x3 convolution, padding 1: the stem.

use rayon::prelude::*;

use super::conv1x1::{bias_gradient, epilogue, sum_partials};
use super::{Act, Cost};
use crate::backend::cpu::gemm::{self, PackedWeights, Product, TileSource, dot_pixels};
use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::simd::{Isa, Kernel, Simd};
use crate::backend::cpu::{View, ViewMut};
use crate::graph::{ParamId, Shape};

/// 3x3 convolution with padding 1; output size is ceil(size / stride).
#[derive(Debug, Clone)]
pub struct Conv3x3 {
    /// Input channels.
    pub in_channels: usize,
    /// Output channels.
    pub out_channels: usize,
    /// Stride, 1 or 2.
    pub stride: usize,
    /// Weights, out x in x 3 x 3.
    pub weight: ParamId,
    /// Bias, out.
    pub bias: Option<ParamId>,
    /// Non-linearity after the bias.
    pub act: Act,
}

impl Conv3x3 {
    pub(super) fn shape(&self, inputs: &[Shape]) -> Result<Shape, String> {
        match inputs {
            [x] if x.c == self.in_channels => Ok(Shape {
                n: x.n,
                c: self.out_channels,
                h: x.h.div_ceil(self.stride),
                w: x.w.div_ceil(self.stride),
            }),
            _ => Err(format!("one operand of {} channels", self.in_channels)),
        }
    }

    pub(super) fn cost(&self, output: Shape) -> Cost {
        let macs = (output.len() * self.in_channels * 9) as u64;
        let bias = if self.bias.is_some() { output.len() as u64 } else { 0 };
        Cost { macs, flops: macs + bias }
    }
}

/// Pixels of one partial weight gradient; fixed, so that results do not depend on threads.
const GRADIENT_CHUNK: usize = 2048;

/// The 3x3 neighbourhoods of one image as K = 9 * in_channels rows of output pixels.
struct Neighbourhoods<'a> {
    x: View<'a>,
    image: usize,
    stride: usize,
    out_w: usize,
}

impl TileSource for Neighbourhoods<'_> {
    fn pack(&self, isa: Isa, start: usize, count: usize, pitch: usize, packed: &mut [f32]) {
        for three in 0..3 * self.x.shape().c {
            let (channel, dy) = (three / 3, three % 3);
            let plane = self.x.plane(self.image, channel);
            let (left, rest) = packed[3 * three * pitch..].split_at_mut(pitch);
            let (middle, right) = rest.split_at_mut(pitch);
            let mut done = 0;
            while done < count {
                let pixel = start + done;
                // A run: within one output row.
                let (oy, ox) = (pixel / self.out_w, pixel % self.out_w);
                let run = (count - done).min(self.out_w - ox);
                let y = (oy * self.stride + dy).wrapping_sub(1);
                let pixels = done..done + run;
                let taps =
                    [&mut left[pixels.clone()], &mut middle[pixels.clone()], &mut right[pixels]];
                self.gather_three(isa, plane, y, ox, taps);
                done += run;
            }
        }
    }
}

/// The taps of a row under stride 2, whole vectors only: every second column from the first, from the
/// one behind it, and from the one behind that.
struct StridedTaps<'a> {
    /// From the column of the first left tap.
    row: &'a [f32],
    taps: [&'a mut [f32]; 3],
    /// Outputs done.
    done: &'a mut usize,
}

impl Kernel for StridedTaps<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let [left, middle, right] = self.taps;
        let mut at = 0;
        // Columns in reach of whole vectors; the last of those may do again what the one before it did.
        let most = middle.len().min(self.row.len().saturating_sub(1) / 2);
        while at < most && most >= S::LANES {
            at = at.min(most - S::LANES);
            unsafe {
                let p = self.row.as_ptr().add(2 * at);
                let (before, _) = S::load(p).deinterleave(S::load(p.add(S::LANES)));
                let (even, odd) = S::load(p.add(1)).deinterleave(S::load(p.add(S::LANES + 1)));
                before.store(left.as_mut_ptr().add(at));
                even.store(middle.as_mut_ptr().add(at));
                odd.store(right.as_mut_ptr().add(at));
            }
            at += S::LANES;
        }
        *self.done = at;
    }
}

impl Neighbourhoods<'_> {
    /// The three taps of outputs ox, ox + 1, ... (one at least) in input row y.
    fn gather_three(
        &self,
        isa: Isa,
        plane: &[f32],
        y: usize,
        ox: usize,
        mut taps: [&mut [f32]; 3],
    ) {
        let (h, w) = (self.x.shape().h, self.x.shape().w);
        // The first output of a row has no column to its left.
        let alone = usize::from(ox == 0);
        let mut vectors = 0;
        if self.stride == 2 && y < h {
            let left = 2 * (ox + alone) - 1;
            let row = plane[y * w..][..w].get(left..).unwrap_or_default();
            let taps = taps.each_mut().map(|tap| &mut tap[alone..]);
            unsafe { isa.run(StridedTaps { row, taps, done: &mut vectors }) }
        }
        let done = alone + vectors;
        for (dx, tap) in taps.into_iter().enumerate() {
            self.gather(plane, y, ox, dx, &mut tap[..alone]);
            self.gather(plane, y, ox + done, dx, &mut tap[done..]);
        }
    }

    /// target[i] = plane[y][(ox + i) * stride + dx - 1], zero outside.
    fn gather(&self, plane: &[f32], y: usize, ox: usize, dx: usize, target: &mut [f32]) {
        let (h, w, stride) = (self.x.shape().h, self.x.shape().w, self.stride);
        if y >= h {
            return target.fill(0.0);
        }
        if target.is_empty() {
            return;
        }
        let row = &plane[y * w..][..w];
        let mut x = (ox * stride + dx).wrapping_sub(1);
        let mut rest = target.iter_mut();
        if x == usize::MAX {
            *rest.next().expect("runs are not empty") = 0.0;
            x = x.wrapping_add(stride);
        }
        let tail = rest.into_slice();
        let inside = w.saturating_sub(x).div_ceil(stride).min(tail.len());
        let (inside, outside) = tail.split_at_mut(inside);
        for (t, v) in inside.iter_mut().zip(row[x.min(w)..].iter().step_by(stride)) {
            *t = *v;
        }
        outside.fill(0.0);
    }
}

impl Conv3x3 {
    /// y = relu?(W * x + b) with padding 1: N x in x H x W -> N x out x ceil(H/s) x ceil(W/s).
    /// `w` is out x in x 3 x 3; a matrix product with the packed neighbourhoods.
    pub fn forward(&self, isa: Isa, x: View, w: &[f32], bias: Option<&[f32]>, y: ViewMut) {
        let packed = PackedWeights::new(w, self.out_channels, 9 * self.in_channels);
        gemm::for_runs(y.shape(), |image, pixels| {
            let source = Neighbourhoods { x, image, stride: self.stride, out_w: y.shape().w };
            let epilogue = epilogue(image, bias, None, self.act, y);
            let product = Product { weights: &packed, epilogue };
            // Every task owns its pixels of all output planes.
            unsafe { gemm::multiply(isa, &source, pixels, product, None) }
        });
    }

    /// `dW[o][i][t] = sum over n, p of dY[n][o][p] x[n][i][p * stride + t - 1]`, db = sum of dY.
    /// The stem reads the image, which needs no gradient, so there is no data gradient.
    pub fn backward(&self, isa: Isa, x: View, dy: View, dw: &mut [f32], dbias: Option<&mut [f32]>) {
        let (pixels, k) = (dy.shape().plane(), 9 * self.in_channels);
        let chunks = pixels.div_ceil(GRADIENT_CHUNK);
        let mut partial = vec![0.0f32; dy.shape().n * chunks * dw.len()];
        partial.par_chunks_mut(dw.len()).enumerate().for_each(|(task, partial)| {
            let (image, start) = (task / chunks, task % chunks * GRADIENT_CHUNK);
            let count = GRADIENT_CHUNK.min(pixels - start);
            let source = Neighbourhoods { x, image, stride: self.stride, out_w: dy.shape().w };
            with_scratch(k * count, |rows| {
                source.pack(isa, start, count, count, rows);
                unsafe {
                    let a = dy.image(image).add(start);
                    let (out, stride) = (self.out_channels, dy.plane_stride());
                    dot_pixels(out, k, count, a, stride, rows.as_ptr(), count, partial);
                }
            });
        });
        sum_partials(&partial, dw);
        if let Some(dbias) = dbias {
            bias_gradient(isa, dy, dbias);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    fn operator(inp: usize, out: usize, stride: usize, act: Act) -> Conv3x3 {
        let weight = ParamId(0);
        Conv3x3 { in_channels: inp, out_channels: out, stride, weight, bias: None, act }
    }

    /// Inputs x, w (out x in x 3 x 3), b.
    fn naive(op: &Conv3x3, inputs: &[T64]) -> T64 {
        let [x, w, b] = inputs else { panic!("three operands") };
        let shape = op.shape(&[x.shape]).unwrap();
        T64::from_fn(shape, |n, o, y, col| {
            let mut v = b.data[o];
            for (i, t) in (0..x.shape.c).flat_map(|i| (0..9).map(move |t| (i, t))) {
                let (row, column) = (y * op.stride + t / 3, col * op.stride + t % 3);
                v += w.at(o, i, t / 3, t % 3)
                    * x.padded(n, i, row as isize - 1, column as isize - 1);
            }
            if op.act == Act::Relu { v.max(0.0) } else { v }
        })
    }

    fn operands(x: Shape, out: usize, bias: bool) -> [T64; 3] {
        let mut rng = rng(10);
        let mut random = |shape| T64::random(shape, &mut rng);
        let [x, w, b] = [x, Shape::new(out, x.c, 3, 3), Shape::new(1, 1, 1, out)].map(&mut random);
        [x, w, if bias { b } else { b.map(|_| 0.0) }]
    }

    const CASES: [(Shape, usize); 5] = [
        (Shape::new(1, 1, 1, 1), 1),
        (Shape::new(1, 2, 2, 1), 3),
        (Shape::new(3, 3, 5, 7), 4),
        (Shape::new(2, 3, 9, 17), 7),
        (Shape::new(1, 2, 3, 70), 16),
    ];

    #[test]
    fn forward_agrees_with_the_naive_sum() {
        for ((shape, out), stride) in CASES.into_iter().flat_map(|c| [(c, 1), (c, 2)]) {
            for (bias, act) in [(false, Act::None), (true, Act::None), (true, Act::Relu)] {
                let op = operator(shape.c, out, stride, act);
                let inputs = operands(shape, out, bias);
                let expected = naive(&op, &inputs);
                let (w, b) = (inputs[1].f32(), inputs[2].f32());
                everywhere(|isa, layout, label| {
                    let mut y = Buffer::unwritten(expected.shape, layout);
                    let x = Buffer::new(&inputs[0], layout);
                    op.forward(isa, x.view(), &w, bias.then_some(&b[..]), y.view_mut());
                    let what = format!("{shape}, stride {stride}, {act:?}, {label}");
                    assert_close(&what, &y.read(), &expected, FORWARD);
                });
            }
        }
    }

    #[test]
    fn parameter_gradients_agree_with_central_differences() {
        for ((shape, out), stride) in CASES.into_iter().flat_map(|c| [(c, 1), (c, 2)]) {
            check_parameter_gradients(shape, out, stride);
        }
    }

    #[test]
    fn parameter_gradients_cover_planes_longer_than_a_chunk() {
        let shape = Shape::new(2, 1, 47, 61);
        assert!(shape.plane() > GRADIENT_CHUNK);
        check_parameter_gradients(shape, 2, 1);
    }

    fn check_parameter_gradients(shape: Shape, out: usize, stride: usize) {
        let op = operator(shape.c, out, stride, Act::None);
        let inputs = operands(shape, out, true);
        let f = |inputs: &[T64]| naive(&op, inputs);
        let dy = T64::random(op.shape(&[shape]).unwrap(), &mut rng(11));
        let [dw, db] = [1, 2].map(|i| central_difference(f, &inputs, i, &dy));
        everywhere(|isa, layout, label| {
            let (x, dy) = (Buffer::new(&inputs[0], layout), Buffer::new(&dy, layout));
            let (mut w_grad, mut b_grad) = (vec![f32::NAN; dw.data.len()], vec![f32::NAN; out]);
            op.backward(isa, x.view(), dy.view(), &mut w_grad, Some(&mut b_grad));
            let what = format!("{shape}, stride {stride}, {label}");
            assert_close(&format!("dw, {what}"), &T64::vector(&w_grad), &dw, BACKWARD);
            assert_close(&format!("db, {what}"), &T64::vector(&b_grad), &db, BACKWARD);
        });
    }

    #[test]
    fn nan_reaches_its_neighbourhood_through_the_relu() {
        let op = operator(3, 4, 1, Act::Relu);
        let mut inputs = operands(Shape::new(1, 3, 5, 7), 4, true);
        inputs[0].data[35 + 2 * 7 + 3] = f64::NAN;
        everywhere(|isa, layout, label| {
            let (x, w, b) = (Buffer::new(&inputs[0], layout), inputs[1].f32(), inputs[2].f32());
            let mut y = Buffer::unwritten(Shape::new(1, 4, 5, 7), layout);
            op.forward(isa, x.view(), &w, Some(&b), y.view_mut());
            let near = |i: usize| (i / 7 % 5).abs_diff(2) <= 1 && (i % 7).abs_diff(3) <= 1;
            for (i, v) in y.read().data.iter().enumerate() {
                assert_eq!(v.is_nan(), near(i), "{label}: element {i} is {v}");
            }
        });
    }
}
