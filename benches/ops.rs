//! CPU operators at the shapes that FPENet gives them at 1024x512, batch 1.
//!
//! Each benchmark is a step of the real inference plan, run alone on input written just before
//! (untimed): the time per layer of a fused, planned network, not of a textbook operator.
//! Throughput is in multiply-accumulates per second for convolutions, else in bytes.

use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use fpenet::backend::cpu::CpuBackend;
use fpenet::exec::Inference;
use fpenet::graph::{Mode, Step};
use fpenet::{Model, ModelConfig};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const WIDTH: usize = 1024;
const HEIGHT: usize = 512;

/// One block of each kind: later blocks of a stage repeat the second one's shapes.
const REPEATED: [&str; 8] = [
    "stage2.2", "stage3.2", "stage3.3", "stage3.4", "stage3.5", "stage3.6", "stage3.7", "stage3.8",
];

fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn network(mode: Mode) -> Inference {
    let model = Model::init(ModelConfig::default(), 0).expect("the default network is valid");
    let cpu = CpuBackend::new(None).expect("threads start");
    Inference::new(&model, Box::new(cpu), 1, HEIGHT, WIDTH, mode).expect("the network fits")
}

fn throughput(step: &Step) -> Throughput {
    let inputs: Vec<_> = step.inputs.iter().map(|t| t.shape).collect();
    match step.op.cost(&inputs, step.output.shape).macs {
        0 => {
            let read: usize = inputs.iter().map(|shape| shape.len()).sum();
            Throughput::Bytes(4 * (read + step.output.shape.len()) as u64)
        }
        macs => Throughput::Elements(macs),
    }
}

fn operators(c: &mut Criterion) {
    let mut inference = network(Mode::Logits);
    inference.run(&values(3 * HEIGHT * WIDTH, 1)).expect("runs");
    let (plan, device) = inference.parts();
    for (index, step) in plan.steps.iter().enumerate() {
        if REPEATED.iter().any(|block| step.name.starts_with(&format!("{block}."))) {
            continue;
        }
        let mut group = c.benchmark_group(step.op.kind());
        group.throughput(throughput(step));
        group.warm_up_time(Duration::from_millis(200));
        group.measurement_time(Duration::from_secs(1));
        group.sample_size(10);
        let input = step.inputs[0];
        let fresh = values(input.shape.len(), 2);
        let device = std::cell::RefCell::new(&mut *device);
        group.bench_function(format!("{} -> {}", step.name, step.output.shape), |b| {
            // An operator that runs in place would else work on its own output over and over,
            // until the values are denormal or infinite.
            let write = || device.borrow_mut().write(&input, &fresh).expect("the input fits");
            let run = |()| device.borrow_mut().forward_step(plan, index).expect("runs");
            b.iter_batched(write, run, BatchSize::PerIteration);
        });
        group.finish();
    }
}

fn networks(c: &mut Criterion) {
    let input = values(3 * HEIGHT * WIDTH, 1);
    let mut group = c.benchmark_group("network");
    group.throughput(Throughput::Elements((WIDTH * HEIGHT) as u64));
    group.measurement_time(Duration::from_secs(4));
    group.sample_size(10);
    let mut logits = network(Mode::Logits);
    group.bench_function("logits", |b| b.iter(|| logits.run(&input).expect("runs")));
    drop(logits);
    let mut labelled = network(Mode::Labels);
    let mut labels = vec![0; WIDTH * HEIGHT];
    group.bench_function("labels", |b| {
        b.iter(|| {
            labelled.run(&input).expect("runs");
            labelled.labels(&mut labels).expect("reads labels");
        });
    });
    group.finish();
}

criterion_group!(benches, operators, networks);
criterion_main!(benches);
