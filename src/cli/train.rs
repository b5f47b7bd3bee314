//! `fpenet train`: training with the paper's protocol as the default.

use std::path::PathBuf;
use std::process::ExitCode;

use fpenet::data::DatasetKind;

use super::args::{ConfigArgs, DeviceArgs, positive};

/// Options of `fpenet train`.
#[derive(clap::Args)]
pub struct Args {
    /// Root folder of the data set
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Folder of the run: checkpoints, log, plot, model
    #[arg(long, value_name = "RUN")]
    pub out: PathBuf,
    /// Layout of the data set [default: told from the folder]
    #[arg(long, value_enum)]
    pub dataset: Option<DatasetKind>,
    /// Epochs [default: 400 for Cityscapes, 300 for CamVid]
    #[arg(long, value_name = "N")]
    pub epochs: Option<usize>,
    /// Images per step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = positive)]
    pub batch: usize,
    /// Initial learning rate
    #[arg(long, value_name = "X", default_value_t = 5e-4)]
    pub lr: f32,
    /// Seed of the initial weights, the order of images and the augmentation
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Continue the run in the --out folder
    #[arg(long)]
    pub resume: bool,
    /// Splits to train on
    #[arg(long, value_name = "S,S", value_delimiter = ',', default_value = "train")]
    pub splits: Vec<String>,
    #[command(flatten)]
    pub network: ConfigArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("train: this build does not hold the command yet")
}
