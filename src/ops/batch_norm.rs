//! Batch norm over N, H, W with batch statistics (Ioffe & Szegedy 2015), and what is fused
//! behind it: y = act(scale * (x - mean) / sqrt(var + eps) + bias + residual).

use super::{Act, Cost};
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
