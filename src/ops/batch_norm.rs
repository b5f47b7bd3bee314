//! Batch norm over N, H, W with batch statistics (Ioffe & Szegedy 2015), and what is fused
//! behind it: y = act(scale * (x - mean) / sqrt(var + eps) + bias + residual).

use rayon::prelude::*;

use super::{Act, Cost};
use crate::backend::cpu::planes::{self, Gated, NormBackward};
use crate::backend::cpu::{Isa, View, ViewMut};
use crate::graph::{ParamId, Shape};

/// Added to the variance.
pub const EPS: f32 = 1e-5;
/// Weight of the new batch in the running statistics.
pub const MOMENTUM: f32 = 0.1;

/// Parameters of a batch norm, each of length C.
#[derive(Debug, Clone, Copy)]
pub struct BnParams {
    /// Scale.
    pub weight: ParamId,
    /// Shift.
    pub bias: ParamId,
    /// Running mean.
    pub running_mean: ParamId,
    /// Running (unbiased) variance.
    pub running_var: ParamId,
}

impl BnParams {
    pub(super) fn ids(&self) -> [ParamId; 4] {
        [self.weight, self.bias, self.running_mean, self.running_var]
    }
}

/// Batch norm in training form; inference folds it into the convolution before it.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    /// Channels.
    pub channels: usize,
    /// Scale, shift, running statistics.
    pub params: BnParams,
    /// Non-linearity, after the residual.
    pub act: Act,
}

impl BatchNorm {
    pub(super) fn shape(&self, inputs: &[Shape]) -> Result<Shape, String> {
        match inputs {
            [x] if x.c == self.channels => Ok(*x),
            [x, r] if x.c == self.channels && r == x => Ok(*x),
            _ => Err(format!("{} channels (and a residual like them)", self.channels)),
        }
    }

    /// Mean and 1 / sqrt(var + eps) of the batch, per channel.
    pub(super) fn saved(&self) -> Vec<Shape> {
        vec![Shape::new(1, 2, 1, self.channels)]
    }

    pub(super) fn cost(&self, output: Shape) -> Cost {
        Cost { macs: 0, flops: 2 * output.len() as u64 }
    }
}

/// A batch norm's parameter values in training, each of length C; the running statistics are
/// updated by the forward.
pub struct TrainingParams<'a> {
    /// Scale.
    pub weight: &'a [f32],
    /// Shift.
    pub bias: &'a [f32],
    /// Running mean.
    pub running_mean: &'a mut [f32],
    /// Running variance, unbiased as PyTorch keeps it.
    pub running_var: &'a mut [f32],
}

/// Mean and 1 / sqrt(var + eps) of one channel over a batch of planes; updates the running
/// statistics: r += momentum * (new - r), with the unbiased variance.
pub(super) fn batch_statistics<'a>(
    isa: Isa,
    planes: impl Iterator<Item = &'a [f32]> + Clone,
    running_mean: &mut f32,
    running_var: &mut f32,
) -> (f32, f32) {
    let count = planes.clone().map(<[f32]>::len).sum::<usize>() as f64;
    let mean = planes.clone().map(|x| planes::sum(isa, x)).sum::<f64>() / count;
    // Second pass around the (rounded) mean: no cancellation, and the planes are still cached.
    let squares: f64 = planes.map(|x| planes::sum_squared_diff(isa, x, mean as f32)).sum();
    let var = squares / count;
    let unbiased = squares / (count - 1.0).max(1.0);
    *running_mean += MOMENTUM * (mean as f32 - *running_mean);
    *running_var += MOMENTUM * (unbiased as f32 - *running_var);
    (mean as f32, (1.0 / (var + f64::from(EPS)).sqrt()) as f32)
}

/// y = act(weight * (x - mean) * invstd + bias + residual) with the batch's statistics, which go
/// to `saved_mean` and `saved_invstd` (length C each) for the backward.
#[allow(clippy::too_many_arguments)]
pub fn forward(
    isa: Isa,
    x: View,
    params: TrainingParams,
    residual: Option<View>,
    act: Act,
    y: ViewMut,
    saved_mean: &mut [f32],
    saved_invstd: &mut [f32],
) {
    let batch = x.shape().n;
    let channels = params
        .running_mean
        .par_iter_mut()
        .zip(params.running_var)
        .zip(saved_mean.par_iter_mut().zip(saved_invstd));
    channels.enumerate().for_each(|(c, ((running_mean, running_var), (mean, invstd)))| {
        let images = (0..batch).map(|n| x.plane(n, c));
        (*mean, *invstd) = batch_statistics(isa, images, running_mean, running_var);
        let scale = params.weight[c] * *invstd;
        let shift = params.bias[c] - *mean * scale;
        for n in 0..batch {
            // One task per channel.
            let y = unsafe { y.plane_mut(n, c) };
            let residual = residual.map(|r| r.plane(n, c));
            planes::affine(isa, x.plane(n, c), (scale, shift), residual, act == Act::Relu, y);
        }
    });
}

/// Derivative of one channel's batch norm, x_hat = (x - mean) * invstd, over M values:
///   dweight = sum g x_hat,   dbias = sum g,
///   dx = weight * invstd * (g - dbias / M - x_hat * dweight / M).
/// Mean and variance are functions of x; that is where the two sums come from.
pub(super) fn channel_gradient(
    sums: (f64, f64),
    count: usize,
    weight: f32,
    mean: f32,
    invstd: f32,
) -> (f32, f32, NormBackward) {
    let (sum_g, sum_g_centred) = sums;
    let dweight = sum_g_centred * f64::from(invstd);
    let count = count as f64;
    let apply = NormBackward {
        mean,
        scale: weight * invstd,
        mean_g: (sum_g / count) as f32,
        slope: (dweight / count * f64::from(invstd)) as f32,
    };
    (dweight as f32, sum_g as f32, apply)
}

/// Backward of [`forward`]: g is dy, passed where y > 0 with a ReLU. The residual's gradient is g
/// itself. `y` is read only with a ReLU.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    isa: Isa,
    x: View,
    y: View,
    dy: View,
    weight: &[f32],
    saved_mean: &[f32],
    saved_invstd: &[f32],
    act: Act,
    dx: (ViewMut, bool),
    dresidual: Option<(ViewMut, bool)>,
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    let (batch, pixels) = (x.shape().n, x.shape().plane());
    let grads = dweight.par_iter_mut().zip(dbias);
    grads.enumerate().for_each(|(c, (dweight, dbias))| {
        let gated =
            |n| Gated { grad: dy.plane(n, c), gate: (act == Act::Relu).then(|| y.plane(n, c)) };
        let (mean, invstd) = (saved_mean[c], saved_invstd[c]);
        let sums = (0..batch)
            .map(|n| planes::norm_backward_sums(isa, gated(n), x.plane(n, c), mean))
            .fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        let apply;
        (*dweight, *dbias, apply) = channel_gradient(sums, batch * pixels, weight[c], mean, invstd);
        for n in 0..batch {
            // One task per channel. The residual's gradient first: dx may be written over dy.
            if let Some((dresidual, accumulate)) = dresidual {
                let target = unsafe { dresidual.plane_mut(n, c) };
                planes::pass_gated(isa, gated(n), target, accumulate);
            }
            let target = unsafe { dx.0.plane_mut(n, c) };
            planes::norm_backward(isa, gated(n), x.plane(n, c), apply, target, dx.1);
        }
    });
}
