//! 1x1 convolution: a matrix product over channels, y = act(W x + b + residual).

use rayon::prelude::*;

use super::{Act, Cost, activation};
use crate::backend::cpu::gemm::{Epilogue, PackedWeights, Planes, TILE, dot_pixels, gemm_tile};
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
/// Tiles a task works through: long enough to hide the cost of scheduling it.
const TILES_PER_TASK: usize = 16;

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
    multiply(isa, x, &PackedWeights::new(w, out, inp), bias, residual, act, y);
    if act == Act::Sigmoid {
        activation::forward(isa, y.as_view(), act, y);
    }
}

/// Y = relu?(W X + b + R) image by image, tiles of pixels shared out over the threads.
fn multiply(
    isa: Isa,
    x: View,
    w: &PackedWeights,
    bias: Option<&[f32]>,
    residual: Option<View>,
    act: Act,
    y: ViewMut,
) {
    let (n, pixels) = (y.shape().n, y.shape().plane());
    let tiles = pixels.div_ceil(TILE);
    (0..n * tiles).into_par_iter().with_min_len(TILES_PER_TASK).for_each(|task| {
        let (image, start) = (task / tiles, task % tiles * TILE);
        let planes = Planes { base: x.image(image), k: x.shape().c, stride: x.plane_stride() };
        let epilogue = Epilogue {
            out: y.image(image),
            out_stride: y.plane_stride(),
            bias: bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
            residual: residual.map_or(std::ptr::null(), |r| r.image(image)),
            residual_stride: residual.map_or(0, |r| r.plane_stride()),
            relu: act == Act::Relu,
        };
        // Every task owns its pixels of all output planes.
        unsafe { gemm_tile(isa, w, &planes, start, TILE.min(pixels - start), &epilogue) }
    });
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
