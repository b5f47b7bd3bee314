//! Options that several commands share.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use fpenet::backend::Backend;
use fpenet::backend::gpu::variants::Expanded;
use fpenet::config::{Attention, BlockActivation, Decoder};
use fpenet::device::{self, DeviceChoice, Precision};
use fpenet::graph::{MAX_SIDE, MIN_SIDE};
use fpenet::segment::Settings;
use fpenet::{Error, Model, ModelConfig, Result, bundled};

/// `WxH`, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Width.
    pub width: usize,
    /// Height.
    pub height: usize,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected =
            || format!("expected WIDTHxHEIGHT, each from {MIN_SIDE} to {MAX_SIDE} pixels");
        let (width, height) = text.split_once(['x', 'X']).ok_or_else(expected)?;
        let side = |text: &str| match text.parse() {
            Ok(side) if (MIN_SIDE..=MAX_SIDE).contains(&side) => Ok(side),
            _ => Err(expected()),
        };
        Ok(Size { width: side(width)?, height: side(height)? })
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// Which trained model works.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Model file [default: the bundled CamVid weights]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
}

impl ModelArgs {
    /// Reads the file, or takes the bundled model.
    pub fn load(&self) -> Result<Model> {
        self.model.as_deref().map_or_else(bundled::model, Model::load)
    }

    /// The file's path, or the bundled model's name.
    pub fn path(&self) -> &Path {
        self.model.as_deref().unwrap_or(Path::new(bundled::MODEL_NAME))
    }

    /// The model that was read, in words: its file, classes, size.
    pub fn explain(&self, model: &Model) -> String {
        let built_in = if self.model.is_none() { " (built in)" } else { "" };
        let trained = match model.train_size {
            Some((width, height)) => format!(", trained at {width}x{height}"),
            None => String::new(),
        };
        format!(
            "{}{built_in}: {} classes, {} parameters{trained}",
            self.path().display(),
            model.classes.len(),
            model.params.trainable_count()
        )
    }
}

/// Where the work runs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// Device; auto takes CUDA where it works, else the CPU
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceChoice,
    /// Storage of weights and activations
    #[arg(long, value_enum, default_value_t)]
    pub precision: Precision,
    /// Storage of the blocks' expanded tensors: as the precision says, or with f16 on a GPU in 8 bits,
    /// which costs some labels
    #[arg(long, value_enum, value_name = "STORAGE")]
    pub expanded: Option<Expanded>,
    /// CPU threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
}

impl DeviceArgs {
    /// Opens the device.
    pub fn open(&self) -> Result<Box<dyn Backend>> {
        self.keep_expanded(device::open(self.device, self.precision, self.threads)?)
    }

    /// Opens the device with what `fpenet tune` found for it.
    pub fn open_tuned(&self) -> Result<Box<dyn Backend>> {
        self.keep_expanded(device::open_tuned(self.device, self.precision, self.threads)?)
    }

    /// The same for what opens its device itself.
    pub fn settings(&self) -> Settings {
        let DeviceArgs { device, precision, threads, expanded } = *self;
        Settings { device, precision, threads, expanded }
    }

    /// Refuses what training would not heed.
    pub fn for_training(&self) -> Result<()> {
        match self.expanded {
            Some(Expanded::Bytes) => Err(Error::Usage(
                "--expanded bytes: expected inference, found training; use --expanded stored"
                    .into(),
            )),
            Some(Expanded::Stored) | None => Ok(()),
        }
    }

    fn keep_expanded(&self, mut device: Box<dyn Backend>) -> Result<Box<dyn Backend>> {
        match self.expanded {
            Some(expanded) => device.keep_expanded(expanded).map(|()| device),
            None => Ok(device),
        }
    }

    /// An opened device (its kind and name) in words, and for `auto` why it is this one.
    pub fn explain(&self, (kind, name): (&str, &str)) -> String {
        let why = match (self.device, kind) {
            (DeviceChoice::Auto, "cuda") => " (auto: a CUDA device works)".to_string(),
            (DeviceChoice::Auto, _) => {
                let cuda = device::list().into_iter().find(|report| report.kind == "cuda");
                format!(
                    " (auto, no CUDA device: {})",
                    cuda.map(|report| report.note).unwrap_or_default()
                )
            }
            _ => String::new(),
        };
        format!("{kind}: {name}{why}")
    }
}

/// A count from 1 to 4096.
pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if (1..=4096).contains(&count) => Ok(count),
        _ => Err("expected a number from 1 to 4096".to_string()),
    }
}

/// The config switches.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Network")]
pub struct ConfigArgs {
    /// Number of classes, void excluded [default: 19, or the data set's]
    #[arg(long, value_name = "N")]
    pub classes: Option<usize>,
    /// FPE blocks of stage 2 [default: 3]
    #[arg(long, value_name = "N")]
    pub p: Option<usize>,
    /// FPE blocks of stage 3 [default: 9]
    #[arg(long, value_name = "N")]
    pub q: Option<usize>,
    /// Depthwise branches of a block: 1, 2 or 4 [default: 4]
    #[arg(long, value_name = "N")]
    pub branches: Option<usize>,
    /// Dilation of each branch [default: 1,2,4,8]
    #[arg(long, value_name = "D,D,..", value_delimiter = ',')]
    pub dilations: Option<Vec<usize>>,
    /// Do not add a branch's output to the next branch's input
    #[arg(long)]
    pub no_branch_addition: bool,
    /// Let a stage hand on its last block alone
    #[arg(long)]
    pub no_long_skip: bool,
    /// Decoder [default: meu]
    #[arg(long, value_enum)]
    pub decoder: Option<Decoder>,
    /// Non-linearity of the attention gates [default: relu]
    #[arg(long, value_enum)]
    pub attention: Option<Attention>,
    /// What follows a block's residual addition [default: linear]
    #[arg(long, value_enum)]
    pub block_activation: Option<BlockActivation>,
}

impl ConfigArgs {
    /// `base` with the switches that were given, validated.
    pub fn over(&self, base: ModelConfig) -> Result<ModelConfig> {
        let config = ModelConfig {
            classes: self.classes.unwrap_or(base.classes),
            p: self.p.unwrap_or(base.p),
            q: self.q.unwrap_or(base.q),
            branches: self.branches.unwrap_or(base.branches),
            dilations: self.dilations.clone().unwrap_or(base.dilations),
            branch_addition: base.branch_addition && !self.no_branch_addition,
            long_skip: base.long_skip && !self.no_long_skip,
            decoder: self.decoder.unwrap_or(base.decoder),
            attention: self.attention.unwrap_or(base.attention),
            block_activation: self.block_activation.unwrap_or(base.block_activation),
        };
        config.validate()?;
        Ok(config)
    }

    /// Reads a model file, which says what the network is: no switch beside it is taken.
    pub fn load_without(&self, path: &Path) -> Result<Model> {
        if *self == ConfigArgs::default() {
            return Model::load(path);
        }
        Err(Error::Usage(format!(
            "--model {}: expected no config switches beside it, the file says what the network is",
            path.display()
        )))
    }

    /// The paper's network with the switches that were given, validated.
    pub fn config(&self) -> Result<ModelConfig> {
        self.over(ModelConfig::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_width_by_height() {
        let size: Size = "1024x512".parse().unwrap();
        assert_eq!((size.width, size.height), (1024, 512));
        assert_eq!(size.to_string(), "1024x512");
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let bad = ["", "x", "0x0", "8x512", "1024", "1024x", "-5x20", "99999x99999", "20x20x20"];
        for text in bad {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn switches_change_the_base_and_nothing_else() {
        let args = ConfigArgs {
            q: Some(5),
            no_long_skip: true,
            decoder: Some(Decoder::Bilinear),
            ..Default::default()
        };
        let base = ModelConfig { classes: 11, ..Default::default() };
        let expected =
            ModelConfig { q: 5, long_skip: false, decoder: Decoder::Bilinear, ..base.clone() };
        assert_eq!(args.over(base).unwrap(), expected);
        assert!(ConfigArgs { p: Some(0), ..Default::default() }.config().is_err());
    }
}
