//! Expanded tensors in 8 bits ([`Expanded::Bytes`]): which are, where they lie, and the cascade between
//! them. The kernels are the same as over halves; they convert as they load and store.
//!
//! A pair leaves bytes where the cascade behind it can read them, and a cascade leaves bytes where
//! the next pair does: a stage's first pair reads halves, its last cascade writes halves again, and
//! all between them is bytes.

use super::forward::{self, Planes};
use super::{Lowering, args, products};
use crate::backend::gpu::device::{Element, Place};
use crate::backend::gpu::launch;
use crate::backend::gpu::variants::{CascadePlanes, Expanded};
use crate::graph::{Mode, ParamId, Step, Tensor};
use crate::ops::{Act, Norm, Op};

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

    /// From now on the tensor's memory holds bytes.
    pub(super) fn put_bytes(&mut self, bytes: Bytes) {
        self.bytes = Some(bytes);
        self.in_bytes += 1;
    }
}

/// The scales of an expansion that is to leave bytes, `steps[0]` with the cascade behind it.
pub(super) fn left_by_expansion(low: &Lowering, steps: &[Step]) -> Option<ParamId> {
    let [expansion, cascade, ..] = steps else { return None };
    let (Op::Conv1x1(conv), Op::Cascade(op)) = (&expansion.op, &cascade.op) else { return None };
    let z = &expansion.output;
    let wanted = low.variants.expanded == Expanded::Bytes
        && low.variants.cascade == CascadePlanes::Stored
        && low.element == Element::F16
        && low.plan.mode != Mode::Training;
    let fits = conv.act == Act::Relu
        && cascade.inputs == [*z]
        && cascade.output == *z
        && cascade.byte_scale.is_some()
        && matches!(op.norm, Norm::Folded(_))
        && low.movable(z)
        && forward::walk_tiling(low, op, z, z).is_some();
    expansion.byte_scale.filter(|_| wanted && fits)
}

/// The scales of a cascade that is to leave bytes, `steps[0]` with the pair behind it.
pub(super) fn left_by_cascade(low: &Lowering, steps: &[Step]) -> Option<ParamId> {
    let [cascade, pair @ ..] = steps else { return None };
    let read = products::find_pair(low, pair)?.x == &cascade.output;
    left_by_expansion(low, &pair[1..])?;
    cascade.byte_scale.filter(|_| read)
}

/// A cascade over bytes; false where its input is not in bytes.
pub(super) fn cascade(low: &mut Lowering, steps: &[Step]) -> bool {
    let [step, ..] = steps else { return false };
    let (Op::Cascade(op), [x]) = (&step.op, step.inputs.as_slice()) else { return false };
    let Norm::Folded(biases) = &op.norm else { return false };
    let y = &step.output;
    let Some(tiling) = forward::walk_tiling(low, op, x, y) else { return false };
    let Some(bytes) = low.take_bytes(x) else { return false };
    let source = bytes.planes(low.at(x));
    let left = left_by_cascade(low, steps).map(|scale| Bytes::new(low, y, scale));
    // Halves have other places than bytes, and blocks that share a plane read what lies around theirs.
    let whole = (tiling.tile_h, tiling.tile_w) == (y.shape.h, y.shape.w);
    let target = match left {
        Some(_) if whole => low.at(y),
        _ => low.other_side(y).unwrap_or_else(|| low.at(y)),
    };
    let (name, target) = match left {
        Some(left) => ("cascade_walk_f16_u8", left.planes(target)),
        None => ("cascade_walk_f16_from_u8", Planes { at: target, ..Planes::of(low, y) }),
    };
    let mut args = forward::walk_args(low, op, biases, tiling, x.shape, [source, target]);
    args.extend(args![bytes.scales(), left.map(|left| left.inverses())]);
    low.launch(launch::cascade_walk(name, tiling, y.shape, op.width(), args));
    if let Some(left) = left {
        low.put_bytes(left);
    }
    true
}
