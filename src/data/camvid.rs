//! CamVid in the 11-class form of SegNet: `SPLIT/*.png`, `SPLITannot/*.png` of the same names,
//! and optionally `SPLIT.txt`, a list of names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{LabelEncoding, Sample, entries, stem};
use crate::error::{Error, Result};

pub use crate::model::classes::CAMVID as CLASSES;

const IMAGE_EXTENSIONS: [&str; 3] = ["png", "jpg", "jpeg"];

/// Samples of a split, in the order of `SPLIT.txt` where there is one, else sorted by name.
///
/// # Errors
/// As [`Dataset::open`](super::Dataset::open).
pub(super) fn list(root: &Path, split: &str) -> Result<Vec<Sample>> {
    let image_dir = root.join(split);
    let label_dir = root.join(format!("{split}annot"));
    for (dir, role) in [(&image_dir, "images"), (&label_dir, "labels")] {
        if !dir.is_dir() {
            return Err(Error::format(
                dir,
                format!("the folder of CamVid's {role} of split {split}"),
                "no such folder",
            ));
        }
    }
    let images = by_stem(&image_dir, &IMAGE_EXTENSIONS)?;
    let labels = by_stem(&label_dir, &["png"])?;
    if images.is_empty() {
        return Err(Error::format(
            &image_dir,
            "images (*.png, *.jpg) of a CamVid split",
            "none of them",
        ));
    }
    let list = root.join(format!("{split}.txt"));
    let wanted = if list.is_file() {
        read_list(&list, &images)?
    } else {
        // Without a list the folders alone tell what belongs to the split: a label without its
        // image means that a copy is incomplete.
        if let Some((name, file)) = labels.iter().find(|(name, _)| !images.contains_key(*name)) {
            return Err(Error::format(
                label_dir.join(file),
                format!("its image {}", image_dir.join(format!("{name}.png")).display()),
                "no such file",
            ));
        }
        images.keys().cloned().collect()
    };
    let sample = |name: String| {
        let image = image_dir.join(&images[&name]);
        match labels.get(&name) {
            Some(file) => Ok(Sample {
                image,
                label: label_dir.join(file),
                name,
                encoding: LabelEncoding::Camvid,
            }),
            None => Err(Error::format(
                image,
                format!("its label {}", label_dir.join(format!("{name}.png")).display()),
                "no such file",
            )),
        }
    };
    wanted.into_iter().map(sample).collect()
}

/// Images of a split by name, sorted or in the order of `SPLIT.txt`; labels are not asked for.
///
/// # Errors
/// A missing folder or one without images, a list that does not fit.
pub(super) fn images(root: &Path, split: &str) -> Result<Vec<(String, PathBuf)>> {
    let folder = root.join(split);
    if !folder.is_dir() {
        let expected = format!("the folder of CamVid's images of split {split}");
        return Err(Error::format(&folder, expected, "no such folder"));
    }
    let images = by_stem(&folder, &IMAGE_EXTENSIONS)?;
    if images.is_empty() {
        let expected = "images (*.png, *.jpg) of a CamVid split";
        return Err(Error::format(&folder, expected, "none of them"));
    }
    let list = root.join(format!("{split}.txt"));
    let names = match list.is_file() {
        true => read_list(&list, &images)?,
        false => images.keys().cloned().collect(),
    };
    Ok(names.into_iter().map(|name| (name.clone(), folder.join(&images[&name]))).collect())
}

/// File names by their stem.
fn by_stem(dir: &Path, extensions: &[&str]) -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for name in entries(dir)? {
        let extension = Path::new(&name).extension().and_then(|e| e.to_str()).unwrap_or_default();
        if !extensions.iter().any(|e| extension.eq_ignore_ascii_case(e)) {
            continue;
        }
        if let Some(other) = files.insert(stem(&name).to_string(), name.clone()) {
            return Err(Error::format(
                dir.join(&name),
                "one image per name",
                format!("{other} beside it"),
            ));
        }
    }
    Ok(files)
}

/// Names (stems) of a list: a file name a line; of SegNet's form ("/path/image.png /path/label.png")
/// the first path's file name counts.
fn read_list(list: &Path, images: &BTreeMap<String, String>) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(list).map_err(|e| Error::io("cannot read", list, e))?;
    let mut names: Vec<String> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for (i, line) in text.lines().enumerate() {
        let Some(path) = line.split_whitespace().next() else { continue };
        let name = stem(path.rsplit('/').next().unwrap_or(path)).to_string();
        if !images.contains_key(&name) {
            return Err(Error::format(
                list,
                "names of images that are there",
                format!("line {}: {path}, which is missing", i + 1),
            ));
        }
        if !seen.insert(name.clone()) {
            return Err(Error::format(
                list,
                "every image once",
                format!("{path} again on line {}", i + 1),
            ));
        }
        names.push(name);
    }
    if names.is_empty() {
        return Err(Error::format(list, "an image's file name on each line", "an empty list"));
    }
    Ok(names)
}
