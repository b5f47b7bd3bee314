//! Which variants a plan runs with on a card: what `fpenet tune` measured there before, else what the
//! cost model prefers.
//!
//! Measured choices lie in the user's cache directory, one file per key, written to a temporary file
//! and renamed: processes that share the directory never see half a file, and the last to write a
//! key wins. `FPENET_CACHE_DIR` names another directory.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cards::Card;
use super::cost::{self, CommandCost};
use super::device::{Buffer, Element};
use super::lower::{self, Memory, Target};
use super::predict::{self, Prediction};
use super::variants::{Expanded, Pairs, Products, Variants};
use crate::error::{Error, Result};
use crate::files;
use crate::graph::passes::Rewrites;
use crate::graph::{ParamId, Plan};

/// Variable that overrides where choices are kept.
pub const VARIABLE: &str = "FPENET_CACHE_DIR";
/// What a file of the cache may have at most.
const FILE_LIMIT: u64 = 1 << 16;

/// What is tuned, and what was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// Kernels and tile shapes.
    pub variants: Variants,
    /// Whether launches are recorded and replayed (CUDA graphs).
    pub graphs: bool,
}

impl Default for Choice {
    fn default() -> Self {
        Choice { variants: Variants::default(), graphs: true }
    }
}

/// Where a choice comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The caller.
    Given,
    /// The variable `FPENET_VARIANTS`.
    Environment,
    /// A measurement of `fpenet tune`.
    Cache,
    /// The cost model.
    Model,
    /// Neither asked for nor looked for.
    Default,
}

impl Source {
    /// One word, for reports.
    pub fn name(self) -> &'static str {
        match self {
            Source::Given => "given",
            Source::Environment => "environment",
            Source::Cache => "cache",
            Source::Model => "model",
            Source::Default => "default",
        }
    }
}

/// The choice that a prepared plan runs with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// What was chosen.
    pub choice: Choice,
    /// By whom.
    pub source: Source,
    /// A file of the cache that could not be used, with its name and the remedy.
    pub warning: Option<String>,
}

/// What a measured choice holds for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// Card, architecture and driver.
    pub device: String,
    /// Storage of tensors: `f32` or `f16`.
    pub precision: String,
    /// N x 3 x H x W.
    pub shape: [usize; 4],
    /// What the plan is for, with or without rewrites ([`Variants::rewrites`]), and a checksum of the
    /// network's parameter shapes.
    pub network: String,
    /// Version of this program.
    pub version: String,
}

impl Key {
    /// The key of a plan on a device that calls itself `device`.
    pub fn new(device: String, plan: &Plan, element: Element) -> Self {
        let mut sum = crc32fast::Hasher::new();
        // How expanded tensors are kept is no matter of the tuner's.
        let scales: Vec<_> = plan.steps.iter().filter_map(|step| step.byte_scale).collect();
        let params = plan.params.iter().enumerate();
        for (_, spec) in params.filter(|(id, _)| !scales.contains(&ParamId(*id))) {
            sum.update(spec.name.as_bytes());
            spec.shape.iter().for_each(|side| sum.update(&(*side as u64).to_le_bytes()));
        }
        let input = plan.input.shape;
        // Logits and labels differ by the last step only, and share a choice.
        let purpose = match plan.mode {
            crate::graph::Mode::Training => "training",
            _ if rewritten(plan) => "inference, rewritten",
            _ => "inference",
        };
        Key {
            device,
            precision: match element {
                Element::F32 => "f32".into(),
                Element::F16 => "f16".into(),
            },
            shape: [input.n, input.c, input.h, input.w],
            network: format!("{purpose} {:08x}", sum.finalize()),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// Readable, and unlike any other key's: a part of the text and a checksum of all of it.
    fn file_name(&self) -> String {
        let [n, _, h, w] = self.shape;
        let text = format!("{self:?}");
        let letters = self.device.chars().take(40);
        let device: String =
            letters.map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let sum = crc32fast::hash(text.as_bytes());
        format!("{device}-{}-{n}x{w}x{h}-{sum:08x}.json", self.precision)
    }
}

/// A file of the cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// What it holds for; a checksum in a file's name is no proof.
    pub key: Key,
    /// What was fastest.
    pub choice: Choice,
    /// Its median time, in microseconds.
    pub microseconds: f64,
}

/// The folder of measured choices.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// `FPENET_CACHE_DIR`, else `fpenet` in the user's cache directory; none where there is neither.
    pub fn of_user() -> Option<Self> {
        let given = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
        let folder = match given {
            Some(folder) => PathBuf::from(folder),
            None => dirs::cache_dir()?.join("fpenet"),
        };
        Some(Cache { folder })
    }

    /// A cache in this folder, which need not exist yet.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Cache { folder: folder.into() }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where a key's entry is or would be.
    pub fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(key.file_name())
    }

    /// The entry of a key, if there is one.
    ///
    /// # Errors
    /// [`Error::Format`] for a file that holds no such entry, [`Error::Io`] for one that cannot be
    /// read. Neither is a reason to stop: the caller reports it and goes on without.
    pub fn load(&self, key: &Key) -> Result<Option<Entry>> {
        let path = self.path(key);
        let bytes = match files::read_limited(&path, FILE_LIMIT) {
            Err(Error::Io { source, .. })
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                return Ok(None);
            }
            other => other?,
        };
        let expected = "a choice written by fpenet tune";
        let entry: Entry = serde_json::from_slice(&bytes)
            .map_err(|error| Error::format(&path, expected, error.to_string()))?;
        if entry.key != *key {
            return Err(Error::format(&path, expected, "one for another card, shape or version"));
        }
        Ok(Some(entry))
    }

    /// Writes an entry, as a whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] naming folder or file.
    pub fn store(&self, entry: &Entry) -> Result<PathBuf> {
        let _made = files::create_folder(&self.folder)?;
        let path = self.path(&entry.key);
        files::write_atomic(&path, |file| {
            serde_json::to_writer_pretty(&mut *file, entry)?;
            file.write_all(b"\n")
        })?;
        Ok(path)
    }

    /// The measured choice of a key, else the model's. A damaged file of the cache is a warning.
    ///
    /// # Errors
    /// What the model says.
    pub fn choose(&self, key: &Key, model: impl FnOnce() -> Result<Choice>) -> Result<Chosen> {
        let warning = match self.load(key) {
            Ok(Some(entry)) => {
                return Ok(Chosen { choice: entry.choice, source: Source::Cache, warning: None });
            }
            Ok(None) => None,
            Err(error) => Some(format!("{error}; ignored, fpenet tune writes it anew")),
        };
        Ok(Chosen { choice: model()?, source: Source::Model, warning })
    }
}

/// Choices by their key in text, with the values to try. A key that [`Variants`] does not have in this
/// build is passed over.
pub const DIMENSIONS: [(&str, &[&str]); 11] = [
    ("products", &["blas", "fused"]),
    ("pairs", &["separate", "fused"]),
    ("pair_pixels", &["32", "64", "128"]),
    ("stage_weights", &["off", "on"]),
    ("cascade", &["wide", "stored", "ahead", "mma"]),
    ("cascade_kb", &["0", "24", "48", "64", "96"]),
    ("decoder", &["separate", "grouped", "fused"]),
    ("stem", &["separate", "fused"]),
    ("strided", &["separate", "fused", "paired"]),
    ("stage3", &["separate", "persistent"]),
    ("dependent_launch", &["off", "on"]),
];

/// Keys of [`Variants`] that are not tried: what a plan was made with is settled before it is tuned,
/// and so is what changes labels.
pub const SETTLED: [&str; 2] = ["rewrites", "expanded"];

/// Choices that the model leaves to a measurement: a cascade that no card has run yet; strided blocks with
/// their projection, which took an H100 a tenth longer than in two launches, where the model sees a
/// hundredth (benches/results/tune-2026-11-26-h100.json); and the persistent stage, whose blocks wait for
/// each other and hang where the driver does not keep all of them resident.
pub const MEASURED: [(&str, &str); 3] =
    [("cascade", "mma"), ("strided", "paired"), ("stage3", "persistent")];

/// Whether a choice is one that only a measurement makes.
fn measured_only(variants: Variants) -> bool {
    let text = variants.to_string();
    MEASURED.iter().any(|(key, value)| text.split(',').any(|item| item == format!("{key}={value}")))
}

/// The dimensions of this build.
pub fn dimensions() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    let text = Variants::default().to_string();
    let has = move |key: &str| text.split(',').any(|item| item.split('=').next() == Some(key));
    DIMENSIONS.into_iter().filter(move |(key, _)| has(key))
}

/// The rewrites of the inference graph that the GPU backend asks for ([`Variants::rewrites`]).
pub const REWRITES: Rewrites = Rewrites::ALL;

/// Those that it asks for with these variants.
pub fn rewrites(variants: Variants) -> Rewrites {
    let exact = if variants.rewrites { REWRITES } else { Rewrites::NONE };
    Rewrites { byte_scales: variants.expanded == Expanded::Bytes, ..exact }
}

/// Whether a plan was made with rewrites: it has operators that nothing else makes.
pub fn rewritten(plan: &Plan) -> bool {
    plan.steps.iter().any(|step| step.op.inference_only())
}

/// The default choice for a plan; one with scales was made for 8 bits. Products in f32 start as a BLAS's: where
/// they are not this program's, neither are pairs, so that no single step leads from one to the other.
fn start(plan: &Plan, element: Element) -> Variants {
    let bytes = element == Element::F16 && plan.steps.iter().any(|s| s.byte_scale.is_some());
    let expanded = if bytes { Expanded::Bytes } else { Expanded::Stored };
    // In training this program's products are the gradients of weights, where it is the faster one.
    let training = plan.mode == crate::graph::Mode::Training;
    let (products, pairs) = match element {
        Element::F32 if !training => (Products::Blas, Pairs::Separate),
        _ => (Products::Fused, Pairs::Fused),
    };
    Variants { products, pairs, rewrites: rewritten(plan), expanded, ..Variants::default() }
}

/// The choice with one value changed.
///
/// # Errors
/// [`Error::Usage`] for a key or value that does not exist.
pub fn changed(variants: Variants, key: &str, value: &str) -> Result<Variants> {
    format!("{variants},{key}={value}").parse()
}

/// Climbs from `start`: tries every value of every dimension in turn and keeps what costs less by more
/// than `margin` (a fraction), until a round changes nothing. `cost` is called once per choice; none
/// is for a choice that cannot run.
///
/// # Errors
/// The first error of `cost`, or that `start` itself cannot run.
pub fn climb(
    start: Variants,
    margin: f64,
    mut cost: impl FnMut(Variants) -> Result<Option<f64>>,
) -> Result<(Variants, f64)> {
    let mut known = vec![(start, cost(start)?)];
    let unusable = || Error::Failed(format!("the choice {start} cannot run on this device"));
    let mut best = (start, known[0].1.ok_or_else(unusable)?);
    loop {
        let before = best.0;
        for (key, values) in dimensions() {
            for value in values {
                let candidate = changed(best.0, key, value)?;
                if known.iter().any(|(variants, _)| *variants == candidate) {
                    continue;
                }
                let found = cost(candidate)?;
                known.push((candidate, found));
                if let Some(found) = found.filter(|found| *found < best.1 * (1.0 - margin)) {
                    best = (candidate, found);
                }
            }
        }
        if best.0 == before {
            return Ok(best);
        }
    }
}

/// The work of a plan with these variants on a card of which only the shared memory matters: no device
/// is needed.
///
/// # Errors
/// Those of [`lower::lower`].
pub fn work(
    plan: &Plan,
    element: Element,
    shared_limit: usize,
    variants: Variants,
) -> Result<Vec<CommandCost>> {
    let place = Buffer(0);
    let half = matches!(element, Element::F16).then_some(place);
    let memory = Memory {
        arena: place,
        params: place,
        params_half: half,
        grads: Some(place),
        moments: Some([place; 2]),
        statistics: place,
        scratch: place,
        rgb: None,
        labels: place,
        control: place,
        counters: place,
    };
    let program = lower::lower(plan, &memory, Target { element, shared_limit, variants })?;
    Ok(cost::forward(plan, &program, element))
}

/// The choice that the cost model predicts to be fastest on a card, with its work and its prediction;
/// never one of [`MEASURED`].
///
/// # Errors
/// Those of [`lower::lower`].
pub fn by_model(
    plan: &Plan,
    element: Element,
    card: &Card,
) -> Result<(Choice, Vec<CommandCost>, Prediction)> {
    // A plan that was made for expanded tensors in 8 bits keeps them so, if it can.
    let in_bytes = |costs: &[CommandCost]| costs.iter().any(CommandCost::in_bytes);
    let start = start(plan, element);
    let scaled = in_bytes(&work(plan, element, card.shared_per_block, start)?);
    let allowed =
        |variants, costs: &[CommandCost]| !measured_only(variants) && (!scaled || in_bytes(costs));
    cheapest(plan, element, card, start, allowed)
}

/// The same with as much of stage 3 in one cooperative launch as the kernel takes; none where it takes
/// nothing of it.
///
/// # Errors
/// Those of [`lower::lower`].
pub fn by_model_persistent(
    plan: &Plan,
    element: Element,
    card: &Card,
) -> Result<Option<(Choice, Vec<CommandCost>, Prediction)>> {
    let fused = Variants { pairs: Pairs::Fused, ..start(plan, element) };
    let start = changed(fused, "stage3", "persistent")?;
    let together = |costs: &[CommandCost]| costs.iter().any(|cost| cost.behind_barrier);
    if !together(&work(plan, element, card.shared_per_block, start)?) {
        return Ok(None);
    }
    cheapest(plan, element, card, start, |_, costs| together(costs)).map(Some)
}

/// The cheapest by the model of what is `allowed`, climbing from `start`.
fn cheapest(
    plan: &Plan,
    element: Element,
    card: &Card,
    start: Variants,
    allowed: impl Fn(Variants, &[CommandCost]) -> bool,
) -> Result<(Choice, Vec<CommandCost>, Prediction)> {
    let predict = |variants: Variants| -> Result<Option<f64>> {
        let costs = work(plan, element, card.shared_per_block, variants)?;
        let expected = predict::total(&costs, card, true).expected;
        Ok(allowed(variants, &costs).then_some(expected))
    };
    // A margin: the model is not good enough to leave the default for nothing.
    let (variants, _) = climb(start, 0.02, predict)?;
    let costs = work(plan, element, card.shared_per_block, variants)?;
    let graph = predict::total(&costs, card, true);
    let single = predict::total(&costs, card, false);
    let graphs = graph.expected <= single.expected;
    let prediction = if graphs { graph } else { single };
    Ok((Choice { variants, graphs }, costs, prediction))
}

#[cfg(test)]
#[path = "choice_tests.rs"]
mod tests;
