//! Concatenation over channels: the long skip connections (SPEC, "Encoder").

use rayon::prelude::*;

use crate::backend::cpu::planes::{self, Gated};
use crate::backend::cpu::{Isa, View, ViewMut};
use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [first, rest @ ..] if rest.iter().all(|s| s.with_channels(first.c) == *first) => {
            Ok(first.with_channels(inputs.iter().map(|s| s.c).sum()))
        }
        _ => Err("operands of one batch, height and width".into()),
    }
}

/// Copies x to the channels `from ..` of y. The plan lets producers write straight into y where
/// it can; then there is nothing to copy and this is not called.
pub fn forward(isa: Isa, x: View, from: usize, y: ViewMut) {
    let channels = x.shape().c;
    (0..x.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        let grad = Gated { grad: x.plane(n, c), gate: None };
        // One task per plane.
        planes::pass_gated(isa, grad, unsafe { y.plane_mut(n, from + c) }, false);
    });
}

/// dx = the channels `from ..` of dy.
pub fn backward(isa: Isa, dy: View, from: usize, dx: ViewMut, accumulate: bool) {
    let channels = dx.shape().c;
    (0..dx.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        let grad = Gated { grad: dy.plane(n, from + c), gate: None };
        planes::pass_gated(isa, grad, unsafe { dx.plane_mut(n, c) }, accumulate);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    fn naive(inputs: &[T64]) -> T64 {
        let shapes: Vec<Shape> = inputs.iter().map(|x| x.shape).collect();
        T64::from_fn(shape(&shapes).unwrap(), |n, mut c, y, x| {
            let mut parts = inputs.iter();
            let mut part = parts.next().unwrap();
            while c >= part.shape.c {
                c -= part.shape.c;
                part = parts.next().unwrap();
            }
            part.at(n, c, y, x)
        })
    }

    #[test]
    fn channels_in_order_and_their_gradients() {
        let mut rng = rng(2);
        let parts = [2, 1, 3].map(|c| T64::random(Shape::new(3, c, 5, 7), &mut rng));
        let expected = naive(&parts);
        let dy = T64::random(expected.shape, &mut rng);
        let gradients = [0, 1, 2].map(|i| central_difference(naive, &parts, i, &dy));
        everywhere(|isa, layout, label| {
            let mut y = Buffer::unwritten(expected.shape, layout);
            for (from, part) in [0, 2, 3].into_iter().zip(&parts) {
                forward(isa, Buffer::new(part, layout).view(), from, y.view_mut());
            }
            assert_eq!(y.read().data, expected.data, "{label}: copies are exact");
            let dy = Buffer::new(&dy, layout);
            for (from, gradient) in [0, 2, 3].into_iter().zip(&gradients) {
                check_gradient(label, gradient, layout, |dx, accumulate| {
                    backward(isa, dy.view(), from, dx, accumulate);
                });
            }
        });
    }

    #[test]
    fn operands_of_other_sizes_are_refused() {
        let x = Shape::new(2, 4, 5, 7);
        assert!(shape(&[]).is_err());
        for other in [Shape { n: 1, ..x }, Shape { h: 6, ..x }, Shape { w: 8, ..x }] {
            assert!(shape(&[x, other]).is_err(), "{other}");
        }
    }
}
