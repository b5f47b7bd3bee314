//! Training with the paper's protocol (section 4.1): [`train`] runs or resumes a run in a folder.
//!
//! A run's folder holds
//! - `checkpoint.safetensors`: everything needed to continue bit for bit ([`checkpoint`]),
//! - `best.safetensors`, `last.safetensors`: model files of the best validation and of the last
//!   finished epoch,
//! - `log.csv`, `plot.png`: the figures so far.
//!
//! All are replaced atomically, in an order such that a run killed anywhere continues from its
//! checkpoint and writes the same files again.

pub mod checkpoint;
mod claim;
pub mod class_weights;
pub mod history;
pub mod log;
pub mod observer;
pub mod plot;
pub mod protocol;
pub mod schedule;
mod session;
mod setup;
pub mod statistics;
pub mod validate;

pub use checkpoint::{Checkpoint, RunState};
pub use class_weights::ClassWeights;
pub use history::{EpochRecord, Validation};
pub use observer::{Observer, Start, StepReport};
pub use protocol::{Protocol, Request, Runtime};
pub use session::{Outcome, train};
