//! `fpenet init`: a model file with initial weights.

use std::path::PathBuf;
use std::process::ExitCode;

use super::args::ConfigArgs;

/// Options of `fpenet init`.
#[derive(clap::Args)]
pub struct Args {
    /// Where the model goes (.safetensors)
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub network: ConfigArgs,
}

/// Runs the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("init: this build does not hold the command yet")
}
