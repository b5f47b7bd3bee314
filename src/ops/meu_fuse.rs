//! Fusion of a mutual-embedding upsampling module (paper, section 3.2):
//! out = l * ca + upsample(h) * sa.

use rayon::prelude::*;

use super::resize::Bilinear;
use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::{Isa, View, ViewMut, planes};
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

impl MeuFuse {
    /// y = l * ca + upsample(h) * sa; `sa` is none without spatial attention (then 1).
    pub fn forward(&self, isa: Isa, h: View, l: View, ca: View, sa: Option<View>, y: ViewMut) {
        let (low, out) = (h.shape(), l.shape());
        let map = Bilinear::new((low.h, low.w), (out.h, out.w));
        let channels = out.c;
        (0..out.n * channels).into_par_iter().for_each(|i| {
            let (n, c) = (i / channels, i % channels);
            let gate = ca.plane(n, c)[0];
            // One task per plane.
            let y = unsafe { y.plane_mut(n, c) };
            with_scratch(map.scratch_len(), |scratch| {
                for (row, y) in y.chunks_mut(out.w).enumerate() {
                    map.row(isa, h.plane(n, c), row, scratch, y);
                    let pixels = row * out.w..(row + 1) * out.w;
                    if let Some(sa) = sa {
                        planes::multiply(isa, &sa.plane(n, 0)[pixels.clone()], y);
                    }
                    planes::add_scaled(isa, &l.plane(n, c)[pixels], gate, y);
                }
            });
        });
    }

    /// With U = upsample(h):
    /// ```text
    /// dl = dy * ca,   dca[c] = sum over p of dy * l,
    /// dsa[p] = sum over c of dy * U,   dh = upsample^T(dy * sa)
    /// ```
    pub fn backward(&self, isa: Isa, io: MeuBackward) {
        let (low, out) = (io.h.shape(), io.l.shape());
        let map = Bilinear::new((low.h, low.w), (out.h, out.w));
        // A task is an image: dsa sums over its channels, in their order.
        (0..out.n).into_par_iter().for_each(|n| {
            let len = map.scratch_len() + out.w;
            with_scratch(len, |scratch| {
                let (scratch, row_buffer) = scratch.split_at_mut(map.scratch_len());
                if let Some((dsa, false)) = io.dsa {
                    unsafe { dsa.plane_mut(n, 0) }.fill(0.0);
                }
                for c in 0..out.c {
                    self.backward_plane(isa, &io, &map, n, c, scratch, row_buffer);
                }
            });
        });
    }

    #[allow(clippy::too_many_arguments)]
    fn backward_plane(
        &self,
        isa: Isa,
        io: &MeuBackward,
        map: &Bilinear,
        n: usize,
        c: usize,
        scratch: &mut [f32],
        row_buffer: &mut [f32],
    ) {
        let w = io.l.shape().w;
        let (dy, l) = (io.dy.plane(n, c), io.l.plane(n, c));
        // One task per image.
        let dca = unsafe { io.dca.0.plane_mut(n, c) };
        let sum = planes::dot(isa, dy, l) as f32;
        dca[0] = if io.dca.1 { dca[0] + sum } else { sum };

        let dl = unsafe { io.dl.0.plane_mut(n, c) };
        if !io.dl.1 {
            dl.fill(0.0);
        }
        planes::add_scaled(isa, dy, io.ca.plane(n, c)[0], dl);

        let dh = unsafe { io.dh.0.plane_mut(n, c) };
        if !io.dh.1 {
            dh.fill(0.0);
        }
        for (row, dy) in dy.chunks(w).enumerate() {
            let pixels = row * w..(row + 1) * w;
            let Some((sa, (dsa, _))) = io.sa.zip(io.dsa) else {
                map.transpose_row(isa, dy, row, scratch, dh);
                continue;
            };
            map.row(isa, io.h.plane(n, c), row, scratch, row_buffer);
            let dsa = unsafe { dsa.pixels_mut(n, 0, pixels.clone()) };
            for ((dsa, dy), u) in dsa.iter_mut().zip(dy).zip(&*row_buffer) {
                *dsa += dy * u;
            }
            for ((v, dy), sa) in row_buffer.iter_mut().zip(dy).zip(&sa.plane(n, 0)[pixels]) {
                *v = dy * sa;
            }
            map.transpose_row(isa, row_buffer, row, scratch, dh);
        }
    }
}

/// Operands of [`MeuFuse::backward`]; a gradient comes with whether to add to it.
pub struct MeuBackward<'a> {
    /// High-level features, N x C x h x w.
    pub h: View<'a>,
    /// Low-level features, N x C x H x W.
    pub l: View<'a>,
    /// Channel attention, N x C x 1 x 1.
    pub ca: View<'a>,
    /// Spatial attention, N x 1 x H x W.
    pub sa: Option<View<'a>>,
    /// Gradient of the output.
    pub dy: View<'a>,
    /// Gradient of h.
    pub dh: (ViewMut<'a>, bool),
    /// Gradient of l.
    pub dl: (ViewMut<'a>, bool),
    /// Gradient of ca.
    pub dca: (ViewMut<'a>, bool),
    /// Gradient of sa.
    pub dsa: Option<(ViewMut<'a>, bool)>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::resize::tests::naive_resize;
    use crate::ops::testing::*;

    /// Inputs h, l, ca and perhaps sa.
    fn naive(inputs: &[T64]) -> T64 {
        let (l, ca) = (&inputs[1], &inputs[2]);
        let up = naive_resize(&inputs[0], l.shape.h, l.shape.w);
        T64::from_fn(l.shape, |n, c, y, x| {
            let gate = inputs.get(3).map_or(1.0, |sa| sa.at(n, 0, y, x));
            l.at(n, c, y, x) * ca.at(n, c, 0, 0) + up.at(n, c, y, x) * gate
        })
    }

    /// Shapes of the high and of the low level.
    const CASES: [(Shape, Shape); 5] = [
        (Shape::new(1, 1, 1, 1), Shape::new(1, 1, 1, 1)),
        (Shape::new(3, 2, 3, 4), Shape::new(3, 2, 5, 7)),
        (Shape::new(2, 3, 3, 4), Shape::new(2, 3, 6, 8)),
        (Shape::new(1, 2, 1, 1), Shape::new(1, 2, 2, 1)),
        (Shape::new(1, 5, 2, 9), Shape::new(1, 5, 3, 18)),
    ];

    #[test]
    fn fusion_and_the_gradients_of_all_operands() {
        for ((high, low), spatial) in CASES.into_iter().flat_map(|c| [(c, true), (c, false)]) {
            let mut shapes = vec![high, low, Shape { h: 1, w: 1, ..high }];
            shapes.extend(spatial.then_some(low.with_channels(1)));
            let op = MeuFuse { spatial };
            assert_eq!(op.shape(&shapes), Ok(low));
            let mut rng = rng(30);
            let inputs: Vec<T64> = shapes.iter().map(|&s| T64::random(s, &mut rng)).collect();
            let dy = T64::random(low, &mut rng);
            let expected = naive(&inputs);
            let gradients: Vec<T64> =
                (0..inputs.len()).map(|i| central_difference(naive, &inputs, i, &dy)).collect();
            everywhere(|isa, layout, label| {
                let operands: Vec<Buffer> = inputs.iter().map(|t| Buffer::new(t, layout)).collect();
                let [h, l, ca] = [0, 1, 2].map(|i| operands[i].view());
                let sa = operands.get(3).map(Buffer::view);
                let mut y = Buffer::unwritten(low, layout);
                op.forward(isa, h, l, ca, sa, y.view_mut());
                let what = format!("{high}, {low}, spatial {spatial}, {label}");
                assert_close(&what, &y.read(), &expected, FORWARD);

                let dy = Buffer::new(&dy, layout);
                for (which, gradient) in gradients.iter().enumerate() {
                    let what = format!("operand {which}, {what}");
                    check_gradient(&what, gradient, layout, |target, accumulate| {
                        let mut others: Vec<Buffer> =
                            shapes.iter().map(|&s| Buffer::unwritten(s, layout)).collect();
                        let mut views: Vec<(ViewMut, bool)> =
                            others.iter_mut().map(|b| (b.view_mut(), false)).collect();
                        views[which] = (target, accumulate);
                        let [dh, dl, dca] = [views[0], views[1], views[2]];
                        let dsa = views.get(3).copied();
                        let dy = dy.view();
                        op.backward(isa, MeuBackward { h, l, ca, sa, dy, dh, dl, dca, dsa });
                    });
                }
            });
        }
    }

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        let (h, l) = (Shape::new(2, 4, 3, 3), Shape::new(2, 4, 5, 6));
        let (ca, sa) = (Shape::new(2, 4, 1, 1), Shape::new(2, 1, 5, 6));
        let with = MeuFuse { spatial: true };
        assert!(with.shape(&[h, l, ca, sa]).is_ok());
        assert!(with.shape(&[h, l, ca]).is_err());
        assert!(with.shape(&[h, l, sa, ca]).is_err());
        assert!(with.shape(&[h.with_channels(5), l, ca, sa]).is_err());
        assert!(MeuFuse { spatial: false }.shape(&[h, l, ca, sa]).is_err());
    }
}
