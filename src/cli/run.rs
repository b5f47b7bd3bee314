//! `fpenet run`: logits of a normalised NumPy array.

use std::path::PathBuf;
use std::process::ExitCode;

use fpenet::Error;
use fpenet::exec::Inference;
use fpenet::graph::Mode;
use fpenet::model::{Model, npy};

use super::args::DeviceArgs;
use super::destination::Destination;

/// Options of `fpenet run`.
#[derive(clap::Args)]
pub struct Args {
    /// Model file
    #[arg(long, value_name = "FILE")]
    pub model: PathBuf,
    /// Input: f32, N x 3 x H x W, already normalised (.npy)
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// Where the logits go: f32, N x C x H x W (.npy; -: standard output)
    #[arg(long, value_name = "FILE")]
    pub output: Destination,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let messages = args.output.reserve_binary()?;
    let model = Model::load(&args.model)?;
    let (shape, input) = npy::read_f32(&args.input)?;
    let [n, 3, h, w] = shape[..] else {
        let found = format!("rank {} shape {shape:?}", shape.len());
        return Err(Error::format(&args.input, "rank 4: shape N x 3 x H x W", found).into());
    };
    npy::check_finite(&args.input, &input)?;
    let mut inference = Inference::new(&model, args.device.open()?, n, h, w, Mode::Logits)
        .map_err(|e| e.blame_file(&args.input, "an array that the network takes"))?;
    inference.run(&input)?;
    let logits = inference.logits()?;
    let shape = [n, model.config.classes, h, w];
    args.output.write(|out| npy::write_f32_to(out, &shape, &logits))?;
    writeln!(
        messages,
        "{}: logits {n} x {} x {h} x {w} on {}",
        args.output,
        model.config.classes,
        inference.backend().describe()
    )?;
    Ok(ExitCode::SUCCESS)
}
