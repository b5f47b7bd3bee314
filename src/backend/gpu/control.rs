//! What a device keeps of a training run by itself: `struct Control` of kernels/control.cuh.

use std::mem::offset_of;

use bytemuck::{Pod, Zeroable};

use super::device::{Buffer, Place};
use crate::backend::{AdamStep, Counters, LossScaling};

/// Values that a label can have, void and unused ones included.
const LABELS: usize = 256;

/// Bytes of the block.
pub const BYTES: usize = size_of::<Control>();

/// The run so far.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Run {
    loss_sum: f64,
    loss_scale: f32,
    good_steps: i32,
    skipped: i32,
    loss: f32,
}

/// What the host sets before an update.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Hyper {
    lr: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    weight_decay: f32,
    step: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Control {
    run: Run,
    overflow: i32,
    skip: i32,
    rate: f32,
    root: f32,
    inverse_total: f32,
    hyper: Hyper,
    padding: i32,
    class_weights: [f32; LABELS],
}

fn at(control: Buffer, byte_offset: usize) -> Place {
    Place { buffer: control, byte_offset }
}

impl Run {
    /// Where it is.
    pub fn place(control: Buffer) -> Place {
        at(control, offset_of!(Control, run))
    }

    /// As the trait has it.
    pub fn counters(&self) -> Counters {
        let scaling = LossScaling {
            scale: self.loss_scale,
            good_steps: self.good_steps as u32,
            skipped: self.skipped as u32,
        };
        Counters { loss: self.loss, loss_sum: self.loss_sum, scaling }
    }
}

impl From<Counters> for Run {
    fn from(Counters { loss, loss_sum, scaling }: Counters) -> Self {
        Run {
            loss_sum,
            loss_scale: scaling.scale,
            good_steps: scaling.good_steps as i32,
            skipped: scaling.skipped as i32,
            loss,
        }
    }
}

impl Hyper {
    /// Where it is.
    pub fn place(control: Buffer) -> Place {
        at(control, offset_of!(Control, hyper))
    }
}

impl From<AdamStep> for Hyper {
    fn from(step: AdamStep) -> Self {
        let AdamStep { lr, beta1, beta2, eps, weight_decay, step } = step;
        let step = i32::try_from(step).unwrap_or(i32::MAX);
        Hyper { lr, beta1, beta2, eps, weight_decay, step }
    }
}

/// Where one over the sum of the labelled pixels' weights is.
pub fn inverse_total(control: Buffer) -> Place {
    at(control, offset_of!(Control, inverse_total))
}

/// Where the classes' weights in the loss are.
pub fn class_weights(control: Buffer) -> Place {
    at(control, offset_of!(Control, class_weights))
}

/// Weights of all labels: those given, of the first classes, and 1.
pub fn all_weights(given: &[f32]) -> [f32; LABELS] {
    std::array::from_fn(|label| given.get(label).copied().unwrap_or(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The compiler of the kernels aligns as C does: no gaps, the double first.
    #[test]
    fn the_block_lies_as_the_kernels_read_it() {
        let offsets = [
            offset_of!(Control, run) + offset_of!(Run, loss),
            offset_of!(Control, overflow),
            offset_of!(Control, inverse_total),
            offset_of!(Control, hyper) + offset_of!(Hyper, step),
            offset_of!(Control, class_weights),
            BYTES,
        ];
        assert_eq!(offsets, [20, 24, 40, 64, 72, 72 + 4 * 256]);
    }

    #[test]
    fn counters_survive_the_way_to_the_device_and_back() {
        let scaling = LossScaling { scale: 1024.0, good_steps: 7, skipped: 3 };
        let counters = Counters { loss: 0.5, loss_sum: 12.25, scaling };
        assert_eq!(Run::from(counters).counters(), counters);
    }
}
