//! Forward steps, inference and training.

use super::products::{self, dense_like};
use super::{Lowering, Typed, act_code, args, scores};
use crate::backend::gpu::device::{Buffer, Place};
use crate::backend::gpu::launch::{self, Arg, CascadeShape, CascadeTiling};
use crate::backend::gpu::variants::{CascadePlanes, Stage3};
use crate::graph::{ParamId, Shape, Step, Tensor};
use crate::ops::batch_norm::{EPS, MOMENTUM};
use crate::ops::{Act, BnParams, Cascade, Conv3x3, Norm, Op};

pub(super) fn step(low: &mut Lowering, step: &Step) {
    let (input, output) = (|i: usize| &step.inputs[i], &step.output);
    match &step.op {
        Op::Input { .. } => {}
        Op::Subsample => scores::subsample(low, input(0), output),
        Op::WeightedPool => scores::weighted_pool(low, input(0), input(1), output),
        Op::MeuScores(op) => scores::meu_scores(low, op, step),
        Op::Conv3x3(op) => conv3x3(low, op, input(0), output),
        Op::Conv1x1(op) => products::conv1x1(low, op, input(0), step.inputs.get(1), output),
        Op::BatchNorm(op) => {
            let saved = Saved::of(low, &step.saved[0]);
            let norm = Norms { x: input(0), y: output, params: &op.params, saved, act: op.act };
            batch_norm(low, &norm, step.inputs.get(1));
        }
        Op::Cascade(op) => match &op.norm {
            Norm::Folded(biases) => cascade(low, op, biases, input(0), output),
            Norm::Batch(norms) => cascade_training(low, op, norms, step),
        },
        Op::Activation(op) => {
            let name =
                low.name(Typed { f32: "activation_forward_f32", f16: "activation_forward_f16" });
            let x = input(0);
            let args = args![
                low.at(x),
                low.at(output),
                act_code(op.act),
                x.shape.plane(),
                x.batch_stride,
                x.plane_stride,
                output.batch_stride,
                output.plane_stride,
            ];
            low.launch(launch::planes(name, x.shape, args));
        }
        Op::Add => {
            let name = low.name(Typed { f32: "add_forward_f32", f16: "add_forward_f16" });
            let (a, b) = (input(0), input(1));
            let args = args![
                low.at(a),
                low.at(b),
                low.at(output),
                a.shape.plane(),
                a.batch_stride,
                a.plane_stride,
                b.batch_stride,
                b.plane_stride,
                output.batch_stride,
                output.plane_stride,
            ];
            low.launch(launch::planes(name, a.shape, args));
        }
        Op::Concat => {
            let mut channel = 0;
            for x in &step.inputs {
                // The plan lets producers write straight into the result where it can.
                let place = output.channels(channel, x.shape.c);
                if *x != place {
                    low.copy(x, &place, false);
                }
                channel += x.shape.c;
            }
        }
        Op::GlobalAvgPool => {
            let name =
                low.name(Typed { f32: "global_pool_forward_f32", f16: "global_pool_forward_f16" });
            let x = input(0);
            let args = args![
                low.at(x),
                low.at(output),
                x.shape.plane(),
                x.batch_stride,
                x.plane_stride,
                output.batch_stride,
                output.plane_stride,
            ];
            low.launch(launch::block_per_plane(name, x.shape, args));
        }
        Op::ChannelMean => {
            let name = low
                .name(Typed { f32: "channel_mean_forward_f32", f16: "channel_mean_forward_f16" });
            let x = input(0);
            let args = args![
                low.at(x),
                low.at(output),
                x.shape.c,
                x.shape.plane(),
                x.batch_stride,
                x.plane_stride,
                output.batch_stride,
            ];
            low.launch(launch::pixels(name, x.shape, args));
        }
        Op::MeuFuse(op) => meu_fuse(low, step, op.spatial),
        Op::Resize => {
            let name = low.name(Typed { f32: "resize_forward_f32", f16: "resize_forward_f16" });
            let x = input(0);
            let args = args![
                low.at(x),
                low.at(output),
                x.shape.c,
                x.shape.h,
                x.shape.w,
                output.shape.h,
                output.shape.w,
                x.batch_stride,
                x.plane_stride,
                output.batch_stride,
                output.plane_stride,
            ];
            low.launch(launch::tiles_of_channels(name, output.shape, args));
        }
    }
}

/// Class of the largest score at the input's resolution, to the label buffer.
pub(super) fn labels(low: &mut Lowering) {
    let (scores, size) = (&low.plan.logits, low.plan.input.shape);
    let name = low.name(Typed { f32: "resize_argmax_f32", f16: "resize_argmax_f16" });
    let args = args![
        low.at(scores),
        low.memory.labels,
        scores.shape.c,
        scores.shape.h,
        scores.shape.w,
        size.h,
        size.w,
        scores.batch_stride,
        scores.plane_stride,
    ];
    low.launch(launch::tiles(name, size.with_channels(1), args));
}

fn conv3x3(low: &mut Lowering, op: &Conv3x3, x: &Tensor, y: &Tensor) {
    let name = low.name(Typed { f32: "conv3x3_forward_f32", f16: "conv3x3_forward_f16" });
    let args = args![
        low.at(x),
        low.param(op.weight),
        op.bias.map(|b| low.param(b)),
        low.at(y),
        op.in_channels,
        op.out_channels,
        x.shape.h,
        x.shape.w,
        y.shape.h,
        y.shape.w,
        op.stride,
        op.act == Act::Relu,
        x.batch_stride,
        x.plane_stride,
        y.batch_stride,
        y.plane_stride,
    ];
    low.launch(launch::conv3x3_forward(name, y.shape, op.stride, args));
}

/// The stem over 8-bit RGB, where the network begins with one.
pub(super) fn stem_rgb(low: &mut Lowering, [rgb, normalisation]: [Buffer; 2]) -> bool {
    let plan = low.plan;
    let Some(Step { op: Op::Conv3x3(op), output: y, .. }) = plan.steps.first() else {
        return false;
    };
    if op.in_channels != 3 {
        return false;
    }
    let name = low.name(Typed { f32: "conv3x3_rgb_f32", f16: "conv3x3_rgb_f16" });
    let args = args![
        rgb,
        normalisation,
        low.param(op.weight),
        op.bias.map(|b| low.param(b)),
        low.at(y),
        op.out_channels,
        plan.input.shape.h,
        plan.input.shape.w,
        y.shape.h,
        y.shape.w,
        op.stride,
        op.act == Act::Relu,
        y.batch_stride,
        y.plane_stride,
    ];
    low.launch(launch::conv3x3_forward(name, y.shape, op.stride, args));
    true
}

/// Mean and 1 / sqrt(var + eps) of a batch norm's channels, as the forward leaves them.
#[derive(Clone, Copy)]
pub(super) struct Saved {
    pub mean: Place,
    pub invstd: Place,
}

impl Saved {
    /// A saved tensor 1 x 2 x 1 x C.
    pub fn of(low: &mut Lowering, tensor: &Tensor) -> Self {
        let mean = low.statistics(tensor);
        Saved { mean, invstd: mean.offset(4 * tensor.shape.w) }
    }

    /// The part from channel `c` on.
    pub fn from(self, c: usize) -> Self {
        Saved { mean: self.mean.offset(4 * c), invstd: self.invstd.offset(4 * c) }
    }
}

/// One batch norm: y = act(norm(x)).
struct Norms<'a> {
    x: &'a Tensor,
    y: &'a Tensor,
    params: &'a BnParams,
    saved: Saved,
    act: Act,
}

fn batch_norm(low: &mut Lowering, norm: &Norms, residual: Option<&Tensor>) {
    let (x, y, shape) = (norm.x, norm.y, norm.x.shape);
    let pixels = shape.plane();
    let pieces = launch::pieces(pixels);
    let partial = low.scratch(2 * shape.c * shape.n * pieces);
    let args = args![low.at(x), partial, pixels, x.batch_stride, x.plane_stride];
    let name =
        low.name(Typed { f32: "batch_norm_statistics_f32", f16: "batch_norm_statistics_f16" });
    low.launch(launch::reduction(name, pixels, shape.c, shape.n, args));
    let args = args![
        partial,
        norm.saved.mean,
        norm.saved.invstd,
        low.param(norm.params.running_mean),
        low.param(norm.params.running_var),
        shape.n,
        pieces,
        pixels,
        EPS,
        MOMENTUM,
    ];
    low.launch(launch::warp_per_channel("batch_norm_finalize_f32", shape.c, args));
    let args = args![
        low.at(x),
        residual.map(|r| low.at(r)),
        low.at(y),
        low.param(norm.params.weight),
        low.param(norm.params.bias),
        norm.saved.mean,
        norm.saved.invstd,
        act_code(norm.act),
        pixels,
        x.batch_stride,
        x.plane_stride,
        residual.map_or(0, |r| r.batch_stride),
        residual.map_or(0, |r| r.plane_stride),
        y.batch_stride,
        y.plane_stride,
    ];
    let name = low.name(Typed { f32: "batch_norm_apply_f32", f16: "batch_norm_apply_f16" });
    low.launch(launch::planes(name, shape, args));
}

/// Where planes are, with their strides in elements of whatever they hold.
#[derive(Clone, Copy)]
pub(super) struct Planes {
    pub at: Place,
    pub batch_stride: usize,
    pub plane_stride: usize,
}

impl Planes {
    pub fn of(low: &Lowering, tensor: &Tensor) -> Self {
        let Tensor { batch_stride, plane_stride, .. } = *tensor;
        Planes { at: low.at(tensor), batch_stride, plane_stride }
    }
}

fn cascade_shape<'a>(op: &'a Cascade, x: &Tensor, y: &Tensor) -> CascadeShape<'a> {
    CascadeShape {
        dilations: &op.dilations,
        addition: op.addition,
        stride: op.stride,
        input: (x.shape.h, x.shape.w),
        output: (y.shape.h, y.shape.w),
    }
}

/// How cascade_walk.cu covers a plane, where it can.
pub(super) fn walk_tiling(
    low: &Lowering,
    op: &Cascade,
    x: &Tensor,
    y: &Tensor,
) -> Option<CascadeTiling> {
    cascade_shape(op, x, y).walk_tiling(low.element, low.cascade_limit())
}

/// Dilations of up to four branches, then the offsets of their weights and of their biases.
fn branch_args(low: &Lowering, op: &Cascade, biases: &[ParamId]) -> Vec<Arg> {
    let four =
        |values: Vec<usize>| (0..4).map(move |i| Arg::from(values.get(i).copied().unwrap_or(0)));
    let offset = |ids: &[ParamId]| ids.iter().map(|&id| low.plan.param(id).start).collect();
    let offsets = four(offset(&op.weights)).chain(four(offset(biases)));
    four(op.dilations.clone()).chain(offsets).collect()
}

/// Arguments of cascade_walk.cu for an input of this shape and result.
pub(super) fn walk_args(
    low: &Lowering,
    op: &Cascade,
    biases: &[ParamId],
    tiling: CascadeTiling,
    shape: Shape,
    [x, y]: [Planes; 2],
) -> Vec<Arg> {
    let mut args = args![x.at, y.at, low.memory.params, op.dilations.len(), op.addition];
    args.extend(branch_args(low, op, biases));
    args.extend(args![tiling.region, tiling.tile_h, tiling.tile_w, shape.h, shape.w]);
    args.extend(args![x.batch_stride, x.plane_stride, y.batch_stride, y.plane_stride]);
    args
}

/// Whether a tensor's planes begin at whole vectors of 16 bytes.
fn in_vectors(low: &Lowering, tensor: &Tensor) -> bool {
    let wide = 16 / low.element.size();
    [tensor.offset, tensor.batch_stride, tensor.plane_stride]
        .iter()
        .all(|at| at.is_multiple_of(wide))
}

/// A folded cascade in one launch, its planes as the tensors are stored.
#[derive(Clone, Copy)]
enum Planar {
    Walk(CascadeTiling),
    Ahead(CascadeTiling),
    /// With the binary logarithm of the warps side by side in each branch.
    Mma(CascadeTiling, [usize; 4]),
}

impl Planar {
    fn tiling(&self) -> CascadeTiling {
        match self {
            Planar::Walk(tiling) | Planar::Ahead(tiling) | Planar::Mma(tiling, _) => *tiling,
        }
    }
}

/// The cascade that fetches all branches first, where it can and is asked for.
fn ahead(low: &Lowering, op: &Cascade, x: &Tensor, y: &Tensor) -> Option<Planar> {
    // stage_blocks.cu has the walk.
    let possible =
        low.variants.stage3 == Stage3::Separate && in_vectors(low, x) && in_vectors(low, y);
    let asked = matches!(low.variants.cascade, CascadePlanes::Ahead | CascadePlanes::Mma);
    if !possible || !asked {
        return None;
    }
    let (shape, limit) = (cascade_shape(op, x, y), low.cascade_limit());
    let planes = op.width() * x.shape.n;
    let mma = match low.variants.cascade {
        CascadePlanes::Mma => shape.mma_tiling(low.element, planes, limit),
        _ => None,
    };
    let ahead = || shape.ahead_tiling(low.element, planes, limit).map(Planar::Ahead);
    mma.map(|(tiling, across)| Planar::Mma(tiling, across)).or_else(ahead)
}

/// Folded cascade: all branches in one launch where a tile fits into shared memory, else branch by
/// branch.
fn cascade(low: &mut Lowering, op: &Cascade, biases: &[ParamId], x: &Tensor, y: &Tensor) {
    let shape = cascade_shape(op, x, y);
    let walk = || match low.variants.cascade {
        CascadePlanes::Wide => None,
        _ => walk_tiling(low, op, x, y).map(Planar::Walk),
    };
    let planar = ahead(low, op, x, y).or_else(walk);
    let tiling = planar.map(|p| p.tiling()).or_else(|| shape.tiling(low.cascade_limit()));
    let whole = tiling.is_some_and(|t| (t.tile_h, t.tile_w) == shape.output);
    // Blocks that share a plane would overwrite what a neighbour's halo still needs.
    let mut target = low.at(y);
    let source = if x.offset == y.offset && !whole {
        let from = low.at(x);
        match low.other_side(y).filter(|_| tiling.is_some()) {
            Some(place) => {
                target = place;
                (from, *x)
            }
            None => {
                let copy = low.scratch((x.shape.len() * low.element.size()).div_ceil(4));
                let dense = dense_like(x);
                low.copy_places(from, x, copy, &dense, false);
                (copy, dense)
            }
        }
    } else {
        (low.at(x), *x)
    };
    if let Some(planar) = planar {
        let planes = |at: Place, tensor: &Tensor| Planes { at, ..Planes::of(low, tensor) };
        let planes = [planes(source.0, &source.1), planes(target, y)];
        let tiling = planar.tiling();
        let mut args = walk_args(low, op, biases, tiling, x.shape, planes);
        let warps = match planar {
            Planar::Walk(tiling) => tiling.walk_warps(),
            Planar::Ahead(_) | Planar::Mma(..) => launch::AHEAD_WARPS,
        };
        let name = match planar {
            Planar::Walk(_) => Typed { f32: "cascade_walk_f32", f16: "cascade_walk_f16" },
            Planar::Ahead(_) => Typed { f32: "cascade_ahead_f32", f16: "cascade_ahead_f16" },
            // Its tiling is there for f16 only.
            Planar::Mma(..) => Typed { f32: "cascade_ahead_f32", f16: "cascade_mma_f16" },
        };
        if let Planar::Mma(_, across) = planar {
            args.extend(across.map(Arg::from));
        }
        let name = low.name(name);
        low.launch(launch::cascade_warps(name, warps, tiling, y.shape, op.width(), args));
        return;
    }
    match tiling {
        Some(tiling) => {
            let mut args = args![source.0, target, low.memory.params];
            args.extend(args![op.dilations.len(), op.addition, op.stride]);
            args.extend(branch_args(low, op, biases));
            args.extend(args![
                tiling.region,
                tiling.tile_h,
                tiling.tile_w,
                x.shape.h,
                x.shape.w,
                y.shape.h,
                y.shape.w,
                source.1.batch_stride,
                source.1.plane_stride,
                y.batch_stride,
                y.plane_stride,
            ]);
            let name = low.name(Typed { f32: "cascade_forward_f32", f16: "cascade_forward_f16" });
            low.launch(launch::cascade_forward(name, tiling, y.shape, op.width(), args));
        }
        None => {
            for (i, bias) in biases.iter().enumerate() {
                let bias = Some(low.param(*bias));
                branch(low, op, i, source, y, y, bias);
            }
        }
    }
}

/// u_i = D_i(x_i + y_{i-1}), with bias and ReLU where a bias is given.
fn branch(
    low: &mut Lowering,
    op: &Cascade,
    i: usize,
    (place, x): (Place, Tensor),
    y: &Tensor,
    u: &Tensor,
    bias: Option<Place>,
) {
    let width = op.width();
    let name = low.name(Typed { f32: "depthwise_forward_f32", f16: "depthwise_forward_f16" });
    let before = (op.addition && i > 0).then(|| y.channels((i - 1) * width, width));
    let u = u.channels(i * width, width);
    let args = args![
        place.offset(i * width * x.plane_stride * low.element.size()),
        before.map(|b| low.at(&b)),
        low.param(op.weights[i]),
        bias,
        low.at(&u),
        bias.is_some(),
        op.dilations[i],
        op.stride,
        x.shape.h,
        x.shape.w,
        u.shape.h,
        u.shape.w,
        x.batch_stride,
        x.plane_stride,
        y.batch_stride,
        y.plane_stride,
        u.batch_stride,
        u.plane_stride,
    ];
    low.launch(launch::tiles(name, u.shape, args));
}

fn cascade_training(low: &mut Lowering, op: &Cascade, norms: &[BnParams], step: &Step) {
    let (x, y, u, width) = (&step.inputs[0], &step.output, &step.saved[0], op.width());
    let saved = Saved::of(low, &step.saved[1]);
    for (i, params) in norms.iter().enumerate() {
        let source = (low.at(x), *x);
        branch(low, op, i, source, y, u, None);
        let channels = |t: &Tensor| t.channels(i * width, width);
        let norm = Norms {
            x: &channels(u),
            y: &channels(y),
            params,
            saved: saved.from(i * width),
            act: Act::Relu,
        };
        batch_norm(low, &norm, None);
    }
}

fn meu_fuse(low: &mut Lowering, step: &Step, spatial: bool) {
    let name = low.name(Typed { f32: "meu_fuse_forward_f32", f16: "meu_fuse_forward_f16" });
    let (h, l, ca, y) = (&step.inputs[0], &step.inputs[1], &step.inputs[2], &step.output);
    let sa = spatial.then(|| &step.inputs[3]);
    let args = args![
        low.at(h),
        low.at(l),
        low.at(ca),
        sa.map(|sa| low.at(sa)),
        low.at(y),
        y.shape.c,
        h.shape.h,
        h.shape.w,
        y.shape.h,
        y.shape.w,
        h.batch_stride,
        h.plane_stride,
        l.batch_stride,
        l.plane_stride,
        ca.batch_stride,
        ca.plane_stride,
        sa.map_or(0, |sa| sa.batch_stride),
        y.batch_stride,
        y.plane_stride,
    ];
    low.launch(launch::tiles_of_channels(name, y.shape, args));
}
