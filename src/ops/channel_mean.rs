//! Mean over channels: N x C x H x W -> N x 1 x H x W.

use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [x] => Ok(x.with_channels(1)),
        _ => Err("one operand".into()),
    }
}
