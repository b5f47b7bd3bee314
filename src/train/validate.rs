//! Validation: figures of a model on a split, as `fpenet eval` takes them.

use super::history::Validation;
use super::protocol::Runtime;
use crate::data::Dataset;
use crate::error::Result;
use crate::evaluate::evaluate;
use crate::model::Model;

/// Runs a model over a split, at the images' own size (half of it for Cityscapes) whatever the
/// size of the training crops: those show the images at their own scale, on average.
///
/// The model runs as in inference, with running statistics and folded batch norm, on a backend of
/// its own: training goes on as if there had been no validation.
///
/// # Errors
/// As [`evaluate`].
pub fn validate(model: &Model, dataset: &Dataset, runtime: &Runtime) -> Result<Validation> {
    let confusion =
        evaluate(model, dataset, None, &mut || runtime.open(), &mut |_, _| {})?.confusion;
    let present = |iou: f64| iou.is_finite().then_some(iou);
    Ok(Validation {
        miou: confusion.miou(),
        global_accuracy: confusion.global_accuracy(),
        per_class_iou: confusion.per_class_iou().into_iter().map(present).collect(),
    })
}
