//! Launch shapes of stage_blocks.cu: cascades, projections and expansions of several blocks in one
//! cooperative launch, from the launches that would do them one by one.

use super::{Arg, Launch, PairTiling, grid, launch, pair_tiling};
use crate::backend::gpu::device::{Element, Place};

/// Threads of a block: STAGE_THREADS.
const STAGE_THREADS: u32 = 512;
/// Width and pixels of the pairs that the kernel has.
const WIDTH: usize = 64;
const PIXELS: usize = 64;
/// Blocks of the network in a launch: MOST_BLOCKS.
const MOST_BLOCKS: usize = 15;
/// Arguments of a pair that say what it does, before those that say how: the members of ProjectExpand.
const PAIR_MEMBERS: usize = 19;

/// What stage_blocks.cu can do in the place of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StagePart {
    /// cascade_walk.cu.
    Cascade,
    /// pe.cu, for the width that the kernel has.
    Pair,
}

impl StagePart {
    /// The part that a launch is, if it is one.
    pub fn of(launch: &Launch) -> Option<StagePart> {
        match launch.kernel {
            "cascade_walk_f16" | "cascade_walk_f32" => Some(StagePart::Cascade),
            "pair_f16_c64_p64" | "pair_f16_c64_p32" | "pair_f32_c64" => Some(StagePart::Pair),
            _ => None,
        }
    }
}

/// How many of the first launches go into one: a projection by itself or not, then cascades and
/// projections by turns. 0 where it would not be at least a cascade and a projection.
pub fn stage_run(parts: &[Option<StagePart>]) -> usize {
    let lone = usize::from(parts.first() == Some(&Some(StagePart::Pair)));
    let blocks = parts[lone..].chunks_exact(2).take(MOST_BLOCKS - lone);
    let blocks = blocks.take_while(|two| **two == [StagePart::Cascade, StagePart::Pair].map(Some));
    match 2 * blocks.count() {
        0 => 0,
        launches => lone + launches,
    }
}

/// The launches of a run ([`stage_run`]) in one, `barrier` being a counter of its own. None where their
/// chains or images differ, or where the shared memory exceeds `limit`.
pub fn stage_blocks(
    parts: &[Launch],
    element: Element,
    barrier: Place,
    stage_weights: bool,
    limit: usize,
) -> Option<Launch> {
    let tiling = pair_tiling(element, WIDTH, PIXELS, stage_weights, limit);
    let PairTiling { staged, shared_bytes, .. } = tiling.filter(|t| t.pixels == PIXELS)?;
    // In f32 twice the threads take weights of twice the rows at a time.
    let wider = if element == Element::F32 { 4 * 16 * 64 } else { 0 };
    let is_cascade = |part: &&Launch| StagePart::of(part) == Some(StagePart::Cascade);
    let cascades = parts.iter().filter(is_cascade);
    let most =
        cascades.clone().map(|part| part.shared_bytes as usize).max()?.max(shared_bytes + wider);
    let [_, chains, images] = cascades.clone().next()?.grid;
    let alike = |part: &Launch| match StagePart::of(part) {
        Some(StagePart::Pair) => part.grid[2] == images,
        _ => part.grid[1..] == [chains, images],
    };
    if !parts.iter().all(alike) {
        return None;
    }
    // Nothing is stored in bytes here: the scales at the end of both structs are not there.
    let members = |args: &[Arg]| Arg::Struct([args, &[Arg::Null, Arg::Null]].concat());
    let absent = members(&cascades.clone().next()?.args).absent();
    let mut blocks = Vec::with_capacity(MOST_BLOCKS);
    let mut cascade = None;
    for part in parts {
        if is_cascade(&part) {
            cascade = Some(members(&part.args));
        } else {
            let cascade = cascade.take().unwrap_or_else(|| absent.clone());
            blocks.push(Arg::Struct(vec![cascade, members(&part.args[..PAIR_MEMBERS])]));
        }
    }
    let count = blocks.len();
    let unused = blocks.first()?.absent();
    blocks.resize(MOST_BLOCKS, unused);
    let pieces = |part: &Launch| match StagePart::of(part) {
        Some(StagePart::Pair) => pair_pieces(part, images),
        _ => part.grid.iter().product(),
    };
    let int = |value: u32| Arg::I32(value as i32);
    let args = vec![
        barrier.into(),
        count.into(),
        int(chains),
        int(images),
        staged.into(),
        Arg::Struct(blocks),
    ];
    let kernel = match element {
        Element::F16 => "stage_blocks_f16_c64",
        Element::F32 => "stage_blocks_f32_c64",
    };
    let grid = grid(parts.iter().map(pieces).max()? as usize, 1, 1);
    (most <= limit).then(|| Launch {
        shared_bytes: most as u32,
        cooperative: true,
        ..launch(kernel, grid, [STAGE_THREADS, 1, 1], args)
    })
}

/// Pieces of 64 pixels in all of a pair's images.
fn pair_pieces(pair: &Launch, images: u32) -> u32 {
    let pixels = match pair.args.get(10) {
        Some(Arg::I32(pixels)) => *pixels as u32,
        _ => 0,
    };
    pixels.div_ceil(PIXELS as u32) * images
}

/// The launches in whose place one of stage_blocks.cu is, each with a block per piece of its work;
/// nothing for other kernels.
pub fn stage_parts(launch: &Launch) -> Vec<Launch> {
    let [_, count, Arg::I32(chains), Arg::I32(images), _, Arg::Struct(blocks)] = &launch.args[..]
    else {
        return Vec::new();
    };
    let (Arg::I32(count), true) = (count, launch.kernel.starts_with("stage_blocks_")) else {
        return Vec::new();
    };
    let [walk, pair] = match launch.kernel.contains("_f16") {
        true => ["cascade_walk_f16", "pair_f16_c64_p64"],
        false => ["cascade_walk_f32", "pair_f32_c64"],
    };
    let part = |kernel, grid, args: &[Arg]| Launch {
        kernel,
        grid,
        args: args.to_vec(),
        cooperative: false,
        ..launch.clone()
    };
    let mut parts = Vec::new();
    for block in &blocks[..*count as usize] {
        let Arg::Struct(two) = block else { continue };
        let [Arg::Struct(cascade), Arg::Struct(project)] = &two[..] else { continue };
        if cascade[0] != Arg::Null {
            let int = |at: usize| match cascade[at] {
                Arg::I32(value) => value as u32,
                _ => 0,
            };
            // Tile, then plane: launch::cascade_walk's arguments.
            let tiles = int(20).div_ceil(int(18)) * int(21).div_ceil(int(19));
            parts.push(part(walk, [tiles, *chains as u32, *images as u32], cascade));
        }
        let mut alone = part(pair, [1; 3], project);
        alone.grid = [pair_pieces(&alone, 1), 1, *images as u32];
        parts.push(alone);
    }
    parts
}
