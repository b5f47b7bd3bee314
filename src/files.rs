//! Reading and writing files so that nothing on disk is ever half written or lost.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// Writes a file as a whole or not at all: into a temporary file of the same folder, which is
/// synced and then renamed over `path`. A failure leaves what was at `path` as it was and no
/// temporary file behind. A symbolic link is followed; a pipe or a device is written directly.
///
/// # Errors
/// [`Error::Io`] naming `path` and what failed.
pub fn write_atomic(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let failed = |source| Error::io("cannot write", path, source);
    let (real, folder) = match resolve(path)? {
        Target::File { real, folder } => (real, folder),
        Target::Stream => {
            let mut file = File::options().write(true).open(path).map_err(failed)?;
            write(&mut file).map_err(failed)?;
            return file.flush().map_err(failed);
        }
    };
    let temporary = temporary(&real, &folder).map_err(failed)?;
    // The file itself: through tempfile's writer errors would name the temporary file.
    let mut buffered = BufWriter::new(temporary.as_file());
    write(&mut buffered).map_err(failed)?;
    buffered.into_inner().map_err(|e| failed(e.into_error()))?;
    temporary.as_file().sync_all().map_err(failed)?;
    temporary.persist(&real).map_err(|e| failed(e.error))?;
    sync_folder(&folder).map_err(failed)
}

/// Refuses an output that [`write_atomic`] could not write, before long work is begun for it.
/// Leaves nothing behind.
///
/// # Errors
/// [`Error::Io`] naming `path`: its folder is missing or not writable, or it is a folder itself.
pub fn check_writable(path: &Path) -> Result<()> {
    match resolve(path)? {
        Target::Stream => Ok(()),
        Target::File { real, folder } => temporary(&real, &folder)
            .map(drop)
            .map_err(|source| Error::io("cannot write", path, source)),
    }
}

/// Refuses a folder that [`create_folder`] could not make or files could not be created in, before
/// work is begun that may come to nothing. Leaves nothing behind.
///
/// # Errors
/// [`Error::Io`] naming the folder.
pub fn check_folder(path: &Path) -> Result<()> {
    let failed = |source| Error::io("cannot create or write the folder", path, source);
    for folder in path.ancestors() {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        // The link itself: a folder cannot be made where one leads nowhere.
        match fs::symlink_metadata(folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e)),
            Ok(_) => return temporary(Path::new("probe"), folder).map(drop).map_err(failed),
        }
    }
    Ok(())
}

/// The folders that [`make_folder`] made. When this goes, so do they, the innermost first, as far as
/// nothing is in them: work that came to nothing leaves nothing behind.
#[must_use = "a folder in which nothing lies when this is dropped is removed"]
#[derive(Debug)]
pub struct MadeFolder(Vec<PathBuf>);

impl Drop for MadeFolder {
    fn drop(&mut self) {
        for folder in self.0.iter().rev() {
            let _ = fs::remove_dir(folder); // fails where there is anything in it
        }
    }
}

/// Makes a folder for outputs, with its parents, where they are missing.
///
/// # Errors
/// [`Error::Io`] naming the folder.
pub fn make_folder(path: &Path) -> Result<MadeFolder> {
    let missing = |folder: &&Path| !folder.as_os_str().is_empty() && !folder.exists();
    let missing: Vec<&Path> = path.ancestors().take_while(missing).collect();
    let made = missing.into_iter().rev().filter(|folder| fs::create_dir(folder).is_ok());
    let made = MadeFolder(made.map(Path::to_path_buf).collect());
    // What could not be made may have been by another process, or else this says why.
    fs::create_dir_all(path)
        .map(|()| made)
        .map_err(|source| Error::io("cannot create or write the folder", path, source))
}

/// [`make_folder`] that makes sure as well that files can be created in it.
///
/// # Errors
/// [`Error::Io`] naming the folder.
pub fn create_folder(path: &Path) -> Result<MadeFolder> {
    let made = make_folder(path)?;
    temporary(Path::new("probe"), path)
        .map(|_| made)
        .map_err(|source| Error::io("cannot create or write the folder", path, source))
}

/// Reads a whole file of at most `limit` bytes.
///
/// # Errors
/// [`Error::Io`] where it cannot be read, [`Error::Format`] where it is longer than `limit`.
pub fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let failed = |source| Error::io("cannot read", path, source);
    let file = File::open(path).map_err(failed)?;
    // The length is a hint only: it is 0 for pipes, and devices have no end.
    let length = file.metadata().map_err(failed)?.len();
    let mut bytes = Vec::with_capacity(length.min(limit) as usize);
    file.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(Error::format(path, format!("at most {limit} bytes"), "a longer file"));
    }
    Ok(bytes)
}

/// Removes the temporary files that writers of `path` left behind when they were killed. For the
/// one process that may write `path`: a file that another is still writing would go as well.
pub fn remove_leftovers(path: &Path) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return };
    let prefix = partial_prefix(name);
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let found = entry.file_name();
        let found = found.to_string_lossy();
        if found.starts_with(&prefix) && found.ends_with(PARTIAL) {
            let _ = fs::remove_file(entry.path()); // litter at worst
        }
    }
}

/// Ending of temporary files.
const PARTIAL: &str = ".partial";

/// Beginning of the temporary files for a file of this name.
fn partial_prefix(name: &std::ffi::OsStr) -> String {
    format!(".{}.", name.to_string_lossy().chars().take(64).collect::<String>())
}

enum Target {
    /// A regular file, existing or not, and the folder it is in.
    File { real: PathBuf, folder: PathBuf },
    /// A pipe, a terminal or a device, which a rename would destroy.
    Stream,
}

fn resolve(path: &Path) -> Result<Target> {
    let failed = |source| Error::io("cannot write", path, source);
    let real = match fs::metadata(path) {
        Ok(found) if found.is_dir() => {
            return Err(failed(io::Error::new(io::ErrorKind::IsADirectory, "it is a folder")));
        }
        Ok(found) if !found.is_file() => return Ok(Target::Stream),
        Ok(_) => path.canonicalize().map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_path_buf(),
        Err(error) => return Err(failed(error)),
    };
    if real.file_name().is_none() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it names no file")));
    }
    let folder = match real.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    Ok(Target::File { real, folder })
}

/// A temporary file that deletes itself, named after the file it will become.
fn temporary(path: &Path, folder: &Path) -> io::Result<NamedTempFile> {
    let prefix = partial_prefix(path.file_name().unwrap_or_default());
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(PARTIAL);
    // tempfile's own mode is 0600; results are meant to be read by others, as umask allows.
    #[cfg(unix)]
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(permissions);
    // tempfile's errors add the temporary file's random name, which means nothing to a user.
    builder.tempfile_in(folder).map_err(|e| match e.kind() {
        kind @ io::ErrorKind::NotFound => io::Error::new(kind, "there is no such folder"),
        kind => kind.into(),
    })
}

/// Makes a rename last through a power cut.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_failed_write_keeps_the_old_file_and_leaves_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.txt");
        write_atomic(&path, |w| w.write_all(b"old")).unwrap();
        let result = write_atomic(&path, |w| {
            w.write_all(b"half of the new")?;
            Err(io::Error::other("cut off"))
        });
        let message = result.unwrap_err().to_string();
        assert!(message.contains("out.txt") && message.contains("cut off"), "{message}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["out.txt"]);
    }

    #[test]
    fn a_write_replaces_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.txt");
        for text in ["a longer first text", "second"] {
            write_atomic(&path, |w| w.write_all(text.as_bytes())).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(names(folder.path()), ["out.txt"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_devices_survive() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write_atomic(&link, |w| w.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());

        write_atomic(Path::new("/dev/null"), |w| w.write_all(b"gone")).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn unwritable_outputs_are_refused_early_and_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "text").unwrap();
        let bad = [folder.path().to_path_buf(), file.join("below"), folder.path().join("no/such")];
        for path in bad {
            let message = check_writable(&path).unwrap_err().to_string();
            assert!(message.contains(path.to_str().unwrap()), "{message}");
            assert!(!message.contains(".partial"), "{message}");
        }
        assert!(create_folder(&file.join("below")).is_err());
        check_writable(&folder.path().join("new")).unwrap();
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn a_folder_is_checked_without_being_made() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("file"), "text").unwrap();
        let mut bad = vec![place.path().join("file"), place.path().join("file/below")];
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("nowhere", place.path().join("link")).unwrap();
            bad.extend([place.path().join("link"), place.path().join("link/below")]);
        }
        let before = names(place.path()).len();
        for path in bad {
            let message = check_folder(&path).unwrap_err().to_string();
            assert!(message.contains(path.to_str().unwrap()), "{message}");
            assert!(!message.contains(".partial"), "{message}");
            assert!(create_folder(&path).is_err(), "{}", path.display());
        }
        for path in [place.path().to_path_buf(), place.path().join("a/b/c")] {
            check_folder(&path).unwrap();
        }
        check_folder(Path::new("no-such-folder/of-this-crate")).unwrap();
        assert_eq!(names(place.path()).len(), before);
    }

    #[test]
    fn of_the_folders_made_those_with_nothing_in_them_go_again() {
        let place = tempfile::tempdir().unwrap();
        let (outer, inner) = (place.path().join("a/b"), place.path().join("a/b/c/d"));
        let made = create_folder(&inner).unwrap();
        assert!(inner.is_dir());
        drop(made);
        assert!(names(place.path()).is_empty());

        // What is of use stays, as does what was there before.
        let made = create_folder(&inner).unwrap();
        fs::write(outer.join("file"), "text").unwrap();
        drop(made);
        assert_eq!(names(&outer), ["file"]);
        fs::remove_file(outer.join("file")).unwrap();
        drop(create_folder(&outer).unwrap());
        assert!(outer.is_dir());

        // Halfway to a folder that cannot be made.
        fs::write(place.path().join("file"), "text").unwrap();
        assert!(create_folder(&outer.join("new/../../../file/below")).is_err());
        assert!(names(&outer).is_empty());
    }

    #[test]
    fn leftovers_of_one_file_go_and_nothing_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let kept = ["out.txt", ".out.txt.notes", ".other.txt.Ab1.partial", "out.txt.partial"];
        for name in kept.iter().chain(&[".out.txt.Ab1.partial", ".out.txt.Zz9.partial"]) {
            fs::write(folder.path().join(name), name).unwrap();
        }
        remove_leftovers(&folder.path().join("out.txt"));
        let mut left = names(folder.path());
        left.sort();
        let mut expected = kept.to_vec();
        expected.sort_unstable();
        assert_eq!(left, expected);
    }

    #[test]
    fn reading_stops_at_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, [7; 100]).unwrap();
        assert_eq!(read_limited(&path, 100).unwrap().len(), 100);
        assert!(read_limited(&path, 99).is_err());
        #[cfg(unix)]
        assert!(read_limited(Path::new("/dev/zero"), 1000).is_err());
    }
}
