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

/// `y[n][c] = mean over H, W of x[n][c]`.
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

/// `dx[n][c][p] = dy[n][c] / (H * W)`.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    fn naive(inputs: &[T64]) -> T64 {
        let x = &inputs[0];
        let plane = x.shape.plane();
        T64::from_fn(Shape::new(x.shape.n, x.shape.c, 1, 1), |n, c, _, _| {
            let start = (n * x.shape.c + c) * plane;
            x.data[start..start + plane].iter().sum::<f64>() / plane as f64
        })
    }

    #[test]
    fn mean_of_planes_and_its_gradient() {
        for shape in [Shape::new(1, 1, 1, 1), Shape::new(3, 2, 5, 7), Shape::new(2, 3, 9, 13)] {
            let mut rng = rng(3);
            let x = [T64::random(shape, &mut rng)];
            let expected = naive(&x);
            let dy = T64::random(expected.shape, &mut rng);
            let gradient = central_difference(naive, &x, 0, &dy);
            everywhere(|isa, layout, label| {
                let mut y = Buffer::unwritten(expected.shape, layout);
                forward(isa, Buffer::new(&x[0], layout).view(), y.view_mut());
                assert_close(label, &y.read(), &expected, FORWARD);
                let dy = Buffer::new(&dy, layout);
                check_gradient(label, &gradient, layout, |dx, accumulate| {
                    backward(dy.view(), dx, accumulate);
                });
            });
        }
    }
}
