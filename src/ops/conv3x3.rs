//! Dense 3x3 convolution, padding 1: the stem.

use super::{Act, Cost};
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
