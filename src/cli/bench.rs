//! `fpenet bench`: latency and throughput.

use std::path::PathBuf;
use std::process::ExitCode;

use fpenet::backend::AdamStep;
use fpenet::bench::{self, Latency, Profile, Report};
use fpenet::exec::{Inference, Training};
use fpenet::graph::{Mode, Plan};
use fpenet::{Error, Model, ModelConfig, files, memory};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::args::{ConfigArgs, DeviceArgs, Size, positive};
use crate::say;

/// Options of `fpenet bench`.
#[derive(clap::Args)]
#[command(after_help = "One sample is the time from an input in host memory to the logits at the \
    input's resolution on the device, or with --argmax to the labels in host memory; with --train \
    it is one step (forward, backward, Adam) to the loss in host memory. Inputs are random, the \
    same at every run.")]
pub struct Args {
    /// Input size [default: 1024x512, with --train 480x360]
    #[arg(long, value_name = "WxH")]
    pub size: Option<Size>,
    /// Images per run [default: 1, with --train 8]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub batch: Option<usize>,
    /// Model file [default: initial weights of the configured network]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Timed runs [default: 50, with --train 5]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub iterations: Option<usize>,
    /// Untimed runs before them [default: 5, with --train 1]
    #[arg(long, value_name = "N")]
    pub warmup: Option<usize>,
    /// Measure up to the labels instead of the logits
    #[arg(long, conflicts_with = "train")]
    pub argmax: bool,
    /// Time training steps instead of inference
    #[arg(long)]
    pub train: bool,
    /// Time every layer by itself, which adds a wait for the device between layers
    #[arg(long, conflicts_with = "train")]
    pub profile: bool,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub network: ConfigArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// What is measured, with the defaults filled in.
struct Job {
    size: Size,
    batch: usize,
    iterations: usize,
    warmup: usize,
    mode: &'static str,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if let Some(path) = &args.json {
        files::check_writable(path)?;
    }
    let model = model(&args)?;
    let (size, batch, iterations, warmup) =
        if args.train { ((480, 360), 8, 5, 1) } else { ((1024, 512), 1, 50, 5) };
    let job = Job {
        size: args.size.unwrap_or(Size { width: size.0, height: size.1 }),
        batch: args.batch.unwrap_or(batch),
        iterations: args.iterations.unwrap_or(iterations),
        warmup: args.warmup.unwrap_or(warmup),
        mode: match (args.train, args.argmax) {
            (true, _) => "train",
            (false, true) => "labels",
            (false, false) => "logits",
        },
    };
    if args.train {
        train(&args, &model, &job)?
    } else {
        infer(&args, &model, &job)?
    }
    Ok(ExitCode::SUCCESS)
}

fn model(args: &Args) -> anyhow::Result<Model> {
    match &args.model {
        Some(path) if args.network == ConfigArgs::default() => Ok(Model::load(path)?),
        Some(path) => Err(Error::Usage(format!(
            "--model {}: expected no config switches beside it, the file says what the network is",
            path.display()
        ))
        .into()),
        None if args.train => {
            // CamVid's classes, as the paper trains at this size.
            let camvid = ModelConfig { classes: 11, ..ModelConfig::default() };
            Ok(Model::init(args.network.over(camvid)?, SEED)?)
        }
        None => Ok(Model::init(args.network.config()?, SEED)?),
    }
}

const SEED: u64 = 0;

fn random_input(job: &Job) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let len = job.batch * 3 * job.size.width * job.size.height;
    (0..len).map(|_| rng.random_range(-2.0..2.0)).collect()
}

fn infer(args: &Args, model: &Model, job: &Job) -> anyhow::Result<()> {
    let Size { width, height } = job.size;
    let mode = if args.argmax { Mode::Labels } else { Mode::Logits };
    let backend = args.device.open()?;
    let device = (backend.kind(), backend.describe());
    let mut inference = Inference::new(model, backend, job.batch, height, width, mode)?;
    introduce(args, model, job, &device)?;

    let input = random_input(job);
    let mut labels = vec![0; if args.argmax { job.batch * width * height } else { 0 }];
    let bar = progress(job);
    let samples = bench::sample(
        job.warmup,
        job.iterations,
        || {
            inference.run(&input)?;
            if args.argmax { inference.labels(&mut labels) } else { Ok(()) }
        },
        || bar.inc(1),
    )?;
    bar.finish_and_clear();
    finish(args, job, &device, samples, inference.plan())?;
    if args.profile { profile(&mut inference, job, &input) } else { Ok(()) }
}

fn train(args: &Args, model: &Model, job: &Job) -> anyhow::Result<()> {
    let Size { width, height } = job.size;
    let backend = args.device.open()?;
    let device = (backend.kind(), backend.describe());
    let mut training =
        Training::new(&model.config, &model.params, backend, job.batch, height, width)?;
    introduce(args, model, job, &device)?;

    let input = random_input(job);
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + 1);
    let classes = model.config.classes as u8;
    let pixels = job.batch * width * height;
    let labels: Vec<u8> = (0..pixels).map(|_| rng.random_range(0..classes)).collect();
    let bar = progress(job);
    let mut step = 0;
    let samples = bench::sample(
        job.warmup,
        job.iterations,
        || {
            step += 1;
            training.step(&input, &labels, AdamStep::paper(5e-4, step))?;
            let loss = training.counters()?.loss;
            if loss.is_finite() {
                return Ok(());
            }
            Err(Error::Failed(format!("step {step}: expected a finite loss, found {loss}")))
        },
        || bar.inc(1),
    )?;
    bar.finish_and_clear();
    finish(args, job, &device, samples, training.plan())
}

fn progress(job: &Job) -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new((job.warmup + job.iterations) as u64);
    bar.set_style(indicatif::ProgressStyle::with_template("{bar:40} {pos}/{len} runs").unwrap());
    bar
}

fn introduce(
    args: &Args,
    model: &Model,
    job: &Job,
    (kind, name): &(&'static str, String),
) -> anyhow::Result<()> {
    let weights = match &args.model {
        Some(path) => path.display().to_string(),
        None => format!("initial weights, seed {SEED}"),
    };
    say!("device      {}", args.device.explain((kind, name)))?;
    say!(
        "network     p={} q={}, {} classes, {} parameters ({weights})",
        model.config.p,
        model.config.q,
        model.config.classes,
        model.params.trainable_count()
    )?;
    say!(
        "input       {} x 3 x {} x {}, {}, to {}",
        job.batch,
        job.size.height,
        job.size.width,
        args.device.precision.name(),
        if job.mode == "train" { "loss and updated weights" } else { job.mode }
    )?;
    Ok(())
}

fn finish(
    args: &Args,
    job: &Job,
    (kind, name): &(&'static str, String),
    samples: Vec<f64>,
    plan: &Plan,
) -> anyhow::Result<()> {
    let latency = Latency::of(&samples)?;
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        device: kind.to_string(),
        device_name: name.clone(),
        mode: job.mode,
        size: job.size.to_string(),
        batch: job.batch,
        precision: args.device.precision.name(),
        threads: args.device.threads,
        latency_ms: latency,
        throughput_fps: job.batch as f64 * 1e3 / latency.mean,
        gmacs: bench::macs(plan) as f64 / 1e9,
        arena_bytes: plan.arena_bytes() as u64,
        peak_rss_bytes: memory::peak_rss_bytes(),
        warmup: job.warmup,
        samples_ms: samples,
    };
    let Latency { min, mean, median, p90, p95, p99 } = latency;
    say!(
        "latency ms  min {min:.2}, mean {mean:.2}, median {median:.2}, p90 {p90:.2}, \
         p95 {p95:.2}, p99 {p99:.2} ({} runs after {} untimed)",
        job.iterations,
        job.warmup
    )?;
    say!(
        "throughput  {:.2} images/s, {:.1} GMAC/s forward ({:.2} GMAC per run)",
        report.throughput_fps,
        report.gmacs * 1e3 / mean,
        report.gmacs
    )?;
    let mib = |bytes: Option<u64>| match bytes {
        Some(bytes) => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        None => "unknown".into(),
    };
    say!(
        "memory      arena {}, peak resident {}",
        mib(Some(report.arena_bytes)),
        mib(report.peak_rss_bytes)
    )?;
    if let Some(path) = &args.json {
        files::write_atomic(path, |file| {
            serde_json::to_writer_pretty(&mut *file, &report)?;
            file.write_all(b"\n")
        })?;
    }
    Ok(())
}

fn profile(inference: &mut Inference, job: &Job, input: &[f32]) -> anyhow::Result<()> {
    let mut profile = Profile::new(inference.plan().steps.len());
    let (plan, device) = inference.parts();
    device.write(&plan.input, input)?;
    for run in 0..job.warmup + job.iterations {
        let times = bench::time_steps(plan, device)?;
        if run >= job.warmup {
            profile.add(&times);
        }
    }
    let layers = profile.layers(inference.plan());
    let name = |layer: &bench::LayerTime| layer.name.len();
    let width = layers.iter().map(name).max().unwrap_or(0);
    say!("")?;
    say!(
        "{:<width$}  {:<12}  {:>20}  {:>8}  {:>6}  {:>7}",
        "layer",
        "operator",
        "output",
        "ms",
        "share",
        "GMAC/s"
    )?;
    for layer in &layers {
        say!(
            "{:<width$}  {:<12}  {:>20}  {:>8.3}  {:>5.1}%  {:>7.1}",
            layer.name,
            layer.kind,
            layer.shape,
            layer.mean.as_secs_f64() * 1e3,
            layer.share * 100.0,
            layer.gmacs_per_second
        )?;
    }
    let total: f64 = layers.iter().map(|l| l.mean.as_secs_f64() * 1e3).sum();
    say!("{:<width$}  {:<12}  {:>20}  {total:>8.3}  {:>5.1}%", "sum", "", "", 100.0)?;
    Ok(())
}
