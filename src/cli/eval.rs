//! `fpenet eval`: figures of a model on a data set.

use std::path::PathBuf;
use std::process::ExitCode;

use fpenet::data::DatasetKind;

use super::args::DeviceArgs;

/// Options of `fpenet eval`.
#[derive(clap::Args)]
pub struct Args {
    /// Root folder of the data set
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Split to measure on
    #[arg(long, default_value = "val")]
    pub split: String,
    /// Layout of the data set [default: told from the folder]
    #[arg(long, value_enum)]
    pub dataset: Option<DatasetKind>,
    /// Model file [default: the bundled CamVid weights]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("eval: this build does not hold the command yet")
}
