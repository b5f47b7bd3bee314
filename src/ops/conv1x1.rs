//! 1x1 convolution: a matrix product over channels, y = act(W x + b + residual).

use rayon::prelude::*;

use super::subsample::EvenPixels;
use super::{Act, Cost, activation};
use crate::backend::cpu::gemm::{self, Epilogue, PackedWeights, Planes, Product, dot_pixels};
use crate::backend::cpu::{Isa, View, ViewMut, planes};
use crate::graph::{ParamId, Shape};

/// 1x1 convolution of `in_channels` to `out_channels`, with what is fused behind it.
#[derive(Debug, Clone)]
pub struct Conv1x1 {
    /// Input channels.
    pub in_channels: usize,
    /// Output channels.
    pub out_channels: usize,
    /// Weights, out x in (x 1 x 1).
    pub weight: ParamId,
    /// Bias, out.
    pub bias: Option<ParamId>,
    /// Non-linearity, after bias and residual.
    pub act: Act,
}

impl Conv1x1 {
    pub(super) fn shape(&self, inputs: &[Shape]) -> Result<Shape, String> {
        let rule = || format!("{} channels (and a residual like the output)", self.in_channels);
        let (x, rest) = inputs.split_first().ok_or_else(rule)?;
        let y = x.with_channels(self.out_channels);
        let fits = x.c == self.in_channels && rest.len() <= 1 && rest.iter().all(|r| *r == y);
        if fits { Ok(y) } else { Err(rule()) }
    }

    pub(super) fn cost(&self, output: Shape) -> Cost {
        let macs = (output.len() * self.in_channels) as u64;
        let bias = if self.bias.is_some() { output.len() as u64 } else { 0 };
        Cost { macs, flops: macs + bias }
    }
}

/// Pixels that one partial sum of the weight gradient covers. Fixed, so that the result does not
/// depend on the number of threads.
const GRADIENT_CHUNK: usize = 8192;

/// y = act(W x + b + residual); w is out x in. N x in x H x W -> N x out x H x W.
pub fn forward(
    isa: Isa,
    x: View,
    w: &[f32],
    bias: Option<&[f32]>,
    residual: Option<View>,
    act: Act,
    y: ViewMut,
) {
    let (inp, out) = (x.shape().c, y.shape().c);
    if x.shape().plane() == 1 && residual.is_none() {
        return forward_pixel(isa, x, w, bias, act, y);
    }
    multiply(isa, x, &PackedWeights::new(w, out, inp), bias, residual, act, y);
    if act == Act::Sigmoid {
        activation::forward(isa, y.as_view(), act, y);
    }
}

/// [`forward`] of a single pixel per image, as of a pooled tensor: no tile to fill.
fn forward_pixel(isa: Isa, x: View, w: &[f32], bias: Option<&[f32]>, act: Act, y: ViewMut) {
    let (inp, out) = (x.shape().c, y.shape().c);
    for n in 0..x.shape().n {
        let pixel: Vec<f32> = (0..inp).map(|c| x.plane(n, c)[0]).collect();
        for (c, row) in (0..out).zip(w.chunks_exact(inp)) {
            let sum = planes::dot(isa, row, &pixel) + bias.map_or(0.0, |b| f64::from(b[c]));
            // Nobody else works on it.
            let y = unsafe { y.plane_mut(n, c) };
            y[0] = sum as f32;
            activation::apply(act, y);
        }
    }
}

/// [`forward`] of every second row and column of `x`, none or ReLU behind it.
pub fn forward_subsampled(isa: Isa, x: View, conv: Pointwise) {
    let weights = PackedWeights::new(conv.weight, conv.y.shape().c, x.shape().c);
    gemm::for_runs(conv.y.shape(), |image, pixels| {
        let epilogue = epilogue(image, conv.bias, conv.residual, conv.act, conv.y);
        let product = Product { weights: &weights, epilogue };
        // Every task owns its pixels of all output planes.
        unsafe { gemm::multiply(isa, &EvenPixels { x, image }, pixels, product, None) }
    });
}

/// A convolution that runs back to back with another operator.
#[derive(Clone, Copy)]
pub struct Pointwise<'a> {
    /// Weights, out x in.
    pub weight: &'a [f32],
    /// Bias, out.
    pub bias: Option<&'a [f32]>,
    /// Added before the activation.
    pub residual: Option<View<'a>>,
    /// None or ReLU.
    pub act: Act,
    /// Result.
    pub y: ViewMut<'a>,
}

/// `first.y = act(W1 x + b1 + r1)`, `second.y = act(W2 first.y + b2 + r2)`, tile by tile: the second
/// reads the first one's result from cache. `second.y` may be `x` where shapes agree.
pub fn forward_pair(isa: Isa, x: View, first: Pointwise, second: Pointwise) {
    let (inp, between, out) = (x.shape().c, first.y.shape().c, second.y.shape().c);
    let weights = [
        PackedWeights::new(first.weight, between, inp),
        PackedWeights::new(second.weight, out, between),
    ];
    gemm::for_runs(x.shape(), |image, pixels| {
        let planes = planes_of(x, image);
        let [first, second] =
            [(&weights[0], &first), (&weights[1], &second)].map(|(weights, p)| Product {
                weights,
                epilogue: epilogue(image, p.bias, p.residual, p.act, p.y),
            });
        // Every task owns its pixels of all planes.
        unsafe { gemm::multiply(isa, &planes, pixels, first, Some(second)) }
    });
}

/// Y = relu?(W X + b + R) image by image, runs of tiles shared out over the threads.
fn multiply(
    isa: Isa,
    x: View,
    w: &PackedWeights,
    bias: Option<&[f32]>,
    residual: Option<View>,
    act: Act,
    y: ViewMut,
) {
    gemm::for_runs(y.shape(), |image, pixels| {
        let planes = planes_of(x, image);
        let epilogue = epilogue(image, bias, residual, act, y);
        // Every task owns its pixels of all output planes.
        unsafe { gemm::multiply(isa, &planes, pixels, Product { weights: w, epilogue }, None) }
    });
}

/// The channels of one image as the operand of a product.
pub(super) fn planes_of(x: View, image: usize) -> Planes {
    let (shape, stride) = (x.shape(), x.plane_stride());
    Planes { base: x.image(image), k: shape.c, stride, pixels: shape.plane() }
}

/// What follows a product for one image: bias, residual and ReLU into the planes of `y`.
pub(super) fn epilogue(
    image: usize,
    bias: Option<&[f32]>,
    residual: Option<View>,
    act: Act,
    y: ViewMut,
) -> Epilogue {
    Epilogue {
        out: y.image(image),
        out_stride: y.plane_stride(),
        bias: bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
        residual: residual.map_or(std::ptr::null(), |r| r.image(image)),
        residual_stride: residual.map_or(0, |r| r.plane_stride()),
        relu: act == Act::Relu,
    }
}

/// With dY the gradient of y = W x + b:
///   dW = sum over n, p of dY[:, p] x[:, p]^T,   db = sum of dY,   dX = W^T dY.
/// `dx` is (gradient, accumulate); none where nobody needs it.
pub fn backward(
    isa: Isa,
    x: View,
    dy: View,
    w: &[f32],
    dx: Option<(ViewMut, bool)>,
    dw: &mut [f32],
    dbias: Option<&mut [f32]>,
) {
    let (inp, out) = (x.shape().c, dy.shape().c);
    weight_gradient(x, dy, dw);
    if let Some(dbias) = dbias {
        bias_gradient(isa, dy, dbias);
    }
    if let Some((dx, accumulate)) = dx {
        let residual = accumulate.then(|| dx.as_view());
        let w = PackedWeights::transposed(w, inp, out);
        multiply(isa, dy, &w, None, residual, Act::None, dx);
    }
}

/// db[c] = sum over n, p of dY[n][c][p].
pub(super) fn bias_gradient(isa: Isa, dy: View, dbias: &mut [f32]) {
    dbias.par_iter_mut().enumerate().for_each(|(c, db)| {
        let sum: f64 = (0..dy.shape().n).map(|n| planes::sum(isa, dy.plane(n, c))).sum();
        *db = sum as f32;
    });
}

fn weight_gradient(x: View, dy: View, dw: &mut [f32]) {
    let (n, inp, out, pixels) = (x.shape().n, x.shape().c, dy.shape().c, x.shape().plane());
    let chunks = pixels.div_ceil(GRADIENT_CHUNK);
    let mut partial = vec![0.0f32; n * chunks * dw.len()];
    partial.par_chunks_mut(dw.len()).enumerate().for_each(|(task, partial)| {
        let (image, start) = (task / chunks, task % chunks * GRADIENT_CHUNK);
        let count = GRADIENT_CHUNK.min(pixels - start);
        unsafe {
            let a = dy.image(image).add(start);
            let b = x.image(image).add(start);
            let strides = (dy.plane_stride(), x.plane_stride());
            dot_pixels(out, inp, count, a, strides.0, b, strides.1, partial);
        }
    });
    sum_partials(&partial, dw);
}

/// Adds up equally long pieces in their order: the same result on any number of threads.
pub(super) fn sum_partials(partial: &[f32], total: &mut [f32]) {
    let len = total.len();
    total.par_iter_mut().enumerate().for_each(|(i, t)| {
        let sum: f64 = partial[i..].iter().step_by(len).map(|&v| f64::from(v)).sum();
        *t = sum as f32;
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    /// Inputs x, w (out x in), b, r.
    fn naive(inputs: &[T64], act: Act) -> T64 {
        let [x, w, b, r] = inputs else { panic!("four operands") };
        T64::from_fn(r.shape, |n, o, y, col| {
            let products = (0..x.shape.c).map(|i| w.at(o, i, 0, 0) * x.at(n, i, y, col));
            let v = products.sum::<f64>() + b.data[o] + r.at(n, o, y, col);
            match act {
                Act::None => v,
                Act::Relu => v.max(0.0),
                Act::Sigmoid => 1.0 / (1.0 + (-v).exp()),
            }
        })
    }

    /// Random operands for N x in x H x W -> out; bias and residual are zeros unless asked for.
    fn operands(x: Shape, out: usize, bias: bool, residual: bool) -> [T64; 4] {
        let mut rng = rng(6);
        let mut random = |shape, wanted: bool| {
            let values = T64::random(shape, &mut rng);
            if wanted { values } else { values.map(|_| 0.0) }
        };
        [
            random(x, true),
            random(Shape::new(out, x.c, 1, 1), true),
            random(Shape::new(1, 1, 1, out), bias),
            random(x.with_channels(out), residual),
        ]
    }

    /// Odd, tiny and tile-crossing sizes, odd channel counts.
    const CASES: [(Shape, usize); 5] = [
        (Shape::new(1, 1, 1, 1), 1),
        (Shape::new(3, 3, 5, 7), 2),
        (Shape::new(2, 7, 1, 9), 13),
        (Shape::new(3, 16, 5, 13), 6),
        (Shape::new(1, 9, 11, 17), 19),
    ];

    #[test]
    fn forward_with_every_epilogue() {
        for (shape, out) in CASES {
            for flags in 0..12 {
                let (bias, residual) = (flags & 1 != 0, flags & 2 != 0);
                let act = [Act::None, Act::Relu, Act::Sigmoid][flags / 4];
                let inputs = operands(shape, out, bias, residual);
                let expected = naive(&inputs, act);
                let (w, b) = (inputs[1].f32(), inputs[2].f32());
                everywhere(|isa, layout, label| {
                    let x = Buffer::new(&inputs[0], layout);
                    let r = Buffer::new(&inputs[3], layout);
                    let mut y = Buffer::unwritten(expected.shape, layout);
                    let b = bias.then_some(&b[..]);
                    let r = residual.then(|| r.view());
                    forward(isa, x.view(), &w, b, r, act, y.view_mut());
                    let what = format!("{shape} -> {out}, {act:?}, {flags}, {label}");
                    assert_close(&what, &y.read(), &expected, FORWARD);
                });
            }
        }
    }

    #[test]
    fn backward_agrees_with_central_differences() {
        for (shape, out) in CASES {
            let inputs = operands(shape, out, true, false);
            let dy = T64::random(inputs[3].shape, &mut rng(7));
            let f = |inputs: &[T64]| naive(inputs, Act::None);
            let [dx, dw, db] = [0, 1, 2].map(|i| central_difference(f, &inputs, i, &dy));
            let w = inputs[1].f32();
            everywhere(|isa, layout, label| {
                let x = Buffer::new(&inputs[0], layout);
                let dy = Buffer::new(&dy, layout);
                let (mut w_grad, mut b_grad) = (vec![f32::NAN; w.len()], vec![f32::NAN; out]);
                check_gradient(&format!("dx, {label}"), &dx, layout, |dx, accumulate| {
                    let (x, dy, dx) = (x.view(), dy.view(), Some((dx, accumulate)));
                    backward(isa, x, dy, &w, dx, &mut w_grad, Some(&mut b_grad));
                });
                assert_close(&format!("dw, {label}"), &T64::vector(&w_grad), &dw, BACKWARD);
                assert_close(&format!("db, {label}"), &T64::vector(&b_grad), &db, BACKWARD);
                let mut alone = vec![f32::NAN; w.len()];
                backward(isa, x.view(), dy.view(), &w, None, &mut alone, None);
                assert_eq!(alone, w_grad, "{label}: the same dw where dx is not wanted");
            });
        }
    }

    #[test]
    fn weight_gradient_covers_planes_longer_than_a_chunk() {
        let inputs = operands(Shape::new(2, 2, 95, 91), 2, true, false);
        assert!(inputs[0].shape.plane() > GRADIENT_CHUNK);
        let dy = T64::random(inputs[3].shape, &mut rng(8));
        let f = |inputs: &[T64]| naive(inputs, Act::None);
        let [dw, db] = [1, 2].map(|i| central_difference(f, &inputs, i, &dy));
        everywhere(|isa, layout, label| {
            let (x, dy) = (Buffer::new(&inputs[0], layout), Buffer::new(&dy, layout));
            let (mut w_grad, mut b_grad) = (vec![f32::NAN; 4], vec![f32::NAN; 2]);
            let w = inputs[1].f32();
            backward(isa, x.view(), dy.view(), &w, None, &mut w_grad, Some(&mut b_grad));
            assert_close(label, &T64::vector(&w_grad), &dw, BACKWARD);
            assert_close(label, &T64::vector(&b_grad), &db, BACKWARD);
        });
    }

    #[test]
    fn nan_in_one_pixel_stays_in_that_pixel() {
        let mut inputs = operands(Shape::new(1, 3, 5, 7), 4, true, false);
        inputs[0].data[35 + 12] = f64::NAN;
        everywhere(|isa, layout, label| {
            let (x, w, b) = (Buffer::new(&inputs[0], layout), inputs[1].f32(), inputs[2].f32());
            let mut y = Buffer::unwritten(inputs[3].shape, layout);
            forward(isa, x.view(), &w, Some(&b), None, Act::Relu, y.view_mut());
            for (i, v) in y.read().data.iter().enumerate() {
                assert_eq!(v.is_nan(), i % 35 == 12, "{label}: element {i} is {v}");
            }
        });
    }
}
