//! `fpenet summary`: layers, parameters, FLOPs, receptive fields.

use std::process::ExitCode;

use super::args::{ConfigArgs, Size};

/// Options of `fpenet summary`.
#[derive(clap::Args)]
pub struct Args {
    /// Input size
    #[arg(long, value_name = "WxH", default_value = "1024x512")]
    pub size: Size,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub network: ConfigArgs,
}

/// Runs the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("summary: this build does not hold the command yet")
}
