//! The operators, a file each: shape rule, forward, backward (derivation in the comment above),
//! cost, tests. [`Op`] is their sum type.
//!
//! The CPU forward and backward of an operator are plain functions over [`View`]s of planes;
//! the CUDA side of the same operator is `kernels/<operator>.cu`.
//!
//! [`View`]: crate::backend::cpu::View

pub mod activation;
pub mod add;
pub mod batch_norm;
pub mod cascade;
pub mod channel_mean;
pub mod concat;
pub mod conv1x1;
pub mod conv3x3;
pub mod cross_entropy;
pub mod global_pool;
pub mod meu_fuse;
pub mod meu_scores;
pub mod resize;
pub mod row_by_row;
pub mod subsample;
#[cfg(test)]
pub(crate) mod testing;
pub mod weighted_pool;

use crate::graph::{ParamId, Shape};

pub use activation::{Act, Activation};
pub use batch_norm::{BatchNorm, BnParams};
pub use cascade::{Cascade, Norm};
pub use conv1x1::Conv1x1;
pub use conv3x3::Conv3x3;
pub use meu_fuse::MeuFuse;
pub use meu_scores::MeuScores;

/// An operator of the graph. Operands and results are N x C x H x W.
#[derive(Debug, Clone)]
pub enum Op {
    /// The normalised image.
    Input {
        /// Channels, 3.
        channels: usize,
    },
    /// Dense 3x3 convolution, padding 1: the stem.
    Conv3x3(Conv3x3),
    /// 1x1 convolution; a second input is a residual added before the activation.
    Conv1x1(Conv1x1),
    /// Batch norm; a second input is a residual added before the activation.
    BatchNorm(BatchNorm),
    /// Depthwise dilated branches with their batch norm and ReLU.
    Cascade(Cascade),
    /// Elementwise non-linearity.
    Activation(Activation),
    /// Elementwise sum of two tensors.
    Add,
    /// Concatenation over channels.
    Concat,
    /// Mean over H and W: N x C x 1 x 1.
    GlobalAvgPool,
    /// Mean over C: N x 1 x H x W.
    ChannelMean,
    /// l * ca + upsample(h) * sa, inputs h, l, ca and (with spatial attention) sa.
    MeuFuse(MeuFuse),
    /// Bilinear resize of the first input to the height and width of the second.
    Resize,
    /// Every second row and column; inference only.
    Subsample,
    /// Mean of the first input, upsampled, under the weights of the second; inference only.
    WeightedPool,
    /// Class scores of a fusion and the map behind it, inputs t, x, ca, sa; inference only.
    MeuScores(MeuScores),
}

/// What an operator's backward reads besides the gradient of its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BackwardNeeds {
    /// The forward pass's inputs.
    pub inputs: bool,
    /// The forward pass's output.
    pub output: bool,
}

/// Work of one operator at given shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Multiply-accumulates of convolutions.
    pub macs: u64,
    /// FLOPs by the SPEC's count: MACs, two per batch-norm output, one per ReLU, one per bias.
    pub flops: u64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.macs += other.macs;
        self.flops += other.flops;
    }
}

impl Op {
    /// Short name for tables and error messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Op::Input { .. } => "input",
            Op::Conv3x3(_) => "conv3x3",
            Op::Conv1x1(_) => "conv1x1",
            Op::BatchNorm(_) => "batch_norm",
            Op::Cascade(_) => "cascade",
            Op::Activation(_) => "activation",
            Op::Add => "add",
            Op::Concat => "concat",
            Op::GlobalAvgPool => "global_pool",
            Op::ChannelMean => "channel_mean",
            Op::MeuFuse(_) => "meu_fuse",
            Op::Resize => "resize",
            Op::Subsample => "subsample",
            Op::WeightedPool => "weighted_pool",
            Op::MeuScores(_) => "meu_scores",
        }
    }

    /// Shape of the output.
    ///
    /// # Errors
    /// The violated rule in words, where the operands do not fit.
    pub fn shape(&self, inputs: &[Shape]) -> Result<Shape, String> {
        match self {
            Op::Input { .. } => Err("an input has no operands".into()),
            Op::Conv3x3(op) => op.shape(inputs),
            Op::Conv1x1(op) => op.shape(inputs),
            Op::BatchNorm(op) => op.shape(inputs),
            Op::Cascade(op) => op.shape(inputs),
            Op::Activation(op) => op.shape(inputs),
            Op::Add => add::shape(inputs),
            Op::Concat => concat::shape(inputs),
            Op::GlobalAvgPool => global_pool::shape(inputs),
            Op::ChannelMean => channel_mean::shape(inputs),
            Op::MeuFuse(op) => op.shape(inputs),
            Op::Resize => resize::shape(inputs),
            Op::Subsample => subsample::shape(inputs),
            Op::WeightedPool => weighted_pool::shape(inputs),
            Op::MeuScores(op) => op.shape(inputs),
        }
    }

    /// Shapes of what a training forward keeps for the backward besides inputs and output.
    pub fn saved(&self, inputs: &[Shape], output: Shape) -> Vec<Shape> {
        match self {
            Op::BatchNorm(op) => op.saved(),
            Op::Cascade(op) => op.saved(inputs, output),
            _ => Vec::new(),
        }
    }

    /// What the backward reads.
    pub fn backward_needs(&self) -> BackwardNeeds {
        let (inputs, output) = match self {
            Op::Input { .. }
            | Op::Add
            | Op::Concat
            | Op::GlobalAvgPool
            | Op::ChannelMean
            | Op::Resize
            | Op::Subsample
            | Op::WeightedPool
            | Op::MeuScores(_) => (false, false),
            Op::Conv3x3(_) | Op::Conv1x1(_) | Op::MeuFuse(_) => (true, false),
            Op::Activation(_) => (false, true),
            Op::BatchNorm(op) => (true, op.act != Act::None),
            Op::Cascade(_) => (true, true),
        };
        BackwardNeeds { inputs, output }
    }

    /// Whether input `i` is read for its values (the second input of a resize lends its size only).
    pub fn reads(&self, i: usize) -> bool {
        !(matches!(self, Op::Resize) && i == 1)
    }

    /// Whether the output may be written over the first input in inference.
    pub fn in_place(&self) -> bool {
        match self {
            Op::Cascade(op) => op.stride == 1,
            Op::Activation(_) => true,
            _ => false,
        }
    }

    /// Work for an output of the given shape.
    pub fn cost(&self, output: Shape) -> Cost {
        match self {
            Op::Conv3x3(op) => op.cost(output),
            Op::Conv1x1(op) => op.cost(output),
            Op::BatchNorm(op) => op.cost(output),
            Op::Cascade(op) => op.cost(output),
            Op::Activation(op) => op.cost(output),
            Op::MeuScores(op) => op.cost(output),
            Op::Input { .. }
            | Op::Add
            | Op::Concat
            | Op::GlobalAvgPool
            | Op::ChannelMean
            | Op::MeuFuse(_)
            | Op::Resize
            | Op::Subsample
            | Op::WeightedPool => Cost::default(),
        }
    }

    /// Whether there is no backward: an operator that only rewrites for inference put in.
    pub fn inference_only(&self) -> bool {
        matches!(self, Op::Subsample | Op::WeightedPool | Op::MeuScores(_))
    }

    /// Parameters the operator reads, in the order its functions take them.
    pub fn params(&self) -> Vec<ParamId> {
        let mut ids = Vec::new();
        self.map_params(|id| {
            ids.push(id);
            id
        });
        ids
    }

    /// The operator with other parameters; `f` is asked in the order of [`Op::params`].
    pub fn map_params(&self, mut f: impl FnMut(ParamId) -> ParamId) -> Op {
        let mut op = self.clone();
        match &mut op {
            Op::Conv3x3(Conv3x3 { weight, bias, .. })
            | Op::Conv1x1(Conv1x1 { weight, bias, .. }) => {
                *weight = f(*weight);
                *bias = bias.map(&mut f);
            }
            Op::BatchNorm(norm) => norm.params = norm.params.map(&mut f),
            Op::Cascade(cascade) => cascade.map_params(&mut f),
            Op::MeuScores(MeuScores { mix, low, low_bias, bias, .. }) => {
                for id in [mix, low, low_bias, bias] {
                    *id = f(*id);
                }
            }
            Op::Input { .. }
            | Op::Activation(_)
            | Op::Add
            | Op::Concat
            | Op::GlobalAvgPool
            | Op::ChannelMean
            | Op::MeuFuse(_)
            | Op::Resize
            | Op::Subsample
            | Op::WeightedPool => {}
        }
        op
    }
}
