//! Where results go: label maps, colours or overlays, raw or as YUV4MPEG2.

use std::io::{self, Write};

use image::{GrayImage, RgbImage};

use super::colour::{Matrix, to_planes};
use super::y4m::{self, Chroma, Header, Range};
use crate::segment::render;

/// What a frame of the output shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Show {
    /// Class index per pixel, 8-bit grey.
    Labels,
    /// The classes' colours.
    Colour,
    /// The frame under the classes' colours.
    Overlay,
}

/// How frames are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Container {
    /// YUV4MPEG2: labels as Cmono of full range, pictures as C444 of limited range.
    Y4m,
    /// Nothing but pixels: labels as gray8, pictures as rgb24.
    Raw,
}

/// What is written, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// Content of a frame.
    pub show: Show,
    /// Packing.
    pub container: Container,
    /// Frames per second as a fraction, for the header.
    pub fps: (u32, u32),
    /// Matrix of the pictures in YUV4MPEG2.
    pub matrix: Matrix,
}

/// Writes the results of frames of one size.
pub struct Sink<W> {
    output: W,
    format: Format,
    palette: Vec<[u8; 3]>,
    picture: RgbImage,
    planes: Vec<u8>,
}

impl<W: Write> Sink<W> {
    /// Writes the header, if there is one, for frames of `size` (width, height).
    ///
    /// # Errors
    /// What the output says.
    pub fn new(
        mut output: W,
        format: Format,
        palette: &[[u8; 3]],
        (width, height): (u32, u32),
    ) -> io::Result<Self> {
        if format.container == Container::Y4m {
            let (chroma, range) = match format.show {
                Show::Labels => (Chroma::Mono, Range::Full),
                Show::Colour | Show::Overlay => (Chroma::C444, Range::Limited),
            };
            let (width, height) = (width as usize, height as usize);
            let header = Header { width, height, fps: format.fps, chroma, range: Some(range) };
            y4m::write_header(&mut output, &header)?;
            output.flush()?;
        }
        Ok(Sink {
            output,
            format,
            palette: palette.to_vec(),
            picture: RgbImage::new(width, height),
            planes: Vec::new(),
        })
    }

    /// Writes one frame: `photo` and its `labels`, both of the sink's size.
    ///
    /// # Errors
    /// What the output says.
    pub fn write(&mut self, photo: &RgbImage, labels: &GrayImage) -> io::Result<()> {
        let pixels: &[u8] = match self.format.show {
            Show::Labels => labels,
            Show::Colour => {
                render::paint(&mut self.picture, labels, &self.palette);
                &self.picture
            }
            Show::Overlay => {
                self.picture.copy_from_slice(photo);
                render::blend(&mut self.picture, labels, &self.palette);
                &self.picture
            }
        };
        match (self.format.container, self.format.show) {
            (Container::Raw, _) => self.output.write_all(pixels)?,
            (Container::Y4m, Show::Labels) => y4m::write_frame(&mut self.output, pixels)?,
            (Container::Y4m, _) => {
                to_planes(pixels, self.format.matrix, &mut self.planes);
                y4m::write_frame(&mut self.output, &self.planes)?;
            }
        }
        self.output.flush()
    }

    /// Gives the output back.
    pub fn into_inner(self) -> W {
        self.output
    }
}
