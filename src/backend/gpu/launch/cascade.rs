//! Launch shapes of the fused cascade: what of a plane a block has in shared memory, tile by tile.

use super::{Arg, Launch, grid, launch};
use crate::backend::gpu::device::Element;
use crate::graph::Shape;

/// How the fused cascade covers a plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CascadeTiling {
    /// Output rows of a tile.
    pub tile_h: usize,
    /// Output columns of a tile.
    pub tile_w: usize,
    /// Elements of the largest region of a branch's input, tile and halo.
    pub region: usize,
    /// Dynamic shared memory.
    pub shared_bytes: usize,
}

impl CascadeTiling {
    /// Warps of a block of cascade_walk.cu.
    pub fn walk_warps(&self) -> usize {
        if self.region <= 1024 { 8 } else { 16 }
    }
}

/// What decides the tiling of the fused cascade.
#[derive(Debug, Clone, Copy)]
pub struct CascadeShape<'a> {
    /// Dilation of each branch.
    pub dilations: &'a [usize],
    /// Whether branches take in the one before.
    pub addition: bool,
    /// 1 or 2.
    pub stride: usize,
    /// Height and width of the input.
    pub input: (usize, usize),
    /// Height and width of the output.
    pub output: (usize, usize),
}

impl CascadeShape<'_> {
    /// Rows and columns beyond a tile that a branch makes for those behind it.
    fn reach(&self, branch: usize) -> usize {
        if self.addition { self.dilations[branch + 1..].iter().sum() } else { 0 }
    }

    /// Rows and columns beyond a tile that are read, all branches together.
    fn halo(&self) -> usize {
        if self.addition { self.dilations.iter().sum() } else { self.largest() }
    }

    fn largest(&self) -> usize {
        self.dilations.iter().copied().max().unwrap_or(0)
    }

    /// Whether the taps of two neighbouring columns are pairs of neighbours: cascade_walk.cuh.
    fn in_pairs(&self) -> bool {
        self.stride == 1 && self.dilations.iter().all(|d| *d == 1 || d.is_multiple_of(2))
    }

    /// Elements of the largest input region for tiles of `tile_h` x `tile_w` outputs: the tile, as
    /// far beyond it as the following branches read, and this branch's own dilation.
    fn region(&self, tile_h: usize, tile_w: usize) -> usize {
        let region = |i: usize| {
            let dilation = self.dilations[i];
            let reach = self.reach(i);
            let sub = if self.stride == 2 && dilation.is_multiple_of(2) { 2 } else { 1 };
            let side = |tile: usize, input: usize, output: usize| {
                let outputs = (tile + 2 * reach).min(output);
                let inputs = (outputs - 1) * (self.stride / sub) + 2 * (dilation / sub) + 1;
                inputs.min(input.div_ceil(sub))
            };
            side(tile_h, self.input.0, self.output.0) * side(tile_w, self.input.1, self.output.1)
        };
        (0..self.dilations.len()).map(region).max().unwrap_or(0)
    }

    /// Elements that the blocks of one chain load for tiles of `tile_h` x `tile_w` outputs, all
    /// branches, halos included.
    pub fn loaded(&self, (tile_h, tile_w): (usize, usize)) -> usize {
        let span = |tile: usize, input: usize, output: usize, branch: usize| -> usize {
            let dilation = self.dilations[branch];
            let reach = self.reach(branch);
            let sub = if self.stride == 2 && dilation.is_multiple_of(2) { 2 } else { 1 };
            let (step, d) = (self.stride / sub, dilation / sub);
            let tiles = (0..output).step_by(tile.max(1)).map(|from| {
                let first = from.saturating_sub(reach);
                let end = (from + tile.max(1) + reach).min(output);
                let begin = (first * step).saturating_sub(d);
                ((end - 1) * step + d + 1).min(input.div_ceil(sub)) - begin
            });
            tiles.sum()
        };
        let branch = |i: usize| {
            let rows = span(tile_h, self.input.0, self.output.0, i);
            rows * span(tile_w, self.input.1, self.output.1, i)
        };
        (0..self.dilations.len()).map(branch).sum()
    }

    /// The largest tile whose regions fit into `limit` bytes of shared memory: the whole plane if
    /// possible. None where not even a small one fits (huge dilations).
    pub fn tiling(&self, limit: usize) -> Option<CascadeTiling> {
        const TILES: [(usize, usize); 7] =
            [(64, 128), (64, 64), (32, 64), (32, 32), (16, 32), (8, 32), (8, 8)];
        let buffers = if self.addition && self.dilations.len() > 1 { 2 } else { 1 };
        let (h, w) = self.output;
        std::iter::once((h, w))
            .chain(TILES.map(|(tile_h, tile_w)| (tile_h.min(h), tile_w.min(w))))
            .map(|(tile_h, tile_w)| {
                let region = self.region(tile_h, tile_w);
                CascadeTiling { tile_h, tile_w, region, shared_bytes: 4 * buffers * region }
            })
            .find(|tiling| tiling.shared_bytes <= limit)
    }

    /// The same for cascade_walk.cu, whose planes are as the tensors are stored, of one size for all
    /// branches, with even rows. None as well for stride 2 and for odd dilations other than 1.
    pub fn walk_tiling(&self, element: Element, limit: usize) -> Option<CascadeTiling> {
        const TILES: [(usize, usize); 6] =
            [(64, 128), (64, 64), (32, 64), (32, 32), (16, 32), (8, 32)];
        let possible = self.in_pairs();
        let halo = self.halo();
        let buffers = if self.addition && self.dilations.len() > 1 { 2 } else { 1 };
        let (h, w) = self.output;
        let tiles =
            TILES.map(|(tile_h, tile_w)| (tile_h.min(h), if tile_w < w { tile_w } else { w }));
        std::iter::once((h, w))
            .chain(tiles)
            .map(|(tile_h, tile_w)| {
                let rows = (tile_h + 2 * halo).min(h);
                let columns = (tile_w + 2 * halo + 2).min(w.next_multiple_of(2));
                let region = rows * columns.next_multiple_of(2);
                let shared_bytes = element.size() * buffers * region;
                CascadeTiling { tile_h, tile_w, region, shared_bytes }
            })
            .find(|tiling| possible && tiling.shared_bytes <= limit)
    }

    /// The same for cascade_ahead.cu: tiles of whole rows, the largest that make enough blocks of
    /// `planes` chains of all images. None as well for rows that are not whole vectors.
    pub fn ahead_tiling(
        &self,
        element: Element,
        planes: usize,
        limit: usize,
    ) -> Option<CascadeTiling> {
        self.rows_tiling(element, planes, limit.checked_sub(AHEAD_FIXED)?)
    }

    /// The same for cascade_mma.cu, with how many warps stand side by side in each branch (binary
    /// logarithms). None as well for f32, dilations above 8 and rows that are not whole 16 columns.
    pub fn mma_tiling(
        &self,
        element: Element,
        planes: usize,
        limit: usize,
    ) -> Option<(CascadeTiling, [usize; 4])> {
        let columns = self.output.1;
        let suits = columns.is_multiple_of(MMA_SIDE) && self.largest() <= MMA_REACH;
        if element != Element::F16 || !suits {
            return None;
        }
        let bands = MMA_BANDS * self.dilations.len();
        let mut tiling = self.rows_tiling(element, planes, limit.checked_sub(bands)?)?;
        tiling.shared_bytes += bands;
        let mut across = [0; 4];
        for (i, across) in across.iter_mut().enumerate().take(self.dilations.len()) {
            let reach = self.reach(i);
            let rows = (tiling.tile_h + 2 * reach).min(self.output.0).div_ceil(MMA_SIDE);
            let columns = columns / MMA_SIDE;
            // A warp's steps down cost about as much for their rows as for each step along them.
            let steps =
                |log: &usize| rows.div_ceil(AHEAD_WARPS >> log) * (1 + columns.div_ceil(1 << log));
            *across = (0..=AHEAD_WARPS.ilog2() as usize).min_by_key(steps).unwrap_or(0);
        }
        Some((tiling, across))
    }

    /// Tiles of whole rows with what all branches read of them at once, zeros beside every row, and a row
    /// of zeros (kernels/cascade_ahead.cuh).
    fn rows_tiling(&self, element: Element, planes: usize, limit: usize) -> Option<CascadeTiling> {
        const ENOUGH: usize = 96;
        const LEAST_ROWS: usize = 8;
        let wide = VECTOR_BYTES / element.size();
        let (h, w) = self.output;
        // A warp loads up to 32 vectors of a row.
        let whole_vectors = w.is_multiple_of(wide) && w <= AHEAD_WARPS * 32 * wide;
        if !self.in_pairs() || !whole_vectors {
            return None;
        }
        let halo = self.halo();
        let pitch = w + 2 * self.largest().next_multiple_of(wide);
        let tiling = |tile_h: usize| {
            let rows = (tile_h + 2 * halo).min(h);
            let elements = (self.dilations.len() * rows + 1) * pitch;
            let shared_bytes = element.size() * elements;
            CascadeTiling { tile_h, tile_w: w, region: rows * pitch, shared_bytes }
        };
        let halves =
            std::iter::successors(Some(h), |rows| (*rows > LEAST_ROWS).then(|| rows.div_ceil(2)));
        let fits = |tiling: &CascadeTiling| tiling.shared_bytes <= limit;
        let enough = |tiling: &CascadeTiling| h.div_ceil(tiling.tile_h) * planes >= ENOUGH;
        let fitting = halves.map(tiling).filter(fits);
        fitting.clone().find(enough).or_else(|| fitting.last())
    }
}

/// Warps of a block of cascade_ahead.cu and cascade_mma.cu.
pub const AHEAD_WARPS: usize = 16;
/// Bytes that they move at once.
const VECTOR_BYTES: usize = 16;
/// Shared memory of cascade_ahead.cu beside what a launch asks for, at most.
const AHEAD_FIXED: usize = 256;
/// Rows and columns that a warp of cascade_mma.cu makes at once.
const MMA_SIDE: usize = 16;
/// Columns beside a tile that the taps of cascade_mma.cu reach.
const MMA_REACH: usize = 8;
/// What cascade_mma.cu has for each branch beside planes: 6 vectors of 16 bytes for each lane.
const MMA_BANDS: usize = 6 * 16 * 32;

/// A cascade in one launch, a block per tile, chain and image: cascade_walk.cu, cascade_ahead.cu and
/// cascade_mma.cu have blocks of whole `warps`.
pub fn cascade_warps(
    kernel: &'static str,
    warps: usize,
    tiling: CascadeTiling,
    output: Shape,
    chains: usize,
    args: Vec<Arg>,
) -> Launch {
    let block = [32 * warps as u32, 1, 1];
    Launch { block, ..cascade_forward(kernel, tiling, output, chains, args) }
}

/// cascade.cu, all branches in one launch: a block per tile, chain and image.
pub fn cascade_forward(
    kernel: &'static str,
    tiling: CascadeTiling,
    output: Shape,
    chains: usize,
    args: Vec<Arg>,
) -> Launch {
    let tiles = output.h.div_ceil(tiling.tile_h) * output.w.div_ceil(tiling.tile_w);
    // A large region leaves room for one block per multiprocessor: that one has to fill it.
    let rows = match tiling.region {
        0..=1024 => 8,
        1025..=4096 => 16,
        _ => 32,
    };
    Launch {
        shared_bytes: tiling.shared_bytes as u32,
        ..launch(kernel, grid(tiles, chains, output.n), [32, rows, 1], args)
    }
}
