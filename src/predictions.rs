//! Predictions as label PNGs in a folder, as benchmark servers take them.
//!
//! For Cityscapes: `CITY_SEQUENCE_FRAME_pred_labelIds.png`, 8-bit grey, label ids (not train ids)
//! at the image's full size; its server and cityscapesScripts look for
//! `CITY_SEQUENCE_FRAME*.png`. For CamVid: `NAME.png`, class indices 0 to 10.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crossbeam_channel::bounded;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::data::augment::Normalise;
use crate::data::{self, DatasetKind, cityscapes, decode};
use crate::error::{Error, Result};
use crate::evaluate::check_classes;
use crate::files::{MadeFolder, create_folder, read_limited, write_atomic};
use crate::model::Model;
use crate::predict::{AHEAD, Input, Predictor, prepare_all};

/// What a folder of predictions was made with, kept beside them as `predictions.json` so that a
/// later call continues only what it would have made itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// CRC-32 of the model's weights and configuration.
    pub model_crc32: u32,
    /// Layout of the data.
    pub dataset: DatasetKind,
    /// Split.
    pub split: String,
    /// Size asked for, where one was.
    pub size: Option<(usize, usize)>,
}

/// Name of the file that holds an [`Origin`].
pub const ORIGIN: &str = "predictions.json";

/// What a call did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Files written now.
    pub written: usize,
    /// Files that were there from an earlier call.
    pub kept: usize,
    /// Device in words; empty where nothing was left to do.
    pub device: String,
}

/// File name of a frame's prediction.
pub fn file_name(kind: DatasetKind, frame: &str) -> String {
    match kind {
        DatasetKind::Camvid => format!("{frame}.png"),
        DatasetKind::Cityscapes => format!("{frame}_pred_labelIds.png"),
    }
}

/// Which images, and where their predictions go.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// Layout of the data.
    pub kind: DatasetKind,
    /// Root folder of the data.
    pub root: &'a Path,
    /// Split.
    pub split: &'a str,
    /// Width and height at which the network runs; by default the images', half for Cityscapes.
    pub size: Option<(usize, usize)>,
    /// Folder for the PNGs, created where missing.
    pub out: &'a Path,
}

/// Writes the prediction of every image of a split, each file whole or not at all, and skips
/// those that an earlier call with the same model, split and size has written. `progress` hears
/// the number of files that are there and of all.
///
/// # Errors
/// [`Error::Usage`] for a model of another number of classes or a folder of other predictions;
/// unreadable images, unwritable files, what the device says.
pub fn write(
    model: &Model,
    job: Job,
    open: &mut dyn FnMut() -> Result<Box<dyn Backend>>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Written> {
    let Job { kind, root, split, size, out } = job;
    check_classes(model, kind, root)?;
    let images = data::images(kind, root, split)?;
    let names = unique(kind, &images)?;
    let origin = Origin { model_crc32: crc32(model), dataset: kind, split: split.into(), size };
    let (_made, claimed) = claim(out, &origin)?;

    let total = names.len();
    let open_work: Vec<(PathBuf, &Path)> = names
        .into_iter()
        .map(|(name, image)| (out.join(name), image))
        .filter(|(file, _)| !file.exists())
        .collect();
    let kept = total - open_work.len();
    let table: Vec<u8> = (0..model.config.classes as u8)
        .map(|class| match kind {
            DatasetKind::Camvid => class,
            // Every class of the data set has a label id.
            DatasetKind::Cityscapes => cityscapes::label_id(class).unwrap_or(0),
        })
        .collect();
    let normalise = Normalise::new(model.mean, model.std);
    let mut predictor = Predictor::new(model, open);
    let mut labels = Vec::new();
    let mut written = 0;
    let work = &open_work;
    let prepare = |i: usize| Input::new(&decode::image(work[i].1)?, kind, size, &normalise);
    let result = std::thread::scope(|scope| -> Result<()> {
        let (sender, receiver) = bounded(AHEAD);
        scope.spawn(move || prepare_all(work.len(), prepare, &sender));
        for (i, input) in receiver.into_iter().enumerate() {
            let input = input?;
            predictor.labels(&input, &mut labels)?;
            labels.iter_mut().for_each(|label| *label = table[usize::from(*label)]);
            write_png(&work[i].0, &labels, input.full)?;
            written += 1;
            progress(kept + written, total);
        }
        Ok(())
    });
    if result.is_err() && claimed && written == 0 {
        // It would refuse the next model for the sake of predictions that are not there.
        let _ = std::fs::remove_file(out.join(ORIGIN));
    }
    result.map(|()| Written { written, kept, device: predictor.device() })
}

/// Files by name: two images of one name would overwrite each other's prediction.
fn unique(kind: DatasetKind, images: &[(String, PathBuf)]) -> Result<BTreeMap<String, &Path>> {
    let mut names = BTreeMap::new();
    for (frame, path) in images {
        if let Some(other) = names.insert(file_name(kind, frame), path.as_path()) {
            let expected = "every frame name once in a split";
            return Err(Error::format(path, expected, format!("{} as well", other.display())));
        }
    }
    Ok(names)
}

/// Makes the folder this call's own, or refuses one that holds something else's predictions. Says
/// whether it was this call that claimed it.
fn claim(out: &Path, origin: &Origin) -> Result<(MadeFolder, bool)> {
    let made = create_folder(out)?;
    let path = out.join(ORIGIN);
    if path.exists() {
        let bytes = read_limited(&path, 1 << 16)?;
        let found: Origin = serde_json::from_slice(&bytes).map_err(|e| {
            Error::format(&path, "what earlier predictions were made with", e.to_string())
        })?;
        if found == *origin {
            return Ok((made, false));
        }
        return Err(Error::Usage(format!(
            "--out {}: holds predictions of another model, split or size ({ORIGIN}); choose another \
             folder, or delete this one",
            out.display()
        )));
    }
    write_atomic(&path, |file| {
        serde_json::to_writer_pretty(&mut *file, origin)?;
        file.write_all(b"\n")
    })?;
    Ok((made, true))
}

fn crc32(model: &Model) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(bytemuck::cast_slice(&model.params.values));
    crc.update(serde_json::to_string(&model.config).unwrap_or_default().as_bytes());
    crc.update(bytemuck::cast_slice(&[model.mean, model.std]));
    crc.finalize()
}

fn write_png(path: &Path, labels: &[u8], (w, h): (usize, usize)) -> Result<()> {
    write_atomic(path, |file| {
        let mut encoder = png::Encoder::new(file, w as u32, h as u32);
        encoder.set_color(png::ColorType::Grayscale);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(labels)?;
        writer.finish().map_err(Into::into)
    })
}
