//! Reference folders (SPEC, "Reference folder"): what PyTorch computed, and how a device compares.
//!
//! Logits and intermediates are of inference mode; loss, gradients and the Adam step are of
//! training mode, starting from the same model file.

pub mod compare;

use std::path::{Path, PathBuf};

use crate::backend::{AdamStep, Backend, Precision};
use crate::error::{Error, Result};
use crate::exec::{Inference, Training};
use crate::graph::{Graph, Mode, ParamStore, check_input};
use crate::model::Model;
use crate::model::npy;
use crate::model::tensors::{self, Selection, TensorFile, dimensions};
use compare::{Comparison, Tolerances};

/// Learning rate of the Adam step in `after_step.safetensors`.
const STEP_LR: f32 = 5e-4;
/// Label of pixels that the loss passes over.
const VOID: u8 = 255;

/// What a row of a [`Report`] compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `logits.npy`.
    Logits,
    /// The class of the largest logit per pixel; f16 only.
    Labels,
    /// `stage1.npy` .. `decoder1.npy`.
    Intermediate,
    /// `loss.npy`.
    Loss,
    /// A tensor of `grads.safetensors`.
    Gradient,
    /// A tensor of `after_step.safetensors`.
    AfterStep,
}

/// One comparison.
#[derive(Debug, Clone)]
pub struct Row {
    /// Which part of the folder.
    pub part: Part,
    /// Name of the array or tensor.
    pub name: String,
    /// How far apart the two are.
    pub comparison: Comparison,
    /// Largest [`Comparison::error`] that passes.
    pub tolerance: f64,
}

impl Row {
    /// Whether the error is within the tolerance; NaN never is.
    pub fn passed(&self) -> bool {
        self.comparison.error <= self.tolerance
    }
}

/// The outcome of [`check`].
#[derive(Debug, Clone)]
pub struct Report {
    /// The device in words.
    pub device: String,
    /// Every comparison made, at least one.
    pub rows: Vec<Row>,
    /// Files of the SPEC's list that were not compared, with the reason.
    pub skipped: Vec<String>,
}

impl Report {
    /// Number of comparisons that missed their tolerance.
    pub fn misses(&self) -> usize {
        self.rows.iter().filter(|row| !row.passed()).count()
    }

    /// Whether every comparison is within its tolerance.
    pub fn passed(&self) -> bool {
        self.misses() == 0
    }
}

/// Compares a device with a reference folder. `open` gives a fresh backend, as often as asked;
/// `precision` is what it computes in and decides the tolerances.
///
/// # Errors
/// What [`Model::load`] and [`npy::read_f32`] say of a bad file, [`Error::Format`] for arrays
/// whose shapes do not fit the model, [`Error::Failed`] for a folder with nothing to compare, or
/// what the device says. A miss is no error: see [`Report::passed`].
pub fn check(
    dir: &Path,
    precision: Precision,
    open: &dyn Fn() -> Result<Box<dyn Backend>>,
) -> Result<Report> {
    let model = Model::load(&dir.join("model.safetensors"))?;
    let input = Input::read(&dir.join("input.npy"))?;
    let mut check = Check {
        dir,
        model: &model,
        input: &input,
        precision,
        tolerances: Tolerances::of(precision),
        rows: Vec::new(),
        skipped: Vec::new(),
    };
    let mut device = None;
    check.logits(open, &mut device)?;
    check.intermediates(open, &mut device)?;
    check.training(open, &mut device)?;
    let Some(device) = device.filter(|_| !check.rows.is_empty()) else {
        return Err(Error::Failed(format!(
            "{}: expected at least one of logits.npy, an intermediate, or labels.npy with \
             loss.npy, grads.safetensors or after_step.safetensors, found nothing to compare",
            dir.display()
        )));
    };
    Ok(Report { device, rows: check.rows, skipped: check.skipped })
}

/// `input.npy`: N x 3 x H x W.
struct Input {
    n: usize,
    h: usize,
    w: usize,
    values: Vec<f32>,
}

impl Input {
    fn read(path: &Path) -> Result<Input> {
        let (shape, values) = npy::read_f32(path)?;
        let [n, 3, h, w] = shape[..] else {
            return Err(Error::format(path, "shape N x 3 x H x W", dimensions(&shape)));
        };
        npy::check_finite(path, &values)?;
        check_input(n, h, w).map_err(|e| e.blame_file(path, "an array that networks take"))?;
        Ok(Input { n, h, w, values })
    }
}

struct Check<'a> {
    dir: &'a Path,
    model: &'a Model,
    input: &'a Input,
    precision: Precision,
    tolerances: Tolerances,
    rows: Vec<Row>,
    skipped: Vec<String>,
}

type Open<'a> = &'a dyn Fn() -> Result<Box<dyn Backend>>;

impl Check<'_> {
    /// The file's path if it is there; else it is listed as skipped.
    fn find(&mut self, name: &str) -> Option<PathBuf> {
        let path = self.dir.join(name);
        if path.exists() {
            return Some(path);
        }
        self.skipped.push(format!("{name} (absent)"));
        None
    }

    fn infer(&self, open: Open, mode: Mode) -> Result<Inference> {
        let Input { n, h, w, values } = self.input;
        let mut inference = Inference::new(self.model, open()?, *n, *h, *w, mode)?;
        inference.run(values)?;
        Ok(inference)
    }

    fn logits(&mut self, open: Open, device: &mut Option<String>) -> Result<()> {
        let Some(path) = self.find("logits.npy") else { return Ok(()) };
        let Input { n, h, w, .. } = *self.input;
        let classes = self.model.config.classes;
        let reference = read_shaped(&path, &[n, classes, h, w])?;
        let mut inference = self.infer(open, Mode::Logits)?;
        *device = Some(inference.backend().describe());
        let found = inference.logits()?;
        let comparison = Comparison::relative_l2(&found, &reference);
        self.row(Part::Logits, "logits", comparison, self.tolerances.inference);
        if self.precision == Precision::F16 {
            let comparison = compare::label_disagreement(&found, &reference, classes, h * w);
            self.row(Part::Labels, "labels that differ", comparison, self.tolerances.labels);
        }
        Ok(())
    }

    fn intermediates(&mut self, open: Open, device: &mut Option<String>) -> Result<()> {
        let names = Graph::fpenet(&self.model.config)?.named;
        let mut present = Vec::new();
        for (name, _) in names {
            if let Some(path) = self.find(&format!("{name}.npy")) {
                present.push((name, path));
            }
        }
        if present.is_empty() {
            return Ok(());
        }
        let mut inference = self.infer(open, Mode::Inspect)?;
        *device = Some(inference.backend().describe());
        let computed = inference.intermediates()?;
        for (name, path) in present {
            let found = computed.iter().find(|(computed, ..)| *computed == name);
            let (_, shape, found) = found.ok_or_else(|| {
                Error::Failed(format!("intermediate {name}: the device did not keep it"))
            })?;
            let reference = read_shaped(&path, &[shape.n, shape.c, shape.h, shape.w])?;
            let comparison = Comparison::relative_l2(found, &reference);
            self.row(Part::Intermediate, &name, comparison, self.tolerances.inference);
        }
        Ok(())
    }

    fn training(&mut self, open: Open, device: &mut Option<String>) -> Result<()> {
        let labels = self.find("labels.npy");
        let loss = self.find("loss.npy");
        let grads = self.find("grads.safetensors");
        let after_step = self.find("after_step.safetensors");
        let wanted = [&loss, &grads, &after_step];
        let Some(labels) = labels else {
            for path in wanted.into_iter().flatten() {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                self.skipped.push(format!("{name} (needs labels.npy)"));
            }
            return Ok(());
        };
        if wanted.iter().all(|path| path.is_none()) {
            return Ok(());
        }
        let Input { n, h, w, values } = self.input;
        let labels = self.read_labels(&labels)?;
        let mut training =
            Training::new(&self.model.config, &self.model.params, open()?, *n, *h, *w)?;
        *device = Some(training.backend().describe());
        let found_loss = training.gradients(values, &labels)?;
        if let Some(path) = loss {
            let reference = read_scalar(&path)?;
            let comparison = Comparison::relative_l2(&[found_loss], &[reference]);
            self.row(Part::Loss, "loss", comparison, self.tolerances.loss);
        }
        if let Some(path) = grads {
            let found = training.grads()?;
            self.tensors(Part::Gradient, &path, Selection::Trainable, &found)?;
        }
        if let Some(path) = after_step {
            training.update(AdamStep::paper(STEP_LR, 1))?;
            let found = training.params()?;
            self.tensors(Part::AfterStep, &path, Selection::All, &found)?;
        }
        Ok(())
    }

    fn read_labels(&self, path: &Path) -> Result<Vec<u8>> {
        let Input { n, h, w, .. } = *self.input;
        let (shape, labels) = npy::read_u8(path)?;
        expect_shape(path, &shape, &[n, h, w])?;
        let classes = self.model.config.classes;
        match labels.iter().position(|&l| usize::from(l) >= classes && l != VOID) {
            Some(i) => Err(Error::format(
                path,
                format!("labels below {classes}, or 255 for void"),
                format!(
                    "{} in image {}, row {}, column {}",
                    labels[i],
                    i / (h * w),
                    i / w % h,
                    i % w
                ),
            )),
            None => Ok(labels),
        }
    }

    /// A row for every tensor of a file that holds a parameter table.
    fn tensors(
        &mut self,
        part: Part,
        path: &Path,
        selection: Selection,
        found: &ParamStore,
    ) -> Result<()> {
        let bytes = tensors::read_bytes(path)?;
        let reference = TensorFile::parse(path, &bytes)?.params(&found.specs, selection)?;
        let mut tolerance = self.tolerances.training;
        if self.precision == Precision::F16 && part == Part::Gradient {
            let config = &self.model.config;
            let whole = compare::half_gradient_tolerance(config.p + config.q);
            let comparison = Comparison::relative_l2(&found.values, &reference.values);
            self.row(part, "gradient of all parameters", comparison, whole);
            tolerance = compare::TENSOR_OVER_WHOLE * whole;
        }
        for spec in found.specs.iter().filter(|spec| selection.holds(spec)) {
            let (a, b) = (&found.values[spec.range()], &reference.values[spec.range()]);
            let name = match part {
                Part::AfterStep => format!("after step: {}", spec.name),
                _ => format!("gradient: {}", spec.name),
            };
            self.row(part, &name, Comparison::relative_l2(a, b), tolerance);
        }
        Ok(())
    }

    fn row(&mut self, part: Part, name: &str, comparison: Comparison, tolerance: f64) {
        self.rows.push(Row { part, name: name.to_string(), comparison, tolerance });
    }
}

fn expect_shape(path: &Path, found: &[usize], expected: &[usize]) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::format(path, format!("shape {}", dimensions(expected)), dimensions(found)))
}

fn read_shaped(path: &Path, expected: &[usize]) -> Result<Vec<f32>> {
    let (shape, values) = npy::read_f32(path)?;
    expect_shape(path, &shape, expected)?;
    Ok(values)
}

fn read_scalar(path: &Path) -> Result<f32> {
    let (shape, values) = npy::read_f32(path)?;
    match values[..] {
        [value] => Ok(value),
        _ => Err(Error::format(path, "a scalar", format!("shape {}", dimensions(&shape)))),
    }
}
