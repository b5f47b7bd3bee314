//! Many photos: decoding the next and writing the previous one go on while the network runs.
//!
//! Three threads in a row, joined by short queues: photos leave in the order they came, so the
//! report is the same at every run. The middle one submits the next photo to a GPU before it collects
//! the labels of the one before, so that copies and work of neighbouring photos overlap.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, GrayImage, ImageEncoder, RgbImage};

use super::Segmenter;
use super::collect::{Item, OUTPUTS, Source, output_name};
use super::decode::{decode_bytes, decode_file};
use super::input::{NetworkSize, check_memory, network_size, normalise, resize};
use super::render::{self, Share};
use crate::error::{Error, Result};
use crate::files::{make_folder, write_atomic};

/// Photos that wait in each queue: enough to keep the network busy, little enough to bound memory.
const QUEUE: usize = 2;

/// What was made of one photo.
#[derive(Debug)]
pub struct Segmented {
    /// Photo's width and height.
    pub size: (u32, u32),
    /// Size at which the network ran.
    pub network: NetworkSize,
    /// Pixels per class, by index.
    pub pixels: Vec<u64>,
    /// Classes present, largest first.
    pub shares: Vec<Share>,
    /// Time to read, decode and resize.
    pub decode: Duration,
    /// Time from the network's input to labels at the photo's size; on a GPU a part of the photo
    /// before is in it.
    pub inference: Duration,
    /// Time to paint, encode and write the results.
    pub write: Duration,
    /// Files written.
    pub files: Vec<PathBuf>,
}

struct Prepared {
    photo: RgbImage,
    /// The photo at the network's size, where that is another.
    resized: Option<RgbImage>,
    network: NetworkSize,
    decode: Duration,
}

struct Labelled {
    prepared: Prepared,
    labels: GrayImage,
    inference: Duration,
}

/// Segments all items into the folder `out`, which is made, where it is missing, for the first one
/// that has results; [`check_folder`](crate::files::check_folder) says beforehand whether it can be.
/// `report` hears of each item in order, on another thread, as soon as its files
/// are on disk or it has failed; a failure stops nothing else.
///
/// # Errors
/// None of its own: `report` gets, for each item that failed, [`Error::Io`] naming the file that could
/// not be read or written, [`Error::Format`] for what is not an image, or what the device said.
pub fn run(
    items: Vec<Item>,
    segmenter: &mut Segmenter,
    requested: Option<(usize, usize)>,
    out: &Path,
    mut report: impl FnMut(&Item, Result<Segmented>) + Send,
) {
    let model = segmenter.model();
    let (to_network, from_decoder) = bounded(QUEUE);
    let (to_writer, from_network) = bounded(QUEUE);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for mut item in items {
                let prepared = source(&mut item)
                    .and_then(|source| prepare(&item.path, source, requested, model.train_size));
                if to_network.send((item, prepared)).is_err() {
                    return;
                }
            }
        });
        scope.spawn(move || {
            for (item, labelled) in from_network {
                let done = Result::and_then(labelled, |labelled: Labelled| {
                    write(&item, labelled, &model.classes, &model.palette, out)
                });
                report(&item, done);
            }
        });
        let under_way = VecDeque::new();
        // None where the writer is gone, whose panic the scope hands on.
        let _ = Labelling { segmenter, results: &to_writer, under_way }.all(&from_decoder);
        drop(to_writer);
    });
}

/// Takes the source out of an item: the error in it is handed on once.
fn source(item: &mut Item) -> Result<Source> {
    std::mem::replace(&mut item.source, Ok(Source::File))
}

/// A photo that the device works on.
struct UnderWay {
    item: Item,
    prepared: Prepared,
    start: Instant,
}

/// The middle thread. Its methods end with none where nobody listens to the results any more.
struct Labelling<'a, 'm> {
    segmenter: &'a mut Segmenter<'m>,
    results: &'a Sender<(Item, Result<Labelled>)>,
    under_way: VecDeque<UnderWay>,
}

impl Labelling<'_, '_> {
    fn all(&mut self, photos: &Receiver<(Item, Result<Prepared>)>) -> Option<()> {
        loop {
            // While the next photo is being decoded, the one under way is not kept waiting.
            let idle = self.under_way.is_empty();
            let next = if idle { photos.recv().ok() } else { photos.try_recv().ok() };
            match next {
                Some((item, prepared)) => self.take(item, prepared)?,
                None if idle => return Some(()),
                None => self.collect()?,
            }
        }
    }

    fn take(&mut self, item: Item, prepared: Result<Prepared>) -> Option<()> {
        let error = match prepared {
            Ok(prepared) => {
                while !self.segmenter.has_room(prepared.network, prepared.photo.dimensions()) {
                    self.collect()?;
                }
                match self.submit(&prepared) {
                    Ok(start) => {
                        self.under_way.push_back(UnderWay { item, prepared, start });
                        return Some(());
                    }
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        // Results leave in the order of the photos.
        while !self.under_way.is_empty() {
            self.collect()?;
        }
        self.results.send((item, Err(error))).ok()
    }

    fn submit(&mut self, prepared: &Prepared) -> Result<Instant> {
        let size = prepared.photo.dimensions();
        self.segmenter.prepare(prepared.network, size)?;
        let start = Instant::now();
        let pixels = prepared.resized.as_ref().unwrap_or(&prepared.photo);
        self.segmenter.submit(pixels, prepared.network, size)?;
        Ok(start)
    }

    fn collect(&mut self) -> Option<()> {
        let UnderWay { item, prepared, start } = self.under_way.pop_front()?;
        let labels = self.segmenter.collect();
        let inference = start.elapsed();
        let labelled = labels.map(|labels| Labelled { prepared, labels, inference });
        self.results.send((item, labelled)).ok()
    }
}

fn prepare(
    path: &Path,
    source: Source,
    requested: Option<(usize, usize)>,
    train_size: Option<(usize, usize)>,
) -> Result<Prepared> {
    let start = Instant::now();
    let photo = match source {
        Source::File => decode_file(path)?,
        Source::Bundled(bytes) => decode_bytes(bytes, path)?,
    };
    let (network, resized) = network_photo(&photo, requested, train_size)?;
    Ok(Prepared { photo, resized, network, decode: start.elapsed() })
}

/// The network's size for a photo, and the photo at that size where it is another.
fn network_photo(
    photo: &RgbImage,
    requested: Option<(usize, usize)>,
    train_size: Option<(usize, usize)>,
) -> Result<(NetworkSize, Option<RgbImage>)> {
    let network = network_size(photo.dimensions(), requested, train_size);
    check_memory(network)?;
    if photo.dimensions() == (network.width as u32, network.height as u32) {
        return Ok((network, None));
    }
    Ok((network, Some(resize(photo, network.width, network.height)?)))
}

/// The network's size for a photo, and the photo at that size as its input: normalised,
/// 3 x H x W.
pub(crate) fn network_input(
    photo: &RgbImage,
    requested: Option<(usize, usize)>,
    train_size: Option<(usize, usize)>,
    mean: [f32; 3],
    std: [f32; 3],
) -> Result<(NetworkSize, Vec<f32>)> {
    let (network, resized) = network_photo(photo, requested, train_size)?;
    let mut input = Vec::new();
    normalise(resized.as_ref().unwrap_or(photo), mean, std, &mut input);
    Ok((network, input))
}

fn write(
    item: &Item,
    labelled: Labelled,
    classes: &[String],
    palette: &[[u8; 3]],
    out: &Path,
) -> Result<Segmented> {
    let start = Instant::now();
    let Labelled { prepared: Prepared { photo, network, decode, .. }, labels, inference } =
        labelled;
    let pixels = render::count(&labels, classes.len());
    let shares = render::shares(&pixels);
    let mask = render::mask(&labels, palette);
    let overlay = render::overlay(&photo, &labels, &shares, classes, palette);
    let path = |ending| out.join(output_name(&item.name, ending));
    let files = OUTPUTS.map(path).to_vec();
    let size = labels.dimensions();
    let overlay_size = overlay.dimensions();
    let rgb = ExtendedColorType::Rgb8;
    // The caller has checked that files can be created in it: not again for every photo.
    let _made = make_folder(out)?;
    write_png(&files[0], &labels, size, ExtendedColorType::L8, Content::Flat)?;
    write_png(&files[1], &mask, size, rgb, Content::Flat)?;
    write_png(&files[2], &overlay, overlay_size, rgb, Content::Photo)?;
    Ok(Segmented {
        size,
        network,
        pixels,
        shares,
        decode,
        inference,
        write: start.elapsed(),
        files,
    })
}

/// What a picture shows, which decides how it is compressed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Few colours in large areas: no filter, so that equal rows stay equal for the dictionary.
    Flat,
    /// A photograph: adaptive filters; more effort would cost time and save little.
    Photo,
}

fn write_png(
    path: &Path,
    pixels: &[u8],
    size: (u32, u32),
    colour: ExtendedColorType,
    content: Content,
) -> Result<()> {
    let png = encode_png(path, pixels, size, colour, content)?;
    write_atomic(path, |file| file.write_all(&png))
}

/// A picture as PNG; `origin` names it in messages.
pub(crate) fn encode_png(
    origin: &Path,
    pixels: &[u8],
    (width, height): (u32, u32),
    colour: ExtendedColorType,
    content: Content,
) -> Result<Vec<u8>> {
    let (compression, filter) = match content {
        Content::Flat => (CompressionType::Level(3), FilterType::NoFilter),
        Content::Photo => (CompressionType::Fast, FilterType::Adaptive),
    };
    let mut png = Vec::new();
    PngEncoder::new_with_quality(&mut png, compression, filter)
        .write_image(pixels, width, height, colour)
        .map_err(|e| Error::Failed(format!("{}: cannot encode as PNG: {e}", origin.display())))?;
    Ok(png)
}
