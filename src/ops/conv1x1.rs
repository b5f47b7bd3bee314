//! 1x1 convolution: a matrix product over channels, y = act(W x + b + residual).

use super::{Act, Cost};
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
