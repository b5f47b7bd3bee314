//! Channel statistics of the training images, for the zero-mean normalisation (paper, section
//! 4.1).

use rayon::prelude::*;

use crate::data::{Dataset, decode};
use crate::error::{Error, Result};

/// Most images looked at: a larger dataset is sampled at even distances, which moves the
/// statistics by less than a grey level and saves minutes on full-size Cityscapes.
pub const MAX_IMAGES: usize = 512;

/// Mean and standard deviation per channel (RGB, on the 0 to 1 scale) over the dataset's images.
///
/// The sums are integers, so the result does not depend on the number of threads.
///
/// # Errors
/// An empty dataset, or an unreadable image.
pub fn mean_and_std(dataset: &Dataset) -> Result<([f32; 3], [f32; 3])> {
    let count = dataset.samples.len();
    let taken = count.min(MAX_IMAGES);
    let zero = || ([0u64; 3], [0u64; 3], 0u64);
    let (sum, squares, pixels) = (0..taken)
        .into_par_iter()
        .map(|i| {
            let image = decode::image(&dataset.samples[i * count / taken].image)?;
            let (mut sum, mut squares, mut pixels) = zero();
            for pixel in image.pixels() {
                for c in 0..3 {
                    let v = u64::from(pixel.0[c]);
                    sum[c] += v;
                    squares[c] += v * v;
                }
                pixels += 1;
            }
            Ok((sum, squares, pixels))
        })
        .try_reduce(zero, |a, b| {
            let add = |x: [u64; 3], y: [u64; 3]| std::array::from_fn(|c| x[c] + y[c]);
            Ok((add(a.0, b.0), add(a.1, b.1), a.2 + b.2))
        })?;
    if pixels == 0 {
        return Err(Error::Failed("normalisation: expected training images, found none".into()));
    }
    let n = pixels as f64;
    let mean: [f64; 3] = std::array::from_fn(|c| sum[c] as f64 / n / 255.0);
    let std: [f64; 3] = std::array::from_fn(|c| {
        let variance = squares[c] as f64 / n / (255.0 * 255.0) - mean[c] * mean[c];
        // Images of one colour: any deviation normalises them, but it must not be zero.
        if variance > 1e-6 { variance.sqrt() } else { 1.0 }
    });
    Ok((mean.map(|v| v as f32), std.map(|v| v as f32)))
}
