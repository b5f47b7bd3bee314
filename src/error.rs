//! The library's typed error: every message names the file, node or kernel concerned, what was
//! expected, what was found, and where it helps the remedy. On one line, whatever a file or its
//! name holds: it ends up on terminals, in logs and in JSON.

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, by the kind of remedy it needs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A request that makes no sense as given (exit code 2).
    #[error("{}", line(.0))]
    Usage(String),
    /// The operating system refused a file operation.
    #[error("{}: {action}: {source}", name(path))]
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
    #[error("{}: expected {}, found {}", name(path), short(expected), short(found))]
    Format {
        /// The file concerned.
        path: PathBuf,
        /// What a valid file would hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// Tensors whose shapes do not fit an operator.
    #[error("node {}: expected {}, found {}", short(node), short(expected), short(found))]
    Shape {
        /// Graph node (SPEC name) at fault.
        node: String,
        /// Shape rule that was violated.
        expected: String,
        /// The offending shape.
        found: String,
    },
    /// A device that is missing, too old, or out of memory.
    #[error("device {device}: {}; {}", line(problem), line(remedy))]
    Device {
        /// `cpu`, `cuda`, `emulated`.
        device: String,
        /// What is wrong.
        problem: String,
        /// What the user can do.
        remedy: String,
    },
    /// A kernel that failed to launch or to run.
    #[error("kernel {kernel}: {}", line(problem))]
    Kernel {
        /// Kernel (or library call) name.
        kernel: String,
        /// The driver's words.
        problem: String,
    },
    /// The work was done and its outcome is a failure (a check missed, files skipped).
    #[error("{}", line(.0))]
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

    /// Where a value that would be wrong usage on a command line comes from a file: the file's
    /// fault, of which `expected` tells what would have been right.
    pub fn blame_file(self, path: impl AsRef<Path>, expected: &str) -> Self {
        match self {
            Error::Usage(found) => Error::format(path, expected, found),
            other => other,
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

/// Characters of what a file holds, and of what was expected in its place, that a message quotes:
/// enough for an import's account of what is missing, unknown and misshapen.
const QUOTED: usize = 800;

/// A text on one line: control characters and Unicode's line separators as escapes (`\n`,
/// `\u{2028}`), cut at `longest` characters.
struct OneLine<'a> {
    text: Cow<'a, str>,
    longest: usize,
}

fn line(text: &str) -> OneLine<'_> {
    OneLine { text: text.into(), longest: usize::MAX }
}

fn short(text: &str) -> OneLine<'_> {
    OneLine { text: text.into(), longest: QUOTED }
}

fn name(path: &Path) -> OneLine<'_> {
    OneLine { text: path.to_string_lossy(), longest: usize::MAX }
}

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = self.longest;
        for c in self.text.chars() {
            let escape = c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
            let length = if escape { c.escape_default().len() } else { 1 };
            if length > left {
                return f.write_str("...");
            }
            left -= length;
            if escape { write!(f, "{}", c.escape_default())? } else { f.write_char(c)? }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_whatever_the_file_and_its_name_hold() {
        let odd = "a\nb\r\tc\0\u{1b}[31m\u{85}\u{2028}\u{2029}d";
        let escaped = "a\\nb\\r\\tc\\u{0}\\u{1b}[31m\\u{85}\\u{2028}\\u{2029}d";
        let text = || odd.to_string();
        let source = std::io::Error::from(std::io::ErrorKind::NotFound);
        let errors = [
            Error::format(odd, odd, odd),
            Error::io("cannot read", odd, source),
            Error::Shape { node: text(), expected: text(), found: text() },
            Error::Device { device: "cuda".into(), problem: text(), remedy: text() },
            Error::Kernel { kernel: "add".into(), problem: text() },
            Error::Usage(text()),
            Error::Failed(text()),
        ];
        for error in errors {
            let message = error.to_string();
            assert!(message.contains(escaped), "{message}");
            let breaks = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
            assert!(!message.contains(breaks), "{message:?}");
        }
    }

    #[test]
    fn what_a_file_holds_is_quoted_up_to_a_length() {
        let huge = "\u{e9}".repeat(1 << 20);
        let message = Error::format("m.safetensors", huge.as_str(), huge.as_str()).to_string();
        let cut = format!("{}...", "\u{e9}".repeat(QUOTED));
        assert_eq!(message, format!("m.safetensors: expected {cut}, found {cut}"));
        let breaks = "\n".repeat(QUOTED);
        let message = Error::format("a", "b", breaks).to_string();
        assert_eq!(message, format!("a: expected b, found {}...", "\\n".repeat(QUOTED / 2)));
        let whole = "x".repeat(QUOTED);
        assert!(Error::format("a", "b", whole.as_str()).to_string().ends_with(&whole));
    }
}
