//! Blocks of a stage in one cooperative launch (kernels/stage_blocks.cu).

use super::{Lowering, Program, products};
use crate::backend::gpu::device::Element;
use crate::backend::gpu::launch::{self, Command, Launch, StagePart};
use crate::backend::gpu::variants::{Pairs, Products, Stage3};
use crate::graph::{Mode, Step};
use crate::ops::{Act, Op};

/// A projection that nothing is expanded behind, by the kernel of the pairs: as a part of such a launch,
/// where a cascade that can be one comes right before it, and of halves by itself as well, since that
/// kernel has all of x on its way at once.
pub(super) fn last_projection(low: &mut Lowering, step: &Step) -> bool {
    let possible = low.variants.pairs == Pairs::Fused && low.plan.mode != Mode::Training;
    let after_cascade = low.commands.last().is_some_and(|command| match command {
        Command::Launch(launch) => StagePart::of(launch) == Some(StagePart::Cascade),
        Command::Gemm(_) => false,
    });
    let part = low.variants.stage3 == Stage3::Persistent && after_cascade;
    let alone = low.variants.products == Products::Fused && low.element == Element::F16;
    let Op::Conv1x1(op) = &step.op else { return false };
    let wanted = possible && (part || alone) && op.act != Act::Sigmoid;
    wanted && products::projection(low, op, step)
}

/// Puts runs of launches into one each, where that is wanted and possible: the first one's step has it,
/// the others have no command.
pub(super) fn merge(low: &mut Lowering, program: &mut Program) {
    if low.variants.stage3 != Stage3::Persistent || low.plan.mode == Mode::Training {
        return;
    }
    let part = |command: &Command| match command {
        Command::Launch(launch) => StagePart::of(launch),
        Command::Gemm(_) => None,
    };
    let mut start = 0;
    while start < program.forward.len() {
        let parts: Vec<_> = program.forward[start..].iter().map(part).collect();
        let len = launch::stage_run(&parts);
        if let Some(merged) = merged(low, &program.forward[start..start + len]) {
            program.forward.splice(start..start + len, [Command::Launch(merged)]);
            for end in &mut program.step_ends {
                // Behind the run, in it, or before it.
                *end = if *end >= start + len { *end + 1 - len } else { (*end).min(start + 1) };
            }
        }
        start += 1;
    }
}

fn merged(low: &mut Lowering, run: &[Command]) -> Option<Launch> {
    let launch = |command: &Command| match command {
        Command::Launch(launch) => Some(launch.clone()),
        Command::Gemm(_) => None,
    };
    let parts: Vec<Launch> = run.iter().filter_map(launch).collect();
    if parts.is_empty() {
        return None;
    }
    let (barrier, limit) = (low.counters(1), low.shared_limit);
    launch::stage_blocks(&parts, low.element, barrier, low.variants.stage_weights, limit)
}
