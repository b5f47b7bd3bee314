//! Loss scaling of training in half precision: what the device decides by itself.

use fpenet::ModelConfig;
use fpenet::backend::{AdamStep, Counters, LossScaling, Precision};
use fpenet::exec::Training;
use fpenet::graph::{Graph, ParamStore};

use super::Order;
use super::harness::{Random, SHARED, emulated};

const SIDE: usize = 16;

struct Run {
    training: Training,
    input: Vec<f32>,
    labels: Vec<u8>,
}

fn run(scaling: LossScaling) -> Run {
    run_in(Precision::F16, scaling)
}

/// A network of one block per stage, a batch of noise.
fn run_in(precision: Precision, scaling: LossScaling) -> Run {
    let config = ModelConfig { classes: 3, p: 1, q: 1, branches: 1, ..ModelConfig::default() };
    let params = ParamStore::init(&Graph::fpenet(&config).unwrap().params, 5);
    let backend = Box::new(emulated(Order::Forward, SHARED, precision));
    let mut training = Training::new(&config, &params, backend, 1, SIDE, SIDE).unwrap();
    training.set_counters(Counters { scaling, ..Counters::default() }).unwrap();
    let mut random = Random(11);
    let input = random.values(3 * SIDE * SIDE);
    let labels = (0..SIDE * SIDE).map(|_| (random.next() % 3) as u8).collect();
    Run { training, input, labels }
}

impl Run {
    fn step(&mut self, step: u64) -> Counters {
        self.training.step(&self.input, &self.labels, AdamStep::paper(1e-3, step)).unwrap();
        self.training.counters().unwrap()
    }

    /// Trainable parameters and moments, bit for bit; the running statistics change in any case.
    fn state(&mut self) -> Vec<u32> {
        let trainable = self.training.plan().trainable_len;
        let params = self.training.params().unwrap().values[..trainable].to_vec();
        let (first, second) = self.training.moments().unwrap();
        [params, first, second].concat().iter().map(|v| v.to_bits()).collect()
    }
}

fn scale(scale: f32) -> LossScaling {
    LossScaling { scale, ..LossScaling::default() }
}

#[test]
fn a_gradient_that_overflows_leaves_the_update_out_and_halves_the_scale() {
    // The gradient of a logit is about 1 / 256: times 2^26 it is beyond 65504.
    let mut run = run(scale(67_108_864.0));
    let before = run.state();
    let counters = run.step(1);
    assert_eq!(counters.scaling, LossScaling { scale: 33_554_432.0, good_steps: 0, skipped: 1 });
    assert!(counters.loss.is_finite());
    assert!(run.state() == before);
}

#[test]
fn an_update_that_was_left_out_does_not_count_in_the_bias_correction() {
    let mut skipping = run(scale(67_108_864.0));
    skipping.step(1);
    let scaling = LossScaling { scale: 1024.0, good_steps: 0, skipped: 1 };
    skipping.training.set_counters(Counters { scaling, ..Counters::default() }).unwrap();
    let counters = skipping.step(2);
    assert_eq!(counters.scaling, LossScaling { good_steps: 1, ..scaling });
    let mut direct = run(scale(1024.0));
    let before = direct.state();
    direct.step(1);
    assert!(direct.state() == skipping.state());
    assert!(direct.state() != before);
}

#[test]
fn the_scale_doubles_after_two_thousand_good_updates() {
    let mut run = run(LossScaling { scale: 512.0, good_steps: 1998, skipped: 0 });
    assert_eq!(run.step(1).scaling, LossScaling { scale: 512.0, good_steps: 1999, skipped: 0 });
    assert_eq!(run.step(2).scaling, LossScaling { scale: 1024.0, good_steps: 0, skipped: 0 });
}

#[test]
fn losses_add_up_on_the_device_in_the_order_of_the_steps() {
    let mut run = run(LossScaling::default());
    let start = Counters { loss_sum: 0.1, ..Counters::default() };
    run.training.set_counters(start).unwrap();
    let mut sum = 0.1;
    for step in 1..=3 {
        sum += f64::from(run.step(step).loss);
    }
    assert_eq!(run.training.counters().unwrap().loss_sum.to_bits(), sum.to_bits());
}

#[test]
fn half_precision_learns_as_single_precision_does() {
    let losses = |precision| -> Vec<f32> {
        let mut run = run_in(precision, scale(1024.0));
        (1..=6).map(|step| run.step(step).loss).collect()
    };
    let (single, half) = (losses(Precision::F32), losses(Precision::F16));
    assert!(single[5] < 0.9 * single[0], "{single:?}");
    for (a, b) in single.iter().zip(&half) {
        assert!((a - b).abs() < 0.02 * a, "{single:?} {half:?}");
    }
}
