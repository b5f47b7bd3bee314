//! The stem and the block of stage 1 in one launch.

use super::{Lowering, Typed, act_code, args, overlap, read_later};
use crate::backend::gpu::device::Buffer;
use crate::backend::gpu::launch::{self, Launch};
use crate::backend::gpu::variants::Stem;
use crate::graph::{Mode, ParamId, Shape, Step};
use crate::ops::{Act, Cascade, Conv1x1, Conv3x3, Norm, Op};

/// Channels that kernels/stem_block.cu is written for.
const CHANNELS: usize = 16;

/// Whether this is the launch for all of it.
pub(super) fn is_block(launch: &Launch) -> bool {
    launch.kernel.starts_with("stem_block")
}

/// Lowers the first four steps of a network as one launch, over 8-bit RGB where that is given (pixels
/// and normalisation); false where they are others, the plan does
/// not leave room for it, or it is not wanted.
pub(super) fn block(low: &mut Lowering, steps: &[Step], rgb: Option<[Buffer; 2]>) -> bool {
    let [stem, expand, cascade, project, later @ ..] = steps else { return false };
    let (Op::Conv3x3(stem_op), Op::Conv1x1(expand_op), Op::Cascade(depth), Op::Conv1x1(project_op)) =
        (&stem.op, &expand.op, &cascade.op, &project.op)
    else {
        return false;
    };
    let Norm::Folded(depth_bias) = &depth.norm else { return false };
    let (x, s, y) = (&stem.inputs[0], &stem.output, &project.output);
    let linked = expand.inputs == [*s]
        && cascade.inputs == [expand.output]
        && project.inputs == [cascade.output, *s];
    let safe = !overlap(x, s)
        && !overlap(x, y)
        && !read_later(&expand.output, later)
        && !read_later(&cascade.output, later);
    let (Some(stem_bias), Some(expand_bias), Some(project_bias)) =
        (stem_op.bias, expand_op.bias, project_op.bias)
    else {
        return false;
    };
    let wanted = low.plan.mode != Mode::Training && low.variants.stem == Stem::Fused;
    let fits_memory = launch::stem_block_shared(low.element) <= low.shared_limit;
    let shapes = fits(stem_op, x.shape, s.shape)
        && pointwise(expand_op, Act::Relu)
        && plain(depth)
        && (pointwise(project_op, Act::None) || pointwise(project_op, Act::Relu));
    if !(wanted && linked && safe && shapes && fits_memory) {
        return false;
    }
    let (name, mut args) = match rgb {
        Some([pixels, normalisation]) => {
            let typed = Typed { f32: "stem_block_rgb_f32", f16: "stem_block_rgb_f16" };
            (low.name(typed), args![pixels, normalisation])
        }
        None => {
            let typed = Typed { f32: "stem_block_f32", f16: "stem_block_f16" };
            (low.name(typed), args![low.at(x), x.batch_stride, x.plane_stride])
        }
    };
    let weights: [(ParamId, ParamId); 4] = [
        (stem_op.weight, stem_bias),
        (expand_op.weight, expand_bias),
        (depth.weights[0], depth_bias[0]),
        (project_op.weight, project_bias),
    ];
    for (weight, bias) in weights {
        args.extend(args![low.param(weight), low.param(bias)]);
    }
    args.extend(args![
        low.at(s),
        low.at(y),
        act_code(project_op.act),
        x.shape.h,
        x.shape.w,
        y.shape.h,
        y.shape.w,
        s.batch_stride,
        s.plane_stride,
        y.batch_stride,
        y.plane_stride,
    ]);
    low.launch(launch::stem_block(name, low.element, y.shape, args));
    true
}

fn fits(op: &Conv3x3, x: Shape, y: Shape) -> bool {
    op.in_channels == 3
        && op.out_channels == CHANNELS
        && op.stride == 2
        && op.act == Act::Relu
        && (y.h, y.w) == (x.h.div_ceil(2), x.w.div_ceil(2))
}

fn pointwise(op: &Conv1x1, act: Act) -> bool {
    op.in_channels == CHANNELS && op.out_channels == CHANNELS && op.act == act
}

fn plain(op: &Cascade) -> bool {
    op.channels == CHANNELS && op.stride == 1 && op.dilations == [1]
}
