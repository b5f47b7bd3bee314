//! `fpenet export`: a model as an ONNX file.

use std::process::ExitCode;

use fpenet::exchange::onnx::{self, MAX_OPSET, MIN_OPSET, Options};

use super::args::{ModelArgs, Size};
use super::destination::Destination;

/// Options of `fpenet export`.
#[derive(clap::Args)]
#[command(
    after_help = "The input \"input\" is RGB / 255, minus mean, over std: f32, N x 3 x H x W; \
    mean, std, class names and palette stand in the file's metadata. The output is \"logits\", f32, \
    N x C x H x W, or with --argmax \"labels\", int64, N x H x W. Recipes for TensorRT and OpenVINO: \
    docs/EXCHANGE.md."
)]
pub struct Args {
    /// Where the ONNX file goes (-: standard output)
    #[arg(long, value_name = "FILE")]
    pub onnx: Destination,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Fix width and height of the input [default: both stay dynamic, as the batch always does]
    #[arg(long, value_name = "WxH")]
    pub size: Option<Size>,
    /// Write class indices instead of logits
    #[arg(long)]
    pub argmax: bool,
    /// ONNX operator set
    #[arg(long, value_name = "N", default_value_t = MIN_OPSET,
        value_parser = clap::value_parser!(u32).range(i64::from(MIN_OPSET)..=i64::from(MAX_OPSET)))]
    pub opset: u32,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let messages = args.onnx.reserve_binary()?;
    let model = args.model.load()?;
    let size = args.size.map(|size| (size.width, size.height));
    let options = Options { opset: args.opset, size, argmax: args.argmax };
    let (bytes, written) = onnx::encode(&model, &options)?;
    args.onnx.write(|out| out.write_all(&bytes))?;

    let sides = args.size.map_or("H x W".to_string(), |s| format!("{} x {}", s.height, s.width));
    let output = if args.argmax {
        format!("labels int64 N x {sides}")
    } else {
        format!("logits f32 N x {} x {sides}", model.config.classes)
    };
    writeln!(
        messages,
        "{}: opset {}, input f32 N x 3 x {sides} -> {output}, {} nodes, {:.2} MB",
        args.onnx,
        args.opset,
        written.nodes,
        written.bytes as f64 / 1e6
    )?;
    Ok(ExitCode::SUCCESS)
}
