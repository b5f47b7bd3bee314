//! 1x1 convolutions: by cuBLAS, by one kernel each, or two of them in one launch.

use super::bytes::{self, Bytes};
use super::forward::Planes;
use super::{Lowering, Typed, act_code, args, overlap, read_later};
use crate::backend::gpu::device::Element;
use crate::backend::gpu::launch::{self, Arg, Gemm, Matrix, PairTiling};
use crate::backend::gpu::variants::{Pairs, Products};
use crate::graph::{Mode, Step, Tensor};
use crate::ops::{Act, Conv1x1, Op};

/// y = act(W x + b + residual).
pub(super) fn conv1x1(
    low: &mut Lowering,
    op: &Conv1x1,
    x: &Tensor,
    residual: Option<&Tensor>,
    y: &Tensor,
) {
    // Training has plain products of large batches, and batch norm behind them.
    if low.plan.mode == Mode::Training || low.variants.products == Products::Blas {
        by_blas(low, op, x, residual, y);
    } else {
        by_kernel(low, op, 1, x, residual, y);
    }
}

/// A subsampling and the convolution that reads it, which then reads every second row and column of
/// its operand itself.
pub(super) fn subsampled(low: &mut Lowering, steps: &[Step]) -> bool {
    let [first, second, later @ ..] = steps else { return false };
    let (Op::Subsample, Op::Conv1x1(op)) = (&first.op, &second.op) else { return false };
    let (x, coarse, y) = (&first.inputs[0], &first.output, &second.output);
    let ours = low.variants.products == Products::Fused && second.inputs == [*coarse];
    if !ours || overlap(x, y) || read_later(coarse, later) {
        return false;
    }
    by_kernel(low, op, 2, x, None, y);
    true
}

/// One kernel for all of it; x is read at every stride-th row and column.
fn by_kernel(
    low: &mut Lowering,
    op: &Conv1x1,
    stride: usize,
    x: &Tensor,
    residual: Option<&Tensor>,
    y: &Tensor,
) {
    let vector = y.shape.plane() == 1;
    let thin = op.out_channels <= 4;
    let weights = match low.element {
        Element::F16 if !vector && !thin => low.param_stored(op.weight),
        _ => low.param(op.weight),
    };
    let args = args![
        low.at(x),
        weights,
        op.bias.map(|b| low.param(b)),
        residual.map(|r| low.at(r)),
        low.at(y),
        act_code(op.act),
        op.in_channels,
        op.out_channels,
        stride,
        x.shape.w,
        y.shape.w,
        y.shape.plane(),
        x.batch_stride,
        x.plane_stride,
        residual.map_or(0, |r| r.batch_stride),
        residual.map_or(0, |r| r.plane_stride),
        y.batch_stride,
        y.plane_stride,
    ];
    let launch = if vector {
        let name = low.name(Typed { f32: "conv1x1_vector_f32", f16: "conv1x1_vector_f16" });
        launch::conv1x1_vector(name, y.shape, args)
    } else if thin {
        let name = low.name(Typed { f32: "conv1x1_thin_f32", f16: "conv1x1_thin_f16" });
        launch::conv1x1_thin(name, y.shape, args)
    } else {
        match low.element {
            Element::F32 => launch::conv1x1_f32(y.shape, args),
            Element::F16 => launch::conv1x1_f16(y.shape, op.in_channels, args),
        }
    };
    low.launch(launch);
}

/// A projection and the expansion of its result that one launch can do.
pub(super) struct Pair<'a> {
    project: &'a Conv1x1,
    expand: &'a Conv1x1,
    pub x: &'a Tensor,
    residual: Option<&'a Tensor>,
    y: &'a Tensor,
    z: &'a Tensor,
    tiling: PairTiling,
}

/// The pair that the steps begin with, where the kernel has their shapes and the plan leaves it the
/// room.
pub(super) fn find_pair<'a>(low: &Lowering, steps: &'a [Step]) -> Option<Pair<'a>> {
    let [first, second, ..] = steps else { return None };
    let (Op::Conv1x1(project), Op::Conv1x1(expand)) = (&first.op, &second.op) else {
        return None;
    };
    let (x, residual, y, z) =
        (&first.inputs[0], first.inputs.get(1), &first.output, &second.output);
    let width = project.out_channels;
    let fits = low.plan.mode != Mode::Training
        && low.variants.pairs == Pairs::Fused
        && second.inputs == [*y]
        && project.in_channels == 4 * width
        && expand.out_channels == 4 * width
        && [project.act, expand.act].iter().all(|act| *act != Act::Sigmoid);
    // Blocks write z while others still read x and the residual.
    let apart = |other: &Tensor| !overlap(z, other);
    if !fits || !(apart(x) || z == x) || !residual.is_none_or(apart) {
        return None;
    }
    let (pixels, stage) = (low.variants.pair_pixels, low.variants.stage_weights);
    let tiling = launch::pair_tiling(low.element, width, pixels, stage, low.shared_limit)?;
    Some(Pair { project, expand, x, residual, y, z, tiling })
}

/// A projection and the expansion of its result in one launch; false where that cannot be.
pub(super) fn pair(low: &mut Lowering, steps: &[Step]) -> bool {
    let Some(found) = find_pair(low, steps) else { return false };
    let Pair { project, expand, x, residual, y, z, mut tiling } = found;
    let left = bytes::left_by_expansion(low, &steps[1..]).map(|scale| Bytes::new(low, z, scale));
    // There is no kernel that makes halves of bytes.
    if left.is_none() && low.holds_bytes(x) {
        return false;
    }
    let (mut from, mut to) = (Planes::of(low, x), Planes::of(low, z));
    let read = low.take_bytes(x);
    if let Some(read) = read {
        from = read.planes(from.at);
    }
    if let Some(left) = left {
        // Bytes lie elsewhere in the memory of the halves that others still read.
        if read.is_none() && z == x {
            to.at = low.other_side(z).unwrap_or(to.at);
        }
        to = left.planes(to.at);
        tiling.kernel = launch::pair_in_bytes(tiling.kernel, read.is_some());
    }
    let mut args = pair_args(low, tiling, project, from, residual, y, Some((expand, to)));
    if let Some(left) = left {
        args.extend(args![read.map(|read| read.scales()), left.inverses()]);
        low.put_bytes(left);
    }
    low.launch(launch::pair(tiling, y.shape, args));
    true
}

/// Arguments of a pair, those of storage in bytes excepted; without `expand` and where its result goes,
/// of the projection alone.
pub(super) fn pair_args(
    low: &Lowering,
    tiling: PairTiling,
    project: &Conv1x1,
    x: Planes,
    residual: Option<&Tensor>,
    y: &Tensor,
    expand: Option<(&Conv1x1, Planes)>,
) -> Vec<Arg> {
    let bias = |op: &Conv1x1| op.bias.map(|b| low.param(b));
    let mut args = args![
        x.at,
        low.param_stored(project.weight),
        bias(project),
        residual.map(|r| low.at(r)),
        low.at(y),
        expand.map(|(op, _)| low.param_stored(op.weight)),
        expand.and_then(|(op, _)| bias(op)),
        expand.map(|(_, z)| z.at),
        act_code(project.act),
        act_code(expand.map_or(Act::None, |(op, _)| op.act)),
        y.shape.plane(),
        x.batch_stride,
        x.plane_stride,
        residual.map_or(0, |r| r.batch_stride),
        residual.map_or(0, |r| r.plane_stride),
        y.batch_stride,
        y.plane_stride,
        expand.map_or(0, |(_, z)| z.batch_stride),
        expand.map_or(0, |(_, z)| z.plane_stride),
    ];
    if low.element == Element::F16 {
        args.push(Arg::from(tiling.staged));
    }
    args
}

/// A projection by the kernel that would make the next expansion as well; false for shapes that it does
/// not have.
pub(super) fn projection(low: &mut Lowering, op: &Conv1x1, step: &Step) -> bool {
    let (x, residual, y) = (&step.inputs[0], step.inputs.get(1), &step.output);
    let (pixels, stage) = (low.variants.pair_pixels, low.variants.stage_weights);
    let tiling = launch::pair_tiling(low.element, op.out_channels, pixels, stage, low.shared_limit);
    let Some(tiling) = tiling.filter(|_| op.in_channels == 4 * op.out_channels) else {
        return false;
    };
    let args = pair_args(low, tiling, op, Planes::of(low, x), residual, y, None);
    low.launch(launch::pair(tiling, y.shape, args));
    true
}

/// Y = W X image by image, then bias, residual and non-linearity. A half-precision product that
/// something follows goes to f32 scratch first: rounding the sum once keeps the error down.
fn by_blas(low: &mut Lowering, op: &Conv1x1, x: &Tensor, residual: Option<&Tensor>, y: &Tensor) {
    let finished = op.bias.is_none() && residual.is_none() && op.act == Act::None;
    let (product, like, result) = if finished || low.element == Element::F32 {
        (low.at(y), *y, low.element)
    } else {
        (low.scratch(y.shape.len()), dense_like(y), Element::F32)
    };
    low.gemm(Gemm {
        m: op.out_channels,
        n: x.shape.plane(),
        k: op.in_channels,
        batch: x.shape.n,
        a: Matrix {
            at: low.param_stored(op.weight),
            row_stride: op.in_channels,
            batch_stride: 0,
            transposed: false,
        },
        b: planes_matrix(low, x),
        c: Matrix { at: product, ..planes_matrix(low, &like) },
        beta: 0.0,
        element: low.element,
        result,
    });
    if finished {
        return;
    }
    let name = low.name(Typed { f32: "conv1x1_epilogue_f32", f16: "conv1x1_epilogue_f16" });
    let args = args![
        product,
        low.at(y),
        op.bias.map(|b| low.param(b)),
        residual.map(|r| low.at(r)),
        act_code(op.act),
        y.shape.plane(),
        like.batch_stride,
        like.plane_stride,
        y.batch_stride,
        y.plane_stride,
        residual.map_or(0, |r| r.batch_stride),
        residual.map_or(0, |r| r.plane_stride),
    ];
    low.launch(launch::planes(name, y.shape, args));
}

/// An image's planes as a matrix, channels x pixels.
pub(super) fn planes_matrix(low: &Lowering, tensor: &Tensor) -> Matrix {
    Matrix {
        at: low.at(tensor),
        row_stride: tensor.plane_stride,
        batch_stride: tensor.batch_stride,
        transposed: false,
    }
}

/// A tensor's dense twin, for a copy in scratch.
pub(super) fn dense_like(x: &Tensor) -> Tensor {
    let plane_stride = x.shape.plane();
    Tensor { offset: 0, shape: x.shape, plane_stride, batch_stride: plane_stride * x.shape.c }
}
