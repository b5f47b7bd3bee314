//! Lowering: every step of a plan becomes kernel launches and matrix products, once per plan.

mod backward;
mod bytes;
mod decoder;
mod forward;
mod products;
mod scores;
mod stage;
mod stem;
mod strided;

use std::collections::HashMap;

use super::device::{Buffer, Element, Place};
use super::launch::{self, Arg, Command, Gemm, Launch};
use super::variants::Variants;
use crate::error::{Error, Result};
use crate::graph::{Mode, ParamId, Plan, Step, Tensor};
use crate::ops::Act;

/// Arguments of a launch, in the order of the kernel's parameters.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { vec![$($crate::backend::gpu::launch::Arg::from($arg)),*] };
}
pub(crate) use args;

/// Device memory that commands refer to. Absent vectors are those that the plan's mode never uses.
#[derive(Debug, Clone)]
pub struct Memory {
    /// Activations, gradients, saved tensors, as [`Element`].
    pub arena: Buffer,
    /// All parameters, f32.
    pub params: Buffer,
    /// The same in half precision, for matrix products of half-precision tensors.
    pub params_half: Option<Buffer>,
    /// Gradients of the trainable parameters, f32.
    pub grads: Option<Buffer>,
    /// Adam's moments, f32.
    pub moments: Option<[Buffer; 2]>,
    /// Mean and 1 / sqrt(var + eps) of every batch norm, f32.
    pub statistics: Buffer,
    /// Partial results of reductions, f32; copies, as [`Element`].
    pub scratch: Buffer,
    /// A batch of 8-bit RGB, N x H x W x 3, and what normalises it: three scales, three shifts (f32).
    pub rgb: Option<[Buffer; 2]>,
    /// Labels of a batch: read by the loss, or written by the argmax.
    pub labels: Buffer,
    /// `Control` of kernels/control.cuh.
    pub control: Buffer,
    /// Integers by which the blocks of a launch find each other: zero at first, and left by a launch as
    /// it needs them when it is repeated.
    pub counters: Buffer,
}

/// A plan as commands.
#[derive(Debug, Clone, Default)]
pub struct Program {
    /// Forward pass.
    pub forward: Vec<Command>,
    /// The first commands of a forward pass over 8-bit RGB, in the place of the first step's; none
    /// where the network does not begin with a convolution that can read it.
    pub stem_rgb: Option<Vec<Command>>,
    /// End of each step's commands in `forward`.
    pub step_ends: Vec<usize>,
    /// Scores to labels ([`Mode::Labels`]); none where the last step of `forward` makes them.
    pub labels: Vec<Command>,
    /// Loss and gradients ([`Mode::Training`]).
    pub backward: Vec<Command>,
    /// Ends in `backward` of the loss's commands and of each step's, the last step first.
    pub backward_ends: Vec<usize>,
    /// Adam from the gradients at hand ([`Mode::Training`]).
    pub update: Vec<Command>,
    /// Expanded tensors that are kept in 8 bits.
    pub in_bytes: usize,
    /// Bytes of scratch that the commands use.
    pub scratch_bytes: usize,
    /// Bytes of [`Memory::statistics`] that they use.
    pub statistics_bytes: usize,
    /// Bytes of [`Memory::counters`] that they use.
    pub counter_bytes: usize,
}

impl Program {
    /// The forward pass over 8-bit RGB, where there is one.
    pub fn forward_rgb(&self) -> Option<Vec<Command>> {
        let stem = self.stem_rgb.as_ref()?;
        let rest = &self.forward[*self.step_ends.first()?..];
        Some(stem.iter().chain(rest).cloned().collect())
    }

    /// The step that a command of `backward` belongs to; none of the loss's and of the last ones, for all
    /// parameters.
    pub fn backward_step(&self, command: usize) -> Option<usize> {
        let before = self.backward_ends.partition_point(|end| *end <= command);
        let steps = self.backward_ends.len().checked_sub(1)?;
        if before == 0 { None } else { steps.checked_sub(before) }
    }

    /// Every command, of whatever pass.
    pub fn all(&self) -> impl Iterator<Item = &Command> {
        let stem = self.stem_rgb.iter().flatten();
        let rest = [&self.forward, &self.labels, &self.backward, &self.update];
        stem.chain(rest.into_iter().flatten())
    }

    /// Commands of one forward step.
    pub fn step(&self, index: usize) -> &[Command] {
        let start = if index == 0 { 0 } else { self.step_ends[index - 1] };
        &self.forward[start..self.step_ends[index]]
    }
}

/// What a plan is lowered for.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Storage of the tensors.
    pub element: Element,
    /// Most shared memory of a block, in bytes.
    pub shared_limit: usize,
    /// Which kernels do the work.
    pub variants: Variants,
}

/// Lowers a plan.
///
/// # Errors
/// [`Error::Usage`] for tensors whose strides exceed what the kernels index.
pub fn lower(plan: &Plan, memory: &Memory, target: Target) -> Result<Program> {
    check_sizes(plan)?;
    let mut lowering = Lowering {
        plan,
        memory,
        element: target.element,
        shared_limit: target.shared_limit,
        variants: target.variants,
        commands: Vec::new(),
        scratch: 0,
        scratch_held: 0,
        scratch_peak: 0,
        statistics: HashMap::new(),
        statistics_bytes: 0,
        counter_bytes: 0,
        labelled: false,
        twins: Vec::new(),
        bytes: None,
        in_bytes: 0,
    };
    let mut program = Program::default();
    let mut decoder = decoder::find(plan, target.variants.decoder);
    // Steps that the launches of earlier ones have done as well: they have no command of their own.
    let mut done = 0;
    for (i, step) in plan.steps.iter().enumerate() {
        lowering.scratch = lowering.scratch_held;
        match &mut decoder {
            Some(decoder) if decoder.contain(i) => decoder.step(&mut lowering, i),
            _ if done > 0 => done -= 1,
            _ => {
                lowering.begin(step);
                done = several(&mut lowering, &plan.steps[i..]);
                if done == 0 {
                    forward::step(&mut lowering, step);
                } else {
                    done -= 1;
                }
            }
        }
        program.step_ends.push(lowering.commands.len());
    }
    program.forward = std::mem::take(&mut lowering.commands);
    stage::merge(&mut lowering, &mut program);
    if let Some(rgb) = memory.rgb
        && over_rgb(&mut lowering, &program, rgb)
    {
        program.stem_rgb = Some(std::mem::take(&mut lowering.commands));
    }
    if plan.mode == Mode::Labels && !lowering.labelled {
        forward::labels(&mut lowering);
        program.labels = std::mem::take(&mut lowering.commands);
    }
    if plan.mode == Mode::Training {
        lowering.scratch_held = 0;
        lowering.scratch = 0;
        backward::loss(&mut lowering);
        program.backward_ends.push(lowering.commands.len());
        for step in plan.steps.iter().rev() {
            lowering.scratch = 0;
            backward::step(&mut lowering, step);
            program.backward_ends.push(lowering.commands.len());
        }
        backward::unscale(&mut lowering);
        program.backward = std::mem::take(&mut lowering.commands);
        backward::update(&mut lowering);
        program.update = std::mem::take(&mut lowering.commands);
    }
    program.in_bytes = lowering.in_bytes;
    program.scratch_bytes = lowering.scratch_peak;
    program.statistics_bytes = lowering.statistics_bytes;
    program.counter_bytes = lowering.counter_bytes;
    Ok(program)
}

/// The first commands over 8-bit RGB, where there are such: of as many steps as in the forward pass.
fn over_rgb(low: &mut Lowering, program: &Program, rgb: [Buffer; 2]) -> bool {
    let plan = low.plan;
    let readers = plan.steps.iter().filter(|step| step.inputs.contains(&plan.input)).count();
    let Some(first) = plan.steps.first() else { return false };
    if readers != 1 || first.inputs != [plan.input] {
        return false;
    }
    match program.step(0) {
        [Command::Launch(launch)] if stem::is_block(launch) => {
            stem::block(low, &plan.steps, Some(rgb))
        }
        _ => forward::stem_rgb(low, rgb),
    }
}

/// The kernels that do several steps at once: how many they did, 0 where they do not apply.
fn several(low: &mut Lowering, steps: &[Step]) -> usize {
    let step = &steps[0];
    // Nothing else may come upon a tensor in bytes.
    if bytes::cascade(low, step) {
        1
    } else if stem::block(low, steps, None) {
        4
    } else if let Some(done) = strided::block(low, steps) {
        done
    } else if products::pair(low, steps) || products::subsampled(low, steps) {
        2
    } else if bytes::project(low, step) || stage::last_projection(low, step) {
        1
    } else {
        0
    }
}

/// Whether two tensors share memory.
fn overlap(a: &Tensor, b: &Tensor) -> bool {
    a.offset < b.offset + b.extent() && b.offset < a.offset + a.extent()
}

/// Whether a step reads what a tensor's memory holds now.
fn read_later(tensor: &Tensor, steps: &[Step]) -> bool {
    for step in steps {
        if step.inputs.iter().any(|input| overlap(input, tensor)) {
            return true;
        }
        // The plan gives memory away only when nobody needs it any more.
        if overlap(&step.output, tensor) {
            return false;
        }
    }
    false
}

/// Kernels take sizes and strides as `int`.
fn check_sizes(plan: &Plan) -> Result<()> {
    for step in &plan.steps {
        let grads = step.grad_inputs.iter().flatten().map(|slot| &slot.tensor);
        let tensors = step.inputs.iter().chain([&step.output]).chain(&step.saved).chain(grads);
        for tensor in tensors {
            if tensor.batch_stride > i32::MAX as usize {
                return Err(Error::Usage(format!(
                    "node {}: expected fewer than 2^31 elements per image, found {}; use a \
                     smaller --size",
                    step.name, tensor.shape
                )));
            }
        }
    }
    Ok(())
}

/// A kernel's name in both storage types.
struct Typed {
    f32: &'static str,
    f16: &'static str,
}

struct Lowering<'a> {
    plan: &'a Plan,
    memory: &'a Memory,
    element: Element,
    shared_limit: usize,
    variants: Variants,
    commands: Vec<Command>,
    scratch: usize,
    /// Scratch that later steps still read.
    scratch_held: usize,
    scratch_peak: usize,
    /// Places of batch norms' statistics, by the offsets of their saved tensors.
    statistics: HashMap<usize, usize>,
    statistics_bytes: usize,
    counter_bytes: usize,
    /// Whether the last step made labels of its scores.
    labelled: bool,
    /// Tensors with a second place in scratch.
    twins: Vec<Twin>,
    /// The expanded tensor that is in 8 bits at the moment.
    bytes: Option<bytes::Bytes>,
    /// How many were so far.
    in_bytes: usize,
}

/// A tensor that is now here, now there: what cannot be done in place goes to the other side.
struct Twin {
    tensor: Tensor,
    other: Place,
    /// Whether its values are at the other place.
    there: bool,
}

impl Lowering<'_> {
    fn launch(&mut self, launch: Launch) {
        self.commands.push(Command::Launch(launch));
    }

    fn gemm(&mut self, gemm: Gemm) {
        self.commands.push(Command::Gemm(gemm));
    }

    /// Most shared memory of a cascade's block.
    fn cascade_limit(&self) -> usize {
        match self.variants.cascade_kb {
            0 => self.shared_limit,
            kb => self.shared_limit.min(kb << 10),
        }
    }

    fn name(&self, typed: Typed) -> &'static str {
        match self.element {
            Element::F32 => typed.f32,
            Element::F16 => typed.f16,
        }
    }

    fn at(&self, tensor: &Tensor) -> Place {
        if let Some(twin) = self.twins.iter().find(|twin| twin.there && twin.tensor == *tensor) {
            return twin.other;
        }
        let byte_offset = tensor.offset * self.element.size();
        Place { buffer: self.memory.arena, byte_offset }
    }

    /// Whether a tensor is dense and nobody relies on its place.
    fn movable(&self, tensor: &Tensor) -> bool {
        let dense = tensor.plane_stride == tensor.shape.plane()
            && tensor.batch_stride == tensor.shape.c * tensor.plane_stride;
        let mut kept = self.plan.named.iter().map(|(_, tensor)| tensor).chain([&self.plan.logits]);
        dense && kept.all(|kept| kept != tensor)
    }

    /// Where a tensor is not at the moment, from now on its place; None for one whose place others
    /// rely on.
    fn other_side(&mut self, tensor: &Tensor) -> Option<Place> {
        if !self.movable(tensor) {
            return None;
        }
        let known = self.twins.iter().position(|twin| twin.tensor == *tensor);
        let index = known.unwrap_or_else(|| {
            let other = self.scratch((tensor.shape.len() * self.element.size()).div_ceil(4));
            self.hold_scratch();
            self.twins.push(Twin { tensor: *tensor, other, there: false });
            self.twins.len() - 1
        });
        self.twins[index].there = !self.twins[index].there;
        Some(self.at(tensor))
    }

    /// Lets a step write its result where the plan has it, whatever was there before.
    fn begin(&mut self, step: &Step) {
        for twin in &mut self.twins {
            twin.there &= twin.tensor != step.output || step.inputs.contains(&twin.tensor);
        }
    }

    fn param(&self, id: ParamId) -> Place {
        Place { buffer: self.memory.params, byte_offset: 4 * self.plan.param(id).start }
    }

    /// Weights as a matrix product of stored tensors reads them.
    fn param_stored(&self, id: ParamId) -> Place {
        match self.memory.params_half {
            Some(buffer) if self.element == Element::F16 => {
                Place { buffer, byte_offset: 2 * self.plan.param(id).start }
            }
            _ => self.param(id),
        }
    }

    /// Gradient of a parameter; training memory holds all of them.
    fn grad(&self, id: ParamId) -> Place {
        let buffer = self.memory.grads.unwrap_or(self.memory.scratch);
        Place { buffer, byte_offset: 4 * self.plan.param(id).start }
    }

    /// Scratch for the step at hand, `len` floats.
    fn scratch(&mut self, len: usize) -> Place {
        const ALIGN: usize = 256;
        let place = Place { buffer: self.memory.scratch, byte_offset: self.scratch };
        self.scratch += (4 * len).next_multiple_of(ALIGN);
        self.scratch_peak = self.scratch_peak.max(self.scratch);
        place
    }

    /// Scratch for `len` elements of a tensor.
    fn scratch_stored(&mut self, len: usize) -> Place {
        self.scratch((len * self.element.size()).div_ceil(4))
    }

    /// Where a batch norm's saved tensor 1 x 2 x 1 x C is: in memory of its own, f32 whatever the
    /// arena stores. All of a plan's saved tensors are alive at the loss, so no two share an offset.
    fn statistics(&mut self, saved: &Tensor) -> Place {
        let end = &mut self.statistics_bytes;
        let byte_offset = *self.statistics.entry(saved.offset).or_insert_with(|| {
            let start = *end;
            *end += 4 * saved.shape.len();
            start
        });
        Place { buffer: self.memory.statistics, byte_offset }
    }

    /// `len` counters for one launch alone.
    fn counters(&mut self, len: usize) -> Place {
        let place = Place { buffer: self.memory.counters, byte_offset: self.counter_bytes };
        self.counter_bytes += 4 * len;
        place
    }

    /// Keeps what scratch there is for the steps that follow.
    fn hold_scratch(&mut self) {
        self.scratch_held = self.scratch;
    }

    /// out[i] = sum over parts of partial[part][i].
    fn sum_partials(&mut self, partial: Place, out: Place, parts: usize, len: usize) {
        let args = args![partial, out, parts, len];
        self.launch(launch::vector("sum_partials_f32", len, args));
    }

    /// y = x, or y += x.
    fn copy(&mut self, x: &Tensor, y: &Tensor, accumulate: bool) {
        let (from, to) = (self.at(x), self.at(y));
        self.copy_places(from, x, to, y, accumulate);
    }

    /// [`Lowering::copy`] where a side is not in the arena; `x` and `y` lend shape and strides.
    fn copy_places(&mut self, from: Place, x: &Tensor, to: Place, y: &Tensor, accumulate: bool) {
        let name = self.name(Typed { f32: "copy_f32", f16: "copy_f16" });
        let args = args![
            from,
            to,
            accumulate,
            x.shape.plane(),
            x.batch_stride,
            x.plane_stride,
            y.batch_stride,
            y.plane_stride,
        ];
        self.launch(launch::planes(name, x.shape, args));
    }
}

/// Non-linearities by the numbers of common.cuh.
fn act_code(act: Act) -> Arg {
    Arg::I32(match act {
        Act::None => 0,
        Act::Relu => 1,
        Act::Sigmoid => 2,
    })
}
