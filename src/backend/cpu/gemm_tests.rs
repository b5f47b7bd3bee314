//! The tiled product against a naive one in f64.

use super::*;
use crate::ops::testing::{T64, relative_l2, rng};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// Rows around the panel height, odd depths, pixels around vectors, strips and tiles.
const MS: [usize; 6] = [1, 5, 6, 7, 13, 19];
const KS: [usize; 4] = [1, 3, 16, 65];
const PIXELS: [usize; 8] = [1, 15, 16, 17, 63, 64, 65, 200];
/// Sums of up to 67 f32 terms, relative to results, or to terms (near 1) where they cancel.
const TOLERANCE: f64 = 1e-6;
/// Elements between planes beyond their pixels.
const GAP: usize = 5;

fn random(len: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}

fn rms(v: &[f64]) -> f64 {
    (v.iter().map(|v| v * v).sum::<f64>() / v.len() as f64).sqrt()
}

struct Problem {
    m: usize,
    k: usize,
    pixels: usize,
    stride: usize,
    w: Vec<f32>,
    x: Vec<f32>,
    bias: Vec<f32>,
    residual: Vec<f32>,
}

/// What is fused behind the product.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fused {
    Nothing,
    Bias,
    BiasResidualRelu,
    InPlace,
}
const FUSED: [Fused; 4] = [Fused::Nothing, Fused::Bias, Fused::BiasResidualRelu, Fused::InPlace];

impl Problem {
    fn new(m: usize, k: usize, pixels: usize) -> Self {
        let mut rng = rng((m * 1000 + k * 10 + pixels) as u64);
        let stride = pixels + GAP;
        let [w, x, bias, residual] =
            [m * k, k * stride, m, m * stride].map(|len| random(len, &mut rng));
        Problem { m, k, pixels, stride, w, x, bias, residual }
    }

    fn expected(&self, fused: Fused) -> Vec<f64> {
        let at = |row: usize, p: usize| {
            let products = (0..self.k).map(|i| {
                f64::from(self.w[row * self.k + i]) * f64::from(self.x[i * self.stride + p])
            });
            let (sum, bias) = (products.sum::<f64>(), f64::from(self.bias[row]));
            let residual = f64::from(self.residual[row * self.stride + p]);
            match fused {
                Fused::Nothing => sum,
                Fused::Bias => sum + bias,
                Fused::InPlace => sum + residual,
                // Not f64::max, which hides NaN.
                Fused::BiasResidualRelu if sum + bias + residual < 0.0 => 0.0,
                Fused::BiasResidualRelu => sum + bias + residual,
            }
        };
        let pixels = 0..self.pixels;
        (0..self.m).flat_map(|row| pixels.clone().map(move |p| at(row, p))).collect()
    }

    /// The product tile by tile; panics where a gap between planes is written.
    fn run(&self, isa: Isa, fused: Fused) -> Vec<f64> {
        const GUARD: f32 = -77.0;
        let mut out = match fused {
            Fused::InPlace => self.residual.clone(),
            _ => vec![GUARD; self.m * self.stride],
        };
        let gaps = out.clone();
        let mut epilogue = Epilogue::store(out.as_mut_ptr(), self.stride);
        if matches!(fused, Fused::Bias | Fused::BiasResidualRelu) {
            epilogue.bias = self.bias.as_ptr();
        }
        epilogue.residual_stride = self.stride;
        match fused {
            Fused::BiasResidualRelu => epilogue.residual = self.residual.as_ptr(),
            Fused::InPlace => epilogue.residual = epilogue.out,
            Fused::Nothing | Fused::Bias => {}
        }
        epilogue.relu = fused == Fused::BiasResidualRelu;
        let weights = PackedWeights::new(&self.w, self.m, self.k);
        let (base, stride) = (self.x.as_ptr(), self.stride);
        let planes = Planes { base, k: self.k, stride, pixels: self.pixels };
        let product = Product { weights: &weights, epilogue };
        unsafe { multiply(isa, &planes, 0..self.pixels, product, None) }
        let mut result = Vec::new();
        for (row, gap) in out.chunks(self.stride).zip(gaps.chunks(self.stride)) {
            result.extend(row[..self.pixels].iter().map(|&v| f64::from(v)));
            assert_eq!(row[self.pixels..], gap[self.pixels..], "gap between planes");
        }
        result
    }
}

fn problems() -> impl Iterator<Item = Problem> {
    let sizes = MS.into_iter().flat_map(|m| KS.map(|k| (m, k)));
    sizes.flat_map(|(m, k)| PIXELS.map(|pixels| Problem::new(m, k, pixels)))
}

#[test]
fn every_instruction_set_and_epilogue_agrees_with_the_naive_product() {
    for problem in problems() {
        for fused in FUSED {
            let expected = problem.expected(fused);
            for isa in Isa::available() {
                let found = problem.run(isa, fused);
                let scale = rms(&expected).max(1.0) * (expected.len() as f64).sqrt();
                let error = difference(&found, &expected) / scale;
                let Problem { m, k, pixels, .. } = problem;
                assert!(error <= TOLERANCE, "{isa:?} {m} x {k} x {pixels} {fused:?}: {error}");
            }
        }
    }
}

#[test]
fn nan_reaches_its_pixel_and_no_other() {
    for (m, k, pixels) in [(1, 1, 1), (7, 3, 17), (13, 16, 65)] {
        for (fused, at) in FUSED.into_iter().flat_map(|f| [(f, 0), (f, pixels - 1)]) {
            let mut problem = Problem::new(m, k, pixels);
            problem.x[(k - 1) * problem.stride + at] = f32::NAN;
            for isa in Isa::available() {
                for (i, v) in problem.run(isa, fused).iter().enumerate() {
                    assert_eq!(v.is_nan(), i % pixels == at, "{isa:?} {fused:?}: {i} is {v}");
                }
            }
        }
    }
}

#[test]
fn transposed_weights_are_those_of_the_transposed_matrix() {
    for (m, k) in [(1, 1), (7, 3), (13, 16)] {
        let w = random(m * k, &mut rng(70));
        let transpose: Vec<f32> = (0..m * k).map(|i| w[i % m * k + i / m]).collect();
        let [a, b] = [PackedWeights::new(&w, m, k), PackedWeights::transposed(&transpose, m, k)];
        assert_eq!(a.data, b.data, "{m} x {k}");
    }
}

#[test]
fn dot_pixels_agrees_with_the_naive_sum() {
    for problem in problems().filter(|p| p.k <= 16) {
        let Problem { m, k, pixels, stride, .. } = problem;
        let (a, b) = (&problem.residual, &problem.x);
        let dot = |i: usize| {
            let at = |v: &[f32], row: usize, p: usize| f64::from(v[row * stride + p]);
            (0..pixels).map(|p| at(a, i / k, p) * at(b, i % k, p)).sum::<f64>()
        };
        let expected = T64::collect((0..m * k).map(dot));
        let mut out = vec![f32::NAN; m * k];
        unsafe {
            dot_pixels(m, k, pixels, a.as_ptr(), stride, b.as_ptr(), stride, &mut out);
        }
        let error = relative_l2(&T64::vector(&out).data, &expected.data);
        assert!(error <= 1e-5, "{m} x {k} x {pixels}: {error}");
    }
}
