//! Figures of a model on a data set: inference over a split, one confusion matrix.

use std::path::Path;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use image::GrayImage;

use crate::backend::Backend;
use crate::data::augment::Normalise;
use crate::data::{Dataset, DatasetKind};
use crate::error::{Error, Result};
use crate::metrics::Confusion;
use crate::model::Model;
use crate::predict::{AHEAD, Input, Predictor, prepare_all};

/// What a model did on a split.
#[derive(Debug, Clone)]
pub struct Evaluation {
    /// Pixel counts, from which every figure follows.
    pub confusion: Confusion,
    /// Images evaluated.
    pub images: usize,
    /// Width and height at which the network ran on the last image.
    pub size: (usize, usize),
    /// Device in words.
    pub device: String,
    /// Time in the network and its argmax, without decoding.
    pub inference: Duration,
    /// Wall-clock time in all.
    pub elapsed: Duration,
}

/// A sample that was just evaluated.
#[derive(Debug)]
pub struct Frame<'a> {
    /// Index into the data set's samples.
    pub index: usize,
    /// Train ids, 255 = void.
    pub truth: &'a GrayImage,
    /// Class per pixel, of the truth's size.
    pub prediction: &'a [u8],
    /// Counts of this and all frames before.
    pub confusion: &'a Confusion,
}

/// Runs `model` over every sample of `dataset`, one image at a time.
///
/// The network sees images at `size` (width, height); without one, at their own size, or at half
/// of it for Cityscapes (paper, section 4.1). Predictions are compared at the labels' full size:
/// where that differs from the network's, the logits are resized bilinearly before the argmax.
/// `open_backend` is asked for a device at each new input size; `progress` hears the number of
/// images done and the counts so far.
///
/// # Errors
/// [`Error::Usage`] where the model's number of classes is not the data set's; unreadable
/// samples, naming the file; what the device says; [`Error::Failed`] where no pixel is labelled.
pub fn evaluate(
    model: &Model,
    dataset: &Dataset,
    size: Option<(usize, usize)>,
    open_backend: &mut dyn FnMut() -> Result<Box<dyn Backend>>,
    progress: &mut dyn FnMut(usize, &Confusion),
) -> Result<Evaluation> {
    evaluate_frames(model, dataset, size, open_backend, &mut |frame| {
        progress(frame.index + 1, frame.confusion);
        Ok(())
    })
}

/// [`evaluate`] that shows every frame with its prediction, in the data set's order.
///
/// # Errors
/// As [`evaluate`], and those of `each`, which end the work.
pub fn evaluate_frames(
    model: &Model,
    dataset: &Dataset,
    size: Option<(usize, usize)>,
    open_backend: &mut dyn FnMut() -> Result<Box<dyn Backend>>,
    each: &mut dyn FnMut(&Frame) -> Result<()>,
) -> Result<Evaluation> {
    check_classes(model, dataset.kind, &dataset.root)?;
    dataset.check_labelled()?;
    let start = Instant::now();
    let mut evaluation = Evaluation {
        confusion: Confusion::new(model.config.classes),
        images: 0,
        size: (0, 0),
        device: String::new(),
        inference: Duration::ZERO,
        elapsed: Duration::ZERO,
    };
    let mut predictor = Predictor::new(model, open_backend);
    let mut prediction = Vec::new();
    let normalise = Normalise::new(model.mean, model.std);
    let prepare = |index| {
        let (image, truth) = dataset.load(index)?;
        Ok((Input::new(&image, dataset.kind, size, &normalise)?, truth))
    };
    std::thread::scope(|scope| -> Result<()> {
        let (sender, receiver) = bounded(AHEAD);
        scope.spawn(move || prepare_all(dataset.len(), prepare, &sender));
        // An error drops the receiver, which ends the decoding thread.
        for (index, prepared) in receiver.into_iter().enumerate() {
            let (input, truth) = prepared?;
            let start = Instant::now();
            predictor.labels(&input, &mut prediction)?;
            evaluation.inference += start.elapsed();
            evaluation.confusion.add(&prediction, truth.as_raw())?;
            evaluation.images += 1;
            evaluation.size = input.size;
            if evaluation.device.is_empty() {
                evaluation.device = predictor.device();
            }
            let confusion = &evaluation.confusion;
            each(&Frame { index, truth: &truth, prediction: &prediction, confusion })?;
        }
        Ok(())
    })?;
    evaluation.elapsed = start.elapsed();
    Ok(evaluation)
}

/// A model that does not have the data set's number of classes is wrong usage.
pub(crate) fn check_classes(model: &Model, kind: DatasetKind, root: &Path) -> Result<()> {
    let (found, expected) = (model.config.classes, kind.classes().len());
    if found == expected {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "model: expected the {expected} classes of {kind} ({}), found {found}; \
         use a model trained on that data set, or name the data set's layout with --dataset",
        root.display()
    )))
}
