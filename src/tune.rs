//! Measures the variants of a network's kernels on the device at hand and keeps the fastest, or
//! predicts them for a card that is not.

use std::time::Duration;

use serde::Serialize;

use crate::backend::cpu::CpuBackend;
use crate::backend::gpu::cards::Card;
use crate::backend::gpu::choice::{self, Cache, Choice, Entry};
use crate::backend::gpu::cost::{self, CommandCost};
use crate::backend::gpu::predict::Prediction;
use crate::backend::gpu::variants::Expanded;
use crate::backend::gpu::{Element, Variants};
use crate::backend::{Backend, State};
use crate::error::{Error, Result};
use crate::exec;
use crate::graph::{Mode, PlaneLayout};
use crate::model::Model;

/// A choice must be this much faster to be preferred: less is noise.
const MARGIN: f64 = 0.01;

/// One timed candidate.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trial {
    /// The variants, as `FPENET_VARIANTS` takes them; threads on a CPU.
    pub variants: String,
    /// Whether launches were replayed as a CUDA graph.
    pub graphs: bool,
    /// Median time of a forward pass, in microseconds; none where it could not run.
    pub microseconds: Option<f64>,
}

/// What a network is tuned for.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Images.
    pub batch: usize,
    /// Height of the input.
    pub height: usize,
    /// Width of the input.
    pub width: usize,
}

/// Measures the variants of a GPU for one shape; `iterations` forward passes each. The result is not
/// yet stored. `tick` hears of every trial.
///
/// # Errors
/// [`Error::Usage`] for a device without variants, or what the device says.
pub fn measure(
    model: &Model,
    device: &mut dyn Backend,
    shape: Shape,
    iterations: usize,
    mut tick: impl FnMut(&Trial),
) -> Result<Entry> {
    let Shape { batch, height, width } = shape;
    let size = (batch, height, width);
    let (plan, params) =
        exec::plan_inference(model, (device.layout(), device.rewrites()), size, Mode::Labels)?;
    let key = device.tuning_key(&plan).ok_or_else(|| {
        Error::Usage(format!(
            "tune: expected a GPU, found {}, which has no variants",
            device.kind()
        ))
    })?;
    // Nothing here depends on the values; zeros would let a GPU run cooler than a photo does.
    let input: Vec<f32> =
        (0..plan.input.shape.len()).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
    let mut labels = vec![0; batch * height * width];
    let mut time = |choice: Choice| -> Result<Option<f64>> {
        device.choose(choice);
        let mut run = || {
            device.prepare(&plan)?;
            device.write_state(State::Params, &params.values)?;
            device.write(&plan.input, &input)?;
            // A first pass sets up, a second one records.
            let mut samples = Vec::with_capacity(iterations);
            for pass in 0..iterations + 2 {
                let begun = device.mark()?;
                device.forward(&plan)?;
                // Some choices make the labels in the forward pass, others afterwards.
                device.read_labels(&plan, &mut labels)?;
                let done = device.labels_computed().map_or_else(|| device.mark(), Ok)?;
                device.synchronize()?;
                if pass >= 2 {
                    samples.push(device.between(begun, done)?);
                }
            }
            Ok(median(&mut samples))
        };
        let microseconds = match run() {
            Ok(time) => Some(time.as_secs_f64() * 1e6),
            // A kernel that this card cannot launch is no candidate.
            Err(Error::Kernel { .. }) => None,
            Err(error) => return Err(error),
        };
        let Choice { variants, graphs } = choice;
        tick(&Trial { variants: variants.to_string(), graphs, microseconds });
        Ok(microseconds)
    };
    let start = Variants { rewrites: choice::rewritten(&plan), ..Variants::default() };
    let (variants, mut best) =
        choice::climb(start, MARGIN, |variants| time(Choice { variants, graphs: true }))?;
    let mut graphs = true;
    if let Some(without) = time(Choice { variants, graphs: false })?
        && without < best * (1.0 - MARGIN)
    {
        (graphs, best) = (false, without);
    }
    Ok(Entry { key, choice: Choice { variants, graphs }, microseconds: best })
}

fn median(samples: &mut [Duration]) -> Duration {
    samples.sort_unstable();
    samples.get(samples.len() / 2).copied().unwrap_or_default()
}

/// Measures the thread counts of the CPU backend: 1, 2, 4 .. and all of `cores`. There is nothing else
/// to choose there: its kernels go by the instruction set. Returns the fastest first.
///
/// # Errors
/// What the device says.
pub fn measure_threads(
    model: &Model,
    shape: Shape,
    cores: usize,
    iterations: usize,
    mut tick: impl FnMut(&Trial),
) -> Result<Vec<(usize, f64)>> {
    let mut counts: Vec<usize> =
        std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|n| *n < cores).collect();
    counts.push(cores);
    let mut found = Vec::new();
    for threads in counts {
        let backend = Box::new(CpuBackend::new(Some(threads))?);
        let Shape { batch, height, width } = shape;
        let mut inference =
            exec::Inference::new(model, backend, batch, height, width, Mode::Labels)?;
        let input = vec![0.5; inference.plan().input.shape.len()];
        let runs = (1, iterations);
        let samples = crate::bench::sample_inference(&mut inference, &input, None, runs, || ())?;
        let mut compute = samples.compute;
        compute.sort_by(f64::total_cmp);
        let microseconds = compute[compute.len() / 2] * 1e3;
        tick(&Trial {
            variants: format!("threads={threads}"),
            graphs: false,
            microseconds: Some(microseconds),
        });
        found.push((threads, microseconds));
    }
    found.sort_by(|a, b| a.1.total_cmp(&b.1));
    Ok(found)
}

/// All commands of one kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassPrediction {
    /// Kernel without storage type and tile, or `gemm` for cuBLAS.
    pub class: &'static str,
    /// Commands of this kind.
    pub commands: usize,
    /// Bytes that they move, in millions.
    pub megabytes: f64,
    /// Their floating-point operations, in billions.
    pub gflops: f64,
    /// Smallest share of a multiprocessor's threads that are resident.
    pub occupancy: f64,
    /// Microseconds at the card's peaks.
    pub roofline_us: f64,
    /// Microseconds by the model, cost of each launch included.
    pub predicted_us: f64,
}

/// What the cost model says of one card; a prediction, not a measurement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CardPrediction {
    /// Card.
    pub card: &'static str,
    /// Compute capability times 10.
    pub arch: u32,
    /// `f32` or `f16`.
    pub precision: &'static str,
    /// N x 3 x H x W.
    pub shape: [usize; 4],
    /// The variants that the model prefers.
    pub variants: String,
    /// Whether launches are replayed as a CUDA graph.
    pub graphs: bool,
    /// By kind of kernel, the longest first.
    pub classes: Vec<ClassPrediction>,
    /// Commands in all.
    pub commands: usize,
    /// Microseconds at the card's peaks, without any cost per launch.
    pub roofline_us: f64,
    /// Microseconds by the model.
    pub predicted_us: f64,
    /// Images per second by the model.
    pub predicted_fps: f64,
    /// Images per second at the roofline.
    pub roofline_fps: f64,
    /// The same with the blocks' expanded tensors in 8 bits, which nothing chooses by itself; of
    /// half precision only.
    pub expanded_bytes: Option<Alternative>,
    /// The same with stage 3 in one cooperative launch, which only a measurement chooses
    /// ([`choice::MEASURED`]); none for a network whose blocks that kernel cannot take.
    pub persistent: Option<Alternative>,
}

/// What the cost model says of a way that it does not choose by itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Alternative {
    /// The variants.
    pub variants: String,
    /// Kernel launches and cuBLAS calls.
    pub commands: usize,
    /// Bytes that the commands move, in millions.
    pub megabytes: f64,
    /// Microseconds at the card's peaks, without any cost per launch.
    pub roofline_us: f64,
    /// Microseconds by the model.
    pub predicted_us: f64,
}

/// The model's choice and prediction for a card that need not be here.
///
/// # Errors
/// [`Error::Usage`] for an unusable shape.
pub fn predict(
    model: &Model,
    shape: Shape,
    element: Element,
    card: &Card,
) -> Result<CardPrediction> {
    let Shape { batch, height, width } = shape;
    let size = (batch, height, width);
    let (plan, _) =
        exec::plan_inference(model, (PlaneLayout::Dense, choice::REWRITES), size, Mode::Labels)?;
    let (choice, costs, total) = choice::by_model(&plan, element, card)?;
    let expanded_bytes = match element {
        Element::F16 => predict_bytes(model, size, card)?,
        Element::F32 => None,
    };
    let persistent = choice::by_model_persistent(&plan, element, card)?
        .map(|(choice, costs, total)| Alternative::new(choice.variants, &costs, total));
    let mut classes = by_class(&costs, card, choice.graphs);
    classes.sort_by(|a, b| b.predicted_us.total_cmp(&a.predicted_us));
    let input = plan.input.shape;
    Ok(CardPrediction {
        card: card.name,
        arch: card.arch,
        precision: match element {
            Element::F32 => "f32",
            Element::F16 => "f16",
        },
        shape: [input.n, input.c, input.h, input.w],
        variants: choice.variants.to_string(),
        graphs: choice.graphs,
        classes,
        commands: cost::launches(&costs),
        roofline_us: total.roofline * 1e6,
        predicted_us: total.expected * 1e6,
        predicted_fps: batch as f64 / total.expected,
        roofline_fps: batch as f64 / total.roofline,
        expanded_bytes,
        persistent,
    })
}

impl Alternative {
    fn new(variants: Variants, costs: &[CommandCost], total: Prediction) -> Self {
        Alternative {
            variants: variants.to_string(),
            commands: cost::launches(costs),
            megabytes: megabytes(costs),
            roofline_us: total.roofline * 1e6,
            predicted_us: total.expected * 1e6,
        }
    }
}

/// The prediction with expanded tensors in 8 bits; none for a network without such blocks.
fn predict_bytes(
    model: &Model,
    size: (usize, usize, usize),
    card: &Card,
) -> Result<Option<Alternative>> {
    let bytes = Variants { expanded: Expanded::Bytes, ..Variants::default() };
    let wanted = (PlaneLayout::Dense, choice::rewrites(bytes));
    let (plan, _) = exec::plan_inference(model, wanted, size, Mode::Labels)?;
    let (choice, costs, total) = choice::by_model(&plan, Element::F16, card)?;
    let any = costs.iter().any(CommandCost::in_bytes);
    Ok(any.then(|| Alternative::new(choice.variants, &costs, total)))
}

fn megabytes(costs: &[CommandCost]) -> f64 {
    costs.iter().map(|cost| cost.bytes + cost.again).sum::<u64>() as f64 / 1e6
}

fn by_class(costs: &[CommandCost], card: &Card, graphs: bool) -> Vec<ClassPrediction> {
    let mut names: Vec<&'static str> = costs.iter().map(CommandCost::class).collect();
    names.sort_unstable();
    names.dedup();
    let class = |class: &'static str| {
        let members: Vec<&CommandCost> = costs.iter().filter(|c| c.class() == class).collect();
        let mut time = Prediction::default();
        members.iter().for_each(|cost| time += cost.predict(card, graphs));
        let occupancy = members.iter().map(|cost| cost.occupancy(card)).fold(1.0, f64::min);
        ClassPrediction {
            class,
            commands: members.iter().filter(|cost| !cost.behind_barrier).count(),
            megabytes: members.iter().map(|cost| cost.bytes + cost.again).sum::<u64>() as f64 / 1e6,
            gflops: members.iter().map(|cost| cost.flops).sum::<u64>() as f64 / 1e9,
            occupancy,
            roofline_us: time.roofline * 1e6,
            predicted_us: time.expected * 1e6,
        }
    };
    names.into_iter().map(class).collect()
}

/// Stores a measured choice where `bench` and `segment` look for it.
///
/// # Errors
/// [`Error::Failed`] where the system has no cache directory, [`Error::Io`] naming the file.
pub fn store(entry: &Entry) -> Result<std::path::PathBuf> {
    match Cache::of_user() {
        Some(cache) => cache.store(entry),
        None => Err(Error::Failed(format!(
            "this user has no cache directory; name one with {}",
            choice::VARIABLE
        ))),
    }
}
