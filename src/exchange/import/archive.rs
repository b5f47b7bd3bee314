//! Files of named tensors: safetensors and npz.

use std::io::{Cursor, Read};
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors};
use zip::ZipArchive;

use crate::error::{Error, Result};
use crate::files;
use crate::model::npy;
use crate::model::tensors::describe;

/// Largest file, and largest tensor within a compressed one, that is read.
const MAX_FILE: u64 = 1 << 30;

const EXPECTED: &str = "a safetensors or npz file";
/// For files that `torch.save` wrote: pickles, which run code when they are read.
const PICKLE: &str = "a PyTorch pickle; write it in Python with \
                      safetensors.torch.save_file(model.state_dict(), \"weights.safetensors\")";

/// Reads a whole file for [`Weights::parse`].
///
/// # Errors
/// [`Error::Io`], or [`Error::Format`] for a file above 1 GiB.
pub fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    files::read_limited(path, MAX_FILE)
}

/// One tensor of a file.
pub(super) struct Tensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
    /// What it was stored as: `f16`, `bf16`, `f32`, `f64`.
    pub kind: &'static str,
}

/// A file of named tensors, told by its content.
pub struct Weights<'a> {
    path: &'a Path,
    format: Format<'a>,
    names: Vec<String>,
}

enum Format<'a> {
    Safetensors(SafeTensors<'a>),
    Npz(ZipArchive<Cursor<&'a [u8]>>),
}

impl<'a> Weights<'a> {
    /// Parses the table of contents of what [`read_bytes`] returned; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Format`] for anything but a complete safetensors or npz file.
    pub fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let wrong = |found: String| Error::format(path, EXPECTED, found);
        if bytes.starts_with(b"PK") {
            let archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| wrong(e.to_string()))?;
            let mut names = Vec::new();
            for name in archive.file_names() {
                let name = name.map_err(|e| wrong(e.to_string()))?;
                if name.ends_with("data.pkl") {
                    return Err(wrong(PICKLE.to_string()));
                }
                let Some(array) = name.strip_suffix(".npy") else {
                    let found = format!("a zip archive with \"{}\" in it", name.escape_debug());
                    return Err(wrong(found));
                };
                names.push(array.to_string());
            }
            names.sort();
            return Ok(Weights { path, format: Format::Npz(archive), names });
        }
        // What torch.save wrote before it wrote zip archives: a pickle of protocol 2 and up.
        if matches!(bytes, [0x80, 2..=5, ..]) && bytes.get(8) != Some(&b'{') {
            return Err(wrong(PICKLE.to_string()));
        }
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| wrong(describe(&e, bytes)))?;
        let mut names: Vec<String> = tensors.names().into_iter().map(ToString::to_string).collect();
        names.sort();
        Ok(Weights { path, format: Format::Safetensors(tensors), names })
    }

    /// The file.
    pub fn path(&self) -> &'a Path {
        self.path
    }

    /// Names of its tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// `safetensors` or `npz`.
    pub fn format(&self) -> &'static str {
        match self.format {
            Format::Safetensors(_) => "safetensors",
            Format::Npz(_) => "npz",
        }
    }

    /// One of its tensors, as f32.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor> {
        match &self.format {
            Format::Safetensors(tensors) => self.safetensor(tensors, name),
            Format::Npz(archive) => self.array(archive, name),
        }
    }

    fn safetensor(&self, tensors: &SafeTensors, name: &str) -> Result<Tensor> {
        let wrong = |found: String| {
            Error::format(self.path, format!("tensor {name} of f16, bf16, f32 or f64"), found)
        };
        let view = tensors.tensor(name).map_err(|e| wrong(e.to_string()))?;
        let data = view.data();
        let (kind, values) = match view.dtype() {
            Dtype::F32 => {
                ("f32", data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
            Dtype::F64 => {
                ("f64", data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect())
            }
            Dtype::F16 => {
                let half = |b: &[u8; 2]| f16::from_le_bytes(*b).to_f32();
                ("f16", data.as_chunks().0.iter().map(half).collect())
            }
            Dtype::BF16 => {
                let half = |b: &[u8; 2]| bf16::from_le_bytes(*b).to_f32();
                ("bf16", data.as_chunks().0.iter().map(half).collect())
            }
            other => return Err(wrong(other.to_string())),
        };
        Ok(Tensor { shape: view.shape().to_vec(), values, kind })
    }

    fn array(&self, archive: &ZipArchive<Cursor<&[u8]>>, name: &str) -> Result<Tensor> {
        let member = self.path.join(format!("{name}.npy"));
        let wrong = |found: String| Error::format(&member, "a NumPy array", found);
        // A clone shares the table of contents.
        let mut archive = archive.clone();
        let file = archive.by_name(&format!("{name}.npy")).map_err(|e| wrong(e.to_string()))?;
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| wrong(e.to_string()))?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(wrong(format!("more than {MAX_FILE} bytes")));
        }
        let (shape, values, kind) = npy::parse_floats(&bytes, &member)?;
        Ok(Tensor { shape, values, kind })
    }
}
