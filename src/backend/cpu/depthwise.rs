//! Depthwise 3x3 convolution of one plane from a padded copy of it.
//!
//! The copy ([`Padded`]) has a border of at least `dilation` zeros, so that the nine taps of an
//! output are nine loads at fixed distances, without a branch. With stride 1 a few columns are
//! walked down at a time, in steps of the dilation: the three taps of an input row serve three
//! outputs, which makes three loads of the nine. With stride 2 the copy's rows are split into even
//! and odd columns, which turns the strided taps into contiguous loads as well.
//!
//! Of a chain of convolutions each can fill the next one's copy in passing ([`Onward`]): a sum that is
//! in a register need not be read again.

use super::planes;
use super::simd::{Isa, Kernel, Simd};

/// Elements of a cache line.
const LINE: usize = 16;
/// Columns that a vector may write or read past the end of a row.
const SLACK: usize = 16;

/// Geometry of a padded copy: where each tap of output (row, col) lies.
#[derive(Debug, Clone, Copy)]
pub struct Padded {
    h: usize,
    w: usize,
    dilation: usize,
    stride: usize,
    /// Rows of zeros above and below, and columns at least on either side.
    margin: usize,
    pitch: usize,
    /// Columns before the plane's first one.
    left: usize,
    /// Distance from a row's even columns to its odd ones (stride 2).
    odd: usize,
}

impl Padded {
    /// Geometry for an input plane of h x w.
    pub fn new(h: usize, w: usize, dilation: usize, stride: usize) -> Self {
        assert!(stride == 1 || stride == 2);
        let columns = w + 2 * dilation;
        let odd = columns.div_ceil(2) + SLACK;
        // With stride 1 the plane's own rows start on cache lines.
        let left = if stride == 1 { dilation.next_multiple_of(LINE) } else { dilation };
        let pitch = match stride {
            1 => (left + w + dilation + SLACK).next_multiple_of(LINE),
            _ => 2 * odd,
        };
        Padded { h, w, dilation, stride, margin: dilation, pitch, left, odd }
    }

    /// The same copy, with stride 1, seen by a convolution of a smaller dilation: all links of a chain
    /// can use one border.
    pub fn with_dilation(self, dilation: usize) -> Self {
        assert!(self.stride == 1 && dilation <= self.margin);
        Padded { dilation, ..self }
    }

    /// Elements of the padded copy.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        (self.h + 2 * self.margin) * self.pitch + SLACK
    }

    /// Height and width of the output.
    pub fn output(&self) -> (usize, usize) {
        (self.h.div_ceil(self.stride), self.w.div_ceil(self.stride))
    }

    /// Zeroes the border, and the slack behind the rows: once per use of the memory, since
    /// filling writes the interior only.
    pub fn clear_border(&self, copy: &mut [f32]) {
        let (d, pitch) = (self.margin, self.pitch);
        let copy = &mut copy[..self.len()];
        let interior = d * pitch..(d + self.h) * pitch;
        copy[..interior.start].fill(0.0);
        copy[interior.end..].fill(0.0);
        for row in copy[interior].chunks_exact_mut(pitch) {
            if self.stride == 1 {
                row[..self.left].fill(0.0);
                row[self.left + self.w..].fill(0.0);
            } else {
                // What the interior covers of the even and of the odd columns.
                let (even, odd) = row.split_at_mut(self.odd);
                let end = d + self.w;
                for (phase, first, last) in
                    [(even, d.div_ceil(2), end.div_ceil(2)), (odd, d / 2, end / 2)]
                {
                    phase[..first].fill(0.0);
                    phase[last..].fill(0.0);
                }
            }
        }
    }

    /// Fills the interior with x, or with x + y.
    pub fn fill(&self, isa: Isa, x: &[f32], y: Option<&[f32]>, copy: &mut [f32]) {
        let plane = self.h * self.w;
        assert!(copy.len() >= self.len() && x.len() == plane);
        assert!(y.is_none_or(|y| y.len() == plane));
        if self.stride == 1 {
            let y = y.map_or(std::ptr::null(), <[f32]>::as_ptr);
            let copy = copy.as_mut_ptr();
            return unsafe { isa.run(FillRows { geometry: self, x: x.as_ptr(), y, copy }) };
        }
        assert!(y.is_none(), "strided branches are not added to");
        let (d, w) = (self.margin, self.w);
        for (row, source) in x.chunks_exact(w).enumerate() {
            // Even columns go to the phase of d's parity, odd ones to the other.
            let (even, odd) = copy[(row + d) * self.pitch..][..self.pitch].split_at_mut(self.odd);
            let (first, second) = if d % 2 == 0 { (even, odd) } else { (odd, even) };
            let first = &mut first[d / 2..][..w.div_ceil(2)];
            planes::split_row(isa, source, first, Some(&mut second[d.div_ceil(2)..][..w / 2]));
        }
    }

    /// Distances of the nine taps from the first element of an output row's input row.
    fn taps(&self) -> [usize; 9] {
        std::array::from_fn(|t| {
            let (row, column) = (t / 3 * self.dilation, t % 3 * self.dilation);
            let column = match self.stride {
                1 => self.left - self.dilation + column,
                _ => column / 2 + (column & 1) * self.odd,
            };
            (self.margin - self.dilation + row) * self.pitch + column
        })
    }

    /// `out[r][c] = relu(bias + sum_t w[t] * tap_t(r, c))`.
    pub fn convolve(&self, isa: Isa, copy: &[f32], weights: &[f32], bias: f32, out: &mut [f32]) {
        let after = After { bias, relu: true, ..After::default() };
        self.run_convolution(isa, copy, weights, after, out);
    }

    /// [`Padded::convolve`] as a link of a chain (stride 1).
    pub fn convolve_onward(
        &self,
        isa: Isa,
        copy: &[f32],
        weights: &[f32],
        bias: f32,
        out: &mut [f32],
        onward: Onward,
    ) {
        assert!(self.stride == 1);
        let Onward { next, ahead } = onward;
        let (add, next) = match next {
            Some((x, copy)) => {
                assert!(x.len() == out.len() && copy.len() >= self.len());
                (x.as_ptr(), copy.as_mut_ptr())
            }
            None => (std::ptr::null(), std::ptr::null_mut()),
        };
        let after = After { bias, relu: true, accumulate: false, add, next, ahead };
        self.run_convolution(isa, copy, weights, after, out);
    }

    /// `out[r][c] += sum_t w[t] * tap_t(r, c)`, or `=` without `accumulate`.
    pub fn correlate(
        &self,
        isa: Isa,
        copy: &[f32],
        weights: &[f32],
        accumulate: bool,
        out: &mut [f32],
    ) {
        let after = After { accumulate, ..After::default() };
        self.run_convolution(isa, copy, weights, after, out);
    }

    fn run_convolution(
        &self,
        isa: Isa,
        copy: &[f32],
        weights: &[f32],
        after: After,
        out: &mut [f32],
    ) {
        let (oh, ow) = self.output();
        assert!(copy.len() >= self.len() && out.len() == oh * ow);
        let w = std::array::from_fn(|t| weights[t]);
        let (copy, out) = (copy.as_ptr(), out.as_mut_ptr());
        unsafe { isa.run(Convolve { geometry: self, copy, w, after, out }) }
    }

    /// `dw[t] += sum over outputs of du[r][c] * tap_t(r, c)`.
    pub fn weight_gradient(&self, isa: Isa, copy: &[f32], du: &[f32], dw: &mut [f64; 9]) {
        let (oh, ow) = self.output();
        assert!(copy.len() >= self.len() && du.len() == oh * ow);
        unsafe { isa.run(WeightGradient { geometry: self, copy: copy.as_ptr(), du, dw }) }
    }
}

/// Copies rows, or sums of rows, into the interior (stride 1).
struct FillRows<'a> {
    geometry: &'a Padded,
    x: *const f32,
    y: *const f32,
    copy: *mut f32,
}

impl Kernel for FillRows<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (d, w, pitch) = (self.geometry.margin, self.geometry.w, self.geometry.pitch);
        for row in 0..self.geometry.h {
            unsafe {
                let target = self.copy.add((row + d) * pitch + self.geometry.left);
                let mut col = 0;
                while col < w {
                    let lanes = (w - col).min(S::LANES);
                    let at = row * w + col;
                    let mut v = S::load_up_to(self.x.add(at), lanes);
                    if !self.y.is_null() {
                        v = v.add(S::load_up_to(self.y.add(at), lanes));
                    }
                    v.store_up_to(target.add(col), lanes);
                    col += S::LANES;
                }
            }
        }
    }
}

/// What a link of a chain does for those behind it.
pub struct Onward<'a> {
    /// The next link's own operand and its copy: the sum of the operand and what is written here goes
    /// into the copy's interior.
    pub next: Option<(&'a [f32], &'a mut [f32])>,
    /// A plane that will be read soon: asked for while this one is worked on.
    pub ahead: &'a [f32],
}

/// What is done to a sum of taps.
#[derive(Clone, Copy)]
struct After<'a> {
    bias: f32,
    relu: bool,
    accumulate: bool,
    /// Operand of the next link and its copy, or null.
    add: *const f32,
    next: *mut f32,
    ahead: &'a [f32],
}

impl Default for After<'_> {
    fn default() -> Self {
        let (add, next) = (std::ptr::null(), std::ptr::null_mut());
        After { bias: 0.0, relu: false, accumulate: false, add, next, ahead: &[] }
    }
}

struct Convolve<'a> {
    geometry: &'a Padded,
    copy: *const f32,
    w: [f32; 9],
    after: After<'a>,
    out: *mut f32,
}

impl Kernel for Convolve<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            match self.geometry.stride {
                // Nine weights and three sums and a load of one column take 15 of AVX2's 16
                // registers; of four columns, 24 of AVX-512's 32.
                1 if S::LANES == 16 => self.walk::<S, 4, 2>(),
                1 => self.walk::<S, 1, 1>(),
                _ => self.rows::<S>(),
            }
        }
    }
}

impl Convolve<'_> {
    #[inline(always)]
    unsafe fn weights<S: Simd>(&self) -> [S; 9] {
        let w = &self.w;
        unsafe {
            [
                S::splat(w[0]),
                S::splat(w[1]),
                S::splat(w[2]),
                S::splat(w[3]),
                S::splat(w[4]),
                S::splat(w[5]),
                S::splat(w[6]),
                S::splat(w[7]),
                S::splat(w[8]),
            ]
        }
    }

    /// Stride 1: columns of MANY vectors, where the width leaves fewer of FEW, walked down in steps of
    /// the dilation. Wide columns fetch fewer lines twice: the taps reach into the next line.
    #[inline(always)]
    unsafe fn walk<S: Simd, const MANY: usize, const FEW: usize>(&self) {
        let g = self.geometry;
        unsafe {
            let w = self.weights::<S>();
            let starts = g.dilation.min(g.h);
            let parts = starts * g.w.div_ceil(MANY * S::LANES);
            let mut part = 0;
            for start in 0..starts {
                let mut col = 0;
                while col < g.w {
                    self.fetch::<S>(part, parts);
                    part += 1;
                    let whole = (g.w - col) / S::LANES;
                    let vectors = if whole >= MANY {
                        self.column::<S, MANY>(&w, start, col, S::LANES);
                        MANY
                    } else if whole >= FEW {
                        self.column::<S, FEW>(&w, start, col, S::LANES);
                        FEW
                    } else {
                        self.column::<S, 1>(&w, start, col, (g.w - col).min(S::LANES));
                        1
                    };
                    col += vectors * S::LANES;
                }
            }
        }
    }

    /// The `part`-th of `parts` shares of the plane ahead on its way into the cache.
    #[inline(always)]
    unsafe fn fetch<S: Simd>(&self, part: usize, parts: usize) {
        let lines = self.after.ahead.len() / LINE;
        let end = ((part + 1) * lines / parts).min(lines);
        for line in part * lines / parts..end {
            unsafe { S::prefetch(self.after.ahead.as_ptr().wrapping_add(line * LINE)) }
        }
    }

    /// Output rows `start`, `start + dilation`, ... of NV vectors from column `col`, of the last
    /// of which `lanes` are inside.
    #[inline(always)]
    unsafe fn column<S: Simd, const NV: usize>(
        &self,
        w: &[S; 9],
        start: usize,
        col: usize,
        lanes: usize,
    ) {
        let g = self.geometry;
        let d = g.dilation;
        unsafe {
            let zero = S::splat(self.after.bias);
            // Sums of the outputs two rows (in steps) and one row above the input row at hand.
            let mut above = [zero; NV];
            let mut same = [zero; NV];
            let first = start + g.margin - d;
            let mut source = self.copy.add(first * g.pitch + g.left - d + col);
            let mut input = start;
            while input < g.h + 2 * d {
                let mut done = [zero; NV];
                for j in 0..NV {
                    let p = source.add(j * S::LANES);
                    let (x0, x1, x2) = (S::load(p), S::load(p.add(d)), S::load(p.add(2 * d)));
                    done[j] = w[8].mul_add(x2, w[7].mul_add(x1, w[6].mul_add(x0, above[j])));
                    above[j] = w[5].mul_add(x2, w[4].mul_add(x1, w[3].mul_add(x0, same[j])));
                    same[j] = w[2].mul_add(x2, w[1].mul_add(x1, w[0].mul_add(x0, zero)));
                }
                if input >= start + 2 * d {
                    let row = input - 2 * d;
                    for (j, sum) in done.into_iter().enumerate() {
                        self.finish(sum, row, col + j * S::LANES, g.w, lanes);
                    }
                }
                source = source.add(d * g.pitch);
                input += d;
            }
        }
    }

    /// Stride 2: row by row.
    #[inline(always)]
    unsafe fn rows<S: Simd>(&self) {
        let g = self.geometry;
        let (oh, ow) = g.output();
        let taps = g.taps();
        unsafe {
            let w = self.weights::<S>();
            for row in 0..oh {
                let source = self.copy.add(row * g.stride * g.pitch);
                let mut col = 0;
                while col < ow {
                    let p = source.add(col);
                    // Two chains of additions halve the latency of nine dependent FMAs.
                    let mut a = S::splat(self.after.bias);
                    let mut b = S::load(p.add(taps[0])).mul(w[0]);
                    a = w[1].mul_add(S::load(p.add(taps[1])), a);
                    b = w[2].mul_add(S::load(p.add(taps[2])), b);
                    a = w[3].mul_add(S::load(p.add(taps[3])), a);
                    b = w[4].mul_add(S::load(p.add(taps[4])), b);
                    a = w[5].mul_add(S::load(p.add(taps[5])), a);
                    b = w[6].mul_add(S::load(p.add(taps[6])), b);
                    a = w[7].mul_add(S::load(p.add(taps[7])), a);
                    b = w[8].mul_add(S::load(p.add(taps[8])), b);
                    self.finish(a.add(b), row, col, ow, (ow - col).min(S::LANES));
                    col += S::LANES;
                }
            }
        }
    }

    /// Writes `lanes` outputs of a row from their sums.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, sum: S, row: usize, col: usize, width: usize, lanes: usize) {
        unsafe {
            let out = self.out.add(row * width + col);
            let mut y = sum;
            if self.after.relu {
                y = S::zero().max(y);
            }
            if self.after.accumulate {
                y = y.add(S::load_up_to(out, lanes));
            }
            y.store_up_to(out, lanes);
            if !self.after.next.is_null() {
                let g = self.geometry;
                let next = self.after.next.add((row + g.margin) * g.pitch + g.left + col);
                y.add(S::load_up_to(self.after.add.add(row * width + col), lanes))
                    .store_up_to(next, lanes);
            }
        }
    }
}

struct WeightGradient<'a> {
    geometry: &'a Padded,
    copy: *const f32,
    du: &'a [f32],
    dw: &'a mut [f64; 9],
}

impl Kernel for WeightGradient<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let g = self.geometry;
        let (oh, ow) = g.output();
        let taps = g.taps();
        unsafe {
            let mut sums = [S::zero(); 9];
            for row in 0..oh {
                let source = self.copy.add(row * g.stride * g.pitch);
                let du = self.du.as_ptr().add(row * ow);
                let mut col = 0;
                while col < ow {
                    let lanes = (ow - col).min(S::LANES);
                    let d = S::load_up_to(du.add(col), lanes);
                    let p = source.add(col);
                    for (sum, &tap) in sums.iter_mut().zip(&taps) {
                        *sum = d.mul_add(S::load(p.add(tap)), *sum);
                    }
                    col += S::LANES;
                }
            }
            for (total, sum) in self.dw.iter_mut().zip(sums) {
                *total += f64::from(sum.sum());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Shape;
    use crate::ops::testing::{T64, relative_l2, rng};

    /// Height, width, dilation, stride: widths around vectors of 8 and 16, one pixel, dilations
    /// past the plane.
    fn geometries() -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let sizes = [(1, 1), (2, 1), (3, 7), (4, 8), (5, 15), (2, 16), (3, 17), (6, 33), (1, 64)];
        let dilated = sizes.into_iter().flat_map(|(h, w)| [1, 2, 3, 4, 8].map(|d| (h, w, d)));
        dilated.flat_map(|(h, w, d)| [(h, w, d, 1), (h, w, d, 2)])
    }

    /// Input at tap t of output (row, col), zero outside.
    fn tap(x: &T64, d: usize, stride: usize, (row, col): (usize, usize), t: usize) -> f64 {
        let offset = |at: usize, k: usize| (at * stride + k * d) as isize - d as isize;
        x.padded(0, 0, offset(row, t / 3), offset(col, t % 3))
    }

    /// A copy in dirty memory: nothing of what was there may show.
    fn copy(padded: &Padded, isa: Isa, x: &T64, y: Option<&T64>) -> Vec<f32> {
        let mut copy = vec![f32::NAN; padded.len()];
        padded.clear_border(&mut copy);
        let y = y.map(T64::f32);
        padded.fill(isa, &x.f32(), y.as_deref(), &mut copy);
        copy
    }

    #[test]
    fn every_instruction_set_agrees_with_the_naive_sum() {
        for (h, w, d, stride) in geometries() {
            let mut rng = rng(80);
            let x = T64::random(Shape::new(1, 1, h, w), &mut rng);
            let y = T64::random(x.shape, &mut rng);
            let weights = T64::random(Shape::new(1, 1, 3, 3), &mut rng);
            let padded = Padded::new(h, w, d, stride);
            let (oh, ow) = padded.output();
            assert_eq!((oh, ow), ((h - 1) / stride + 1, (w - 1) / stride + 1));
            let before = T64::random(Shape::new(1, 1, oh, ow), &mut rng);
            let positions = || (0..oh).flat_map(move |r| (0..ow).map(move |c| (r, c)));
            let expect = |input: &T64| -> Vec<f64> {
                let sum = |p| (0..9).map(|t| weights.data[t] * tap(input, d, stride, p, t)).sum();
                positions().map(sum).collect()
            };
            let plain = expect(&x);
            let relu: Vec<f64> = plain.iter().map(|v| (v + 0.25).max(0.0)).collect();
            let added: Vec<f64> = plain.iter().zip(&before.data).map(|(a, b)| a + b).collect();
            for isa in Isa::available() {
                let check = |what: &str, found: &[f32], expected: &[f64]| {
                    let error = relative_l2(&T64::vector(found).data, expected);
                    let label = format!("{what}, {isa:?}, {h}x{w}, dilation {d}, stride {stride}");
                    // Sums of ten f32 terms.
                    assert!(error <= 1e-6, "{label}: {error:e}");
                };
                let memory = copy(&padded, isa, &x, None);
                let k = weights.f32();
                let mut out = vec![f32::NAN; oh * ow];
                padded.correlate(isa, &memory, &k, false, &mut out);
                check("correlate", &out, &plain);
                padded.convolve(isa, &memory, &k, 0.25, &mut out);
                check("bias and ReLU", &out, &relu);
                let mut out = before.f32();
                padded.correlate(isa, &memory, &k, true, &mut out);
                check("accumulate", &out, &added);

                let mut dw = [0.5f64; 9];
                padded.weight_gradient(isa, &memory, &before.f32(), &mut dw);
                let gradient = |t: usize| {
                    let terms = positions().zip(&before.data);
                    0.5 + terms.map(|(p, du)| du * tap(&x, d, stride, p, t)).sum::<f64>()
                };
                let expected: Vec<f64> = (0..9).map(gradient).collect();
                check("weight gradient", &dw.map(|v| v as f32), &expected);

                if stride == 1 {
                    let memory = copy(&padded, isa, &x, Some(&y));
                    let mut out = vec![f32::NAN; oh * ow];
                    padded.correlate(isa, &memory, &k, false, &mut out);
                    check("sum of two planes", &out, &expect(&x.plus(&y)));
                }
            }
        }
    }

    #[test]
    fn nan_reaches_the_outputs_that_see_it_and_no_other() {
        for (h, w, d, stride) in geometries() {
            let mut x = T64::random(Shape::new(1, 1, h, w), &mut rng(81));
            let last = h * w - 1;
            x.data[last] = f64::NAN;
            let padded = Padded::new(h, w, d, stride);
            let (oh, ow) = padded.output();
            for isa in Isa::available() {
                let memory = copy(&padded, isa, &x, None);
                let mut out = vec![0.0; oh * ow];
                padded.convolve(isa, &memory, &[1.0; 9], 0.0, &mut out);
                for (i, v) in out.iter().enumerate() {
                    let sees = (0..9).any(|t| tap(&x, d, stride, (i / ow, i % ow), t).is_nan());
                    assert_eq!(v.is_nan(), sees, "{isa:?}, {h}x{w}, {d}, {stride}: {i} is {v}");
                }
            }
        }
    }
}
