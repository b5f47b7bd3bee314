//! The CPU's side of the [`Backend`] trait: memory, threads, and which operator runs when.

use std::sync::Arc;
use std::time::Instant;

use memmap2::{MmapMut, MmapOptions};
use rayon::ThreadPool;
use rayon::prelude::*;

use super::simd::Isa;
use super::{backward, forward, peak};
use crate::backend::{AdamStep, Backend, CommandMarks, Counters, Images, Mark, Pass, State};
use crate::error::{Error, Result};
use crate::graph::passes::Rewrites;
use crate::graph::{Mode, Plan, PlaneLayout, Tensor};
use crate::memory;
use crate::ops::{cross_entropy, resize};

/// f32 on all cores of this machine.
pub struct CpuBackend {
    pub(super) isa: Isa,
    rewrites: Rewrites,
    pool: Arc<ThreadPool>,
    pub(super) arena: Arena,
    pub(super) params: Vec<f32>,
    pub(super) grads: Vec<f32>,
    moment1: Vec<f32>,
    moment2: Vec<f32>,
    labels: Vec<u8>,
    class_weights: Vec<f32>,
    counters: Counters,
}

/// The planned memory: pages of its own, large ones where the system has them. A tile of a matrix
/// product touches a page of every plane; with pages of 4 KiB that is more than the processor
/// holds translations for.
#[derive(Default)]
pub(super) struct Arena {
    memory: Option<MmapMut>,
    len: usize,
}

impl Arena {
    /// Makes room for `len` elements, zeroed.
    fn reserve(&mut self, len: usize) -> std::io::Result<()> {
        self.memory = None;
        let memory = MmapOptions::new().len((len * size_of::<f32>()).max(1)).map_anon()?;
        // Only a hint: a kernel without large pages serves as well, slower.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        self.memory = Some(memory);
        self.len = len;
        Ok(())
    }

    pub(super) fn base(&mut self) -> *mut f32 {
        self.memory.as_mut().map_or(std::ptr::dangling_mut(), |m| m.as_mut_ptr().cast())
    }

    /// Whether a planned tensor lies inside.
    fn holds(&self, tensor: &Tensor) -> bool {
        tensor.offset + tensor.extent() <= self.len
    }
}

impl CpuBackend {
    /// A backend with a thread pool of its own; `threads` defaults to the number of cores.
    ///
    /// # Errors
    /// [`Error::Usage`] for zero threads, [`Error::Device`] where threads cannot be started.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        if threads.is_some_and(|t| t == 0 || t > 4096) {
            let found = threads.unwrap_or_default();
            return Err(Error::Usage(format!("threads: expected 1 to 4096, found {found}")));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .thread_name(|i| format!("fpenet-cpu-{i}"))
            .build()
            .map_err(|e| Error::Device {
                device: "cpu".into(),
                problem: format!("cannot start worker threads: {e}"),
                remedy: "pass a smaller --threads".into(),
            })?;
        Ok(CpuBackend {
            isa: Isa::detect(),
            rewrites: Rewrites::ALL,
            pool: Arc::new(pool),
            arena: Arena::default(),
            params: Vec::new(),
            grads: Vec::new(),
            moment1: Vec::new(),
            moment2: Vec::new(),
            labels: Vec::new(),
            class_weights: Vec::new(),
            counters: Counters::default(),
        })
    }

    /// The same with a given instruction set, for tests that compare them.
    ///
    /// # Errors
    /// As [`CpuBackend::new`].
    pub fn with_isa(threads: Option<usize>, isa: Isa) -> Result<Self> {
        Ok(CpuBackend { isa, ..Self::new(threads)? })
    }

    /// The same without some of the rewrites, for tests that compare them.
    pub fn with_rewrites(self, rewrites: Rewrites) -> Self {
        CpuBackend { rewrites, ..self }
    }

    fn state(&mut self, state: State) -> &mut Vec<f32> {
        match state {
            State::Params => &mut self.params,
            State::Grads => &mut self.grads,
            State::Moment1 => &mut self.moment1,
            State::Moment2 => &mut self.moment2,
        }
    }

    /// Loss and gradients; `over` hears when the loss is done (none) and each step.
    fn run_backward(
        &mut self,
        plan: &Plan,
        mut over: impl FnMut(Option<usize>) + Send,
    ) -> Result<()> {
        let grad_logits = plan
            .grad_logits
            .ok_or_else(|| Error::Usage("backward needs a plan made for training".into()))?;
        let expected = plan.input.shape.n * plan.input.shape.plane();
        if self.labels.len() != expected {
            return Err(Error::Shape {
                node: "labels".into(),
                expected: format!("{expected} labels, written before the backward"),
                found: format!("{}", self.labels.len()),
            });
        }
        let pool = Arc::clone(&self.pool);
        pool.install(|| {
            let base = self.arena.base();
            let logits = unsafe { super::View::of(base, &plan.logits) };
            let gradient = unsafe { super::ViewMut::of(base, &grad_logits) };
            let weights = &self.class_weights;
            let loss = cross_entropy::forward_backward(logits, &self.labels, weights, gradient);
            self.counters.loss = loss;
            self.counters.loss_sum += f64::from(loss);
            over(None);
            for (i, step) in plan.steps.iter().enumerate().rev() {
                backward::step(self, plan, step);
                over(Some(i));
            }
        });
        Ok(())
    }

    fn check_tensor(&self, tensor: &Tensor, len: usize) -> Result<()> {
        if len == tensor.shape.len() && self.arena.holds(tensor) {
            return Ok(());
        }
        Err(Error::Shape {
            node: "host copy".into(),
            expected: format!("{} elements ({})", tensor.shape.len(), tensor.shape),
            found: format!("{len} elements"),
        })
    }
}

impl Backend for CpuBackend {
    fn kind(&self) -> &'static str {
        "cpu"
    }

    fn describe(&self) -> String {
        let threads = self.pool.current_num_threads();
        format!("{}, {threads} threads, {}", processor_name(), self.isa.name())
    }

    fn layout(&self) -> PlaneLayout {
        PlaneLayout::CachePadded
    }

    fn rewrites(&self) -> Rewrites {
        self.rewrites
    }

    fn prepare(&mut self, plan: &Plan) -> Result<()> {
        let needed = plan.arena_bytes() as u64;
        let free = memory::available_bytes();
        let out_of_memory = || {
            let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
            Error::Device {
                device: "cpu".into(),
                problem: format!(
                    "out of memory: {} needed, {} free",
                    gib(needed),
                    free.map_or("an unknown amount".into(), gib)
                ),
                remedy: "use a smaller --size or --batch".into(),
            }
        };
        // Linux grants more than there is and then ends the process that touches it.
        if free.is_some_and(|free| needed > free) {
            return Err(out_of_memory());
        }
        self.arena.reserve(plan.arena_len).map_err(|_| out_of_memory())?;
        self.params = vec![0.0; plan.param_len];
        let trained = if plan.mode == Mode::Training { plan.trainable_len } else { 0 };
        for state in [State::Grads, State::Moment1, State::Moment2] {
            *self.state(state) = vec![0.0; trained];
        }
        self.labels.clear();
        self.class_weights.clear();
        self.counters = Counters::default();
        Ok(())
    }

    fn write(&mut self, tensor: &Tensor, data: &[f32]) -> Result<()> {
        self.check_tensor(tensor, data.len())?;
        let plane = tensor.shape.plane();
        // The backend is borrowed mutably: nothing else touches the arena.
        let view = unsafe { super::ViewMut::of(self.arena.base(), tensor) };
        self.pool.install(|| {
            data.par_chunks(plane).enumerate().for_each(|(i, values)| {
                let (n, c) = (i / tensor.shape.c, i % tensor.shape.c);
                // Every plane is written by one task.
                unsafe { view.plane_mut(n, c) }.copy_from_slice(values);
            });
        });
        Ok(())
    }

    fn write_images(&mut self, plan: &Plan, images: &Images) -> Result<()> {
        let rgb = match images {
            Images::Normalised(values) => return self.write(&plan.input, values),
            Images::Rgb(rgb) => rgb,
        };
        let shape = plan.input.shape;
        rgb.check(shape)?;
        self.check_tensor(&plan.input, shape.len())?;
        // Every plane is written by one task.
        let view = unsafe { super::ViewMut::of(self.arena.base(), &plan.input) };
        self.pool.install(|| {
            (0..shape.n * 3).into_par_iter().for_each(|i| {
                rgb.normalise_plane(i / 3, i % 3, unsafe { view.plane_mut(i / 3, i % 3) });
            });
        });
        Ok(())
    }

    fn read(&mut self, tensor: &Tensor, out: &mut [f32]) -> Result<()> {
        self.check_tensor(tensor, out.len())?;
        let plane = tensor.shape.plane();
        let view = unsafe { super::View::of(self.arena.base(), tensor) };
        self.pool.install(|| {
            out.par_chunks_mut(plane).enumerate().for_each(|(i, values)| {
                values.copy_from_slice(view.plane(i / tensor.shape.c, i % tensor.shape.c));
            });
        });
        Ok(())
    }

    fn write_state(&mut self, state: State, data: &[f32]) -> Result<()> {
        let target = self.state(state);
        if target.len() != data.len() {
            return Err(length_mismatch(state, target.len(), data.len()));
        }
        target.copy_from_slice(data);
        Ok(())
    }

    fn read_state(&mut self, state: State, out: &mut [f32]) -> Result<()> {
        let source = self.state(state);
        if source.len() != out.len() {
            return Err(length_mismatch(state, source.len(), out.len()));
        }
        out.copy_from_slice(source);
        Ok(())
    }

    fn write_labels(&mut self, labels: &[u8]) -> Result<()> {
        self.labels.clear();
        self.labels.extend_from_slice(labels);
        Ok(())
    }

    fn write_class_weights(&mut self, weights: &[f32]) -> Result<()> {
        self.class_weights = weights.to_vec();
        Ok(())
    }

    fn forward_step(&mut self, plan: &Plan, index: usize) -> Result<()> {
        let pool = Arc::clone(&self.pool);
        pool.install(|| forward::run(self, plan, index..index + 1));
        Ok(())
    }

    fn forward(&mut self, plan: &Plan) -> Result<()> {
        // One entry into the pool for all steps: each would wake the threads anew.
        let pool = Arc::clone(&self.pool);
        pool.install(|| forward::run(self, plan, 0..plan.steps.len()));
        Ok(())
    }

    fn read_labels(&mut self, plan: &Plan, out: &mut [u8]) -> Result<()> {
        let size = plan.input.shape;
        if out.len() != size.n * size.plane() {
            return Err(Error::Shape {
                node: "labels".into(),
                expected: format!("{} labels", size.n * size.plane()),
                found: format!("{}", out.len()),
            });
        }
        let (isa, base) = (self.isa, self.arena.base());
        let scores = unsafe { super::View::of(base, &plan.logits) };
        self.pool.install(|| resize::argmax(isa, scores, size.h, size.w, out));
        Ok(())
    }

    fn backward(&mut self, plan: &Plan) -> Result<()> {
        self.run_backward(plan, |_| ())
    }

    fn run_marked(&mut self, plan: &Plan, pass: Pass) -> Result<Vec<CommandMarks>> {
        let mut marks = Vec::new();
        let mut begun = Mark::Host(Instant::now());
        let mut over = |kernel, step| {
            let done = Mark::Host(Instant::now());
            marks.push(CommandMarks { kernel, step, begun, done });
            begun = done;
        };
        let kind = |step: usize| plan.steps[step].op.kind();
        match pass {
            Pass::Forward => {
                for step in 0..plan.steps.len() {
                    self.forward_step(plan, step)?;
                    over(kind(step), Some(step));
                }
            }
            Pass::Backward => self.run_backward(plan, |step| {
                over(step.map_or("cross_entropy", kind), step);
            })?,
            Pass::Update(step) => {
                self.adam(plan, step)?;
                over("adam", None);
            }
        }
        Ok(marks)
    }

    fn counters(&mut self) -> Result<Counters> {
        Ok(self.counters)
    }

    fn write_counters(&mut self, counters: Counters) -> Result<()> {
        self.counters = counters;
        Ok(())
    }

    fn adam(&mut self, plan: &Plan, step: AdamStep) -> Result<()> {
        let weights = &mut self.params[..plan.trainable_len];
        let moments = self.moment1.iter_mut().zip(&mut self.moment2);
        // A run that was begun in half precision elsewhere may have left updates out.
        let updates = step.step.saturating_sub(self.counters.scaling.skipped.into()).max(1) as i32;
        let correction1 = 1.0 - f64::from(step.beta1).powi(updates);
        let correction2 = 1.0 - f64::from(step.beta2).powi(updates);
        let rate = (f64::from(step.lr) / correction1) as f32;
        let root = (1.0 / correction2.sqrt()) as f32;
        for ((w, g), (m, v)) in weights.iter_mut().zip(&self.grads).zip(moments) {
            let g = g + step.weight_decay * *w;
            *m += (1.0 - step.beta1) * (g - *m);
            *v += (1.0 - step.beta2) * (g * g - *v);
            *w -= rate * *m / (v.sqrt() * root + step.eps);
        }
        Ok(())
    }

    fn peak_flops(&self) -> Option<f64> {
        Some(peak::flops_per_second(self.isa, &self.pool))
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }
}

fn length_mismatch(state: State, expected: usize, found: usize) -> Error {
    Error::Shape {
        node: format!("{state:?}"),
        expected: format!("{expected} values"),
        found: format!("{found}"),
    }
}

/// The processor as /proc/cpuinfo names it, or the architecture.
fn processor_name() -> String {
    std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|info| {
            let line = info.lines().find(|l| l.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_string())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_string())
}
