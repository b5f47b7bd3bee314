//! Cityscapes' fine annotations: `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` with
//! `gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png` or `*_gtFine_labelIds.png`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{LabelEncoding, Sample, VOID, entries};
use crate::error::{Error, Result};

pub use crate::model::classes::CITYSCAPES as CLASSES;

/// Label id (0 to 33, the values of `labelIds` files) to train id.
pub const TRAIN_IDS: [u8; 34] = {
    // Label id of each train id, in order.
    const LABEL_IDS: [u8; 19] =
        [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33];
    let mut table = [VOID; 34];
    let mut train_id = 0;
    while train_id < LABEL_IDS.len() {
        table[LABEL_IDS[train_id] as usize] = train_id as u8;
        train_id += 1;
    }
    table
};

const IMAGE_SUFFIX: &str = "_leftImg8bit.png";
/// Label files by preference: train ids need no mapping, so a set that has them prefers them.
const LABEL_SUFFIXES: [(&str, LabelEncoding); 2] = [
    ("_gtFine_labelTrainIds.png", LabelEncoding::CityscapesTrainIds),
    ("_gtFine_labelIds.png", LabelEncoding::CityscapesIds),
];

/// Label id of a train id: what the test server and cityscapesScripts take.
pub fn label_id(train_id: u8) -> Option<u8> {
    let place = (train_id != VOID).then(|| TRAIN_IDS.iter().position(|t| *t == train_id));
    place.flatten().map(|id| id as u8)
}

fn split_folder(root: &Path, part: &str, split: &str, role: &str) -> Result<PathBuf> {
    let folder = root.join(part).join(split);
    if folder.is_dir() {
        return Ok(folder);
    }
    Err(Error::format(
        folder,
        format!("the folder of Cityscapes' {role} of split {split}"),
        "no such folder",
    ))
}

/// Images by `CITY/FRAME`.
fn image_frames(folder: &Path) -> Result<BTreeMap<String, (usize, PathBuf)>> {
    let images = frames(folder, &[IMAGE_SUFFIX])?;
    if images.is_empty() {
        return Err(Error::format(folder, format!("images CITY/*{IMAGE_SUFFIX}"), "none of them"));
    }
    Ok(images)
}

/// Frames of a split and their images, sorted by city and name; labels are not asked for.
///
/// # Errors
/// A missing folder or one without images.
pub(super) fn images(root: &Path, split: &str) -> Result<Vec<(String, PathBuf)>> {
    let images = image_frames(&split_folder(root, "leftImg8bit", split, "images")?)?;
    Ok(images.into_iter().map(|(frame, (_, path))| (short(&frame), path)).collect())
}

/// `CITY/FRAME` without the city, which the frame's name begins with.
fn short(frame: &str) -> String {
    frame.rsplit('/').next().unwrap_or(frame).to_string()
}

/// Samples of a split, sorted by city and name.
///
/// # Errors
/// As [`Dataset::open`](super::Dataset::open).
pub(super) fn list(root: &Path, split: &str) -> Result<Vec<Sample>> {
    let image_dir = split_folder(root, "leftImg8bit", split, "images")?;
    let label_dir = split_folder(root, "gtFine", split, "labels")?;
    let images = image_frames(&image_dir)?;
    let labels = frames(&label_dir, &LABEL_SUFFIXES.map(|(suffix, _)| suffix))?;
    if let Some((frame, (_, path))) = labels.iter().find(|(f, _)| !images.contains_key(*f)) {
        return Err(Error::format(
            path,
            format!("its image {}", image_dir.join(format!("{frame}{IMAGE_SUFFIX}")).display()),
            "no such file",
        ));
    }
    let sample = |(frame, (_, image)): (String, (usize, PathBuf))| match labels.get(&frame) {
        Some((suffix, label)) => Ok(Sample {
            image,
            label: label.clone(),
            name: short(&frame),
            encoding: LABEL_SUFFIXES[*suffix].1,
        }),
        None => Err(Error::format(
            image,
            format!(
                "its label {}",
                label_dir.join(format!("{frame}_gtFine_labelIds.png")).display()
            ),
            "no such file",
        )),
    };
    images.into_iter().map(sample).collect()
}

/// Files `CITY/FRAME + suffix` by `CITY/FRAME`, with the index of the suffix; where a frame has
/// several, the first suffix wins.
fn frames(dir: &Path, suffixes: &[&str]) -> Result<BTreeMap<String, (usize, PathBuf)>> {
    let mut frames = BTreeMap::new();
    for city in entries(dir)? {
        let folder = dir.join(&city);
        if !folder.is_dir() {
            continue;
        }
        for name in entries(&folder)? {
            for (i, suffix) in suffixes.iter().enumerate() {
                let Some(frame) = name.strip_suffix(suffix) else { continue };
                let key = format!("{city}/{frame}");
                if frames.get(&key).is_none_or(|(other, _)| *other > i) {
                    frames.insert(key, (i, folder.join(&name)));
                }
            }
        }
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn train_ids_cover_every_class_once_and_the_rest_is_void() {
        for id in 0..CLASSES.len() as u8 {
            assert_eq!(TRAIN_IDS.iter().filter(|t| **t == id).count(), 1, "train id {id}");
        }
        assert_eq!(TRAIN_IDS.iter().filter(|t| **t == VOID).count(), 34 - 19);
        // Three of the official pairs, and caravan (29), which is not evaluated.
        assert_eq!((TRAIN_IDS[7], TRAIN_IDS[26], TRAIN_IDS[33]), (0, 13, 18));
        assert_eq!(TRAIN_IDS[29], VOID);
        for id in 0..CLASSES.len() as u8 {
            assert_eq!(TRAIN_IDS[usize::from(label_id(id).unwrap())], id);
        }
        assert_eq!((label_id(19), label_id(VOID)), (None, None));
    }
}
