//! `fpenet bench`: latency and throughput.

use std::path::PathBuf;
use std::process::ExitCode;

use super::args::{ConfigArgs, DeviceArgs, Size, positive};

/// Options of `fpenet bench`.
#[derive(clap::Args)]
pub struct Args {
    /// Input size
    #[arg(long, value_name = "WxH", default_value = "1024x512")]
    pub size: Size,
    /// Images per run
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub batch: usize,
    /// Model file [default: initial weights of the configured network]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Timed runs
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = positive)]
    pub iterations: usize,
    /// Untimed runs before them
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub warmup: usize,
    /// Time training steps instead of inference
    #[arg(long)]
    pub train: bool,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub network: ConfigArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("bench: this build does not hold the command yet")
}
