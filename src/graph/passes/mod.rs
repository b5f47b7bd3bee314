//! Graph rewrites. Training runs [`for_training`], inference [`for_inference`], which every
//! backend understands, and those of [`Rewrites`] that its backend asks for.

mod byte_scales;
mod collapse;
mod even_grid;
mod fold;
mod fuse;
mod join;
mod rewriter;

use super::Graph;
use super::params::ParamStore;
use crate::ops::{Act, Op};

/// Rewrites beyond [`for_inference`] that save work without changing the function computed. Each
/// is exact up to rounding, and each needs operators or an executor that not every backend has.
/// Scales for 8-bit storage are the exception, and never asked for by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rewrites {
    /// The even-dilated branches of strided blocks on the even rows and columns only.
    pub even_grid: bool,
    /// Decoder and classifier as one linear map onto the class scores; the decoder's
    /// intermediates are gone.
    pub collapse_decoder: bool,
    /// A block's projection and the next one's expansion as one step.
    pub join_pointwise: bool,
    /// Scales by which the expanded tensors of stride-1 blocks may be kept in 8 bits
    /// ([`Node::byte_scale`](super::Node::byte_scale)); what is computed is the same up to half a step of theirs.
    pub byte_scales: bool,
}

impl Rewrites {
    /// The plain graph of [`for_inference`].
    pub const NONE: Rewrites = Rewrites {
        even_grid: false,
        collapse_decoder: false,
        join_pointwise: false,
        byte_scales: false,
    };
    /// Everything that is exact.
    pub const ALL: Rewrites = Rewrites {
        even_grid: true,
        collapse_decoder: true,
        join_pointwise: true,
        byte_scales: false,
    };
}

/// [`for_inference`] and the given rewrites.
pub fn for_inference_with(
    graph: &Graph,
    params: &ParamStore,
    rewrites: Rewrites,
) -> (Graph, ParamStore) {
    let trained = (graph, params);
    let (mut graph, mut params) = for_inference(graph, params);
    if rewrites.even_grid {
        (graph, params) = even_grid::rewrite(&graph, &params);
    }
    if rewrites.collapse_decoder {
        (graph, params) = collapse::rewrite(&graph, &params);
    }
    if rewrites.byte_scales {
        (graph, params) = byte_scales::rewrite(&graph, &params, trained);
    }
    if rewrites.join_pointwise {
        graph = join::rewrite(graph);
    }
    (graph, params)
}

/// The graph that a training step runs: residual additions and ReLUs are done by the batch norm
/// before them, in the pass over memory that it makes anyway.
pub fn for_training(graph: &Graph) -> Graph {
    fuse::epilogues(graph, |op, act| match op {
        Op::BatchNorm(bn) if bn.act == Act::None && act != Act::Sigmoid => Some(&mut bn.act),
        _ => None,
    })
}

/// The graph that inference runs: batch norms are folded into the convolutions before them, and
/// residual additions and non-linearities are fused behind those. Exact up to rounding.
pub fn for_inference(graph: &Graph, params: &ParamStore) -> (Graph, ParamStore) {
    let (graph, params) = fold::batch_norms(graph, params);
    let graph = fuse::epilogues(&graph, |op, act| match op {
        Op::Conv1x1(conv) if conv.act == Act::None => Some(&mut conv.act),
        Op::Conv3x3(conv) if conv.act == Act::None && act != Act::Sigmoid => Some(&mut conv.act),
        _ => None,
    });
    (graph, params)
}

#[cfg(test)]
mod rewrite_tests;
#[cfg(test)]
mod tests;
