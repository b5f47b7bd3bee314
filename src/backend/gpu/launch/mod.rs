//! Commands for a [`GpuDevice`](super::GpuDevice), and the one place that decides launch shapes:
//! grid, block and shared memory are the same on a real and on the emulated device.

mod args;
mod blocks;
mod cascade;
mod decoder;
mod stage;

pub use args::{Arg, Cells, kinds};
pub use blocks::*;
pub use cascade::*;
pub use decoder::*;
pub use stage::*;

use super::device::{Element, Place};
use crate::graph::Shape;

/// One kernel launch.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Entry point in `kernels/*.cu`.
    pub kernel: &'static str,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z; their product is a multiple of 32.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// Arguments.
    pub args: Vec<Arg>,
    /// Whether blocks wait for each other (kernels/grid.cuh). Then all run at the same time, at most as
    /// many as the device holds at once: the grid has one dimension, and says how many there is work
    /// for. See [`resident_grid`].
    pub cooperative: bool,
}

/// A row-major matrix operand, one per element of the batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Matrix {
    /// First element of the first matrix.
    pub at: Place,
    /// Elements from one stored row to the next.
    pub row_stride: usize,
    /// Elements from one matrix of the batch to the next; 0 shares one.
    pub batch_stride: usize,
    /// Whether memory holds the transpose of the operand (never for C).
    pub transposed: bool,
}

/// C = A B + beta C for row-major matrices: A is m x k, B is k x n, C is m x n. Products are added up
/// in f32 (TF32 off).
///
/// For a column-major BLAS: C^T = B^T A^T, so pass B first, A second, with n and m swapped.
#[derive(Debug, Clone, PartialEq)]
pub struct Gemm {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// Number of products.
    pub batch: usize,
    /// Left operand.
    pub a: Matrix,
    /// Right operand.
    pub b: Matrix,
    /// Result.
    pub c: Matrix,
    /// 0 to overwrite C (which may hold anything, NaN included), 1 to add to it.
    pub beta: f32,
    /// Storage of A and B.
    pub element: Element,
    /// Storage of C: that of A and B, or f32.
    pub result: Element,
}

/// What a step of a plan becomes.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// A kernel.
    Launch(Launch),
    /// A matrix product.
    Gemm(Gemm),
}

impl Command {
    /// The kernel that is launched, of a launch.
    pub fn kernel(&self) -> Option<&'static str> {
        match self {
            Command::Launch(launch) => Some(launch.kernel),
            Command::Gemm(_) => None,
        }
    }
}

/// Pixels of a block in elementwise kernels: 256 threads, PIXELS_PER_THREAD (common.cuh) each.
const ELEMENTWISE_PIXELS: usize = 1024;
/// Pixels of a block in reductions: REDUCTION_PIXELS of common.cuh.
const REDUCTION_PIXELS: usize = 4096;
/// Threads of most kernels.
const THREADS: u32 = 256;
/// Channels that a thread of the interpolating kernels works through (resize.cu, meu_fuse.cu).
const CHANNELS_PER_THREAD: usize = 8;

fn grid(x: usize, y: usize, z: usize) -> [u32; 3] {
    // Pixels / 256, channels, images: far below the limits 2^31 - 1, 65535, 65535.
    [x as u32, y as u32, z as u32]
}

fn launch(kernel: &'static str, grid: [u32; 3], block: [u32; 3], args: Vec<Arg>) -> Launch {
    Launch { kernel, grid, block, shared_bytes: 0, args, cooperative: false }
}

/// The grid that a cooperative launch gets on a device that holds `resident` of its blocks at once;
/// None where it holds none, or where the launch is not one for every device.
pub fn resident_grid(launch: &Launch, resident: usize) -> Option<[u32; 3]> {
    let [x, y, z] = launch.grid;
    let most = u32::try_from(resident).unwrap_or(u32::MAX);
    (most > 0 && (y, z) == (1, 1)).then_some([x.min(most), 1, 1])
}

/// Elementwise over the planes of a tensor.
pub fn planes(kernel: &'static str, shape: Shape, args: Vec<Arg>) -> Launch {
    let blocks = shape.plane().div_ceil(ELEMENTWISE_PIXELS);
    launch(kernel, grid(blocks, shape.c, shape.n), [THREADS, 1, 1], args)
}

/// Pieces that a reduction over a plane is split into: one partial sum each per image.
pub fn pieces(pixels: usize) -> usize {
    pixels.div_ceil(REDUCTION_PIXELS)
}

/// Reduction over pixels to one partial result per piece, row (channel or pair) and image.
pub fn reduction(
    kernel: &'static str,
    pixels: usize,
    rows: usize,
    n: usize,
    args: Vec<Arg>,
) -> Launch {
    launch(kernel, grid(pieces(pixels), rows, n), [THREADS, 1, 1], args)
}

/// A block per plane.
pub fn block_per_plane(kernel: &'static str, shape: Shape, args: Vec<Arg>) -> Launch {
    launch(kernel, grid(1, shape.c, shape.n), [THREADS, 1, 1], args)
}

/// A thread per pixel of every image, all channels.
pub fn pixels(kernel: &'static str, shape: Shape, args: Vec<Arg>) -> Launch {
    let blocks = shape.plane().div_ceil(THREADS as usize);
    launch(kernel, grid(blocks, 1, shape.n), [THREADS, 1, 1], args)
}

/// Blocks of [`pixels`] in all: partial results it leaves.
pub fn pixel_blocks(shape: Shape) -> usize {
    shape.n * shape.plane().div_ceil(THREADS as usize)
}

/// A thread per element of a vector.
pub fn vector(kernel: &'static str, len: usize, args: Vec<Arg>) -> Launch {
    launch(kernel, grid(len.div_ceil(THREADS as usize), 1, 1), [THREADS, 1, 1], args)
}

/// A warp per channel.
pub fn warp_per_channel(kernel: &'static str, channels: usize, args: Vec<Arg>) -> Launch {
    launch(kernel, grid(channels, 1, 1), [32, 1, 1], args)
}

/// A thread per pixel, tiles of 32 x 8, a row of blocks per channel.
pub fn tiles(kernel: &'static str, shape: Shape, args: Vec<Arg>) -> Launch {
    let blocks = shape.h.div_ceil(8) * shape.w.div_ceil(32);
    launch(kernel, grid(blocks, shape.c, shape.n), [32, 8, 1], args)
}

/// A thread per pixel, tiles of 32 x 8, groups of 8 channels in turn.
pub fn tiles_of_channels(kernel: &'static str, shape: Shape, args: Vec<Arg>) -> Launch {
    tiles(kernel, shape.with_channels(shape.c.div_ceil(CHANNELS_PER_THREAD)), args)
}

/// conv3x3.cu: tiles of 32 x 8 output pixels, groups of 16 output channels; one input channel's
/// tile and its weights in shared memory.
pub fn conv3x3_forward(
    kernel: &'static str,
    output: Shape,
    stride: usize,
    args: Vec<Arg>,
) -> Launch {
    const GROUP: usize = 16;
    let tile = (7 * stride + 3) * (31 * stride + 3);
    let shared_bytes = (4 * (tile + 9 * GROUP)) as u32;
    Launch { shared_bytes, ..tiles(kernel, output.with_channels(output.c.div_ceil(GROUP)), args) }
}

/// Blocks that a launch should have before one of them takes on more than one tile of outputs: a
/// little more than the multiprocessors of the largest card.
const ENOUGH_BLOCKS: usize = 160;

/// conv1x1.cu, tensor cores: a tile of output channels and pixels per block; all of the outputs
/// where the input's channels stay in shared memory and the pixels make enough blocks.
pub fn conv1x1_f16(output: Shape, inputs: usize, args: Vec<Arg>) -> Launch {
    const DEPTH: usize = 64;
    let (kernel, rows, pixels) = match output.c {
        0..=16 => ("conv1x1_f16_r16", 16, 128),
        17..=32 => ("conv1x1_f16_r32", 32, 64),
        _ => ("conv1x1_f16_r64", 64, 64),
    };
    let (across, tiles) = (output.plane().div_ceil(pixels), output.c.div_ceil(rows));
    let groups = if inputs <= DEPTH { ENOUGH_BLOCKS.div_ceil(across * output.n) } else { tiles };
    let sums = (2 * rows * (DEPTH + 8)).max(4 * rows * (pixels + 4));
    Launch {
        shared_bytes: (2 * DEPTH * (pixels + 8) + sums) as u32,
        ..launch(kernel, grid(across, groups.min(tiles), output.n), [THREADS, 1, 1], args)
    }
}

/// conv1x1.cu, CUDA cores: 64 output channels and 64 pixels per block.
pub fn conv1x1_f32(output: Shape, args: Vec<Arg>) -> Launch {
    let grid = grid(output.plane().div_ceil(64), output.c.div_ceil(64), output.n);
    Launch {
        shared_bytes: 4 * 2 * 16 * (64 + 4),
        ..launch("conv1x1_tile_f32", grid, [THREADS, 1, 1], args)
    }
}

/// conv1x1.cu, a thread per pixel and output channel.
pub fn conv1x1_thin(kernel: &'static str, output: Shape, args: Vec<Arg>) -> Launch {
    let blocks = output.plane().div_ceil(THREADS as usize);
    launch(kernel, grid(blocks, output.c, output.n), [THREADS, 1, 1], args)
}

/// conv1x1.cu, a warp per output channel of one pixel.
pub fn conv1x1_vector(kernel: &'static str, output: Shape, args: Vec<Arg>) -> Launch {
    let warps = THREADS as usize / 32;
    launch(kernel, grid(output.c.div_ceil(warps), 1, output.n), [THREADS, 1, 1], args)
}

/// How conv1x1_backward.cu makes the gradient of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightTiling {
    /// Entry point.
    pub kernel: &'static str,
    /// Blocks that the results take.
    pub tiles: usize,
    /// Pieces of an image, a partial result each.
    pub pieces: usize,
    /// Pixels of a piece.
    pub piece: usize,
}

/// Tiles for `out` x `inputs` weights, and pieces of `n` images of so many pixels that make enough blocks.
pub fn weight_tiling(out: usize, inputs: usize, pixels: usize, n: usize) -> WeightTiling {
    const BLOCKS: usize = 4 * ENOUGH_BLOCKS;
    const LEAST_PIXELS: usize = 256;
    let (side, kernel) = match out.min(inputs) {
        0..=16 => (16, "conv1x1_backward_weight_r16_f32"),
        17..=32 => (32, "conv1x1_backward_weight_r32_f32"),
        _ => (64, "conv1x1_backward_weight_r64_f32"),
    };
    let tiles = out.div_ceil(side) * inputs.div_ceil(side);
    let wanted = BLOCKS.div_ceil(tiles * n).min(pixels.div_ceil(LEAST_PIXELS)).max(1);
    // Whole steps of the kernel's 32 pixels.
    let piece = pixels.div_ceil(wanted).next_multiple_of(32);
    WeightTiling { kernel, tiles, pieces: pixels.div_ceil(piece), piece }
}

/// conv1x1_backward.cu: a block per tile of weights and piece of an image.
pub fn conv1x1_backward_weight(tiling: WeightTiling, n: usize, args: Vec<Arg>) -> Launch {
    launch(tiling.kernel, grid(tiling.tiles, tiling.pieces, n), [THREADS, 1, 1], args)
}

/// How pe.cu makes a projection and the next expansion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairTiling {
    /// Entry point.
    pub kernel: &'static str,
    /// Pixels of a block.
    pub pixels: usize,
    /// Threads of a block: PAIR_THREADS of pe.cuh.
    pub threads: u32,
    /// Whether weights are in shared memory.
    pub staged: bool,
    /// Dynamic shared memory.
    pub shared_bytes: usize,
}

/// The largest tile of up to `pixels` pixels for blocks of `width` channels (expanded: four times as
/// many) that fits into `limit` bytes, with its weights if that is wanted and possible. None for
/// widths that pe.cu does not have.
pub fn pair_tiling(
    element: Element,
    width: usize,
    pixels: usize,
    stage_weights: bool,
    limit: usize,
) -> Option<PairTiling> {
    const F16: [(usize, usize, &str); 4] = [
        (32, 128, "pair_f16_c32_p128"),
        (32, 64, "pair_f16_c32_p64"),
        (64, 64, "pair_f16_c64_p64"),
        (64, 32, "pair_f16_c64_p32"),
    ];
    const F32: [(usize, usize, &str); 2] = [(32, 64, "pair_f32_c32"), (64, 64, "pair_f32_c64")];
    let expanded = 4 * width;
    let tile = |&(_, pixels, kernel): &(usize, usize, &'static str)| match element {
        Element::F16 => {
            let activations = 2 * (expanded + width) * (pixels + 8);
            let weights = 2 * (width * (expanded + 8) + expanded * (width + 8));
            let staged = stage_weights && activations + weights <= limit;
            let shared_bytes = activations + if staged { weights } else { 0 };
            let threads = if (width, pixels) == (64, 64) { 2 * THREADS } else { THREADS };
            PairTiling { kernel, pixels, threads, staged, shared_bytes }
        }
        Element::F32 => {
            let shared_bytes = 4 * (width + 2 * 16) * (pixels + 4);
            PairTiling { kernel, pixels, threads: THREADS, staged: false, shared_bytes }
        }
    };
    let all = match element {
        Element::F16 => &F16[..],
        Element::F32 => &F32[..],
    };
    let of_width = all.iter().filter(|(w, ..)| *w == width).map(tile);
    let mut fitting = of_width.filter(|tiling| tiling.shared_bytes <= limit);
    fitting.clone().find(|tiling| tiling.pixels <= pixels).or_else(|| fitting.next_back())
}

/// The entry point like `kernel` that leaves bytes, from halves or from bytes.
pub fn pair_in_bytes(kernel: &'static str, from_bytes: bool) -> &'static str {
    let (to, both) = match kernel {
        "pair_f16_c32_p128" => ("pair_f16_c32_p128_to_u8", "pair_f16_c32_p128_u8"),
        "pair_f16_c32_p64" => ("pair_f16_c32_p64_to_u8", "pair_f16_c32_p64_u8"),
        "pair_f16_c64_p64" => ("pair_f16_c64_p64_to_u8", "pair_f16_c64_p64_u8"),
        "pair_f16_c64_p32" => ("pair_f16_c64_p32_to_u8", "pair_f16_c64_p32_u8"),
        // No other kernel of a pair works on halves.
        other => (other, other),
    };
    if from_bytes { both } else { to }
}

/// pe.cu: a block per tile of pixels.
pub fn pair(tiling: PairTiling, output: Shape, args: Vec<Arg>) -> Launch {
    let grid = grid(output.plane().div_ceil(tiling.pixels), 1, output.n);
    Launch {
        shared_bytes: tiling.shared_bytes as u32,
        ..launch(tiling.kernel, grid, [tiling.threads, 1, 1], args)
    }
}

/// A thread per element of a vector, per image.
pub fn elements(kernel: &'static str, len: usize, n: usize, args: Vec<Arg>) -> Launch {
    launch(kernel, grid(len.div_ceil(THREADS as usize), 1, n), [THREADS, 1, 1], args)
}
