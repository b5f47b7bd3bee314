//! Graph rewrites. Training runs [`for_training`], inference [`for_inference`], which every
//! backend understands, and those of [`Rewrites`] that its backend asks for.

mod byte_scales;
mod collapse;
mod even_grid;
mod fold;
mod join;
mod rewriter;

use super::params::ParamStore;
use super::{Graph, Node, NodeId};
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
    /// ([`Node::byte_scale`]); what is computed is the same up to half a step of theirs.
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
    fuse_epilogues(graph, |op, act| match op {
        Op::BatchNorm(bn) if bn.act == Act::None && act != Act::Sigmoid => Some(&mut bn.act),
        _ => None,
    })
}

/// The graph that inference runs: batch norms are folded into the convolutions before them, and
/// residual additions and non-linearities are fused behind those. Exact up to rounding.
pub fn for_inference(graph: &Graph, params: &ParamStore) -> (Graph, ParamStore) {
    let (graph, params) = fold::batch_norms(graph, params);
    let graph = fuse_epilogues(&graph, |op, act| match op {
        Op::Conv1x1(conv) if conv.act == Act::None => Some(&mut conv.act),
        Op::Conv3x3(conv) if conv.act == Act::None && act != Act::Sigmoid => Some(&mut conv.act),
        _ => None,
    });
    (graph, params)
}

/// Merges `Add` and `Activation` nodes into the node before them where that node has no other
/// consumer and `slot` offers a place for an activation (an addition needs a free one too).
fn fuse_epilogues(graph: &Graph, slot: impl Fn(&mut Op, Act) -> Option<&mut Act>) -> Graph {
    let consumers = graph.consumers();
    let mut nodes: Vec<Node> = Vec::new();
    let mut moved: Vec<NodeId> = Vec::new();
    for node in &graph.nodes {
        let inputs: Vec<NodeId> = node.inputs.iter().map(|i| moved[i.0]).collect();
        let before = node.inputs.first().filter(|i| consumers[i.0].len() == 1).map(|i| moved[i.0]);
        let fused = before.filter(|&before| {
            let target = &mut nodes[before.0];
            match &node.op {
                Op::Activation(a) => match slot(&mut target.op, a.act) {
                    Some(act) => {
                        *act = a.act;
                        true
                    }
                    None => false,
                },
                Op::Add => {
                    let free = slot(&mut target.op, Act::Relu).is_some();
                    let fits = free && target.inputs.len() == 1 && inputs[1] < before;
                    if fits {
                        target.inputs.push(inputs[1]);
                    }
                    fits
                }
                _ => false,
            }
        });
        moved.push(fused.unwrap_or_else(|| {
            nodes.push(Node { inputs, ..node.clone() });
            NodeId(nodes.len() - 1)
        }));
    }
    Graph {
        nodes,
        params: graph.params.clone(),
        logits: moved[graph.logits.0],
        named: graph.named.iter().map(|(name, id)| (name.clone(), moved[id.0])).collect(),
    }
}

#[cfg(test)]
mod rewrite_tests;
#[cfg(test)]
mod tests;
