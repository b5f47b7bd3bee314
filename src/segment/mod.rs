//! Photos in, label maps and pictures out: the product's main job.
//!
//! [`collect`] lists the photos, [`pipeline`] decodes, segments and writes them in parallel,
//! [`Segmenter`] runs the network, [`render`] paints masks and legends.

pub mod collect;
pub mod decode;
pub mod input;
pub mod pipeline;
pub mod render;
pub mod text;

use image::GrayImage;

use std::collections::VecDeque;

use crate::backend::Backend;
use crate::backend::gpu::variants::Expanded;
use crate::device::{self, DeviceChoice, Precision};
use crate::error::{Error, Result};
use crate::exec::Inference;
use crate::graph::{Mode, Shape};
use crate::model::Model;
use crate::ops::resize::argmax_nchw;
use input::NetworkSize;

/// Executors that are kept: one for photos taken upright and one for those across.
const KEPT: usize = 2;

/// Where and how the network runs.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Device.
    pub device: DeviceChoice,
    /// Storage precision of activations.
    pub precision: Precision,
    /// CPU threads; all where none.
    pub threads: Option<usize>,
    /// Storage of expanded tensors; what the environment says where none.
    pub expanded: Option<Expanded>,
}

/// Labels photos of any size with one model; keeps the executors of the last sizes.
pub struct Segmenter<'a> {
    model: &'a Model,
    settings: Settings,
    /// Opened and waiting for its first executor.
    spare: Option<Box<dyn Backend>>,
    /// Most recently used last.
    kept: Vec<Kept>,
    /// Sizes of the photos under way, all of them in the executor used last.
    under_way: VecDeque<(u32, u32)>,
    warnings: Vec<String>,
}

struct Kept {
    width: usize,
    height: usize,
    mode: Mode,
    inference: Inference,
}

impl<'a> Segmenter<'a> {
    /// Opens the device; executors are made as photos come.
    ///
    /// # Errors
    /// [`Error::Device`] where the device does not work, [`Error::Usage`] for a combination of
    /// device and precision that does not exist.
    pub fn new(model: &'a Model, settings: Settings) -> Result<Self> {
        let spare = Some(open(settings)?);
        let (kept, warnings) = (Vec::new(), Vec::new());
        Ok(Segmenter { model, settings, spare, kept, under_way: VecDeque::new(), warnings })
    }

    /// What went wrong so far without being a reason to stop: files of the tuner's cache that could
    /// not be used.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The device: kind as on the command line, and in words.
    pub fn device(&self) -> (&'static str, String) {
        let kept = self.kept.last().map(|k| k.inference.backend());
        match self.spare.as_deref().or(kept) {
            Some(backend) => (backend.kind(), backend.describe()),
            None => ("none", String::new()),
        }
    }

    /// The model in use.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// Makes the executor for photos of a size, unless it is there: what [`Segmenter::labels`]
    /// would else do first.
    ///
    /// # Errors
    /// Whatever the device reports, out of memory above all.
    pub fn prepare(&mut self, network: NetworkSize, photo: (u32, u32)) -> Result<()> {
        self.executor(network.width, network.height, mode(network, photo)).map(drop)
    }

    /// Whether [`Segmenter::submit`] can take a photo before another is collected.
    pub fn has_room(&self, network: NetworkSize, photo: (u32, u32)) -> bool {
        let mode = mode(network, photo);
        let last = self.kept.last().filter(|k| k.fits(network.width, network.height, mode));
        self.under_way.is_empty() || last.is_some_and(|k| k.inference.has_room())
    }

    /// Photos submitted and not yet collected.
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Starts on a photo and returns while a GPU still works on it. `pixels` are 8-bit RGB at the
    /// network's size; the labels will have the photo's size (`photo`, width and height): where that
    /// differs from the network's, the logits are brought to it by bilinear resize before the largest
    /// is taken.
    ///
    /// # Errors
    /// [`Error::Usage`] without room, [`Error::Shape`] for pixels that are not of the network's size;
    /// whatever the device reports.
    pub fn submit(&mut self, pixels: &[u8], network: NetworkSize, photo: (u32, u32)) -> Result<()> {
        if !self.has_room(network, photo) {
            return Err(Error::Usage("segment: collect a photo before the next".into()));
        }
        let inference = self.executor(network.width, network.height, mode(network, photo))?;
        inference.launch_rgb(pixels)?;
        self.under_way.push_back(photo);
        Ok(())
    }

    /// Waits for the photo that was submitted first and gives its labels.
    ///
    /// # Errors
    /// [`Error::Usage`] where there is none; whatever the device reports.
    pub fn collect(&mut self) -> Result<GrayImage> {
        let (width, height) = self.under_way.front().copied().unwrap_or_default();
        let mut labels = GrayImage::new(width, height);
        self.collect_into(&mut labels)?;
        Ok(labels)
    }

    /// [`Segmenter::collect`] into an image of the photo's size.
    ///
    /// # Errors
    /// As [`Segmenter::collect`]; [`Error::Usage`] for an image of another size.
    pub fn collect_into(&mut self, labels: &mut GrayImage) -> Result<()> {
        let (Some((width, height)), Some(kept)) =
            (self.under_way.pop_front(), self.kept.last_mut())
        else {
            return Err(Error::Usage("segment: expected a photo to collect, found none".into()));
        };
        if labels.dimensions() != (width, height) {
            let (w, h) = labels.dimensions();
            let text = format!("segment: expected labels of {width}x{height}, found {w}x{h}");
            return Err(Error::Usage(text));
        }
        if kept.mode == Mode::Labels {
            return kept.inference.collect_labels(labels);
        }
        let logits = kept.inference.collect_logits()?;
        let shape = Shape::new(1, self.model.config.classes, kept.height, kept.width);
        argmax_nchw(&logits, shape, height as usize, width as usize, labels);
        Ok(())
    }

    /// Labels of one photo. `input` is the normalised photo, 3 x H x W at the network's size;
    /// the labels have the photo's size (`width` x `height`), as with [`Segmenter::submit`].
    ///
    /// # Errors
    /// [`Error::Failed`] for an input that is not of the network's size; whatever the device reports.
    pub fn labels(
        &mut self,
        input: &[f32],
        network: NetworkSize,
        (width, height): (u32, u32),
    ) -> Result<GrayImage> {
        let mut labels = GrayImage::new(width, height);
        let expected = 3 * network.width * network.height;
        if input.len() != expected {
            return Err(Error::Failed(format!(
                "network input: expected {expected} values for {network}, found {}",
                input.len()
            )));
        }
        let mode = mode(network, (width, height));
        let classes = self.model.config.classes;
        let inference = self.executor(network.width, network.height, mode)?;
        inference.run(input)?;
        if mode == Mode::Labels {
            inference.labels(&mut labels)?;
        } else {
            let logits = inference.logits()?;
            let shape = Shape::new(1, classes, network.height, network.width);
            argmax_nchw(&logits, shape, height as usize, width as usize, &mut labels);
        }
        Ok(labels)
    }

    fn executor(&mut self, width: usize, height: usize, mode: Mode) -> Result<&mut Inference> {
        let last = self.kept.last().is_some_and(|k| k.fits(width, height, mode));
        if !last && !self.under_way.is_empty() {
            return Err(Error::Usage("segment: collect the photos of another size first".into()));
        }
        let kept = match self.kept.iter().position(|k| k.fits(width, height, mode)) {
            Some(i) => self.kept.remove(i),
            None => {
                // Drop the old one before the new one takes its memory.
                if self.kept.len() == KEPT {
                    self.kept.remove(0);
                }
                let backend = match self.spare.take() {
                    Some(backend) => backend,
                    None => open(self.settings)?,
                };
                let inference = Inference::new(self.model, backend, 1, height, width, mode)?;
                let chosen = inference.backend().chosen();
                self.warnings.extend(chosen.and_then(|chosen| chosen.warning.clone()));
                Kept { width, height, mode, inference }
            }
        };
        self.kept.push(kept);
        Ok(&mut self.kept.last_mut().expect("just pushed").inference)
    }
}

impl Kept {
    fn fits(&self, width: usize, height: usize, mode: Mode) -> bool {
        (self.width, self.height, self.mode) == (width, height, mode)
    }
}

/// At the photo's own size the logits are never needed as such.
fn mode(network: NetworkSize, (width, height): (u32, u32)) -> Mode {
    let same = (network.width, network.height) == (width as usize, height as usize);
    if same { Mode::Labels } else { Mode::Logits }
}

fn open(settings: Settings) -> Result<Box<dyn Backend>> {
    let Settings { device, precision, threads, expanded } = settings;
    let mut backend = device::open_tuned(device, precision, threads)?;
    expanded.map_or(Ok(()), |expanded| backend.keep_expanded(expanded))?;
    Ok(backend)
}
