//! One operator as a plan of its own, run on a backend with fences between its tensors.

use fpenet::backend::cpu::CpuBackend;
use fpenet::backend::gpu::emulated::{Emulated, Order};
use fpenet::backend::gpu::{GpuBackend, Variants};
use fpenet::backend::{Backend, Counters, LossScaling, Precision, State};
use fpenet::graph::{GradSlot, Mode, ParamId, ParamRole, ParamSpec, Plan, Shape, Step, Tensor};
use fpenet::ops::{Conv3x3, Op};
use half::f16;

/// Shared memory of a TITAN V's block.
pub const SHARED: usize = 96 * 1024;
/// Elements between two tensors, which nothing may write.
const FENCE: usize = 48;
const FENCE_VALUE: f32 = 1234.5;

/// Random numbers by splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }
}

/// Parameters of an operator under test, in the order of their ids.
#[derive(Default)]
pub struct Params(Vec<ParamSpec>);

impl Params {
    pub fn add(&mut self, shape: &[usize], role: ParamRole) -> ParamId {
        let offset = self.0.last().map_or(0, |p| (p.offset + p.len()).next_multiple_of(16));
        let name = format!("p{}", self.0.len());
        self.0.push(ParamSpec { name, shape: shape.to_vec(), role, offset });
        ParamId(self.0.len() - 1)
    }

    /// The table.
    pub fn specs(&self) -> Vec<ParamSpec> {
        self.0.clone()
    }
}

/// An operator with the shapes of its operands.
pub struct Case {
    pub op: Op,
    pub inputs: Vec<Shape>,
    pub params: Params,
    /// Forward and backward with a loss on the output, or inference alone.
    pub training: bool,
    /// Whether gradients of operands are added to what is there.
    pub accumulate: bool,
    /// Whether the output is written over the first input.
    pub in_place: bool,
}

impl Case {
    pub fn inference(op: Op, inputs: &[Shape], params: Params) -> Case {
        let inputs = inputs.to_vec();
        Case { op, inputs, params, training: false, accumulate: false, in_place: false }
    }

    pub fn training(op: Op, inputs: &[Shape], params: Params) -> Case {
        Case { training: true, ..Case::inference(op, inputs, params) }
    }

    pub fn what(&self) -> String {
        let (train, add) = (self.training, self.accumulate);
        format!("{:?} on {:?}, training {train}, accumulate {add}", self.op, self.inputs)
    }
}

/// Tensors one after another, with fences.
struct Layout {
    next: usize,
    fences: Vec<Tensor>,
}

impl Layout {
    fn place(&mut self, shape: Shape) -> Tensor {
        let tensor = |offset: usize, shape: Shape| Tensor {
            offset,
            shape,
            plane_stride: shape.plane(),
            batch_stride: shape.c * shape.plane(),
        };
        let placed = tensor(self.next, shape);
        let fence = tensor(self.next + shape.len(), Shape::new(1, 1, 1, FENCE));
        self.fences.push(fence);
        self.next = (fence.offset + FENCE).next_multiple_of(16);
        placed
    }
}

/// What a backend made of a case: named arrays.
pub type Results = Vec<(String, Vec<f32>)>;

/// Loss scale of the tests in half precision: gradients of 1 and of 1e-5 both fit.
const SCALE: f32 = 256.0;

/// Runs a case: random operands, parameters and labels by `seed`. For half precision the operands are
/// rounded on either device; where it stores gradients, they are there times `scale`.
fn run(
    case: &Case,
    backend: &mut dyn Backend,
    seed: u64,
    (precision, scale): (Precision, f32),
) -> Results {
    let rounded = |values: Vec<f32>| match precision {
        Precision::F32 => values,
        Precision::F16 => values.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
    };
    let mut layout = Layout { next: 0, fences: Vec::new() };
    let start = layout.place(Shape::new(1, 1, 1, 1));
    let inputs: Vec<Tensor> = case.inputs.iter().map(|&s| layout.place(s)).collect();
    let shape = case.op.shape(&case.inputs).unwrap();
    let output = if case.in_place { inputs[0] } else { layout.place(shape) };
    let saved: Vec<Tensor> = match case.training {
        true => case.op.saved(&case.inputs, shape).iter().map(|&s| layout.place(s)).collect(),
        false => Vec::new(),
    };
    let grad_output = case.training.then(|| layout.place(shape));
    let wanted = |i: usize| {
        case.training && case.op.reads(i) && !matches!(case.op, Op::Conv3x3(Conv3x3 { .. }))
    };
    let grad_inputs: Vec<Option<GradSlot>> = case
        .inputs
        .iter()
        .enumerate()
        .map(|(i, &s)| {
            let accumulate = case.accumulate;
            wanted(i).then(|| GradSlot { tensor: layout.place(s), accumulate })
        })
        .collect();
    let params = case.params.0.clone();
    let end = |p: &ParamSpec| (p.offset + p.len()).next_multiple_of(16);
    let param_len = params.iter().map(end).max().unwrap_or(16);
    let plan = Plan {
        mode: if case.training { Mode::Training } else { Mode::Logits },
        steps: vec![Step {
            name: "test".into(),
            op: case.op.clone(),
            inputs: inputs.clone(),
            output,
            saved,
            grad_output,
            joined: false,
            byte_scale: None,
            grad_inputs: grad_inputs.clone(),
        }],
        // Lends its size to the labels only.
        input: Tensor { shape: shape.with_channels(1), ..start },
        logits: output,
        grad_logits: grad_output,
        named: Vec::new(),
        params: params.clone(),
        param_len,
        trainable_len: param_len,
        arena_len: layout.next,
    };

    let mut random = Random(seed);
    backend.prepare(&plan).unwrap();
    for fence in &layout.fences {
        backend.write(fence, &[FENCE_VALUE; FENCE]).unwrap();
    }
    for tensor in &inputs {
        backend.write(tensor, &rounded(random.values(tensor.shape.len()))).unwrap();
    }
    for slot in grad_inputs.iter().flatten().filter(|slot| slot.accumulate) {
        // As small as gradients of a mean are, so that both show in the sum.
        let small = 1.0 / shape.plane() as f32;
        let values = random.values(slot.tensor.shape.len());
        let values = rounded(values.iter().map(|v| v * small).collect());
        let values: Vec<f32> = values.iter().map(|v| v * scale).collect();
        backend.write(&slot.tensor, &values).unwrap();
    }
    backend.write_state(State::Params, &random.values(param_len)).unwrap();
    backend.forward(&plan).unwrap();
    let mut results: Results = Vec::new();
    let mut read = |backend: &mut dyn Backend, name: String, tensor: &Tensor, scale: f32| {
        let mut values = vec![0.0; tensor.shape.len()];
        backend.read(tensor, &mut values).unwrap();
        values.iter_mut().for_each(|v| *v /= scale);
        results.push((name, values));
    };
    read(backend, "output".into(), &output, 1.0);
    if case.training {
        let labels: Vec<u8> = (0..shape.n * shape.plane())
            .map(|_| random.next() as u8 % (shape.c.min(200) as u8 + 1))
            .map(|l| if usize::from(l) == shape.c { 255 } else { l })
            .collect();
        backend.write_labels(&labels).unwrap();
        let scaling = LossScaling { scale, ..LossScaling::default() };
        backend.write_counters(Counters { scaling, ..Counters::default() }).unwrap();
        backend.backward(&plan).unwrap();
        for (i, slot) in grad_inputs.iter().enumerate() {
            if let Some(slot) = slot {
                read(backend, format!("gradient of operand {i}"), &slot.tensor, scale);
            }
        }
        let loss = backend.loss().unwrap();
        for state in [State::Params, State::Grads] {
            let mut values = vec![0.0; param_len];
            backend.read_state(state, &mut values).unwrap();
            for spec in &params {
                let name = format!("{state:?} {}", spec.name);
                results.push((name, values[spec.range()].to_vec()));
            }
        }
        results.push(("loss".into(), vec![loss]));
    }
    for fence in &layout.fences {
        let mut values = [0.0; FENCE];
        backend.read(fence, &mut values).unwrap();
        // 1234.5 is 1234 or 1235 in half precision.
        let intact = values.iter().all(|v| (v - FENCE_VALUE).abs() < 1.0);
        assert!(intact, "{}: wrote between tensors", case.what());
    }
    results
}

pub fn emulated(order: Order, shared: usize, precision: Precision) -> GpuBackend<Emulated> {
    with_variants(order, shared, precision, Variants::default())
}

pub fn with_variants(
    order: Order,
    shared: usize,
    precision: Precision,
    variants: Variants,
) -> GpuBackend<Emulated> {
    GpuBackend::new(Emulated::new(order, shared), precision).with_variants(variants)
}

/// Norm of the difference over norm of the reference; absolute below 1e-7, where a gradient is
/// nothing but rounding.
pub fn distance(found: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(found.len(), reference.len());
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&a, &b) in found.iter().zip(reference) {
        difference += (f64::from(a) - f64::from(b)).powi(2);
        norm += f64::from(b).powi(2);
    }
    if norm.sqrt() < 1e-6 { difference.sqrt() } else { (difference / norm).sqrt() }
}

/// The emulated device against the CPU, and its three thread orders against each other bit by bit.
pub fn check(case: &Case, shared: usize) {
    check_variants(case, shared, Variants::default());
}

/// [`check`] with a choice of kernels.
pub fn check_variants(case: &Case, shared: usize, variants: Variants) {
    let seed = 7;
    let emulated = |order| with_variants(order, shared, Precision::F32, variants);
    let mut cpu = CpuBackend::new(Some(1)).unwrap();
    let plain = (Precision::F32, 1.0);
    let reference = run(case, &mut cpu, seed, plain);
    let found = run(case, &mut emulated(Order::Forward), seed, plain);
    for ((name, a), (_, b)) in found.iter().zip(&reference) {
        // The tolerances of the reference folders: 1e-5 for outputs, 1e-4 for gradients.
        let tolerance = if name == "output" || name == "loss" { 1e-5 } else { 1e-4 };
        let error = distance(a, b);
        assert!(error <= tolerance, "{}: {name}: relative L2 {error:e}", case.what());
    }
    for order in [Order::Reverse, Order::Shuffled(seed)] {
        let other = run(case, &mut emulated(order), seed, plain);
        for ((name, a), (_, b)) in other.iter().zip(&found) {
            let same = a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{}: {name} depends on the order of threads: {order:?}", case.what());
        }
    }
}

/// Half-precision storage against the CPU in f32, on the same rounded operands: 1e-2, the project's
/// tolerance. What is stored in between is rounded by up to 5e-4, weights too.
pub fn check_half(case: &Case, shared: usize) {
    check_half_variants(case, shared, Variants::default());
}

/// [`check_half`] with a choice of kernels.
pub fn check_half_variants(case: &Case, shared: usize, variants: Variants) {
    let (error, name) = half_error(case, shared, variants);
    assert!(error <= 1e-2, "{}: {name} in half precision: {error:e}", case.what());
}

/// The largest error of a case in half precision, and of what; NaN fails at once.
pub fn half_error(case: &Case, shared: usize, variants: Variants) -> (f64, String) {
    let emulated = |order| with_variants(order, shared, Precision::F16, variants);
    let mut cpu = CpuBackend::new(Some(1)).unwrap();
    let reference = run(case, &mut cpu, 7, (Precision::F16, 1.0));
    let stored = (Precision::F16, if case.training { SCALE } else { 1.0 });
    let found = run(case, &mut emulated(Order::Forward), 7, stored);
    let mut worst = (0.0, String::new());
    for ((name, a), (_, b)) in found.iter().zip(&reference) {
        let error = distance(a, b);
        assert!(error.is_finite(), "{}: {name} in half precision: {error}", case.what());
        if error > worst.0 {
            worst = (error, name.clone());
        }
    }
    let other = run(case, &mut emulated(Order::Shuffled(7)), 7, stored);
    assert!(other == found, "{}: depends on the order of threads", case.what());
    worst
}
