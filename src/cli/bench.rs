//! `fpenet bench`: latency and throughput.

use std::path::PathBuf;
use std::process::ExitCode;

use fpenet::backend::gpu::choice::Chosen;
use fpenet::backend::{AdamStep, Output};
use fpenet::bench::{self, Latency, Report, Samples};
use fpenet::exec::{Inference, Training};
use fpenet::graph::{Mode, Plan};
use fpenet::{Error, Model, ModelConfig, memory};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::args::{ConfigArgs, DeviceArgs, Size, positive};
use super::destination::{Destination, Messages};
use super::profile;

/// Options of `fpenet bench`.
#[derive(clap::Args)]
#[command(after_help = "One sample is the time from an input in host memory to the logits at the \
    input's resolution on the device, with --include-copies to the logits in host memory, or with \
    --argmax to the labels in host memory; with --train it is one step (forward, backward, Adam) to \
    the loss in host memory. Copy in, forward pass and copy out are timed apart as well, on a GPU \
    by its own clock. Inputs are random, the same at every run.")]
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
    /// Count the logits' copy to host memory into the latency, as the labels' always is
    #[arg(long, conflicts_with_all = ["train", "argmax"])]
    pub include_copies: bool,
    /// Launch every command by itself instead of replaying a CUDA graph; of no effect on a CPU
    #[arg(long)]
    pub no_graph: bool,
    /// Time training steps instead of inference
    #[arg(long)]
    pub train: bool,
    /// Time every layer by itself, with its bytes and multiply-accumulates, or forward and backward with
    /// --train; every kernel as well, on a GPU and with --train
    #[arg(long)]
    pub profile: bool,
    /// Write the figures to this file, or to standard output (-)
    #[arg(long, value_name = "FILE")]
    pub json: Option<Destination>,
    #[command(flatten)]
    pub network: ConfigArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// What is measured, with the defaults filled in.
pub struct Job {
    size: Size,
    batch: usize,
    /// Timed runs.
    pub iterations: usize,
    /// Runs before them.
    pub warmup: usize,
    mode: &'static str,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let messages = Destination::reserve_optional(args.json.as_ref())?;
    if args.train {
        args.device.for_training()?;
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
        train(messages, &args, &model, &job)?
    } else {
        infer(messages, &args, &model, &job)?
    }
    Ok(ExitCode::SUCCESS)
}

fn model(args: &Args) -> anyhow::Result<Model> {
    match &args.model {
        Some(path) => Ok(args.network.load_without(path)?),
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

fn infer(messages: Messages, args: &Args, model: &Model, job: &Job) -> anyhow::Result<()> {
    let Size { width, height } = job.size;
    let mode = if args.argmax { Mode::Labels } else { Mode::Logits };
    let mut backend = args.device.open_tuned()?;
    if args.no_graph {
        backend.use_graphs(false);
    }
    let device = (backend.kind(), backend.describe());
    let mut inference = Inference::new(model, backend, job.batch, height, width, mode)?;
    introduce(messages, args, model, job, &device)?;
    let chosen = inference.backend().chosen().cloned();
    introduce_choice(messages, chosen.as_ref())?;

    let input = random_input(job);
    let logits = if args.include_copies { inference.plan().logits.shape.len() } else { 0 };
    let mut logits = vec![0.0; logits];
    let mut labels = vec![0; if args.argmax { job.batch * width * height } else { 0 }];
    let output = match (args.argmax, args.include_copies) {
        (true, _) => Some(Output::Labels(&mut labels)),
        (false, true) => Some(Output::Logits(&mut logits)),
        (false, false) => None,
    };
    let apart = output.is_none();
    let bar = progress(job);
    let runs = (job.warmup, job.iterations);
    let mut samples = bench::sample_inference(&mut inference, &input, output, runs, || bar.inc(1))?;
    bar.finish_and_clear();
    if apart {
        // Not among the runs: so large a copy would empty the caches for the run after it.
        samples.copy_out = bench::sample_copy_out(&mut inference, job.iterations.min(10))?;
    }
    let mut report = report(args, job, &device, samples, inference.plan())?;
    report.copies_included = args.argmax || args.include_copies;
    report.set_choice(chosen.as_ref());
    report.set_work(inference.backend().work(inference.plan()));
    report.set_peak(inference.backend().peak_flops(), inference.plan());
    if args.profile {
        let precision = args.device.precision;
        let (layers, kernels) = profile::infer(&mut inference, job, &input, precision)?;
        (report.layers, report.kernels) = (Some(layers), kernels);
    }
    finish(messages, args, job, &report)
}

fn train(messages: Messages, args: &Args, model: &Model, job: &Job) -> anyhow::Result<()> {
    let Size { width, height } = job.size;
    let mut backend = args.device.open_tuned()?;
    if args.no_graph {
        backend.use_graphs(false);
    }
    let device = (backend.kind(), backend.describe());
    let mut training =
        Training::new(&model.config, &model.params, backend, job.batch, height, width)?;
    introduce(messages, args, model, job, &device)?;
    let chosen = training.backend().chosen().cloned();
    introduce_choice(messages, chosen.as_ref())?;

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
    let samples = Samples { total: samples, ..Samples::default() };
    let mut report = report(args, job, &device, samples, training.plan())?;
    report.copies_included = true;
    report.set_choice(chosen.as_ref());
    if args.profile {
        let adam = || {
            step += 1;
            AdamStep::paper(5e-4, step)
        };
        let (layers, kernels) = profile::train(&mut training, job, &input, &labels, adam)?;
        (report.training_layers, report.kernels) = (Some(layers), Some(kernels));
    }
    finish(messages, args, job, &report)
}

fn progress(job: &Job) -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new((job.warmup + job.iterations) as u64);
    bar.set_style(indicatif::ProgressStyle::with_template("{bar:40} {pos}/{len} runs").unwrap());
    bar
}

fn introduce(
    messages: Messages,
    args: &Args,
    model: &Model,
    job: &Job,
    (kind, name): &(&'static str, String),
) -> anyhow::Result<()> {
    let weights = match &args.model {
        Some(path) => path.display().to_string(),
        None => format!("initial weights, seed {SEED}"),
    };
    writeln!(messages, "device      {}", args.device.explain((kind, name)))?;
    writeln!(
        messages,
        "network     p={} q={}, {} classes, {} parameters ({weights})",
        model.config.p,
        model.config.q,
        model.config.classes,
        model.params.trainable_count()
    )?;
    writeln!(
        messages,
        "input       {} x 3 x {} x {}, {}, to {}",
        job.batch,
        job.size.height,
        job.size.width,
        args.device.precision.name(),
        if job.mode == "train" { "loss and updated weights" } else { job.mode }
    )?;
    Ok(())
}

/// The variants that run, and a file of the cache that could not be used.
fn introduce_choice(messages: Messages, chosen: Option<&Chosen>) -> anyhow::Result<()> {
    let Some(chosen) = chosen else { return Ok(()) };
    if let Some(warning) = &chosen.warning {
        super::warn(warning);
    }
    writeln!(messages, "variants    {} ({})", chosen.choice.variants, chosen.source.name())?;
    Ok(())
}

fn report(
    args: &Args,
    job: &Job,
    (kind, name): &(&'static str, String),
    samples: Samples,
    plan: &Plan,
) -> anyhow::Result<Report> {
    let latency = Latency::of(&samples.total)?;
    let part = |samples: &[f64]| Latency::of(samples).ok();
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        device: kind.to_string(),
        device_name: name.clone(),
        mode: job.mode,
        size: job.size.to_string(),
        batch: job.batch,
        precision: args.device.precision.name(),
        threads: args.device.threads,
        latency_ms: latency,
        copies_included: false,
        host_to_device_ms: part(&samples.copy_in),
        compute_ms: part(&samples.compute),
        device_to_host_ms: part(&samples.copy_out),
        throughput_fps: job.batch as f64 * 1e3 / latency.mean,
        gmacs: bench::macs(plan) as f64 / 1e9,
        launches: None,
        gemms: None,
        graph: None,
        bytes_moved: None,
        peak_gflops: None,
        roofline_ms: None,
        roofline_share: None,
        device_bytes: None,
        variants: None,
        variants_from: None,
        arena_bytes: plan.arena_bytes() as u64,
        peak_rss_bytes: memory::peak_rss_bytes(),
        warmup: job.warmup,
        samples_ms: samples.total,
        compute_samples_ms: samples.compute,
        layers: None,
        training_layers: None,
        kernels: None,
    })
}

fn finish(messages: Messages, args: &Args, job: &Job, report: &Report) -> anyhow::Result<()> {
    let Latency { min, mean, median, p90, p95, p99 } = report.latency_ms;
    writeln!(
        messages,
        "latency ms  min {min:.3}, mean {mean:.3}, median {median:.3}, p90 {p90:.3}, \
         p95 {p95:.3}, p99 {p99:.3} ({} runs after {} untimed)",
        job.iterations, job.warmup
    )?;
    writeln!(
        messages,
        "throughput  {:.2} images/s, {:.1} GMAC/s forward ({:.2} GMAC per run)",
        report.throughput_fps,
        report.gmacs * 1e3 / mean,
        report.gmacs
    )?;
    if let Some(compute) = report.compute_ms {
        let part = |latency: Option<Latency>| match latency {
            Some(latency) => format!("{:.3}", latency.median),
            None => "none".into(),
        };
        let apart = if report.copies_included { "" } else { ", the last not in the latency" };
        writeln!(
            messages,
            "medians ms  host to device {}, compute {:.3}, device to host {}{apart}",
            part(report.host_to_device_ms),
            compute.median,
            part(report.device_to_host_ms)
        )?;
    }
    commands(messages, report)?;
    if let (Some(peak), Some(bytes), Some(bound), Some(share)) =
        (report.peak_gflops, report.bytes_moved, report.roofline_ms, report.roofline_share)
    {
        writeln!(
            messages,
            "roofline    {bound:.3} ms at {peak:.0} GFLOP/s, measured on registers alone; reached \
             {:.1} %; {:.1} MB moved (counted)",
            share * 100.0,
            bytes as f64 / 1e6
        )?;
    }
    let mib = |bytes: Option<u64>| match bytes {
        Some(bytes) => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        None => "unknown".into(),
    };
    let device = match report.device_bytes {
        Some(bytes) => format!(", reserved on the device {}", mib(Some(bytes))),
        None => String::new(),
    };
    writeln!(
        messages,
        "memory      arena {}{device}, peak resident {}",
        mib(Some(report.arena_bytes)),
        mib(report.peak_rss_bytes)
    )?;
    if let Some(layers) = &report.layers {
        profile::layers(messages, layers)?;
    }
    if let Some(layers) = &report.training_layers {
        profile::training_layers(messages, layers)?;
    }
    if let Some(kernels) = &report.kernels {
        profile::kernels(messages, kernels)?;
    }
    if let Some(json) = &args.json {
        json.write_json(report)?;
    }
    Ok(())
}

/// What the device is asked for, where it runs commands.
fn commands(messages: Messages, report: &Report) -> anyhow::Result<()> {
    let (Some(launches), Some(gemms), Some(bytes)) =
        (report.launches, report.gemms, report.bytes_moved)
    else {
        return Ok(());
    };
    let how = if report.graph == Some(true) { ", replayed as one CUDA graph" } else { "" };
    let roofline = match (report.roofline_ms, report.roofline_share) {
        (Some(bound), Some(share)) => {
            format!(
                "roofline {bound:.3} ms by the card's data sheet, reached {:.1} %",
                share * 100.0
            )
        }
        _ => "no data sheet of this device, so no roofline".into(),
    };
    writeln!(
        messages,
        "commands    {launches} launches and {gemms} matrix products{how}; {:.1} MB moved (counted); \
         {roofline}",
        bytes as f64 / 1e6
    )?;
    Ok(())
}
