//! Elementwise non-linearity: ReLU, or the sigmoid of the attention ablation.

use super::Cost;
use crate::graph::Shape;

/// A non-linearity, on its own or fused behind another operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    /// Identity.
    None,
    /// max(x, 0).
    Relu,
    /// 1 / (1 + exp(-x)).
    Sigmoid,
}

/// y = act(x).
#[derive(Debug, Clone)]
pub struct Activation {
    /// Which non-linearity.
    pub act: Act,
}

impl Activation {
    pub(super) fn shape(&self, inputs: &[Shape]) -> Result<Shape, String> {
        match inputs {
            [x] => Ok(*x),
            _ => Err("one operand".into()),
        }
    }

    /// One FLOP per output (SPEC's count for ReLU; a sigmoid is counted alike).
    pub(super) fn cost(&self, output: Shape) -> Cost {
        Cost { macs: 0, flops: output.len() as u64 }
    }
}
