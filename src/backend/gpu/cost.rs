//! What every command of a lowered forward pass moves and computes; predict.rs says how long that takes.
//!
//! Bytes: each operand once per command; what blocks read again (halos of tiles, weights) is counted
//! apart, since it comes from L2. FLOPs: two per multiply-accumulate, the few of an epilogue or an
//! interpolation roughly, halos as often as they are computed.

use super::device::Element;
use super::launch::{self, Arg, CascadeShape, Command, Gemm, Launch, StagePart};
use super::lower::Program;
use crate::graph::{Plan, Step, Tensor};
use crate::ops::Op;

/// Rows and columns of the tile that a block of a matrix product makes, assumed.
const GEMM_TILE: (usize, usize) = (64, 64);

/// What does the arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// CUDA cores, f32.
    Fp32,
    /// CUDA cores in a BLAS's matrix product, f32.
    Fp32Gemm,
    /// CUDA cores in a matrix product of this program's kernels, f32.
    Fp32Tile,
    /// Tensor cores, f16 with f32 sums.
    Tensor,
}

/// Work of one command.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CommandCost {
    /// Kernel, or `gemm`.
    pub kernel: &'static str,
    /// Bytes read and written, each once.
    pub bytes: u64,
    /// Bytes read again, from L2.
    pub again: u64,
    /// Floating-point operations.
    pub flops: u64,
    /// What computes them.
    pub unit: Unit,
    /// Of the operations, those of the CUDA cores beside a unit that multiplies matrices.
    pub beside: u64,
    /// Bytes from L2 and operations of the CUDA cores that one block has left when all others are
    /// done.
    pub last: (u64, u64),
    /// Blocks of the launch.
    pub blocks: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
    /// Whether it is part of the launch before it, and begins with a grid barrier.
    pub behind_barrier: bool,
}

impl CommandCost {
    /// Whether it leaves an expanded tensor in 8 bits, or is a cascade over one.
    pub fn in_bytes(&self) -> bool {
        self.kernel.ends_with("_u8")
    }

    /// The kernel's name without storage type and tile.
    pub fn class(&self) -> &'static str {
        class(self.kernel)
    }
}

/// Work of every command of a program's forward pass, step by step, and of the commands that make
/// labels, in the order they run.
pub fn forward(plan: &Plan, program: &Program, element: Element) -> Vec<CommandCost> {
    let mut all = Vec::with_capacity(program.forward.len() + program.labels.len());
    for index in 0..plan.steps.len() {
        let group = Group::of(plan, program, index);
        let commands = program.step(index).iter();
        for command in commands {
            match command {
                Command::Gemm(gemm) => all.push(of_gemm(gemm)),
                Command::Launch(launch) => match &launch::stage_parts(launch)[..] {
                    [] => all.push(of_launch(&group, launch, element)),
                    parts => all.extend(of_parts(&group, launch, parts, element)),
                },
            }
        }
    }
    all.extend(program.labels.iter().map(|command| labels(plan, command, element)));
    all
}

/// The steps that the commands of one step do: itself, and those right behind it that have no
/// command of their own because its launch does them as well.
struct Group<'a> {
    plan: &'a Plan,
    /// The first of them in the plan.
    index: usize,
    steps: &'a [Step],
    /// All steps behind the group.
    rest: &'a [Step],
}

impl<'a> Group<'a> {
    fn of(plan: &'a Plan, program: &Program, first: usize) -> Self {
        // A concat without a command costs nothing: its operands were written in place.
        let taken = |&index: &usize| {
            program.step(index).is_empty() && !matches!(plan.steps[index].op, Op::Concat)
        };
        let end = first + 1 + (first + 1..plan.steps.len()).take_while(taken).count();
        Group { plan, index: first, steps: &plan.steps[first..end], rest: &plan.steps[end..] }
    }

    fn first(&self) -> &Step {
        &self.steps[0]
    }

    /// Elements that come from outside.
    fn read(&self) -> usize {
        let outputs: Vec<Tensor> = self.steps.iter().map(|step| step.output).collect();
        let inputs = self.steps.iter().enumerate().flat_map(|(at, step)| {
            let read = (0..step.inputs.len()).filter(|&i| step.op.reads(i));
            read.map(|i| step.inputs[i])
                .filter(|input| !outputs[..at].contains(input))
                .collect::<Vec<_>>()
        });
        inputs.map(|input| input.shape.len()).sum()
    }

    /// Elements that somebody else reads.
    fn written(&self) -> usize {
        let last = self.steps.len() - 1;
        let wanted = |tensor: &Tensor| self.rest.iter().any(|step| step.inputs.contains(tensor));
        let written = self.steps.iter().enumerate();
        let written = written.filter(|(at, step)| *at == last || wanted(&step.output));
        written.map(|(_, step)| step.output.shape.len()).sum()
    }

    fn parameters(&self) -> usize {
        self.steps.iter().map(|step| parameters(self.plan, &step.op)).sum()
    }

    fn macs(&self) -> usize {
        self.steps.iter().map(|step| step.op.cost(step.output.shape).macs as usize).sum()
    }
}

/// Launches among commands whose parts are listed one by one.
pub fn launches(costs: &[CommandCost]) -> usize {
    costs.iter().filter(|cost| !cost.behind_barrier).count()
}

/// Bytes of a step's operands, result and parameters, each once, with tensors stored as `element`:
/// what a kernel that does the whole step at once cannot avoid.
pub fn step_bytes(plan: &Plan, step: &Step, element: Element) -> u64 {
    let read = (0..step.inputs.len()).filter(|&i| step.op.reads(i));
    let tensors: usize = read.map(|i| step.inputs[i].shape.len()).sum();
    (element.size() * (tensors + step.output.shape.len()) + 4 * parameters(plan, &step.op)) as u64
}

/// Parameters that an operator reads.
fn parameters(plan: &Plan, op: &Op) -> usize {
    op.params().iter().map(|id| plan.params[id.0].len()).sum()
}

fn of_gemm(gemm: &Gemm) -> CommandCost {
    let Gemm { m, n, k, batch, .. } = *gemm;
    let shared = |stride: usize| if stride == 0 { 1 } else { batch };
    let operands = m * k * shared(gemm.a.batch_stride) + k * n * shared(gemm.b.batch_stride);
    let result = m * n * batch * if gemm.beta == 0.0 { 1 } else { 2 };
    CommandCost {
        kernel: "gemm",
        bytes: (operands * gemm.element.size() + result * gemm.result.size()) as u64,
        again: 0,
        flops: 2 * (m * n * k * batch) as u64,
        unit: match gemm.element {
            Element::F32 => Unit::Fp32Gemm,
            Element::F16 => Unit::Tensor,
        },
        beside: 0,
        last: (0, 0),
        blocks: m.div_ceil(GEMM_TILE.0) * n.div_ceil(GEMM_TILE.1) * batch,
        threads: 256,
        shared_bytes: 0,
        behind_barrier: false,
    }
}

fn of_launch(group: &Group, launch: &Launch, element: Element) -> CommandCost {
    let size = element.size();
    let step = group.first();
    let output = step.output.shape.len();
    let (read, written, macs) = (group.read(), group.written(), group.macs());
    let whole = size * (read + written) + 4 * group.parameters();
    // A launch over planes or tiles: grid y counts channels, grid z images.
    let planes = (launch.grid[1] * launch.grid[2]) as usize;
    let blocks = launch.grid.iter().map(|&n| n as usize).product::<usize>();
    let class = class(launch.kernel);
    match class {
        "decoder_sums" | "decoder_labels" => return fused_decoder(class, launch, element),
        "strided_block" | "strided_pair" => return strided(group, launch, whole),
        // By tensor cores but for the taps of its depthwise convolution.
        "stem_block" | "stem_block_rgb" if element == Element::F16 => {
            let beside = 18 * output as u64;
            let flops = 2 * macs as u64;
            return CommandCost { unit: Unit::Tensor, beside, ..of(launch, whole as u64, flops) };
        }
        _ => {}
    }
    let (bytes, again, flops) = match class {
        "copy" => (2 * size * planes * int(launch, 3), 0, 0),
        "conv1x1_epilogue" => {
            // What a matrix product has left, in f32 where it is not the result itself.
            let in_place = launch.args.first() == launch.args.get(1);
            let product = if in_place { size } else { 4 };
            let residual = if step.inputs.len() > 1 { size } else { 0 };
            (output * (product + residual + size), 0, 3 * output)
        }
        // A product in tiles: every block fetches weights (from L2), and x comes once per row of
        // tiles. All of an image's weights lie in its first column of blocks.
        "conv1x1" | "conv1x1_tile" => {
            let (rows, across) = (launch.grid[1] as usize, blocks / launch.grid[1] as usize);
            let again = (rows - 1) * step.inputs[0].shape.len();
            let weights = (across - 1) * group.parameters();
            (size * (read + written + group.parameters()), size * (again + weights), 2 * macs)
        }
        "pair" => {
            let weights = group.parameters();
            let moved = size * (read + written + weights) - in_bytes(group, launch, size);
            (moved, size * (blocks - 1) * weights, 2 * macs)
        }
        "depthwise_forward" => {
            let elements = planes * step.output.shape.plane();
            let input = planes * step.inputs[0].shape.plane();
            let before = if launch.args.get(1) == Some(&Arg::Null) { 0 } else { elements };
            (size * (input + before + elements), 0, 19 * elements)
        }
        "cascade_forward" | "cascade_walk" | "cascade_ahead" | "cascade_mma" => {
            let again = cascade_loads(step, launch).saturating_sub(read);
            let stored = if launch.kernel.ends_with("_u8") { 1 } else { size };
            (whole - in_bytes(group, launch, size), stored * again, 20 * (output + again))
        }
        "decoder_spatial"
        | "weighted_pool_gather"
        | "decoder_means"
        | "decoder_gates"
        | "meu_compose"
        | "meu_scores"
        | "scores_argmax" => decoder(class, launch, size, whole),
        // Four products and three sums per bilinear sample; gates besides.
        "resize_forward" => (whole, 0, 7 * output),
        "meu_fuse_forward" => (whole, 0, 10 * output),
        _ => (whole, 0, if macs > 0 { 2 * macs } else { read.max(written) }),
    };
    let products = step.op.kind() == "conv1x1" && macs > 0 && class != "conv1x1_epilogue";
    let unit = match (products, element) {
        (true, Element::F16) if launch.kernel.contains("_f16_") => Unit::Tensor,
        (true, Element::F32) => Unit::Fp32Tile,
        _ => Unit::Fp32,
    };
    CommandCost { unit, again: again as u64, ..of(launch, bytes as u64, flops as u64) }
}

fn labels(plan: &Plan, command: &Command, element: Element) -> CommandCost {
    let launch = match command {
        Command::Gemm(gemm) => return of_gemm(gemm),
        Command::Launch(launch) => launch,
    };
    let (scores, input) = (plan.logits.shape, plan.input.shape);
    let pixels = input.n * input.plane();
    let bytes = element.size() * scores.len() + pixels;
    of(launch, bytes as u64, (8 * scores.c * pixels) as u64)
}

fn of(launch: &Launch, bytes: u64, flops: u64) -> CommandCost {
    CommandCost {
        kernel: launch.kernel,
        bytes,
        again: 0,
        flops,
        unit: Unit::Fp32,
        beside: 0,
        last: (0, 0),
        blocks: launch.grid.iter().map(|&n| n as usize).product(),
        threads: launch.block.iter().map(|&n| n as usize).product(),
        shared_bytes: launch.shared_bytes as usize,
        behind_barrier: false,
    }
}

/// The parts of one launch, each as if it were by itself, with a barrier between them: a cascade does
/// one step, a pair two, or one where nothing is expanded. Their steps follow each other from that with
/// the launch on; a concat between them costs nothing.
fn of_parts<'a>(
    group: &Group<'a>,
    launch: &Launch,
    parts: &[Launch],
    element: Element,
) -> Vec<CommandCost> {
    let (plan, mut all) = (group.plan, &group.plan.steps[group.index..]);
    let mut costs = Vec::with_capacity(parts.len());
    for part in parts {
        let concats = all.iter().take_while(|step| matches!(step.op, Op::Concat)).count();
        let expands = StagePart::of(part) == Some(StagePart::Pair)
            && part.args.get(5).is_some_and(|weights| *weights != Arg::Null);
        let (steps, rest) = all[concats..].split_at(1 + usize::from(expands));
        all = rest;
        let own = Group { plan, index: group.index, steps, rest };
        let (kernel, behind_barrier) = (launch.kernel, !costs.is_empty());
        costs.push(CommandCost { kernel, behind_barrier, ..of_launch(&own, part, element) });
    }
    costs
}

/// Bytes, bytes read again and FLOPs of a launch of the collapsed decoder, by its arguments (the
/// kernels' parameters after their pointers); `whole` is that of all its step.
fn decoder(class: &str, launch: &Launch, size: usize, whole: usize) -> (usize, usize, usize) {
    let n = launch.grid[2] as usize;
    let at = |i: usize| int(launch, i);
    match class {
        "decoder_spatial" => {
            let (c1, c2, p1, p2) = (at(10), at(11), at(12), at(13));
            (n * size * ((c1 + 1) * p1 + (c2 + 1) * p2), 0, 2 * n * (c1 * p1 + c2 * p2))
        }
        "weighted_pool_gather" => {
            let (low, high) = (at(2) * at(3), at(4) * at(5));
            (n * (4 * low + size * high), 0, 8 * n * high)
        }
        "decoder_means" => {
            let (c3, c2, low, high) = (at(5), at(6), at(7), at(8));
            let bytes = size * (c3 * low + (c2 + 1) * high) + 4 * low;
            (n * bytes, n * 4 * (c3 - 1) * low, n * (3 * c3 * low + (c2 + 1) * high))
        }
        "decoder_gates" => {
            let (c3, c2, width2, width1) = (at(21), at(22), at(23), at(24));
            let (in1, classes) = (at(25), at(26));
            let gates = width2 * (2 * c3 + c2 + 1) + width1 * width2;
            let maps = (classes + c2) * width2 + (classes + in1) * width1;
            let composed = classes * (width2 * (c2 + 1) + width1 * (in1 + 1));
            let blocks = launch.grid[0] as usize * n;
            (4 * (gates + maps), 4 * (blocks - 1) * gates, 2 * (blocks * gates + n * composed))
        }
        "meu_compose" => {
            let (classes, width, inputs) = (at(6), at(7), at(8));
            let bytes = (classes + inputs + 1) * width + n * classes * (inputs + 1);
            (4 * bytes, 0, 2 * n * classes * width * (inputs + 1))
        }
        "meu_scores" => {
            let (classes, inputs, pixels) = (at(5), at(6), at(9) * at(10));
            (whole, 0, n * pixels * classes * (2 * inputs + 8))
        }
        _ => {
            let (classes, inputs) = (at(5), at(6));
            let (low, pixels, labels) = (at(7) * at(8), at(9) * at(10), at(11) * at(12));
            let bytes = size * (classes * low + (inputs + 1) * pixels) + labels;
            (n * bytes, 0, n * classes * (pixels * (2 * inputs + 8) + 8 * labels))
        }
    }
}

/// What a kernel that reads or writes its expanded tensor in 8 bits moves less than one that does not.
fn in_bytes(group: &Group, launch: &Launch, size: usize) -> usize {
    let saved = |tensor: &Tensor| (size - 1) * tensor.shape.len();
    let read = || saved(&group.first().inputs[0]);
    let written = || saved(&group.steps[group.steps.len() - 1].output);
    match launch.kernel {
        kernel if kernel.ends_with("_to_u8") => written(),
        kernel if kernel.ends_with("_u8") => {
            // A projection alone leaves halves.
            let alone = group.steps.len() == 1 && class(kernel) == "pair";
            read() + if alone { 0 } else { written() }
        }
        _ => 0,
    }
}

/// A launch for most of a strided block, whose steps move `whole` bytes. Halos are expanded as well.
fn strided(group: &Group, launch: &Launch, whole: usize) -> CommandCost {
    let x = group.first().inputs[0].shape;
    let blocks = launch.grid.iter().map(|&n| n as usize).product::<usize>();
    let pair = class(launch.kernel) == "strided_pair";
    // Behind pointers and non-linearities: how many branches are fine, and their dilations. Before the
    // strides of y: columns of a tile.
    let first = if pair { 11 } else { 4 };
    let branches = if pair { 4 } else { launch.grid[1] as usize };
    let tile_w = if pair { launch::STRIDED_TILE } else { int(launch, 27) };
    let tiles = launch.grid[0] as usize * x.n;
    let outputs = tiles * launch::STRIDED_TILE * tile_w;
    let fine = int(launch, first);
    let pixels = |branch: usize| {
        let stride = if branch < fine { 2 } else { 1 };
        launch::strided_pixels(x.c, tile_w, (stride, int(launch, first + 1 + branch)))
    };
    let expanded = (0..branches).map(pixels).sum::<usize>() * tiles;
    let taps = 18 * x.c * branches * outputs;
    let products = 2 * x.c * x.c * expanded + if pair { 16 * x.c * x.c * outputs } else { 0 };
    // Blocks of one branch read their share of the weights.
    let share = if pair { 1 } else { branches };
    let weights = group.parameters() * (blocks / share - 1);
    let again = Element::F16.size() * ((x.c * expanded).saturating_sub(x.len()) + weights);
    let (beside, flops) = (taps as u64, (products + taps) as u64);
    let again = again as u64;
    CommandCost { unit: Unit::Tensor, beside, again, ..of(launch, whole as u64, flops) }
}

/// A launch of the decoder in two, by its arguments.
fn fused_decoder(class: &str, launch: &Launch, element: Element) -> CommandCost {
    // Of a composed map, whatever the number of classes.
    const ROWS: usize = launch::MAP_ROWS;
    let (size, n) = (element.size(), launch.grid[2] as usize);
    let (at, blocks) = (|i: usize| int(launch, i), launch.grid[0] as usize * n);
    // Matrix products, what else is computed, bytes read again; bytes.
    let (products, others, again, bytes, last);
    if class == "decoder_sums" {
        let (c3, c2, width2, width1, c1) = (at(32), at(33), at(34), at(35), at(36));
        let (classes, low, high) = (at(37), at(38) * at(39), at(40) * at(41));
        let means = 2 * c3 + c2 + 1;
        // The tile's share of s3 and a pixel on every side.
        let around = (launch::SUMS_TILE.0 / 2 + 2) * (launch::SUMS_TILE.1 / 2 + 2) * blocks;
        let weights = classes * c3 + width2 * means + width1 * width2;
        let maps = (classes + c2) * width2 + (classes + c1) * width1;
        products = 2 * n * low * c3 * classes;
        others = 3 * n * high * c2 + 4 * around * c3;
        again = size * c3 * around.saturating_sub(n * low) + 8 * blocks * means;
        bytes = n * size * (c2 * high + (c3 + ROWS) * low) + 4 * (weights + maps);
        let gates = width2 * means + width1 * width2;
        let composed = ROWS * (width2 * (c2 + 1) + width1 * (c1 + 1));
        let floats = launch.grid[0] as usize * means + weights + maps;
        last = (4 * floats as u64, 2 * (gates + composed) as u64);
    } else {
        let (classes, c2, c1) = (at(8), at(9), at(10));
        let (low, quarter, half) = (at(11) * at(12), at(13) * at(14), at(15) * at(16));
        let (out_h, out_w) = (at(17), at(18));
        let region = |h: usize, w: usize| {
            let rows = (launch::LABELS.0.min(out_h) * h).div_ceil(out_h) + 1;
            let columns = (launch::LABELS.1.min(out_w) * w).div_ceil(out_w) + 1;
            blocks * rows.min(h) * columns.min(w)
        };
        // One pixel more around what the scores read of z.
        let (scores, z) = (region(at(15), at(16)), region(at(13) + 1, at(14) + 1));
        products = 2 * ROWS * (z * c2 + scores * c1);
        others = 9 * classes * (z + scores) + 8 * n * classes * out_h * out_w;
        again = size * (c2 * z.saturating_sub(n * quarter) + c1 * scores.saturating_sub(n * half));
        bytes = n * (size * (ROWS * low + c2 * quarter + c1 * half) + out_h * out_w);
        last = (0, 0);
    }
    let (unit, beside) = match element {
        Element::F16 => (Unit::Tensor, others as u64),
        Element::F32 => (Unit::Fp32, 0),
    };
    let flops = (products + others) as u64;
    CommandCost { unit, beside, last, again: again as u64, ..of(launch, bytes as u64, flops) }
}

/// Input elements that the blocks of a fused cascade load, halos included.
fn cascade_loads(step: &Step, launch: &Launch) -> usize {
    let (Op::Cascade(op), x, y) = (&step.op, step.inputs[0].shape, step.output.shape) else {
        return step.inputs[0].shape.len();
    };
    let shape = CascadeShape {
        dilations: &op.dilations,
        addition: op.addition,
        stride: op.stride,
        input: (x.h, x.w),
        output: (y.h, y.w),
    };
    // After pointers, two or three settings, dilations, weights, biases and the region.
    let first = if class(launch.kernel) == "cascade_forward" { 19 } else { 18 };
    let tile = (int(launch, first), int(launch, first + 1));
    shape.loaded(tile) * op.width() * x.n
}

/// The integer argument at a position; 0 where there is none.
fn int(launch: &Launch, at: usize) -> usize {
    match launch.args.get(at) {
        Some(Arg::I32(value)) => *value as usize,
        _ => 0,
    }
}

/// A kernel's name up to its storage type and what follows it.
fn class(kernel: &'static str) -> &'static str {
    let end = ["_f16", "_f32"].iter().filter_map(|storage| kernel.find(storage)).min();
    &kernel[..end.unwrap_or(kernel.len())]
}

#[cfg(test)]
#[path = "cost_tests.rs"]
mod tests;
