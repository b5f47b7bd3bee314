//! `fpenet eval`: figures of a model on a data set.

use std::path::PathBuf;
use std::process::ExitCode;

use fpenet::data::{Dataset, DatasetKind};
use fpenet::evaluate::{Evaluation, evaluate_frames};
use fpenet::files;
use fpenet::report::{self, Scores};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use super::args::{DeviceArgs, ModelArgs, Size, positive};
use super::destination::{Destination, Messages};

/// Options of `fpenet eval`.
#[derive(clap::Args)]
#[command(after_help = "\
    CamVid is expected as DIR/SPLIT/*.png with DIR/SPLITannot/*.png (and DIR/SPLIT.txt, a list of \
    names, if there is one), Cityscapes as DIR/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with \
    DIR/gtFine/SPLIT/CITY/*_gtFine_labelIds.png or *_labelTrainIds.png.\n\n\
    Predictions are compared with the labels at the labels' full size; where the network runs at \
    another, its logits are resized bilinearly. mIoU is the mean over the classes that occur in \
    the labels or the predictions; void counts nowhere.")]
pub struct Args {
    /// Root folder of the data set
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Split to measure on; several may be joined by commas
    #[arg(long, value_name = "SPLIT", default_value = "val", value_delimiter = ',')]
    pub split: Vec<String>,
    /// Layout of the data set [default: told from the folder]
    #[arg(long, value_enum)]
    pub dataset: Option<DatasetKind>,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Size at which the network runs [default: the images', half of it for Cityscapes]
    #[arg(long, value_name = "WxH")]
    pub size: Option<Size>,
    /// Write the figures to this file, or to standard output (-)
    #[arg(long, value_name = "FILE")]
    pub json: Option<Destination>,
    /// Draw the N frames of lowest mIoU beside their ground truth, and a confusion matrix
    /// [default with --report: 20]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub worst: Option<usize>,
    /// Folder for worst.png, confusion.png and frames.csv [default with --worst: out]
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let messages = Destination::reserve_optional(args.json.as_ref())?;
    let report = match (&args.report, args.worst) {
        (None, None) => None,
        (folder, _) => Some(folder.clone().unwrap_or_else(|| "out".into())),
    };
    let model = args.model.load()?;
    let kind = DatasetKind::asked_or_detected(args.dataset, &args.data)?;
    let dataset = Dataset::open(kind, &args.data, &args.split)?;
    let size = args.size.map(|size| (size.width, size.height));
    if let Some(folder) = &report {
        files::check_folder(folder)?;
    }
    let mut scores = report.as_ref().map(|_| Scores::new(args.worst.unwrap_or(20)));

    let bar = ProgressBar::new(dataset.len() as u64);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} images, {msg}, {eta} left")?;
    bar.set_style(style);
    let evaluation =
        evaluate_frames(&model, &dataset, size, &mut || args.device.open(), &mut |frame| {
            bar.set_message(format!("mIoU {:.1} %", 100.0 * frame.confusion.miou()));
            bar.set_position(frame.index as u64 + 1);
            scores.as_mut().map_or(Ok(()), |scores| scores.add(&dataset, frame))
        });
    bar.finish_and_clear();
    let evaluation = evaluation?;

    print(messages, &args, &dataset, &evaluation)?;
    if let Some(json) = &args.json {
        json.write_json(&figures(&dataset, &evaluation))?;
    }
    if let (Some(folder), Some(scores)) = (&report, &scores) {
        let _made = files::create_folder(folder)?;
        let model = args.model.path();
        let model = model.file_name().unwrap_or(model.as_os_str()).to_string_lossy();
        let title = format!("{model} on {} {}", dataset.kind, dataset.splits.join("+"));
        for path in report::write(folder, &title, &dataset, &evaluation.confusion, scores)? {
            writeln!(messages, "-> {}", path.display())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print(
    messages: Messages,
    args: &Args,
    dataset: &Dataset,
    evaluation: &Evaluation,
) -> std::io::Result<()> {
    let confusion = &evaluation.confusion;
    let (splits, root) = (dataset.splits.join(","), dataset.root.display());
    let model = args.model.path().display();
    let (w, h) = evaluation.size;
    writeln!(messages, "device   {}", evaluation.device)?;
    writeln!(messages, "model    {model}")?;
    writeln!(messages, "data     {} {splits} in {root}, network at {w}x{h}", dataset.kind)?;
    writeln!(messages)?;
    let width = dataset.classes.iter().map(|c| c.chars().count()).max().unwrap_or(0).max(15);
    writeln!(messages, "{:width$}  {:>6}  {:>8}", "class", "IoU %", "pixels %")?;
    for (class, iou) in confusion.per_class_iou().into_iter().enumerate() {
        let pixels: u64 = (0..confusion.classes()).map(|p| confusion.count(class, p)).sum();
        let share = 100.0 * pixels as f64 / confusion.total() as f64;
        let iou = if iou.is_nan() { "absent".into() } else { format!("{:.2}", 100.0 * iou) };
        writeln!(messages, "{:width$}  {iou:>6}  {share:>8.2}", dataset.classes[class])?;
    }
    writeln!(messages)?;
    writeln!(messages, "{:width$}  {:>6.2}", "mIoU", 100.0 * confusion.miou())?;
    writeln!(
        messages,
        "{:width$}  {:>6.2}",
        "global accuracy",
        100.0 * confusion.global_accuracy()
    )?;
    let seconds = evaluation.elapsed.as_secs_f64();
    let images = evaluation.images as f64;
    writeln!(
        messages,
        "{} images in {seconds:.1} s, {:.1} ms each in the network",
        evaluation.images,
        1e3 * evaluation.inference.as_secs_f64() / images
    )
}

/// The figures as JSON: fractions from 0 to 1, `null` for a class that occurs nowhere.
fn figures(dataset: &Dataset, evaluation: &Evaluation) -> Value {
    let confusion = &evaluation.confusion;
    let classes = confusion.classes();
    let iou: Map<String, Value> = dataset
        .classes
        .iter()
        .zip(confusion.per_class_iou())
        .map(|(class, iou)| (class.clone(), json!(iou.is_finite().then_some(iou))))
        .collect();
    let row = |t: usize| (0..classes).map(|p| confusion.count(t, p)).collect::<Vec<_>>();
    json!({
        "miou": confusion.miou(),
        "global_accuracy": confusion.global_accuracy(),
        "per_class_iou": iou,
        "images": evaluation.images,
        "dataset": dataset.kind.to_string(),
        "splits": dataset.splits,
        "classes": dataset.classes,
        "confusion": (0..classes).map(row).collect::<Vec<_>>(),
        "network_size": [evaluation.size.0, evaluation.size.1],
        "device": evaluation.device,
        "inference_seconds": evaluation.inference.as_secs_f64(),
        "seconds": evaluation.elapsed.as_secs_f64(),
        "version": env!("CARGO_PKG_VERSION"),
    })
}
