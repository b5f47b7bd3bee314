//! Helpers of the operator tests: a small f64 tensor for naive references, central differences
//! of them, and f32 tensors in guarded memory of either layout.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::backend::cpu::{Isa, View, ViewMut};
use crate::graph::{PlaneLayout, Shape, Tensor};

/// Forward tolerance, relative L2. One f32 rounding is 6e-8; the longest sums of these tests
/// (a few hundred terms) and the division by a deviation leave errors of a few of them.
pub const FORWARD: f64 = 1e-6;
/// Backward tolerance, relative L2: the f32 error of the backward, whose sums cancel where batch
/// norm subtracts means. The differences themselves are good to about 1e-9 (see [`STEP`]).
pub const BACKWARD: f64 = 1e-5;
/// Step of the central differences. Their truncation error is of order STEP^2 = 1e-10 and their
/// rounding error 1e-16 / STEP = 1e-11, in units of values near 1.
pub const STEP: f64 = 1e-5;
/// Least distance of any ReLU's input from 0 in gradient tests: a step moves it by STEP times
/// the gains on the way (below 100), so that no difference straddles a kink.
pub const KINK_MARGIN: f64 = 2e-3;

/// A dense NCHW array in double precision.
#[derive(Debug, Clone)]
pub struct T64 {
    pub shape: Shape,
    pub data: Vec<f64>,
}

impl T64 {
    pub fn from_fn(shape: Shape, mut f: impl FnMut(usize, usize, usize, usize) -> f64) -> Self {
        let mut data = Vec::with_capacity(shape.len());
        for n in 0..shape.n {
            for c in 0..shape.c {
                for y in 0..shape.h {
                    data.extend((0..shape.w).map(|x| f(n, c, y, x)));
                }
            }
        }
        T64 { shape, data }
    }

    /// Uniform in -1 .. 1, representable in f32 so that both sides start from the same values.
    pub fn random(shape: Shape, rng: &mut ChaCha8Rng) -> Self {
        Self::from_fn(shape, |_, _, _, _| f64::from(rng.random_range(-1.0f32..1.0)))
    }

    /// The same values shifted and scaled, rounded to f32.
    pub fn map(self, f: impl Fn(f64) -> f64) -> Self {
        let data = self.data.iter().map(|&v| f64::from(f(v) as f32)).collect();
        T64 { data, ..self }
    }

    /// A flat parameter vector as 1 x 1 x 1 x len.
    pub fn vector(values: &[f32]) -> Self {
        Self::collect(values.iter().map(|&v| f64::from(v)))
    }

    /// The same of f64 values.
    pub fn collect(values: impl Iterator<Item = f64>) -> Self {
        let data: Vec<f64> = values.collect();
        T64 { shape: Shape::new(1, 1, 1, data.len()), data }
    }

    pub fn at(&self, n: usize, c: usize, y: usize, x: usize) -> f64 {
        let s = self.shape;
        assert!(n < s.n && c < s.c && y < s.h && x < s.w);
        self.data[((n * s.c + c) * s.h + y) * s.w + x]
    }

    /// Zero outside the plane.
    pub fn padded(&self, n: usize, c: usize, y: isize, x: isize) -> f64 {
        let inside =
            (0..self.shape.h as isize).contains(&y) && (0..self.shape.w as isize).contains(&x);
        if inside { self.at(n, c, y as usize, x as usize) } else { 0.0 }
    }

    pub fn f32(&self) -> Vec<f32> {
        self.data.iter().map(|&v| v as f32).collect()
    }

    /// Smallest magnitude.
    pub fn smallest(&self) -> f64 {
        self.data.iter().fold(f64::INFINITY, |a, v| a.min(v.abs()))
    }

    pub fn plus(&self, other: &T64) -> T64 {
        let data = self.data.iter().zip(&other.data).map(|(a, b)| a + b).collect();
        T64 { shape: self.shape, data }
    }
}

pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// The first seed whose ReLU inputs all keep [`KINK_MARGIN`] from 0; `smallest` gives the
/// smallest magnitude among them. Deterministic: the same seed every time.
pub fn seed_off_kinks(smallest: impl Fn(u64) -> f64) -> u64 {
    (0..1000).find(|&seed| smallest(seed) > KINK_MARGIN).expect("a seed away from all kinks")
}

/// dL / d inputs[which] of L = sum(dy * f(inputs)), by central differences.
pub fn central_difference(
    f: impl Fn(&[T64]) -> T64,
    inputs: &[T64],
    which: usize,
    dy: &T64,
) -> T64 {
    let mut moved = inputs.to_vec();
    let mut loss_at = |i: usize, value: f64| -> T64 {
        moved[which].data[i] = value;
        let y = f(&moved);
        moved[which].data[i] = inputs[which].data[i];
        y
    };
    let gradient = |i: usize| {
        let value = inputs[which].data[i];
        let (above, below) = (loss_at(i, value + STEP), loss_at(i, value - STEP));
        // The difference first: most outputs do not depend on this element and cancel exactly.
        let terms = above.data.iter().zip(&below.data).zip(&dy.data);
        terms.map(|((a, b), dy)| (a - b) * dy).sum::<f64>() / (2.0 * STEP)
    };
    let data = (0..inputs[which].data.len()).map(gradient).collect();
    T64 { shape: inputs[which].shape, data }
}

/// Norm of the difference over norm of the reference; NaN where either holds one.
pub fn relative_l2(actual: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let difference: f64 = actual.iter().zip(expected).map(|(a, e)| (a - e) * (a - e)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

#[track_caller]
pub fn assert_close(what: &str, actual: &T64, expected: &T64, tolerance: f64) {
    assert_eq!(actual.data.len(), expected.data.len(), "{what}: length");
    let error = relative_l2(&actual.data, &expected.data);
    assert!(error <= tolerance, "{what}: relative L2 error {error:e}, at most {tolerance:e}");
}

/// Elements of guard before and after a tensor.
const GUARD: usize = 32;
/// What guards and the gaps between padded planes hold: a NaN that no arithmetic produces, so
/// that reading it spoils a result and writing over it is noticed.
const GUARD_BITS: u32 = 0x7fc5_a5a5;

/// An f32 tensor in memory of its own, laid out like a planned one.
pub struct Buffer {
    tensor: Tensor,
    memory: Vec<f32>,
}

impl Buffer {
    pub fn new(values: &T64, layout: PlaneLayout) -> Self {
        let shape = values.shape;
        let plane_stride = layout.stride(shape.plane());
        let batch_stride = shape.c * plane_stride;
        let tensor = Tensor { offset: GUARD, shape, batch_stride, plane_stride };
        let memory = vec![f32::from_bits(GUARD_BITS); tensor.extent() + 2 * GUARD];
        let mut buffer = Buffer { tensor, memory };
        for (at, v) in buffer.places().zip(&values.data) {
            buffer.memory[at] = *v as f32;
        }
        buffer
    }

    /// A tensor that must be overwritten: full of NaN.
    pub fn unwritten(shape: Shape, layout: PlaneLayout) -> Self {
        Self::new(&T64::from_fn(shape, |_, _, _, _| f64::NAN), layout)
    }

    fn places(&self) -> impl Iterator<Item = usize> + use<> {
        let t = self.tensor;
        let plane = t.shape.plane();
        (0..t.shape.len()).map(move |i| {
            let (n, c, p) = (i / plane / t.shape.c, i / plane % t.shape.c, i % plane);
            t.offset + n * t.batch_stride + c * t.plane_stride + p
        })
    }

    pub fn view(&self) -> View<'_> {
        unsafe { View::of(self.memory.as_ptr(), &self.tensor) }
    }

    pub fn view_mut(&mut self) -> ViewMut<'_> {
        unsafe { ViewMut::of(self.memory.as_mut_ptr(), &self.tensor) }
    }

    /// The values; panics where something was written outside the planes.
    #[track_caller]
    pub fn read(&self) -> T64 {
        let mut inside = vec![false; self.memory.len()];
        self.places().for_each(|at| inside[at] = true);
        for (at, v) in self.memory.iter().enumerate().filter(|(at, _)| !inside[*at]) {
            assert_eq!(v.to_bits(), GUARD_BITS, "written outside the planes, at {at}");
        }
        let data = self.places().map(|at| f64::from(self.memory[at])).collect();
        T64 { shape: self.tensor.shape, data }
    }
}

/// Runs `test` with every instruction set of this machine and in both layouts; the label is for
/// messages.
pub fn everywhere(mut test: impl FnMut(Isa, PlaneLayout, &str)) {
    for isa in Isa::available() {
        for layout in [PlaneLayout::Dense, PlaneLayout::CachePadded] {
            test(isa, layout, &format!("{}, {layout:?}", isa.name()));
        }
    }
}

/// Checks a gradient that an operator writes: first into memory full of NaN (it must overwrite),
/// then added to random values (it must keep them). `run` is handed the buffer and the flag.
pub fn check_gradient(
    what: &str,
    expected: &T64,
    layout: PlaneLayout,
    mut run: impl FnMut(ViewMut, bool),
) {
    let mut fresh = Buffer::unwritten(expected.shape, layout);
    run(fresh.view_mut(), false);
    assert_close(what, &fresh.read(), expected, BACKWARD);
    let before = T64::random(expected.shape, &mut rng(99));
    let mut added = Buffer::new(&before, layout);
    run(added.view_mut(), true);
    let what = format!("{what}, accumulated");
    assert_close(&what, &added.read(), &expected.plus(&before), BACKWARD);
}
