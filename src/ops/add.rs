//! Elementwise sum of two tensors: the residual connection.

use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [a, b] if a == b => Ok(*a),
        _ => Err("two operands of one shape".into()),
    }
}
