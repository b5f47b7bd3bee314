//! Launch shapes of the collapsed decoder: meu_scores.cu, decoder.cu.

use super::{Arg, Launch, THREADS, elements, grid, launch, tiles};
use crate::graph::Shape;

/// Classes that meu_scores.cu works on at a time.
const CLASSES: usize = 20;

/// meu_scores.cu: a thread per pixel, groups of 20 classes, the group's map in shared memory.
pub fn scores(kernel: &'static str, output: Shape, inputs: usize, args: Vec<Arg>) -> Launch {
    let shared_bytes = (4 * CLASSES * (inputs + 1)) as u32;
    let groups = output.with_channels(output.c.div_ceil(CLASSES));
    Launch { shared_bytes, ..tiles(kernel, groups, args) }
}

/// How meu_scores.cu makes labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LabelsTiling {
    /// Most pixels of the scores that a tile of labels is interpolated from.
    pub pitch: usize,
    /// Dynamic shared memory.
    pub shared_bytes: usize,
}

/// Tiles of 64 x 16 labels.
const LABELS: (usize, usize) = (16, 64);

/// For scores of `inputs` channels at the size of `x`, labels at `size`; None where the scores of a
/// tile do not fit into `limit` bytes.
pub fn labels_tiling(x: Shape, size: Shape, inputs: usize, limit: usize) -> Option<LabelsTiling> {
    // The first and the last label of a tile read pixels this far apart, and one beyond.
    let side = |tile: usize, from: usize, to: usize| {
        ((tile.min(to) - 1) * from).div_ceil(to).saturating_add(3).min(from)
    };
    let pitch = side(LABELS.0, x.h, size.h) * side(LABELS.1, x.w, size.w);
    let shared_bytes = 4 * CLASSES * (inputs + 1 + pitch);
    (shared_bytes <= limit).then_some(LabelsTiling { pitch, shared_bytes })
}

/// meu_scores.cu: a block per tile of labels.
pub fn scores_argmax(
    kernel: &'static str,
    tiling: LabelsTiling,
    size: Shape,
    args: Vec<Arg>,
) -> Launch {
    let tiles = size.h.div_ceil(LABELS.0) * size.w.div_ceil(LABELS.1);
    Launch {
        kernel,
        grid: grid(tiles, 1, size.n),
        block: [32, 8, 1],
        shared_bytes: tiling.shared_bytes as u32,
        args,
        cooperative: false,
    }
}

/// decoder.cu: a thread per pixel of two tensors.
pub fn decoder_spatial(kernel: &'static str, x1: Shape, x2: Shape, args: Vec<Arg>) -> Launch {
    let blocks = |shape: Shape| shape.plane().div_ceil(THREADS as usize);
    launch(kernel, grid(blocks(x1) + blocks(x2), 1, x1.n), [THREADS, 1, 1], args)
}

/// decoder.cu: a thread per element of both composed maps, with `floats` of vectors to share.
pub fn decoder_gates(len: usize, n: usize, floats: usize, args: Vec<Arg>) -> Launch {
    let shared_bytes = (4 * floats) as u32;
    Launch { shared_bytes, ..elements("decoder_gates_f32", len, n, args) }
}
