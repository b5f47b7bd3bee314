//! `fpenet run`: logits of a normalised NumPy array.

use std::path::PathBuf;
use std::process::ExitCode;

use super::args::DeviceArgs;

/// Options of `fpenet run`.
#[derive(clap::Args)]
pub struct Args {
    /// Model file
    #[arg(long, value_name = "FILE")]
    pub model: PathBuf,
    /// Input: f32, N x 3 x H x W, already normalised (.npy)
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// Where the logits go: f32, N x C x H x W (.npy)
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("run: this build does not hold the command yet")
}
