//! `fpenet tune`: the fastest variants of the GPU kernels, measured here or predicted for a card.

use std::path::PathBuf;
use std::process::ExitCode;

use fpenet::Model;
use fpenet::backend::gpu::cards::{self, Card};
use fpenet::device::{self, DeviceChoice, Precision};
use fpenet::tune::{self, CardPrediction, Shape, Trial};
use serde::Serialize;

use super::args::{ConfigArgs, Size, positive};
use super::destination::{Destination, Messages};

/// Options of `fpenet tune`.
#[derive(clap::Args)]
#[command(
    after_help = "Measured choices go to the user's cache directory (FPENET_CACHE_DIR names \
    another), keyed by card, driver, shape, precision, network and version; bench and segment take \
    them from there, and without one what the cost model prefers. --dry-run needs no GPU: what it \
    prints is that model's prediction, not a measurement."
)]
pub struct Args {
    /// Input sizes, several separated by commas
    #[arg(long, value_name = "WxH,..", value_delimiter = ',', default_value = "1024x512")]
    pub size: Vec<Size>,
    /// Images per run
    #[arg(long, value_name = "N", value_parser = positive, default_value_t = 1)]
    pub batch: usize,
    /// Storage of weights and activations [default: both, on a CPU f32]
    #[arg(long, value_enum)]
    pub precision: Option<Precision>,
    /// Device to measure on; auto takes CUDA where it works, else the CPU
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceChoice,
    /// Model file [default: initial weights of the configured network]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Forward passes per candidate [default: 30, on the emulated device 1]
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "dry_run")]
    pub iterations: Option<usize>,
    /// Print the cost model's choice and prediction instead of measuring
    #[arg(long)]
    pub dry_run: bool,
    /// Card of the prediction [default: titan-v, titan-rtx and h200]
    #[arg(long, value_name = "CARD", requires = "dry_run", value_parser = card)]
    pub card: Vec<&'static Card>,
    /// Write what was measured or predicted to this file, or to standard output (-)
    #[arg(long, value_name = "FILE")]
    pub json: Option<Destination>,
    #[command(flatten)]
    pub network: ConfigArgs,
}

fn card(text: &str) -> Result<&'static Card, String> {
    let known = || cards::CARDS.map(|card| card.id).join(", ");
    cards::by_id(text).ok_or_else(|| format!("expected one of {}", known()))
}

/// One tuned shape, for `--json`.
#[derive(Serialize)]
struct Tuned {
    device: String,
    size: String,
    batch: usize,
    precision: &'static str,
    best: String,
    graphs: bool,
    microseconds: f64,
    trials: Vec<Trial>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let messages = Destination::reserve_optional(args.json.as_ref())?;
    let model = match &args.model {
        Some(path) => args.network.load_without(path)?,
        None => Model::init(args.network.config()?, 0)?,
    };
    if args.dry_run {
        predict(messages, &args, &model)?
    } else {
        measure(messages, &args, &model)?
    }
    Ok(ExitCode::SUCCESS)
}

fn precisions(args: &Args) -> Vec<Precision> {
    args.precision.map_or(vec![Precision::F32, Precision::F16], |precision| vec![precision])
}

fn shapes(args: &Args) -> impl Iterator<Item = (Size, Shape)> {
    let shape = |size: Size| Shape { batch: args.batch, height: size.height, width: size.width };
    args.size.iter().map(move |&size| (size, shape(size)))
}

fn predict(messages: Messages, args: &Args, model: &Model) -> anyhow::Result<()> {
    let default = ["titan-v", "titan-rtx", "h200"];
    let cards: Vec<&Card> = if args.card.is_empty() {
        default.iter().filter_map(|id| cards::by_id(id)).collect()
    } else {
        args.card.clone()
    };
    writeln!(
        messages,
        "A cost model's prediction, not a measurement: data sheets, assumed L2 bandwidths and \
         launch costs, efficiencies fitted to an H100."
    )?;
    let mut all = Vec::new();
    for (_, shape) in shapes(args) {
        for card in &cards {
            for precision in precisions(args) {
                let prediction = tune::predict(model, shape, precision.into(), card)?;
                print(messages, &prediction)?;
                all.push(prediction);
            }
        }
    }
    write(args, &all)
}

fn print(messages: Messages, prediction: &CardPrediction) -> anyhow::Result<()> {
    let [n, _, h, w] = prediction.shape;
    writeln!(messages)?;
    writeln!(
        messages,
        "{} (sm_{}), {w}x{h}, batch {n}, {}",
        prediction.card, prediction.arch, prediction.precision
    )?;
    let graphs = if prediction.graphs { "CUDA graph" } else { "one by one" };
    writeln!(messages, "variants {}, launched as {graphs}", prediction.variants)?;
    writeln!(
        messages,
        "{:<24} {:>8} {:>9} {:>8} {:>10} {:>12} {:>13}",
        "kernel", "commands", "MB", "GFLOP", "occupancy", "roofline us", "predicted us"
    )?;
    for class in &prediction.classes {
        writeln!(
            messages,
            "{:<24} {:>8} {:>9.2} {:>8.3} {:>9.0}% {:>12.1} {:>13.1}",
            class.class,
            class.commands,
            class.megabytes,
            class.gflops,
            class.occupancy * 100.0,
            class.roofline_us,
            class.predicted_us
        )?;
    }
    let megabytes: f64 = prediction.classes.iter().map(|class| class.megabytes).sum();
    let gflops: f64 = prediction.classes.iter().map(|class| class.gflops).sum();
    writeln!(
        messages,
        "{:<24} {:>8} {megabytes:>9.2} {gflops:>8.3} {:>10} {:>12.1} {:>13.1}",
        "all", prediction.commands, "", prediction.roofline_us, prediction.predicted_us
    )?;
    writeln!(
        messages,
        "predicted {:.0} images/s; the roofline, without any cost per launch, is {:.0}",
        prediction.predicted_fps, prediction.roofline_fps
    )?;
    let others = [
        (
            "the expanded tensors in 8 bits (--expanded bytes, never chosen here)",
            &prediction.expanded_bytes,
        ),
        ("stage 3 in one cooperative launch (chosen by measurement only)", &prediction.persistent),
    ];
    for (what, other) in others {
        let Some(other) = other else { continue };
        writeln!(
            messages,
            "with {what}: {} launches, {:.2} MB, roofline {:.1} us, predicted {:.1} us",
            other.commands, other.megabytes, other.roofline_us, other.predicted_us
        )?;
    }
    Ok(())
}

fn measure(messages: Messages, args: &Args, model: &Model) -> anyhow::Result<()> {
    let mut all = Vec::new();
    let kind = device::open(args.device, Precision::F32, None)?.kind();
    if kind == "cpu" {
        threads(messages, args, model, &mut all)?;
        return write(args, &all);
    }
    for precision in precisions(args) {
        let mut device = device::open(args.device, precision, None)?;
        writeln!(messages, "device    {kind}: {}", device.describe())?;
        let iterations = args.iterations.unwrap_or(if kind == "cuda" { 30 } else { 1 });
        for (size, shape) in shapes(args) {
            writeln!(messages, "tuning    {size}, batch {}, {}", args.batch, precision.name())?;
            let mut trials = Vec::new();
            let entry = tune::measure(model, device.as_mut(), shape, iterations, |trial| {
                // Where nobody reads, the work goes on.
                let _ = print_trial(messages, trial);
                trials.push(trial.clone());
            })?;
            let path = tune::store(&entry)?;
            writeln!(
                messages,
                "fastest   {:.1} us: {}{}",
                entry.microseconds,
                entry.choice.variants,
                if entry.choice.graphs { "" } else { ", without CUDA graphs" }
            )?;
            writeln!(messages, "-> {}", path.display())?;
            all.push(Tuned {
                device: entry.key.device.clone(),
                size: size.to_string(),
                batch: args.batch,
                precision: precision.name(),
                best: entry.choice.variants.to_string(),
                graphs: entry.choice.graphs,
                microseconds: entry.microseconds,
                trials,
            });
        }
    }
    write(args, &all)
}

fn print_trial(messages: Messages, trial: &Trial) -> std::io::Result<()> {
    let graphs = if trial.graphs { "" } else { " (without CUDA graphs)" };
    match trial.microseconds {
        Some(time) => writeln!(messages, "{time:>11.1} us  {}{graphs}", trial.variants),
        None => writeln!(messages, "{:>14}  {}{graphs}", "cannot run", trial.variants),
    }
}

/// A CPU's kernels go by its instruction set; what can be compared is the number of threads.
fn threads(
    messages: Messages,
    args: &Args,
    model: &Model,
    all: &mut Vec<Tuned>,
) -> anyhow::Result<()> {
    let device = device::open(DeviceChoice::Cpu, args.precision.unwrap_or_default(), None)?;
    let name = device.describe();
    drop(device);
    writeln!(messages, "device    cpu: {name}")?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for (size, shape) in shapes(args) {
        writeln!(messages, "tuning    {size}, batch {}, f32", args.batch)?;
        let mut trials = Vec::new();
        let iterations = args.iterations.unwrap_or(10);
        let found = tune::measure_threads(model, shape, cores, iterations, |trial| {
            let line = trial.microseconds.unwrap_or_default() / 1e3;
            // Where nobody reads, the work goes on.
            let _ = writeln!(messages, "{line:>11.1} ms  {}", trial.variants);
            trials.push(trial.clone());
        })?;
        let Some(&(threads, microseconds)) = found.first() else { continue };
        let advice = if threads == cores {
            "the default; there is nothing to tune or to store".to_string()
        } else {
            format!("pass --threads {threads}; nothing is stored, since load decides as well")
        };
        writeln!(messages, "fastest   {threads} of {cores} threads: {advice}")?;
        all.push(Tuned {
            device: name.clone(),
            size: size.to_string(),
            batch: args.batch,
            precision: "f32",
            best: format!("threads={threads}"),
            graphs: false,
            microseconds,
            trials,
        });
    }
    Ok(())
}

fn write(args: &Args, value: &impl Serialize) -> anyhow::Result<()> {
    if let Some(json) = &args.json {
        json.write_json(value)?;
    }
    Ok(())
}
