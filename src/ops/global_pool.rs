//! Global average pooling: N x C x H x W -> N x C x 1 x 1.

use rayon::prelude::*;

use crate::backend::cpu::{Isa, View, ViewMut, planes};
use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [x] => Ok(Shape::new(x.n, x.c, 1, 1)),
        _ => Err("one operand".into()),
    }
}

/// y[n][c] = mean over H, W of x[n][c].
pub fn forward(isa: Isa, x: View, y: ViewMut) {
    let channels = x.shape().c;
    (0..x.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        let mean = planes::sum(isa, x.plane(n, c)) / x.shape().plane() as f64;
        // One task per plane.
        let y = unsafe { y.plane_mut(n, c) };
        y[0] = mean as f32;
    });
}

/// dx[n][c][p] = dy[n][c] / (H * W).
pub fn backward(dy: View, dx: ViewMut, accumulate: bool) {
    let (channels, pixels) = (dx.shape().c, dx.shape().plane());
    (0..dx.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        let g = dy.plane(n, c)[0] / pixels as f32;
        let dx = unsafe { dx.plane_mut(n, c) };
        if accumulate {
            dx.iter_mut().for_each(|v| *v += g);
        } else {
            dx.fill(g);
        }
    });
}
