//! Operators of the inference rewrites, each by itself: subsampling, the weighted mean, and the
//! decoder's modules as maps onto class scores.

use super::{Lowering, Typed, args};
use crate::backend::gpu::device::Place;
use crate::backend::gpu::launch;
use crate::graph::{Shape, Step, Tensor};
use crate::ops::MeuScores;

pub(super) fn subsample(low: &mut Lowering, x: &Tensor, y: &Tensor) {
    let name = low.name(Typed { f32: "subsample_f32", f16: "subsample_f16" });
    let args = args![
        low.at(x),
        low.at(y),
        x.shape.w,
        y.shape.w,
        y.shape.plane(),
        x.batch_stride,
        x.plane_stride,
        y.batch_stride,
        y.plane_stride,
    ];
    low.launch(launch::planes(name, y.shape, args));
}

/// U^T s for every image, in scratch.
pub(super) fn gather(low: &mut Lowering, size: Shape, weights: &Tensor) -> Place {
    let gathered = low.scratch(size.n * size.plane());
    let name = low.name(Typed { f32: "weighted_pool_gather_f32", f16: "weighted_pool_gather_f16" });
    let args = args![
        low.at(weights),
        gathered,
        size.h,
        size.w,
        weights.shape.h,
        weights.shape.w,
        weights.batch_stride,
    ];
    low.launch(launch::tiles(name, size.with_channels(1), args));
    gathered
}

pub(super) fn weighted_pool(low: &mut Lowering, x: &Tensor, weights: &Tensor, y: &Tensor) {
    let gathered = gather(low, x.shape, weights);
    let name = low.name(Typed { f32: "weighted_pool_f32", f16: "weighted_pool_f16" });
    let args = args![
        low.at(x),
        low.at(weights),
        gathered,
        low.at(y),
        x.shape.c,
        x.shape.plane(),
        weights.shape.plane(),
        x.batch_stride,
        x.plane_stride,
        weights.batch_stride,
        y.batch_stride,
        y.plane_stride,
    ];
    low.launch(launch::block_per_plane(name, y.shape, args));
}

/// Elements of a composed map, per image.
pub(super) fn map_len(op: &MeuScores) -> usize {
    op.classes * (op.in_channels + 1)
}

pub(super) fn meu_scores(low: &mut Lowering, op: &MeuScores, step: &Step) {
    let (ca, n) = (&step.inputs[2], step.output.shape.n);
    let composed = low.scratch(n * map_len(op));
    let name = low.name(Typed { f32: "meu_compose_f32", f16: "meu_compose_f16" });
    let args = args![
        low.param(op.mix),
        low.param(op.low),
        low.param(op.low_bias),
        low.param(op.bias),
        low.at(ca),
        composed,
        op.classes,
        op.width,
        op.in_channels,
        ca.batch_stride,
        ca.plane_stride,
    ];
    low.launch(launch::elements(name, map_len(op), n, args));
    scores(low, op, step, composed);
}

/// A module's scores by its composed map.
pub(super) fn scores(low: &mut Lowering, op: &MeuScores, step: &Step, composed: Place) {
    let (t, x, sa, y) = (&step.inputs[0], &step.inputs[1], &step.inputs[3], &step.output);
    let name = low.name(Typed { f32: "meu_scores_f32", f16: "meu_scores_f16" });
    let args = args![
        low.at(t),
        low.at(x),
        low.at(sa),
        composed,
        low.at(y),
        op.classes,
        op.in_channels,
        t.shape.h,
        t.shape.w,
        y.shape.h,
        y.shape.w,
        t.batch_stride,
        t.plane_stride,
        x.batch_stride,
        x.plane_stride,
        sa.batch_stride,
        y.batch_stride,
        y.plane_stride,
    ];
    low.launch(launch::scores(name, y.shape, op.in_channels, args));
}
