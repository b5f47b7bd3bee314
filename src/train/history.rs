//! What a run has measured so far: one record per finished epoch, kept in the checkpoint.

use serde::{Deserialize, Serialize};

/// Figures of one validation, from one confusion matrix over the whole split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Mean IoU over the classes, 0 to 1.
    pub miou: f64,
    /// Share of labelled pixels that got their class, 0 to 1.
    pub global_accuracy: f64,
    /// IoU per class, 0 to 1; `None` for a class that neither truth nor prediction has.
    pub per_class_iou: Vec<Option<f64>>,
}

/// One finished epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Epochs done, from 1.
    pub epoch: usize,
    /// Optimiser updates done since the start of the run.
    pub step: u64,
    /// Learning rate of the epoch.
    pub lr: f64,
    /// Mean of the batches' losses.
    pub loss: f64,
    /// Training throughput, validation not counted.
    pub images_per_second: f64,
    /// Time spent training in this epoch, over all sessions, without validation.
    pub seconds: f64,
    /// Validation after the epoch, where there was one.
    pub validation: Option<Validation>,
}
