//! The CUDA kernels, run on the CPU by the emulated device: every operator forward and backward
//! against the CPU backend over odd, tiny and strided shapes, in three orders of threads; whole
//! networks against PyTorch; and the emulation itself, which must find the mistakes it is there for.
#![cfg(emulated_kernels)]

#[path = "emulated/bytes.rs"]
mod bytes;
#[path = "emulated/grid.rs"]
mod grid;
#[path = "emulated/harness.rs"]
mod harness;
#[path = "emulated/images.rs"]
mod images;
#[path = "emulated/loss_scaling.rs"]
mod loss_scaling;
#[path = "emulated/network.rs"]
mod network;
#[path = "emulated/products.rs"]
mod products;
#[path = "emulated/stage.rs"]
mod stage;
#[path = "emulated/tensor_cores.rs"]
mod tensor_cores;

use std::path::{Path, PathBuf};

use fpenet::backend::cpu::CpuBackend;
use fpenet::backend::gpu::emulated::{Emulated, Order};
use fpenet::backend::gpu::launch::CascadeShape;
use fpenet::backend::gpu::variants::CascadePlanes;
use fpenet::backend::gpu::{Arg, Buffer, Element, GpuDevice, Launch, Variants};
use fpenet::backend::{Backend, Precision};
use fpenet::graph::{Mode, ParamRole, Plan, Shape, Tensor};
use fpenet::ops::{
    Act, Activation, BatchNorm, BnParams, Cascade, Conv1x1, Conv3x3, MeuFuse, Norm, Op,
};
use fpenet::reference;
use harness::{
    Case, Params, Random, SHARED, check, check_half, check_half_variants, check_variants, emulated,
    half_error,
};

const WEIGHT: ParamRole = ParamRole::Weight { fan_out: 1 };

/// Batch, height and width: one pixel, odd, more than one tile of 32 x 8, more than one block of
/// 1024 pixels.
const SIZES: [(usize, usize, usize); 4] = [(3, 1, 1), (1, 5, 7), (3, 9, 33), (1, 35, 41)];

fn shape((n, h, w): (usize, usize, usize), c: usize) -> Shape {
    Shape::new(n, c, h, w)
}

#[test]
fn elementwise_operators_agree_with_the_cpu() {
    for size in SIZES {
        let x = shape(size, 3);
        for act in [Act::Relu, Act::Sigmoid] {
            let case =
                || Case::training(Op::Activation(Activation { act }), &[x], Params::default());
            check(&case(), SHARED);
            check(&Case { accumulate: true, ..case() }, SHARED);
            check_half(&case(), SHARED);
            check_half(&Case { accumulate: true, ..case() }, SHARED);
            check_half(&Case { training: false, in_place: true, ..case() }, SHARED);
        }
        let add = || Case::training(Op::Add, &[x, x], Params::default());
        check(&add(), SHARED);
        check(&Case { accumulate: true, ..add() }, SHARED);
        check_half(&Case { accumulate: true, ..add() }, SHARED);
        check_half(&Case { training: false, ..add() }, SHARED);
        let concat = || Case::training(Op::Concat, &[x, shape(size, 5)], Params::default());
        check(&concat(), SHARED);
        check(&Case { accumulate: true, ..concat() }, SHARED);
        check_half(&Case { accumulate: true, ..concat() }, SHARED);
        check_half(&Case { training: false, ..concat() }, SHARED);
    }
}

#[test]
fn pooling_agrees_with_the_cpu() {
    for size in SIZES {
        for op in [Op::GlobalAvgPool, Op::ChannelMean] {
            let case = || Case::training(op.clone(), &[shape(size, 5)], Params::default());
            check(&case(), SHARED);
            check(&Case { accumulate: true, ..case() }, SHARED);
            check_half(&case(), SHARED);
            check_half(&Case { accumulate: true, ..case() }, SHARED);
            check_half(&Case { training: false, ..case() }, SHARED);
        }
    }
}

#[test]
fn convolutions_1x1_agree_with_the_cpu() {
    for size in SIZES {
        for (inp, out, bias) in [(1, 1, true), (6, 19, true), (16, 5, false)] {
            let conv = |act| {
                let mut params = Params::default();
                let weight = params.add(&[out, inp, 1, 1], WEIGHT);
                let bias = bias.then(|| params.add(&[out], ParamRole::Bias));
                let op =
                    Op::Conv1x1(Conv1x1 { in_channels: inp, out_channels: out, weight, bias, act });
                (op, params)
            };
            for accumulate in [false, true] {
                let (op, params) = conv(Act::None);
                let case = Case::training(op, &[shape(size, inp)], params);
                let case = Case { accumulate, ..case };
                check(&case, SHARED);
                check_half(&case, SHARED);
            }
            for act in [Act::None, Act::Relu, Act::Sigmoid] {
                for residual in [false, true] {
                    let inputs = [shape(size, inp), shape(size, out)];
                    let (op, params) = conv(act);
                    let case = Case::inference(op, &inputs[..1 + usize::from(residual)], params);
                    check(&case, SHARED);
                    check_half(&case, SHARED);
                }
            }
        }
    }
}

#[test]
fn convolutions_3x3_agree_with_the_cpu() {
    for size in SIZES {
        // 19 outputs are more than one group of 16.
        for (inp, out, stride) in [(3, 16, 2), (2, 19, 1), (1, 3, 2)] {
            let conv = |act, bias: bool| {
                let mut params = Params::default();
                let weight = params.add(&[out, inp, 3, 3], WEIGHT);
                let bias = bias.then(|| params.add(&[out], ParamRole::Bias));
                let conv =
                    Conv3x3 { in_channels: inp, out_channels: out, stride, weight, bias, act };
                (Op::Conv3x3(conv), params)
            };
            let inputs = [shape(size, inp)];
            for (act, bias) in [(Act::Relu, true), (Act::None, false)] {
                let (op, params) = conv(act, bias);
                let case = Case::inference(op, &inputs, params);
                check(&case, SHARED);
                check_half(&case, SHARED);
            }
            let (op, params) = conv(Act::None, true);
            let case = Case::training(op, &inputs, params);
            check(&case, SHARED);
            check_half(&case, SHARED);
        }
    }
}

fn bn_params(params: &mut Params, channels: usize) -> BnParams {
    BnParams {
        weight: params.add(&[channels], ParamRole::Scale),
        bias: params.add(&[channels], ParamRole::Bias),
        running_mean: params.add(&[channels], ParamRole::RunningMean),
        running_var: params.add(&[channels], ParamRole::RunningVar),
    }
}

#[test]
fn batch_norm_agrees_with_the_cpu() {
    // The last plane is more than one piece of 4096 pixels.
    for size in [(3, 2, 3), (1, 5, 7), (2, 65, 67)] {
        for (act, residual) in [(Act::None, false), (Act::Relu, false), (Act::Relu, true)] {
            for accumulate in [false, true] {
                let mut params = Params::default();
                let channels = 3;
                let bn = bn_params(&mut params, channels);
                let op = Op::BatchNorm(BatchNorm { channels, params: bn, act });
                let inputs = vec![shape(size, channels); 1 + usize::from(residual)];
                let case = Case { accumulate, ..Case::training(op, &inputs, params) };
                check(&case, SHARED);
                check_half(&case, SHARED);
            }
        }
    }
}

fn cascade(dilations: &[usize], stride: usize, addition: bool, folded: bool) -> (Op, Params) {
    let (mut params, width) = (Params::default(), 2);
    let branches = dilations.len();
    let weights = (0..branches).map(|_| params.add(&[width, 1, 3, 3], WEIGHT)).collect();
    let norm = if folded {
        Norm::Folded((0..branches).map(|_| params.add(&[width], ParamRole::Bias)).collect())
    } else {
        Norm::Batch((0..branches).map(|_| bn_params(&mut params, width)).collect())
    };
    let cascade = Cascade {
        channels: branches * width,
        stride,
        dilations: dilations.to_vec(),
        addition: addition && stride == 1,
        weights,
        norm,
    };
    (Op::Cascade(cascade), params)
}

/// One, two and four branches; dilations beyond the plane; odd ones under stride 2.
const DILATIONS: [&[usize]; 4] = [&[1], &[2, 3], &[1, 2, 4, 8], &[5, 1, 16, 2]];

#[test]
fn inference_cascades_agree_with_the_cpu() {
    for dilations in DILATIONS {
        for (stride, addition) in [(1, true), (1, false), (2, false)] {
            for size in [(3, 1, 1), (1, 5, 7), (2, 19, 37)] {
                // Whole planes, tiles with halos, and branch by branch where no tile fits.
                for shared in [SHARED, 12 * 1024, 32] {
                    let (op, params) = cascade(dilations, stride, addition, true);
                    let x = shape(size, 2 * dilations.len());
                    let case = Case::inference(op, &[x], params);
                    for variants in [Variants::PLAIN, Variants::default()] {
                        check_variants(&case, shared, variants);
                        check_half_variants(&case, shared, variants);
                    }
                    if stride == 1 {
                        let case = Case { in_place: true, ..case };
                        check_variants(&case, shared, Variants::PLAIN);
                        check(&case, shared);
                        check_half(&case, shared);
                    }
                }
            }
        }
    }
}

#[test]
fn cascades_of_large_planes_agree_with_the_cpu() {
    // Blocks of 1024 threads: the whole plane, and tiles of 32 x 64 with the halo of 15.
    for shared in [SHARED, 64 * 1024] {
        let (op, params) = cascade(&[1, 2, 4, 8], 1, true, true);
        let case = Case::inference(op, &[Shape::new(1, 8, 90, 130)], params);
        check_variants(&case, shared, Variants::PLAIN);
        check(&case, shared);
    }
    // Halves take half the room: the same tiles in half the shared memory.
    let (op, params) = cascade(&[1, 2, 4, 8], 1, true, true);
    let case = Case::inference(op, &[Shape::new(1, 8, 75, 131)], params);
    check_half(&case, 32 * 1024);
}

#[test]
fn cascades_fetched_ahead_agree_with_the_cpu() {
    // Rows of whole vectors. Few chains take tiles of a few rows, less room smaller ones; tiles in place
    // take another target.
    for dilations in [&[1][..], &[2, 4], &[1, 2, 4, 8], &[6, 1, 16, 2]] {
        for (size, addition) in [(2, true), (1, false)].map(|(n, add)| ((n, 33, 72), add)) {
            for shared in [SHARED, 48 * 1024] {
                let (op, params) = cascade(dilations, 1, addition, true);
                let case = Case::inference(op, &[shape(size, 2 * dilations.len())], params);
                check(&case, shared);
                check_half(&case, shared);
                let case = Case { in_place: true, ..case };
                check(&case, shared);
                check_half(&case, shared);
            }
        }
    }
    // A chain has tiles of its own, or is whole where there are enough of them.
    let ahead = |planes| {
        let dilations = &[1, 2, 4, 8];
        let shape = CascadeShape {
            dilations,
            addition: true,
            stride: 1,
            input: (64, 128),
            output: (64, 128),
        };
        shape.ahead_tiling(Element::F16, planes, 227 << 10).unwrap().tile_h
    };
    assert_eq!([ahead(64), ahead(96)], [32, 64]);
}

#[test]
fn cascades_on_tensor_cores_agree_with_the_cpu() {
    // Rows of whole 16 columns; less than, and more than, what the warps make at once, with a rest.
    let variants = Variants { cascade: CascadePlanes::Mma, ..Variants::default() };
    for dilations in [&[1][..], &[2, 4], &[1, 2, 4, 8], &[6, 1, 8, 2]] {
        for (size, addition) in [((2, 33, 80), true), ((1, 9, 16), true), ((1, 70, 144), false)] {
            for shared in [SHARED, 56 * 1024] {
                let (op, params) = cascade(dilations, 1, addition, true);
                let case = Case::inference(op, &[shape(size, 2 * dilations.len())], params);
                check_half_variants(&case, shared, variants);
                let case = Case { in_place: true, ..case };
                check_half_variants(&case, shared, variants);
            }
        }
    }
    // The planes of a network of 1024 x 512, and those that are left to other kernels.
    let across = |element, dilations: &[usize], (h, w)| {
        let (input, output) = ((h, w), (h, w));
        let shape = CascadeShape { dilations, addition: true, stride: 1, input, output };
        let (tiling, across) = shape.mma_tiling(element, 32, 227 << 10)?;
        Some((tiling.tile_h, across.map(|log| 1 << log)))
    };
    let dilations = &[1, 2, 4, 8];
    assert_eq!(across(Element::F16, dilations, (128, 256)), Some((32, [4, 4, 4, 8])));
    assert_eq!(across(Element::F16, dilations, (64, 128)), Some((16, [4, 4, 8, 8])));
    assert_eq!(across(Element::F32, dilations, (64, 128)), None);
    assert_eq!(across(Element::F16, &[1, 2, 4, 16], (64, 128)), None);
    assert_eq!(across(Element::F16, dilations, (64, 120)), None);
}

#[test]
fn training_cascades_agree_with_the_cpu() {
    // Planes that every dilation reaches across: where only the centre tap counts, batch norm undoes
    // its scale, and its gradient is nothing but rounding.
    const SIZES: [((usize, usize, usize), bool); 3] =
        [((3, 17, 18), false), ((1, 9, 37), false), ((2, 10, 20), true)];
    let mut half = Vec::new();
    for dilations in DILATIONS {
        for (stride, addition) in [(1, true), (1, false), (2, false)] {
            for (size, accumulate) in SIZES {
                let (op, params) = cascade(dilations, stride, addition, false);
                let case = Case::training(op, &[shape(size, 2 * dilations.len())], params);
                let case = Case { accumulate, ..case };
                check(&case, SHARED);
                half.push(half_error(&case, SHARED, Variants::default()));
            }
        }
    }
    // In half precision a ReLU may open or close that the CPU has the other way, and up to three
    // branches behind it are of a few hundred values: the gradient of nine weights then jumps.
    half.sort_by(|a, b| a.0.total_cmp(&b.0));
    assert!(half[half.len() * 3 / 4].0 <= 1e-2, "{half:?}");
    assert!(half.last().unwrap().0 <= 1e-1, "{half:?}");
}

/// Sizes before and after an interpolation: upwards by two and by odd factors, downwards, from and
/// to a single pixel.
const RESIZES: [[usize; 4]; 6] =
    [[3, 5, 6, 10], [3, 5, 5, 9], [4, 7, 17, 33], [9, 8, 4, 3], [1, 1, 5, 4], [6, 5, 1, 1]];

#[test]
fn resizes_agree_with_the_cpu() {
    for [h, w, out_h, out_w] in RESIZES {
        for n in [1, 3] {
            let inputs = [Shape::new(n, 9, h, w), Shape::new(n, 1, out_h, out_w)];
            let case = || Case::training(Op::Resize, &inputs, Params::default());
            check(&case(), SHARED);
            check(&Case { accumulate: true, ..case() }, SHARED);
            check_half(&case(), SHARED);
            check_half(&Case { accumulate: true, ..case() }, SHARED);
            check_half(&Case { training: false, ..case() }, SHARED);
        }
    }
}

#[test]
fn fusions_agree_with_the_cpu() {
    for [h, w, out_h, out_w] in RESIZES {
        for (n, spatial) in [(1, true), (3, true), (2, false)] {
            let c = 9;
            let mut inputs = vec![
                Shape::new(n, c, h, w),
                Shape::new(n, c, out_h, out_w),
                Shape::new(n, c, 1, 1),
            ];
            inputs.extend(spatial.then_some(Shape::new(n, 1, out_h, out_w)));
            let op = Op::MeuFuse(MeuFuse { spatial });
            let case = || Case::training(op.clone(), &inputs, Params::default());
            check(&case(), SHARED);
            check(&Case { accumulate: true, ..case() }, SHARED);
            check_half(&case(), SHARED);
            check_half(&Case { accumulate: true, ..case() }, SHARED);
            check_half(&Case { training: false, ..case() }, SHARED);
        }
    }
}

#[test]
fn labels_agree_with_the_cpu() {
    for [h, w, out_h, out_w] in RESIZES {
        let scores = Shape::new(2, 7, h, w);
        let tensor = |shape: Shape| Tensor {
            offset: 0,
            shape,
            plane_stride: shape.plane(),
            batch_stride: shape.c * shape.plane(),
        };
        let plan = Plan {
            mode: Mode::Labels,
            steps: Vec::new(),
            input: tensor(Shape::new(2, 1, out_h, out_w)),
            logits: tensor(scores),
            grad_logits: None,
            named: Vec::new(),
            params: Vec::new(),
            param_len: 0,
            trainable_len: 0,
            arena_len: scores.len(),
        };
        let values = Random(3).values(scores.len());
        let labels = |backend: &mut dyn Backend| {
            let mut labels = vec![0; 2 * out_h * out_w];
            backend.prepare(&plan).unwrap();
            backend.write(&plan.logits, &values).unwrap();
            backend.forward(&plan).unwrap();
            backend.read_labels(&plan, &mut labels).unwrap();
            labels
        };
        let expected = labels(&mut CpuBackend::new(Some(1)).unwrap());
        for order in [Order::Forward, Order::Reverse, Order::Shuffled(1)] {
            assert_eq!(labels(&mut emulated(order, SHARED, Precision::F32)), expected);
        }
    }
}

fn folders() -> Vec<PathBuf> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let entries = std::fs::read_dir(data).unwrap().map(|e| e.unwrap().path());
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    assert!(folders.len() >= 5, "{folders:?}");
    folders
}

fn check_folder(folder: &Path, order: Order, precision: Precision) -> reference::Report {
    let open =
        || -> fpenet::Result<Box<dyn Backend>> { Ok(Box::new(emulated(order, SHARED, precision))) };
    let report = reference::check(folder, precision, &open).unwrap();
    for row in report.rows.iter().filter(|row| !row.passed()) {
        eprintln!("{}: {row:?}", folder.display());
    }
    assert!(report.passed(), "{}: {} misses", folder.display(), report.misses());
    report
}

#[test]
fn every_reference_folder_passes() {
    for folder in folders() {
        check_folder(&folder, Order::Forward, Precision::F32);
    }
}

#[test]
fn every_reference_folder_passes_in_half_precision() {
    for folder in folders() {
        check_folder(&folder, Order::Reverse, Precision::F16);
    }
}

#[test]
fn a_training_step_does_not_depend_on_the_order_of_threads() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/ca_decoder");
    let errors = |order| -> Vec<f64> {
        let report = check_folder(&folder, order, Precision::F32);
        report.rows.iter().map(|row| row.comparison.error).collect()
    };
    let forward = errors(Order::Forward);
    assert_eq!(errors(Order::Reverse), forward);
    assert_eq!(errors(Order::Shuffled(5)), forward);
}

/// A device with one block of 64 threads to run, and what kernels get there.
struct Bench {
    device: Emulated,
    x: Buffer,
    y: Buffer,
}

impl Bench {
    fn new(order: Order) -> Bench {
        let mut device = Emulated::new(order, SHARED);
        let x = device.alloc(4 * 64, "x").unwrap();
        let y = device.alloc(4 * 64, "y").unwrap();
        let values: Vec<u8> = (0..64).flat_map(|i| (i as f32).to_ne_bytes()).collect();
        device.upload(x.into(), &values).unwrap();
        Bench { device, x, y }
    }

    fn launch(&mut self, kernel: &'static str, args: Vec<Arg>) -> fpenet::Result<Vec<f32>> {
        let (grid, block, shared_bytes) = ([1, 1, 1], [64, 1, 1], 4 * 64);
        let cooperative = false;
        self.device.launch(&Launch { kernel, grid, block, shared_bytes, args, cooperative })?;
        let mut bytes = [0; 4 * 64];
        self.device.download(self.y.into(), &mut bytes)?;
        let value = |b: &[u8]| f32::from_ne_bytes(b.try_into().unwrap());
        Ok(bytes.chunks(4).map(value).collect())
    }
}

const ORDERS: [Order; 3] = [Order::Forward, Order::Reverse, Order::Shuffled(9)];

#[test]
fn barriers_order_what_threads_see() {
    let reversed: Vec<f32> = (0..64).rev().map(|i| i as f32).collect();
    for order in ORDERS {
        let mut bench = Bench::new(order);
        let args = vec![bench.x.into(), bench.y.into(), Arg::I32(1)];
        assert_eq!(bench.launch("faulty_reverse", args).unwrap(), reversed);
    }
}

#[test]
fn a_missing_barrier_shows_as_poison_or_as_another_result() {
    for order in ORDERS {
        let mut bench = Bench::new(order);
        let args = vec![bench.x.into(), bench.y.into(), Arg::I32(0)];
        let found = bench.launch("faulty_reverse", args).unwrap();
        assert!(found.iter().any(|v| v.is_nan()), "{order:?}: {found:?}");
    }
}

#[test]
fn a_barrier_that_some_threads_pass_by_is_an_error() {
    let mut bench = Bench::new(Order::Forward);
    let args = vec![bench.y.into()];
    let message = bench.launch("faulty_barrier", args).unwrap_err().to_string();
    assert!(message.contains("faulty_barrier: barrier not reached by all"), "{message}");
    // The device is usable afterwards.
    let args = vec![bench.x.into(), bench.y.into(), Arg::I32(1)];
    assert_eq!(bench.launch("faulty_reverse", args).unwrap()[0], 63.0);
}

#[test]
fn writes_out_of_bounds_are_errors() {
    for (in_shared, expected) in [(0, "wrote outside of y"), (1, "wrote past its 256 bytes")] {
        let mut bench = Bench::new(Order::Forward);
        let args = vec![bench.y.into(), Arg::I32(64), Arg::I32(in_shared)];
        let message = bench.launch("faulty_bounds", args).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn lanes_exchange_values() {
    for order in ORDERS {
        let mut bench = Bench::new(order);
        let sum = bench.device.alloc(4, "sum").unwrap();
        let args = vec![bench.x.into(), sum.into(), bench.y.into()];
        let next = bench.launch("warp_exchange", args).unwrap();
        for (i, v) in next.iter().enumerate() {
            assert_eq!(*v, (i / 32 * 32 + (i + 1) % 32) as f32, "{order:?}");
        }
        let mut bytes = [0; 4];
        bench.device.download(sum.into(), &mut bytes).unwrap();
        assert_eq!(f32::from_ne_bytes(bytes), 2016.0);
    }
}

#[test]
fn arguments_that_do_not_fit_a_kernel_are_errors() {
    let mut bench = Bench::new(Order::Forward);
    let args = vec![bench.x.into(), Arg::I32(1), bench.y.into()];
    let message = bench.launch("faulty_reverse", args).unwrap_err().to_string();
    assert!(message.contains("arguments pip for parameters ppi"), "{message}");
    let message = bench.launch("no_such_kernel", Vec::new()).unwrap_err().to_string();
    assert!(message.contains("no such kernel"), "{message}");
}
