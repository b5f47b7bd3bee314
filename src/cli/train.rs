//! `fpenet train`: training with the paper's protocol as the default.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use fpenet::Error;
use fpenet::data::DatasetKind;
use fpenet::train::{ClassWeights, Request, Runtime, train};
use serde_json::{Map, Value, json};

use super::args::{ConfigArgs, DeviceArgs, Size, positive};
use super::progress::Progress;
use crate::say;

/// Options of `fpenet train`.
///
/// All that a checkpoint keeps is optional: on resuming, what is not given stays as it was.
#[derive(clap::Args)]
pub struct Args {
    /// Root folder of the data set
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Folder of the run: checkpoint, models, log, plot
    #[arg(long, value_name = "RUN")]
    pub out: PathBuf,
    /// Layout of the data set [default: told from the folder]
    #[arg(long, value_enum)]
    pub dataset: Option<DatasetKind>,
    /// Continue the run in the --out folder, bit for bit; other options may be left out
    #[arg(long)]
    pub resume: bool,
    /// Epochs [default: 400 for Cityscapes, 300 for CamVid]
    #[arg(long, value_name = "N")]
    pub epochs: Option<usize>,
    /// Images per update [default: 8]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub batch: Option<usize>,
    /// Learning rate of the first epoch, falling to 0 by the poly schedule [default: 0.0005]
    #[arg(long, value_name = "X")]
    pub lr: Option<f64>,
    /// Seed of the initial weights, the order of images and the augmentation [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Splits to train on [default: train]
    #[arg(long, value_name = "S,S", value_delimiter = ',')]
    pub splits: Option<Vec<String>>,
    /// Split to validate on, or none [default: val]
    #[arg(long, value_name = "SPLIT")]
    pub val_split: Option<String>,
    /// Epochs between validations [default: 1]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub val_every: Option<usize>,
    /// Training size [default: 1024x512 for Cityscapes, 480x360 for CamVid]
    #[arg(long, value_name = "WxH")]
    pub size: Option<Size>,
    /// Model file to start from [default: random initialisation]
    #[arg(long, value_name = "FILE")]
    pub init_from: Option<PathBuf>,
    /// Weights of the classes in the loss, from how often they occur [default: none]
    #[arg(long, value_enum, value_name = "WAY")]
    pub class_weights: Option<ClassWeights>,
    /// Largest rotation [default: 10]
    #[arg(long, value_name = "DEGREES", help_heading = "Augmentation")]
    pub rotation: Option<f32>,
    /// Range of the random scale [default: 0.5,1.75]
    #[arg(long, value_name = "LOW,HIGH", help_heading = "Augmentation", value_parser = range)]
    pub scale: Option<(f32, f32)>,
    /// Strength of random exposure, contrast and white balance, 0 to 1 [default: 0]
    #[arg(long, value_name = "X", help_heading = "Augmentation")]
    pub colour: Option<f32>,
    /// No random horizontal flips
    #[arg(long, help_heading = "Augmentation")]
    pub no_flip: bool,
    /// Threads that decode and augment [default: by the number of cores]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Session")]
    pub workers: Option<usize>,
    /// Write a checkpoint every N updates, besides each epoch's
    #[arg(long, value_name = "N", help_heading = "Session",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub checkpoint_every: Option<u64>,
    /// Write a checkpoint when the last is this old
    #[arg(long, value_name = "MINUTES", default_value_t = 5.0, help_heading = "Session",
          value_parser = minutes)]
    pub checkpoint_minutes: f64,
    /// Stop after this time, with a checkpoint to --resume from
    #[arg(long, value_name = "MINUTES", help_heading = "Session", value_parser = minutes)]
    pub stop_after_minutes: Option<f64>,
    #[command(flatten)]
    pub network: ConfigArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
}

fn range(text: &str) -> Result<(f32, f32), String> {
    let parsed = text
        .split_once(',')
        .and_then(|(low, high)| Some((low.trim().parse().ok()?, high.trim().parse().ok()?)));
    parsed.ok_or_else(|| "expected two numbers, LOW,HIGH".to_string())
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(m) if (0.0..=1e6).contains(&m) => Ok(m),
        _ => Err("expected a number of minutes, 0 or more".to_string()),
    }
}

/// The configuration keys that were given explicitly.
fn switches(args: &ConfigArgs) -> Map<String, Value> {
    let given = [
        ("classes", args.classes.map(|v| json!(v))),
        ("p", args.p.map(|v| json!(v))),
        ("q", args.q.map(|v| json!(v))),
        ("branches", args.branches.map(|v| json!(v))),
        ("dilations", args.dilations.as_ref().map(|v| json!(v))),
        ("branch_addition", args.no_branch_addition.then_some(json!(false))),
        ("long_skip", args.no_long_skip.then_some(json!(false))),
        ("decoder", args.decoder.map(|v| json!(v))),
        ("attention", args.attention.map(|v| json!(v))),
        ("block_activation", args.block_activation.map(|v| json!(v))),
    ];
    let given = given.into_iter().filter_map(|(key, value)| Some((key.to_string(), value?)));
    given.collect()
}

fn request(args: Args) -> Request {
    let duration = |minutes: f64| Duration::from_secs_f64(60.0 * minutes);
    Request {
        config: switches(&args.network),
        data: args.data,
        out: args.out,
        resume: args.resume,
        dataset: args.dataset,
        splits: args.splits,
        val_split: args.val_split,
        val_every: args.val_every,
        epochs: args.epochs,
        batch: args.batch,
        lr: args.lr,
        seed: args.seed,
        size: args.size.map(|s| (s.width, s.height)),
        rotation: args.rotation,
        scale: args.scale,
        colour: args.colour,
        flip: args.no_flip.then_some(false),
        class_weights: args.class_weights,
        init_from: args.init_from,
        runtime: Runtime {
            device: args.device.device,
            precision: args.device.precision,
            threads: args.device.threads,
            workers: args.workers,
            checkpoint_steps: args.checkpoint_every,
            checkpoint_interval: duration(args.checkpoint_minutes),
            stop_after: args.stop_after_minutes.map(duration),
        },
    }
}

/// Runs the command. A run that its user interrupts ends with exit code 1, one that reaches
/// `--stop-after-minutes` with 0.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    args.device.for_training()?;
    let request = request(args);
    if request.resume && request.init_from.is_some() {
        // Not refused: whoever repeats the command that began the run repeats this as well.
        super::warn("--init-from: not read with --resume, the run goes on from its checkpoint");
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    // The first Ctrl-C (or kill) asks for a checkpoint; the second ends the process at once.
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, interrupted.clone())?;
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    let mut progress = Progress::new();
    let outcome = train(&request, &interrupted, &mut progress)?;
    progress.finish();
    let out = request.out.display();
    if let Some((epoch, miou)) = outcome.best {
        say!("best validation mIoU {miou:.4} after epoch {epoch}: {out}/best.safetensors")?;
    }
    if outcome.finished {
        say!("finished: {} epochs, {out}/last.safetensors", outcome.epochs)?;
        return Ok(ExitCode::SUCCESS);
    }
    let done = outcome.epochs;
    let stopped = format!("stopped after {done} full epochs; continue with --resume --out {out}");
    if interrupted.load(std::sync::atomic::Ordering::Relaxed) {
        return Err(Error::Failed(format!("interrupted: {stopped}")).into());
    }
    say!("{stopped}")?;
    Ok(ExitCode::SUCCESS)
}
