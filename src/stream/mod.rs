//! Video: frames in from a pipe, a file or a folder, labels, colours or overlays out.
//!
//! [`source`] reads frames ([`y4m`] streams, raw RGB, folders of pictures), [`pipeline`] decodes,
//! segments and encodes them at the same time, [`sink`] writes them, [`colour`] converts between
//! Y'CbCr and RGB, [`latency`] keeps the times.

pub mod colour;
pub mod latency;
pub mod pipeline;
pub mod sink;
pub mod source;
pub mod y4m;

/// How the input is called in messages where it has no name of its own.
pub const STDIN: &str = "standard input";
/// How the output is called in messages.
pub const STDOUT: &str = "standard output";
