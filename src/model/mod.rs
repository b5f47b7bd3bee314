//! A network with its weights, class names and normalisation, and its file (SPEC, "Model file").

pub mod classes;
pub mod npy;
pub mod tensors;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::graph::{Graph, MAX_SIDE, MIN_SIDE, ParamStore};
use tensors::{Selection, TensorFile};

/// Value of the metadata key `format`.
pub const FORMAT: &str = "fpenet-1";
/// Per-channel mean of ImageNet's images (RGB, 0..1): what a model is normalised with unless its
/// training measured its own.
pub const DEFAULT_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Per-channel standard deviation that goes with [`DEFAULT_MEAN`].
pub const DEFAULT_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Everything a model file holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Structure.
    pub config: ModelConfig,
    /// Class names, one per class.
    pub classes: Vec<String>,
    /// Colours (RGB) for masks and overlays, one per class.
    pub palette: Vec<[u8; 3]>,
    /// Mean of the input per channel (RGB), on the 0..1 scale.
    pub mean: [f32; 3],
    /// Standard deviation of the input per channel (RGB), on the 0..1 scale.
    pub std: [f32; 3],
    /// Size (width, height) it was trained at, where known.
    pub train_size: Option<(usize, usize)>,
    /// Weights and running statistics.
    pub params: ParamStore,
}

impl Model {
    /// An untrained model (SPEC, "Initialisation"); the same seed gives the same weights. Class
    /// names and colours are those of Cityscapes for 19 classes, CamVid's for 11, else numbered.
    ///
    /// # Errors
    /// [`Error::Usage`] for an invalid configuration.
    pub fn init(config: ModelConfig, seed: u64) -> Result<Model> {
        let graph = Graph::fpenet(&config)?;
        let (classes, palette) = classes::table(config.classes);
        Ok(Model {
            params: ParamStore::init(&graph.params, seed),
            config,
            classes,
            palette,
            mean: DEFAULT_MEAN,
            std: DEFAULT_STD,
            train_size: None,
        })
    }

    /// Reads a model file. Its tensors must be exactly those that its `config` asks for, all f32
    /// and finite. `config` and `format` are required; without `classes` and `palette` the names
    /// of [`Model::init`] serve, without `mean` and `std` its normalisation.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read, [`Error::Format`] naming the file, the tensor or
    /// the metadata key at fault, what was expected and what was found.
    pub fn load(path: &Path) -> Result<Model> {
        Model::from_bytes(&tensors::read_bytes(path)?, path)
    }

    /// [`Model::load`] for a file in memory; `path` names it in messages.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Model> {
        let file = TensorFile::parse(path, bytes)?;
        let metadata = Metadata { path, file: &file };

        let format = file.metadata("format").ok_or_else(|| metadata.missing("format"))?;
        if format != FORMAT {
            return Err(metadata.wrong("format", FORMAT, format));
        }
        let config: ModelConfig =
            metadata.json("config")?.ok_or_else(|| metadata.missing("config"))?;
        // A bad configuration is the file's fault here, not the command line's.
        let graph = Graph::fpenet(&config)
            .map_err(|e| metadata.wrong("config", "a valid configuration", e.to_string()))?;

        let (names, colours) = classes::table(config.classes);
        let classes: Vec<String> = metadata.list("classes", config.classes)?.unwrap_or(names);
        if let Some(unfit) = classes::unfit(&classes) {
            return Err(metadata.wrong("classes", "names of one line", unfit));
        }
        let palette = metadata.list("palette", config.classes)?.unwrap_or(colours);
        let (mean, std) = metadata.normalisation()?;
        let train_size = metadata.json("train_size")?;
        if let Some((w, h)) = train_size
            && !((MIN_SIDE..=MAX_SIDE).contains(&w) && (MIN_SIDE..=MAX_SIDE).contains(&h))
        {
            let expected = format!("[width, height] from {MIN_SIDE} to {MAX_SIDE}");
            return Err(metadata.wrong("train_size", expected, format!("[{w}, {h}]")));
        }
        let params = file.params(&graph.params, Selection::All)?;
        Ok(Model { config, classes, palette, mean, std, train_size, params })
    }

    /// Writes a model file, as a whole or not at all. The same model gives the same bytes.
    ///
    /// # Errors
    /// [`Error::Failed`] where a weight is not finite, [`Error::Io`] where it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.params
            .check_finite()
            .map_err(|e| Error::Failed(format!("{}: not written: {e}", path.display())))?;
        tensors::write_params(path, &self.params, Selection::All, &self.metadata())
    }

    /// [`Model::save`] into a pipe.
    ///
    /// # Errors
    /// Those of `w`, and where a weight is not finite.
    pub fn save_to(&self, w: &mut dyn Write) -> io::Result<()> {
        self.params.check_finite().map_err(io::Error::other)?;
        tensors::write_params_to(w, &self.params, Selection::All, &self.metadata())
    }

    /// Everything but the weights, under the keys of the model file (SPEC, "Model file").
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let mut metadata = BTreeMap::from([
            ("format".to_string(), FORMAT.to_string()),
            ("config".to_string(), json(&self.config)),
            ("classes".to_string(), json(&self.classes)),
            ("palette".to_string(), json(&self.palette)),
            ("mean".to_string(), json(&self.mean)),
            ("std".to_string(), json(&self.std)),
        ]);
        if let Some(size) = self.train_size {
            metadata.insert("train_size".to_string(), json(&size));
        }
        metadata
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain data without maps serialises")
}

/// Reads metadata keys with errors that name file and key.
struct Metadata<'a> {
    path: &'a Path,
    file: &'a TensorFile<'a>,
}

impl Metadata<'_> {
    fn wrong(&self, key: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        let expected = format!("metadata key \"{key}\" to hold {}", expected.into());
        Error::format(self.path, expected, found)
    }

    fn missing(&self, key: &str) -> Error {
        let expected = format!("metadata key \"{key}\" (SPEC, \"Model file\")");
        Error::format(self.path, expected, "none: not an FPENet model file")
    }

    fn json<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let Some(text) = self.file.metadata(key) else { return Ok(None) };
        let parsed = serde_json::from_str(text);
        let value = parsed.map_err(|e| self.wrong(key, "valid JSON of its kind", e.to_string()))?;
        Ok(Some(value))
    }

    fn list<T: DeserializeOwned>(&self, key: &str, classes: usize) -> Result<Option<Vec<T>>> {
        let list: Option<Vec<T>> = self.json(key)?;
        match &list {
            Some(found) if found.len() != classes => {
                let expected = format!("{classes} entries, one per class of its config");
                Err(self.wrong(key, expected, format!("{} entries", found.len())))
            }
            _ => Ok(list),
        }
    }

    fn normalisation(&self) -> Result<([f32; 3], [f32; 3])> {
        let pair = (self.json("mean")?, self.json("std")?);
        let (mean, std): ([f32; 3], [f32; 3]) = match pair {
            (Some(mean), Some(std)) => (mean, std),
            (None, None) => (DEFAULT_MEAN, DEFAULT_STD),
            (None, Some(_)) => return Err(self.missing("mean")),
            (Some(_), None) => return Err(self.missing("std")),
        };
        if mean.iter().any(|m| !m.is_finite()) {
            return Err(self.wrong("mean", "finite numbers", format!("{mean:?}")));
        }
        if std.iter().any(|s| !(s.is_finite() && *s > 0.0)) {
            return Err(self.wrong("std", "positive numbers", format!("{std:?}")));
        }
        Ok((mean, std))
    }
}

#[cfg(test)]
mod tests;
