//! Elementwise sum of two tensors: the residual connection.

use rayon::prelude::*;

use crate::backend::cpu::planes::{self, Gated};
use crate::backend::cpu::{Isa, View, ViewMut};
use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [a, b] if a == b => Ok(*a),
        _ => Err("two operands of one shape".into()),
    }
}

/// y = a + b.
pub fn forward(isa: Isa, a: View, b: View, y: ViewMut) {
    let channels = y.shape().c;
    (0..y.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        // One task per plane.
        planes::add(isa, a.plane(n, c), b.plane(n, c), unsafe { y.plane_mut(n, c) });
    });
}

/// da = dy and db = dy: called once per operand.
pub fn backward(isa: Isa, dy: View, dx: ViewMut, accumulate: bool) {
    let channels = dy.shape().c;
    (0..dy.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        let grad = Gated { grad: dy.plane(n, c), gate: None };
        planes::pass_gated(isa, grad, unsafe { dx.plane_mut(n, c) }, accumulate);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    fn naive(inputs: &[T64]) -> T64 {
        inputs[0].plus(&inputs[1])
    }

    #[test]
    fn sum_and_its_gradient_for_each_operand() {
        for shape in [Shape::new(1, 1, 1, 1), Shape::new(3, 2, 5, 7), Shape::new(2, 3, 1, 33)] {
            let mut rng = rng(1);
            let inputs = [T64::random(shape, &mut rng), T64::random(shape, &mut rng)];
            let dy = T64::random(shape, &mut rng);
            let gradients = [0, 1].map(|i| central_difference(naive, &inputs, i, &dy));
            everywhere(|isa, layout, label| {
                let [a, b] = [0, 1].map(|i| Buffer::new(&inputs[i], layout));
                let mut y = Buffer::unwritten(shape, layout);
                forward(isa, a.view(), b.view(), y.view_mut());
                assert_close(label, &y.read(), &naive(&inputs), FORWARD);
                let dy = Buffer::new(&dy, layout);
                for gradient in &gradients {
                    check_gradient(label, gradient, layout, |dx, accumulate| {
                        backward(isa, dy.view(), dx, accumulate);
                    });
                }
            });
        }
    }
}
