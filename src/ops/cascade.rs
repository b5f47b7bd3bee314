//! The depthwise dilated cascade, the core of an FPE block (paper, section 3.1, Fig. 2).
//!
//! The C input channels are B consecutive subsets x_1 .. x_B of C / B channels:
//!   u_i = D_i(s_i),  s_1 = x_1,  s_i = x_i + y_{i-1} (or x_i without branch addition)
//!   y_i = ReLU(BN_i(u_i))
//! D_i is a depthwise 3x3 convolution of dilation d_i, padding d_i. Channel j of all branches
//! forms a chain that no other channel touches: the unit of parallel work on every backend.

use super::batch_norm::BnParams;
use super::Cost;
use crate::graph::{ParamId, Shape};

/// How a branch is normalised.
#[derive(Debug, Clone)]
pub enum Norm {
    /// Batch norm with batch statistics, one per branch.
    Batch(Vec<BnParams>),
    /// Batch norm folded into the weights; what is left is a bias per branch (C / B values).
    Folded(Vec<ParamId>),
}

/// All branches of an FPE block.
#[derive(Debug, Clone)]
pub struct Cascade {
    /// Channels C of input and output.
    pub channels: usize,
    /// Stride of every branch, 1 or 2.
    pub stride: usize,
    /// Dilation of each branch; their number is B.
    pub dilations: Vec<usize>,
    /// Whether branch i takes in y_{i-1}; never with stride 2, where sizes differ.
    pub addition: bool,
    /// Weights of each branch, C / B x 1 x 3 x 3.
    pub weights: Vec<ParamId>,
    /// Normalisation.
    pub norm: Norm,
}

impl Cascade {
    /// Channels of one branch, C / B; also the number of chains.
    pub fn width(&self) -> usize {
        self.channels / self.dilations.len()
    }

    pub(super) fn shape(&self, inputs: &[Shape]) -> Result<Shape, String> {
        match inputs {
            [x] if x.c == self.channels => {
                Ok(Shape { h: x.h.div_ceil(self.stride), w: x.w.div_ceil(self.stride), ..*x })
            }
            _ => Err(format!("one operand of {} channels", self.channels)),
        }
    }

    /// u of every branch (shape of the output), then mean and 1 / sqrt(var + eps) per channel.
    pub(super) fn saved(&self, _inputs: &[Shape], output: Shape) -> Vec<Shape> {
        vec![output, Shape::new(1, 2, 1, self.channels)]
    }

    pub(super) fn params(&self) -> Vec<ParamId> {
        let mut ids = self.weights.clone();
        match &self.norm {
            Norm::Batch(norms) => ids.extend(norms.iter().flat_map(|n| n.ids())),
            Norm::Folded(biases) => ids.extend(biases),
        }
        ids
    }

    /// 9 MACs, a batch norm (2) and a ReLU (1) per output; a folded one has a bias (1) instead.
    pub(super) fn cost(&self, output: Shape) -> Cost {
        let outputs = output.len() as u64;
        let norm = match self.norm {
            Norm::Batch(_) => 2,
            Norm::Folded(_) => 1,
        };
        Cost { macs: 9 * outputs, flops: (9 + norm + 1) * outputs }
    }
}
