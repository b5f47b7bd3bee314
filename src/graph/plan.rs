//! Memory plan: every tensor of a graph gets its place in one arena by its lifetime.
//!
//! A forward pass of F steps and its backward are one timeline of 2F + 1 moments (the loss in
//! the middle). A tensor is live from the moment that writes it to the last that reads it; two
//! tensors may share memory only where their lifetimes do not meet. Placement is greedy by size:
//! the largest first, each at the lowest offset free for the whole of its lifetime.

use super::{Graph, NodeId, ParamSpec, Shape};
use crate::error::Result;
use crate::graph::params::flat_len;
use crate::ops::Op;

/// What a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Forward pass to the logits at the input's resolution.
    Logits,
    /// Forward pass to the classifier's scores; resize and argmax are done row by row afterwards.
    Labels,
    /// Like `Logits`, with every named intermediate kept.
    Inspect,
    /// Forward with batch statistics, loss and backward.
    Training,
}

/// Which memory a tensor lives in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// The plan's arena.
    Arena,
}

/// A tensor's place: offset and strides in elements; rows are dense, planes may be padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Memory it lives in.
    pub space: Space,
    /// First element.
    pub offset: usize,
    /// N x C x H x W.
    pub shape: Shape,
    /// From one image to the next.
    pub batch_stride: usize,
    /// From one channel to the next, at least H * W.
    pub plane_stride: usize,
}

impl Tensor {
    /// Elements from the first to the end of the last plane.
    pub fn extent(&self) -> usize {
        (self.shape.n - 1) * self.batch_stride + self.shape.c * self.plane_stride
    }

    /// The channels `from .. from + c` of this tensor, in place.
    pub fn channels(&self, from: usize, c: usize) -> Tensor {
        Tensor {
            offset: self.offset + from * self.plane_stride,
            shape: self.shape.with_channels(c),
            ..*self
        }
    }
}

/// How planes are laid out in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaneLayout {
    /// Plane stride is H * W.
    Dense,
    /// Plane stride is a multiple of 16 elements (64 bytes) and never of 256: planes with
    /// power-of-two strides would fall into the same few cache sets.
    CachePadded,
}

impl PlaneLayout {
    fn stride(self, plane: usize) -> usize {
        match self {
            PlaneLayout::Dense => plane,
            PlaneLayout::CachePadded => {
                let padded = plane.next_multiple_of(16);
                if padded.is_multiple_of(256) { padded + 16 } else { padded }
            }
        }
    }
}

/// Gradient of an operand: where it goes and whether it is added to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GradSlot {
    /// Gradient tensor, the operand's shape.
    pub tensor: Tensor,
    /// True where an earlier step of the backward pass has written it.
    pub accumulate: bool,
}

/// One operator with its operands placed.
#[derive(Debug, Clone)]
pub struct Step {
    /// Node name, for messages and profiles.
    pub name: String,
    /// Operator.
    pub op: Op,
    /// Operands.
    pub inputs: Vec<Tensor>,
    /// Result.
    pub output: Tensor,
    /// What the training forward keeps for the backward ([`Op::saved`]).
    pub saved: Vec<Tensor>,
    /// Gradient of the result; none outside training.
    pub grad_output: Option<Tensor>,
    /// Gradients of the operands; none where nobody needs one.
    pub grad_inputs: Vec<Option<GradSlot>>,
}

/// A graph with every tensor placed, ready to run on a backend.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Purpose.
    pub mode: Mode,
    /// Operators in forward order, without the input node.
    pub steps: Vec<Step>,
    /// Where the input image goes.
    pub input: Tensor,
    /// The logits (in [`Mode::Labels`] the classifier's scores at its own resolution).
    pub logits: Tensor,
    /// Gradient of the logits, in training.
    pub grad_logits: Option<Tensor>,
    /// Named intermediates that are readable after the forward pass.
    pub named: Vec<(String, Tensor)>,
    /// Parameter table of the graph.
    pub params: Vec<ParamSpec>,
    /// Length of the flat parameter vector.
    pub param_len: usize,
    /// Length of its trainable part.
    pub trainable_len: usize,
    /// Arena size in elements: the peak of live activations, gradients and saved tensors.
    pub arena_len: usize,
}
