//! Launch shapes of whole blocks of the network: stem_block.cu, strided_block.cu.

use super::{Arg, Launch, THREADS, grid};
use crate::backend::gpu::device::Element;
use crate::graph::Shape;

/// Shared memory of stem_block.cu: weights, the image and the expanded tensor around 30 x 14 pixels.
pub fn stem_block_shared(element: Element) -> usize {
    4 * 1152 + element.size() * (3 * 33 * 66 + 16 * 32 * 16)
}

/// stem_block.cu: a block per tile of 30 x 14 pixels.
pub fn stem_block(
    kernel: &'static str,
    output: Shape,
    shared_bytes: usize,
    args: Vec<Arg>,
) -> Launch {
    Launch {
        kernel,
        grid: grid(output.h.div_ceil(14) * output.w.div_ceil(30), 1, output.n),
        block: [THREADS, 1, 1],
        shared_bytes: shared_bytes as u32,
        args,
        cooperative: false,
    }
}

/// How strided_block.cu makes a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StridedTiling {
    /// Entry point.
    pub kernel: &'static str,
    /// Dynamic shared memory.
    pub shared_bytes: usize,
}

/// Outputs of a block: rows, and columns.
pub const STRIDED_TILE: usize = 8;

/// Pixels of x, on its grid, that a branch reads for a tile of outputs.
pub fn strided_pixels((stride, dilation): (usize, usize)) -> usize {
    ((STRIDED_TILE - 1) * stride + 2 * dilation + 1).pow(2)
}

/// Shared memory of one branch: sums of every warp, pixels of x, and 16 channels of the expansion.
fn strided_shared(width: usize, branches: impl Iterator<Item = (usize, usize)>) -> Option<usize> {
    let pixels = branches.map(strided_pixels).max()?.next_multiple_of(16);
    let sums = 4 * 8 * 16 * (16 + 4);
    Some(sums + 2 * (width + 16) * (pixels + 8))
}

/// For branches of `width` channels, each by its stride and dilation on its grid; None for other
/// widths than the kernel has, and where the largest branch does not fit into `limit` bytes.
pub fn strided_tiling(
    width: usize,
    branches: impl Iterator<Item = (usize, usize)>,
    limit: usize,
) -> Option<StridedTiling> {
    let kernel = match width {
        32 => "strided_block_f16_c32",
        64 => "strided_block_f16_c64",
        _ => return None,
    };
    let shared_bytes = strided_shared(width, branches)?;
    (shared_bytes <= limit).then_some(StridedTiling { kernel, shared_bytes })
}

/// The same with projection and next expansion, whose operand stays beside what a branch needs.
pub fn strided_pair_tiling(
    width: usize,
    branches: impl Iterator<Item = (usize, usize)>,
    limit: usize,
) -> Option<StridedTiling> {
    let kernel = match width {
        32 => "strided_pair_f16_c32",
        64 => "strided_pair_f16_c64",
        _ => return None,
    };
    let plane = 2 * (STRIDED_TILE * STRIDED_TILE + 8);
    let shared_bytes = 4 * width * plane + strided_shared(width, branches)?.max(width * plane);
    (shared_bytes <= limit).then_some(StridedTiling { kernel, shared_bytes })
}

/// strided_block.cu: a block per tile of 8 x 8 outputs and branch.
pub fn strided_block(
    tiling: StridedTiling,
    output: Shape,
    branches: usize,
    args: Vec<Arg>,
) -> Launch {
    let tiles = output.h.div_ceil(STRIDED_TILE) * output.w.div_ceil(STRIDED_TILE);
    Launch {
        kernel: tiling.kernel,
        grid: grid(tiles, branches, output.n),
        block: [THREADS, 1, 1],
        shared_bytes: tiling.shared_bytes as u32,
        args,
        cooperative: false,
    }
}

/// strided_block.cu: a block per tile of 8 x 8 outputs, all branches.
pub fn strided_pair(tiling: StridedTiling, output: Shape, args: Vec<Arg>) -> Launch {
    strided_block(tiling, output, 1, args)
}
