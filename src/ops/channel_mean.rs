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

/// `y[n][p] = mean over c of x[n][c][p]`.
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

/// `dx[n][c][p] = dy[n][p] / C`.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    fn naive(inputs: &[T64]) -> T64 {
        let x = &inputs[0];
        T64::from_fn(x.shape.with_channels(1), |n, _, row, col| {
            (0..x.shape.c).map(|c| x.at(n, c, row, col)).sum::<f64>() / x.shape.c as f64
        })
    }

    #[test]
    fn mean_over_channels_and_its_gradient() {
        for shape in [Shape::new(1, 1, 1, 1), Shape::new(3, 5, 5, 7), Shape::new(1, 64, 1, 3)] {
            let mut rng = rng(4);
            let x = [T64::random(shape, &mut rng)];
            let dy = T64::random(shape.with_channels(1), &mut rng);
            let gradient = central_difference(naive, &x, 0, &dy);
            everywhere(|isa, layout, label| {
                let mut y = Buffer::unwritten(dy.shape, layout);
                forward(isa, Buffer::new(&x[0], layout).view(), y.view_mut());
                assert_close(label, &y.read(), &naive(&x), FORWARD);
                let dy = Buffer::new(&dy, layout);
                check_gradient(label, &gradient, layout, |dx, accumulate| {
                    backward(isa, dy.view(), dx, accumulate);
                });
            });
        }
    }

    #[test]
    fn planes_longer_than_a_task_are_covered() {
        let x = [T64::random(Shape::new(2, 3, 65, 67), &mut rng(5))];
        assert!(x[0].shape.plane() > CHUNK && !x[0].shape.plane().is_multiple_of(CHUNK));
        everywhere(|isa, layout, label| {
            let mut y = Buffer::unwritten(x[0].shape.with_channels(1), layout);
            forward(isa, Buffer::new(&x[0], layout).view(), y.view_mut());
            assert_close(label, &y.read(), &naive(&x), FORWARD);
        });
    }
}
