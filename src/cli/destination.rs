//! Where a command's result goes, a file or standard output, and where its words for people then go.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use clap::builder::{MapValueParser, PathBufValueParser, TypedValueParser, ValueParserFactory};
use fpenet::stream::STDOUT;
use fpenet::{Error, Model, Result, files};
use serde::Serialize;

/// The value of an option that names a file to write; `-` is standard output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    File(PathBuf),
    Stdout,
}

impl ValueParserFactory for Destination {
    type Parser = MapValueParser<PathBufValueParser, fn(PathBuf) -> Destination>;

    fn value_parser() -> Self::Parser {
        PathBufValueParser::new().map(|path| match path.as_os_str() == "-" {
            true => Destination::Stdout,
            false => Destination::File(path),
        })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Destination::File(path) => path.display().fmt(f),
            Destination::Stdout => f.write_str(STDOUT),
        }
    }
}

impl Destination {
    /// To be called before any work and any word: refuses what cannot be written, and says where
    /// words go, so that standard output is the result's alone where it goes there.
    pub fn reserve(&self) -> Result<Messages> {
        match self {
            Destination::File(path) => files::check_writable(path).map(|()| Messages::Stdout),
            Destination::Stdout => Ok(Messages::Stderr),
        }
    }

    /// [`Self::reserve`] for a result that is written on request only.
    pub fn reserve_optional(result: Option<&Self>) -> Result<Messages> {
        result.map_or(Ok(Messages::Stdout), Self::reserve)
    }

    /// [`Self::reserve`] for bytes that mean nothing on a terminal.
    pub fn reserve_binary(&self) -> Result<Messages> {
        if *self == Destination::Stdout && io::stdout().is_terminal() {
            let text = format!("{STDOUT}: expected a pipe or a file, found a terminal");
            return Err(Error::Usage(text));
        }
        self.reserve()
    }

    /// Writes a file as a whole or not at all, or what a pipe takes. A reader that has gone away
    /// is no error.
    pub fn write(&self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        let Destination::File(path) = self else {
            let mut out = io::BufWriter::new(io::stdout().lock());
            return match write(&mut out).and_then(|()| out.flush()) {
                Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
                    Err(Error::io("cannot write", STDOUT, e))
                }
                _ => Ok(()),
            };
        };
        files::write_atomic(path, write)
    }

    /// Writes a value as indented JSON.
    pub fn write_json(&self, value: &impl Serialize) -> Result<()> {
        self.write(|out| {
            serde_json::to_writer_pretty(&mut *out, value)?;
            out.write_all(b"\n")
        })
    }

    /// Writes a model file.
    pub fn write_model(&self, model: &Model) -> Result<()> {
        match self {
            Destination::File(path) => model.save(path),
            Destination::Stdout => self.write(|out| model.save_to(out)),
        }
    }
}

/// Where a command's words for people go; to be written to with `writeln!`.
#[must_use]
#[derive(Debug, Clone, Copy)]
pub enum Messages {
    Stdout,
    /// Standard output carries a result.
    Stderr,
}

impl Messages {
    /// What `writeln!` calls. A reader that has gone away (`fpenet summary | head`) is no error:
    /// the work goes on, unread.
    pub fn write_fmt(self, text: fmt::Arguments) -> io::Result<()> {
        match self {
            Messages::Stdout => match io::stdout().lock().write_fmt(text) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
                Err(error) => {
                    Err(io::Error::new(error.kind(), format!("stdout: cannot write: {error}")))
                }
                Ok(()) => Ok(()),
            },
            Messages::Stderr => {
                // Where stderr is closed there is nobody to tell.
                let _ = io::stderr().write_fmt(text);
                Ok(())
            }
        }
    }
}
