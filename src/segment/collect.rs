//! Which photos a list of paths stands for, and what their results are called.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::decode::EXTENSIONS;
use crate::error::{Error, Result};

/// Endings of the files that are written per photo.
pub const OUTPUTS: [&str; 3] = ["labels.png", "mask.png", "overlay.png"];

/// One thing to segment: a photo, or the reason why a path names none.
#[derive(Debug)]
pub struct Item {
    /// As the user wrote it, or found in the user's folder; for the bundled photo its name.
    pub path: PathBuf,
    /// Where it stands in the file system, or why there is nothing.
    pub source: Result<Source>,
    /// Results are `NAME.labels.png` and so on; unlike any other item's.
    pub name: OsString,
}

/// Where a photo's bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The item's path.
    File,
    /// Inside of the binary.
    Bundled(&'static [u8]),
}

/// Lists photos: a file stands for itself whatever its name, a folder for the images right in it
/// (by extension, sorted by name, not those of subfolders, not earlier results). A path named
/// twice counts once. A path that is missing, or a folder without images, becomes an item that
/// failed, so that the others still run.
pub fn collect(paths: &[PathBuf]) -> Vec<Item> {
    let mut seen = HashSet::new();
    let mut names = Names::default();
    let mut items = Vec::new();
    let mut push = |path: PathBuf, source: Result<Source>| {
        let identity = path.canonicalize().unwrap_or_else(|_| path.clone());
        if seen.insert(identity) {
            let name = names.unique(path.file_stem().unwrap_or(OsStr::new("photo")));
            items.push(Item { path, source, name });
        }
    };
    for path in paths {
        match std::fs::metadata(path) {
            Err(e) => push(path.clone(), Err(Error::io("cannot read", path, e))),
            Ok(meta) if !meta.is_dir() => push(path.clone(), Ok(Source::File)),
            Ok(_) => match images_in(path) {
                Ok(images) => images.into_iter().for_each(|image| push(image, Ok(Source::File))),
                Err(e) => push(path.clone(), Err(e)),
            },
        }
    }
    items
}

/// The bundled photo as the only item.
pub fn bundled(name: &str, bytes: &'static [u8]) -> Vec<Item> {
    let path = PathBuf::from(name);
    let name = path.file_stem().unwrap_or_default().to_owned();
    vec![Item { path, source: Ok(Source::Bundled(bytes)), name }]
}

/// Refuses to write results over a photo that is to be read (photos named like results, in the
/// output folder).
///
/// # Errors
/// [`Error::Usage`] naming the photo.
pub fn refuse_overwriting_inputs(items: &[Item], out: &Path) -> Result<()> {
    let inputs: HashSet<PathBuf> =
        items.iter().filter_map(|i| i.path.canonicalize().ok()).collect();
    for item in items {
        for ending in OUTPUTS {
            let target = out.join(output_name(&item.name, ending));
            if target.canonicalize().is_ok_and(|t| inputs.contains(&t)) {
                return Err(Error::Usage(format!(
                    "{}: expected an output that is no input; the result of {} would overwrite \
                     it: choose another --out",
                    target.display(),
                    item.path.display()
                )));
            }
        }
    }
    Ok(())
}

/// `NAME.labels.png` and so on.
pub fn output_name(name: &OsStr, ending: &str) -> OsString {
    let mut file = name.to_owned();
    file.push(".");
    file.push(ending);
    file
}

fn images_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |e| Error::io("cannot list", folder, e);
    let mut images = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let is_image = path
            .extension()
            .and_then(OsStr::to_str)
            .is_some_and(|e| EXTENSIONS.contains(&e.to_ascii_lowercase().as_str()));
        if is_image && !is_result(&path) && path.is_file() {
            images.push(path);
        }
    }
    if images.is_empty() {
        return Err(Error::format(
            folder,
            format!("a folder with images ({})", EXTENSIONS.join(", ")),
            "none (subfolders are not searched)",
        ));
    }
    images.sort();
    Ok(images)
}

/// Whether a file is called like a result of an earlier run.
fn is_result(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    OUTPUTS.iter().any(|ending| name.ends_with(&format!(".{ending}")))
}

/// Hands out names, each once; case is ignored, as some file systems do.
#[derive(Default)]
struct Names(HashSet<String>);

impl Names {
    fn unique(&mut self, stem: &OsStr) -> OsString {
        let mut name = stem.to_owned();
        let mut number = 2;
        while !self.0.insert(name.to_string_lossy().to_lowercase()) {
            name = stem.to_owned();
            name.push(format!("-{number}"));
            number += 1;
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, b"x").unwrap();
    }

    #[test]
    fn a_folder_gives_its_images_sorted_without_earlier_results() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.JPG", "a.png", "notes.txt", "a.mask.png", "b.overlay.png", "sub/c.png"] {
            touch(&dir.path().join(name));
        }
        let items = collect(&[dir.path().to_path_buf()]);
        let names: Vec<_> = items.iter().map(|i| i.name.to_str().unwrap()).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn same_stems_get_different_names_and_a_repeated_path_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["x/s.png", "y/S.jpg", "z/s.png", "s-2.png"] {
            touch(&at(name));
        }
        let paths: Vec<_> =
            ["s-2.png", "x/s.png", "x/../x/s.png", "y/S.jpg", "z/s.png"].map(at).into();
        let items = collect(&paths);
        let names: Vec<_> = items.iter().map(|i| i.name.to_str().unwrap()).collect();
        assert_eq!(names, ["s-2", "s", "S-3", "s-4"]);
    }

    #[test]
    fn missing_paths_and_empty_folders_fail_alone() {
        let dir = tempfile::tempdir().unwrap();
        let photo = dir.path().join("p.png");
        touch(&photo);
        let empty = dir.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        let items = collect(&[dir.path().join("gone.png"), empty, photo]);
        let ok: Vec<_> = items.iter().map(|i| i.source.is_ok()).collect();
        assert_eq!(ok, [false, false, true]);
        let message = items[1].source.as_ref().unwrap_err().to_string();
        assert!(message.contains("empty: expected a folder with images"), "{message}");
    }

    #[test]
    fn a_result_may_not_overwrite_an_input() {
        let dir = tempfile::tempdir().unwrap();
        let (photo, other) = (dir.path().join("p.png"), dir.path().join("p.mask.png"));
        touch(&photo);
        touch(&other);
        let items = collect(&[photo, other]);
        let error = refuse_overwriting_inputs(&items, dir.path()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(refuse_overwriting_inputs(&items, &dir.path().join("out")).is_ok());
    }
}
