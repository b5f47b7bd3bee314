//! Launch shapes of whole blocks of the network: stem_block.cu, stem_block_half.cu, strided_block.cu.

use super::{Arg, Launch, THREADS, grid};
use crate::backend::gpu::device::Element;
use crate::graph::Shape;

/// How stem_block.cu, or in f16 stem_block_half.cu, covers a plane.
struct StemTiling {
    threads: u32,
    /// Rows and columns of outputs.
    tile: (usize, usize),
    shared_bytes: usize,
}

fn stem_tiling(element: Element) -> StemTiling {
    match element {
        // Weights, the image and the expanded tensor around 30 x 14 pixels.
        Element::F32 => StemTiling {
            threads: THREADS,
            tile: (14, 30),
            shared_bytes: 4 * (1152 + 3 * 33 * 66 + 16 * 32 * 16),
        },
        // The same around 64 x 8, of the weights those that are not operands of products.
        Element::F16 => StemTiling {
            threads: 512,
            tile: (8, 64),
            shared_bytes: 4 * 208 + 2 * (3 * 21 * 160 + 688 * 20),
        },
    }
}

/// Shared memory of the stem's block.
pub fn stem_block_shared(element: Element) -> usize {
    stem_tiling(element).shared_bytes
}

/// stem_block.cu, stem_block_half.cu: a block per tile.
pub fn stem_block(kernel: &'static str, element: Element, output: Shape, args: Vec<Arg>) -> Launch {
    let StemTiling { threads, tile, shared_bytes } = stem_tiling(element);
    Launch {
        kernel,
        grid: grid(output.h.div_ceil(tile.0) * output.w.div_ceil(tile.1), 1, output.n),
        block: [threads, 1, 1],
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
    /// Columns of a tile of outputs.
    pub tile_w: usize,
    /// Dynamic shared memory.
    pub shared_bytes: usize,
}

/// Outputs of a block: rows, and columns where it makes all branches.
pub const STRIDED_TILE: usize = 8;

/// Columns of outputs of a block that makes one branch: the first that shared memory has room for.
const STRIDED_COLUMNS: [usize; 2] = [16, 8];

/// Pixels of x, on its grid, that a branch of `width` channels has for a tile of outputs: kernels'
/// Region.
pub fn strided_pixels(width: usize, tile_w: usize, (stride, dilation): (usize, usize)) -> usize {
    let span = |outputs: usize| (outputs - 1) * stride + 2 * dilation + 1;
    let columns = span(tile_w) + dilation % 2;
    // The next number that leaves `rest`.
    let (rest, every) = match (stride, width) {
        (2, _) => (2, 4),
        (_, 32) => (4, 8),
        _ => (0, 2),
    };
    let pitch = columns + (every + rest - columns % every) % every;
    span(STRIDED_TILE) * pitch
}

/// Shared memory of one branch: its parameters, then the pixels, 16 at a time.
fn strided_shared(
    width: usize,
    tile_w: usize,
    branches: impl Iterator<Item = (usize, usize)>,
) -> Option<usize> {
    let pixels = branches.map(|branch| strided_pixels(width, tile_w, branch)).max()?;
    Some(4 * 11 * width + 2 * (width + 8) * pixels.next_multiple_of(16))
}

/// For branches of `width` channels, each by its stride and dilation on its grid; None for other
/// widths than the kernel has, and where the largest branch does not fit into `limit` bytes.
pub fn strided_tiling(
    width: usize,
    branches: impl Iterator<Item = (usize, usize)> + Clone,
    limit: usize,
) -> Option<StridedTiling> {
    let kernel = match width {
        32 => "strided_block_f16_c32",
        64 => "strided_block_f16_c64",
        _ => return None,
    };
    STRIDED_COLUMNS.into_iter().find_map(|tile_w| {
        let shared_bytes = strided_shared(width, tile_w, branches.clone())?;
        (shared_bytes <= limit).then_some(StridedTiling { kernel, tile_w, shared_bytes })
    })
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
    let (tile_w, plane) = (STRIDED_TILE, 2 * (STRIDED_TILE * STRIDED_TILE + 8));
    let branch = strided_shared(width, tile_w, branches)?;
    let shared_bytes = 4 * width * plane + branch.max(width * plane);
    (shared_bytes <= limit).then_some(StridedTiling { kernel, tile_w, shared_bytes })
}

/// strided_block.cu: a block per tile of outputs and branch.
pub fn strided_block(
    tiling: StridedTiling,
    output: Shape,
    branches: usize,
    args: Vec<Arg>,
) -> Launch {
    let tiles = output.h.div_ceil(STRIDED_TILE) * output.w.div_ceil(tiling.tile_w);
    Launch {
        kernel: tiling.kernel,
        grid: grid(tiles, branches, output.n),
        block: [THREADS, 1, 1],
        shared_bytes: tiling.shared_bytes as u32,
        args,
        cooperative: false,
    }
}

/// strided_block.cu: a block per tile of outputs, all branches.
pub fn strided_pair(tiling: StridedTiling, output: Shape, args: Vec<Arg>) -> Launch {
    strided_block(tiling, output, 1, args)
}
