//! Photos from files: any of the `image` crate's formats, turned upright, as 8-bit RGB.

use std::io::Cursor;
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

use crate::error::{Error, Result};
use crate::files::read_limited;
use crate::graph::MAX_SIDE;
use crate::memory;

/// File name extensions that a folder is searched for.
pub const EXTENSIONS: [&str; 10] =
    ["png", "jpg", "jpeg", "bmp", "webp", "tif", "tiff", "ppm", "pgm", "pnm"];

/// Far above any photo; keeps a device or a disk image from being read into memory.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// Decoded size up to which nobody asks whether there is memory for it.
const UNCHECKED_BYTES: u64 = 256 << 20;

const EXPECTED: &str = "a complete image (PNG, JPEG, BMP, WebP, TIFF or PNM)";

/// Reads a photo, 8-bit RGB, turned upright as its EXIF orientation says. The format is told by
/// the content, not by the name; an alpha channel is dropped.
///
/// # Errors
/// [`Error::Io`] where the file cannot be read; [`Error::Format`] where it is not an image, is
/// cut short, or has a side over [`MAX_SIDE`] pixels.
pub fn decode_file(path: &Path) -> Result<RgbImage> {
    decode_bytes(&read_limited(path, MAX_FILE_BYTES)?, path)
}

/// [`decode_file`] for bytes in memory; `origin` names them in messages. H x W x 3, 8 bits a channel.
///
/// # Errors
/// [`Error::Format`] as [`decode_file`].
pub fn decode_bytes(bytes: &[u8], origin: &Path) -> Result<RgbImage> {
    let wrong = |found: String| Error::format(origin, EXPECTED, found);
    if bytes.is_empty() {
        return Err(wrong("an empty file".into()));
    }
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| Error::io("cannot read", origin, e))?;
    let Some(format) = reader.format() else {
        return Err(wrong("content that is none of these".into()));
    };
    // The decoder fills what a cut-off JPEG lacks with grey and reports nothing.
    if format == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
        return Err(wrong("a JPEG that is cut short (no end-of-image marker)".into()));
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE as u32);
    limits.max_image_height = Some(MAX_SIDE as u32);
    limits.max_alloc = Some(4 << 30);
    reader.limits(limits);

    let one_line = |e: image::ImageError| {
        let text = e.to_string();
        wrong(text.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let mut decoder = reader.into_decoder().map_err(one_line)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(wrong(format!("an image of {width}x{height} pixels")));
    }
    // A file of a few bytes may claim the largest sides; decoders allocate what it claims.
    let needed = decoder.total_bytes();
    if needed > UNCHECKED_BYTES && memory::available_bytes().is_some_and(|free| needed > free) {
        let gib = needed as f64 / f64::from(1 << 30);
        return Err(Error::format(
            origin,
            "an image that fits into the free memory",
            format!("{width}x{height} pixels, {gib:.1} GiB"),
        ));
    }
    let mut image = DynamicImage::from_decoder(decoder).map_err(one_line)?;
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

/// Walks the marker segments of a JPEG to its end-of-image marker.
///
/// Scanning for the marker's bytes alone would find those of an embedded thumbnail.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&byte) = bytes.get(at) {
        let marker = if byte == 0xFF { bytes.get(at + 1).copied() } else { None };
        at += match marker {
            Some(0xD9) => return true,
            // Compressed data, and fill bytes before a marker.
            None | Some(0xFF) => 1,
            // Stuffed zeros and restart markers: no length follows.
            Some(0x00 | 0x01 | 0xD0..=0xD8) => 2,
            Some(_) => match (bytes.get(at + 2), bytes.get(at + 3)) {
                (Some(&high), Some(&low)) => 2 + usize::from(u16::from_be_bytes([high, low])),
                _ => return false,
            },
        };
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::codecs::jpeg::JpegEncoder;
    use image::{ExtendedColorType, ImageEncoder};

    fn gradient(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 4) as u8, (y * 5) as u8, 90]))
    }

    fn encoded(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).expect("encodes");
        bytes.into_inner()
    }

    /// A JPEG whose EXIF says `orientation` (TIFF header, one IFD entry: tag 0x0112, SHORT).
    fn jpeg_with_orientation(image: &RgbImage, orientation: u8) -> Vec<u8> {
        let mut exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
        exif.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
        let mut bytes = Vec::new();
        let mut encoder = JpegEncoder::new_with_quality(&mut bytes, 95);
        encoder.set_exif_metadata(exif).expect("JPEG takes EXIF");
        encoder
            .write_image(image, image.width(), image.height(), ExtendedColorType::Rgb8)
            .expect("encodes");
        bytes
    }

    #[test]
    fn exif_orientation_turns_the_photo_upright() {
        let image = gradient(40, 24);
        let plain = decode_bytes(&jpeg_with_orientation(&image, 1), Path::new("a.jpg")).unwrap();
        let turned = decode_bytes(&jpeg_with_orientation(&image, 6), Path::new("b.jpg")).unwrap();
        assert_eq!(plain.dimensions(), (40, 24));
        assert_eq!(turned.dimensions(), (24, 40));
        assert_eq!(turned, image::imageops::rotate90(&plain), "6 means: turn 90 degrees clockwise");
    }

    #[test]
    fn every_truncation_is_an_error_that_names_the_file() {
        let image = gradient(64, 48);
        for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::Bmp, ImageFormat::Tiff] {
            let whole = encoded(&image, format);
            assert!(decode_bytes(&whole, Path::new("whole")).is_ok(), "{format:?}");
            for keep in [0, 1, 3, 20, whole.len() / 2, whole.len() * 9 / 10] {
                let error = decode_bytes(&whole[..keep], Path::new("cut.file"))
                    .expect_err(&format!("{format:?} cut to {keep} of {} bytes", whole.len()))
                    .to_string();
                assert!(error.starts_with("cut.file: expected a complete image"), "{error}");
                assert_eq!(error.lines().count(), 1, "{error}");
            }
        }
    }

    #[test]
    fn text_and_missing_files_are_refused() {
        let error = decode_bytes(b"hello, I am no image", Path::new("notes.jpg")).unwrap_err();
        assert!(error.to_string().starts_with("notes.jpg: expected"), "{error}");
        let error = decode_file(Path::new("/nonexistent/photo.png")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/photo.png"), "{error}");
    }

    #[test]
    fn grey_and_transparent_images_become_rgb() {
        let grey = image::GrayImage::from_pixel(5, 4, image::Luma([77]));
        let mut bytes = Cursor::new(Vec::new());
        grey.write_to(&mut bytes, ImageFormat::Png).unwrap();
        let rgb = decode_bytes(bytes.get_ref(), Path::new("grey.png")).unwrap();
        assert_eq!(rgb.get_pixel(4, 3).0, [77; 3]);
    }
}
