//! The loss: softmax cross-entropy, mean over labelled pixels (SPEC, "Training defaults").
//!
//! With z the logits of a pixel of class t, M labelled pixels and p = softmax(z):
//!   loss = 1 / M * sum over labelled pixels of (log sum_c exp(z_c) - z_t)
//!   dz_c = (p_c - [c = t]) / M, and 0 for pixels without a label.

use rayon::prelude::*;

use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::{View, ViewMut};

/// Label of pixels that count for nothing. Any value not below the number of classes acts alike.
pub const VOID: u8 = 255;

/// Pixels of one task; their partial losses are added in order, whatever the threads.
const CHUNK: usize = 2048;

/// Mean cross-entropy of `logits` (N x C x H x W) against `labels` (N x H x W), and its gradient.
/// Without a labelled pixel loss and gradient are zero.
pub fn forward_backward(logits: View, labels: &[u8], dlogits: ViewMut) -> f32 {
    let shape = logits.shape();
    let pixels = shape.plane();
    assert_eq!(labels.len(), shape.n * pixels);
    let labelled = labels.par_iter().filter(|&&l| usize::from(l) < shape.c).count();
    let scale = 1.0 / labelled.max(1) as f32;
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
                        loss += f64::from(sum[i].ln() + max[i] - z);
                        sum[i] = scale / sum[i];
                    } else {
                        sum[i] = 0.0;
                    }
                }
                for c in 0..shape.c {
                    let e = unsafe { dlogits.pixels_mut(n, c, range.clone()) };
                    for ((e, &s), &label) in e.iter_mut().zip(&*sum).zip(labels) {
                        let target = if usize::from(label) == c { scale } else { 0.0 };
                        *e = *e * s - target;
                    }
                }
                loss
            })
        })
        .collect();
    (losses.iter().sum::<f64>() / labelled.max(1) as f64) as f32
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
