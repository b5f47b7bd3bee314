//! A mutual-embedding upsampling module (paper, section 3.2) seen through the linear map behind
//! it: class scores straight from the features.
//!
//! Inference only: the collapsed decoder is made of two of them (`graph/passes/collapse.rs`).

use rayon::prelude::*;

use super::Cost;
use super::resize::Bilinear;
use crate::backend::cpu::gemm::{self, Epilogue, PackedWeights, Planes, Product};
use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::{Isa, View, ViewMut, planes};
use crate::graph::{ParamId, Shape};

/// Inputs t (N x C x h x w), x (N x in x H x W), ca (N x width x 1 x 1), sa (N x 1 x H x W);
/// output N x C x H x W.
#[derive(Debug, Clone)]
pub struct MeuScores {
    /// Channels of x.
    pub in_channels: usize,
    /// Channels between the two maps: those that ca gates.
    pub width: usize,
    /// Channels C of output and t.
    pub classes: usize,
    /// A, C x width.
    pub mix: ParamId,
    /// Wl, width x in.
    pub low: ParamId,
    /// bl, width.
    pub low_bias: ParamId,
    /// b, C.
    pub bias: ParamId,
}

/// Parameters of [`MeuScores::forward`].
#[derive(Clone, Copy)]
pub struct MeuScoresParams<'a> {
    /// A, C x width.
    pub mix: &'a [f32],
    /// Wl, width x in.
    pub low: &'a [f32],
    /// bl, width.
    pub low_bias: &'a [f32],
    /// b, C.
    pub bias: &'a [f32],
}

impl MeuScores {
    pub(super) fn shape(&self, inputs: &[Shape]) -> Result<Shape, String> {
        let rule = || format!("t, x, ca, sa of one batch, x of {} channels", self.in_channels);
        let [t, x, ca, sa] = inputs else { return Err(rule()) };
        let fits = t.n == x.n
            && t.c == self.classes
            && x.c == self.in_channels
            && *ca == Shape::new(x.n, self.width, 1, 1)
            && *sa == x.with_channels(1);
        if fits { Ok(x.with_channels(self.classes)) } else { Err(rule()) }
    }

    /// The composed convolution, and its composition once per image.
    pub(super) fn cost(&self, output: Shape) -> Cost {
        let compose = output.n * self.classes * self.width * (self.in_channels + 1);
        let macs = (output.len() * self.in_channels + compose) as u64;
        Cost { macs, flops: macs + output.len() as u64 }
    }
}

impl MeuScores {
    /// ```text
    /// y = A diag(ca) (Wl x + bl) + b + sa * upsample(t)
    ///   = M x + m + sa * upsample(t),   M = A diag(ca) Wl,   m = A diag(ca) bl + b
    /// ```
    /// M and m are composed per image, in f64: C x (in + 1) numbers.
    pub fn forward(
        &self,
        isa: Isa,
        params: MeuScoresParams,
        (t, x, ca, sa): (View, View, View, View),
        y: ViewMut,
    ) {
        let (low, high) = (t.shape(), x.shape());
        let map = Bilinear::new((low.h, low.w), (high.h, high.w));
        let composed: Vec<(PackedWeights, Vec<f32>)> =
            (0..high.n).map(|n| self.compose(params, ca, n)).collect();
        // A task is an output row: its share of upsample(t) stays in cache as the residual.
        (0..high.n * high.h).into_par_iter().for_each(|task| {
            let (n, row) = (task / high.h, task % high.h);
            let gate = &sa.plane(n, 0)[row * high.w..][..high.w];
            let (weights, bias) = &composed[n];
            with_scratch(self.classes * high.w + map.scratch_len(), |scratch| {
                let (gated, scratch) = scratch.split_at_mut(self.classes * high.w);
                for (c, out) in gated.chunks_exact_mut(high.w).enumerate() {
                    map.row(isa, t.plane(n, c), row, scratch, out);
                    planes::multiply(isa, gate, out);
                }
                let start = row * high.w;
                let source = Planes {
                    base: x.image(n).wrapping_add(start),
                    k: high.c,
                    stride: x.plane_stride(),
                    pixels: high.plane() - start,
                };
                let epilogue = Epilogue {
                    out: y.image(n).wrapping_add(start),
                    out_stride: y.plane_stride(),
                    bias: bias.as_ptr(),
                    residual: gated.as_ptr(),
                    residual_stride: high.w,
                    relu: false,
                };
                // One task per row.
                unsafe {
                    gemm::multiply(isa, &source, 0..high.w, Product { weights, epilogue }, None)
                }
            });
        });
    }

    /// M, packed, and m, for image n.
    fn compose(&self, params: MeuScoresParams, ca: View, n: usize) -> (PackedWeights, Vec<f32>) {
        let inputs = self.in_channels;
        let mut matrix = Vec::with_capacity(self.classes * inputs);
        let mut bias = Vec::with_capacity(self.classes);
        for (class, mix) in params.mix.chunks_exact(self.width).enumerate() {
            let gated: Vec<f64> =
                (0..self.width).map(|o| f64::from(mix[o]) * f64::from(ca.plane(n, o)[0])).collect();
            let dot = |column: &dyn Fn(usize) -> f32| -> f64 {
                gated.iter().enumerate().map(|(o, g)| g * f64::from(column(o))).sum()
            };
            matrix.extend((0..inputs).map(|i| dot(&|o| params.low[o * inputs + i]) as f32));
            bias.push((dot(&|o| params.low_bias[o]) + f64::from(params.bias[class])) as f32);
        }
        (PackedWeights::new(&matrix, self.classes, inputs), bias)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::resize::tests::naive_resize;
    use crate::ops::testing::*;

    /// Inputs t, x, ca, sa, A, Wl, bl, b.
    fn naive(inputs: &[T64]) -> T64 {
        let [t, x, ca, sa, mix, low, low_bias, bias] = inputs else { panic!("eight operands") };
        let up = naive_resize(t, x.shape.h, x.shape.w);
        T64::from_fn(x.shape.with_channels(t.shape.c), |n, c, i, j| {
            let feature = |o: usize| {
                let products = (0..x.shape.c).map(|k| low.at(o, k, 0, 0) * x.at(n, k, i, j));
                ca.at(n, o, 0, 0) * (products.sum::<f64>() + low_bias.data[o])
            };
            let mixed: f64 = (0..low.shape.n).map(|o| mix.at(c, o, 0, 0) * feature(o)).sum();
            mixed + bias.data[c] + sa.at(n, 0, i, j) * up.at(n, c, i, j)
        })
    }

    #[test]
    fn scores_agree_with_the_module_and_the_map_behind_it() {
        // in, width, classes; h x w and H x W: odd, tiny, wider than a tile.
        let cases = [
            ((3, 4, 2), (2, 3), (4, 6)),
            ((5, 3, 7), (3, 4), (5, 7)),
            ((1, 1, 1), (1, 1), (1, 1)),
            ((4, 6, 19), (2, 36), (3, 71)),
        ];
        for ((inp, width, classes), (h, w), (oh, ow)) in cases {
            let mut rng = rng(52);
            let mut random = |n, c, h, w| T64::random(Shape::new(n, c, h, w), &mut rng);
            let inputs = [
                random(2, classes, h, w),
                random(2, inp, oh, ow),
                random(2, width, 1, 1),
                random(2, 1, oh, ow),
                random(classes, width, 1, 1),
                random(width, inp, 1, 1),
                random(1, 1, 1, width),
                random(1, 1, 1, classes),
            ];
            let expected = naive(&inputs);
            let id = ParamId(0);
            let op = MeuScores {
                in_channels: inp,
                width,
                classes,
                mix: id,
                low: id,
                low_bias: id,
                bias: id,
            };
            let shapes: Vec<Shape> = inputs[..4].iter().map(|t| t.shape).collect();
            assert_eq!(op.shape(&shapes).unwrap(), expected.shape);
            let values: Vec<Vec<f32>> = inputs[4..].iter().map(T64::f32).collect();
            let [mix, low, low_bias, bias] = [0, 1, 2, 3].map(|i| &values[i][..]);
            everywhere(|isa, layout, label| {
                let [t, x, ca, sa] = [0, 1, 2, 3].map(|i| Buffer::new(&inputs[i], layout));
                let mut y = Buffer::unwritten(expected.shape, layout);
                let operands = (t.view(), x.view(), ca.view(), sa.view());
                let params = MeuScoresParams { mix, low, low_bias, bias };
                op.forward(isa, params, operands, y.view_mut());
                assert_close(&format!("{classes}, {label}"), &y.read(), &expected, FORWARD);
            });
        }
    }
}
