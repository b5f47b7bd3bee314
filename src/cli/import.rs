//! `fpenet import`: a model file from PyTorch's weights.

use std::path::PathBuf;
use std::process::ExitCode;

use fpenet::exchange::import::{self, Mapping, Weights};
use fpenet::graph::Graph;
use fpenet::model::classes;
use fpenet::{Error, Model, ModelConfig};

use super::args::ConfigArgs;
use super::destination::Destination;

/// Options of `fpenet import`.
#[derive(clap::Args)]
#[command(after_help = "In Python, one of:\n  \
    safetensors.torch.save_file(model.state_dict(), \"weights.safetensors\")\n  \
    numpy.savez(\"weights.npz\", **{k: v.cpu().numpy() for k, v in model.state_dict().items()})\n\n\
    A mapping file is a JSON object of names, {\"theirs\": \"ours\"}; a key that ends with a dot maps \
    every name that starts with it, null passes a tensor over. The prefixes \"module.\" and \"model.\" \
    are taken off. f16, bf16 and f64 become f32.")]
pub struct Args {
    /// State dict: safetensors or npz, told by the content
    #[arg(long, value_name = "FILE")]
    pub from: PathBuf,
    /// Where the model goes (.safetensors; -: standard output)
    #[arg(long, value_name = "FILE")]
    pub out: Destination,
    /// Names that differ from this project's (JSON)
    #[arg(long, value_name = "FILE")]
    pub map: Option<PathBuf>,
    /// Take class names, colours and normalisation from a model file
    #[arg(long, value_name = "MODEL")]
    pub classes_from: Option<PathBuf>,
    /// Class names in the order of the indices
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', conflicts_with = "classes_from")]
    pub class_names: Option<Vec<String>>,
    /// Mean of the training images, RGB on the 0..1 scale [default: ImageNet's]
    #[arg(long, value_name = "R,G,B", value_parser = triple, requires = "std")]
    pub mean: Option<[f32; 3]>,
    /// Standard deviation of the training images, RGB on the 0..1 scale [default: ImageNet's]
    #[arg(long, value_name = "R,G,B", value_parser = triple, requires = "mean")]
    pub std: Option<[f32; 3]>,
    #[command(flatten)]
    pub network: ConfigArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let messages = args.out.reserve_binary()?;
    let mapping = args.map.as_deref().map(Mapping::load).transpose()?.unwrap_or_default();
    let bytes = import::read_bytes(&args.from)?;
    let weights = Weights::parse(&args.from, &bytes)?;

    let mut base = ModelConfig::default();
    if args.network.classes.is_none()
        && let Some(classes) = import::classes(&weights, &mapping)?
    {
        base.classes = classes;
    }
    let config = args.network.over(base)?;
    let graph = Graph::fpenet(&config)?;
    let imported = import::import(&weights, &graph.params, &mapping)?;

    let (names, palette) = classes::table(config.classes);
    let mut model = Model {
        params: imported.params,
        classes: args.class_names.clone().unwrap_or(names),
        palette,
        ..Model::init(config, 0)?
    };
    if let Some(path) = &args.classes_from {
        let like = Model::load(path)?;
        model = Model {
            classes: like.classes,
            palette: like.palette,
            mean: like.mean,
            std: like.std,
            train_size: like.train_size,
            ..model
        };
    }
    if model.classes.len() != model.config.classes {
        return Err(Error::Usage(format!(
            "class names: expected {}, as the classifier of {} has, found {}",
            model.config.classes,
            args.from.display(),
            model.classes.len()
        ))
        .into());
    }
    if let Some(unfit) = classes::unfit(&model.classes) {
        let text = format!("--class-names: expected names of one line, found {unfit}");
        return Err(Error::Usage(text).into());
    }
    if let Some(repeated) = classes::repeated(&model.classes) {
        let text = format!("class names: expected each of them once, found {repeated}");
        return Err(Error::Usage(text).into());
    }
    if let (Some(mean), Some(std)) = (args.mean, args.std) {
        if std.iter().any(|s| *s <= 0.0) {
            let found = format!("--std: expected positive numbers, found {std:?}");
            return Err(Error::Usage(found).into());
        }
        (model.mean, model.std) = (mean, std);
    }
    args.out.write_model(&model)?;

    writeln!(
        messages,
        "{}: {} parameters, {} classes, from {} ({}, {} tensors)",
        args.out,
        model.params.trainable_count(),
        model.config.classes,
        args.from.display(),
        weights.format(),
        weights.names().count()
    )?;
    for note in imported.notes {
        writeln!(messages, "  {note}")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Three finite numbers with commas between them.
fn triple(text: &str) -> Result<[f32; 3], String> {
    let values: Option<Vec<f32>> =
        text.split(',').map(|v| v.trim().parse().ok().filter(|v: &f32| v.is_finite())).collect();
    values
        .and_then(|values| values.try_into().ok())
        .ok_or_else(|| "expected three numbers, R,G,B".to_string())
}
