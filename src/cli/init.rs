//! `fpenet init`: a model file with initial weights.

use std::path::PathBuf;
use std::process::ExitCode;

use fpenet::model::Model;

use super::args::ConfigArgs;
use crate::say;

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
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let model = Model::init(args.network.config()?, args.seed)?;
    model.save(&args.out)?;
    let parameters = model.params.trainable_count();
    say!("{}: {parameters} parameters, seed {}", args.out.display(), args.seed)?;
    Ok(ExitCode::SUCCESS)
}
