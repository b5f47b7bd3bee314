//! Validation: figures of a model on a split, at the labels' full size.

use std::sync::Arc;

use super::history::Validation;
use super::protocol::Runtime;
use crate::data::loader::{Loader, LoaderOptions, Position};
use crate::data::{Dataset, decode};
use crate::error::{Error, Result};
use crate::exec::Inference;
use crate::graph::{Mode, Shape};
use crate::metrics::Confusion;
use crate::model::Model;
use crate::ops::resize::argmax_nchw;

/// Runs a model over a split at its training size. Where a label has another size than the
/// network's input, the logits are brought to it by bilinear resize (paper, section 4.1) before
/// the largest is taken.
///
/// The model runs as in inference, with running statistics and folded batch norm, on a backend of
/// its own: training goes on as if there had been no validation.
///
/// # Errors
/// Unreadable data, device errors, a split without labelled pixels.
pub fn validate(
    model: &Model,
    dataset: &Arc<Dataset>,
    (width, height): (usize, usize),
    runtime: &Runtime,
) -> Result<Validation> {
    let options = LoaderOptions {
        workers: runtime.workers(),
        ..LoaderOptions::evaluation(1, (width, height), (model.mean, model.std))
    };
    let loader = Loader::new(Arc::clone(dataset), options, Position::default())?;
    let classes = model.config.classes;
    let mut confusion = Confusion::new(classes);
    let mut prepared: Option<(Mode, Inference)> = None;
    let mut prediction = Vec::new();
    for batch in loader {
        let batch = batch?;
        let sample = &dataset.samples[batch.samples[0]];
        let (w, h) = decode::image_size(&sample.label)?;
        let full_size = (w, h) != (width, height);
        let mode = if full_size { Mode::Logits } else { Mode::Labels };
        let inference = match prepared.take() {
            Some((prepared_mode, inference)) if prepared_mode == mode => inference,
            _ => Inference::new(model, runtime.open()?, 1, height, width, mode)?,
        };
        let (_, inference) = prepared.insert((mode, inference));
        inference.run(&batch.input)?;
        prediction.resize(w * h, 0);
        if full_size {
            let logits = inference.logits()?;
            let shape = Shape::new(1, classes, height, width);
            argmax_nchw(&logits, shape, h, w, &mut prediction);
            confusion.add(&prediction, decode::label(&sample.label, sample.encoding)?.as_raw())?;
        } else {
            inference.labels(&mut prediction)?;
            confusion.add(&prediction, &batch.labels)?;
        }
    }
    if confusion.total() == 0 {
        return Err(Error::Failed(format!(
            "{}: expected labelled pixels in {}, found only void",
            dataset.root.display(),
            dataset.splits.join(",")
        )));
    }
    let present = |iou: f64| iou.is_finite().then_some(iou);
    Ok(Validation {
        miou: confusion.miou(),
        global_accuracy: confusion.global_accuracy(),
        per_class_iou: confusion.per_class_iou().into_iter().map(present).collect(),
    })
}
