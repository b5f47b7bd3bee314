//! Every operator of a device, forward and backward, against the CPU backend on random inputs.
//!
//! Small networks that between them use every operator and switch are run step by step: both
//! devices get the same operands for each step, so that an error is charged to the operator that
//! made it. Backward passes are compared by the gradient of every parameter.

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use half::f16;
use image::imageops::FilterType;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::backend::cpu::CpuBackend;
use crate::backend::gpu::variants::Expanded;
use crate::backend::{AdamStep, Backend, Counters, LossScaling, Precision, State};
use crate::bundled;
use crate::config::{Attention, BlockActivation, Decoder, ModelConfig};
use crate::error::{Error, Result};
use crate::exec::Inference;
use crate::graph::{Graph, Mode, ParamRole, ParamSpec, ParamStore, Plan, Tensor, passes};
use crate::reference::compare::{Comparison, TENSOR_OVER_WHOLE, Tolerances};

/// Worst result of one operator in one direction over all cases.
#[derive(Debug, Clone)]
pub struct Row {
    /// Operator and pass, for example "cascade forward".
    pub name: String,
    /// Number of comparisons.
    pub cases: usize,
    /// The worst of them.
    pub worst: Comparison,
    /// Where the worst arose: node or parameter, and case.
    pub place: String,
    /// Largest [`Comparison::error`] that passes.
    pub tolerance: f64,
}

impl Row {
    /// Whether the worst error is within the tolerance; NaN never is.
    pub fn passed(&self) -> bool {
        self.worst.error <= self.tolerance
    }
}

/// The outcome of [`run`].
#[derive(Debug, Clone)]
pub struct Report {
    /// The device in words.
    pub device: String,
    /// Seed of the random inputs.
    pub seed: u64,
    /// One row per operator and pass, in the order in which they first ran.
    pub rows: Vec<Row>,
}

impl Report {
    /// Number of rows out of tolerance.
    pub fn misses(&self) -> usize {
        self.rows.iter().filter(|row| !row.passed()).count()
    }

    /// Whether every row is within its tolerance.
    pub fn passed(&self) -> bool {
        self.misses() == 0
    }
}

/// A seed that differs from run to run.
pub fn fresh_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u64 % 1_000_000_000
}

/// Compares a device with the CPU. `open` gives a fresh backend for `precision`, as often as
/// asked.
///
/// # Errors
/// [`Error::Usage`] where `open` gives the CPU itself, or what the device says. A miss is no
/// error: see [`Report::passed`].
pub fn run(
    precision: Precision,
    seed: u64,
    open: &dyn Fn() -> Result<Box<dyn Backend>>,
) -> Result<Report> {
    let device = open()?;
    if device.kind() == "cpu" {
        return Err(Error::Usage(
            "--device: expected cuda or emulated, which are compared with the CPU; found cpu"
                .into(),
        ));
    }
    compare(precision, seed, device.describe(), open)
}

fn compare(
    precision: Precision,
    seed: u64,
    device: String,
    open: &dyn Fn() -> Result<Box<dyn Backend>>,
) -> Result<Report> {
    let mut test = Test { precision, open, rows: Vec::new() };
    for (i, case) in cases().iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(i as u64));
        test.inference(case, &mut rng)?;
        test.labels(case, &mut rng)?;
        test.training(case, &mut rng)?;
    }
    if precision == Precision::F16 {
        test.expanded_bytes()?;
    }
    Ok(Report { device, seed, rows: test.rows })
}

/// A network and an input shape.
struct Case {
    name: &'static str,
    config: ModelConfig,
    n: usize,
    h: usize,
    w: usize,
}

/// Between them: all numbers of branches, odd, tiny and larger planes, every decoder, attention
/// and block switch, dilations beyond the plane.
fn cases() -> Vec<Case> {
    let small = ModelConfig { classes: 5, p: 2, q: 2, ..ModelConfig::default() };
    let case = |name, config, n, h, w| Case { name, config, n, h, w };
    vec![
        case("four branches, batch 3 of 37x29", small.clone(), 3, 29, 37),
        case(
            "one branch, sigmoid, batch 2 of 16x16",
            ModelConfig { branches: 1, attention: Attention::Sigmoid, ..small.clone() },
            2,
            16,
            16,
        ),
        case(
            "two branches, dilations 3 and 16, ca decoder, 50x24",
            ModelConfig {
                branches: 2,
                dilations: vec![3, 16],
                decoder: Decoder::Ca,
                ..small.clone()
            },
            1,
            24,
            50,
        ),
        case(
            "no branch addition, no long skip, relu blocks, bilinear decoder, 33x64",
            ModelConfig {
                branch_addition: false,
                long_skip: false,
                block_activation: BlockActivation::Relu,
                decoder: Decoder::Bilinear,
                ..small
            },
            2,
            64,
            33,
        ),
        // Planes of stage 2 in rows of 32, which every kernel of the cascade takes.
        case(
            "19 classes, 128x80",
            ModelConfig { p: 2, q: 1, ..ModelConfig::default() },
            1,
            80,
            128,
        ),
    ]
}

/// Width and height of the photo that is labelled.
const PHOTO_SIZE: (usize, usize) = (96, 80);
/// Share of its labels that 8-bit storage may change (benches/results: 0.2 % over CamVid at 480x360;
/// at a fifth of that size borders are a larger part).
const EXPANDED_BYTES: f64 = 0.02;

struct Test<'a> {
    precision: Precision,
    open: &'a dyn Fn() -> Result<Box<dyn Backend>>,
    rows: Vec<Row>,
}

/// A backend with a plan in its own layout.
struct Side {
    backend: Box<dyn Backend>,
    plan: Plan,
}

impl Side {
    fn new(
        mut backend: Box<dyn Backend>,
        graph: &Graph,
        params: &ParamStore,
        case: &Case,
        mode: Mode,
    ) -> Result<Side> {
        let mut plan = Plan::new(graph, (case.n, case.h, case.w), mode, backend.layout())?;
        if mode == Mode::Logits {
            // Steps are compared one by one: what is made over its own input has to be there, too.
            let in_place = plan.steps.iter().filter(|step| step.inputs[0] == step.output);
            plan.named.extend(in_place.map(|step| (step.name.clone(), step.output)));
        }
        backend.prepare(&plan)?;
        backend.write_state(State::Params, &params.values)?;
        Ok(Side { backend, plan })
    }

    fn read(&mut self, tensor: &Tensor) -> Result<Vec<f32>> {
        let mut values = vec![0.0; tensor.shape.len()];
        self.backend.read(tensor, &mut values)?;
        Ok(values)
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        let tensor = self.plan.logits;
        self.read(&tensor)
    }

    fn state(&mut self, state: State) -> Result<Vec<f32>> {
        let len = match state {
            State::Params => self.plan.param_len,
            _ => self.plan.trainable_len,
        };
        let mut values = vec![0.0; len];
        self.backend.read_state(state, &mut values)?;
        Ok(values)
    }

    fn forward(&mut self, input: &[f32]) -> Result<()> {
        self.backend.write(&self.plan.input, input)?;
        self.backend.forward(&self.plan)
    }
}

impl Test<'_> {
    /// CPU and device with the same parameters.
    fn sides(
        &self,
        graph: &Graph,
        params: &ParamStore,
        case: &Case,
        mode: Mode,
    ) -> Result<(Side, Side)> {
        let cpu = Side::new(Box::new(CpuBackend::new(None)?), graph, params, case, mode)?;
        Ok((cpu, Side::new((self.open)()?, graph, params, case, mode)?))
    }

    fn tolerances(&self) -> Tolerances {
        Tolerances::of(self.precision)
    }

    /// What is stored in the device's precision is rounded for both sides.
    fn rounded(&self, mut values: Vec<f32>) -> Vec<f32> {
        if self.precision == Precision::F16 {
            values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32());
        }
        values
    }

    fn note(&mut self, name: String, worst: Comparison, place: String, tolerance: f64) {
        let Some(row) = self.rows.iter_mut().find(|row| row.name == name) else {
            self.rows.push(Row { name, cases: 1, worst, place, tolerance });
            return;
        };
        row.cases += 1;
        // NaN is worse than anything.
        if worst.error > row.worst.error || worst.error.is_nan() {
            (row.worst, row.place) = (worst, place);
        }
    }

    /// Every launch by itself: what its steps read is the CPU's, what its first and its last step leave is
    /// compared. What lies between need not exist.
    fn steps(&mut self, cpu: &mut Side, gpu: &mut Side, case: &Case, pass: &str) -> Result<()> {
        let count = cpu.plan.steps.len();
        let mut first = 0;
        while first < count {
            let within = (first + 1..count).take_while(|&i| gpu.backend.within_another(i)).count();
            let group = first..first + 1 + within;
            let steps = cpu.plan.steps[group.clone()].to_vec();
            let twins = gpu.plan.steps[group.clone()].to_vec();
            for (at, (step, twin)) in steps.iter().zip(&twins).enumerate() {
                for (i, (tensor, other)) in step.inputs.iter().zip(&twin.inputs).enumerate() {
                    let made = steps[..at].iter().any(|before| before.output == *tensor);
                    if step.op.reads(i) && !made {
                        let values = self.rounded(cpu.read(tensor)?);
                        cpu.backend.write(tensor, &values)?;
                        gpu.backend.write(other, &values)?;
                    }
                }
            }
            gpu.backend.forward_step(&gpu.plan, first)?;
            for (index, (step, twin)) in group.zip(steps.iter().zip(&twins)) {
                cpu.backend.forward_step(&cpu.plan, index)?;
                let at = index - first;
                let left = |tensor: &Tensor| {
                    let end = |tensor: &Tensor| tensor.offset + tensor.extent();
                    let apart =
                        |other: &Tensor| end(other) <= tensor.offset || end(tensor) <= other.offset;
                    twins[at + 1..].iter().all(|later| apart(&later.output))
                };
                if at == within || (at == 0 && left(&twin.output)) {
                    let comparison =
                        Comparison::relative_l2(&gpu.read(&twin.output)?, &cpu.read(&step.output)?);
                    let place = format!("{}; {}", step.name, case.name);
                    let tolerance = self.tolerances().inference;
                    self.note(format!("{} {pass}", step.op.kind()), comparison, place, tolerance);
                }
            }
            first += 1 + within;
        }
        Ok(())
    }

    /// Every step of the folded network, then the whole of it, three times over: a device that
    /// records its commands must replay them to the same bits.
    fn inference(&mut self, case: &Case, rng: &mut ChaCha8Rng) -> Result<()> {
        let graph = Graph::fpenet(&case.config)?;
        let params = random_params(&graph.params, self.precision, rng);
        let (graph, params) = passes::for_inference(&graph, &params);
        let (mut cpu, mut gpu) = self.sides(&graph, &params, case, Mode::Logits)?;
        let input = self.rounded(normal(rng, case.n * 3 * case.h * case.w));
        cpu.backend.write(&cpu.plan.input, &input)?;
        self.steps(&mut cpu, &mut gpu, case, "forward")?;

        cpu.forward(&input)?;
        let expected = cpu.logits()?;
        let mut first: Option<Vec<f32>> = None;
        for _ in 0..3 {
            gpu.forward(&input)?;
            let found = gpu.logits()?;
            if let Some(first) = &first {
                let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                let differ = if bits(first) == bits(&found) { 0.0 } else { f64::INFINITY };
                let comparison = Comparison { max_abs: differ, error: differ, absolute: true };
                self.note("forward, repeated".into(), comparison, case.name.into(), 0.0);
            } else {
                let comparison = Comparison::relative_l2(&found, &expected);
                let tolerance = self.tolerances().inference;
                self.note("network forward".into(), comparison, case.name.into(), tolerance);
                first = Some(found);
            }
        }
        Ok(())
    }

    /// Resize and argmax on the same random scores.
    fn labels(&mut self, case: &Case, rng: &mut ChaCha8Rng) -> Result<()> {
        let graph = Graph::fpenet(&case.config)?;
        let (graph, params) =
            passes::for_inference(&graph, &random_params(&graph.params, self.precision, rng));
        let (mut cpu, mut gpu) = self.sides(&graph, &params, case, Mode::Labels)?;
        let scores = self.rounded(normal(rng, cpu.plan.logits.shape.len()));
        let pixels = case.n * case.h * case.w;
        let mut labels = [vec![0u8; pixels], vec![0u8; pixels]];
        for (side, labels) in [&mut cpu, &mut gpu].into_iter().zip(&mut labels) {
            side.backend.write(&side.plan.logits, &scores)?;
            side.backend.read_labels(&side.plan, labels)?;
        }
        let tolerance = self.tolerances().labels;
        self.note("argmax".into(), share_of_other_labels(&labels), case.name.into(), tolerance);
        Ok(())
    }

    /// The bundled model's labels of the example photo, expanded tensors in halves and in 8 bits. A
    /// device or kernels without 8-bit storage, and a build without the model, have nothing to compare.
    fn expanded_bytes(&mut self) -> Result<()> {
        let (w, h) = PHOTO_SIZE;
        let (Ok(model), Ok(photo)) = (
            bundled::model(),
            image::load_from_memory(bundled::PHOTO).map(|photo| {
                photo.resize_exact(w as u32, h as u32, FilterType::Triangle).to_rgb8()
            }),
        ) else {
            return Ok(());
        };
        let mut labels = [vec![0u8; w * h], vec![0u8; w * h]];
        for (expanded, labels) in [Expanded::Stored, Expanded::Bytes].into_iter().zip(&mut labels) {
            let mut backend = (self.open)()?;
            if backend.keep_expanded(expanded).is_err() {
                return Ok(());
            }
            let mut inference = match Inference::new(&model, backend, 1, h, w, Mode::Labels) {
                // Kernels that FPENET_VARIANTS asks for may not have it either.
                Err(Error::Usage(_)) if expanded == Expanded::Bytes => return Ok(()),
                inference => inference?,
            };
            inference.run_rgb(photo.as_raw())?;
            inference.labels(labels)?;
        }
        let place = format!("{} {w}x{h}", bundled::PHOTO_NAME);
        let comparison = share_of_other_labels(&labels);
        self.note("labels, expanded in 8 bits".into(), comparison, place, EXPANDED_BYTES);
        Ok(())
    }

    /// Forward with batch statistics step by step, loss, every gradient, two Adam updates.
    fn training(&mut self, case: &Case, rng: &mut ChaCha8Rng) -> Result<()> {
        let graph = passes::for_training(&Graph::fpenet(&case.config)?);
        let params = random_params(&graph.params, self.precision, rng);
        let (mut cpu, mut gpu) = self.sides(&graph, &params, case, Mode::Training)?;
        let input = self.rounded(normal(rng, case.n * 3 * case.h * case.w));
        cpu.backend.write(&cpu.plan.input, &input)?;
        self.steps(&mut cpu, &mut gpu, case, "training forward")?;
        self.backward(&mut cpu, &mut gpu, case, rng)?;
        self.gradients(&mut cpu, &mut gpu, case)?;
        self.updates(&mut cpu, &mut gpu, case)
    }

    /// Loss and backward pass of random labels, and what the forward pass left in the running
    /// statistics.
    fn backward(
        &mut self,
        cpu: &mut Side,
        gpu: &mut Side,
        case: &Case,
        rng: &mut ChaCha8Rng,
    ) -> Result<()> {
        let classes = case.config.classes as u8;
        let label = |rng: &mut ChaCha8Rng| match rng.random_range(0..=classes) {
            void if void == classes => 255,
            label => label,
        };
        let labels: Vec<u8> = (0..case.n * case.h * case.w).map(|_| label(rng)).collect();
        // 2^16 would be too much for gradients of so few pixels.
        let scaling = LossScaling { scale: 256.0, ..LossScaling::default() };
        // Half of the cases with weights of the classes, one of them zero.
        let weights: Vec<f32> = match rng.random_range(0..2) {
            0 => Vec::new(),
            _ => (0..classes).map(|class| 0.5 * f32::from(class)).collect(),
        };
        for side in [&mut *cpu, &mut *gpu] {
            side.backend.write_class_weights(&weights)?;
            side.backend.write_counters(Counters { scaling, ..Counters::default() })?;
            side.backend.write_labels(&labels)?;
            side.backend.backward(&side.plan)?;
        }
        let Tolerances { loss, training: tolerance, .. } = self.tolerances();
        let (expected, found) = (cpu.backend.loss()?, gpu.backend.loss()?);
        let comparison = Comparison::relative_l2(&[found], &[expected]);
        self.note("cross_entropy".into(), comparison, case.name.into(), loss);

        let expected = cpu.state(State::Params)?;
        let found = gpu.state(State::Params)?;
        let running = cpu.plan.trainable_len..;
        let comparison = Comparison::relative_l2(&found[running.clone()], &expected[running]);
        self.note("running statistics".into(), comparison, case.name.into(), tolerance);
        Ok(())
    }

    /// The gradient of the whole network, and of every parameter.
    fn gradients(&mut self, cpu: &mut Side, gpu: &mut Side, case: &Case) -> Result<()> {
        let tolerance = self.tolerances().training;
        let expected = cpu.state(State::Grads)?;
        let found = gpu.state(State::Grads)?;
        let whole = Comparison::relative_l2(&found, &expected);
        self.note("network backward".into(), whole, case.name.into(), tolerance);
        for step in &cpu.plan.steps {
            let specs = step.op.params().into_iter().map(|id| &cpu.plan.params[id.0]);
            for spec in specs.filter(|spec| spec.role.trainable()) {
                let range = spec.range();
                let (comparison, tolerance) = match self.precision {
                    Precision::F32 => {
                        let found = &found[range.clone()];
                        (Comparison::relative_l2(found, &expected[range]), tolerance)
                    }
                    Precision::F16 => {
                        (half_gradient(&found, &expected, range), TENSOR_OVER_WHOLE * tolerance)
                    }
                };
                let place = format!("{}; {}", spec.name, case.name);
                self.note(format!("{} backward", step.op.kind()), comparison, place, tolerance);
            }
        }
        Ok(())
    }

    /// Two Adam updates from the same gradients.
    fn updates(&mut self, cpu: &mut Side, gpu: &mut Side, case: &Case) -> Result<()> {
        let tolerance = self.tolerances().training;
        gpu.backend.write_state(State::Grads, &cpu.state(State::Grads)?)?;
        for step in 1..=2 {
            for side in [&mut *cpu, &mut *gpu] {
                side.backend.adam(&side.plan, AdamStep::paper(5e-4, step))?;
            }
        }
        for state in [State::Params, State::Moment1, State::Moment2] {
            let comparison = Comparison::relative_l2(&gpu.state(state)?, &cpu.state(state)?);
            self.note("adam".into(), comparison, format!("{state:?}; {}", case.name), tolerance);
        }
        Ok(())
    }
}

/// Share of pixels that two devices label differently.
fn share_of_other_labels(labels: &[Vec<u8>; 2]) -> Comparison {
    let differ = labels[0].iter().zip(&labels[1]).filter(|(a, b)| a != b).count();
    let share = differ as f64 / labels[0].len() as f64;
    Comparison { max_abs: share, error: share, absolute: true }
}

/// One parameter's gradient in half precision, relative to its own norm, or to a thousandth of the whole
/// gradient's where it is smaller: what is nothing but cancellation leaves rounding alone.
fn half_gradient(found: &[f32], expected: &[f32], range: Range<usize>) -> Comparison {
    let norm = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let comparison = Comparison::relative_l2(&found[range.clone()], &expected[range.clone()]);
    let (own, least) = (norm(&expected[range]), 1e-3 * norm(expected));
    if comparison.absolute || own >= least {
        return comparison;
    }
    Comparison { error: comparison.error * own / least, ..comparison }
}

/// Least magnitude of a depthwise centre tap in half precision, about half a standard deviation. With
/// dilations as large as the plane it is all that a convolution sees of its input; near zero it would
/// leave batch norm nothing to normalise but roundings.
const CENTRE_TAP: f32 = 0.25;

/// Initial weights, in half precision with centre taps kept away from zero, and everything that starts
/// at 0 or 1 drawn from around there.
fn random_params(specs: &[ParamSpec], precision: Precision, rng: &mut ChaCha8Rng) -> ParamStore {
    let mut store = ParamStore::init(specs, rng.random());
    for spec in specs {
        let range = match spec.role {
            ParamRole::Weight { .. } => {
                if precision == Precision::F16 && spec.shape.ends_with(&[1, 3, 3]) {
                    for taps in store.values[spec.range()].chunks_exact_mut(9) {
                        taps[4] = taps[4].abs().max(CENTRE_TAP).copysign(taps[4]);
                    }
                }
                continue;
            }
            ParamRole::Scale | ParamRole::GateBias | ParamRole::RunningVar => 0.5..1.5,
            ParamRole::Bias | ParamRole::RunningMean => -0.5..0.5,
        };
        store.values[spec.range()].fill_with(|| rng.random_range(range.clone()));
    }
    store
}

/// Roughly normal values, mean 0, variance 1: the sum of 12 uniform ones.
fn normal(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| (0..12).map(|_| rng.random_range(-0.5f32..0.5)).sum()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu() -> Result<Box<dyn Backend>> {
        Ok(Box::new(CpuBackend::new(Some(1))?))
    }

    #[test]
    fn the_cases_reach_every_operator_and_the_cpu_agrees_with_itself() {
        let report = compare(Precision::F32, 1, "cpu".into(), &cpu).unwrap();
        assert!(report.passed(), "{report:?}");
        let reached = |name: &str| report.rows.iter().any(|row| row.name == name && row.cases > 0);
        for kind in ["conv3x3", "conv1x1", "cascade", "meu_fuse", "resize", "global_pool"] {
            assert!(reached(&format!("{kind} forward")), "{kind}");
        }
        for kind in ["conv3x3", "conv1x1", "cascade", "batch_norm"] {
            assert!(reached(&format!("{kind} backward")), "{kind}");
        }
        for name in ["argmax", "cross_entropy", "adam", "running statistics", "forward, repeated"] {
            assert!(reached(name), "{name}");
        }
    }

    #[test]
    fn comparing_the_cpu_with_itself_is_refused() {
        assert!(matches!(run(Precision::F32, 1, &cpu), Err(Error::Usage(_))));
    }

    #[test]
    fn the_worst_of_a_row_counts_and_nan_is_the_worst() {
        let mut test = Test { precision: Precision::F32, open: &cpu, rows: Vec::new() };
        let at = |error| Comparison { max_abs: error, error, absolute: false };
        for error in [1e-7, 1e-3, 1e-6] {
            test.note("a".into(), at(error), error.to_string(), 1e-5);
        }
        assert_eq!((test.rows[0].cases, test.rows[0].worst.error), (3, 1e-3));
        assert!(!test.rows[0].passed());
        test.note("b".into(), at(f64::NAN), "nan".into(), 1e-5);
        test.note("b".into(), at(1.0), "one".into(), 1e-5);
        assert_eq!(test.rows[1].place, "nan");
        assert!(!test.rows[1].passed());
    }
}
