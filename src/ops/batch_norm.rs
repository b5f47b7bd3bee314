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
    /// The same vectors under other ids; `f` is asked in the order of the fields.
    pub(super) fn map(&self, mut f: impl FnMut(ParamId) -> ParamId) -> Self {
        BnParams {
            weight: f(self.weight),
            bias: f(self.bias),
            running_mean: f(self.running_mean),
            running_var: f(self.running_var),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    /// Inputs x, weight, bias, r; also the smallest |input of the activation|, and per channel
    /// mean and biased variance.
    fn naive(inputs: &[T64], act: Act) -> (T64, f64, Vec<(f64, f64)>) {
        let [x, weight, bias, r] = inputs else { panic!("four operands") };
        let s = x.shape;
        let count = (s.n * s.plane()) as f64;
        let plane = |n: usize, c: usize| &x.data[(n * s.c + c) * s.plane()..][..s.plane()];
        let statistics: Vec<(f64, f64)> = (0..s.c)
            .map(|c| {
                let values = || (0..s.n).flat_map(|n| plane(n, c));
                let mean = values().sum::<f64>() / count;
                (mean, values().map(|v| (v - mean) * (v - mean)).sum::<f64>() / count)
            })
            .collect();
        let before = T64::from_fn(s, |n, c, row, col| {
            let (mean, var) = statistics[c];
            let x_hat = (x.at(n, c, row, col) - mean) / (var + f64::from(EPS)).sqrt();
            weight.data[c] * x_hat + bias.data[c] + r.at(n, c, row, col)
        });
        let smallest = before.smallest();
        let relu = |v: f64| if act == Act::Relu { v.max(0.0) } else { v };
        let y = T64 { shape: s, data: before.data.into_iter().map(relu).collect() };
        (y, smallest, statistics)
    }

    /// Scales near 1, a mean that is not 0.
    fn operands(shape: Shape, residual: bool, seed: u64) -> [T64; 4] {
        let mut rng = rng(seed);
        let vector = Shape::new(1, 1, 1, shape.c);
        let x = T64::random(shape, &mut rng).map(|v| 1.5 * v + 0.7);
        let weight = T64::random(vector, &mut rng).map(|v| 1.0 + 0.5 * v);
        let bias = T64::random(vector, &mut rng);
        let r = T64::random(shape, &mut rng).map(|v| if residual { v } else { 0.0 });
        [x, weight, bias, r]
    }

    /// Every channel has at least nine values: with two, x_hat is +-1 whatever x, the gradient is
    /// 0 and its relative error meaningless (see `two_values_give_no_gradient`).
    const SHAPES: [Shape; 4] = [
        Shape::new(3, 4, 5, 7),
        Shape::new(1, 3, 3, 3),
        Shape::new(9, 2, 1, 1),
        Shape::new(2, 5, 1, 17),
    ];

    #[test]
    fn agrees_with_the_naive_forward_and_its_central_differences() {
        for (shape, residual) in SHAPES.into_iter().flat_map(|s| [(s, false), (s, true)]) {
            for act in [Act::None, Act::Relu] {
                check(shape, residual, act);
            }
        }
    }

    fn check(shape: Shape, residual: bool, act: Act) {
        let seed = seed_off_kinks(|seed| naive(&operands(shape, residual, seed), act).1);
        let inputs = operands(shape, residual, seed);
        let (expected, _, statistics) = naive(&inputs, act);
        let dy = T64::random(shape, &mut rng(13));
        let f = |inputs: &[T64]| naive(inputs, act).0;
        let [dx, dweight, dbias, dr] = [0, 1, 2, 3].map(|i| central_difference(f, &inputs, i, &dy));
        let (weight, bias) = (inputs[1].f32(), inputs[2].f32());
        everywhere(|isa, layout, label| {
            let what = format!("{shape}, residual {residual}, {act:?}, {label}");
            let [x, r, dy] = [&inputs[0], &inputs[3], &dy].map(|t| Buffer::new(t, layout));
            let mut y = Buffer::unwritten(shape, layout);
            let [mut mean, mut invstd] = [vec![f32::NAN; shape.c], vec![f32::NAN; shape.c]];
            let [mut running_mean, mut running_var] = [vec![0.5; shape.c], vec![2.0; shape.c]];
            let params = TrainingParams {
                weight: &weight,
                bias: &bias,
                running_mean: &mut running_mean,
                running_var: &mut running_var,
            };
            let residual_view = residual.then(|| r.view());
            let (m, i) = (&mut mean, &mut invstd);
            forward(isa, x.view(), params, residual_view, act, y.view_mut(), m, i);
            assert_close(&what, &y.read(), &expected, FORWARD);

            // PyTorch's rule: unbiased variance, momentum 0.1.
            let count = (shape.n * shape.plane()) as f64;
            let running = |start: f64, new: f64| 0.9 * start + 0.1 * new;
            let means = T64::collect(statistics.iter().map(|s| running(0.5, s.0)));
            assert_close(&what, &T64::vector(&running_mean), &means, FORWARD);
            let unbiased = |s: &(f64, f64)| s.1 * count / (count - 1.0);
            let vars = T64::collect(statistics.iter().map(|s| running(2.0, unbiased(s))));
            assert_close(&what, &T64::vector(&running_var), &vars, FORWARD);

            let run = |dx: (ViewMut, bool), dr: Option<(ViewMut, bool)>| {
                let [mut dw, mut db] = [vec![f32::NAN; shape.c], vec![f32::NAN; shape.c]];
                let (x, y, dy) = (x.view(), y.view(), dy.view());
                let (dw_out, db_out) = (&mut dw, &mut db);
                backward(isa, x, y, dy, &weight, &mean, &invstd, act, dx, dr, dw_out, db_out);
                assert_close(&format!("dweight, {what}"), &T64::vector(&dw), &dweight, BACKWARD);
                assert_close(&format!("dbias, {what}"), &T64::vector(&db), &dbias, BACKWARD);
            };
            check_gradient(&format!("dx, {what}"), &dx, layout, |dx, accumulate| {
                run((dx, accumulate), None);
            });
            if residual {
                check_gradient(&format!("dr, {what}"), &dr, layout, |dr, accumulate| {
                    let mut dx = Buffer::unwritten(shape, layout);
                    run((dx.view_mut(), false), Some((dr, accumulate)));
                });
            }
        });
    }

    #[test]
    fn two_values_give_no_gradient() {
        let inputs = operands(Shape::new(2, 3, 1, 1), false, 14);
        let dy = T64::random(inputs[0].shape, &mut rng(15));
        let weight = inputs[1].f32();
        everywhere(|isa, layout, label| {
            let [x, dy] = [&inputs[0], &dy].map(|t| Buffer::new(t, layout));
            let (_, _, statistics) = naive(&inputs, Act::None);
            let mean: Vec<f32> = statistics.iter().map(|s| s.0 as f32).collect();
            let invstd: Vec<f32> =
                statistics.iter().map(|s| (1.0 / (s.1 + f64::from(EPS)).sqrt()) as f32).collect();
            let mut dx = Buffer::unwritten(inputs[0].shape, layout);
            let [mut dw, mut db] = [vec![0.0; 3], vec![0.0; 3]];
            let (target, none) = ((dx.view_mut(), false), Act::None);
            let (x, dy) = (x.view(), dy.view());
            backward(isa, x, x, dy, &weight, &mean, &invstd, none, target, None, &mut dw, &mut db);
            // What is left comes from eps: of order eps / var of the terms that cancel.
            for (v, s) in dx.read().data.iter().zip(statistics.iter().cycle()) {
                assert!(v.abs() < 10.0 * f64::from(EPS) / s.1.powf(1.5) + 1e-5, "{label}: {v}");
            }
        });
    }

    #[test]
    fn nan_spoils_its_channel_only() {
        let mut inputs = operands(Shape::new(2, 3, 5, 7), false, 16);
        inputs[0].data[35 + 4] = f64::NAN;
        let (weight, bias) = (inputs[1].f32(), inputs[2].f32());
        everywhere(|isa, layout, label| {
            let x = Buffer::new(&inputs[0], layout);
            let mut y = Buffer::unwritten(inputs[0].shape, layout);
            let mut out = [const { [0.0f32; 3] }; 4];
            let [mean, invstd, running_mean, running_var] = &mut out;
            let params = TrainingParams { weight: &weight, bias: &bias, running_mean, running_var };
            forward(isa, x.view(), params, None, Act::Relu, y.view_mut(), mean, invstd);
            for (i, v) in y.read().data.iter().enumerate() {
                assert_eq!(v.is_nan(), i / 35 % 3 == 1, "{label}: element {i} is {v}");
            }
        });
    }
}
