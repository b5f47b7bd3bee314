//! The loss: softmax cross-entropy, mean over labelled pixels (SPEC, "Training defaults"), on request
//! weighted by class.
//!
//! With z the logits of a pixel of class t, w_t the weight of that class, M = sum of w_t over labelled
//! pixels (their number where all weights are 1) and p = softmax(z):
//!   loss = 1 / M * sum over labelled pixels of w_t * (log sum_c exp(z_c) - z_t)
//!   dz_c = (p_c - [c = t]) * w_t / M, and 0 for pixels without a label.

use rayon::prelude::*;

use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::{View, ViewMut};

/// Label of pixels that count for nothing. Any value not below the number of classes acts alike.
pub const VOID: u8 = 255;

/// Pixels of one task; their partial losses are added in order, whatever the threads.
const CHUNK: usize = 2048;

/// Sum of the weights of all labelled pixels, M above; 1 where it is 0, so that nothing is divided by
/// zero. `weights` as in [`forward_backward`].
pub fn total_weight(labels: &[u8], classes: usize, weights: &[f32]) -> f64 {
    if weights.is_empty() {
        // Every step of a training run comes by, and a GPU waits for it: no table to go through.
        let labelled = labels.iter().filter(|&&label| usize::from(label) < classes).count();
        return labelled.max(1) as f64;
    }
    let mut counts = [0u64; 256];
    labels.iter().for_each(|&label| counts[usize::from(label)] += 1);
    let weight = |class: usize| f64::from(weights.get(class).copied().unwrap_or(1.0));
    let total: f64 = (0..classes).map(|class| counts[class] as f64 * weight(class)).sum();
    if total > 0.0 { total } else { 1.0 }
}

/// Mean cross-entropy of `logits` (N x C x H x W, at most 255 classes) against `labels` (N x H x W),
/// and its gradient; `weights` are those of the first classes, the rest is 1. Without a labelled
/// pixel, or with one of weight 0 alone, loss and gradient are zero.
pub fn forward_backward(logits: View, labels: &[u8], weights: &[f32], dlogits: ViewMut) -> f32 {
    let shape = logits.shape();
    let pixels = shape.plane();
    assert_eq!(labels.len(), shape.n * pixels);
    let weight = |class: usize| weights.get(class).copied().unwrap_or(1.0);
    let total = total_weight(labels, shape.c, weights);
    let inverse = 1.0 / total as f32;
    let chunks = pixels.div_ceil(CHUNK);
    let losses: Vec<f64> = (0..shape.n * chunks)
        .into_par_iter()
        .map(|task| {
            let (n, start) = (task / chunks, task % chunks * CHUNK);
            let range = start..pixels.min(start + CHUNK);
            let labels = &labels[n * pixels..][range.clone()];
            let len = range.len();
            with_scratch(2 * len, |scratch| {
                let (max, sum) = scratch.split_at_mut(len);
                max.copy_from_slice(&logits.plane(n, 0)[range.clone()]);
                for c in 1..shape.c {
                    for (m, &z) in max.iter_mut().zip(&logits.plane(n, c)[range.clone()]) {
                        *m = if z > *m { z } else { *m };
                    }
                }
                sum.fill(0.0);
                // The gradient's planes hold exp(z - max) until the sum is known. Every task
                // owns its pixels.
                for c in 0..shape.c {
                    let e = unsafe { dlogits.pixels_mut(n, c, range.clone()) };
                    let z = &logits.plane(n, c)[range.clone()];
                    for (((e, &z), &m), s) in e.iter_mut().zip(z).zip(&*max).zip(sum.iter_mut()) {
                        *e = exp(z - m);
                        *s += *e;
                    }
                }
                let mut loss = 0.0f64;
                for (i, &label) in labels.iter().enumerate() {
                    if let Some(class) = Some(usize::from(label)).filter(|&l| l < shape.c) {
                        let z = logits.plane(n, class)[start + i];
                        // max - z first: it is often 0, where ln(sum) + max would lose digits.
                        let weight = weight(class);
                        loss += f64::from(weight) * f64::from(sum[i].ln() + (max[i] - z));
                        sum[i] = inverse * weight / sum[i];
                    } else {
                        sum[i] = 0.0;
                    }
                }
                for c in 0..shape.c {
                    let e = unsafe { dlogits.pixels_mut(n, c, range.clone()) };
                    let share = inverse * weight(c);
                    for ((e, &s), &label) in e.iter_mut().zip(&*sum).zip(labels) {
                        let target = if usize::from(label) == c { share } else { 0.0 };
                        *e = *e * s - target;
                    }
                }
                loss
            })
        })
        .collect();
    (losses.iter().sum::<f64>() / total) as f32
}

/// exp(x) for x <= 0 within 2 units in the last place; 0 below -87; NaN stays NaN.
///
/// 2^n * 2^f with n the nearest integer to x / ln 2 and a polynomial for the rest: plain
/// arithmetic, so that loops over it vectorise, which calls of the C library do not.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first exact in few bits, so that x - n ln 2 loses nothing.
    let f = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * f + 1.398_199_9e-3;
    let p = p * f + 8.333_452e-3;
    let p = p * f + 4.166_579_6e-2;
    let p = p * f + 1.666_666_6e-1;
    let p = p * f + 0.5;
    let p = p * f * f + f + 1.0;
    let exponent = (shifted.to_bits() << 23).wrapping_add(0x3f80_0000);
    let y = p * f32::from_bits(exponent);
    if x < -87.0 { 0.0 } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Shape;
    use crate::ops::testing::*;
    use rand::RngExt;

    /// Weighted mean over labelled pixels, as a 1 x 1 x 1 x 1 tensor.
    fn naive(logits: &T64, labels: &[u8], weights: &[f32]) -> T64 {
        let s = logits.shape;
        let (mut sum, mut count) = (0.0, 0.0);
        for (i, &label) in labels.iter().enumerate().filter(|(_, l)| usize::from(**l) < s.c) {
            let (n, p) = (i / s.plane(), i % s.plane());
            let z = |c: usize| logits.at(n, c, p / s.w, p % s.w);
            let max = (0..s.c).map(z).fold(f64::MIN, f64::max);
            let total: f64 = (0..s.c).map(|c| (z(c) - max).exp()).sum();
            let weight = weights.get(usize::from(label)).map_or(1.0, |&w| f64::from(w));
            sum += weight * (total.ln() + max - z(usize::from(label)));
            count += weight;
        }
        T64::collect(std::iter::once(if count > 0.0 { sum / count } else { 0.0 }))
    }

    /// Labels of all classes, with some void and some other value outside the classes.
    fn labels(shape: Shape, seed: u64) -> Vec<u8> {
        let mut rng = rng(seed);
        let label = |_| match rng.random_range(0..shape.c + 2) {
            c if c < shape.c => c as u8,
            c if c == shape.c => VOID,
            _ => shape.c as u8,
        };
        (0..shape.n * shape.plane()).map(label).collect()
    }

    const LAYOUTS: [crate::graph::PlaneLayout; 2] =
        [crate::graph::PlaneLayout::Dense, crate::graph::PlaneLayout::CachePadded];

    #[test]
    fn loss_and_gradient_agree_with_the_naive_ones() {
        let shapes = [Shape::new(3, 5, 5, 7), Shape::new(1, 2, 1, 3), Shape::new(2, 19, 3, 3)];
        for (i, shape) in shapes.into_iter().enumerate() {
            let logits = [T64::random(shape, &mut rng(50)).map(|v| 5.0 * v)];
            let labels = labels(shape, 51 + i as u64);
            // All alike; all given, one of them zero; only the first given.
            let given: Vec<f32> = (0..shape.c).map(|c| 0.7 * c as f32).collect();
            for (weights, layout) in
                [&[], &given[..], &[3.5]].into_iter().flat_map(|w| LAYOUTS.map(|l| (w, l)))
            {
                let f = |x: &[T64]| naive(&x[0], &labels, weights);
                let one = T64::collect(std::iter::once(1.0));
                let gradient = central_difference(f, &logits, 0, &one);
                let z = Buffer::new(&logits[0], layout);
                let mut dz = Buffer::unwritten(shape, layout);
                let loss = forward_backward(z.view(), &labels, weights, dz.view_mut());
                let what = format!("{shape}, {layout:?}, weights {weights:?}");
                // Absolute below 1: 1 + exp(z - max) rounds at 6e-8 however small the loss.
                let error = (f64::from(loss) - f(&logits).data[0]).abs();
                assert!(error <= FORWARD * f64::from(loss).max(1.0), "{what}: {error:e}");
                let found = dz.read();
                assert_close(&what, &found, &gradient, BACKWARD);
                for (p, _) in labels.iter().enumerate().filter(|(_, l)| usize::from(**l) >= shape.c)
                {
                    let (n, p) = (p / shape.plane(), p % shape.plane());
                    for c in 0..shape.c {
                        assert_eq!(found.at(n, c, p / shape.w, p % shape.w), 0.0, "void pixel");
                    }
                }
            }
        }
    }

    /// torch.nn.functional.cross_entropy(z, t, weight=[0.5, 2, 3], ignore_index=255) in f64.
    #[test]
    fn the_weighted_loss_is_pytorchs() {
        let shape = Shape::new(1, 3, 1, 4);
        let z = [1.0, 0.0, 2.0, 0.25, 2.0, -1.0, 2.0, 1.5, 0.5, 3.0, 2.0, -0.75];
        let mut dz = [f32::NAN; 12];
        let view = ViewMut::dense(&mut dz, shape);
        let labels = [0, 2, VOID, 1];
        let loss = forward_backward(View::dense(&z, shape), &labels, &[0.5, 2.0, 3.0], view);
        assert!((f64::from(loss) - 0.289_305_694_934_674_2).abs() < 1e-7, "{loss}");
        let expected = [
            [-0.069_888_73, 0.025_425_067, 0.0, 0.074_849_67],
            [0.057_139_247, 0.009_353_359, 0.0, -0.102_385_33],
            [0.012_749_489, -0.034_778_426, 0.0, 0.027_535_656],
        ];
        for (found, expected) in dz.iter().zip(expected.as_flattened()) {
            assert!((found - expected).abs() < 1e-7f32, "{dz:?}");
        }
    }

    #[test]
    fn weights_of_one_change_no_bit() {
        let shape = Shape::new(2, 5, 7, 9);
        let labels = labels(shape, 55);
        let z = Buffer::new(&T64::random(shape, &mut rng(56)), LAYOUTS[1]);
        let run = |weights: &[f32]| {
            let mut dz = Buffer::unwritten(shape, LAYOUTS[1]);
            let loss = forward_backward(z.view(), &labels, weights, dz.view_mut());
            (loss.to_bits(), dz.read().f32().iter().map(|v| v.to_bits()).collect::<Vec<_>>())
        };
        assert_eq!(run(&[]), run(&[1.0; 5]));
    }

    #[test]
    fn planes_longer_than_a_task() {
        let shape = Shape::new(2, 3, 47, 61);
        assert!(shape.plane() > CHUNK);
        let logits = T64::random(shape, &mut rng(60)).map(|v| 5.0 * v);
        let labels = labels(shape, 61);
        let z = Buffer::new(&logits, LAYOUTS[1]);
        let mut dz = Buffer::unwritten(shape, LAYOUTS[1]);
        let loss = forward_backward(z.view(), &labels, &[], dz.view_mut());
        assert_close("loss", &T64::vector(&[loss]), &naive(&logits, &labels, &[]), FORWARD);
        // Softmax sums to 1: the gradient of each pixel sums to 0, up to f32 of 1 / M.
        let dz = dz.read();
        for (n, p) in (0..2).flat_map(|n| (0..shape.plane()).map(move |p| (n, p))) {
            let sum: f64 = (0..3).map(|c| dz.at(n, c, p / shape.w, p % shape.w)).sum();
            assert!(sum.abs() < 1e-6 / 2000.0, "{sum}");
        }
    }

    #[test]
    fn without_labels_loss_and_gradient_are_zero() {
        let shape = Shape::new(1, 3, 5, 7);
        let z = Buffer::new(&T64::random(shape, &mut rng(62)), LAYOUTS[0]);
        let mut dz = Buffer::unwritten(shape, LAYOUTS[0]);
        for (label, weights) in [(VOID, [1.0; 3]), (1, [1.0, 0.0, 1.0])] {
            assert_eq!(forward_backward(z.view(), &[label; 35], &weights, dz.view_mut()), 0.0);
            assert!(dz.read().data.iter().all(|&v| v == 0.0), "label {label}");
        }
    }

    #[test]
    fn extreme_logits_neither_overflow_nor_hide_nan() {
        let shape = Shape::new(1, 3, 1, 1);
        let loss = |z: [f32; 3], label| {
            let mut dz = [f32::NAN; 3];
            let view = ViewMut::dense(&mut dz, shape);
            let loss = forward_backward(View::dense(&z, shape), &[label], &[], view);
            (loss, dz)
        };
        assert_eq!(loss([1e4, -1e4, 0.0], 0), (0.0, [0.0, 0.0, 0.0]));
        assert_eq!(loss([1e4, -1e4, 0.0], 1), (2e4, [1.0, -1.0, 0.0]));
        for i in 0..3 {
            let mut z = [0.5, -0.5, 0.0];
            z[i] = f32::NAN;
            for label in 0..3 {
                let (loss, dz) = loss(z, label);
                assert!(loss.is_nan() && dz.iter().any(|v| v.is_nan()), "{i}, {label}: {dz:?}");
            }
        }
    }

    #[test]
    fn exponential_is_good_to_two_units_in_the_last_place() {
        for i in 0..=87_000 {
            let x = -(i as f32) / 1000.0;
            let exact = f64::from(x).exp();
            let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
            let error = (f64::from(exp(x)) - exact).abs() / ulp;
            assert!(error <= 2.0, "exp({x}): {error} units");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }
}
