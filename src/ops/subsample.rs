//! Every second row and column: N x C x H x W -> N x C x ceil(H / 2) x ceil(W / 2).
//!
//! Inference only: a rewrite puts it before the branches of strided blocks that read nothing else
//! (`graph/passes/even_grid.rs`).

use rayon::prelude::*;

use crate::backend::cpu::gemm::{Rows, TILE, TileSource};
use crate::backend::cpu::simd::{Kernel, Simd};
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

/// The result as the operand of a product, without being written to memory.
pub struct EvenPixels<'a> {
    /// The operand of the subsampling.
    pub x: View<'a>,
    /// Which of its images.
    pub image: usize,
}

impl EvenPixels<'_> {
    /// Where pixel `at` of the result is read, and how many elements of its row begin there.
    fn place(&self, at: usize) -> (*const f32, usize) {
        let Shape { w, .. } = self.x.shape();
        let (row, column) = (at / w.div_ceil(2), at % w.div_ceil(2));
        (self.x.image(self.image).wrapping_add(2 * row * w + 2 * column), w - 2 * column)
    }

    fn pixels(&self) -> usize {
        let Shape { h, w, .. } = self.x.shape();
        h.div_ceil(2) * w.div_ceil(2)
    }
}

impl TileSource for EvenPixels<'_> {
    fn pack(&self, isa: Isa, start: usize, count: usize, pitch: usize, packed: &mut [f32]) {
        let channels = self.x.shape().c;
        assert!(start + count <= self.pixels() && packed.len() >= (channels - 1) * pitch + count);
        let mut done = 0;
        while done < count {
            let (source, left) = self.place(start + done);
            let run = left.div_ceil(2).min(count - done);
            let planes = Rows { base: source, count: channels, stride: self.x.plane_stride() };
            let out = packed[done..].as_mut_ptr();
            // Two tiles further, which may be in another row.
            let ahead = self.place((start + done + 2 * TILE).min(self.pixels() - 1)).0;
            unsafe { isa.run(EvenElements { planes, left, ahead, out, pitch, run }) }
            done += run;
        }
    }
}

/// Every second element of a piece of a row, for all planes.
struct EvenElements {
    /// From the first element on, and how many there are in a row.
    planes: Rows,
    left: usize,
    /// What the first plane will be read from later.
    ahead: *const f32,
    out: *mut f32,
    pitch: usize,
    /// Elements to write.
    run: usize,
}

impl Kernel for EvenElements {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Rows { base, count, stride } = self.planes;
        let vectors = self.run.min(self.left / 2) / S::LANES * S::LANES;
        for plane in 0..count {
            unsafe {
                let (x, out) = (base.add(plane * stride), self.out.add(plane * self.pitch));
                let ahead = self.ahead.wrapping_add(plane * stride);
                for at in (0..vectors).step_by(S::LANES) {
                    for line in 0..2 * S::LANES / 16 {
                        S::prefetch(ahead.wrapping_add(2 * at + 16 * line));
                    }
                    let pair = (S::load(x.add(2 * at)), S::load(x.add(2 * at + S::LANES)));
                    pair.0.deinterleave(pair.1).0.store(out.add(at));
                }
                for at in vectors..self.run {
                    *out.add(at) = *x.add(2 * at);
                }
            }
        }
    }
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
