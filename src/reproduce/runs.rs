//! Training runs of a reproduction: a folder each, finished ones kept, begun ones continued, and
//! ones that were made with other settings refused.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use serde_json::{Map, Value};

use crate::config::ModelConfig;
use crate::data::{Dataset, DatasetKind};
use crate::error::{Error, Result};
use crate::files::create_folder;
use crate::train::{Checkpoint, EpochRecord, Observer, Protocol, Request, train};

/// A network to train, and the name of its folder.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Folder below the runs' folder; runs of the same name are one run, whichever tables they
    /// stand in.
    pub folder: String,
    /// What makes it different from the others, in words.
    pub label: String,
    /// Its switches over the common ones, by their names in the SPEC's JSON.
    pub switches: Map<String, Value>,
}

/// A finished run.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Finished {
    /// Folder of the run.
    #[serde(serialize_with = "in_words")]
    pub folder: PathBuf,
    /// Settings it was made with.
    pub protocol: Protocol,
    /// Its last epoch.
    pub last: EpochRecord,
}

/// A path may hold what JSON cannot; serde's own way is to fail then.
fn in_words<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// What is known of a job before any work.
#[derive(Debug, Clone)]
pub enum State {
    /// Nothing is there.
    New,
    /// Begun with the same settings; so many epochs are done.
    Begun(usize),
    /// Done with the same settings.
    Finished(Box<Finished>),
}

/// The runs of one folder with their common settings.
pub struct Runs<'a> {
    common: &'a Request,
    folder: PathBuf,
    kind: DatasetKind,
    classes: usize,
    images: usize,
}

impl<'a> Runs<'a> {
    /// `common` is what all runs are made with: its `out` is the reproduction's folder, the runs
    /// go to `runs` below it.
    ///
    /// # Errors
    /// Data that cannot be listed.
    pub fn new(common: &'a Request) -> Result<Self> {
        let kind = DatasetKind::asked_or_detected(common.dataset, &common.data)?;
        let splits = common.splits.clone().unwrap_or_else(|| vec!["train".into()]);
        let data = Dataset::open(kind, &common.data, &splits)?;
        let classes = data.classes.len();
        Ok(Runs { common, folder: common.out.join("runs"), kind, classes, images: data.len() })
    }

    /// Number of classes of the data.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// Layout of the data.
    pub fn kind(&self) -> DatasetKind {
        self.kind
    }

    /// Training images.
    pub fn images(&self) -> usize {
        self.images
    }

    /// The network of a job.
    ///
    /// # Errors
    /// [`Error::Usage`] for switches or settings out of range.
    pub fn config(&self, job: &Job) -> Result<ModelConfig> {
        Ok(self.protocol(job)?.config)
    }

    /// Settings of a job, every default filled in.
    ///
    /// # Errors
    /// As [`Runs::config`].
    pub fn protocol(&self, job: &Job) -> Result<Protocol> {
        Protocol::new(&self.request(job), self.kind, self.classes, None)
    }

    fn request(&self, job: &Job) -> Request {
        let mut request = self.common.clone();
        request.out = self.path(job);
        request.dataset = Some(self.kind);
        request.config.extend(job.switches.clone());
        request
    }

    fn path(&self, job: &Job) -> PathBuf {
        self.folder.join(&job.folder)
    }

    /// Where a job stands.
    ///
    /// # Errors
    /// [`Error::Usage`] for a run that was made with other settings, naming them; a checkpoint
    /// that cannot be read.
    pub fn state(&self, job: &Job) -> Result<State> {
        let folder = self.path(job);
        let path = folder.join("checkpoint.safetensors");
        if !path.exists() {
            return Ok(State::New);
        }
        let kept = Checkpoint::load(&path)?.state;
        let asked = self.protocol(job)?;
        let mut differences = differences(&kept.protocol, &asked);
        if kept.images != self.images {
            differences.push(format!("{} training images, now {}", kept.images, self.images));
        }
        if !differences.is_empty() {
            return Err(Error::Usage(format!(
                "{}: holds a run made with {}; repeat those settings, choose another --out, or \
                 delete that folder to train it again",
                folder.display(),
                differences.join(", ")
            )));
        }
        match kept.history.last() {
            Some(last) if kept.epoch >= asked.epochs => Ok(State::Finished(Box::new(Finished {
                folder,
                protocol: kept.protocol.clone(),
                last: last.clone(),
            }))),
            _ => Ok(State::Begun(kept.epoch)),
        }
    }

    /// Trains a job to its end, from where it stands; none when stopped on the way.
    ///
    /// # Errors
    /// As [`Runs::state`] and [`train`].
    pub fn finish(
        &self,
        job: &Job,
        stop: &AtomicBool,
        observer: &mut dyn Observer,
    ) -> Result<Option<Finished>> {
        let mut request = self.request(job);
        request.resume = match self.state(job)? {
            State::Finished(done) => return Ok(Some(*done)),
            State::Begun(_) => true,
            State::New => false,
        };
        let _made = create_folder(&self.folder)?;
        if !train(&request, stop, observer)?.finished {
            return Ok(None);
        }
        match self.state(job)? {
            State::Finished(done) => Ok(Some(*done)),
            _ => Err(Error::Failed(format!(
                "{}: expected a finished run in the checkpoint, found an unfinished one",
                self.path(job).display()
            ))),
        }
    }
}

/// `key kept, now asked` for every setting that differs.
fn differences(kept: &Protocol, asked: &Protocol) -> Vec<String> {
    let object = |protocol: &Protocol| {
        let mut flat = Map::new();
        for (key, value) in
            serde_json::to_value(protocol).unwrap_or_default().as_object().unwrap_or(&Map::new())
        {
            match value {
                Value::Object(inner) => flat.extend(inner.clone()),
                value => {
                    flat.insert(key.clone(), value.clone());
                }
            }
        }
        flat
    };
    let (kept, asked) = (object(kept), object(asked));
    let none = Value::Null;
    let changed = asked.iter().filter(|(key, value)| kept.get(*key).unwrap_or(&none) != *value);
    changed
        .map(|(key, now)| format!("{key} {}, now {now}", kept.get(key).unwrap_or(&none)))
        .collect()
}

/// The settings in one sentence, for the head of a table.
pub fn describe(protocol: &Protocol, images: usize, data: &Path) -> String {
    let (width, height) = protocol.size;
    let data = data.file_name().unwrap_or(data.as_os_str()).to_string_lossy();
    format!(
        "{} ({data}), {images} images of {}; {} epochs of batches of {}, {width}x{height}, \
         learning rate {}, rotation {}, scale {} to {}, seed {}, {} attention, {} blocks.",
        protocol.dataset,
        protocol.splits.join("+"),
        protocol.epochs,
        protocol.batch,
        protocol.lr,
        protocol.rotation,
        protocol.scale.0,
        protocol.scale.1,
        protocol.seed,
        word(&protocol.config.attention),
        word(&protocol.config.block_activation),
    )
}

/// A switch's value as it is written on the command line.
fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(String::from)).unwrap_or_default()
}
