//! Measurements: latency statistics, time per layer, memory. What `fpenet bench` prints and
//! writes.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::backend::gpu::choice::Chosen;
use crate::backend::gpu::{Element, cost};
use crate::backend::{Backend, Mark, Output, Work};
use crate::error::{Error, Result};
use crate::exec::Inference;
use crate::graph::{Plan, Step};
use crate::profile::{KernelTime, TrainingTime};

/// Distribution of a latency in milliseconds. Percentiles are interpolated linearly between the
/// two nearest samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// Fastest sample.
    pub min: f64,
    /// Arithmetic mean.
    pub mean: f64,
    /// 50th percentile.
    pub median: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Latency {
    /// Statistics of samples in milliseconds.
    ///
    /// # Errors
    /// [`Error::Failed`] where there is no sample.
    pub fn of(samples: &[f64]) -> Result<Self> {
        if samples.is_empty() {
            return Err(Error::Failed("latency: expected at least one sample, found none".into()));
        }
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let percentile = |p: f64| {
            let position = p / 100.0 * (sorted.len() - 1) as f64;
            let (below, above) = (sorted[position as usize], sorted[position.ceil() as usize]);
            below + (above - below) * position.fract()
        };
        Ok(Latency {
            min: sorted[0],
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            median: percentile(50.0),
            p90: percentile(90.0),
            p95: percentile(95.0),
            p99: percentile(99.0),
        })
    }
}

/// Result of one benchmark; the keys of `bench --json`.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of this program.
    pub version: &'static str,
    /// Device kind: `cpu`, `cuda`, `emulated`.
    pub device: String,
    /// Device in words.
    pub device_name: String,
    /// What one sample is: `logits`, `labels` or `train`.
    pub mode: &'static str,
    /// Input width and height, "1024x512".
    pub size: String,
    /// Images per run.
    pub batch: usize,
    /// `f32` or `f16`.
    pub precision: &'static str,
    /// CPU threads as asked for; none where left to the device.
    pub threads: Option<usize>,
    /// Time per run of a batch, in milliseconds: from the input in host memory to the result on the
    /// device, or in host memory where `copies_included`.
    pub latency_ms: Latency,
    /// Whether the result's copy to host memory is part of `latency_ms`.
    pub copies_included: bool,
    /// The input's copy to the device, conversion to its storage type included; null in training.
    pub host_to_device_ms: Option<Latency>,
    /// The forward pass alone, by the device's own clock where it has one; null in training.
    pub compute_ms: Option<Latency>,
    /// The result's copy to host memory; null in training, and for labels that a CPU computes where
    /// they are wanted.
    pub device_to_host_ms: Option<Latency>,
    /// Images per second at the mean latency.
    pub throughput_fps: f64,
    /// Multiply-accumulates of one forward pass of the batch, in units of 10^9.
    pub gmacs: f64,
    /// Kernel launches of a forward pass; null on a device that runs operators, not commands.
    pub launches: Option<usize>,
    /// Matrix products of the BLAS library in a forward pass.
    pub gemms: Option<usize>,
    /// Whether the launches are replayed as one CUDA graph.
    pub graph: Option<bool>,
    /// Bytes that the commands of a forward pass, or a CPU's operators, read and write: counted from
    /// their shapes, wherever in a cache they are. Null on a GPU in training.
    pub bytes_moved: Option<u64>,
    /// Floating-point operations per second that a CPU reaches on registers alone, in units of 10^9:
    /// measured beside the samples. Null on a GPU, whose data sheet says it.
    pub peak_gflops: Option<f64>,
    /// Time of those commands at the card's peak bandwidths and rates: a model's figure; null for a
    /// card without a data sheet. On a CPU the time of the multiply-adds at `peak_gflops`.
    pub roofline_ms: Option<f64>,
    /// `roofline_ms` over the median of `compute_ms`.
    pub roofline_share: Option<f64>,
    /// Memory reserved on a GPU, in bytes.
    pub device_bytes: Option<u64>,
    /// Choices of kernels and launch shapes, where the device has any.
    pub variants: Option<String>,
    /// Where the choices come from: `cache` (measured by `fpenet tune`), `model`, `environment`.
    pub variants_from: Option<&'static str>,
    /// Arena of the memory plan at f32, in bytes.
    pub arena_bytes: u64,
    /// Largest resident set of the process so far, in bytes, where the system tells.
    pub peak_rss_bytes: Option<u64>,
    /// Untimed runs before the timed ones.
    pub warmup: usize,
    /// Every sample, in milliseconds, in order.
    pub samples_ms: Vec<f64>,
    /// Forward passes alone, in milliseconds, in order; empty in training.
    pub compute_samples_ms: Vec<f64>,
    /// Time per layer of an inference, with `--profile`.
    pub layers: Option<Vec<LayerTime>>,
    /// Time per layer of a training step, with `--profile`.
    pub training_layers: Option<Vec<TrainingTime>>,
    /// Time per kernel, with `--profile`; null for a CPU's inference.
    pub kernels: Option<Vec<KernelTime>>,
}

impl Report {
    /// Enters what the device says of its commands; `compute_ms` must be there already.
    pub fn set_work(&mut self, work: Option<Work>) {
        let Some(work) = work else { return };
        self.launches = Some(work.launches);
        self.gemms = Some(work.gemms);
        self.graph = Some(work.replayed);
        self.bytes_moved = Some(work.bytes);
        self.set_roofline(work.roofline_seconds.map(|seconds| seconds * 1e3));
        self.device_bytes = Some(work.reserved_bytes);
    }

    /// Enters what the device reaches at most ([`Backend::peak_flops`]); `compute_ms` must be there
    /// already. A training step is not counted by its operations and has no share.
    pub fn set_peak(&mut self, flops_per_second: Option<f64>, plan: &Plan) {
        let Some(peak) = flops_per_second else { return };
        self.peak_gflops = Some(peak / 1e9);
        let bytes = |step| cost::step_bytes(plan, step, Element::F32);
        self.bytes_moved = Some(plan.steps.iter().map(bytes).sum());
        if self.compute_ms.is_some() {
            self.set_roofline(Some(2.0 * self.gmacs * 1e9 / peak * 1e3));
        }
    }

    fn set_roofline(&mut self, bound_ms: Option<f64>) {
        let median = self.compute_ms.map(|latency| latency.median);
        self.roofline_share = bound_ms.zip(median).map(|(bound, median)| bound / median);
        self.roofline_ms = bound_ms;
    }
}

impl Report {
    /// Enters the variants that the device runs with.
    pub fn set_choice(&mut self, chosen: Option<&Chosen>) {
        self.variants = chosen.map(|chosen| chosen.choice.variants.to_string());
        self.variants_from = chosen.map(|chosen| chosen.source.name());
    }
}

/// Samples of timed inferences, in milliseconds and in the order they were taken.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    /// By the host's clock, from the input in host memory to the output.
    pub total: Vec<f64>,
    /// Input to the device.
    pub copy_in: Vec<f64>,
    /// Forward pass.
    pub compute: Vec<f64>,
    /// Output to host memory; empty where nothing is copied by itself.
    pub copy_out: Vec<f64>,
}

/// Runs a network `warmup` times untimed and `iterations` times timed; without an `output` the logits
/// stay on the device. `tick` hears of each run that
/// is over.
///
/// # Errors
/// What the device says, or [`Error::Shape`] for an input or output of another length.
pub fn sample_inference(
    inference: &mut Inference,
    input: &[f32],
    mut output: Option<Output>,
    (warmup, iterations): (usize, usize),
    mut tick: impl FnMut(),
) -> Result<Samples> {
    let (plan, device) = inference.parts();
    let mut samples = Samples::default();
    for run in 0..warmup + iterations {
        let start = Instant::now();
        let begun = device.mark()?;
        device.write(&plan.input, input)?;
        let written = device.mark()?;
        device.forward(plan)?;
        let mut computed = device.mark()?;
        let mut copied = None;
        match &mut output {
            None => {}
            Some(Output::Logits(out)) => {
                device.read(&plan.logits, out)?;
                copied = Some(device.mark()?);
            }
            Some(Output::Labels(out)) => {
                device.read_labels(plan, out)?;
                let end = device.mark()?;
                match device.labels_computed() {
                    Some(mark) => (computed, copied) = (mark, Some(end)),
                    None => computed = end,
                }
            }
        }
        device.synchronize()?;
        let total = start.elapsed();
        if run >= warmup {
            let mut between = |from: Mark, to: Mark| device.between(from, to).map(milliseconds);
            samples.total.push(milliseconds(total));
            samples.copy_in.push(between(begun, written)?);
            samples.compute.push(between(written, computed)?);
            if let Some(copied) = copied {
                samples.copy_out.push(between(computed, copied)?);
            }
        }
        tick();
    }
    Ok(samples)
}

/// Times `count` copies of the logits to host memory, in milliseconds.
///
/// # Errors
/// What the device says.
pub fn sample_copy_out(inference: &mut Inference, count: usize) -> Result<Vec<f64>> {
    let (plan, device) = inference.parts();
    let mut out = vec![0.0; plan.logits.shape.len()];
    let mut once = || {
        let begun = device.mark()?;
        device.read(&plan.logits, &mut out)?;
        let copied = device.mark()?;
        device.between(begun, copied).map(milliseconds)
    };
    (0..count).map(|_| once()).collect()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Runs `work` untimed, then timed, and returns the samples in milliseconds. `tick` hears of
/// each run that is over.
///
/// # Errors
/// The first error of `work`.
pub fn sample(
    warmup: usize,
    iterations: usize,
    mut work: impl FnMut() -> Result<()>,
    mut tick: impl FnMut(),
) -> Result<Vec<f64>> {
    let mut samples = Vec::with_capacity(iterations);
    for run in 0..warmup + iterations {
        let start = Instant::now();
        work()?;
        let elapsed = start.elapsed();
        if run >= warmup {
            samples.push(elapsed.as_secs_f64() * 1e3);
        }
        tick();
    }
    Ok(samples)
}

/// Runs the forward pass step by step; one time per step, by the device's own clock where it has
/// one. On a GPU each step's commands are launched by themselves between two events, so that a step
/// shorter than its launches shows the time of the launches.
///
/// # Errors
/// What the device says.
pub fn time_steps(plan: &Plan, device: &mut dyn Backend) -> Result<Vec<Duration>> {
    device.synchronize()?;
    let mut marks = vec![device.mark()?];
    for step in 0..plan.steps.len() {
        device.forward_step(plan, step)?;
        marks.push(device.mark()?);
    }
    device.synchronize()?;
    marks.windows(2).map(|pair| device.between(pair[0], pair[1])).collect()
}

/// Time of one step of a plan; an element of `layers` in `bench --profile --json`.
#[derive(Debug, Clone, Serialize)]
pub struct LayerTime {
    /// Node name.
    pub name: String,
    /// Operator.
    pub kind: &'static str,
    /// Output, N x C x H x W.
    pub shape: String,
    /// Mean time per run, in milliseconds.
    pub mean_ms: f64,
    /// Fraction of the sum over all steps.
    pub share: f64,
    /// Multiply-accumulates.
    pub macs: u64,
    /// Bytes of operands, result and parameters, each once: counted, not measured.
    pub bytes: u64,
}

impl LayerTime {
    /// Billions of multiply-accumulates per second.
    pub fn gmacs_per_second(&self) -> f64 {
        self.macs as f64 / 1e6 / self.mean_ms.max(1e-6)
    }

    /// Billions of bytes per second.
    pub fn gigabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.mean_ms.max(1e-6)
    }
}

/// Adds up times per step over many runs.
#[derive(Debug, Clone)]
pub struct Profile {
    totals: Vec<Duration>,
    runs: u32,
}

impl Profile {
    /// Nothing measured yet, for a plan of `steps` steps.
    pub fn new(steps: usize) -> Self {
        Profile { totals: vec![Duration::ZERO; steps], runs: 0 }
    }

    /// Adds the times of one run, one per step of the plan.
    pub fn add(&mut self, times: &[Duration]) {
        self.runs += 1;
        self.totals.iter_mut().zip(times).for_each(|(total, time)| *total += *time);
    }

    /// Steps by time, the slowest first; tensors are stored as `element`.
    pub fn layers(&self, plan: &Plan, element: Element) -> Vec<LayerTime> {
        let sum = self.totals.iter().sum::<Duration>().as_secs_f64();
        let layer = |(step, &total): (&Step, &Duration)| LayerTime {
            name: step.name.clone(),
            kind: step.op.kind(),
            shape: step.output.shape.to_string(),
            mean_ms: milliseconds(total) / f64::from(self.runs.max(1)),
            share: total.as_secs_f64() / sum.max(f64::MIN_POSITIVE),
            macs: step_macs(step),
            bytes: cost::step_bytes(plan, step, element),
        };
        let mut layers: Vec<LayerTime> = plan.steps.iter().zip(&self.totals).map(layer).collect();
        layers.sort_by(|a, b| b.mean_ms.total_cmp(&a.mean_ms));
        layers
    }
}

/// Multiply-accumulates of a plan's forward pass.
pub fn macs(plan: &Plan) -> u64 {
    plan.steps.iter().map(step_macs).sum()
}

fn step_macs(step: &Step) -> u64 {
    step.op.cost(step.output.shape).macs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate_between_samples() {
        // 0, 1, .. 100 shuffled: the p-th percentile is p.
        let samples: Vec<f64> = (0..101).map(|i| f64::from(i * 37 % 101)).collect();
        let latency = Latency::of(&samples).unwrap();
        assert_eq!((latency.min, latency.median, latency.p90), (0.0, 50.0, 90.0));
        assert_eq!((latency.p95, latency.p99, latency.mean), (95.0, 99.0, 50.0));
        let two = Latency::of(&[1.0, 3.0]).unwrap();
        assert_eq!(two.median, 2.0);
        assert!(Latency::of(&[]).is_err());
    }

    #[test]
    fn warm_up_runs_are_not_sampled_and_errors_stop() {
        let (mut calls, mut ticks) = (0, 0);
        let mut work = || {
            calls += 1;
            Ok(())
        };
        assert_eq!(sample(3, 4, &mut work, || ticks += 1).unwrap().len(), 4);
        assert_eq!((calls, ticks), (7, 7));
        assert!(sample(0, 2, || Err(Error::Failed("no".into())), || ()).is_err());
    }
}
