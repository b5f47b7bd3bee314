//! `fpenet check`: a device against a reference folder written by PyTorch.

use std::path::PathBuf;
use std::process::ExitCode;

use super::args::DeviceArgs;

/// Options of `fpenet check`.
#[derive(clap::Args)]
pub struct Args {
    /// Reference folder (tools/dump_reference.py writes them)
    #[arg(long, value_name = "DIR")]
    pub reference: PathBuf,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("check: this build does not hold the command yet")
}
