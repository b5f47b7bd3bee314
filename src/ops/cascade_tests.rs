//! The cascade against a naive one in double precision.

use super::*;
use crate::graph::PlaneLayout;
use crate::ops::batch_norm::EPS;
use crate::ops::testing::*;

/// One network: C channels in B branches.
#[derive(Debug, Clone, Copy)]
struct Case {
    input: Shape,
    dilations: &'static [usize],
    stride: usize,
    addition: bool,
}

/// 1, 2 and 4 branches, both strides, odd and even sizes, dilations that reach past the plane.
/// Every branch normalises over at least ten values (see batch_norm's tests).
const CASES: [Case; 10] = {
    const fn case(
        input: Shape,
        dilations: &'static [usize],
        stride: usize,
        addition: bool,
    ) -> Case {
        Case { input, dilations, stride, addition }
    }
    [
        case(Shape::new(3, 2, 5, 7), &[1], 1, true),
        case(Shape::new(3, 2, 5, 7), &[2], 2, false),
        case(Shape::new(2, 4, 5, 7), &[1, 2], 1, true),
        case(Shape::new(2, 4, 6, 5), &[1, 2], 2, false),
        case(Shape::new(3, 4, 5, 7), &[1, 2, 4, 8], 1, true),
        case(Shape::new(3, 4, 5, 7), &[1, 2, 4, 8], 1, false),
        case(Shape::new(3, 4, 5, 7), &[1, 2, 4, 8], 2, false),
        case(Shape::new(1, 8, 6, 8), &[1, 2, 4, 8], 2, false),
        case(Shape::new(1, 4, 3, 33), &[3, 1, 1, 2], 1, true),
        case(Shape::new(1, 4, 3, 35), &[3, 1, 1, 2], 2, false),
    ]
};

impl Case {
    fn operator(&self) -> Cascade {
        Cascade {
            channels: self.input.c,
            stride: self.stride,
            dilations: self.dilations.to_vec(),
            addition: self.addition,
            weights: Vec::new(),
            norm: Norm::Folded(Vec::new()),
        }
    }

    fn width(&self) -> usize {
        self.input.c / self.dilations.len()
    }

    fn output(&self) -> Shape {
        let half = |size: usize| (size - 1) / self.stride + 1;
        Shape { h: half(self.input.h), w: half(self.input.w), ..self.input }
    }

    /// x, then weights, scales and shifts of each branch in turn.
    fn operands(&self, seed: u64) -> Vec<T64> {
        let mut rng = rng(seed);
        let vector = Shape::new(1, 1, 1, self.width());
        let mut all = vec![T64::random(self.input, &mut rng)];
        for _ in self.dilations {
            all.push(T64::random(Shape::new(self.width(), 1, 3, 3), &mut rng));
            all.push(T64::random(vector, &mut rng).map(|v| 1.0 + 0.5 * v));
            all.push(T64::random(vector, &mut rng));
        }
        all
    }

    /// Output and the smallest magnitude of a ReLU's input. `batch`: normalise by the batch's
    /// statistics; otherwise scales are taken for 1 and shifts for biases.
    fn naive(&self, inputs: &[T64], batch: bool) -> (T64, f64) {
        let (x, shape, width) = (&inputs[0], self.output(), self.width());
        let mut y = T64::from_fn(shape, |_, _, _, _| 0.0);
        let mut smallest = f64::INFINITY;
        for (i, &d) in self.dilations.iter().enumerate() {
            let [w, scale, shift] = &inputs[1 + 3 * i..][..3] else { panic!("three per branch") };
            let before = y.clone();
            let reach = d as isize;
            let u = T64::from_fn(shape.with_channels(width), |n, c, row, col| {
                let mut v = 0.0;
                for (ky, kx) in (0..3).flat_map(|ky| (0..3).map(move |kx| (ky, kx))) {
                    let at_y = (row * self.stride) as isize + (ky as isize - 1) * reach;
                    let at_x = (col * self.stride) as isize + (kx as isize - 1) * reach;
                    let mut s = x.padded(n, i * width + c, at_y, at_x);
                    if self.addition && i > 0 {
                        s += before.padded(n, (i - 1) * width + c, at_y, at_x);
                    }
                    v += w.at(c, 0, ky as usize, kx as usize) * s;
                }
                v
            });
            for c in 0..width {
                let plane = shape.plane();
                let at = |n: usize, p: usize| (n * width + c) * plane + p;
                let pixels = || (0..shape.n).flat_map(|n| (0..plane).map(move |p| (n, p)));
                let count = (shape.n * plane) as f64;
                let mean = pixels().map(|(n, p)| u.data[at(n, p)]).sum::<f64>() / count;
                let square = |v: f64| (v - mean) * (v - mean);
                let var = pixels().map(|(n, p)| square(u.data[at(n, p)])).sum::<f64>() / count;
                for (n, p) in pixels() {
                    let v = u.data[at(n, p)];
                    let v = if batch {
                        scale.data[c] * (v - mean) / (var + f64::from(EPS)).sqrt() + shift.data[c]
                    } else {
                        v + shift.data[c]
                    };
                    smallest = smallest.min(v.abs());
                    y.data[(n * shape.c + i * width + c) * plane + p] = v.max(0.0);
                }
            }
        }
        (y, smallest)
    }
}

/// What a training forward leaves behind.
struct Trained {
    y: Buffer,
    u: Buffer,
    mean: Vec<f32>,
    invstd: Vec<f32>,
    /// Mean, then variance, of each branch.
    running: Vec<(Vec<f32>, Vec<f32>)>,
}

fn parameters(inputs: &[T64], which: usize) -> Vec<Vec<f32>> {
    inputs[1..].iter().skip(which).step_by(3).map(T64::f32).collect()
}

fn slices(values: &[Vec<f32>]) -> Vec<&[f32]> {
    values.iter().map(Vec::as_slice).collect()
}

fn train(case: Case, inputs: &[T64], isa: Isa, layout: PlaneLayout) -> Trained {
    let [weights, scales, shifts] = [0, 1, 2].map(|i| parameters(inputs, i));
    let width = case.width();
    let mut trained = Trained {
        y: Buffer::unwritten(case.output(), layout),
        u: Buffer::unwritten(case.output(), layout),
        mean: vec![f32::NAN; case.input.c],
        invstd: vec![f32::NAN; case.input.c],
        running: vec![(vec![0.0; width], vec![1.0; width]); case.dilations.len()],
    };
    let zipped = trained.running.iter_mut().zip(scales.iter().zip(&shifts));
    let mut norms: Vec<TrainingParams> = zipped
        .map(|((running_mean, running_var), (weight, bias))| TrainingParams {
            weight,
            bias,
            running_mean,
            running_var,
        })
        .collect();
    let x = Buffer::new(&inputs[0], layout);
    let (y, u) = (trained.y.view_mut(), trained.u.view_mut());
    let (mean, invstd) = (&mut trained.mean, &mut trained.invstd);
    let weights = slices(&weights);
    case.operator().forward_training(isa, x.view(), &weights, &mut norms, y, u, mean, invstd);
    trained
}

#[test]
fn training_agrees_with_the_naive_forward_and_its_central_differences() {
    for case in CASES {
        let seed = seed_off_kinks(|seed| case.naive(&case.operands(seed), true).1);
        let inputs = case.operands(seed);
        let (expected, _) = case.naive(&inputs, true);
        let dy = T64::random(case.output(), &mut rng(20));
        let f = |inputs: &[T64]| case.naive(inputs, true).0;
        let gradients: Vec<T64> =
            (0..inputs.len()).map(|i| central_difference(f, &inputs, i, &dy)).collect();
        let [weights, scales] = [0, 1].map(|i| parameters(&inputs, i));
        everywhere(|isa, layout, label| {
            let trained = train(case, &inputs, isa, layout);
            let what = format!("{case:?}, {label}");
            assert_close(&what, &trained.y.read(), &expected, CASCADE_FORWARD);
            trained.u.read();
            let [x, dy] = [&inputs[0], &dy].map(|t| Buffer::new(t, layout));
            let what = format!("dx, {what}");
            check_gradient(&what, &gradients[0], layout, |dx, accumulate| {
                let io = CascadeBackward {
                    x: x.view(),
                    y: trained.y.view(),
                    u: trained.u.view(),
                    dy: dy.view(),
                    dx: (dx, accumulate),
                    weights: &slices(&weights),
                    scales: &slices(&scales),
                    saved_mean: &trained.mean,
                    saved_invstd: &trained.invstd,
                };
                // All branches together: where a dilation reaches past the plane, the centre
                // tap alone is left, batch norm undoes its scale, and the gradient is 0.
                let branches = case.operator().backward(isa, io);
                let all = |k: usize| {
                    branches.iter().flat_map(move |b| [&b.weight, &b.scale, &b.shift][k].clone())
                };
                for k in 0..3 {
                    let actual = T64::collect(all(k).map(f64::from));
                    let parts = gradients[1 + k..].iter().step_by(3);
                    let expected = T64::collect(parts.flat_map(|g| g.data.clone()));
                    assert_close(&format!("parameter {k}, {what}"), &actual, &expected, BACKWARD);
                }
            });
        });
    }
}

/// Four branches in a row, each dividing by the deviation of what the ones before it left.
const CASCADE_FORWARD: f64 = 3.0 * FORWARD;

#[test]
fn running_statistics_take_in_the_batch() {
    let case = CASES[4];
    let inputs = case.operands(0);
    everywhere(|isa, layout, label| {
        let trained = train(case, &inputs, isa, layout);
        let u = trained.u.read();
        let (plane, count) = (u.shape.plane(), (u.shape.n * u.shape.plane()) as f64);
        for (i, (mean, var)) in trained.running.iter().enumerate() {
            let planes = |n: usize| &u.data[(n * u.shape.c + i) * plane..][..plane];
            let values = || (0..u.shape.n).flat_map(planes);
            let m = values().sum::<f64>() / count;
            let v = values().map(|v| (v - m) * (v - m)).sum::<f64>() / (count - 1.0);
            let expected = T64::collect([0.1 * m, 0.9 + 0.1 * v].into_iter());
            assert_close(label, &T64::vector(&[mean[0], var[0]]), &expected, FORWARD);
        }
    });
}

#[test]
fn folded_forward_elsewhere_and_in_place() {
    let tiny = Case { input: Shape::new(1, 4, 1, 1), ..CASES[4] };
    let tiny_strided = Case { input: Shape::new(3, 4, 1, 2), ..CASES[6] };
    // More chains than tasks, on up to eight threads; rows of every mix of vectors; planes past the
    // size up to which a branch fills the next one's copy.
    let many_chains = Case { input: Shape::new(2, 72, 5, 9), ..CASES[4] };
    let wide = Case { input: Shape::new(1, 4, 10, 123), ..CASES[4] };
    let large = Case { input: Shape::new(1, 4, 160, 170), ..CASES[4] };
    let more = [tiny, tiny_strided, many_chains, wide, large];
    for case in CASES.into_iter().chain(more) {
        let inputs = case.operands(21);
        let (expected, _) = case.naive(&inputs, false);
        let [weights, biases] = [0, 2].map(|i| parameters(&inputs, i));
        let (weights, biases) = (slices(&weights), slices(&biases));
        everywhere(|isa, layout, label| {
            let what = format!("{case:?}, {label}");
            let mut x = Buffer::new(&inputs[0], layout);
            let mut y = Buffer::unwritten(case.output(), layout);
            case.operator().forward(isa, x.view(), &weights, &biases, y.view_mut());
            assert_close(&what, &y.read(), &expected, FORWARD);
            if case.stride == 1 {
                let both = x.view_mut();
                case.operator().forward(isa, both.as_view(), &weights, &biases, both);
                assert_eq!(x.read().data, y.read().data, "{what}, in place");
            }
        });
    }
}

#[test]
fn nan_passes_from_branch_to_branch() {
    let case = CASES[4];
    let mut inputs = case.operands(22);
    let centre = 2 * 7 + 3;
    inputs[0].data[centre] = f64::NAN;
    let [weights, biases] = [0, 2].map(|i| parameters(&inputs, i));
    everywhere(|isa, layout, label| {
        let x = Buffer::new(&inputs[0], layout);
        let mut y = Buffer::unwritten(case.output(), layout);
        let (weights, biases) = (slices(&weights), slices(&biases));
        case.operator().forward(isa, x.view(), &weights, &biases, y.view_mut());
        let y = y.read();
        for branch in 0..4 {
            assert!(y.at(0, branch, 2, 3).is_nan(), "{label}: branch {branch}");
        }
        let other_images = &y.data[y.data.len() / 3..];
        assert!(other_images.iter().all(|v| v.is_finite()), "{label}");
    });
}
