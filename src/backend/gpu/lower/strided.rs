//! Strided blocks on the even grid: expansion and branches in one launch, with the projection and the
//! next block's expansion as well where there is room.

use super::{Lowering, act_code, args, bytes, overlap, read_later};
use crate::backend::gpu::device::Element;
use crate::backend::gpu::launch::{self, Arg};
use crate::backend::gpu::variants::Strided;
use crate::graph::{Mode, ParamId, Step, Tensor};
use crate::ops::{Act, Cascade, Conv1x1, Norm, Op};

/// Steps that `graph/passes/even_grid.rs` makes of a strided block, up to its projection.
const STEPS: usize = 6;

/// A strided block that kernels/strided_block.cu has.
struct Block<'a> {
    x: &'a Tensor,
    /// Results of all branches, one after the other.
    y: &'a Tensor,
    /// What only the steps of the block read.
    between: [&'a Tensor; 3],
    fine: (&'a Conv1x1, &'a Cascade),
    coarse: (&'a Conv1x1, &'a Cascade),
}

/// Lowers a strided block: how many steps one launch does, none where they are others, the kernels do
/// not have them, the plan does not leave room for it, or it is not wanted.
pub(super) fn block(low: &mut Lowering, steps: &[Step]) -> Option<usize> {
    let wanted = low.plan.mode != Mode::Training && low.element == Element::F16;
    let block = find(steps).filter(|_| wanted)?;
    match low.variants.strided {
        Strided::Separate => None,
        Strided::Fused => branches(low, &block, &steps[STEPS..]),
        Strided::Paired => {
            paired(low, &block, &steps[STEPS..]).or_else(|| branches(low, &block, &steps[STEPS..]))
        }
    }
}

fn find(steps: &[Step]) -> Option<Block<'_>> {
    let [fine_conv, fine, coarse_x, coarse_conv, coarse, concat, ..] = steps else { return None };
    let (
        Op::Conv1x1(fine_expand),
        Op::Cascade(fine_op),
        Op::Subsample,
        Op::Conv1x1(coarse_expand),
        Op::Cascade(coarse_op),
        Op::Concat,
    ) = (&fine_conv.op, &fine.op, &coarse_x.op, &coarse_conv.op, &coarse.op, &concat.op)
    else {
        return None;
    };
    let (x, y) = (&fine_conv.inputs[0], &concat.output);
    let width = fine_op.width();
    let linked = fine.inputs == [fine_conv.output]
        && coarse_x.inputs == [*x]
        && coarse_conv.inputs == [coarse_x.output]
        && coarse.inputs == [coarse_conv.output]
        && concat.inputs == [fine.output, coarse.output]
        && fine.output == y.channels(0, fine_op.channels)
        && coarse.output == y.channels(fine_op.channels, coarse_op.channels);
    let expands = [(fine_conv, fine_expand), (coarse_conv, coarse_expand)];
    let plain = expands.iter().all(|(step, op)| {
        step.inputs.len() == 1
            && op.act == Act::Relu
            && op.in_channels == width
            && op.bias.is_some()
    });
    let shapes = plain
        && coarse_op.width() == width
        && (fine_op.stride, coarse_op.stride) == (2, 1)
        && !coarse_op.addition
        && fine_op.dilations.len() + coarse_op.dilations.len() <= 4;
    (linked && shapes).then_some(Block {
        x,
        y,
        between: [&fine_conv.output, &coarse_x.output, &coarse_conv.output],
        fine: (fine_expand, fine_op),
        coarse: (coarse_expand, coarse_op),
    })
}

impl Block<'_> {
    fn width(&self) -> usize {
        self.fine.1.width()
    }

    /// Dilations on their grid, fine branches first.
    fn dilations(&self) -> Vec<usize> {
        self.fine.1.dilations.iter().chain(&self.coarse.1.dilations).copied().collect()
    }

    /// Stride and dilation of every branch.
    fn branches(&self) -> impl Iterator<Item = (usize, usize)> + Clone {
        let sides = [(2, self.fine.1), (1, self.coarse.1)];
        sides.into_iter().flat_map(|(stride, op)| op.dilations.iter().map(move |d| (stride, *d)))
    }

    /// Dilations, and offsets of all parameters; None where batch norms are not folded.
    fn args(&self, low: &Lowering) -> Option<Vec<Arg>> {
        let (fine, coarse) = (self.fine.1, self.coarse.1);
        let (Norm::Folded(fine_bias), Norm::Folded(coarse_bias)) = (&fine.norm, &coarse.norm)
        else {
            return None;
        };
        let four = |values: Vec<usize>| {
            (0..4).map(move |i| Arg::from(values.get(i).copied().unwrap_or(0)))
        };
        let start = |id: ParamId| low.plan.param(id).start;
        let starts =
            |a: &[ParamId], b: &[ParamId]| four(a.iter().chain(b).map(|&id| start(id)).collect());
        let mut args = args![fine.dilations.len()];
        args.extend(four(self.dilations()));
        args.extend([self.fine.0, self.coarse.0].map(|op| Arg::from(start(op.weight))));
        for op in [self.fine.0, self.coarse.0] {
            args.push(Arg::from(start(op.bias?)));
        }
        args.extend(starts(&fine.weights, &coarse.weights));
        args.extend(starts(fine_bias, coarse_bias));
        args.extend(args![self.x.shape.h, self.x.shape.w, self.y.shape.h, self.y.shape.w]);
        args.extend(args![self.x.batch_stride, self.x.plane_stride]);
        Some(args)
    }
}

/// Expansion and branches.
fn branches(low: &mut Lowering, block: &Block, later: &[Step]) -> Option<usize> {
    let safe =
        !overlap(block.x, block.y) && !block.between.iter().any(|tensor| read_later(tensor, later));
    let tiling = launch::strided_tiling(block.width(), block.branches(), low.shared_limit)?;
    let (half_params, y) = (low.memory.params_half.filter(|_| safe)?, block.y);
    let mut args = args![low.at(block.x), half_params, low.memory.params, low.at(y)];
    args.extend(block.args(low)?);
    args.extend(args![tiling.tile_w, y.batch_stride, y.plane_stride]);
    low.launch(launch::strided_block(tiling, y.shape, block.dilations().len(), args));
    Some(STEPS)
}

/// Expansion and branches, projection, and the expansion of its result.
fn paired(low: &mut Lowering, block: &Block, steps: &[Step]) -> Option<usize> {
    let [project, expand, later @ ..] = steps else { return None };
    let (Op::Conv1x1(project_op), Op::Conv1x1(expand_op)) = (&project.op, &expand.op) else {
        return None;
    };
    let (x, width, y, z) = (block.x, block.width(), &project.output, &expand.output);
    let linked = project.inputs == [*block.y] && expand.inputs == [*y];
    let fits = block.dilations().len() == 4
        && (project_op.in_channels, project_op.out_channels) == (4 * width, width)
        && expand_op.out_channels == 4 * width
        && [project_op.act, expand_op.act].iter().all(|act| *act != Act::Sigmoid);
    // An expansion that is to leave bytes is a pair's, which can.
    if bytes::left_by_expansion(low, &steps[1..]).is_some() {
        return None;
    }
    // Blocks write y and z while others still read x.
    let given_away = |tensor: &Tensor| overlap(y, tensor) || overlap(z, tensor);
    let mut unwritten = block.between.into_iter().chain([block.y]);
    let safe = !overlap(x, y)
        && !overlap(x, z)
        && !overlap(y, z)
        && !unwritten.any(|tensor| !given_away(tensor) && read_later(tensor, later));
    let tiling = launch::strided_pair_tiling(width, block.branches(), low.shared_limit)?;
    let half_params = low.memory.params_half.filter(|_| linked && fits && safe)?;
    let mut args = args![low.at(x), half_params, low.memory.params];
    for (op, tensor) in [(project_op, y), (expand_op, z)] {
        let bias = op.bias.map(|b| low.param(b));
        args.extend(args![low.param_stored(op.weight), bias, low.at(tensor)]);
    }
    args.extend([project_op.act, expand_op.act].map(act_code));
    args.extend(block.args(low)?);
    args.extend(args![y.batch_stride, y.plane_stride, z.batch_stride, z.plane_stride]);
    low.launch(launch::strided_pair(tiling, y.shape, args));
    Some(STEPS + 2)
}
