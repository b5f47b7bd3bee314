//! Before the first update: the run's folder, its data, and the state it starts from.

use std::path::{Path, PathBuf};

use super::checkpoint::{Checkpoint, RunState};
use super::protocol::{Protocol, Request};
use super::statistics;
use crate::backend::LossScaling;
use crate::data::{Dataset, DatasetKind};
use crate::error::{Error, Result};
use crate::files::remove_leftovers;
use crate::model::Model;

/// Files of a run.
pub(super) struct Paths {
    pub folder: PathBuf,
    pub checkpoint: PathBuf,
    pub best: PathBuf,
    pub last: PathBuf,
    pub log: PathBuf,
    pub plot: PathBuf,
}

impl Paths {
    pub fn new(folder: &Path) -> Self {
        Paths {
            folder: folder.to_path_buf(),
            checkpoint: folder.join("checkpoint.safetensors"),
            best: folder.join("best.safetensors"),
            last: folder.join("last.safetensors"),
            log: folder.join("log.csv"),
            plot: folder.join("plot.png"),
        }
    }

    /// Whether there is a run to resume, as the request expects it.
    ///
    /// # Errors
    /// [`Error::Usage`] for a run where none is expected, or none where one is.
    pub fn holds_run(&self, request: &Request) -> Result<bool> {
        let exists = self.checkpoint.exists();
        match (request.resume, exists) {
            (true, true) | (false, false) => Ok(exists),
            (false, true) => Err(Error::Usage(format!(
                "{}: holds a run already; continue it with --resume, or choose another --out",
                self.folder.display()
            ))),
            (true, false) => Err(Error::Usage(format!(
                "--resume: {}: expected the checkpoint of a run, found none; leave --resume out \
                 to start one",
                self.checkpoint.display()
            ))),
        }
    }

    /// Removes what a killed session of this run left half written. Only under a
    /// [`Claim`](super::claim::Claim).
    pub fn tidy(&self) {
        for path in [&self.checkpoint, &self.best, &self.last, &self.log, &self.plot] {
            remove_leftovers(path);
        }
    }
}

/// Training data, validation data, and where to start.
pub(super) type Prepared = (Dataset, Option<Dataset>, Checkpoint);

fn open_val(request: &Request, protocol: &Protocol) -> Result<Option<Dataset>> {
    let open = |split: &String| {
        Dataset::open(protocol.dataset, &request.data, std::slice::from_ref(split))
    };
    protocol.val_split.as_ref().map(open).transpose()
}

/// Opens the data of a new run and makes its state before the first update.
pub(super) fn begin(request: &Request) -> Result<Prepared> {
    let kind = DatasetKind::asked_or_detected(request.dataset, &request.data)?;
    let splits = request.splits.clone().unwrap_or_else(|| vec!["train".into()]);
    let data = Dataset::open(kind, &request.data, &splits)?;
    let start = request.init_from.as_deref().map(Model::load).transpose()?;
    let base = start.as_ref().map(|m| &m.config);
    let protocol = Protocol::new(request, kind, data.classes.len(), base)?;
    check_enough(&data, &protocol)?;
    let val = open_val(request, &protocol)?;
    data.check_labelled()?;
    if let Some(val) = &val {
        val.check_labelled()?;
    }

    // A model that was trained with some normalisation keeps it.
    let (params, (mean, std)) = match start {
        Some(model) if model.config == protocol.config => (model.params, (model.mean, model.std)),
        Some(_) => {
            return Err(Error::Usage(
                "--init-from: expected the model file's own configuration, found switches that \
                 change it; leave them out"
                    .into(),
            ));
        }
        None => {
            let model = Model::init(protocol.config.clone(), protocol.seed)?;
            (model.params, statistics::mean_and_std(&data)?)
        }
    };
    let class_weights = protocol.class_weights.of(&data)?;
    let (_, trainable) = crate::graph::params::flat_len(&params.specs);
    let state = RunState {
        classes: data.classes.clone(),
        palette: data.palette.clone(),
        class_weights,
        mean,
        std,
        images: data.samples.len(),
        names_crc32: names_crc32(&data),
        epoch: 0,
        batch: 0,
        step: 0,
        loss_sum: 0.0,
        scaling: LossScaling::default(),
        seconds: 0.0,
        best: None,
        history: Vec::new(),
        protocol,
    };
    let zeros = vec![0.0; trainable];
    Ok((data, val, Checkpoint { state, params, moment1: zeros.clone(), moment2: zeros }))
}

/// Opens the data of an existing run and checks that it is the data of the checkpoint.
pub(super) fn resume(request: &Request, checkpoint: Checkpoint) -> Result<Prepared> {
    let state = &checkpoint.state;
    let protocol = &state.protocol;
    protocol.check_resume(request)?;
    let data = Dataset::open(protocol.dataset, &request.data, &protocol.splits)?;
    if data.samples.len() != state.images || names_crc32(&data) != state.names_crc32 {
        return Err(Error::Failed(format!(
            "{}: expected the {} training images that the run began with, found {} images or \
             other names; resume with the same data",
            request.data.display(),
            state.images,
            data.samples.len()
        )));
    }
    let val = open_val(request, protocol)?;
    Ok((data, val, checkpoint))
}

fn check_enough(data: &Dataset, protocol: &Protocol) -> Result<()> {
    if data.samples.len() < protocol.batch {
        return Err(Error::Usage(format!(
            "--batch: expected at most the {} images of {}, found {}",
            data.samples.len(),
            protocol.splits.join(","),
            protocol.batch
        )));
    }
    Ok(())
}

fn names_crc32(data: &Dataset) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    for sample in &data.samples {
        crc.update(sample.name.as_bytes());
        crc.update(b"\n");
    }
    crc.finalize()
}
