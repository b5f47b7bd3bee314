//! Where the time of a run goes: by layer and by kernel, from marks around every command.

use std::time::Duration;

use serde::Serialize;

use crate::backend::{Backend, CommandMarks};
use crate::error::Result;
use crate::graph::Plan;

/// Forward, backward and update of a run, the last two empty in inference.
pub type Run = [Vec<CommandMarks>; 3];

/// Time of one kernel; an element of `kernels` in `bench --profile --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KernelTime {
    /// Entry point, `gemm` for the BLAS library's products; on a CPU the operator.
    pub kernel: &'static str,
    /// Launches per run.
    pub launches: usize,
    /// Mean time per run of all of them, in milliseconds.
    pub mean_ms: f64,
    /// Fraction of the sum over all kernels.
    pub share: f64,
}

/// Time of one layer in training; an element of `training_layers` in `bench --train --profile --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainingTime {
    /// Node name; `loss` (with taking the loss scale out of the gradients), `update`.
    pub name: String,
    /// Operator.
    pub kind: &'static str,
    /// Output, N x C x H x W; empty where there is none.
    pub shape: String,
    /// Kernels and matrix products per run.
    pub commands: usize,
    /// Mean time of the forward pass, in milliseconds.
    pub forward_ms: f64,
    /// Mean time of the backward pass, or of the update.
    pub backward_ms: f64,
    /// Fraction of the whole step.
    pub share: f64,
}

/// Adds up the times of the same commands over many runs.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    passes: [Vec<(CommandMarks, Duration)>; 3],
    runs: u32,
}

impl Profile {
    /// Adds a run, which may still be under way.
    ///
    /// # Errors
    /// What the device says.
    pub fn add(&mut self, device: &mut dyn Backend, run: Run) -> Result<()> {
        self.runs += 1;
        for (total, pass) in self.passes.iter_mut().zip(run) {
            if total.is_empty() {
                *total = pass.iter().map(|marks| (*marks, Duration::ZERO)).collect();
            }
            for ((_, total), marks) in total.iter_mut().zip(pass) {
                *total += device.between(marks.begun, marks.done)?;
            }
        }
        Ok(())
    }

    /// Mean milliseconds per run of so much time in all.
    fn mean(&self, total: Duration) -> f64 {
        total.as_secs_f64() * 1e3 / f64::from(self.runs.max(1))
    }

    /// Mean milliseconds of a run.
    fn sum(&self) -> f64 {
        self.mean(self.passes.iter().flatten().map(|(_, time)| *time).sum())
    }

    /// Mean time of the forward pass's steps.
    pub fn forward(&self, plan: &Plan) -> Vec<Duration> {
        let mut times = vec![Duration::ZERO; plan.steps.len()];
        for (marks, time) in &self.passes[0] {
            if let Some(time_of_step) = marks.step.and_then(|step| times.get_mut(step)) {
                *time_of_step += *time / self.runs.max(1);
            }
        }
        times
    }

    /// By kernel, the longest first.
    pub fn kernels(&self) -> Vec<KernelTime> {
        let sum = self.sum().max(f64::MIN_POSITIVE);
        let mut kernels: Vec<KernelTime> = Vec::new();
        for (marks, time) in self.passes.iter().flatten() {
            let time = self.mean(*time);
            match kernels.iter_mut().find(|known| known.kernel == marks.kernel) {
                Some(known) => {
                    known.launches += 1;
                    known.mean_ms += time;
                }
                None => kernels.push(KernelTime {
                    kernel: marks.kernel,
                    launches: 1,
                    mean_ms: time,
                    share: 0.0,
                }),
            }
        }
        kernels.iter_mut().for_each(|kernel| kernel.share = kernel.mean_ms / sum);
        kernels.sort_by(|a, b| b.mean_ms.total_cmp(&a.mean_ms));
        kernels
    }

    /// A training step by layer, the longest first.
    pub fn training(&self, plan: &Plan) -> Vec<TrainingTime> {
        let row = |name: &str, kind, shape| TrainingTime {
            name: name.into(),
            kind,
            shape,
            commands: 0,
            forward_ms: 0.0,
            backward_ms: 0.0,
            share: 0.0,
        };
        let layers = plan.steps.iter();
        let layers = layers.map(|s| row(&s.name, s.op.kind(), s.output.shape.to_string()));
        let mut rows: Vec<TrainingTime> = layers.collect();
        let loss = rows.len();
        rows.push(row("loss", "cross_entropy", String::new()));
        rows.push(row("update", "adam", String::new()));
        for (pass, commands) in self.passes.iter().enumerate() {
            for (marks, time) in commands {
                let row = marks.step.unwrap_or(if pass == 2 { loss + 1 } else { loss });
                let row = &mut rows[row];
                row.commands += 1;
                *(if pass == 0 { &mut row.forward_ms } else { &mut row.backward_ms }) +=
                    self.mean(*time);
            }
        }
        let sum = self.sum().max(f64::MIN_POSITIVE);
        let whole = |row: &TrainingTime| row.forward_ms + row.backward_ms;
        rows.iter_mut().for_each(|row| row.share = whole(row) / sum);
        rows.sort_by(|a, b| whole(b).total_cmp(&whole(a)));
        rows
    }
}
