//! Table 7: images per second at three input sizes.

use serde::Serialize;

use super::markdown::Markdown;
use super::paper::TABLE_7;
use crate::backend::Backend;
use crate::bench::{self, Latency};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::exec::Inference;
use crate::graph::Mode;
use crate::graph::summary::summarise;
use crate::model::Model;

/// How the speed is taken.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Timed runs per size.
    pub iterations: usize,
    /// Untimed runs before them.
    pub warmup: usize,
}

/// A size, measured.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Width and height.
    pub size: (usize, usize),
    /// Time from an input in host memory to logits on the device.
    pub latency_ms: Latency,
    /// Each run's time in milliseconds.
    pub samples_ms: Vec<f64>,
}

/// Times one image at each of Table 7's sizes, initial weights and a fixed input: the time does
/// not depend on either. `open` is asked for a device per size, `tick` hears of every run.
///
/// # Errors
/// What the device says.
pub fn measure(
    config: &ModelConfig,
    settings: Settings,
    open: &mut dyn FnMut() -> Result<Box<dyn Backend>>,
    tick: &mut dyn FnMut(),
) -> Result<(String, Vec<Measured>)> {
    let model = Model::init(config.clone(), 0)?;
    let mut device = String::new();
    let mut all = Vec::new();
    for paper in TABLE_7 {
        let (width, height) = paper.size;
        let mut inference = Inference::new(&model, open()?, 1, height, width, Mode::Logits)?;
        device = format!("{}: {}", inference.backend().kind(), inference.backend().describe());
        // Any values do; these are spread over the normalised range.
        let value = |i: usize| (i * 37 % 401) as f32 / 100.0 - 2.0;
        let input: Vec<f32> = (0..3 * width * height).map(value).collect();
        let samples_ms = bench::sample(
            settings.warmup,
            settings.iterations,
            || inference.run(&input),
            &mut *tick,
        )?;
        let latency_ms = Latency::of(&samples_ms)?;
        all.push(Measured { size: paper.size, latency_ms, samples_ms });
    }
    Ok((device, all))
}

/// Table 7 with what was measured; `how` says on what device and at what precision.
///
/// # Errors
/// [`crate::Error::Usage`] for an invalid configuration.
pub fn table(
    config: &ModelConfig,
    settings: Settings,
    how: String,
    all: &[Measured],
) -> Result<Markdown> {
    let row = |(measured, paper): (&Measured, super::paper::Speed)| {
        let (width, height) = measured.size;
        let counted = summarise(config, 1, height, width)?;
        let latency = measured.latency_ms;
        Ok(vec![
            format!("{width}x{height}"),
            format!("{:.2}", counted.flops_as_published as f64 / 1e9),
            format!("{:.1}", paper.gflops),
            format!("{:.2}", latency.median),
            format!("{:.2}", latency.p99),
            format!("{:.1}", 1e3 / latency.mean),
            format!("{:.0}", paper.fps),
        ])
    };
    let header =
        ["size", "GFLOPs", "paper", "median ms", "p99 ms", "images/s", "paper FPS (TITAN V)"];
    Ok(Markdown {
        title: "Table 7: speed".into(),
        notes: vec![format!(
            "{how}; one image per run, {} timed runs after {} untimed, from a normalised input in \
             host memory to the logits at the input's size on the device.",
            settings.iterations, settings.warmup
        )],
        header: header.map(String::from).into(),
        rows: all.iter().zip(TABLE_7).map(row).collect::<Result<_>>()?,
        remarks: vec![
            "The paper's figures are PyTorch's on a TITAN V in f32. Another device in the same \
             table is no comparison of the two programs."
                .into(),
        ],
    })
}
