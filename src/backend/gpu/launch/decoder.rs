//! Launch shapes of the collapsed decoder: meu_scores.cu, decoder.cu, decoder_sums.cu and
//! decoder_labels.cu.

use super::{Arg, Launch, THREADS, elements, grid, launch, tiles};
use crate::backend::gpu::device::Element;
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
pub const LABELS: (usize, usize) = (16, 64);

/// Most pixels of a side of `from` that `tile` neighbours are interpolated from on a side of `to`:
/// the first and the last of them read pixels this far apart, and one beyond.
pub fn read_by(tile: usize, from: usize, to: usize) -> usize {
    ((tile.min(to) - 1) * from).div_ceil(to).saturating_add(3).min(from)
}

/// For scores of `inputs` channels at the size of `x`, labels at `size`; None where the scores of a
/// tile do not fit into `limit` bytes.
pub fn labels_tiling(x: Shape, size: Shape, inputs: usize, limit: usize) -> Option<LabelsTiling> {
    let pitch = read_by(LABELS.0, x.h, size.h) * read_by(LABELS.1, x.w, size.w);
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

/// The collapsed decoder as decoder_sums.cu and decoder_labels.cu see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderShape {
    /// High-level features, at an eighth of the image's size.
    pub s3: Shape,
    /// Low-level features of decoder2, at a quarter.
    pub x2: Shape,
    /// Low-level features of decoder1, at half the size.
    pub x1: Shape,
    /// The image.
    pub size: Shape,
    /// Class scores.
    pub classes: usize,
    /// Channels of decoder2.
    pub width2: usize,
    /// Channels of decoder1.
    pub width1: usize,
}

/// How both kernels cover it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderTiling {
    /// Row length of a tile's own pixels of s3 in decoder_sums.cu, elements.
    pub own_pitch: usize,
    /// Floats for them, and for what comes before them in the same place.
    pub own_len: usize,
    /// Floats for the products that t is made of.
    pub products: usize,
    /// Floats for these two with the weights of t, or for what the last block does.
    pub room: usize,
    /// Groups of pixels of both modules' scores that a tile of labels reads.
    pub slots: usize,
    /// Dynamic shared memory of both kernels.
    pub shared_bytes: [usize; 2],
}

/// Pixels of x2 that a block of decoder_sums.cu works on: rows and columns.
pub const SUMS_TILE: (usize, usize) = (8, 32);
const SUMS_PIXELS: usize = SUMS_TILE.0 * SUMS_TILE.1;
/// Most rows of s3 around them: LOW_ROWS of decoder_sums.cu.
const LOW_ROWS: usize = 7;
/// Threads of its blocks.
const SUMS_THREADS: u32 = 512;
/// Rows of a map: MAP_ROWS of decoder.cuh, the last one for the spatial attention.
pub const MAP_ROWS: usize = 20;
/// Rows that tensor cores make of it, in tiles of 8.
const TENSOR_ROWS: usize = 24;
/// HALF_PAD of tile.cuh.
const HALF_PAD: usize = 8;
/// Pixels that a warp makes scores of at a time, and floats for them: GROUP, SLOT of decoder.cuh.
const GROUP: usize = 32;
const SLOT: usize = GROUP * MAP_ROWS + 8;

impl DecoderShape {
    /// Means of an image: of s3, of x2, of s3 under the attention, of that.
    pub fn means(&self) -> usize {
        2 * self.s3.c + self.x2.c + 1
    }

    /// Floats of a block's sums, in whole quads.
    pub fn sums_pitch(&self) -> usize {
        self.means().next_multiple_of(4)
    }

    /// Elements of the map that takes `channels` values to scores, with what is added to them (f32).
    pub fn map_len(element: Element, channels: usize) -> usize {
        match element {
            Element::F32 => MAP_ROWS * (channels + 1),
            Element::F16 => TENSOR_ROWS * (channels + HALF_PAD + 2),
        }
    }

    /// Blocks of decoder_sums.cu per image.
    pub fn sum_blocks(&self) -> usize {
        self.x2.h.div_ceil(SUMS_TILE.0) * self.x2.w.div_ceil(SUMS_TILE.1)
    }

    /// None where the kernels do not have such a decoder: too many classes, channels that are no
    /// whole number of tiles of the tensor cores, s3 not half as large as x2, or more shared memory
    /// than `limit`.
    pub fn tiling(&self, element: Element, limit: usize) -> Option<DecoderTiling> {
        let (s3, x2, x1) = (self.s3, self.x2, self.x1);
        let halved = (s3.h, s3.w) == (x2.h.div_ceil(2), x2.w.div_ceil(2));
        let whole = |shape: Shape| element == Element::F32 || shape.c.is_multiple_of(16);
        if self.classes >= MAP_ROWS || !halved || ![s3, x2, x1].into_iter().all(whole) {
            return None;
        }
        let (own_pitch, own_len, products, room) = self.sums_floats(element);
        let beside = SUMS_PIXELS + (SUMS_TILE.0 + LOW_ROWS) * SUMS_TILE.1;
        let sums = room + beside + self.sums_pitch() + 3 * self.width2 + self.width1;
        let (slots, labels) = self.labels_floats(element);
        let shared_bytes = [4 * sums, 4 * labels];
        let fits = shared_bytes.iter().all(|bytes| *bytes <= limit);
        fits.then_some(DecoderTiling { own_pitch, own_len, products, room, slots, shared_bytes })
    }

    /// What decoder_sums.cu shares, in [`DecoderTiling`]'s order.
    fn sums_floats(&self, element: Element) -> (usize, usize, usize, usize) {
        let (s3, x2) = (self.s3, self.x2);
        // Where x2 has an odd side, a tile may own a pixel more.
        let own = |tile: usize, low: usize, high: usize| (tile / 2 + high % 2).min(low);
        let own = own(SUMS_TILE.0, s3.h, x2.h) * own(SUMS_TILE.1, s3.w, x2.w);
        let (own_pitch, products, map) = match element {
            Element::F32 => (own.next_multiple_of(8), 0, MAP_ROWS * s3.c),
            Element::F16 => {
                let own = own.next_multiple_of(GROUP);
                (own + HALF_PAD, TENSOR_ROWS * own, TENSOR_ROWS * (s3.c + HALF_PAD) / 2)
            }
        };
        let threads = SUMS_THREADS as usize;
        let dots = threads / 32 * SUMS_PIXELS;
        let own_len = (own_pitch * s3.c * element.size() / 4).max(dots).next_multiple_of(8);
        let (width2, width1) = (self.width2, self.width1);
        let parts = threads / 32 * self.sums_pitch();
        let last = parts.max(MAP_ROWS * (width2 + width1));
        (own_pitch, own_len, products, (own_len + products + map).max(last).next_multiple_of(8))
    }

    /// Groups of pixels of a tile of labels, and floats of decoder_labels.cu.
    fn labels_floats(&self, element: Element) -> (usize, usize) {
        let (x2, x1, size) = (self.x2, self.x1, self.size);
        // Tiles then begin in the middle of two pixels.
        let doubled = (size.h, size.w) == (2 * x1.h, 2 * x1.w);
        let fine = |tile: usize, from: usize, to: usize| {
            if doubled { (tile / 2 + 1).min(from) } else { read_by(tile, from, to) }
        };
        let coarse = |tile: usize, from: usize, to: usize| {
            if to == 2 * from { (tile / 2 + 2).min(from) } else { read_by(tile, from, to) }
        };
        let (rows, columns) = (fine(LABELS.0, x1.h, size.h), fine(LABELS.1, x1.w, size.w));
        let (z_rows, z_columns) = (coarse(rows, x2.h, x1.h), coarse(columns, x2.w, x1.w));
        let slots = (rows * columns).div_ceil(GROUP) + (z_rows * z_columns).div_ceil(GROUP);
        let maps: usize = [x2.c, x1.c].map(|c| Self::map_len(element, c)).iter().sum();
        // Two positions and a fraction for each row and column.
        let taps = 3 * (rows + columns + z_rows + z_columns);
        (slots, slots * SLOT + maps * element.size() / 4 + taps)
    }
}

/// decoder_sums.cu: a block per tile of 32 x 8 pixels of x2.
pub fn decoder_sums(
    kernel: &'static str,
    tiling: DecoderTiling,
    shape: &DecoderShape,
    args: Vec<Arg>,
) -> Launch {
    let shared_bytes = tiling.shared_bytes[0] as u32;
    let grid = grid(shape.sum_blocks(), 1, shape.x2.n);
    Launch { shared_bytes, ..launch(kernel, grid, [SUMS_THREADS, 1, 1], args) }
}

/// decoder_labels.cu: a block per tile of 64 x 16 labels.
pub fn decoder_labels(
    kernel: &'static str,
    tiling: DecoderTiling,
    size: Shape,
    args: Vec<Arg>,
) -> Launch {
    let tiles = size.h.div_ceil(LABELS.0) * size.w.div_ceil(LABELS.1);
    let shared_bytes = tiling.shared_bytes[1] as u32;
    Launch { shared_bytes, ..launch(kernel, grid(tiles, 1, size.n), [THREADS, 1, 1], args) }
}
