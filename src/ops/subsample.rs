//! Every second row and column: N x C x H x W -> N x C x ceil(H / 2) x ceil(W / 2).
//!
//! Inference only: a rewrite puts it before the branches of strided blocks that read nothing else
//! (`graph/passes/even_grid.rs`).

use rayon::prelude::*;

use crate::backend::cpu::{Isa, View, ViewMut, planes};
use crate::graph::Shape;

pub(super) fn shape(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [x] => Ok(Shape { h: x.h.div_ceil(2), w: x.w.div_ceil(2), ..*x }),
        _ => Err("one operand".into()),
    }
}

/// `y[n][c][i][j] = x[n][c][2 i][2 j]`.
pub fn forward(isa: Isa, x: View, y: ViewMut) {
    let (fine, coarse) = (x.shape(), y.shape());
    (0..coarse.n * coarse.c).into_par_iter().for_each(|i| {
        let (n, c) = (i / coarse.c, i % coarse.c);
        // One task per plane.
        let y = unsafe { y.plane_mut(n, c) };
        let rows = x.plane(n, c).chunks(2 * fine.w);
        for (out, rows) in y.chunks_exact_mut(coarse.w).zip(rows) {
            planes::split_row(isa, &rows[..fine.w], out, None);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    #[test]
    fn even_rows_and_columns_are_kept() {
        for (h, w) in [(1, 1), (2, 2), (5, 7), (4, 9), (7, 34)] {
            let x = T64::random(Shape::new(2, 3, h, w), &mut rng(50));
            let expected =
                T64::from_fn(shape(&[x.shape]).unwrap(), |n, c, i, j| x.at(n, c, 2 * i, 2 * j));
            everywhere(|isa, layout, label| {
                let mut y = Buffer::unwritten(expected.shape, layout);
                forward(isa, Buffer::new(&x, layout).view(), y.view_mut());
                assert_eq!(y.read().data, expected.data, "{h}x{w}, {label}");
            });
        }
    }
}
