//! Kernels at the shapes that FPENet gives them at 1024x512, batch 1: on the GPU where there is one,
//! in f32 and f16 and timed by its own events, else on the CPU.
//!
//! `step`: every step of the real inference plan, alone, on input written just before (untimed): the
//! time per layer of a fused, planned network, not of a textbook operator. `block` and `network`: the
//! fused kernels and rewrites beside the plain composition of the same work (on a GPU cuBLAS and a
//! kernel per operator, on the CPU the graph without rewrites), so that a fusion that does not pay
//! shows. Throughput is in FLOPs (two per multiply-accumulate; shown as elements) and in bytes (each
//! operand, result and parameter once).
//!
//! `cargo bench --bench ops -- step/cascade` runs a part.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;
use std::time::Duration;

use criterion::{Bencher, Criterion, Throughput, criterion_group, criterion_main};
use fpenet::backend::cpu::CpuBackend;
use fpenet::backend::gpu::choice::Choice;
use fpenet::backend::gpu::{Element, Variants, cost};
use fpenet::backend::{Backend, DeviceChoice, Precision, open};
use fpenet::exec::Inference;
use fpenet::graph::passes::Rewrites;
use fpenet::graph::{Mode, Plan, Step};
use fpenet::{Model, ModelConfig};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const WIDTH: usize = 1024;
const HEIGHT: usize = 512;

/// One block of each kind: later blocks of a stage repeat the second one's shapes.
const BLOCKS: [&str; 6] = ["stem", "stage1.0", "stage2.0", "stage2.1", "stage3.0", "stage3.1"];

/// Launches between two events: one alone would be as long as the way from the host to the GPU.
const REPEATS_GPU: u32 = 20;

fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// How the work is cut into kernels.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Composition {
    Fused,
    Plain,
}

impl Composition {
    const ALL: [Composition; 2] = [Composition::Fused, Composition::Plain];

    fn name(self) -> &'static str {
        match self {
            Composition::Fused => "fused",
            Composition::Plain => "plain",
        }
    }
}

/// The GPU where it works, else the CPU for f32; none for f16 without a GPU.
fn device(precision: Precision, composition: Composition) -> Option<Box<dyn Backend>> {
    let plain = composition == Composition::Plain;
    match (open(DeviceChoice::Cuda, precision, None), precision) {
        (Ok(mut gpu), _) => {
            if plain {
                gpu.choose(Choice { variants: Variants::PLAIN, graphs: true });
            }
            Some(gpu)
        }
        (Err(_), Precision::F32) => {
            let cpu = CpuBackend::new(None).expect("threads start");
            let cpu = if plain { cpu.with_rewrites(Rewrites::NONE) } else { cpu };
            Some(Box::new(cpu))
        }
        (Err(_), _) => None,
    }
}

/// A network that has run once, so that every tensor holds finite values.
fn network(precision: Precision, composition: Composition, mode: Mode) -> Option<Inference> {
    let model = Model::init(ModelConfig::default(), 0).expect("the default network is valid");
    let device = device(precision, composition)?;
    let mut inference =
        Inference::new(&model, device, 1, HEIGHT, WIDTH, mode).expect("the network fits");
    inference.run(&values(3 * HEIGHT * WIDTH, 1)).expect("runs");
    Some(inference)
}

/// Precisions that there is a device for, with their names.
fn precisions() -> impl Iterator<Item = (Precision, Element, &'static str)> {
    let gpu = open(DeviceChoice::Cuda, Precision::F32, None).is_ok();
    let all = [
        (Precision::F32, Element::F32, if gpu { "cuda f32" } else { "cpu f32" }),
        (Precision::F16, Element::F16, "cuda f16"),
    ];
    all.into_iter().filter(move |(precision, ..)| gpu || *precision == Precision::F32)
}

fn throughput(plan: &Plan, steps: &[Step], element: Element) -> Throughput {
    let flops = |step: &Step| match step.op.cost(step.output.shape).macs {
        // An operation per result, roughly.
        0 => step.output.shape.len() as u64,
        macs => 2 * macs,
    };
    Throughput::ElementsAndBytes {
        elements: steps.iter().map(flops).sum(),
        bytes: steps.iter().map(|step| cost::step_bytes(plan, step, element)).sum(),
    }
}

/// Times the steps of a range by the device's own clock. Their first input is written before each
/// pass: an operator that runs in place would else work on its own output over and over, until the
/// values are denormal or infinite.
fn time(
    bencher: &mut Bencher,
    (plan, device): (&Plan, &RefCell<&mut dyn Backend>),
    steps: &Range<usize>,
) {
    let input = plan.steps[steps.start].inputs[0];
    let fresh = values(input.shape.len(), 2);
    let mut device = device.borrow_mut();
    let repeats = if device.kind() == "cuda" { REPEATS_GPU } else { 1 };
    bencher.iter_custom(|iterations| {
        let mut sum = Duration::ZERO;
        for _ in 0..iterations {
            device.write(&input, &fresh).expect("the input fits");
            device.synchronize().expect("writes");
            let begun = device.mark().expect("marks");
            for _ in 0..repeats {
                let mut steps = steps.clone();
                steps.try_for_each(|step| device.forward_step(plan, step)).expect("runs");
            }
            let done = device.mark().expect("marks");
            sum += device.between(begun, done).expect("measures") / repeats;
        }
        // Criterion divides by it.
        sum.max(Duration::from_nanos(1))
    });
}

fn quick(group: &mut criterion::BenchmarkGroup<criterion::measurement::WallTime>) {
    group.warm_up_time(Duration::from_millis(200));
    group.measurement_time(Duration::from_secs(1));
    group.sample_size(10);
}

fn steps(c: &mut Criterion) {
    for (precision, element, name) in precisions() {
        let Some(mut inference) = network(precision, Composition::Fused, Mode::Logits) else {
            continue;
        };
        let (plan, device) = inference.parts();
        let device = RefCell::new(device);
        let mut seen = HashSet::new();
        for (index, step) in plan.steps.iter().enumerate() {
            let shapes: Vec<_> = step.inputs.iter().map(|tensor| tensor.shape).collect();
            // What runs with the step before it is measured there.
            if step.joined || !seen.insert((step.op.kind(), shapes, step.output.shape)) {
                continue;
            }
            let joined = plan.steps.get(index + 1).is_some_and(|next| next.joined);
            let range = index..index + 1 + usize::from(joined);
            let mut group = c.benchmark_group(format!("step/{}", step.op.kind()));
            quick(&mut group);
            group.throughput(throughput(plan, &plan.steps[range.clone()], element));
            let and = if joined { " with the next" } else { "" };
            let id = format!("{name} {}{and} -> {}", step.name, step.output.shape);
            group.bench_function(id, |b| time(b, (plan, &device), &range));
            group.finish();
        }
    }
}

/// The steps of a block, which follow one another; `decoder` is all that belongs to no stage.
fn block(plan: &Plan, name: &str) -> Range<usize> {
    let of_block = |step: &Step| match name {
        "decoder" => !step.name.starts_with("st"),
        _ => step.name.starts_with(&format!("{name}.")),
    };
    let first = plan.steps.iter().position(of_block).expect("the network has the block");
    let last = plan.steps.iter().rposition(of_block).unwrap_or(first);
    // A step that the one before the block has done as well is not run again.
    let first = first + usize::from(plan.steps[first].joined);
    let joined = plan.steps.get(last + 1).is_some_and(|next| next.joined);
    first..last + 1 + usize::from(joined)
}

/// In the fused network a block's expansion runs with the projection before it, and its projection
/// with the expansion after it: the same work in a stage's middle.
fn blocks(c: &mut Criterion) {
    for (precision, element, name) in precisions() {
        for composition in Composition::ALL {
            let Some(mut inference) = network(precision, composition, Mode::Logits) else {
                continue;
            };
            let (plan, device) = inference.parts();
            let device = RefCell::new(device);
            for which in BLOCKS.into_iter().chain(["decoder"]) {
                let range = block(plan, which);
                let mut group = c.benchmark_group(format!("block/{which}"));
                quick(&mut group);
                group.throughput(throughput(plan, &plan.steps[range.clone()], element));
                let id = format!("{name} {}", composition.name());
                group.bench_function(id, |b| time(b, (plan, &device), &range));
                group.finish();
            }
        }
    }
}

fn networks(c: &mut Criterion) {
    let input = values(3 * HEIGHT * WIDTH, 1);
    for (precision, element, name) in precisions() {
        for composition in Composition::ALL {
            for (mode, to) in [(Mode::Logits, "logits"), (Mode::Labels, "labels")] {
                let Some(mut inference) = network(precision, composition, mode) else { continue };
                let mut group = c.benchmark_group(format!("network/{to}"));
                group.measurement_time(Duration::from_secs(3));
                group.sample_size(10);
                let plan = inference.plan();
                group.throughput(throughput(plan, &plan.steps, element));
                let mut labels = vec![0; WIDTH * HEIGHT];
                group.bench_function(format!("{name} {}", composition.name()), |b| {
                    b.iter(|| {
                        inference.run(&input).expect("runs");
                        if mode == Mode::Labels {
                            inference.labels(&mut labels).expect("reads labels");
                        }
                    });
                });
                group.finish();
            }
        }
    }
}

criterion_group!(benches, steps, blocks, networks);
criterion_main!(benches);
