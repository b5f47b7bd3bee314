//! Expanded tensors in 8 bits: every kernel against the same arithmetic in plain Rust, launch by
//! launch, and a whole network against itself in half precision.

use fpenet::Error;
use fpenet::backend::gpu::emulated::{Emulated, Order};
use fpenet::backend::gpu::lower::{Memory, Target, lower};
use fpenet::backend::gpu::variants::{CascadePlanes, Expanded, Pairs, Products};
use fpenet::backend::gpu::{Arg, Command, Element, GpuDevice, Launch, Place, Variants};
use fpenet::backend::{Backend as _, Precision};
use fpenet::bundled;
use fpenet::exec::Inference;
use fpenet::graph::{Mode, ParamId, ParamRole, ParamSpec, Plan, Shape, Step, Tensor};
use fpenet::model::Model;
use fpenet::ops::resize::argmax_nchw;
use fpenet::ops::{Act, Cascade, Conv1x1, Norm, Op};
use half::f16;
use image::imageops::FilterType;

use super::WEIGHT;
use super::harness::{Params, Random, SHARED, distance, emulated, with_variants};
use super::products::conv;

const BYTES: Variants = Variants {
    expanded: Expanded::Bytes,
    products: Products::Fused,
    pairs: Pairs::Fused,
    cascade: CascadePlanes::Stored,
    stage_weights: true,
    ..Variants::PLAIN
};

/// Two blocks of `c` channels between a pair before and a projection behind them, as in a stage.
struct Blocks {
    plan: Plan,
    values: Vec<f32>,
    /// The first projection's input, its residual, and the last result.
    ends: [Tensor; 3],
}

fn blocks(c: usize, (n, h, w): (usize, usize, usize)) -> Blocks {
    let mut params = Params::default();
    let mut next = 0;
    let mut place = |c: usize, gap: usize| {
        let shape = Shape::new(n, c, h, w);
        let batch_stride = (c + gap) * shape.plane();
        let tensor = Tensor { offset: next, shape, batch_stride, plane_stride: shape.plane() };
        next = (next + n * batch_stride).next_multiple_of(16) + 16;
        tensor
    };
    let (e, first, last) = (place(4 * c, 0), place(c, c), place(c, c));
    let (one, two) = (place(c, 0), place(c, 0));
    let mut steps = Vec::new();
    let mut scales = Vec::new();
    let mut push = |op: Op, inputs: &[Tensor], output: Tensor, byte_scale: Option<ParamId>| {
        steps.push(Step {
            name: "test".into(),
            op,
            joined: false,
            byte_scale,
            grad_inputs: vec![None; inputs.len()],
            inputs: inputs.to_vec(),
            output,
            saved: Vec::new(),
            grad_output: None,
        });
    };
    let mut scale = |params: &mut Params| {
        let id = params.add(&[2, 4 * c], ParamRole::Scale);
        scales.push(id);
        Some(id)
    };
    for (before, after) in [(first, one), (one, two)] {
        let project = conv(&mut params, 4 * c, c, Act::None);
        push(Op::Conv1x1(project), &[e, before], after, None);
        let expand = conv(&mut params, c, 4 * c, Act::Relu);
        push(Op::Conv1x1(expand), &[after], e, scale(&mut params));
        let weights = (0..4).map(|_| params.add(&[c, 1, 3, 3], WEIGHT)).collect();
        let norm = Norm::Folded((0..4).map(|_| params.add(&[c], ParamRole::Bias)).collect());
        let dilations = vec![1, 2, 4, 8];
        let op = Cascade { channels: 4 * c, stride: 1, dilations, addition: true, weights, norm };
        push(Op::Cascade(op), &[e], e, scale(&mut params));
    }
    let project = conv(&mut params, 4 * c, c, Act::None);
    push(Op::Conv1x1(project), &[e, two], last, None);

    let params = params.specs();
    let end = params.last().map_or(0, |p| p.offset + p.len()).next_multiple_of(16);
    let mut random = Random(3);
    let mut values = random.values(end);
    for (i, spec) in params.iter().enumerate() {
        let values = &mut values[spec.range()];
        if scales.contains(&ParamId(i)) {
            // Most values below 255 steps, some above.
            let (scale, inverse) = values.split_at_mut(4 * c);
            scale.iter_mut().for_each(|s| *s = (2.0 + *s) / 255.0);
            inverse.iter_mut().zip(scale).for_each(|(i, s)| *i = 1.0 / *s);
        } else {
            let small = if spec.shape.len() == 4 && spec.shape[1] > 1 { 0.2 } else { 0.5 };
            values.iter_mut().for_each(|v| *v *= small);
        }
    }
    let plan = Plan {
        mode: Mode::Logits,
        steps,
        input: e,
        logits: last,
        grad_logits: None,
        named: Vec::new(),
        params,
        param_len: end,
        trainable_len: end,
        arena_len: next,
    };
    Blocks { plan, values, ends: [e, first, last] }
}

/// Planes as a kernel has them: elements of `size` bytes from a place on.
struct Planes {
    at: Place,
    batch: usize,
    plane: usize,
    size: usize,
}

/// A device with a plan's memory.
struct Run {
    device: Emulated,
    program: Vec<Command>,
}

impl Run {
    fn new(blocks: &Blocks, order: Order, variants: Variants) -> Run {
        let mut device = Emulated::new(order, SHARED);
        let (plan, shared_limit) = (&blocks.plan, SHARED);
        let target = Target { element: Element::F16, shared_limit, variants };
        let mut alloc = |bytes: usize, what| device.alloc(bytes, what).unwrap();
        let arena = alloc(2 * plan.arena_len, "arena");
        let params = alloc(4 * plan.param_len, "parameters");
        let halves = alloc(2 * plan.param_len, "half parameters");
        let other = alloc(256, "other");
        let mut memory = Memory {
            arena,
            params,
            params_half: Some(halves),
            grads: None,
            scratch: other,
            labels: other,
            moments: None,
            statistics: other,
            rgb: None,
            control: other,
            counters: other,
        };
        let scratch = lower(plan, &memory, target).unwrap().scratch_bytes;
        memory.scratch = alloc(scratch.max(4), "scratch");
        let program = lower(plan, &memory, target).unwrap().forward;
        device.upload(params.into(), bytemuck::cast_slice(&blocks.values)).unwrap();
        let rounded: Vec<f16> = blocks.values.iter().map(|&v| f16::from_f32(v)).collect();
        device.upload(halves.into(), bytes_of(&rounded)).unwrap();
        let mut random = Random(8);
        for (tensor, least) in [(blocks.ends[0], 0.0), (blocks.ends[1], -1.0)] {
            let extent = tensor.shape.n * tensor.batch_stride;
            let values = random.values(extent);
            let values: Vec<f16> = values.iter().map(|v| f16::from_f32(v.max(least))).collect();
            let at = Place { buffer: arena, byte_offset: 2 * tensor.offset };
            device.upload(at, bytes_of(&values)).unwrap();
        }
        Run { device, program }
    }

    /// Values of an image of planes as they are stored: steps of bytes, halves widened.
    fn read(&mut self, planes: &Planes, n: usize, c: usize, pixels: usize) -> Vec<f32> {
        let mut all = Vec::with_capacity(c * pixels);
        for c in 0..c {
            let at = planes.at.offset((n * planes.batch + c * planes.plane) * planes.size);
            let mut bytes = vec![0; pixels * planes.size];
            self.device.download(at, &mut bytes).unwrap();
            match planes.size {
                1 => all.extend(bytes.iter().map(|&b| f32::from(b))),
                _ => {
                    let halves = bytes.as_chunks::<2>().0;
                    all.extend(halves.iter().map(|b| f16::from_ne_bytes(*b).to_f32()));
                }
            }
        }
        all
    }
}

fn bytes_of(halves: &[f16]) -> &[u8] {
    // A half is two bytes of any value.
    unsafe { std::slice::from_raw_parts(halves.as_ptr().cast(), 2 * halves.len()) }
}

fn place(launch: &Launch, i: usize) -> Place {
    match &launch.args[i] {
        Arg::Pointer(place) => *place,
        other => panic!("{}: argument {i} is {other:?}", launch.kernel),
    }
}

fn int(launch: &Launch, i: usize) -> usize {
    match &launch.args[i] {
        Arg::I32(value) => *value as usize,
        other => panic!("{}: argument {i} is {other:?}", launch.kernel),
    }
}

/// Whether a launch of a pair is a projection alone.
fn alone(launch: &Launch) -> bool {
    launch.kernel.starts_with("pair") && launch.args[7] == Arg::Null
}

/// The operand and the result of a pair, a projection alone or a cascade.
fn operands(launch: &Launch) -> [Planes; 2] {
    let size = |bytes: bool| if bytes { 1 } else { 2 };
    let from = size(!launch.kernel.ends_with("_to_u8"));
    let to = size(!alone(launch));
    // Pointers x and z or y; strides of x, and of z or y.
    let [x, y, x_strides, y_strides] = match launch.kernel.starts_with("pair") {
        true if alone(launch) => [0, 4, 11, 15],
        true => [0, 7, 11, 17],
        false => [0, 1, 22, 24],
    };
    let planes = |at: usize, strides: usize, size: usize| Planes {
        at: place(launch, at),
        batch: int(launch, strides),
        plane: int(launch, strides + 1),
        size,
    };
    [planes(x, x_strides, from), planes(y, y_strides, to)]
}

/// A step's parameters.
struct Values<'a> {
    specs: &'a [ParamSpec],
    values: &'a [f32],
}

impl<'a> Values<'a> {
    fn get(&self, id: ParamId) -> &'a [f32] {
        &self.values[self.specs[id.0].range()]
    }
}

fn rounded(v: f32) -> f32 {
    f16::from_f32(v).to_f32()
}

/// W x + b, weights in half precision; x is in x pixels.
fn multiply(values: &Values, op: &Conv1x1, x: &[f32], pixels: usize) -> Vec<f32> {
    let (w, b) = (values.get(op.weight), values.get(op.bias.unwrap()));
    let mut y = vec![0.0; op.out_channels * pixels];
    for (c, y) in y.chunks_mut(pixels).enumerate() {
        y.fill(b[c]);
        for (w, x) in w[c * op.in_channels..].iter().zip(x.chunks(pixels)) {
            y.iter_mut().zip(x).for_each(|(y, x)| *y += rounded(*w) * x);
        }
    }
    y
}

/// The cascade over x in half precision, its planes in halves between the branches.
fn cascade(
    values: &Values,
    op: &Cascade,
    x: &[f32],
    (h, w): (usize, usize),
    mut wide: impl FnMut(usize, f32) -> f32,
) -> Vec<f32> {
    let Norm::Folded(biases) = &op.norm else { panic!("a folded cascade") };
    let (width, pixels) = (op.width(), h * w);
    let mut y = vec![0.0; op.channels * pixels];
    for chain in 0..width {
        let mut before = vec![0.0; pixels];
        for (branch, &d) in op.dilations.iter().enumerate() {
            let c = branch * width + chain;
            let plane = x[c * pixels..][..pixels].iter().zip(&before);
            let s: Vec<f32> = plane.map(|(&x, &y)| rounded(wide(c, x) + y)).collect();
            let kernel = &values.get(op.weights[branch])[9 * chain..][..9];
            for (i, out) in before.iter_mut().enumerate() {
                let mut sum = values.get(biases[branch])[chain];
                for (tap, k) in kernel.iter().enumerate() {
                    let row = (i / w + tap / 3 * d).wrapping_sub(d);
                    let column = (i % w + tap % 3 * d).wrapping_sub(d);
                    if row < h && column < w {
                        sum += k * s[row * w + column];
                    }
                }
                *out = sum.max(0.0);
            }
            y[c * pixels..][..pixels].copy_from_slice(&before);
        }
    }
    y
}

/// Whether results are as they should be: bytes within one step and nearly all of them equal, halves
/// within rounding of sums in another order.
fn check(name: &str, found: &[f32], expected: &[f32], inverses: Option<&[f32]>, pixels: usize) {
    let Some(inverses) = inverses else {
        let error = distance(found, expected);
        assert!(error <= 2e-3, "{name}: relative L2 {error:e}");
        return;
    };
    let step = |i: usize| (expected[i] * inverses[i / pixels]).clamp(0.0, 255.0).round_ties_even();
    let differ = (0..found.len()).filter(|&i| found[i] != step(i)).count();
    let far = (0..found.len()).find(|&i| (found[i] - step(i)).abs() > 1.0);
    if let Some(i) = far {
        panic!("{name}: element {i} is {}, not {}", found[i], step(i));
    }
    assert!(differ * 50 <= found.len(), "{name}: {differ} of {} differ", found.len());
    let (zeros, full) =
        (found.iter().filter(|v| **v == 0.0), found.iter().filter(|v| **v == 255.0));
    let (zeros, full) = (zeros.count(), full.count());
    assert!(zeros * 10 < found.len() * 9 && full * 2 < found.len(), "{name}: {zeros}, {full}");
}

/// Runs the blocks launch by launch; each is checked on what the one before it really left.
fn check_blocks(
    c: usize,
    (n, h, w): (usize, usize, usize),
    variants: Variants,
) -> Vec<&'static str> {
    let blocks = blocks(c, (n, h, w));
    let Plan { steps, params, .. } = &blocks.plan;
    let values = Values { specs: params, values: &blocks.values };
    let mut run = Run::new(&blocks, Order::Forward, variants);
    let (pixels, mut at, mut names) = (h * w, 0usize, Vec::new());
    let program = std::mem::take(&mut run.program);
    for command in &program {
        let Command::Launch(launch) = command else { panic!("a product of cuBLAS") };
        names.push(launch.kernel);
        let [from, to] = operands(launch);
        let images: Vec<Vec<f32>> = (0..n).map(|n| run.read(&from, n, 4 * c, pixels)).collect();
        let residual = |run: &mut Run, n: usize| {
            let [batch, plane] = [int(launch, 13), int(launch, 14)];
            run.read(&Planes { at: place(launch, 3), batch, plane, size: 2 }, n, c, pixels)
        };
        let pair = launch.kernel.starts_with("pair");
        let residuals: Vec<Vec<f32>> =
            (0..if pair { n } else { 0 }).map(|n| residual(&mut run, n)).collect();
        run.device.launch(launch).unwrap();
        let scale_before = at.checked_sub(1).and_then(|i| steps[i].byte_scale);
        let wide = |channel: usize, v: f32| match (from.size, scale_before) {
            (1, Some(id)) => v * values.get(id)[channel],
            _ => v,
        };
        let result = if pair && !alone(launch) { at + 1 } else { at };
        let inverses = steps[result].byte_scale.map(|id| &values.get(id)[4 * c..]);
        for image in 0..n {
            let x = &images[image];
            let expected = match (&steps[at].op, &steps[result].op) {
                (Op::Conv1x1(project), last) => {
                    let x: Vec<f32> =
                        x.iter().enumerate().map(|(i, &v)| rounded(wide(i / pixels, v))).collect();
                    let mut y = multiply(&values, project, &x, pixels);
                    let sums = y.iter_mut().zip(&residuals[image]);
                    sums.for_each(|(y, r)| *y = rounded(*y + r));
                    match last {
                        Op::Conv1x1(expand) if result > at => {
                            let mut z = multiply(&values, expand, &y, pixels);
                            z.iter_mut().for_each(|v| *v = v.max(0.0));
                            z
                        }
                        _ => y,
                    }
                }
                (Op::Cascade(op), _) => cascade(&values, op, x, (h, w), wide),
                _ => panic!("step {at}"),
            };
            let found = run.read(&to, image, expected.len() / pixels, pixels);
            let name = format!("{} at {n} x {c} x {h} x {w}", launch.kernel);
            check(&name, &found, &expected, inverses, pixels);
        }
        at = result + 1;
    }
    assert_eq!(at, steps.len());

    // All of it at once, with threads in another order, to the same bits.
    let last = blocks.ends[2];
    let mut ends = [Order::Forward, Order::Shuffled(5)].map(|order| {
        let mut again = Run::new(&blocks, order, variants);
        let program = std::mem::take(&mut again.program);
        again.device.submit(0, &program).unwrap();
        let Some(Command::Launch(launch)) = program.last() else { panic!("no launch") };
        let (batch, plane) = (last.batch_stride, last.plane_stride);
        let at = Planes { at: place(launch, 4), batch, plane, size: 2 };
        (0..n).flat_map(|n| again.read(&at, n, c, pixels)).collect::<Vec<f32>>()
    });
    let [one, other] = &mut ends;
    assert!(one == other, "{c} channels, {n} x {h} x {w}: depends on the order of threads");
    names
}

#[test]
fn kernels_over_bytes_are_the_arithmetic_over_the_same_bytes_within_one_step() {
    // Planes too small to be padded, odd ones, rows that go in pairs and not, whole tiles of 16
    // bytes, more than one tile of the pair.
    for size in [(1, 1, 3), (3, 5, 7), (1, 8, 16), (2, 9, 13), (1, 6, 50)] {
        for (c, pixels) in [(32, 64), (32, 128), (64, 64), (64, 32)] {
            let variants = Variants { pair_pixels: pixels, ..BYTES };
            let names = check_blocks(c, size, variants);
            let pair = |end: &str| format!("pair_f16_c{c}_p{pixels}_{end}");
            assert_eq!(names[0], pair("to_u8"));
            assert_eq!(names[1], "cascade_walk_f16_u8");
            assert_eq!(names[2], pair("u8"));
            assert_eq!(names[3], "cascade_walk_f16_u8");
            assert_eq!(names[4], pair("u8"));
            assert_eq!(names.len(), 5);
        }
    }
}

#[test]
fn tiles_of_a_plane_in_bytes_read_what_lies_around_them() {
    let variants = Variants { cascade_kb: 12, ..BYTES };
    let names = check_blocks(32, (1, 50, 80), variants);
    assert_eq!(names.iter().filter(|name| name.contains("_u8")).count(), 5, "{names:?}");
    assert!(names.iter().all(|name| !name.starts_with("copy")), "{names:?}");
}

/// Labels and logits of the bundled model for the example photo, at a small size.
fn photo(model: &Model, expanded: Expanded) -> (Vec<u8>, Vec<f32>) {
    let (w, h) = (96, 80);
    let photo = image::load_from_memory(bundled::PHOTO).unwrap();
    let photo = photo.resize_exact(w as u32, h as u32, FilterType::Triangle).to_rgb8();
    let variants = Variants { expanded, ..Variants::default() };
    let backend = Box::new(with_variants(Order::Forward, SHARED, Precision::F16, variants));
    let mut inference = Inference::new(model, backend, 1, h, w, Mode::Logits).unwrap();
    inference.run_rgb(photo.as_raw()).unwrap();
    let logits = inference.logits().unwrap();
    let mut labels = vec![0; w * h];
    argmax_nchw(&logits, Shape::new(1, model.classes.len(), h, w), h, w, &mut labels);
    (labels, logits)
}

/// benches/results has the same over CamVid: 99.8 % at 480x360. At a fifth of that size borders are a
/// larger part, hence 98 %; logits differ by the rounding of 8 bits, some 1e-2.
#[test]
fn a_trained_network_labels_a_photo_as_in_half_precision() {
    let model = bundled::model().unwrap();
    let (labels, logits) = photo(&model, Expanded::Stored);
    let (found, bytes) = photo(&model, Expanded::Bytes);
    let same = labels.iter().zip(&found).filter(|(a, b)| a == b).count();
    let share = same as f64 / labels.len() as f64;
    let error = distance(&bytes, &logits);
    assert!((0.98..1.0).contains(&share), "{share} of the labels agree, logits {error:e}");
    assert!((1e-4..5e-2).contains(&error), "logits: {error:e}");
}

#[test]
fn bytes_are_refused_where_nothing_can_be_kept_in_them() {
    let model = bundled::model().unwrap();
    let refused = |precision, variants| {
        let backend = Box::new(with_variants(Order::Forward, SHARED, precision, variants));
        match Inference::new(&model, backend, 1, 32, 32, Mode::Labels) {
            Err(Error::Usage(message)) => message,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("{variants} was taken in {precision:?}"),
        }
    };
    let bytes = Variants { expanded: Expanded::Bytes, ..Variants::default() };
    let message = refused(Precision::F32, bytes);
    assert!(message.contains("expected --precision f16"), "{message}");
    let message = refused(Precision::F16, Variants { pairs: Pairs::Separate, ..bytes });
    assert!(message.contains("pairs=fused"), "{message}");
    let message = emulated(Order::Forward, SHARED, Precision::F32).keep_expanded(Expanded::Bytes);
    assert!(message.unwrap_err().to_string().contains("expected --precision f16"));
}
