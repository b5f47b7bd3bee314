//! Concatenation over channels: the long skip connections (SPEC, "Encoder").

use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [first, rest @ ..] if rest.iter().all(|s| s.with_channels(first.c) == *first) => {
            Ok(first.with_channels(inputs.iter().map(|s| s.c).sum()))
        }
        _ => Err("operands of one batch, height and width".into()),
    }
}
