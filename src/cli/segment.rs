//! `fpenet segment`: label maps, colour masks and overlays of photos.

use std::path::PathBuf;
use std::process::ExitCode;

use super::args::{DeviceArgs, Size};

/// Options of `fpenet segment`.
#[derive(clap::Args)]
pub struct Args {
    /// Images, or folders of images [default: the bundled example photo]
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Model file [default: the bundled CamVid weights]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Folder for the results
    #[arg(long, value_name = "DIR", default_value = "out")]
    pub out: PathBuf,
    /// Size at which the network runs [default: the model's training size, or the image's]
    #[arg(long, value_name = "WxH")]
    pub size: Option<Size>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("segment: this build does not hold the command yet")
}
