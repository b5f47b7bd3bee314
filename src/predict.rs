//! Class per pixel of a data set's images at their own size: what `fpenet eval` counts and
//! `fpenet export-predictions` writes.

use crossbeam_channel::Sender;
use image::RgbImage;

use crate::backend::Backend;
use crate::data::augment::{Normalise, Warp};
use crate::data::{DatasetKind, working_size};
use crate::error::Result;
use crate::exec::Inference;
use crate::graph::{Mode, Shape};
use crate::model::Model;
use crate::ops::resize::argmax_nchw;
use crate::segment::input::{NetworkSize, SizeReason, check_memory};

/// Images decoded ahead of the network.
pub const AHEAD: usize = 3;

/// An image as the network takes it.
#[derive(Debug, Clone)]
pub struct Input {
    /// 1 x 3 x H x W, normalised.
    pub values: Vec<f32>,
    /// Width and height of `values`.
    pub size: (usize, usize),
    /// Width and height of the image itself.
    pub full: (usize, usize),
}

impl Input {
    /// An image at `size` (width, height); without one, at its own size, or at half of it for
    /// Cityscapes (paper, section 4.1).
    ///
    /// # Errors
    /// [`Error::Failed`](crate::Error::Failed) for a size that cannot fit into the memory.
    pub fn new(
        image: &RgbImage,
        kind: DatasetKind,
        size: Option<(usize, usize)>,
        normalise: &Normalise,
    ) -> Result<Input> {
        let full = (image.width() as usize, image.height() as usize);
        let reason = if size.is_some() { SizeReason::Requested } else { SizeReason::Own };
        let size = size.unwrap_or_else(|| working_size(kind, full.0, full.1));
        check_memory(NetworkSize { width: size.0, height: size.1, reason })?;
        let mut values = vec![0.0; 3 * size.0 * size.1];
        Warp::resize(full, size).image(image, normalise, &mut values);
        Ok(Input { values, size, full })
    }
}

/// A model on a device, planned for one input size at a time.
pub struct Predictor<'a> {
    model: &'a Model,
    open: &'a mut dyn FnMut() -> Result<Box<dyn Backend>>,
    /// The network as planned for the last image.
    ready: Option<((usize, usize), Mode, Inference)>,
}

impl<'a> Predictor<'a> {
    /// Opens nothing yet: `open` is asked for a device at each new input size.
    pub fn new(
        model: &'a Model,
        open: &'a mut dyn FnMut() -> Result<Box<dyn Backend>>,
    ) -> Predictor<'a> {
        Predictor { model, open, ready: None }
    }

    /// Class per pixel at the image's own size, H x W; `out` is resized. Where the network's size
    /// is another, its logits are resized bilinearly before the largest is taken.
    ///
    /// # Errors
    /// A size that the network does not accept, or what the device says.
    pub fn labels(&mut self, input: &Input, out: &mut Vec<u8>) -> Result<()> {
        let ((w, h), (full_w, full_h)) = (input.size, input.full);
        // At the image's own size the device takes the argmax itself and no logits move.
        let mode = if input.size == input.full { Mode::Labels } else { Mode::Logits };
        let mut inference = match self.ready.take() {
            Some((size, planned, inference)) if (size, planned) == ((w, h), mode) => inference,
            _ => Inference::new(self.model, (self.open)()?, 1, h, w, mode)?,
        };
        inference.run(&input.values)?;
        out.resize(full_w * full_h, 0);
        if mode == Mode::Labels {
            inference.labels(out)?;
        } else {
            let shape = Shape::new(1, self.model.config.classes, h, w);
            argmax_nchw(&inference.logits()?, shape, full_h, full_w, out);
        }
        self.ready = Some(((w, h), mode, inference));
        Ok(())
    }

    /// The device of the last image in words; empty before the first.
    pub fn device(&self) -> String {
        self.ready.as_ref().map_or(String::new(), |(_, _, i)| i.backend().describe())
    }
}

/// Prepares `count` items one after the other on a thread's own time, until the receiver is gone
/// or one fails.
pub fn prepare_all<T>(
    count: usize,
    prepare: impl Fn(usize) -> Result<T>,
    sender: &Sender<Result<T>>,
) {
    for index in 0..count {
        let prepared = prepare(index);
        let failed = prepared.is_err();
        if sender.send(prepared).is_err() || failed {
            return;
        }
    }
}
