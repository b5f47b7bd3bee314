//! One process at a time in a run's folder.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::setup::Paths;
use crate::error::{Error, Result};

/// The right to write a run's folder. The system takes the lock back however this process ends.
///
/// A session that ends without a checkpoint leaves no lock file, and no folder that it made: there
/// is no run. Parents of the folder stay, since others may have begun to use them.
pub(super) struct Claim {
    lock: PathBuf,
    /// Keeps the lock.
    file: File,
    /// What goes where no run came to be: nothing where the file system knows no locks, so that
    /// nobody can tell whether another process is at work.
    undo: Option<Undo>,
}

/// What there must not be, and what goes besides the lock file.
struct Undo {
    checkpoint: PathBuf,
    made_folder: Option<PathBuf>,
}

/// Attempts to lock. One is repeated where it met another session's end, which is rare; the bound is
/// for folders in which no file stays, whatever the reason.
const ATTEMPTS: usize = 100;

impl Claim {
    /// Makes the folder, where it is missing, this process's own.
    ///
    /// # Errors
    /// [`Error::Io`] where folder or lock file cannot be made, [`Error::Failed`] where another
    /// process holds the lock.
    pub fn new(paths: &Paths) -> Result<Self> {
        let (folder, lock) = (&paths.folder, paths.folder.join(".lock"));
        let failed = |e| Error::io("cannot create or write the folder", folder, e);
        let mut made = false;
        for _ in 0..ATTEMPTS {
            made |= make(folder).map_err(failed)?;
            let file = match File::create(&lock) {
                // The folder went with the session that had made it.
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                file => file.map_err(failed)?,
            };
            let undo = match file.try_lock() {
                // Else it went with the session that had it, and the next process would lock another.
                Ok(()) if is_at(&file, &lock) => Some(Undo {
                    checkpoint: paths.checkpoint.clone(),
                    made_folder: made.then(|| folder.clone()),
                }),
                Ok(()) => continue,
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Failed(format!(
                        "{}: another process is training here; wait for it, or choose another \
                         --out",
                        folder.display()
                    )));
                }
                // A file system without locks: training without one beats not training.
                Err(TryLockError::Error(_)) => None,
            };
            return Ok(Claim { lock, file, undo });
        }
        Err(failed(io::Error::new(ErrorKind::NotFound, "it does not stay")))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(Undo { checkpoint, made_folder }) = &self.undo else { return };
        // A user may have deleted the folder, and another process begun in one of the same name.
        if checkpoint.exists() || !is_at(&self.file, &self.lock) {
            return;
        }
        // In this order, and with the lock still held: whoever opens the file now finds it locked, or
        // gone by the time it is not.
        let _ = fs::remove_file(&self.lock);
        if let Some(folder) = made_folder {
            let _ = fs::remove_dir(folder); // fails where there is anything in it
        }
    }
}

/// Makes a folder with its parents. Whether it was this call that made it.
fn make(folder: &Path) -> io::Result<bool> {
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent)?;
    }
    let Err(refused) = fs::create_dir(folder) else { return Ok(true) };
    match fs::metadata(folder) {
        Ok(found) if found.is_dir() => Ok(false),
        // There a moment ago, and gone with the session that had made it: opening the lock tells. A link
        // that leads nowhere stays.
        Err(e) if e.kind() == ErrorKind::NotFound && refused.kind() == ErrorKind::AlreadyExists => {
            if fs::read_link(folder).is_ok() {
                Err(refused)
            } else {
                Ok(false)
            }
        }
        _ => Err(refused),
    }
}

/// Whether an open file is the one that has this name.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |found: fs::Metadata| (found.dev(), found.ino());
    let (open, named) = (file.metadata().map(id), fs::metadata(path).map(id));
    matches!((open, named), (Ok(open), Ok(named)) if open == named)
}

/// An open file cannot lose its name here.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn what_was_made_for_no_run_goes_and_what_was_there_stays() {
        let place = tempfile::tempdir().unwrap();
        let paths = Paths::new(&place.path().join("runs/a"));
        let claim = Claim::new(&paths).unwrap();
        assert!(paths.folder.join(".lock").exists());
        let words = Claim::new(&paths).err().unwrap().to_string();
        assert!(words.contains("another process"), "{words}");
        drop(claim);
        assert!(!paths.folder.exists());

        // An empty folder of the user's stays, as does what a session wrote in its own.
        fs::create_dir_all(&paths.folder).unwrap();
        drop(Claim::new(&paths).unwrap());
        assert_eq!(fs::read_dir(&paths.folder).unwrap().count(), 0);
        fs::remove_dir(&paths.folder).unwrap();
        let claim = Claim::new(&paths).unwrap();
        fs::write(&paths.best, "a model").unwrap();
        drop(claim);
        assert_eq!(fs::read_dir(&paths.folder).unwrap().count(), 1);

        // A run keeps its lock file: a process that waits for it may have it open.
        let claim = Claim::new(&paths).unwrap();
        fs::write(&paths.checkpoint, "a checkpoint").unwrap();
        drop(claim);
        assert!(paths.folder.join(".lock").exists());
        drop(Claim::new(&paths).unwrap());
        assert!(paths.folder.join(".lock").exists());
    }

    /// Sessions that fail at once, in many processes' place: locks of one process exclude each other
    /// as well, since each belongs to an open file.
    #[test]
    fn there_is_never_more_than_one_holder_however_often_the_folder_comes_and_goes() {
        let place = tempfile::tempdir().unwrap();
        let paths = Paths::new(&place.path().join("run"));
        let (holders, sessions) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    // Not so many attempts: all may fall into the time in which one holder waits for a core.
                    let mut held = 0;
                    while held < 100 {
                        match Claim::new(&paths) {
                            Ok(_claim) => {
                                assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                                std::thread::yield_now();
                                holders.fetch_sub(1, Ordering::SeqCst);
                                sessions.fetch_add(1, Ordering::Relaxed);
                                held += 1;
                            }
                            Err(error) => {
                                let words = error.to_string();
                                assert!(words.contains("another process"), "{words}");
                                std::thread::yield_now();
                            }
                        }
                    }
                });
            }
        });
        assert!(sessions.into_inner() > 100);
        // One that made the folder may have been refused it: then nobody takes it away.
        assert!(fs::read_dir(&paths.folder).map_or(0, Iterator::count) == 0);
    }
}
