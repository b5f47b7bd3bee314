//! `fpenet export-predictions`: label PNGs of a split, as benchmark servers take them.

use std::path::PathBuf;
use std::process::ExitCode;

use fpenet::data::DatasetKind;
use fpenet::predictions;
use indicatif::{ProgressBar, ProgressStyle};

use super::args::{DeviceArgs, ModelArgs, Size};
use crate::say;

/// Options of `fpenet export-predictions`.
#[derive(clap::Args)]
#[command(after_help = "\
    Cityscapes: OUT/CITY_SEQUENCE_FRAME_pred_labelIds.png, 8-bit label ids (7 is road) at the \
    images' full size, from DIR/leftImg8bit/SPLIT; zip the folder's PNGs for the test server, or \
    point CITYSCAPES_RESULTS of cityscapesScripts at it. CamVid: OUT/NAME.png, class indices. No \
    labels are needed.\n\n\
    Every file is written whole or not at all. The same command again keeps the files that are \
    there and writes the missing ones; a folder of another model's predictions is refused.")]
pub struct Args {
    /// Root folder of the data set
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Split to label
    #[arg(long, value_name = "SPLIT", default_value = "val")]
    pub split: String,
    /// Folder for the PNGs
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Layout of the data set [default: told from the folder]
    #[arg(long, value_enum)]
    pub dataset: Option<DatasetKind>,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Size at which the network runs [default: the images', half of it for Cityscapes]
    #[arg(long, value_name = "WxH")]
    pub size: Option<Size>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let model = args.model.load()?;
    let kind = DatasetKind::asked_or_detected(args.dataset, &args.data)?;
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} images, {eta} left")?);
    let job = predictions::Job {
        kind,
        root: &args.data,
        split: &args.split,
        size: args.size.map(|size| (size.width, size.height)),
        out: &args.out,
    };
    let written =
        predictions::write(&model, job, &mut || args.device.open(), &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        });
    bar.finish_and_clear();
    let written = written?;
    if !written.device.is_empty() {
        say!("device   {}", written.device)?;
    }
    let out = args.out.display();
    say!("{kind} {}: {} written, {} kept in {out}", args.split, written.written, written.kept)?;
    Ok(ExitCode::SUCCESS)
}
