//! Bilinear resize with half-pixel centres (align_corners = false), as torch's interpolate.

use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [x, like] if x.n == like.n => Ok(Shape { c: x.c, ..*like }),
        _ => Err("an operand and one that lends its height and width".into()),
    }
}
