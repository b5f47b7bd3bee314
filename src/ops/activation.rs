//! Elementwise non-linearity: ReLU, or the sigmoid of the attention ablation.

use rayon::prelude::*;

use super::Cost;
use crate::backend::cpu::planes::{self, Gated};
use crate::backend::cpu::{Isa, View, ViewMut};
use crate::graph::Shape;

/// A non-linearity, on its own or fused behind another operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    /// Identity.
    None,
    /// max(x, 0).
    Relu,
    /// 1 / (1 + exp(-x)).
    Sigmoid,
}

/// y = act(x).
#[derive(Debug, Clone)]
pub struct Activation {
    /// Which non-linearity.
    pub act: Act,
}

impl Activation {
    pub(super) fn shape(&self, inputs: &[Shape]) -> Result<Shape, String> {
        match inputs {
            [x] => Ok(*x),
            _ => Err("one operand".into()),
        }
    }

    /// One FLOP per output (SPEC's count for ReLU; a sigmoid is counted alike).
    pub(super) fn cost(&self, output: Shape) -> Cost {
        Cost { macs: 0, flops: output.len() as u64 }
    }
}

/// y = act(x), elementwise; y may be x.
pub fn forward(isa: Isa, x: View, act: Act, y: ViewMut) {
    let channels = x.shape().c;
    (0..x.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        // One task per plane.
        let (x, y) = (x.plane(n, c), unsafe { y.plane_mut(n, c) });
        match act {
            Act::None | Act::Relu => {
                planes::affine(isa, x, (1.0, 0.0), None, act == Act::Relu, y);
            }
            Act::Sigmoid => {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = 1.0 / (1.0 + (-x).exp());
                }
            }
        }
    });
}

/// The same over a few elements.
pub(super) fn apply(act: Act, values: &mut [f32]) {
    for v in values {
        *v = match act {
            Act::None => *v,
            // Not f32::max, which drops a NaN.
            Act::Relu if *v <= 0.0 => 0.0,
            Act::Relu => *v,
            Act::Sigmoid => 1.0 / (1.0 + (-*v).exp()),
        };
    }
}

/// With y the forward's output: ReLU passes dy where y > 0; the sigmoid has dx = dy * y * (1 - y).
pub fn backward(isa: Isa, y: View, dy: View, act: Act, dx: ViewMut, accumulate: bool) {
    let channels = y.shape().c;
    (0..y.shape().n * channels).into_par_iter().for_each(|i| {
        let (n, c) = (i / channels, i % channels);
        let (y, grad) = (y.plane(n, c), dy.plane(n, c));
        let dx = unsafe { dx.plane_mut(n, c) };
        match act {
            Act::None => planes::pass_gated(isa, Gated { grad, gate: None }, dx, accumulate),
            Act::Relu => planes::pass_gated(isa, Gated { grad, gate: Some(y) }, dx, accumulate),
            Act::Sigmoid => {
                for ((dx, y), g) in dx.iter_mut().zip(y).zip(grad) {
                    let v = g * y * (1.0 - y);
                    *dx = if accumulate { *dx + v } else { v };
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    const ACTS: [Act; 3] = [Act::None, Act::Relu, Act::Sigmoid];
    const SHAPES: [Shape; 3] =
        [Shape::new(1, 1, 1, 1), Shape::new(3, 2, 5, 7), Shape::new(2, 3, 1, 33)];

    fn naive(x: &T64, act: Act) -> T64 {
        let f = |v: f64| match act {
            Act::None => v,
            Act::Relu => v.max(0.0),
            Act::Sigmoid => 1.0 / (1.0 + (-v).exp()),
        };
        T64 { shape: x.shape, data: x.data.iter().map(|&v| f(v)).collect() }
    }

    /// Values of both signs, away from ReLU's kink.
    fn input(shape: Shape) -> T64 {
        let seed = seed_off_kinks(|seed| T64::random(shape, &mut rng(seed)).smallest());
        T64::random(shape, &mut rng(seed)).map(|v| 4.0 * v)
    }

    #[test]
    fn forward_elsewhere_and_in_place() {
        for (shape, act) in SHAPES.into_iter().flat_map(|s| ACTS.map(|a| (s, a))) {
            let x = input(shape);
            everywhere(|isa, layout, label| {
                let source = Buffer::new(&x, layout);
                let mut y = Buffer::unwritten(shape, layout);
                forward(isa, source.view(), act, y.view_mut());
                assert_close(label, &y.read(), &naive(&x, act), FORWARD);
                let mut both = Buffer::new(&x, layout);
                let target = both.view_mut();
                forward(isa, target.as_view(), act, target);
                assert_eq!(both.read().data, y.read().data, "{label}, in place");
            });
        }
    }

    #[test]
    fn backward_agrees_with_central_differences() {
        for (shape, act) in SHAPES.into_iter().flat_map(|s| ACTS.map(|a| (s, a))) {
            let (x, dy) = (input(shape), T64::random(shape, &mut rng(5)));
            let f = |x: &[T64]| naive(&x[0], act);
            let expected = central_difference(f, std::slice::from_ref(&x), 0, &dy);
            everywhere(|isa, layout, label| {
                let [y, dy] = [&naive(&x, act), &dy].map(|t| Buffer::new(t, layout));
                check_gradient(
                    &format!("{act:?}, {label}"),
                    &expected,
                    layout,
                    |dx, accumulate| {
                        backward(isa, y.view(), dy.view(), act, dx, accumulate);
                    },
                );
            });
        }
    }

    #[test]
    fn nan_and_extremes_pass_through() {
        let extremes = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30];
        let x = T64::vector(&extremes);
        everywhere(|isa, layout, label| {
            let source = Buffer::new(&x, layout);
            let result = |act| {
                let mut y = Buffer::unwritten(x.shape, layout);
                forward(isa, source.view(), act, y.view_mut());
                y.read().data
            };
            let relu = result(Act::Relu);
            assert!(relu[0].is_nan(), "{label}: {relu:?}");
            assert_eq!(relu[1..], [f64::INFINITY, 0.0, f64::from(1e30f32), 0.0], "{label}");
            let sigmoid = result(Act::Sigmoid);
            assert!(sigmoid[0].is_nan(), "{label}: {sigmoid:?}");
            assert_eq!(sigmoid[1..], [1.0, 0.0, 1.0, 0.0], "{label}");
        });
    }
}
