//! What a run is asked to do ([`Request`]) and the settings that decide its weights
//! ([`Protocol`]), which a checkpoint keeps and a resumed run must not contradict.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::class_weights::ClassWeights;
use crate::backend::{self, Backend, DeviceChoice, Precision};
use crate::config::ModelConfig;
use crate::data::DatasetKind;
use crate::data::augment::Augment;
use crate::error::{Error, Result};

/// A training command. `None` means "the protocol's default", or on resuming "as before".
#[derive(Debug, Clone)]
pub struct Request {
    /// Folder of the dataset.
    pub data: PathBuf,
    /// Folder of the run, created where missing.
    pub out: PathBuf,
    /// Continue from the run's checkpoint.
    pub resume: bool,
    /// Folder layout and class list of the dataset.
    pub dataset: Option<DatasetKind>,
    /// Splits to train on; `train` by default.
    pub splits: Option<Vec<String>>,
    /// Split to validate on, `val` by default; `none` for no validation.
    pub val_split: Option<String>,
    /// Validate after every so many epochs (and after the last); 1 by default.
    pub val_every: Option<usize>,
    /// Epochs; 300 on CamVid, 400 on Cityscapes by default.
    pub epochs: Option<usize>,
    /// Images per update; 8 by default.
    pub batch: Option<usize>,
    /// Learning rate of the first epoch; 5e-4 by default.
    pub lr: Option<f64>,
    /// Seed of initialisation, shuffling and augmentation; 0 by default.
    pub seed: Option<u64>,
    /// Training size (width, height); 480x360 on CamVid, 1024x512 on Cityscapes by default.
    pub size: Option<(usize, usize)>,
    /// Largest rotation in degrees; 10 by default.
    pub rotation: Option<f32>,
    /// Range of the random scale; 0.5 to 1.75 by default.
    pub scale: Option<(f32, f32)>,
    /// Strength of random colour changes; 0 by default, as in the paper.
    pub colour: Option<f32>,
    /// Random horizontal flips; on by default.
    pub flip: Option<bool>,
    /// Weights of the classes in the loss; none by default, as in the paper.
    pub class_weights: Option<ClassWeights>,
    /// Configuration keys given explicitly, by their names in the SPEC's JSON.
    pub config: Map<String, Value>,
    /// Model file to start from instead of a random initialisation.
    pub init_from: Option<PathBuf>,
    /// What does not change the weights.
    pub runtime: Runtime,
}

/// Settings that may differ from session to session of one run.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// Device.
    pub device: DeviceChoice,
    /// Arithmetic of the device.
    pub precision: Precision,
    /// Compute threads of the CPU backend.
    pub threads: Option<usize>,
    /// Threads that decode and augment; chosen from the number of cores by default.
    pub workers: Option<usize>,
    /// Write a checkpoint every so many updates, besides each epoch's.
    pub checkpoint_steps: Option<u64>,
    /// Write a checkpoint when this much time has passed since the last.
    pub checkpoint_interval: Duration,
    /// Stop, with a checkpoint, after this much time.
    pub stop_after: Option<Duration>,
}

impl Runtime {
    /// Opens the device.
    ///
    /// # Errors
    /// As [`backend::open`].
    pub fn open(&self) -> Result<Box<dyn Backend>> {
        backend::open(self.device, self.precision, self.threads)
    }

    /// Loader threads: as asked, else half of the cores. Eight CamVid images take one core a few
    /// percent of the time that an update takes two; a GPU is kept busy by a few workers.
    pub fn workers(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        self.workers.unwrap_or_else(|| (cores() / 2).clamp(1, 8))
    }
}

impl Default for Runtime {
    fn default() -> Self {
        Runtime {
            device: DeviceChoice::Auto,
            precision: Precision::F32,
            threads: None,
            workers: None,
            checkpoint_steps: None,
            checkpoint_interval: Duration::from_secs(300),
            stop_after: None,
        }
    }
}

impl Request {
    /// The paper's protocol on a dataset, into a new folder.
    pub fn new(data: impl Into<PathBuf>, out: impl Into<PathBuf>) -> Self {
        Request {
            data: data.into(),
            out: out.into(),
            resume: false,
            dataset: None,
            splits: None,
            val_split: None,
            val_every: None,
            epochs: None,
            batch: None,
            lr: None,
            seed: None,
            size: None,
            rotation: None,
            scale: None,
            colour: None,
            flip: None,
            class_weights: None,
            config: Map::new(),
            init_from: None,
            runtime: Runtime::default(),
        }
    }
}

/// Everything that decides a run's weights, besides the data itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protocol {
    /// Folder layout and class list of the dataset.
    pub dataset: DatasetKind,
    /// Splits trained on.
    pub splits: Vec<String>,
    /// Split validated on.
    pub val_split: Option<String>,
    /// Epochs between validations.
    pub val_every: usize,
    /// Epochs in all.
    pub epochs: usize,
    /// Images per update.
    pub batch: usize,
    /// Learning rate of the first epoch.
    pub lr: f64,
    /// Seed of initialisation, shuffling and augmentation.
    pub seed: u64,
    /// Training size (width, height).
    pub size: (usize, usize),
    /// Largest rotation in degrees.
    pub rotation: f32,
    /// Range of the random scale.
    pub scale: (f32, f32),
    /// Strength of random colour changes.
    #[serde(default)]
    pub colour: f32,
    /// Random horizontal flips.
    pub flip: bool,
    /// Weights of the classes in the loss.
    #[serde(default)]
    pub class_weights: ClassWeights,
    /// Network.
    pub config: ModelConfig,
}

impl Protocol {
    /// The protocol of a new run: the request over the paper's defaults.
    ///
    /// `classes` is the dataset's number of classes, `base` the configuration to start from (of
    /// the model file in [`Request::init_from`], else the default).
    ///
    /// # Errors
    /// [`Error::Usage`] for a value out of range, or a network that does not have the dataset's
    /// number of classes.
    pub fn new(
        request: &Request,
        dataset: DatasetKind,
        classes: usize,
        base: Option<&ModelConfig>,
    ) -> Result<Self> {
        let base = match base {
            Some(config) => config.clone(),
            None => ModelConfig { classes, ..ModelConfig::default() },
        };
        let (epochs, size) = match dataset {
            DatasetKind::Camvid => (300, (480, 360)),
            DatasetKind::Cityscapes => (400, (1024, 512)),
        };
        let val_split = request.val_split.clone().unwrap_or_else(|| "val".into());
        let protocol = Protocol {
            dataset,
            splits: request.splits.clone().unwrap_or_else(|| vec!["train".into()]),
            val_split: (val_split != "none").then_some(val_split),
            val_every: request.val_every.unwrap_or(1),
            epochs: request.epochs.unwrap_or(epochs),
            batch: request.batch.unwrap_or(8),
            lr: request.lr.unwrap_or(5e-4),
            seed: request.seed.unwrap_or(0),
            size: request.size.unwrap_or(size),
            rotation: request.rotation.unwrap_or(10.0),
            scale: request.scale.unwrap_or((0.5, 1.75)),
            colour: request.colour.unwrap_or(0.0),
            flip: request.flip.unwrap_or(true),
            class_weights: request.class_weights.unwrap_or_default(),
            config: with_overrides(&base, &request.config)?,
        };
        protocol.validate()?;
        if protocol.config.classes != classes {
            return Err(Error::Usage(format!(
                "classes: expected {classes}, as the dataset has, found {}",
                protocol.config.classes
            )));
        }
        Ok(protocol)
    }

    fn validate(&self) -> Result<()> {
        let wrong = |option: &str, expected: &str, found: &dyn std::fmt::Debug| {
            Err(Error::Usage(format!("{option}: expected {expected}, found {found:?}")))
        };
        self.config.validate()?;
        if self.splits.is_empty() {
            return wrong("--splits", "at least one split", &self.splits);
        }
        if self.epochs == 0 {
            return wrong("--epochs", "at least 1", &self.epochs);
        }
        if self.val_every == 0 {
            return wrong("--val-every", "at least 1", &self.val_every);
        }
        if !(1..=4096).contains(&self.batch) {
            return wrong("--batch", "1 to 4096 images", &self.batch);
        }
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return wrong("--lr", "a positive number", &self.lr);
        }
        if !(0.0..=180.0).contains(&self.rotation) {
            return wrong("--rotation", "0 to 180 degrees", &self.rotation);
        }
        if !(0.0..=1.0).contains(&self.colour) {
            return wrong("--colour", "0 to 1", &self.colour);
        }
        let (low, high) = self.scale;
        if !(0.05..=20.0).contains(&low) || !(low..=20.0).contains(&high) {
            return wrong("--scale", "LOW,HIGH with 0.05 <= LOW <= HIGH <= 20", &self.scale);
        }
        Ok(())
    }

    /// The random warps.
    pub fn augment(&self) -> Augment {
        Augment {
            flip: self.flip,
            rotation_deg: self.rotation,
            scale: self.scale,
            colour: self.colour,
            size: self.size,
        }
    }

    /// Checks that a request to resume says nothing that contradicts this protocol.
    ///
    /// # Errors
    /// [`Error::Usage`] naming every option that does, with both values.
    pub fn check_resume(&self, request: &Request) -> Result<()> {
        let mut conflicts = Vec::new();
        let mut compare = |option: &str, asked: Option<Value>, kept: Value| {
            if let Some(asked) = asked.filter(|asked| *asked != kept) {
                conflicts.push(format!("{option} is {kept} in the checkpoint, {asked} was asked"));
            }
        };
        let val_split = self.val_split.clone().unwrap_or_else(|| "none".into());
        compare("--dataset", request.dataset.map(json), json(self.dataset));
        compare("--splits", request.splits.as_ref().map(json), json(&self.splits));
        compare("--val-split", request.val_split.as_ref().map(json), json(val_split));
        compare("--val-every", request.val_every.map(json), json(self.val_every));
        compare("--epochs", request.epochs.map(json), json(self.epochs));
        compare("--batch", request.batch.map(json), json(self.batch));
        compare("--lr", request.lr.map(json), json(self.lr));
        compare("--seed", request.seed.map(json), json(self.seed));
        compare("--size", request.size.map(json), json(self.size));
        compare("--rotation", request.rotation.map(json), json(self.rotation));
        compare("--scale", request.scale.map(json), json(self.scale));
        compare("--colour", request.colour.map(json), json(self.colour));
        compare("--no-flip", request.flip.map(json), json(self.flip));
        let weights = self.class_weights;
        compare("--class-weights", request.class_weights.map(json), json(weights));
        let kept = json(&self.config);
        for (key, asked) in &request.config {
            compare(&format!("config {key}"), Some(asked.clone()), kept[key].clone());
        }
        if conflicts.is_empty() {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "--resume: {}: {}; leave these options out, or start a new run in another folder",
            request.out.display(),
            conflicts.join(", ")
        )))
    }
}

fn json(value: impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}

/// A configuration with some keys replaced.
fn with_overrides(base: &ModelConfig, overrides: &Map<String, Value>) -> Result<ModelConfig> {
    let mut value = json(base);
    for (key, new) in overrides {
        value[key.as_str()] = new.clone();
    }
    serde_json::from_value(value).map_err(|e| Error::Usage(format!("config: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paper(request: &Request) -> Result<Protocol> {
        Protocol::new(request, DatasetKind::Camvid, 11, None)
    }

    #[test]
    fn the_default_is_the_papers_protocol() {
        let p = paper(&Request::new("data", "run")).unwrap();
        assert_eq!((p.epochs, p.batch, p.lr, p.size), (300, 8, 5e-4, (480, 360)));
        assert_eq!((p.rotation, p.scale, p.flip), (10.0, (0.5, 1.75), true));
        assert_eq!((p.config.classes, p.config.p, p.config.q), (11, 3, 9));
        let request = Request::new("data", "run");
        let c = Protocol::new(&request, DatasetKind::Cityscapes, 19, None).unwrap();
        assert_eq!((c.epochs, c.size, c.config.classes), (400, (1024, 512), 19));
    }

    #[test]
    fn a_class_count_that_is_not_the_datasets_is_refused() {
        let mut request = Request::new("data", "run");
        request.config.insert("classes".into(), 19.into());
        let error = paper(&request).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("expected 11"), "{error}");
    }

    #[test]
    fn values_out_of_range_are_usage_errors_that_name_the_option() {
        type Edit = fn(&mut Request);
        let edits: [(&str, Edit); 6] = [
            ("--epochs", |r| r.epochs = Some(0)),
            ("--batch", |r| r.batch = Some(0)),
            ("--lr", |r| r.lr = Some(f64::NAN)),
            ("--scale", |r| r.scale = Some((2.0, 1.0))),
            ("--rotation", |r| r.rotation = Some(-1.0)),
            ("--splits", |r| r.splits = Some(Vec::new())),
        ];
        for (option, edit) in edits {
            let mut request = Request::new("data", "run");
            edit(&mut request);
            let error = paper(&request).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{option}");
            assert!(error.to_string().contains(option), "{error}");
        }
    }

    #[test]
    fn resuming_may_repeat_the_options_or_leave_them_out_but_not_change_them() {
        let mut request = Request::new("data", "run");
        request.lr = Some(1e-3);
        request.scale = Some((0.75, 1.3));
        request.config.insert("attention".into(), "sigmoid".into());
        let kept = paper(&request).unwrap();
        // As it comes back from a checkpoint.
        let kept: Protocol = serde_json::from_str(&serde_json::to_string(&kept).unwrap()).unwrap();
        kept.check_resume(&request).unwrap();
        kept.check_resume(&Request::new("data", "run")).unwrap();

        request.lr = Some(5e-4);
        request.config.insert("attention".into(), "relu".into());
        let error = kept.check_resume(&request).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let words = error.to_string();
        assert!(words.contains("--lr is 0.001") && words.contains("attention"), "{words}");
    }
}
