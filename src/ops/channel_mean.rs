//! Mean over channels: N x C x H x W -> N x 1 x H x W.

use rayon::prelude::*;

use crate::backend::cpu::{Isa, View, ViewMut, planes};
use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [x] => Ok(x.with_channels(1)),
        _ => Err("one operand".into()),
    }
}

/// Pixels that one task averages over all channels.
const CHUNK: usize = 4096;

/// y[n][p] = mean over c of x[n][c][p].
pub fn forward(isa: Isa, x: View, y: ViewMut) {
    let (channels, pixels) = (x.shape().c, x.shape().plane());
    let chunks = pixels.div_ceil(CHUNK);
    (0..x.shape().n * chunks).into_par_iter().for_each(|task| {
        let (n, start) = (task / chunks, task % chunks * CHUNK);
        let range = start..pixels.min(start + CHUNK);
        // Tasks share the plane; each owns its range of pixels.
        let y = unsafe { y.pixels_mut(n, 0, range.clone()) };
        y.fill(0.0);
        for c in 0..channels {
            planes::add_scaled(isa, &x.plane(n, c)[range.clone()], 1.0 / channels as f32, y);
        }
    });
}

/// dx[n][c][p] = dy[n][p] / C.
pub fn backward(isa: Isa, dy: View, dx: ViewMut, accumulate: bool) {
    let channels = dx.shape().c;
    (0..dx.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        // One task per plane.
        let dx = unsafe { dx.plane_mut(n, c) };
        if !accumulate {
            dx.fill(0.0);
        }
        planes::add_scaled(isa, dy.plane(n, 0), 1.0 / channels as f32, dx);
    });
}
