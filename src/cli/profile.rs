//! The tables of `fpenet bench --profile`.

use fpenet::Result;
use fpenet::backend::{AdamStep, Backend, Mark, Pass, Precision};
use fpenet::bench::{self, LayerTime};
use fpenet::exec::{Inference, Training};
use fpenet::profile::{KernelTime, Profile, TrainingTime};

use super::bench::Job;
use super::destination::Messages;

/// Whether a device works while the host goes on: then it gets something to do first, so that what is timed
/// does not wait for the host.
fn works_beside(device: &mut dyn Backend) -> Result<bool> {
    Ok(matches!(device.mark()?, Mark::Event(_)))
}

/// Time per layer, and per kernel where there are such.
pub fn infer(
    inference: &mut Inference,
    job: &Job,
    input: &[f32],
    precision: Precision,
) -> Result<(Vec<LayerTime>, Option<Vec<KernelTime>>)> {
    let has_commands = inference.backend().work(inference.plan()).is_some();
    let mut layers = bench::Profile::new(inference.plan().steps.len());
    let mut commands = Profile::default();
    let (plan, device) = inference.parts();
    let busy = works_beside(device)?;
    for run in 0..job.warmup + job.iterations {
        if busy {
            device.forward(plan)?;
        }
        // Anew each time: the arena has other tensors in the input's place by the end.
        device.write(&plan.input, input)?;
        if has_commands {
            let marks = device.run_marked(plan, Pass::Forward)?;
            if run >= job.warmup {
                commands.add(device, [marks, Vec::new(), Vec::new()])?;
            }
        } else {
            let times = bench::time_steps(plan, device)?;
            if run >= job.warmup {
                layers.add(&times);
            }
        }
        device.synchronize()?;
    }
    if !has_commands {
        return Ok((layers.layers(plan, precision.into()), None));
    }
    layers.add(&commands.forward(plan));
    Ok((layers.layers(plan, precision.into()), Some(commands.kernels())))
}

/// Time of a training step per layer and per kernel; `adam` gives the setting of the next update.
pub fn train(
    training: &mut Training,
    job: &Job,
    input: &[f32],
    labels: &[u8],
    mut adam: impl FnMut() -> AdamStep,
) -> Result<(Vec<TrainingTime>, Vec<KernelTime>)> {
    let mut profile = Profile::default();
    let busy = works_beside(training.parts().1)?;
    for run in 0..job.warmup + job.iterations {
        if busy {
            training.step(input, labels, adam())?;
        }
        let marks = training.step_marked(input, labels, adam())?;
        if run >= job.warmup {
            profile.add(training.parts().1, marks)?;
        }
        training.parts().1.synchronize()?;
    }
    Ok((profile.training(training.plan()), profile.kernels()))
}

/// Writes the table of an inference.
pub fn layers(messages: Messages, layers: &[LayerTime]) -> anyhow::Result<()> {
    let width = layers.iter().map(|layer| layer.name.len()).max().unwrap_or(0);
    writeln!(messages)?;
    writeln!(
        messages,
        "{:<width$}  {:<12}  {:>20}  {:>8}  {:>6}  {:>8}  {:>7}  {:>8}  {:>7}",
        "layer", "operator", "output", "ms", "share", "MMAC", "GMAC/s", "MB", "GB/s"
    )?;
    for layer in layers {
        writeln!(
            messages,
            "{:<width$}  {:<12}  {:>20}  {:>8.3}  {:>5.1}%  {:>8.1}  {:>7.1}  {:>8.2}  {:>7.1}",
            layer.name,
            layer.kind,
            layer.shape,
            layer.mean_ms,
            layer.share * 100.0,
            layer.macs as f64 / 1e6,
            layer.gmacs_per_second(),
            layer.bytes as f64 / 1e6,
            layer.gigabytes_per_second()
        )?;
    }
    let total: f64 = layers.iter().map(|layer| layer.mean_ms).sum();
    writeln!(messages, "{:<width$}  {:<12}  {:>20}  {total:>8.3}  {:>5.1}%", "sum", "", "", 100.0)?;
    Ok(())
}

/// Writes the table of a training step.
pub fn training_layers(messages: Messages, layers: &[TrainingTime]) -> anyhow::Result<()> {
    let width = layers.iter().map(|layer| layer.name.len()).max().unwrap_or(0);
    writeln!(messages)?;
    writeln!(
        messages,
        "{:<width$}  {:<13}  {:>20}  {:>10}  {:>11}  {:>6}  {:>8}",
        "layer", "operator", "output", "forward ms", "backward ms", "share", "commands"
    )?;
    for layer in layers {
        writeln!(
            messages,
            "{:<width$}  {:<13}  {:>20}  {:>10.3}  {:>11.3}  {:>5.1}%  {:>8}",
            layer.name,
            layer.kind,
            layer.shape,
            layer.forward_ms,
            layer.backward_ms,
            layer.share * 100.0,
            layer.commands
        )?;
    }
    let sum = |of: fn(&TrainingTime) -> f64| layers.iter().map(of).sum::<f64>();
    writeln!(
        messages,
        "{:<width$}  {:<13}  {:>20}  {:>10.3}  {:>11.3}  {:>5.1}%  {:>8}",
        "sum",
        "",
        "",
        sum(|layer| layer.forward_ms),
        sum(|layer| layer.backward_ms),
        100.0,
        layers.iter().map(|layer| layer.commands).sum::<usize>()
    )?;
    Ok(())
}

/// Writes the table of kernels.
pub fn kernels(messages: Messages, kernels: &[KernelTime]) -> anyhow::Result<()> {
    let width = kernels.iter().map(|kernel| kernel.kernel.len()).max().unwrap_or(0).max(6);
    writeln!(messages)?;
    writeln!(messages, "{:<width$}  {:>8}  {:>8}  {:>6}", "kernel", "launches", "ms", "share")?;
    for KernelTime { kernel, launches, mean_ms, share } in kernels {
        let share = share * 100.0;
        writeln!(messages, "{kernel:<width$}  {launches:>8}  {mean_ms:>8.3}  {share:>5.1}%")?;
    }
    let (launches, total) = kernels.iter().fold((0, 0.0), |(launches, total), kernel| {
        (launches + kernel.launches, total + kernel.mean_ms)
    });
    writeln!(messages, "{:<width$}  {launches:>8}  {total:>8.3}  {:>5.1}%", "sum", 100.0)?;
    Ok(())
}
