//! Data sets: CamVid and Cityscapes folders, decoding, augmentation, worker threads.
//!
//! [`Dataset::open`] lists and pairs the files, [`Dataset::load`] decodes one sample to an RGB
//! image and a plane of train ids (255 = void), [`augment`] warps a sample into network input,
//! [`loader`] does both on worker threads, in an order that depends on the seed alone.

pub mod augment;
pub mod camvid;
pub mod cityscapes;
pub mod decode;
pub mod loader;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use image::{GrayImage, RgbImage};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

pub use decode::LabelEncoding;

/// Label of pixels that neither the loss nor any metric counts.
pub const VOID: u8 = 255;

/// Folder layouts (and class lists) that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DatasetKind {
    /// `train/` with `trainannot/`, 11 classes.
    Camvid,
    /// `leftImg8bit/` with `gtFine/`, 19 classes.
    Cityscapes,
}

impl DatasetKind {
    /// Tells the layout of a folder.
    ///
    /// # Errors
    /// [`Error::Format`] where the folder is missing or has neither layout.
    pub fn detect(root: &Path) -> Result<DatasetKind> {
        const EXPECTED: &str =
            "a data set: CamVid (train/ and trainannot/) or Cityscapes (leftImg8bit/ and gtFine/)";
        if !root.is_dir() {
            return Err(Error::format(root, EXPECTED, "no such folder"));
        }
        if root.join("leftImg8bit").is_dir() {
            return Ok(DatasetKind::Cityscapes);
        }
        let annotated = |name: &String| name.ends_with("annot") && root.join(name).is_dir();
        if entries(root)?.iter().any(annotated) {
            return Ok(DatasetKind::Camvid);
        }
        Err(Error::format(root, EXPECTED, "neither layout; name it with --dataset if it is one"))
    }

    /// The layout that was asked for, else the one that [`DatasetKind::detect`] tells.
    ///
    /// # Errors
    /// As [`DatasetKind::detect`].
    pub fn asked_or_detected(asked: Option<DatasetKind>, root: &Path) -> Result<DatasetKind> {
        asked.map_or_else(|| DatasetKind::detect(root), Ok)
    }

    /// Class names and mask colours, by train id.
    pub fn classes(self) -> &'static [(&'static str, [u8; 3])] {
        match self {
            DatasetKind::Camvid => &camvid::CLASSES,
            DatasetKind::Cityscapes => &cityscapes::CLASSES,
        }
    }

    /// Whether the network works at half the images' size (paper, section 4.1: Cityscapes is
    /// trained at 1024x512 and its results are brought back to 2048x1024).
    pub fn halved(self) -> bool {
        self == DatasetKind::Cityscapes
    }
}

impl std::fmt::Display for DatasetKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DatasetKind::Camvid => "CamVid",
            DatasetKind::Cityscapes => "Cityscapes",
        })
    }
}

/// An image and its label file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// RGB image.
    pub image: PathBuf,
    /// Label PNG of the same size.
    pub label: PathBuf,
    /// Short name for logs: the image's file name without its extension.
    pub name: String,
    /// What the label file's values mean.
    pub encoding: LabelEncoding,
}

/// The samples of one or more splits of a data set.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Layout and class list.
    pub kind: DatasetKind,
    /// Folder it was opened from.
    pub root: PathBuf,
    /// Splits it holds, in the order asked for.
    pub splits: Vec<String>,
    /// Class names, by train id.
    pub classes: Vec<String>,
    /// Mask colour of each class.
    pub palette: Vec<[u8; 3]>,
    /// Samples: the splits one after the other, each in the order of its list or of its names.
    pub samples: Vec<Sample>,
}

impl Dataset {
    /// Lists the samples of `splits` (folder names such as `train`, `val`) under `root`.
    /// Only names are read; the images are decoded by [`Dataset::load`].
    ///
    /// # Errors
    /// [`Error::Usage`] for no split, a split named twice or one that is not a plain folder name;
    /// [`Error::Format`] for a missing folder, a split without images, an image without label or
    /// a label without image.
    pub fn open(kind: DatasetKind, root: &Path, splits: &[String]) -> Result<Dataset> {
        if splits.is_empty() {
            return Err(Error::Usage("splits: expected at least one, such as train".into()));
        }
        let mut samples = Vec::new();
        for (i, split) in splits.iter().enumerate() {
            check_split(split)?;
            if splits[..i].contains(split) {
                return Err(Error::Usage(format!("splits: {split} is named twice")));
            }
        }
        for split in splits {
            samples.extend(match kind {
                DatasetKind::Camvid => camvid::list(root, split)?,
                DatasetKind::Cityscapes => cityscapes::list(root, split)?,
            });
        }
        let (classes, palette) =
            kind.classes().iter().map(|(name, colour)| (name.to_string(), *colour)).unzip();
        let (root, splits) = (root.to_path_buf(), splits.to_vec());
        Ok(Dataset { kind, root, splits, classes, palette, samples })
    }

    /// Number of samples; never zero.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there is no sample (only in a set put together by hand).
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Refuses labels that are void throughout, of which nothing can be learned and nothing measured.
    /// Decodes label images up to the first with a labelled pixel, which is mostly the first of all.
    ///
    /// # Errors
    /// [`Error::Failed`] where no sample has a labelled pixel; an unreadable label image before one
    /// that has.
    pub fn check_labelled(&self) -> Result<()> {
        let labelled = |sample: &Sample| -> Result<bool> {
            let labels = decode::label(&sample.label, sample.encoding)?;
            Ok(labels.as_raw().iter().any(|label| *label != VOID))
        };
        let first = self.samples.par_iter().map(labelled).find_first(|l| !matches!(l, Ok(false)));
        first.unwrap_or_else(|| Err(self.only_void())).map(drop)
    }

    /// That no pixel of any sample is labelled.
    pub(crate) fn only_void(&self) -> Error {
        let such_as = |sample: &Sample| format!(", such as {}", sample.label.display());
        Error::Failed(format!(
            "{}: expected labelled pixels in {}, found only void in its {} label images{}; choose a \
             split whose labels are published, or mend these",
            self.root.display(),
            self.splits.join(","),
            self.len(),
            self.samples.first().map(such_as).unwrap_or_default()
        ))
    }

    /// Decodes one sample at its full size: the image, and per pixel a train id (an index into
    /// [`Dataset::classes`]) or [`VOID`].
    ///
    /// # Errors
    /// An unreadable or truncated file, a label that is not single-channel, a label value outside
    /// the class range, or sizes that differ.
    pub fn load(&self, index: usize) -> Result<(RgbImage, GrayImage)> {
        let sample = &self.samples[index];
        let image = decode::image(&sample.image)?;
        let label = decode::label(&sample.label, sample.encoding)?;
        if image.dimensions() != label.dimensions() {
            let (w, h) = image.dimensions();
            let (lw, lh) = label.dimensions();
            return Err(Error::format(
                &sample.label,
                format!("the size of its image {}, {w}x{h}", sample.image.display()),
                format!("{lw}x{lh}"),
            ));
        }
        Ok((image, label))
    }

    /// Decodes one sample at the size that training works from: as it is for CamVid, halved for
    /// Cityscapes (2x2 mean of the image, nearest label).
    ///
    /// # Errors
    /// As [`Dataset::load`].
    pub fn load_working(&self, index: usize) -> Result<(RgbImage, GrayImage)> {
        let (image, label) = self.load(index)?;
        Ok(match self.kind.halved() {
            true => (augment::halve(&image), augment::halve_labels(&label)),
            false => (image, label),
        })
    }

    /// Width and height that the network sees by default: those of the first image, halved for
    /// Cityscapes. Reads that file's header.
    ///
    /// # Errors
    /// The file cannot be read or is no image.
    pub fn working_size(&self) -> Result<(usize, usize)> {
        let Some(first) = self.samples.first() else {
            return Err(Error::Failed(format!("{}: no samples", self.root.display())));
        };
        let (w, h) = decode::image_size(&first.image)?;
        Ok(working_size(self.kind, w, h))
    }
}

/// Names and files of a split's images, in the order of its list or of its names. Labels need not
/// be there: test splits have none.
///
/// # Errors
/// [`Error::Usage`] for a split that is not a plain folder name; [`Error::Format`] for a missing
/// folder or a split without images.
pub fn images(kind: DatasetKind, root: &Path, split: &str) -> Result<Vec<(String, PathBuf)>> {
    check_split(split)?;
    match kind {
        DatasetKind::Camvid => camvid::images(root, split),
        DatasetKind::Cityscapes => cityscapes::images(root, split),
    }
}

fn check_split(split: &str) -> Result<()> {
    if !split.is_empty() && !split.contains(['/', '\\']) && split != ".." {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "splits: expected a folder name such as train or val, found {split:?}"
    )))
}

/// Size that the network sees for an image of `w` x `h`.
pub fn working_size(kind: DatasetKind, w: usize, h: usize) -> (usize, usize) {
    if kind.halved() { (w.div_ceil(2), h.div_ceil(2)) } else { (w, h) }
}

/// Names in a folder, sorted, hidden ones left out.
fn entries(folder: &Path) -> Result<BTreeSet<String>> {
    let failed = |e| Error::io("cannot list folder", folder, e);
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            names.insert(name);
        }
    }
    Ok(names)
}

/// A file name without its extension.
fn stem(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}
