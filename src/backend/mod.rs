//! Devices: what executes a [`Plan`]. The CPU backend is the reference for all others.

pub mod cpu;
pub mod gpu;

pub use crate::device::{DeviceChoice, DeviceReport, Precision, list, open};

use crate::error::Result;
use crate::graph::passes::Rewrites;
use crate::graph::{Plan, PlaneLayout, Tensor};

/// One Adam update (Kingma & Ba 2015) with coupled weight decay, as `torch.optim.Adam` does it:
/// g += decay * w; m, v exponential means; w -= lr * m_hat / (sqrt(v_hat) + eps).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// L2 penalty, added to the gradient.
    pub weight_decay: f32,
    /// Number of this update, from 1: corrects the bias of the moments.
    pub step: u64,
}

impl AdamStep {
    /// The paper's setting (SPEC, "Training defaults") for update number `step`.
    pub fn paper(lr: f32, step: u64) -> Self {
        AdamStep { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-4, step }
    }
}

/// The flat vectors that live on the device besides the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Parameters and running statistics, [`Plan::param_len`] values.
    Params,
    /// Gradients of the trainable parameters, [`Plan::trainable_len`] values.
    Grads,
    /// Adam's first moment, as long as the gradients.
    Moment1,
    /// Adam's second moment, as long as the gradients.
    Moment2,
}

/// A device that runs plans. One backend serves one plan at a time: [`Backend::prepare`] makes
/// room for it, everything after works in that room.
pub trait Backend: Send {
    /// Device kind as on the command line: `cpu`, `cuda`, `emulated`.
    fn kind(&self) -> &'static str;

    /// Device in words, for logs and result files ("AMD EPYC, 2 threads, AVX2").
    fn describe(&self) -> String;

    /// How planes are to be laid out for this device.
    fn layout(&self) -> PlaneLayout {
        PlaneLayout::Dense
    }

    /// Which rewrites of the inference graph this device has operators for, and gains by.
    fn rewrites(&self) -> Rewrites {
        Rewrites::NONE
    }

    /// Allocates arena and parameter vectors for a plan. Arena contents are undefined.
    ///
    /// # Errors
    /// Out of memory, with needed and free bytes.
    fn prepare(&mut self, plan: &Plan) -> Result<()>;

    /// Copies a dense NCHW host array into a planned tensor.
    fn write(&mut self, tensor: &Tensor, data: &[f32]) -> Result<()>;

    /// Copies a planned tensor out as dense NCHW.
    fn read(&mut self, tensor: &Tensor, out: &mut [f32]) -> Result<()>;

    /// Copies a flat vector in.
    fn write_state(&mut self, state: State, data: &[f32]) -> Result<()>;

    /// Copies a flat vector out.
    fn read_state(&mut self, state: State, out: &mut [f32]) -> Result<()>;

    /// Labels of the batch for the loss, N x H x W; 255 and any value not below C are ignored.
    fn write_labels(&mut self, labels: &[u8]) -> Result<()>;

    /// Runs step `index` of the forward pass (a joined step may run with the one before it).
    fn forward_step(&mut self, plan: &Plan, index: usize) -> Result<()>;

    /// Runs the forward pass.
    fn forward(&mut self, plan: &Plan) -> Result<()> {
        (0..plan.steps.len()).try_for_each(|i| self.forward_step(plan, i))
    }

    /// Class of the largest logit per pixel at the input's resolution, N x H x W, ties to the
    /// smaller class; needs a plan made for [`Mode::Labels`](crate::graph::Mode::Labels).
    fn read_labels(&mut self, plan: &Plan, out: &mut [u8]) -> Result<()>;

    /// Loss of the forward pass and gradients of all parameters; a training plan only.
    fn backward(&mut self, plan: &Plan) -> Result<()>;

    /// Mean cross-entropy of the last [`Backend::backward`]; waits for the device.
    fn loss(&mut self) -> Result<f32>;

    /// Updates parameters and moments from the gradients.
    fn adam(&mut self, plan: &Plan, step: AdamStep) -> Result<()>;

    /// Waits until the device has done everything asked so far.
    fn synchronize(&mut self) -> Result<()>;
}
