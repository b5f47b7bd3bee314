//! From a photo to the network's input: which size, resized how, normalised.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;

use crate::backend::Rgb;
use crate::error::{Error, Result};
use crate::graph::{MAX_SIDE, MIN_SIDE, Shape};
use crate::memory;

/// An image above this many times the training area is scaled down to the training area: what
/// the network learned to recognise at some size in pixels, it misses at twice that size.
pub const MAX_AREA_OVER_TRAINING: f64 = 2.0;

/// Why the network runs at the size it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SizeReason {
    /// The user asked for it.
    Requested,
    /// It is the photo's own.
    Own,
    /// The photo is far larger than what the network was trained on.
    TrainingArea,
    /// The photo is smaller (or longer) than what the network accepts.
    Bounds,
}

/// Size at which the network runs, width and height in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetworkSize {
    /// Width.
    pub width: usize,
    /// Height.
    pub height: usize,
    /// What decided it.
    pub reason: SizeReason,
}

impl std::fmt::Display for NetworkSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reason = match self.reason {
            SizeReason::Requested => "as requested",
            SizeReason::Own => "the photo's own size",
            SizeReason::TrainingArea => "scaled down to the area the model was trained on",
            SizeReason::Bounds => "scaled to the sizes the network accepts",
        };
        write!(f, "{}x{} ({reason})", self.width, self.height)
    }
}

/// Checks a size that a user asked for.
///
/// # Errors
/// [`Error::Usage`] for a side under [`MIN_SIDE`] or over [`MAX_SIDE`].
pub fn check_size((width, height): (usize, usize)) -> Result<()> {
    let sides = MIN_SIDE..=MAX_SIDE;
    if sides.contains(&width) && sides.contains(&height) {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "size: expected width and height from {MIN_SIDE} to {MAX_SIDE}, found {width}x{height}"
    )))
}

/// Decides the network's size for a photo of `width` x `height`: the requested one; else the
/// photo's own, but the training area (same aspect ratio, sides rounded to multiples of 8) where
/// the photo is more than [`MAX_AREA_OVER_TRAINING`] times as large. Sides are kept within what
/// the network accepts, so a photo of one pixel still gets its label. All sizes are (width, height).
pub fn network_size(
    (width, height): (u32, u32),
    requested: Option<(usize, usize)>,
    train_size: Option<(usize, usize)>,
) -> NetworkSize {
    if let Some((width, height)) = requested {
        return NetworkSize { width, height, reason: SizeReason::Requested };
    }
    let (mut size, mut reason) = ((width as usize, height as usize), SizeReason::Own);
    if let Some((tw, th)) = train_size {
        let (area, target) = (f64::from(width) * f64::from(height), (tw * th) as f64);
        if area > MAX_AREA_OVER_TRAINING * target {
            let scale = (target / area).sqrt();
            let side = |side: u32| ((f64::from(side) * scale / 8.0).round() as usize).max(1) * 8;
            (size, reason) = ((side(width), side(height)), SizeReason::TrainingArea);
        }
    }
    let clamped = (size.0.clamp(MIN_SIDE, MAX_SIDE), size.1.clamp(MIN_SIDE, MAX_SIDE));
    if clamped != size {
        reason = SizeReason::Bounds;
    }
    NetworkSize { width: clamped.0, height: clamped.1, reason }
}

/// Bytes per pixel that inference holds at the very least: 8-bit RGB, f32 RGB, and the stem's and
/// stage 1's activations at half the width and height (48 channels in f32).
const LEAST_BYTES_PER_PIXEL: u64 = 3 + 12 + 48;

/// Refuses a network size that cannot fit into the memory, before any of it is filled.
///
/// # Errors
/// [`Error::Failed`] with needed and free bytes.
pub fn check_memory(network: NetworkSize) -> Result<()> {
    let needed = (network.width * network.height) as u64 * LEAST_BYTES_PER_PIXEL;
    match memory::available_bytes() {
        Some(free) if needed > free => Err(Error::Failed(format!(
            "network size {network}: out of memory: at least {:.1} GiB needed, {:.1} GiB free; \
             use a smaller --size",
            gib(needed),
            gib(free)
        ))),
        _ => Ok(()),
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Resizes a photo, bilinear, antialiased when shrinking.
///
/// # Errors
/// [`Error::Failed`] where the resizer refuses the sizes.
pub fn resize(photo: &RgbImage, width: usize, height: usize) -> Result<RgbImage> {
    let (w, h) = (width as u32, height as u32);
    if photo.dimensions() == (w, h) {
        return Ok(photo.clone());
    }
    let failed = |e: &dyn std::fmt::Display| Error::Failed(format!("resize to {w}x{h}: {e}"));
    // Typed images: the untyped call would compile a resizer for each of the crate's pixel types,
    // half of this library's build time.
    let source = TypedImageRef::<U8x3>::from_buffer(photo.width(), photo.height(), photo.as_raw())
        .map_err(|e| failed(&e))?;
    let mut out = RgbImage::new(w, h);
    let mut target = TypedImage::<U8x3>::from_buffer(w, h, &mut out).map_err(|e| failed(&e))?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
    Resizer::new().resize_typed(&source, &mut target, &options).map_err(|e| failed(&e))?;
    Ok(out)
}

/// Writes a photo as one normalised image, 3 x H x W: (value / 255 - mean) / std per channel.
/// Anything in `out` is replaced.
pub fn normalise(photo: &RgbImage, mean: [f32; 3], std: [f32; 3], out: &mut Vec<f32>) {
    let shape = Shape::new(1, 3, photo.height() as usize, photo.width() as usize);
    *out = Rgb { pixels: photo.as_raw(), mean, std }.normalise(shape);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_photo_keeps_its_size_until_it_is_far_larger_than_the_training_images() {
        let train = Some((480, 360));
        let own = network_size((640, 480), None, train);
        assert_eq!((own.width, own.height, own.reason), (640, 480, SizeReason::Own));
        let large = network_size((1920, 1080), None, train);
        assert_eq!((large.width, large.height), (552, 312));
        assert_eq!(large.reason, SizeReason::TrainingArea);
        assert_eq!(network_size((1920, 1080), None, None).reason, SizeReason::Own);
        let asked = network_size((1920, 1080), Some((640, 320)), train);
        assert_eq!((asked.width, asked.height), (640, 320));
    }

    #[test]
    fn tiny_and_long_photos_are_brought_into_the_accepted_range() {
        let one = network_size((1, 1), None, None);
        assert_eq!((one.width, one.height, one.reason), (16, 16, SizeReason::Bounds));
        let strip = network_size((40_000, 3), None, Some((480, 360)));
        assert!(strip.width <= MAX_SIDE && strip.height >= MIN_SIDE);
    }

    #[test]
    fn absurd_sizes_are_wrong_usage() {
        for size in [(0, 0), (0, 512), (15, 512), (MAX_SIDE + 1, 512), (1 << 40, 1 << 40)] {
            assert_eq!(check_size(size).unwrap_err().exit_code(), 2, "{size:?}");
        }
        assert!(check_size((MIN_SIDE, MAX_SIDE)).is_ok());
    }

    #[test]
    fn normalisation_is_planar_rgb() {
        let mut photo = RgbImage::new(2, 1);
        photo.put_pixel(0, 0, image::Rgb([255, 0, 51]));
        photo.put_pixel(1, 0, image::Rgb([0, 255, 102]));
        let mut out = vec![9.0; 1];
        normalise(&photo, [0.5, 0.25, 0.0], [0.5, 0.25, 1.0], &mut out);
        let expected = [1.0, -1.0, -1.0, 3.0, 0.2, 0.4];
        assert_eq!(out.len(), 6);
        for (value, expected) in out.iter().zip(expected) {
            // One fused multiply-add instead of a division and a subtraction: an ulp or two.
            assert!((value - expected).abs() < 1e-6, "{out:?}");
        }
    }

    #[test]
    fn resizing_keeps_a_flat_colour_and_hits_the_size() {
        let photo = RgbImage::from_pixel(33, 21, image::Rgb([10, 200, 90]));
        let small = resize(&photo, 16, 40).unwrap();
        assert_eq!(small.dimensions(), (16, 40));
        assert!(small.pixels().all(|p| p.0 == [10, 200, 90]));
    }
}
