//! Decoding of images and label planes, with what was expected in every error.

use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::Path;

use image::{GrayImage, ImageReader, RgbImage};

use super::{VOID, camvid, cityscapes};
use crate::error::{Error, Result};
use crate::graph::MAX_SIDE;

/// What the values of a label file mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabelEncoding {
    /// 0 to 10 classes, 11 and 255 void.
    Camvid,
    /// Cityscapes' 34 label ids, of which 19 are classes; 255 void.
    CityscapesIds,
    /// 0 to 18 classes, 255 void.
    CityscapesTrainIds,
}

impl LabelEncoding {
    /// Train id (or [`VOID`]) of a stored value, `None` where the value is not allowed.
    pub fn train_id(self, value: u8) -> Option<u8> {
        match self {
            _ if value == VOID => Some(VOID),
            LabelEncoding::Camvid => match usize::from(value).cmp(&camvid::CLASSES.len()) {
                std::cmp::Ordering::Less => Some(value),
                std::cmp::Ordering::Equal => Some(VOID),
                std::cmp::Ordering::Greater => None,
            },
            LabelEncoding::CityscapesIds => cityscapes::TRAIN_IDS.get(usize::from(value)).copied(),
            LabelEncoding::CityscapesTrainIds => {
                (usize::from(value) < cityscapes::CLASSES.len()).then_some(value)
            }
        }
    }

    fn allowed(self) -> &'static str {
        match self {
            LabelEncoding::Camvid => "CamVid labels from 0 to 10, or 11 or 255 for void",
            LabelEncoding::CityscapesIds => "Cityscapes label ids from 0 to 33, or 255 for void",
            LabelEncoding::CityscapesTrainIds => {
                "Cityscapes train ids from 0 to 18, or 255 for void"
            }
        }
    }
}

/// Decodes an image of any common format to 8-bit RGB.
///
/// # Errors
/// [`Error::Io`] where the file cannot be read, [`Error::Format`] where it is no image or cut off.
pub fn image(path: &Path) -> Result<RgbImage> {
    match reader(path)?.decode() {
        Ok(image) if image.width() == 0 || image.height() == 0 => {
            Err(Error::format(path, "an image", "an empty one"))
        }
        Ok(image) => Ok(image.into_rgb8()),
        Err(e) => Err(not_an_image(path, e)),
    }
}

/// Width and height of an image, from its header.
///
/// # Errors
/// As [`image()`].
pub fn image_size(path: &Path) -> Result<(usize, usize)> {
    let (w, h) = reader(path)?.into_dimensions().map_err(|e| not_an_image(path, e))?;
    Ok((w as usize, h as usize))
}

fn reader(path: &Path) -> Result<ImageReader<BufReader<File>>> {
    let unreadable = |e| Error::io("cannot read image", path, e);
    // Content decides, not the extension: PNGs named .jpg are common in copies of CamVid.
    ImageReader::open(path).and_then(ImageReader::with_guessed_format).map_err(unreadable)
}

fn not_an_image(path: &Path, error: image::ImageError) -> Error {
    match error {
        // The decoders report a cut-off file as an unexpected end of the stream: that is the
        // content's fault, all other I/O errors are the system's.
        image::ImageError::IoError(e) if e.kind() != ErrorKind::UnexpectedEof => {
            Error::io("cannot read image", path, e)
        }
        e => Error::format(path, "a complete image (PNG, JPEG, ...)", e.to_string()),
    }
}

/// Decodes a label PNG (8-bit grey values, or palette indices of any depth) to train ids, 255 =
/// void. The palette's colours are ignored: the index is the label.
///
/// # Errors
/// [`Error::Io`] where the file cannot be read; [`Error::Format`] where it is not a complete PNG
/// of that type, or holds a value that `encoding` does not allow.
pub fn label(path: &Path, encoding: LabelEncoding) -> Result<GrayImage> {
    const EXPECTED: &str = "a label PNG with one 8-bit channel or palette indices";
    let bad = |e: png::DecodingError| match e {
        png::DecodingError::IoError(e) if e.kind() != ErrorKind::UnexpectedEof => {
            Error::io("cannot read label", path, e)
        }
        e => Error::format(path, EXPECTED, e.to_string()),
    };
    let file = File::open(path).map_err(|e| Error::io("cannot read label", path, e))?;
    // The png crate itself: the image crate would turn palette indices into colours.
    let mut decoder = png::Decoder::new(BufReader::new(file));
    decoder.set_transformations(png::Transformations::IDENTITY);
    let mut reader = decoder.read_info().map_err(bad)?;
    let (info_w, info_h) = (reader.info().width as usize, reader.info().height as usize);
    let (colour, depth) = reader.output_color_type();
    let bits = match (colour, depth) {
        (png::ColorType::Indexed, depth) => depth as usize,
        (png::ColorType::Grayscale, png::BitDepth::Eight) => 8,
        (colour, depth) => {
            let found = format!("{colour:?} with {} bits per channel", depth as u8);
            return Err(Error::format(path, EXPECTED, found));
        }
    };
    if info_w > MAX_SIDE || info_h > MAX_SIDE {
        let expected = format!("a label of at most {MAX_SIDE}x{MAX_SIDE}");
        return Err(Error::format(path, expected, format!("{info_w}x{info_h}")));
    }
    let row = (info_w * bits).div_ceil(8);
    let mut packed = vec![0; row * info_h];
    reader.next_frame(&mut packed).map_err(bad)?;
    let values = if bits == 8 { packed } else { unpack(&packed, row, info_w, bits) };
    to_train_ids(path, values, info_w, info_h, encoding)
}

/// Palette indices of 1, 2 or 4 bits, the leftmost pixel in the high bits, to one byte each.
fn unpack(packed: &[u8], row: usize, width: usize, bits: usize) -> Vec<u8> {
    let per_byte = 8 / bits;
    let mask = (1u8 << bits) - 1;
    let pixel =
        |line: &[u8], x: usize| line[x / per_byte] >> (8 - bits * (x % per_byte + 1)) & mask;
    packed.chunks_exact(row).flat_map(|line| (0..width).map(move |x| pixel(line, x))).collect()
}

fn to_train_ids(
    path: &Path,
    mut values: Vec<u8>,
    w: usize,
    h: usize,
    encoding: LabelEncoding,
) -> Result<GrayImage> {
    let table: Vec<Option<u8>> = (0..=255).map(|v| encoding.train_id(v)).collect();
    for (i, value) in values.iter_mut().enumerate() {
        match table[usize::from(*value)] {
            Some(id) => *value = id,
            None => {
                let found = format!("{value} at pixel x {}, y {}", i % w, i / w);
                return Err(Error::format(path, encoding.allowed(), found));
            }
        }
    }
    GrayImage::from_raw(w as u32, h as u32, values)
        .ok_or_else(|| Error::format(path, format!("{w}x{h} pixels"), "fewer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_palette_indices_are_unpacked_row_by_row() {
        // Three pixels of two bits fill six bits of each row's byte.
        assert_eq!(unpack(&[0b00_01_10_00, 0b11_00_01_00], 1, 3, 2), [0, 1, 2, 3, 0, 1]);
        assert_eq!(unpack(&[0x1a, 0x20], 2, 3, 4), [1, 10, 2]);
    }

    #[test]
    fn encodings_map_void_and_refuse_the_rest() {
        assert_eq!(LabelEncoding::Camvid.train_id(10), Some(10));
        assert_eq!(LabelEncoding::Camvid.train_id(11), Some(VOID));
        assert_eq!(LabelEncoding::Camvid.train_id(12), None);
        assert_eq!(LabelEncoding::CityscapesIds.train_id(33), Some(18));
        assert_eq!(LabelEncoding::CityscapesIds.train_id(0), Some(VOID));
        assert_eq!(LabelEncoding::CityscapesIds.train_id(34), None);
        assert_eq!(LabelEncoding::CityscapesTrainIds.train_id(19), None);
        assert_eq!(LabelEncoding::CityscapesTrainIds.train_id(255), Some(VOID));
    }
}
