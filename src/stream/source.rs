//! Where frames come from. All frames of a source have one size.

use std::io::Read;
use std::path::{Path, PathBuf};

use image::RgbImage;

use super::colour::{Matrix, ToRgb};
use super::y4m::{self, Header, Range};
use crate::error::{Error, Result};
use crate::segment::collect;
use crate::segment::decode::decode_file;

/// Frames one after another.
pub trait Source: Send {
    /// Width and height of every frame.
    fn size(&self) -> (u32, u32);

    /// Reads the next frame into `frame`, which has the source's size; false at the end.
    ///
    /// # Errors
    /// [`Error::Io`] where the input cannot be read, [`Error::Format`] where it ends within a
    /// frame or holds something else.
    fn next(&mut self, frame: &mut RgbImage) -> Result<bool>;
}

/// Raw interleaved RGB, 3 bytes a pixel, rows without gaps (ffmpeg: `-f rawvideo -pix_fmt rgb24`).
pub struct RawRgb<R> {
    input: R,
    origin: PathBuf,
    size: (u32, u32),
    frames: u64,
}

impl<R: Read> RawRgb<R> {
    /// Frames of `size` (width, height); `origin` names the input in messages.
    pub fn new(input: R, origin: &Path, size: (u32, u32)) -> Self {
        RawRgb { input, origin: origin.to_path_buf(), size, frames: 0 }
    }
}

impl<R: Read + Send> Source for RawRgb<R> {
    fn size(&self) -> (u32, u32) {
        self.size
    }

    fn next(&mut self, frame: &mut RgbImage) -> Result<bool> {
        let bytes: &mut [u8] = frame;
        let mut found = 0;
        while found < bytes.len() {
            match self.input.read(&mut bytes[found..]) {
                Ok(0) => break,
                Ok(count) => found += count,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("cannot read", &self.origin, e)),
            }
        }
        if found > 0 && found < bytes.len() {
            let (width, height) = self.size;
            let expected = format!("whole frames of {width}x{height} (rgb24) to the end");
            let number = self.frames + 1;
            let found = format!("frame {number}: {found} of {} bytes", bytes.len());
            return Err(Error::format(&self.origin, expected, found));
        }
        self.frames += u64::from(found > 0);
        Ok(found > 0)
    }
}

/// A YUV4MPEG2 stream.
pub struct Y4m<R> {
    reader: y4m::Reader<R>,
    planes: Vec<u8>,
    convert: ToRgb,
}

impl<R: Read> Y4m<R> {
    /// Frames of a stream whose header has been read. Where the stream does not tell its range,
    /// `range` says it; `matrix` is never told.
    pub fn new(reader: y4m::Reader<R>, matrix: Matrix, range: Option<Range>) -> Self {
        // Limited is what ffmpeg assumes of such a stream, and what players do.
        let range = range.or(reader.header().range).unwrap_or(Range::Limited);
        let convert = ToRgb::new(reader.header(), matrix, range);
        Y4m { reader, planes: Vec::new(), convert }
    }

    /// What the stream's first line says.
    pub fn header(&self) -> &Header {
        self.reader.header()
    }
}

impl<R: Read + Send> Source for Y4m<R> {
    fn size(&self) -> (u32, u32) {
        (self.header().width as u32, self.header().height as u32)
    }

    fn next(&mut self, frame: &mut RgbImage) -> Result<bool> {
        let there = self.reader.read_frame(&mut self.planes)?;
        if there {
            self.convert.convert(&self.planes, frame);
        }
        Ok(there)
    }
}

/// A folder of pictures, by name.
pub struct Folder {
    files: std::vec::IntoIter<PathBuf>,
    /// The first picture, read ahead for its size.
    first: Option<RgbImage>,
    size: (u32, u32),
}

impl Folder {
    /// Lists a folder's pictures and reads the first.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] for a folder without pictures or a first file that is none.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for item in collect::collect(&[folder.to_path_buf()]) {
            item.source?;
            files.push(item.path);
        }
        let mut files = files.into_iter();
        let first = decode_file(&files.next().expect("an empty folder is an error"))?;
        Ok(Folder { files, size: first.dimensions(), first: Some(first) })
    }
}

impl Source for Folder {
    fn size(&self) -> (u32, u32) {
        self.size
    }

    fn next(&mut self, frame: &mut RgbImage) -> Result<bool> {
        if let Some(first) = self.first.take() {
            *frame = first;
            return Ok(true);
        }
        let Some(path) = self.files.next() else { return Ok(false) };
        let picture = decode_file(&path)?;
        if picture.dimensions() != self.size {
            let (width, height) = self.size;
            let expected = format!("{width}x{height} pixels, as the folder's first picture has");
            let found = format!("{}x{}", picture.width(), picture.height());
            return Err(Error::format(&path, expected, found));
        }
        *frame = picture;
        Ok(true)
    }
}
