//! Expansion and branches of a strided block on the even grid, in one launch.

use super::{Lowering, args, overlap, read_later};
use crate::backend::gpu::device::Element;
use crate::backend::gpu::launch::{self, Arg};
use crate::backend::gpu::variants::Strided;
use crate::graph::{Mode, ParamId, Step};
use crate::ops::{Act, Cascade, Conv1x1, Norm, Op};

/// Lowers the steps that `graph/passes/even_grid.rs` makes of a strided block, up to its projection;
/// false where they are others, kernels/strided_block.cu does not have them, the plan does not leave
/// room for it, or it is not wanted.
pub(super) fn block(low: &mut Lowering, steps: &[Step]) -> bool {
    let [fine_conv, fine, coarse_x, coarse_conv, coarse, concat, later @ ..] = steps else {
        return false;
    };
    let (
        Op::Conv1x1(fine_expand),
        Op::Cascade(fine_op),
        Op::Subsample,
        Op::Conv1x1(coarse_expand),
        Op::Cascade(coarse_op),
        Op::Concat,
    ) = (&fine_conv.op, &fine.op, &coarse_x.op, &coarse_conv.op, &coarse.op, &concat.op)
    else {
        return false;
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
    let between = [fine_conv, coarse_x, coarse_conv];
    let safe = !overlap(x, y) && !between.iter().any(|step| read_later(&step.output, later));
    let expands = [(fine_conv, fine_expand), (coarse_conv, coarse_expand)];
    let relu = expands
        .iter()
        .all(|(step, op)| step.inputs.len() == 1 && op.act == Act::Relu && op.in_channels == width);
    let branches = fine_op.dilations.len() + coarse_op.dilations.len();
    let shapes = relu
        && coarse_op.width() == width
        && (fine_op.stride, coarse_op.stride) == (2, 1)
        && !coarse_op.addition
        && branches <= 4;
    let wanted = low.plan.mode != Mode::Training
        && low.element == Element::F16
        && low.variants.strided == Strided::Fused;
    let (Some(fine_bias), Some(coarse_bias)) = (fine_expand.bias, coarse_expand.bias) else {
        return false;
    };
    let sides = [(2, fine_op), (1, coarse_op)];
    let sides =
        sides.into_iter().flat_map(|(stride, op)| op.dilations.iter().map(move |d| (stride, *d)));
    let tiling = launch::strided_tiling(width, sides, low.shared_limit);
    let (Some(tiling), Some(half_params)) = (tiling, low.memory.params_half) else { return false };
    if !(wanted && linked && safe && shapes) {
        return false;
    }
    let Some((weights, biases)) = branch_params(fine_op, coarse_op) else { return false };
    let four =
        |values: Vec<usize>| (0..4).map(move |i| Arg::from(values.get(i).copied().unwrap_or(0)));
    let start = |id: ParamId| low.plan.param(id).start;
    let starts = |ids: &[ParamId]| four(ids.iter().map(|&id| start(id)).collect());
    let mut args = args![low.at(x), half_params, low.memory.params, low.at(y)];
    args.extend(args![fine_op.dilations.len()]);
    args.extend(four(fine_op.dilations.iter().chain(&coarse_op.dilations).copied().collect()));
    let conv = |op: &Conv1x1| start(op.weight);
    args.extend(args![
        conv(fine_expand),
        conv(coarse_expand),
        start(fine_bias),
        start(coarse_bias)
    ]);
    args.extend(starts(&weights).chain(starts(&biases)));
    args.extend(args![
        x.shape.h,
        x.shape.w,
        y.shape.h,
        y.shape.w,
        x.batch_stride,
        x.plane_stride,
        y.batch_stride,
        y.plane_stride,
    ]);
    low.launch(launch::strided_block(tiling, y.shape, branches, args));
    true
}

/// Weights and biases of the branches, fine ones first.
fn branch_params(fine: &Cascade, coarse: &Cascade) -> Option<(Vec<ParamId>, Vec<ParamId>)> {
    let (Norm::Folded(fine_bias), Norm::Folded(coarse_bias)) = (&fine.norm, &coarse.norm) else {
        return None;
    };
    let all = |a: &[ParamId], b: &[ParamId]| a.iter().chain(b).copied().collect();
    Some((all(&fine.weights, &coarse.weights), all(fine_bias, coarse_bias)))
}
