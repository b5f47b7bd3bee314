//! What a run tells while it works. The loop itself prints nothing.

use std::path::Path;

use super::checkpoint::RunState;
use super::history::EpochRecord;

/// Facts known before the first update.
#[derive(Debug)]
pub struct Start<'a> {
    /// Device in words.
    pub device: &'a str,
    /// Where the run stands; protocol, classes and figures so far.
    pub state: &'a RunState,
    /// Batches of an epoch.
    pub batches: usize,
    /// Images to validate on, 0 without validation.
    pub val_images: usize,
    /// Trainable parameters.
    pub parameters: usize,
}

/// One update.
#[derive(Debug, Clone, Copy)]
pub struct StepReport {
    /// Epoch, from 1.
    pub epoch: usize,
    /// Batches of the epoch done, from 1.
    pub batch: usize,
    /// Updates since the start of the run.
    pub step: u64,
    /// Loss of the batch, where the device was asked for it.
    pub loss: Option<f32>,
    /// Learning rate.
    pub lr: f64,
}

/// Receives the run's events; every method does nothing by default.
pub trait Observer {
    /// The run begins or continues.
    fn started(&mut self, _start: &Start) {}
    /// An update was made.
    fn step(&mut self, _report: &StepReport) {}
    /// Validation begins, of so many images.
    fn validating(&mut self, _images: usize) {}
    /// An epoch is finished, validated and on disk. `best` when its mIoU is the best so far.
    fn epoch(&mut self, _record: &EpochRecord, _state: &RunState, _best: bool) {}
    /// A checkpoint was written within an epoch.
    fn checkpoint(&mut self, _path: &Path, _state: &RunState) {}
}

/// Tells nobody.
impl Observer for () {}
