//! Loss, backward steps and the update. Every parameter belongs to one operator, so its gradient is
//! overwritten, never added to. Parameters' gradients are f32 whatever the arena stores.

use super::forward::Saved;
use super::products::planes_matrix;
use super::{Lowering, Typed, act_code, args};
use crate::backend::gpu::device::{Element, Place};
use crate::backend::gpu::launch::{self, Arg, Gemm, Matrix};
use crate::backend::gpu::variants::Products;
use crate::graph::{GradSlot, Shape, Step, Tensor};
use crate::ops::{Act, BnParams, Cascade, Conv1x1, Conv3x3, Norm, Op};

/// Cross-entropy of the logits, and their gradient.
pub(super) fn loss(low: &mut Lowering) {
    let Some(grad) = low.plan.grad_logits else { return };
    let logits = low.plan.logits;
    let parts = launch::pixel_blocks(logits.shape);
    let partial = low.scratch(parts);
    let memory = low.memory;
    let args = args![
        low.at(&logits),
        memory.labels,
        low.at(&grad),
        partial,
        memory.control,
        logits.shape.c,
        logits.shape.plane(),
        logits.batch_stride,
        logits.plane_stride,
        grad.batch_stride,
        grad.plane_stride,
    ];
    let name = low.name(Typed { f32: "cross_entropy_f32", f16: "cross_entropy_f16" });
    low.launch(launch::pixels(name, logits.shape, args));
    let args = args![partial, memory.control, parts];
    low.launch(launch::warp_per_channel("cross_entropy_finish_f32", 1, args));
}

/// Takes the loss scale out of the parameters' gradients again.
pub(super) fn unscale(low: &mut Lowering) {
    let (Some(grads), Element::F16) = (low.memory.grads, low.element) else { return };
    let len = low.plan.trainable_len;
    low.launch(launch::vector("unscale_f32", len, args![grads, low.memory.control, len]));
}

/// One Adam update of everything trainable.
pub(super) fn update(low: &mut Lowering) {
    let memory = low.memory;
    let (Some(grads), Some([first, second])) = (memory.grads, memory.moments) else { return };
    let args = args![memory.control, low.element == Element::F16];
    low.launch(launch::warp_per_channel("adam_prepare", 1, args));
    let len = low.plan.trainable_len;
    let rounded = memory.params_half.map(Place::from);
    let args = args![memory.params, rounded, grads, first, second, memory.control, len];
    low.launch(launch::vector("adam_f32", len, args));
}

pub(super) fn step(low: &mut Lowering, step: &Step) {
    let Some(dy) = &step.grad_output else { return };
    let slot = |i: usize| step.grad_inputs.get(i).copied().flatten();
    let x = || &step.inputs[0];
    match &step.op {
        // The last three are refused in training plans.
        Op::Input { .. } | Op::Subsample | Op::WeightedPool | Op::MeuScores(_) => {}
        Op::Conv3x3(op) => conv3x3(low, op, x(), dy),
        Op::Conv1x1(op) => conv1x1(low, op, x(), dy, slot(0)),
        Op::BatchNorm(op) => {
            let norm = Norms {
                x: *x(),
                y: (op.act != Act::None).then_some(step.output),
                dy: *dy,
                dy2: None,
                params: &op.params,
                saved: Saved::of(low, &step.saved[0]),
            };
            if let Some(dx) = slot(0) {
                let target = (low.at(&dx.tensor), dx.tensor, dx.accumulate);
                batch_norm(low, &norm, target, slot(1));
            }
        }
        Op::Cascade(op) => {
            if let (Norm::Batch(norms), Some(dx)) = (&op.norm, slot(0)) {
                cascade(low, op, norms, step, dy, dx);
            }
        }
        Op::Activation(op) => {
            if let Some(dx) = slot(0) {
                activation(low, op.act, &step.output, dy, dx);
            }
        }
        Op::Add => {
            for dx in [slot(0), slot(1)].into_iter().flatten() {
                low.copy(dy, &dx.tensor, dx.accumulate);
            }
        }
        Op::Concat => {
            let mut channel = 0;
            for (i, x) in step.inputs.iter().enumerate() {
                if let Some(dx) = slot(i) {
                    low.copy(&dy.channels(channel, x.shape.c), &dx.tensor, dx.accumulate);
                }
                channel += x.shape.c;
            }
        }
        Op::GlobalAvgPool => {
            if let Some(dx) = slot(0) {
                global_pool(low, dy, dx);
            }
        }
        Op::ChannelMean => {
            if let Some(dx) = slot(0) {
                channel_mean(low, dy, dx);
            }
        }
        Op::MeuFuse(op) => meu_fuse(low, step, dy, op.spatial),
        Op::Resize => {
            if let Some(dx) = slot(0) {
                resize(low, dy, dx);
            }
        }
    }
}

fn activation(low: &mut Lowering, act: Act, y: &Tensor, dy: &Tensor, dx: GradSlot) {
    let to = &dx.tensor;
    let args = args![
        low.at(y),
        low.at(dy),
        low.at(to),
        act_code(act),
        dx.accumulate,
        y.shape.plane(),
        y.batch_stride,
        y.plane_stride,
        dy.batch_stride,
        dy.plane_stride,
        to.batch_stride,
        to.plane_stride,
    ];
    let name = low.name(Typed { f32: "activation_backward_f32", f16: "activation_backward_f16" });
    low.launch(launch::planes(name, y.shape, args));
}

fn global_pool(low: &mut Lowering, dy: &Tensor, dx: GradSlot) {
    let to = &dx.tensor;
    let args = args![
        low.at(dy),
        low.at(to),
        dx.accumulate,
        to.shape.plane(),
        dy.batch_stride,
        dy.plane_stride,
        to.batch_stride,
        to.plane_stride,
    ];
    let name = low.name(Typed { f32: "global_pool_backward_f32", f16: "global_pool_backward_f16" });
    low.launch(launch::planes(name, to.shape, args));
}

fn channel_mean(low: &mut Lowering, dy: &Tensor, dx: GradSlot) {
    let to = &dx.tensor;
    let args = args![
        low.at(dy),
        low.at(to),
        dx.accumulate,
        to.shape.c,
        to.shape.plane(),
        dy.batch_stride,
        to.batch_stride,
        to.plane_stride,
    ];
    let name =
        low.name(Typed { f32: "channel_mean_backward_f32", f16: "channel_mean_backward_f16" });
    low.launch(launch::planes(name, to.shape, args));
}

fn resize(low: &mut Lowering, dy: &Tensor, dx: GradSlot) {
    let to = &dx.tensor;
    let args = args![
        low.at(dy),
        low.at(to),
        dx.accumulate,
        to.shape.h,
        to.shape.w,
        dy.shape.h,
        dy.shape.w,
        dy.batch_stride,
        dy.plane_stride,
        to.batch_stride,
        to.plane_stride,
    ];
    let name = low.name(Typed { f32: "resize_backward_f32", f16: "resize_backward_f16" });
    low.launch(launch::tiles(name, to.shape, args));
}

/// db[c] = sum over n, p of dY[n][c][p].
fn bias_gradient(low: &mut Lowering, dy: &Tensor, out: Place) {
    let (shape, pixels) = (dy.shape, dy.shape.plane());
    let parts = shape.n * launch::pieces(pixels);
    let partial = low.scratch(parts * shape.c);
    let args = args![low.at(dy), partial, pixels, dy.batch_stride, dy.plane_stride];
    let name = low.name(Typed { f32: "channel_sum_f32", f16: "channel_sum_f16" });
    low.launch(launch::reduction(name, pixels, shape.c, shape.n, args));
    low.sum_partials(partial, out, parts, shape.c);
}

fn conv3x3(low: &mut Lowering, op: &Conv3x3, x: &Tensor, dy: &Tensor) {
    let (pixels, pairs) = (dy.shape.plane(), op.out_channels * op.in_channels);
    let parts = dy.shape.n * launch::pieces(pixels);
    let partial = low.scratch(parts * pairs * 9);
    let args = args![
        low.at(x),
        low.at(dy),
        partial,
        op.in_channels,
        x.shape.h,
        x.shape.w,
        dy.shape.h,
        dy.shape.w,
        op.stride,
        x.batch_stride,
        x.plane_stride,
        dy.batch_stride,
        dy.plane_stride,
    ];
    let n = dy.shape.n;
    let name =
        low.name(Typed { f32: "conv3x3_backward_weight_f32", f16: "conv3x3_backward_weight_f16" });
    low.launch(launch::reduction(name, pixels, pairs, n, args));
    let grad = low.grad(op.weight);
    low.sum_partials(partial, grad, parts, pairs * 9);
    if let Some(bias) = op.bias {
        let grad = low.grad(bias);
        bias_gradient(low, dy, grad);
    }
}

/// dW = sum over n of dY X^T (a product per image into scratch, added up in order), db = sum of dY,
/// dX = W^T dY.
fn conv1x1(low: &mut Lowering, op: &Conv1x1, x: &Tensor, dy: &Tensor, dx: Option<GradSlot>) {
    let (inp, out, n) = (op.in_channels, op.out_channels, x.shape.n);
    let matrix = |at: Place, batch_stride: usize, transposed: bool| Matrix {
        at,
        row_stride: inp,
        batch_stride,
        transposed,
    };
    let grad = low.grad(op.weight);
    if low.element == Element::F32 && low.variants.products == Products::Fused {
        let pixels = x.shape.plane();
        let tiling = launch::weight_tiling(out, inp, pixels, n);
        let partial = low.scratch(n * tiling.pieces * out * inp);
        let mut args = args![low.at(dy), low.at(x), partial, out, inp, pixels, tiling.piece];
        args.extend(args![dy.batch_stride, dy.plane_stride, x.batch_stride, x.plane_stride]);
        low.launch(launch::conv1x1_backward_weight(tiling, n, args));
        low.sum_partials(partial, grad, n * tiling.pieces, out * inp);
    } else {
        let partial = low.scratch(n * out * inp);
        low.gemm(Gemm {
            m: out,
            n: inp,
            k: x.shape.plane(),
            batch: n,
            a: planes_matrix(low, dy),
            b: Matrix { transposed: true, ..planes_matrix(low, x) },
            c: matrix(partial, out * inp, false),
            beta: 0.0,
            element: low.element,
            result: Element::F32,
        });
        low.sum_partials(partial, grad, n, out * inp);
    }
    if let Some(bias) = op.bias {
        let grad = low.grad(bias);
        bias_gradient(low, dy, grad);
    }
    if let Some(dx) = dx {
        low.gemm(Gemm {
            m: inp,
            n: x.shape.plane(),
            k: out,
            batch: n,
            a: matrix(low.param_stored(op.weight), 0, true),
            b: planes_matrix(low, dy),
            c: planes_matrix(low, &dx.tensor),
            beta: if dx.accumulate { 1.0 } else { 0.0 },
            element: low.element,
            result: low.element,
        });
    }
}

/// One batch norm's backward; `dy2` is a second gradient of y, at a place of its own.
struct Norms<'a> {
    x: Tensor,
    /// The output where it gates the gradient.
    y: Option<Tensor>,
    dy: Tensor,
    dy2: Option<(Place, Tensor)>,
    params: &'a BnParams,
    saved: Saved,
}

fn batch_norm(
    low: &mut Lowering,
    norm: &Norms,
    (dx, dx_like, accumulate): (Place, Tensor, bool),
    dresidual: Option<GradSlot>,
) {
    let (x, dy, shape, pixels) = (&norm.x, &norm.dy, norm.x.shape, norm.x.shape.plane());
    let pieces = launch::pieces(pixels);
    let partial = low.scratch(2 * shape.c * shape.n * pieces);
    let coefficients = low.scratch(2 * shape.c);
    let operands = |low: &Lowering| {
        args![low.at(x), norm.y.map(|y| low.at(&y)), low.at(dy), norm.dy2.map(|(place, _)| place),]
    };
    let strides = |t: Option<Tensor>| -> [Arg; 2] {
        t.map_or([0, 0].map(Arg::I32), |t| [t.batch_stride.into(), t.plane_stride.into()])
    };
    let operand_strides: Vec<Arg> = [Some(*x), norm.y, Some(*dy), norm.dy2.map(|d| d.1)]
        .into_iter()
        .flat_map(strides)
        .collect();

    let mut args = operands(low);
    args.extend(args![norm.saved.mean, partial, pixels]);
    args.extend(operand_strides.clone());
    let name = low
        .name(Typed { f32: "batch_norm_backward_sums_f32", f16: "batch_norm_backward_sums_f16" });
    low.launch(launch::reduction(name, pixels, shape.c, shape.n, args));

    let args = args![
        partial,
        norm.saved.invstd,
        low.grad(norm.params.weight),
        low.grad(norm.params.bias),
        coefficients,
        shape.n,
        pieces,
        pixels,
    ];
    low.launch(launch::warp_per_channel("batch_norm_backward_finalize_f32", shape.c, args));

    let mut args = operands(low);
    args.extend(args![
        low.param(norm.params.weight),
        norm.saved.mean,
        norm.saved.invstd,
        coefficients,
        dx,
        dresidual.map(|slot| low.at(&slot.tensor)),
        accumulate,
        dresidual.is_some_and(|slot| slot.accumulate),
        pixels,
    ]);
    args.extend(operand_strides);
    args.extend(strides(Some(dx_like)));
    args.extend(strides(dresidual.map(|slot| slot.tensor)));
    let name = low
        .name(Typed { f32: "batch_norm_backward_apply_f32", f16: "batch_norm_backward_apply_f16" });
    low.launch(launch::planes(name, shape, args));
}

/// A dense tensor of `shape` at a place of its own.
fn dense(shape: Shape) -> Tensor {
    let plane_stride = shape.plane();
    Tensor { offset: 0, shape, plane_stride, batch_stride: shape.c * plane_stride }
}

/// From the last branch to the first: g_i = dy_i + ds_{i+1}, du_i = norm backward of g_i where
/// y_i > 0, dD_i from du_i and s_i, ds_i = D_i^T du_i, dx_i = ds_i.
fn cascade(
    low: &mut Lowering,
    op: &Cascade,
    norms: &[BnParams],
    step: &Step,
    dy: &Tensor,
    dx: GradSlot,
) {
    let (x, y, u, width) = (&step.inputs[0], &step.output, &step.saved[0], op.width());
    let saved = Saved::of(low, &step.saved[1]);
    let (fine, coarse) = (dense(x.shape.with_channels(width)), dense(y.shape.with_channels(width)));
    let du = low.scratch_stored(coarse.shape.len());
    // Where dx is added to, ds_i is needed apart from it.
    let apart = dx.accumulate.then(|| low.scratch_stored(fine.shape.len()));
    let held = low.scratch;
    let mut carried: Option<(Place, Tensor)> = None;
    for i in (0..norms.len()).rev() {
        low.scratch = held;
        let part = |t: &Tensor| t.channels(i * width, width);
        let norm = Norms {
            x: part(u),
            y: Some(part(y)),
            dy: part(dy),
            dy2: carried.filter(|_| op.addition),
            params: &norms[i],
            saved: saved.from(i * width),
        };
        batch_norm(low, &norm, (du, coarse, false), None);

        let x_i = part(x);
        let before = (op.addition && i > 0).then(|| y.channels((i - 1) * width, width));
        depthwise_weight(low, op, i, &x_i, before, (du, coarse));

        let dx_i = part(&dx.tensor);
        let ds = apart.map_or((low.at(&dx_i), dx_i), |place| (place, fine));
        let args = args![
            du,
            low.param(op.weights[i]),
            ds.0,
            op.dilations[i],
            op.stride,
            x.shape.h,
            x.shape.w,
            y.shape.h,
            y.shape.w,
            coarse.batch_stride,
            coarse.plane_stride,
            ds.1.batch_stride,
            ds.1.plane_stride,
        ];
        let name = low
            .name(Typed { f32: "depthwise_backward_data_f32", f16: "depthwise_backward_data_f16" });
        low.launch(launch::tiles(name, x_i.shape, args));
        if apart.is_some() {
            let to = low.at(&dx_i);
            low.copy_places(ds.0, &ds.1, to, &dx_i, true);
        }
        carried = Some(ds);
    }
}

fn depthwise_weight(
    low: &mut Lowering,
    op: &Cascade,
    i: usize,
    x: &Tensor,
    before: Option<Tensor>,
    (du, du_like): (Place, Tensor),
) {
    let (width, n, pixels) = (op.width(), x.shape.n, du_like.shape.plane());
    let parts = n * launch::pieces(pixels);
    let partial = low.scratch(parts * width * 9);
    let args = args![
        low.at(x),
        before.map(|b| low.at(&b)),
        du,
        partial,
        op.dilations[i],
        op.stride,
        x.shape.h,
        x.shape.w,
        du_like.shape.h,
        du_like.shape.w,
        x.batch_stride,
        x.plane_stride,
        before.map_or(0, |b| b.batch_stride),
        before.map_or(0, |b| b.plane_stride),
        du_like.batch_stride,
        du_like.plane_stride,
    ];
    let name = low
        .name(Typed { f32: "depthwise_backward_weight_f32", f16: "depthwise_backward_weight_f16" });
    low.launch(launch::reduction(name, pixels, width, n, args));
    let grad = low.grad(op.weights[i]);
    low.sum_partials(partial, grad, parts, width * 9);
}

fn meu_fuse(low: &mut Lowering, step: &Step, dy: &Tensor, spatial: bool) {
    let slot = |i: usize| step.grad_inputs.get(i).copied().flatten();
    let (h, l, ca) = (&step.inputs[0], &step.inputs[1], &step.inputs[2]);
    let sa = spatial.then(|| step.inputs[3]);
    if let (Some(dl), Some(dca)) = (slot(1), slot(2)) {
        let args = args![
            low.at(dy),
            low.at(l),
            low.at(ca),
            low.at(&dl.tensor),
            low.at(&dca.tensor),
            dl.accumulate,
            dca.accumulate,
            l.shape.plane(),
            dy.batch_stride,
            dy.plane_stride,
            l.batch_stride,
            l.plane_stride,
            ca.batch_stride,
            ca.plane_stride,
            dl.tensor.batch_stride,
            dl.tensor.plane_stride,
            dca.tensor.batch_stride,
            dca.tensor.plane_stride,
        ];
        let name =
            low.name(Typed { f32: "meu_fuse_backward_low_f32", f16: "meu_fuse_backward_low_f16" });
        low.launch(launch::block_per_plane(name, l.shape, args));
    }
    if let Some(dsa) = slot(3).filter(|_| spatial) {
        let args = args![
            low.at(dy),
            low.at(h),
            low.at(&dsa.tensor),
            dsa.accumulate,
            l.shape.c,
            h.shape.h,
            h.shape.w,
            l.shape.h,
            l.shape.w,
            dy.batch_stride,
            dy.plane_stride,
            h.batch_stride,
            h.plane_stride,
            dsa.tensor.batch_stride,
        ];
        let shape = l.shape.with_channels(1);
        let name = low.name(Typed {
            f32: "meu_fuse_backward_spatial_f32",
            f16: "meu_fuse_backward_spatial_f16",
        });
        low.launch(launch::tiles(name, shape, args));
    }
    if let Some(dh) = slot(0) {
        let args = args![
            low.at(dy),
            sa.map(|sa| low.at(&sa)),
            low.at(&dh.tensor),
            dh.accumulate,
            h.shape.h,
            h.shape.w,
            l.shape.h,
            l.shape.w,
            dy.batch_stride,
            dy.plane_stride,
            sa.map_or(0, |sa| sa.batch_stride),
            dh.tensor.batch_stride,
            dh.tensor.plane_stride,
        ];
        let name = low
            .name(Typed { f32: "meu_fuse_backward_high_f32", f16: "meu_fuse_backward_high_f16" });
        low.launch(launch::tiles(name, h.shape, args));
    }
}
