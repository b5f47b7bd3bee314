//! Figures of a model on a data set: inference over a split, one confusion matrix.

use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use image::GrayImage;

use crate::backend::Backend;
use crate::data::augment::{Normalise, Warp};
use crate::data::{Dataset, working_size};
use crate::error::{Error, Result};
use crate::exec::Inference;
use crate::graph::{Mode, Shape};
use crate::metrics::Confusion;
use crate::model::Model;
use crate::ops::resize::argmax_nchw;

/// Samples decoded ahead of the network.
const AHEAD: usize = 3;

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

/// An image ready for the network, and its truth.
struct Prepared {
    /// 1 x 3 x H x W.
    input: Vec<f32>,
    /// Width and height of `input`.
    size: (usize, usize),
    /// Train ids at the label's own size.
    truth: GrayImage,
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
    check_classes(model, dataset)?;
    let start = Instant::now();
    let mut run = Run {
        model,
        open_backend,
        ready: None,
        prediction: Vec::new(),
        evaluation: Evaluation {
            confusion: Confusion::new(model.config.classes),
            images: 0,
            size: (0, 0),
            device: String::new(),
            inference: Duration::ZERO,
            elapsed: Duration::ZERO,
        },
    };
    let normalise = Normalise::new(model.mean, model.std);
    std::thread::scope(|scope| {
        let (sender, receiver) = bounded(AHEAD);
        scope.spawn(move || decode_all(dataset, size, &normalise, &sender));
        // An error drops the receiver, which ends the decoding thread.
        for prepared in receiver {
            run.image(&prepared?)?;
            progress(run.evaluation.images, &run.evaluation.confusion);
        }
        Ok(())
    })?;
    let mut evaluation = run.evaluation;
    evaluation.elapsed = start.elapsed();
    if evaluation.confusion.total() == 0 {
        return Err(Error::Failed(format!(
            "{}: expected labelled pixels in {}, found only void",
            dataset.root.display(),
            dataset.splits.join(",")
        )));
    }
    Ok(evaluation)
}

fn check_classes(model: &Model, dataset: &Dataset) -> Result<()> {
    let (found, expected) = (model.config.classes, dataset.classes.len());
    if found == expected {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "model: expected the {expected} classes of {} ({}), found {found}; \
         use a model trained on that data set, or name the data set's layout with --dataset",
        dataset.kind,
        dataset.root.display()
    )))
}

fn decode_all(
    dataset: &Dataset,
    size: Option<(usize, usize)>,
    normalise: &Normalise,
    sender: &Sender<Result<Prepared>>,
) {
    for index in 0..dataset.len() {
        let prepared = dataset.load(index).map(|(image, truth)| {
            let source = (image.width() as usize, image.height() as usize);
            let size = size.unwrap_or_else(|| working_size(dataset.kind, source.0, source.1));
            let mut input = vec![0.0; 3 * size.0 * size.1];
            Warp::resize(source, size).image(&image, normalise, &mut input);
            Prepared { input, size, truth }
        });
        let failed = prepared.is_err();
        if sender.send(prepared).is_err() || failed {
            return;
        }
    }
}

/// An evaluation under way.
struct Run<'a> {
    model: &'a Model,
    open_backend: &'a mut dyn FnMut() -> Result<Box<dyn Backend>>,
    /// The network as planned for the last image's size.
    ready: Option<((usize, usize), Mode, Inference)>,
    prediction: Vec<u8>,
    evaluation: Evaluation,
}

impl Run<'_> {
    fn image(&mut self, prepared: &Prepared) -> Result<()> {
        let (w, h) = prepared.size;
        let (full_w, full_h) = (prepared.truth.width() as usize, prepared.truth.height() as usize);
        // At the labels' own size the device takes the argmax itself and no logits move.
        let mode = if (w, h) == (full_w, full_h) { Mode::Labels } else { Mode::Logits };
        let mut inference = match self.ready.take() {
            Some((size, planned, inference)) if (size, planned) == ((w, h), mode) => inference,
            _ => Inference::new(self.model, (self.open_backend)()?, 1, h, w, mode)?,
        };
        let start = Instant::now();
        inference.run(&prepared.input)?;
        self.prediction.resize(full_w * full_h, 0);
        if mode == Mode::Labels {
            inference.labels(&mut self.prediction)?;
        } else {
            let shape = Shape::new(1, self.model.config.classes, h, w);
            argmax_nchw(&inference.logits()?, shape, full_h, full_w, &mut self.prediction);
        }
        let evaluation = &mut self.evaluation;
        evaluation.inference += start.elapsed();
        evaluation.confusion.add(&self.prediction, prepared.truth.as_raw())?;
        evaluation.images += 1;
        evaluation.size = prepared.size;
        if evaluation.device.is_empty() {
            evaluation.device = inference.backend().describe();
        }
        self.ready = Some(((w, h), mode, inference));
        Ok(())
    }
}
