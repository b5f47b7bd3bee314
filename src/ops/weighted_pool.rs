//! Mean of an upsampled tensor under per-pixel weights, without upsampling it.
//!
//! Inference only: the collapsed decoder takes the mean of decoder2's output from it
//! (`graph/passes/collapse.rs`).

use rayon::prelude::*;

use super::resize::Bilinear;
use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::{Isa, View, ViewMut, planes};
use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [x, weights] if weights.n == x.n && weights.c == 1 => Ok(Shape::new(x.n, x.c + 1, 1, 1)),
        _ => Err("an operand and one plane of weights per image".into()),
    }
}

/// For x (N x C x h x w) and weights s (N x 1 x H x W):
/// ```text
/// y[n][c] = mean over p of s[n][p] upsample(x)[n][c][p],   y[n][C] = mean over p of s[n][p]
/// ```
/// `y` is N x (C + 1) x 1 x 1. Upsampling U is linear: sum of s (U x) = sum of (U^T s) x.
pub fn forward(isa: Isa, x: View, weights: View, y: ViewMut) {
    let (low, high) = (x.shape(), weights.shape());
    let map = Bilinear::new((low.h, low.w), (high.h, high.w));
    let pixels = high.plane() as f64;
    for n in 0..low.n {
        let s = weights.plane(n, 0);
        with_scratch(low.plane() + map.scratch_len(), |scratch| {
            let (gathered, scratch) = scratch.split_at_mut(low.plane());
            gathered.fill(0.0);
            for (row, s) in s.chunks(high.w).enumerate() {
                map.transpose_row(isa, s, row, scratch, gathered);
            }
            let gathered = &*gathered;
            (0..=low.c).into_par_iter().for_each(|c| {
                let sum = match c {
                    c if c < low.c => planes::dot(isa, gathered, x.plane(n, c)),
                    _ => planes::sum(isa, s),
                };
                // One task per channel.
                let y = unsafe { y.plane_mut(n, c) };
                y[0] = (sum / pixels) as f32;
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::resize::tests::naive_resize;
    use crate::ops::testing::*;

    #[test]
    fn it_is_the_mean_of_the_weighted_upsampled_tensor() {
        for ((h, w), (oh, ow)) in [((3, 4), (6, 8)), ((3, 5), (5, 9)), ((1, 1), (2, 1))] {
            let mut rng = rng(51);
            let x = T64::random(Shape::new(2, 3, h, w), &mut rng);
            // Away from zero: the means must not cancel, or the tolerance would be of nothing.
            let s = T64::random(Shape::new(2, 1, oh, ow), &mut rng).map(|v| v + 1.5);
            let x = x.map(|v| v + 0.5);
            let up = naive_resize(&x, oh, ow);
            let expected = T64::from_fn(Shape::new(2, 4, 1, 1), |n, c, _, _| {
                let pixels = (0..oh * ow).map(|p| (p / ow, p % ow));
                let term = |(i, j)| {
                    let value = if c < 3 { up.at(n, c, i, j) } else { 1.0 };
                    s.at(n, 0, i, j) * value
                };
                pixels.map(term).sum::<f64>() / (oh * ow) as f64
            });
            everywhere(|isa, layout, label| {
                let mut y = Buffer::unwritten(expected.shape, layout);
                let (x, s) = (Buffer::new(&x, layout), Buffer::new(&s, layout));
                forward(isa, x.view(), s.view(), y.view_mut());
                assert_close(&format!("{h}x{w}, {label}"), &y.read(), &expected, FORWARD);
            });
        }
    }
}
