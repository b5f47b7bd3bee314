//! `checkpoint.safetensors`: everything a run needs to continue bit for bit.
//!
//! Tensors: every parameter and running statistic under its SPEC name, Adam's moments under
//! `moment1.NAME` and `moment2.NAME` for the trainable ones. Metadata: `format`, `state` (JSON of
//! [`RunState`]) and `crc32` over the tensors' bytes, since safetensors itself notices a
//! truncated file but not a damaged one.
//!
//! No generator state is kept: shuffling and augmentation derive theirs from
//! (seed, epoch, sample), and both coordinates are in the state.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, View};
use safetensors::{SafeTensors, serialize};
use serde::{Deserialize, Serialize};

use super::class_weights::ClassWeights;
use super::history::EpochRecord;
use super::protocol::Protocol;
use crate::backend::LossScaling;
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::graph::params::flat_len;
use crate::graph::{Graph, ParamStore};

const FORMAT: &str = "fpenet-checkpoint-1";
const EXPECTED: &str = "a training checkpoint of fpenet";

/// Where a run stands, apart from its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Settings that decide the weights.
    pub protocol: Protocol,
    /// Class names of the dataset.
    pub classes: Vec<String>,
    /// Class colours.
    pub palette: Vec<[u8; 3]>,
    /// Weight of each class in the loss; none where all count alike.
    #[serde(default)]
    pub class_weights: Vec<f32>,
    /// Channel means of the training images (RGB, 0 to 1).
    pub mean: [f32; 3],
    /// Channel deviations of the training images.
    pub std: [f32; 3],
    /// Images trained on, and a checksum of their names: a changed dataset is noticed.
    pub images: usize,
    /// CRC-32 of the names of the training images, in order.
    pub names_crc32: u32,
    /// Finished epochs.
    pub epoch: usize,
    /// Batches of the current epoch that are done.
    pub batch: usize,
    /// Updates since the start.
    pub step: u64,
    /// Sum of the losses of the current epoch's batches so far.
    pub loss_sum: f64,
    /// Loss scaling of half precision.
    #[serde(default)]
    pub scaling: LossScaling,
    /// Seconds spent on the current epoch's batches so far.
    pub seconds: f64,
    /// Epoch and mIoU of the best validation.
    pub best: Option<(usize, f64)>,
    /// Finished epochs' figures.
    pub history: Vec<EpochRecord>,
}

/// A run at a moment between two updates.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Everything but the tensors.
    pub state: RunState,
    /// Parameters and running statistics.
    pub params: ParamStore,
    /// Adam's first moment, flat.
    pub moment1: Vec<f32>,
    /// Adam's second moment, flat.
    pub moment2: Vec<f32>,
}

struct Record<'a> {
    shape: &'a [usize],
    data: &'a [f32],
}

impl View for &Record<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(bytemuck::cast_slice(self.data))
    }

    fn data_len(&self) -> usize {
        size_of_val(self.data)
    }
}

impl Checkpoint {
    /// Writes the checkpoint; an existing one is replaced only once the new one is on disk.
    ///
    /// # Errors
    /// A value that is not finite (the existing checkpoint is kept), or an unwritable file.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.params.check_finite()?;
        for (name, moment) in [("moment1", &self.moment1), ("moment2", &self.moment2)] {
            if let Some(v) = moment.iter().find(|v| !v.is_finite()) {
                return Err(Error::Failed(format!("Adam's {name} holds {v}")));
            }
        }
        let mut records: Vec<(String, Record)> = Vec::new();
        for spec in &self.params.specs {
            let values = &self.params.values[spec.range()];
            records.push((spec.name.clone(), Record { shape: &spec.shape, data: values }));
            if spec.role.trainable() {
                for (prefix, moment) in [("moment1", &self.moment1), ("moment2", &self.moment2)] {
                    let data = &moment[spec.range()];
                    records.push((
                        format!("{prefix}.{}", spec.name),
                        Record { shape: &spec.shape, data },
                    ));
                }
            }
        }
        // The order in the file, so that the checksum can be taken over the bytes as they lie.
        records.sort_by(|a, b| a.0.cmp(&b.0));
        let mut crc = crc32fast::Hasher::new();
        records.iter().for_each(|(_, r)| crc.update(bytemuck::cast_slice(r.data)));
        let state = serde_json::to_string(&self.state)
            .map_err(|e| Error::Failed(format!("{}: cannot encode: {e}", path.display())))?;
        let metadata = HashMap::from([
            ("format".to_string(), FORMAT.to_string()),
            ("crc32".to_string(), format!("{:08x}", crc.finalize())),
            ("state".to_string(), state),
        ]);
        let bytes = serialize(records.iter().map(|(name, r)| (name, r)), Some(metadata))
            .map_err(|e| Error::Failed(format!("{}: cannot encode: {e}", path.display())))?;
        write_atomic(path, |file| file.write_all(&bytes))
    }

    /// Reads a checkpoint.
    ///
    /// # Errors
    /// An unreadable file, or one that is no checkpoint, truncated, damaged, or whose tensors
    /// are not those of its own configuration.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io("cannot read", path, e))?;
        let damaged = |found: String| Error::format(path, EXPECTED, found);
        let (header, metadata) = SafeTensors::read_metadata(&bytes)
            .map_err(|e| damaged(format!("no valid safetensors header ({e})")))?;
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|e| damaged(format!("a truncated or damaged file ({e})")))?;
        let entry = |key: &str| metadata.metadata().as_ref().and_then(|m| m.get(key));
        match entry("format") {
            Some(format) if format == FORMAT => {}
            found => return Err(damaged(format!("format {found:?}, not {FORMAT:?}"))),
        }
        // Eight bytes of length precede the header.
        let sum = format!("{:08x}", crc32fast::hash(&bytes[8 + header..]));
        if entry("crc32") != Some(&sum) {
            return Err(damaged("tensor data that do not match their checksum".into()));
        }
        let state = entry("state").ok_or_else(|| damaged("no `state` in the metadata".into()))?;
        let state: RunState = serde_json::from_str(state)
            .map_err(|e| damaged(format!("an unreadable state ({e})")))?;
        let weights = match state.protocol.class_weights {
            ClassWeights::None => 0,
            _ => state.classes.len(),
        };
        if state.class_weights.len() != weights {
            let found = state.class_weights.len();
            return Err(damaged(format!("{found} class weights instead of {weights}")));
        }

        let specs = Graph::fpenet(&state.protocol.config)
            .map_err(|e| damaged(format!("an invalid configuration ({e})")))?
            .params;
        let (_, trainable) = flat_len(&specs);
        let mut params = ParamStore::zeros(&specs);
        let mut moments = [vec![0.0; trainable], vec![0.0; trainable]];
        let read = |name: &str, shape: &[usize], out: &mut [f32]| -> Result<()> {
            let tensor = tensors.tensor(name).map_err(|_| damaged(format!("no tensor {name}")))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
                return Err(damaged(format!(
                    "tensor {name} of {:?} {:?} instead of F32 {shape:?}",
                    tensor.dtype(),
                    tensor.shape()
                )));
            }
            bytemuck::cast_slice_mut(out).copy_from_slice(tensor.data());
            Ok(())
        };
        for spec in &specs {
            read(&spec.name, &spec.shape, &mut params.values[spec.range()])?;
            if spec.role.trainable() {
                for (prefix, moment) in ["moment1", "moment2"].iter().zip(&mut moments) {
                    let name = format!("{prefix}.{}", spec.name);
                    read(&name, &spec.shape, &mut moment[spec.range()])?;
                }
            }
        }
        let [moment1, moment2] = moments;
        Ok(Checkpoint { state, params, moment1, moment2 })
    }
}
