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
