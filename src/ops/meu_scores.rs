//! A mutual-embedding upsampling module (paper, section 3.2) seen through the linear map behind
//! it: class scores straight from the features.
//!
//! Inference only: the collapsed decoder is made of two of them (`graph/passes/collapse.rs`).

use rayon::prelude::*;

use super::conv1x1::planes_of;
use super::resize::Bilinear;
use super::{Act, Cost, activation};
use crate::backend::cpu::gemm::{self, Epilogue, PackedWeights, Product};
use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::{Isa, View, ViewMut};
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

/// Where sa comes from.
#[derive(Clone, Copy)]
pub enum Gate<'a> {
    /// N x 1 x H x W.
    Plane(View<'a>),
    /// act(w x + b), taken from x in the same pass.
    Convolution {
        /// w, 1 x in.
        weight: &'a [f32],
        /// b, a single one.
        bias: Option<&'a [f32]>,
        /// Non-linearity.
        act: Act,
    },
}

impl MeuScores {
    /// ```text
    /// y = A diag(ca) (Wl x + bl) + b + sa * upsample(t)
    ///   = M x + m + sa * upsample(t),   M = A diag(ca) Wl,   m = A diag(ca) bl + b
    /// ```
    /// M and m are composed per image, in f64: C x (in + 1) numbers. A gate that is a map of x is one
    /// more row of them.
    pub fn forward(
        &self,
        isa: Isa,
        params: MeuScoresParams,
        (t, x, ca, gate): (View, View, View, Gate),
        y: ViewMut,
    ) {
        let (low, high) = (t.shape(), x.shape());
        let map = Bilinear::new((low.h, low.w), (high.h, high.w));
        let composed: Vec<(PackedWeights, Vec<f32>)> =
            (0..high.n).map(|n| self.compose(params, ca, gate, n)).collect();
        // Rows of products lie apart: a power of two between them would share few cache sets.
        let (rows, pitch) = (self.classes + 1, high.w + 16);
        // A task is a few output rows.
        (0..high.n * high.h).into_par_iter().with_max_len(4).for_each(|task| {
            let (n, row) = (task / high.h, task % high.h);
            let pixels = row * high.w..(row + 1) * high.w;
            let (weights, bias) = &composed[n];
            with_scratch(rows * pitch + map.scratch_len(), |scratch| {
                let (products, scratch) = scratch.split_at_mut(rows * pitch);
                let epilogue = Epilogue {
                    bias: bias.as_ptr(),
                    ..Epilogue::store(products.as_mut_ptr().wrapping_sub(pixels.start), pitch)
                };
                let product = Product { weights, epilogue };
                unsafe { gemm::multiply(isa, &planes_of(x, n), pixels.clone(), product, None) }
                let (products, gate_row) = products.split_at_mut(self.classes * pitch);
                let gate = match gate {
                    Gate::Plane(sa) => &sa.plane(n, 0)[pixels.clone()],
                    Gate::Convolution { act, .. } => {
                        let gate = &mut gate_row[..high.w];
                        activation::apply(act, gate);
                        &*gate
                    }
                };
                for (c, product) in products.chunks_exact(pitch).enumerate() {
                    // One task per row.
                    let y = unsafe { y.pixels_mut(n, c, pixels.clone()) };
                    let gated = (gate, &product[..high.w]);
                    map.row_gated(isa, (t.plane(n, c), row), scratch, gated, y);
                }
            });
        });
    }

    /// M, packed, and m, for image n, with the gate's row behind.
    fn compose(
        &self,
        params: MeuScoresParams,
        ca: View,
        gate: Gate,
        n: usize,
    ) -> (PackedWeights, Vec<f32>) {
        let inputs = self.in_channels;
        let mut matrix = Vec::with_capacity((self.classes + 1) * inputs);
        let mut bias = Vec::with_capacity(self.classes + 1);
        for (class, mix) in params.mix.chunks_exact(self.width).enumerate() {
            let gated: Vec<f64> =
                (0..self.width).map(|o| f64::from(mix[o]) * f64::from(ca.plane(n, o)[0])).collect();
            let dot = |column: &dyn Fn(usize) -> f32| -> f64 {
                gated.iter().enumerate().map(|(o, g)| g * f64::from(column(o))).sum()
            };
            matrix.extend((0..inputs).map(|i| dot(&|o| params.low[o * inputs + i]) as f32));
            bias.push((dot(&|o| params.low_bias[o]) + f64::from(params.bias[class])) as f32);
        }
        if let Gate::Convolution { weight, bias: gate_bias, .. } = gate {
            matrix.extend_from_slice(weight);
            bias.push(gate_bias.map_or(0.0, |b| b[0]));
        }
        (PackedWeights::new(&matrix, bias.len(), inputs), bias)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::conv1x1;
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
                let operands = (t.view(), x.view(), ca.view(), Gate::Plane(sa.view()));
                let params = MeuScoresParams { mix, low, low_bias, bias };
                op.forward(isa, params, operands, y.view_mut());
                assert_close(&format!("{classes}, {label}"), &y.read(), &expected, FORWARD);
                // The gate from x: as if it had come as a plane.
                for act in [Act::None, Act::Relu, Act::Sigmoid] {
                    let (weight, bias) = (&low[..inp], &bias[..1]);
                    let mut plane = Buffer::unwritten(inputs[3].shape, layout);
                    conv1x1::forward(
                        isa,
                        x.view(),
                        weight,
                        Some(bias),
                        None,
                        act,
                        plane.view_mut(),
                    );
                    let plane = Gate::Plane(plane.view());
                    op.forward(isa, params, (t.view(), x.view(), ca.view(), plane), y.view_mut());
                    let expected = y.read();
                    let gate = Gate::Convolution { weight, bias: Some(bias), act };
                    op.forward(isa, params, (t.view(), x.view(), ca.view(), gate), y.view_mut());
                    assert_close(&format!("{act:?}, {label}"), &y.read(), &expected, FORWARD);
                }
            });
        }
    }
}
