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
