//! The library's typed error: every message names the file, node or kernel concerned, what was
//! expected, what was found, and where it helps the remedy.

use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, by the kind of remedy it needs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A request that makes no sense as given (exit code 2).
    #[error("{0}")]
    Usage(String),
    /// The operating system refused a file operation.
    #[error("{}: {action}: {source}", path.display())]
    Io {
        /// What was attempted, for example "cannot read".
        action: &'static str,
        /// The file or folder concerned.
        path: PathBuf,
        /// The system's own words.
        #[source]
        source: std::io::Error,
    },
    /// A file whose content is not what it should be.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Format {
        /// The file concerned.
        path: PathBuf,
        /// What a valid file would hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// Tensors whose shapes do not fit an operator.
    #[error("node {node}: expected {expected}, found {found}")]
    Shape {
        /// Graph node (SPEC name) at fault.
        node: String,
        /// Shape rule that was violated.
        expected: String,
        /// The offending shape.
        found: String,
    },
    /// A device that is missing, too old, or out of memory.
    #[error("device {device}: {problem}; {remedy}")]
    Device {
        /// `cpu`, `cuda`, `emulated`.
        device: String,
        /// What is wrong.
        problem: String,
        /// What the user can do.
        remedy: String,
    },
    /// A kernel that failed to launch or to run.
    #[error("kernel {kernel}: {problem}")]
    Kernel {
        /// Kernel (or library call) name.
        kernel: String,
        /// The driver's words.
        problem: String,
    },
    /// The work was done and its outcome is a failure (a check missed, files skipped).
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// A file operation that failed, with the action in words ("cannot read").
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { action, path: path.as_ref().to_path_buf(), source }
    }

    /// A malformed file.
    pub fn format(
        path: impl AsRef<Path>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Error::Format {
            path: path.as_ref().to_path_buf(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// Process exit code that the command line gives for this error: 2 for wrong usage, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            _ => 1,
        }
    }
}
