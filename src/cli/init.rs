//! `fpenet init`: a model file with initial weights.

use std::process::ExitCode;

use fpenet::model::Model;

use super::args::ConfigArgs;
use super::destination::Destination;

/// Options of `fpenet init`.
#[derive(clap::Args)]
pub struct Args {
    /// Where the model goes (.safetensors; -: standard output)
    #[arg(long, value_name = "FILE")]
    pub out: Destination,
    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub network: ConfigArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let messages = args.out.reserve_binary()?;
    let model = Model::init(args.network.config()?, args.seed)?;
    args.out.write_model(&model)?;
    let parameters = model.params.trainable_count();
    writeln!(messages, "{}: {parameters} parameters, seed {}", args.out, args.seed)?;
    Ok(ExitCode::SUCCESS)
}
