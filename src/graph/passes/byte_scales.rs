//! Scales for keeping the expanded tensors of stride-1 blocks in 8 bits: what the expansion hands to
//! the cascade, and the cascade to the projection.
//!
//! Both are outputs of a batch norm and a ReLU. Over its training data a batch norm's output has mean
//! `bias` and deviation `weight`, so a channel's largest value is known without any data: 255 steps
//! reach [`DEVIATIONS`] deviations above the mean. benches/results has what that does to labels.

use std::collections::HashMap;

use crate::graph::params::ParamStore;
use crate::graph::{Graph, NodeId};
use crate::ops::{Act, BnParams, Norm, Op};

use super::rewriter::Rewriter;

/// Standard deviations above a channel's mean that the largest byte stands for.
const DEVIATIONS: f32 = 8.0;
/// Smallest largest value, so that a channel that never fires has a scale as well.
const SMALLEST: f32 = 1e-3;

/// `trained` is the graph before batch norms were folded, with its parameters; nodes are found in it
/// by their names.
pub(super) fn rewrite(
    graph: &Graph,
    params: &ParamStore,
    trained: (&Graph, &ParamStore),
) -> (Graph, ParamStore) {
    let scales = find(graph, trained);
    let mut new = Rewriter::new(graph, params);
    for i in 0..graph.nodes.len() {
        match scales.get(&i) {
            Some(scales) => new.keep_in_bytes(NodeId(i), scales.clone()),
            None => new.keep(NodeId(i)),
        }
    }
    new.finish()
}

/// Scales by node: for every cascade of stride 1 behind an expansion that nobody else reads.
fn find(graph: &Graph, (before, params): (&Graph, &ParamStore)) -> HashMap<usize, Vec<f32>> {
    let (consumers, followers) = (graph.consumers(), before.consumers());
    let trained = |name: &str| before.nodes.iter().position(|node| node.name == name);
    let mut scales = HashMap::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        let Op::Cascade(cascade) = &node.op else { continue };
        let input = node.inputs[0];
        let expansion = graph.node(input);
        let relu = matches!(&expansion.op, Op::Conv1x1(conv) if conv.act == Act::Relu);
        if cascade.stride != 1 || !relu || [input.0, i].iter().any(|&at| consumers[at].len() != 1) {
            continue;
        }
        let norms = trained(&node.name).map(|at| &before.nodes[at].op);
        let behind = trained(&expansion.name).map(|at| followers[at].as_slice());
        if let (Some(Op::Cascade(cascade)), Some(&[next])) = (norms, behind)
            && let (Norm::Batch(norms), Op::BatchNorm(norm)) =
                (&cascade.norm, &before.node(next).op)
        {
            scales.insert(input.0, of_norm(params, &norm.params));
            scales.insert(i, norms.iter().flat_map(|norm| of_norm(params, norm)).collect());
        }
    }
    scales
}

/// A scale per channel of a batch norm with a ReLU behind it.
fn of_norm(params: &ParamStore, norm: &BnParams) -> Vec<f32> {
    let channels = params.get(norm.weight).iter().zip(params.get(norm.bias));
    channels
        .map(|(weight, bias)| {
            (bias + DEVIATIONS * weight.abs()).max(weight.abs()).max(SMALLEST) / 255.0
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::graph::passes::{Rewrites, for_inference_with};
    use crate::model::Model;

    #[test]
    fn blocks_of_stride_1_get_scales_of_their_batch_norms_and_no_other_node_does() {
        let mut model =
            Model::init(ModelConfig { p: 2, q: 3, ..ModelConfig::default() }, 0).unwrap();
        let set = |model: &mut Model, name: &str, value: f32| {
            let id = model.params.find(name).unwrap();
            model.params.get_mut(id)[5] = value;
        };
        set(&mut model, "stage3.1.expand.bn.weight", -0.5);
        set(&mut model, "stage3.1.expand.bn.bias", 2.0);
        // Whatever the mean, one deviation is kept.
        set(&mut model, "stage3.1.branches.1.bn.bias", -20.0);
        let graph = Graph::fpenet(&model.config).unwrap();
        let rewrites = Rewrites { byte_scales: true, ..Rewrites::ALL };
        let (graph, params) = for_inference_with(&graph, &model.params, rewrites);
        let scaled: Vec<&str> = graph
            .nodes
            .iter()
            .filter(|node| node.byte_scale.is_some())
            .map(|node| node.name.as_str())
            .collect();
        // Stage 1's block has one branch, and a kernel of its own.
        let blocks = ["stage1.0", "stage2.1", "stage3.1", "stage3.2"];
        let expected: Vec<String> = blocks
            .iter()
            .flat_map(|block| [format!("{block}.expand.conv"), format!("{block}.branches")])
            .collect();
        assert_eq!(scaled, expected);
        let of = |name: &str| params.get(params.find(&format!("{name}.byte_scale")).unwrap());
        let expand = of("stage3.1.expand.conv");
        assert_eq!((expand.len(), expand[4], expand[5]), (512, 8.0 / 255.0, 6.0 / 255.0));
        assert_eq!(expand[256 + 5], 1.0 / expand[5]);
        let branches = of("stage3.1.branches");
        assert_eq!((branches[64 + 4], branches[64 + 5]), (8.0 / 255.0, 1.0 / 255.0));
        // Nothing but scales is new.
        let (without, _) = for_inference_with(
            &Graph::fpenet(&model.config).unwrap(),
            &model.params,
            Rewrites::ALL,
        );
        assert_eq!(graph.nodes.len(), without.nodes.len());
        assert_eq!(graph.params.len(), without.params.len() + scaled.len());
    }
}
