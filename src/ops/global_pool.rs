//! Global average pooling: N x C x H x W -> N x C x 1 x 1.

use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [x] => Ok(Shape::new(x.n, x.c, 1, 1)),
        _ => Err("one operand".into()),
    }
}
