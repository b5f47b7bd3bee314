//! Images as they come to a network, and what comes back.

use crate::error::{Error, Result};
use crate::graph::Shape;

/// A batch of images.
#[derive(Debug, Clone, Copy)]
pub enum Images<'a> {
    /// Normalised: dense N x 3 x H x W.
    Normalised(&'a [f32]),
    /// As decoded.
    Rgb(Rgb<'a>),
}

/// 8-bit RGB, interleaved: N x H x W x 3. The network sees (value / 255 - mean) / std per channel; the
/// stem's zero padding is of these, so it has the mean colour.
#[derive(Debug, Clone, Copy)]
pub struct Rgb<'a> {
    /// Values.
    pub pixels: &'a [u8],
    /// Means per channel, of values from 0 to 1.
    pub mean: [f32; 3],
    /// Standard deviations per channel.
    pub std: [f32; 3],
}

/// Where the result of [`Backend::launch`](super::Backend::launch) goes.
#[derive(Debug)]
pub enum Output<'a> {
    /// N x H x W classes, of a plan for labels.
    Labels(&'a mut [u8]),
    /// Dense N x C x H x W, of a plan for logits.
    Logits(&'a mut [f32]),
}

impl Rgb<'_> {
    /// What a value is multiplied by per channel, and what is added to it then.
    pub fn scale_and_shift(&self) -> [[f32; 3]; 2] {
        let scale = self.std.map(|std| 1.0 / (255.0 * std));
        [scale, std::array::from_fn(|c| -self.mean[c] / self.std[c])]
    }

    /// Channel `c` of image `n`, normalised, into a plane of H x W.
    pub fn normalise_plane(&self, n: usize, c: usize, out: &mut [f32]) {
        let [scale, shift] = self.scale_and_shift().map(|values| values[c]);
        let image = &self.pixels[3 * n * out.len()..][..3 * out.len()];
        for (value, pixel) in out.iter_mut().zip(image.as_chunks::<3>().0) {
            *value = f32::from(pixel[c]).mul_add(scale, shift);
        }
    }

    /// All images, dense N x 3 x H x W.
    pub fn normalise(&self, shape: Shape) -> Vec<f32> {
        let mut out = vec![0.0; shape.len()];
        for (i, plane) in out.chunks_exact_mut(shape.plane()).enumerate() {
            self.normalise_plane(i / 3, i % 3, plane);
        }
        out
    }

    /// Checks the number of values for a network's input.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn check(&self, input: Shape) -> Result<()> {
        if self.pixels.len() == input.len() && input.c == 3 {
            return Ok(());
        }
        Err(Error::Shape {
            node: "network input".into(),
            expected: format!("{} bytes of RGB for {input}", input.len()),
            found: format!("{}", self.pixels.len()),
        })
    }
}
