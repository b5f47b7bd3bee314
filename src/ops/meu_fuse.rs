//! Fusion of a mutual-embedding upsampling module (paper, section 3.2):
//! out = l * ca + upsample(h) * sa.

use crate::graph::Shape;

/// Inputs h (N x C x h x w), l (N x C x H x W), ca (N x C x 1 x 1) and, with `spatial`,
/// sa (N x 1 x H x W).
#[derive(Debug, Clone)]
pub struct MeuFuse {
    /// Whether the high-level features are gated by spatial attention.
    pub spatial: bool,
}

impl MeuFuse {
    pub(super) fn shape(&self, inputs: &[Shape]) -> Result<Shape, String> {
        let rule = "h, l of one batch and width, ca N x C x 1 x 1, sa N x 1 x H x W";
        let (h, l, ca, sa) = match inputs {
            [h, l, ca, sa] if self.spatial => (h, l, ca, Some(sa)),
            [h, l, ca] if !self.spatial => (h, l, ca, None),
            _ => return Err(rule.into()),
        };
        let fits = h.n == l.n
            && h.c == l.c
            && *ca == Shape::new(l.n, l.c, 1, 1)
            && sa.is_none_or(|sa| *sa == l.with_channels(1));
        if fits { Ok(*l) } else { Err(rule.into()) }
    }
}
