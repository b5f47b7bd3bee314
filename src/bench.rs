//! Measurements: latency statistics, time per layer, memory. What `fpenet bench` prints and
//! writes.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::graph::Plan;

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
    /// Time per run of a batch, in milliseconds.
    pub latency_ms: Latency,
    /// Images per second at the mean latency.
    pub throughput_fps: f64,
    /// Multiply-accumulates of one forward pass of the batch, in units of 10^9.
    pub gmacs: f64,
    /// Arena of the memory plan at f32, in bytes.
    pub arena_bytes: u64,
    /// Largest resident set of the process so far, in bytes, where the system tells.
    pub peak_rss_bytes: Option<u64>,
    /// Untimed runs before the timed ones.
    pub warmup: usize,
    /// Every sample, in milliseconds, in order.
    pub samples_ms: Vec<f64>,
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

/// Runs the forward pass step by step and waits for the device after each; one time per step.
///
/// # Errors
/// What the device says.
pub fn time_steps(plan: &Plan, device: &mut dyn Backend) -> Result<Vec<Duration>> {
    device.synchronize()?;
    let time = |step| {
        let start = Instant::now();
        device.forward_step(plan, step)?;
        device.synchronize()?;
        Ok(start.elapsed())
    };
    (0..plan.steps.len()).map(time).collect()
}

/// Time of one step of a plan.
#[derive(Debug, Clone)]
pub struct LayerTime {
    /// Node name.
    pub name: String,
    /// Operator.
    pub kind: &'static str,
    /// Output, N x C x H x W.
    pub shape: String,
    /// Mean time per run.
    pub mean: Duration,
    /// Fraction of the sum over all steps.
    pub share: f64,
    /// Billions of multiply-accumulates per second.
    pub gmacs_per_second: f64,
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

    /// Steps by time, the slowest first.
    pub fn layers(&self, plan: &Plan) -> Vec<LayerTime> {
        let sum = self.totals.iter().sum::<Duration>().as_secs_f64();
        let mut layers: Vec<LayerTime> = plan
            .steps
            .iter()
            .zip(&self.totals)
            .map(|(step, &total)| {
                let mean = total / self.runs.max(1);
                let inputs: Vec<_> = step.inputs.iter().map(|t| t.shape).collect();
                let macs = step.op.cost(&inputs, step.output.shape).macs;
                LayerTime {
                    name: step.name.clone(),
                    kind: step.op.kind(),
                    shape: step.output.shape.to_string(),
                    mean,
                    share: total.as_secs_f64() / sum.max(f64::MIN_POSITIVE),
                    gmacs_per_second: macs as f64 / 1e9 / mean.as_secs_f64().max(1e-9),
                }
            })
            .collect();
        layers.sort_by_key(|layer| std::cmp::Reverse(layer.mean));
        layers
    }
}

/// Multiply-accumulates of a plan's forward pass.
pub fn macs(plan: &Plan) -> u64 {
    let cost = |step: &crate::graph::Step| {
        let inputs: Vec<_> = step.inputs.iter().map(|t| t.shape).collect();
        step.op.cost(&inputs, step.output.shape).macs
    };
    plan.steps.iter().map(cost).sum()
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
