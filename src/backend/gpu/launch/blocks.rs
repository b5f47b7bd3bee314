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

/// For branches of `width` channels, each by its stride and dilation on its grid; None for other
/// widths than the kernel has, and where the largest branch does not fit into `limit` bytes.
pub fn strided_tiling(
    width: usize,
    branches: impl Iterator<Item = (usize, usize)>,
    limit: usize,
) -> Option<StridedTiling> {
    const TILE: usize = 8;
    let kernel = match width {
        32 => "strided_block_f16_c32",
        64 => "strided_block_f16_c64",
        _ => return None,
    };
    let side = |(stride, dilation): (usize, usize)| (TILE - 1) * stride + 2 * dilation + 1;
    let pixels = branches.map(|branch| side(branch).pow(2)).max()?.next_multiple_of(16);
    let sums = 4 * 8 * 16 * (16 + 4);
    let shared_bytes = sums + 2 * (width + 16) * (pixels + 8);
    (shared_bytes <= limit).then_some(StridedTiling { kernel, shared_bytes })
}

/// strided_block.cu: a block per tile of 8 x 8 outputs and branch.
pub fn strided_block(
    tiling: StridedTiling,
    output: Shape,
    branches: usize,
    args: Vec<Arg>,
) -> Launch {
    let tiles = output.h.div_ceil(8) * output.w.div_ceil(8);
    Launch {
        kernel: tiling.kernel,
        grid: grid(tiles, branches, output.n),
        block: [THREADS, 1, 1],
        shared_bytes: tiling.shared_bytes as u32,
        args,
        cooperative: false,
    }
}
