//! Parameter tables in safetensors files: models, gradients, checkpoints.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors, TensorInfo, View};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::graph::{ParamRole, ParamSpec, ParamStore};

/// Largest file that is read: hundreds of times the largest network that a config allows.
const MAX_FILE: u64 = 1 << 30;

/// Which parameters a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// All, running statistics included.
    All,
    /// Those that the optimiser updates: what has a gradient.
    Trainable,
}

impl Selection {
    /// Whether a parameter is among them.
    pub fn holds(self, spec: &ParamSpec) -> bool {
        self == Selection::All || spec.role.trainable()
    }
}

/// Reads a whole safetensors file, for [`TensorFile::parse`].
///
/// # Errors
/// [`Error::Io`], or [`Error::Format`] for a file above 1 GiB.
pub fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    files::read_limited(path, MAX_FILE)
}

/// A parsed safetensors file.
pub struct TensorFile<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
    metadata: HashMap<String, String>,
}

impl<'a> TensorFile<'a> {
    /// Parses what [`read_bytes`] returned; `path` is for error messages.
    ///
    /// # Errors
    /// [`Error::Format`] for anything but a complete safetensors file.
    pub fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let wrong = |e| Error::format(path, "a safetensors file", describe(&e, bytes));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(wrong)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(wrong)?;
        Ok(TensorFile { path, tensors, metadata: header.metadata().clone().unwrap_or_default() })
    }

    /// A metadata entry.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The values of a parameter table. The file must hold exactly the tensors of `selection`,
    /// each f32, of the table's shape and finite, with variances that are not negative. What is
    /// not selected is zero. PyTorch's `num_batches_tracked` counters are passed over.
    ///
    /// # Errors
    /// [`Error::Format`] naming the tensor, what was expected and what was found.
    pub fn params(&self, specs: &[ParamSpec], selection: Selection) -> Result<ParamStore> {
        let mut store = ParamStore::zeros(specs);
        let wrong = |expected, found| Error::format(self.path, expected, found);
        for spec in specs.iter().filter(|spec| selection.holds(spec)) {
            let name = &spec.name;
            let shape = dimensions(&spec.shape);
            let tensor = self.tensors.tensor(name).map_err(|_| {
                wrong(format!("a tensor {name} of shape {shape}"), "none of that name".to_string())
            })?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != spec.shape {
                let found = format!("{} {}", tensor.dtype(), dimensions(tensor.shape()));
                return Err(wrong(format!("tensor {name} to be F32 {shape}"), found));
            }
            let values = &mut store.values[spec.range()];
            for (value, bytes) in values.iter_mut().zip(tensor.data().as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
            let variance = spec.role == ParamRole::RunningVar;
            let bad = |v: &f32| !v.is_finite() || (variance && *v < 0.0);
            if let Some(i) = values.iter().position(bad) {
                let kind = if variance { "finite, not negative" } else { "finite" };
                let expected = format!("tensor {name} to hold {kind} values");
                return Err(wrong(expected, format!("{} at element {i}", values[i])));
            }
        }
        let known = |name: &str| {
            name.ends_with("num_batches_tracked")
                || specs.iter().any(|spec| spec.name == name && selection.holds(spec))
        };
        let extra = self.tensors.names().into_iter().filter(|name| !known(name)).min();
        match extra {
            Some(name) => Err(wrong(
                "only the tensors of the config".to_string(),
                format!("an extra tensor {name}"),
            )),
            None => Ok(store),
        }
    }
}

/// Writes a parameter table, as a whole or not at all. The same values give the same bytes.
///
/// # Errors
/// [`Error::Io`] where it cannot be written.
pub fn write_params(
    path: &Path,
    store: &ParamStore,
    selection: Selection,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    files::write_atomic(path, |w| write_params_to(w, store, selection, metadata))
}

/// [`write_params`] into a pipe.
///
/// # Errors
/// Those of `w`.
pub fn write_params_to(
    w: &mut dyn Write,
    store: &ParamStore,
    selection: Selection,
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let specs = store.specs.iter().filter(|spec| selection.holds(spec));
    let views = specs.map(|spec| {
        (&spec.name, Values { shape: &spec.shape, values: &store.values[spec.range()] })
    });
    let bytes = safetensors::serialize(views, None).map_err(io::Error::other)?;
    let (length, header) = SafeTensors::read_metadata(&bytes).map_err(io::Error::other)?;
    let header = sorted_header(&header, metadata);
    w.write_all(&(header.len() as u64).to_le_bytes())?;
    w.write_all(&header)?;
    w.write_all(&bytes[8 + length..])
}

/// The crate keeps metadata in a hash map, whose order changes from run to run; here keys are
/// sorted, so that one model always gives one file.
fn sorted_header(header: &Metadata, metadata: &BTreeMap<String, String>) -> Vec<u8> {
    #[derive(Serialize, Deserialize)]
    struct Header<'a> {
        #[serde(rename = "__metadata__")]
        metadata: Cow<'a, BTreeMap<String, String>>,
        #[serde(flatten)]
        tensors: BTreeMap<String, TensorInfo>,
    }
    let tensors = header.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
    let sorted = Header { metadata: Cow::Borrowed(metadata), tensors };
    let mut bytes = serde_json::to_vec(&sorted).expect("maps with string keys serialise");
    // The format wants the data aligned to 8 bytes and allows spaces before it.
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    bytes
}

struct Values<'a> {
    shape: &'a [usize],
    values: &'a [f32],
}

impl View for Values<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if cfg!(target_endian = "little") {
            Cow::Borrowed(bytemuck::cast_slice(self.values))
        } else {
            Cow::Owned(self.values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

/// `16 x 3 x 3 x 3`; a scalar is `scalar`.
pub(crate) fn dimensions(shape: &[usize]) -> String {
    match shape {
        [] => "scalar".to_string(),
        _ => shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x "),
    }
}

/// The crate's error in words that tell a damaged file from one of another kind.
pub(crate) fn describe(error: &SafeTensorError, bytes: &[u8]) -> String {
    match error {
        _ if bytes.is_empty() => "an empty file".to_string(),
        SafeTensorError::MetadataIncompleteBuffer => {
            format!("{} bytes, not the length that its header tells: cut off?", bytes.len())
        }
        SafeTensorError::InvalidHeaderLength | SafeTensorError::HeaderTooSmall => {
            format!("{} bytes, too short for its header: cut off or no safetensors", bytes.len())
        }
        SafeTensorError::HeaderTooLarge => "something else (no header length)".to_string(),
        other => other.to_string(),
    }
}
