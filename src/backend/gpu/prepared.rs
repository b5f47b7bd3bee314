//! Memory and commands of the plan that a [`GpuBackend`](super::GpuBackend) has at hand.

use super::Command;
use super::device::{Buffer, Element, Place};
use super::lower::{Memory, Program};
use crate::backend::State;
use crate::error::{Error, Result};
use crate::graph::{Mode, Plan, Tensor};
use crate::ops::cross_entropy;

/// Memory and commands of the plan at hand.
pub(super) struct Prepared {
    pub(super) memory: Memory,
    pub(super) program: Program,
    /// The forward pass over 8-bit RGB.
    pub(super) forward_rgb: Option<Vec<Command>>,
    /// Whether the input at hand is 8-bit RGB.
    pub(super) is_rgb: bool,
    /// What is in the memory for it: three scales, three shifts.
    pub(super) normalisation: Option<[[f32; 3]; 2]>,
    pub(super) element: Element,
    pub(super) arena_len: usize,
    pub(super) param_len: usize,
    pub(super) trainable_len: usize,
    /// Images and pixels per image.
    pub(super) pixels: usize,
    pub(super) classes: usize,
    /// Of the first classes in the loss; the others' are 1.
    pub(super) class_weights: Vec<f32>,
    pub(super) labels_written: bool,
    pub(super) reserved_bytes: usize,
}

impl Prepared {
    /// Where a forward pass leaves its result, and its bytes.
    pub(super) fn result(&self, plan: &Plan) -> (Place, usize) {
        match plan.mode {
            Mode::Labels => (self.memory.labels.into(), self.pixels),
            _ => (self.image(&plan.logits, 0), plan.logits.extent() * self.element.size()),
        }
    }

    /// What the loss of these labels is divided by, inverted.
    pub(super) fn inverse_total(&self, labels: &[u8]) -> Result<f32> {
        if labels.len() != self.pixels {
            return Err(Error::Shape {
                node: "labels".into(),
                expected: format!("{} labels", self.pixels),
                found: format!("{}", labels.len()),
            });
        }
        let total = cross_entropy::total_weight(labels, self.classes, &self.class_weights);
        Ok(1.0 / total as f32)
    }

    /// First byte of an image of a tensor whose planes are dense.
    pub(super) fn image(&self, tensor: &Tensor, n: usize) -> Place {
        let byte_offset = (tensor.offset + n * tensor.batch_stride) * self.element.size();
        Place { buffer: self.memory.arena, byte_offset }
    }

    pub(super) fn check_tensor(&self, tensor: &Tensor, len: usize) -> Result<()> {
        let dense = tensor.plane_stride == tensor.shape.plane();
        let inside = tensor.offset + tensor.extent() <= self.arena_len;
        if len == tensor.shape.len() && dense && inside {
            return Ok(());
        }
        Err(Error::Shape {
            node: "host copy".into(),
            expected: format!("{} elements ({})", tensor.shape.len(), tensor.shape),
            found: format!("{len} elements"),
        })
    }

    fn state(&self, state: State) -> (Option<Buffer>, usize) {
        match state {
            State::Params => (Some(self.memory.params), self.param_len),
            State::Grads => (self.memory.grads, self.trainable_len),
            State::Moment1 => (self.memory.moments.map(|m| m[0]), self.trainable_len),
            State::Moment2 => (self.memory.moments.map(|m| m[1]), self.trainable_len),
        }
    }

    pub(super) fn check_state(&self, state: State, len: usize) -> Result<Buffer> {
        match self.state(state) {
            (Some(buffer), expected) if expected == len => Ok(buffer),
            (buffer, expected) => Err(Error::Shape {
                node: format!("{state:?}"),
                expected: format!("{} values", buffer.map_or(0, |_| expected)),
                found: format!("{len}"),
            }),
        }
    }
}
