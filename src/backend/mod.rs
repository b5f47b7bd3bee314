//! Devices: what executes a [`Plan`]. The CPU backend is the reference for all others.

pub mod cpu;
pub mod gpu;
mod images;

pub use images::{Images, Output, Rgb};

pub use crate::device::{DeviceChoice, DeviceReport, Precision, list, open};

use std::time::{Duration, Instant};

use self::gpu::choice::{Choice, Chosen, Key};
use self::gpu::variants::Expanded;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

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

/// Loss scaling (Micikevicius et al. 2018, section 3.2) of training in half precision: gradients are
/// stored as those of scale * loss, since small ones would vanish. The device halves the scale and
/// leaves the update out where a gradient is not finite, and doubles it after 2000 good updates.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScaling {
    /// Factor, a power of two; in f32 it stays as it is and nothing is multiplied by it.
    pub scale: f32,
    /// Updates since the scale changed.
    pub good_steps: u32,
    /// Updates left out so far; Adam's step number does not count them.
    pub skipped: u32,
}

impl Default for LossScaling {
    fn default() -> Self {
        LossScaling { scale: 65536.0, good_steps: 0, skipped: 0 }
    }
}

/// What a device counts while it trains, so that the host need not wait for every step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Counters {
    /// Loss of the last backward pass.
    pub loss: f32,
    /// Sum of the losses of all backward passes since the counters were written, in their order.
    pub loss_sum: f64,
    /// State of the loss scaling.
    pub scaling: LossScaling,
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

/// A moment in a device's order of work: when everything asked before it is done.
#[derive(Debug, Clone, Copy)]
pub enum Mark {
    /// On the host's clock, of a device that has done its work when a call returns.
    Host(Instant),
    /// An event of the device, by the number it was given.
    Event(u32),
}

impl Mark {
    /// Time between two marks of the host's clock.
    ///
    /// # Errors
    /// [`Error::Usage`] for a mark of another clock.
    pub fn host_time(from: Mark, to: Mark) -> Result<Duration> {
        match (from, to) {
            (Mark::Host(from), Mark::Host(to)) => Ok(to.saturating_duration_since(from)),
            _ => Err(Error::Usage(format!("{from:?} and {to:?} are not marks of this device"))),
        }
    }
}

/// A part of a training step; inference has the first one only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pass {
    /// As [`Backend::forward`].
    Forward,
    /// As [`Backend::backward`].
    Backward,
    /// As [`Backend::adam`].
    Update(AdamStep),
}

/// A command, and the moments before and after it.
#[derive(Debug, Clone, Copy)]
pub struct CommandMarks {
    /// Kernel, or `gemm`; on a device without commands the operator.
    pub kernel: &'static str,
    /// The plan's step that it belongs to; none of the loss, and of what is done to all parameters.
    pub step: Option<usize>,
    /// When all before it was done.
    pub begun: Mark,
    /// When it was.
    pub done: Mark,
}

/// What a prepared forward pass asks of its device, counted from the commands' shapes; nothing in
/// it is measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// Kernel launches.
    pub launches: usize,
    /// Matrix products, each a call of the BLAS library.
    pub gemms: usize,
    /// Whether the commands are recorded once and replayed with one call (a CUDA graph).
    pub replayed: bool,
    /// Bytes that the commands read and write: each operand once per command, and what blocks of a
    /// kernel read again.
    pub bytes: u64,
    /// Floating-point operations, two per multiply-accumulate.
    pub flops: u64,
    /// Seconds that the commands take at the device's peak bandwidths and rates, where those are
    /// known: the roofline, without launch costs.
    pub roofline_seconds: Option<f64>,
    /// Memory reserved on the device.
    pub reserved_bytes: u64,
}

/// A device that runs plans. One backend serves one plan at a time: [`Backend::prepare`] makes
/// room for it, everything after works in that room. Host arrays are f32 and dense.
///
/// # Errors
/// Of every method: [`Error::Device`] for what the device refuses, memory
/// above all, [`Error::Kernel`] for a launch or a library call that failed,
/// [`Error::Usage`] for a plan that this device has no operators for.
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

    /// Puts a batch of images where the plan wants its input. A device whose stem reads 8-bit RGB
    /// copies just that, the others get it normalised.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of values, or what the device says.
    fn write_images(&mut self, plan: &Plan, images: &Images) -> Result<()> {
        match images {
            Images::Normalised(values) => self.write(&plan.input, values),
            Images::Rgb(rgb) => {
                rgb.check(plan.input.shape)?;
                self.write(&plan.input, &rgb.normalise(plan.input.shape))
            }
        }
    }

    /// Batches that can be under way at once by [`Backend::launch`].
    fn lanes(&self) -> usize {
        1
    }

    /// Starts the forward pass of a plan for labels or logits. Where the device has several lanes its
    /// copies and its work on neighbouring batches overlap, and nothing is waited for. `lane` is one
    /// whose last result has been collected.
    ///
    /// # Errors
    /// As [`Backend::write_images`] and [`Backend::forward`].
    fn launch(&mut self, plan: &Plan, lane: usize, images: &Images) -> Result<()> {
        let _ = lane;
        self.write_images(plan, images)?;
        self.forward(plan)
    }

    /// Waits for what was launched in a lane and takes its result.
    ///
    /// # Errors
    /// [`Error::Shape`] for an output of another length, or what the device says.
    fn collect(&mut self, plan: &Plan, lane: usize, output: Output) -> Result<()> {
        let _ = lane;
        match output {
            Output::Labels(labels) => self.read_labels(plan, labels),
            Output::Logits(logits) => self.read(&plan.logits, logits),
        }
    }

    /// Copies a planned tensor out as dense NCHW.
    fn read(&mut self, tensor: &Tensor, out: &mut [f32]) -> Result<()>;

    /// Copies a flat vector in.
    fn write_state(&mut self, state: State, data: &[f32]) -> Result<()>;

    /// Copies a flat vector out.
    fn read_state(&mut self, state: State, out: &mut [f32]) -> Result<()>;

    /// Labels of the batch for the loss, N x H x W; 255 and any value not below C are ignored.
    fn write_labels(&mut self, labels: &[u8]) -> Result<()>;

    /// Weights of the first classes in the loss; all are 1 from [`Backend::prepare`] on. Takes effect with
    /// the labels that are written next.
    fn write_class_weights(&mut self, weights: &[f32]) -> Result<()>;

    /// Whether step `index` has no command of its own because an earlier step's does its work as well:
    /// what lies between the two need not exist.
    fn within_another(&self, index: usize) -> bool {
        let _ = index;
        false
    }

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

    /// Cross-entropy of the last [`Backend::backward`], the (weighted) mean over labelled pixels; waits
    /// for the device.
    fn loss(&mut self) -> Result<f32> {
        Ok(self.counters()?.loss)
    }

    /// Where the run stands; waits for the device.
    fn counters(&mut self) -> Result<Counters>;

    /// Sets the counters, which [`Backend::prepare`] puts to their default.
    fn write_counters(&mut self, counters: Counters) -> Result<()>;

    /// Training steps between two looks at the counters. 1 where a look costs nothing; a device that
    /// works while the host goes on wants more, so that its queue never runs empty.
    fn loss_interval(&self) -> usize {
        1
    }

    /// Updates parameters and moments from the gradients, unless [`LossScaling`] leaves it out.
    fn adam(&mut self, plan: &Plan, step: AdamStep) -> Result<()>;

    /// Waits until the device has done everything asked so far.
    fn synchronize(&mut self) -> Result<()>;

    /// Notes this moment, for [`Backend::between`]. Does not wait.
    ///
    /// # Errors
    /// What the device says.
    fn mark(&mut self) -> Result<Mark> {
        Ok(Mark::Host(Instant::now()))
    }

    /// Time from one mark to a later one, on the device's own clock where it has one; waits for the
    /// later one.
    ///
    /// # Errors
    /// [`Error::Usage`] for marks of another device, or what the device says.
    fn between(&mut self, from: Mark, to: Mark) -> Result<Duration> {
        Mark::host_time(from, to)
    }

    /// Runs a pass command by command with a mark between any two, without waiting for any of them.
    ///
    /// # Errors
    /// Those of the pass, and what the device says.
    fn run_marked(&mut self, plan: &Plan, pass: Pass) -> Result<Vec<CommandMarks>>;

    /// When the last [`Backend::read_labels`] had computed the labels and began to copy them; none
    /// where they are computed straight into host memory.
    fn labels_computed(&self) -> Option<Mark> {
        None
    }

    /// What the prepared forward pass of `plan` amounts to, of a device that runs commands; for a
    /// plan of labels with the commands that make them.
    fn work(&self, plan: &Plan) -> Option<Work> {
        let _ = plan;
        None
    }

    /// Floating-point operations per second that the device reaches at most, measured now on all its
    /// threads; none of a device that has a data sheet, or is none.
    fn peak_flops(&self) -> Option<f64> {
        None
    }

    /// Fixes the variants of plans prepared from now on; of no effect on a device without any.
    fn choose(&mut self, choice: Choice) {
        let _ = choice;
    }

    /// How expanded tensors are kept by plans prepared from now on, whatever else is chosen.
    ///
    /// # Errors
    /// [`Error::Usage`] where this device or its precision has no 8-bit storage.
    fn keep_expanded(&mut self, expanded: Expanded) -> Result<()> {
        match expanded {
            Expanded::Stored => Ok(()),
            Expanded::Bytes => Err(Error::Usage(format!(
                "expanded=bytes: expected a cuda or emulated device with --precision f16, found {}",
                self.kind()
            ))),
        }
    }

    /// What the prepared plan runs with, on a device that has variants.
    fn chosen(&self) -> Option<&Chosen> {
        None
    }

    /// What a choice measured here for `plan` holds for; none on a device without variants.
    fn tuning_key(&self, plan: &Plan) -> Option<Key> {
        let _ = plan;
        None
    }

    /// Whether command sequences may be recorded and replayed (CUDA graphs), which is the default;
    /// of no effect on a device that does not record. What is recorded already is dropped.
    fn use_graphs(&mut self, on: bool) {
        let _ = on;
    }
}
