//! Expanded tensors in 8 bits ([`Expanded::Bytes`]): which are, where they lie, and the kernels that have
//! nothing else to do. They are those over halves; they convert as they load and store.
//!
//! A pair leaves bytes where the cascade behind it and what reads that can read them: a stage's first
//! pair makes bytes of halves, its last projection reads bytes, and all between them is bytes.

use super::forward::{self, Planes};
use super::{Lowering, args, products};
use crate::backend::gpu::device::{Element, Place};
use crate::backend::gpu::launch::{self, PairTiling};
use crate::backend::gpu::variants::{CascadePlanes, Expanded, Pairs};
use crate::graph::{Mode, ParamId, Step, Tensor};
use crate::ops::{Act, Conv1x1, Norm, Op};

/// An expanded tensor that is in 8 bits at the moment, wherever [`Lowering::at`] says.
#[derive(Clone, Copy)]
pub(super) struct Bytes {
    tensor: Tensor,
    plane_stride: usize,
    scales: Place,
}

impl Bytes {
    pub fn new(low: &Lowering, tensor: &Tensor, scale: ParamId) -> Self {
        // Planes start where 16 bytes can be moved at once, if there is room: bytes have that of
        // halves.
        let plane = tensor.shape.plane();
        let padded = plane.next_multiple_of(16);
        let plane_stride = if padded <= 2 * plane { padded } else { plane };
        Bytes { tensor: *tensor, plane_stride, scales: low.param(scale) }
    }

    pub fn planes(&self, at: Place) -> Planes {
        let batch_stride = self.tensor.shape.c * self.plane_stride;
        Planes { at, batch_stride, plane_stride: self.plane_stride }
    }

    /// Values of a step of each channel.
    pub fn scales(&self) -> Place {
        self.scales
    }

    /// One over them.
    pub fn inverses(&self) -> Place {
        self.scales.offset(4 * self.tensor.shape.c)
    }
}

impl Lowering<'_> {
    /// The tensor's form in bytes, if that is what its memory holds; from now on it is not.
    pub(super) fn take_bytes(&mut self, tensor: &Tensor) -> Option<Bytes> {
        self.bytes.take_if(|bytes| bytes.tensor == *tensor)
    }

    /// Whether the tensor's memory holds bytes.
    pub(super) fn holds_bytes(&self, tensor: &Tensor) -> bool {
        self.bytes.is_some_and(|bytes| bytes.tensor == *tensor)
    }

    /// From now on the tensor's memory holds bytes.
    pub(super) fn put_bytes(&mut self, bytes: Bytes) {
        self.bytes = Some(bytes);
        self.in_bytes += 1;
    }
}

/// The scales of an expansion that is to leave bytes, `steps[0]` with a block's cascade and projection
/// behind it.
pub(super) fn left_by_expansion(low: &Lowering, steps: &[Step]) -> Option<ParamId> {
    let [expansion, cascade, reader, ..] = steps else { return None };
    let (Op::Conv1x1(conv), Op::Cascade(op)) = (&expansion.op, &cascade.op) else { return None };
    let z = &expansion.output;
    let wanted = low.variants.expanded == Expanded::Bytes
        && low.variants.cascade != CascadePlanes::Wide
        && low.variants.pairs == Pairs::Fused
        && low.element == Element::F16
        && low.plan.mode != Mode::Training;
    let fits = conv.act == Act::Relu
        && cascade.inputs == [*z]
        && cascade.output == *z
        && cascade.byte_scale.is_some()
        && matches!(op.norm, Norm::Folded(_))
        && low.movable(z)
        && forward::walk_tiling(low, op, z, z).is_some()
        && reader.inputs.first() == Some(z)
        && projection(low, reader).is_some();
    expansion.byte_scale.filter(|_| wanted && fits)
}

/// A projection that can read bytes, and how.
fn projection<'a>(low: &Lowering, step: &'a Step) -> Option<(&'a Conv1x1, PairTiling)> {
    let Op::Conv1x1(op) = &step.op else { return None };
    let fits = op.in_channels == 4 * op.out_channels && op.act != Act::Sigmoid;
    let (pixels, limit) = (low.variants.pair_pixels, low.shared_limit);
    let tiling = launch::pair_tiling(Element::F16, op.out_channels, pixels, false, limit)?;
    fits.then_some((op, tiling))
}

/// A cascade over bytes; false where its input is not in bytes.
pub(super) fn cascade(low: &mut Lowering, step: &Step) -> bool {
    let (Op::Cascade(op), [x]) = (&step.op, step.inputs.as_slice()) else { return false };
    let (Norm::Folded(biases), Some(scale)) = (&op.norm, step.byte_scale) else { return false };
    let y = &step.output;
    let Some(tiling) = forward::walk_tiling(low, op, x, y) else { return false };
    let Some(bytes) = low.take_bytes(x) else { return false };
    let source = bytes.planes(low.at(x));
    let left = Bytes::new(low, y, scale);
    // Blocks that share a plane read what lies around theirs.
    let whole = (tiling.tile_h, tiling.tile_w) == (y.shape.h, y.shape.w);
    let target = if whole { None } else { low.other_side(y) };
    let target = left.planes(target.unwrap_or_else(|| low.at(y)));
    let mut args = forward::walk_args(low, op, biases, tiling, x.shape, [source, target]);
    args.extend(args![bytes.scales(), left.inverses()]);
    let (name, warps) = ("cascade_walk_f16_u8", tiling.walk_warps());
    low.launch(launch::cascade_warps(name, warps, tiling, y.shape, op.width(), args));
    low.put_bytes(left);
    true
}

/// A projection of bytes with no expansion into bytes behind it: the kernel of pairs without its second
/// product. False where the input is not in bytes.
pub(super) fn project(low: &mut Lowering, step: &Step) -> bool {
    let Some((op, mut tiling)) = projection(low, step) else { return false };
    let Some(bytes) = low.take_bytes(&step.inputs[0]) else { return false };
    let (residual, y) = (step.inputs.get(1), &step.output);
    let x = bytes.planes(low.at(&step.inputs[0]));
    tiling.kernel = launch::pair_in_bytes(tiling.kernel, true);
    let mut args = products::pair_args(low, tiling, op, x, residual, y, None);
    args.extend(args![bytes.scales(), None::<Place>]);
    low.launch(launch::pair(tiling, y.shape, args));
    true
}
