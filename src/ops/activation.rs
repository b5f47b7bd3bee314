//! Elementwise non-linearity: ReLU, or the sigmoid of the attention ablation.

use rayon::prelude::*;

use super::Cost;
use crate::backend::cpu::planes::{self, Gated};
use crate::backend::cpu::{Isa, View, ViewMut};
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

/// y = act(x), elementwise; y may be x.
pub fn forward(isa: Isa, x: View, act: Act, y: ViewMut) {
    let channels = x.shape().c;
    (0..x.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        // One task per plane.
        let (x, y) = (x.plane(n, c), unsafe { y.plane_mut(n, c) });
        match act {
            Act::None | Act::Relu => {
                planes::affine(isa, x, (1.0, 0.0), None, act == Act::Relu, y);
            }
            Act::Sigmoid => {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = 1.0 / (1.0 + (-x).exp());
                }
            }
        }
    });
}

/// With y the forward's output: ReLU passes dy where y > 0; the sigmoid has dx = dy * y * (1 - y).
pub fn backward(isa: Isa, y: View, dy: View, act: Act, dx: ViewMut, accumulate: bool) {
    let channels = y.shape().c;
    (0..y.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        let (y, grad) = (y.plane(n, c), dy.plane(n, c));
        let dx = unsafe { dx.plane_mut(n, c) };
        match act {
            Act::None => planes::pass_gated(isa, Gated { grad, gate: None }, dx, accumulate),
            Act::Relu => planes::pass_gated(isa, Gated { grad, gate: Some(y) }, dx, accumulate),
            Act::Sigmoid => {
                for ((dx, y), g) in dx.iter_mut().zip(y).zip(grad) {
                    let v = g * y * (1.0 - y);
                    *dx = if accumulate { *dx + v } else { v };
                }
            }
        }
    });
}
