//! Strided blocks: what only even pixels need is computed on even pixels only.
//!
//! A depthwise convolution of stride 2 and even dilation d reads rows and columns 2 o + (k - 1) d:
//! even ones. On the plane of even rows and columns it is a convolution of stride 1 and dilation
//! d / 2, with the same zeros outside. So the expansion before it need not be computed elsewhere,
//! a quarter of the pixels. Strided blocks have no additions between branches (SPEC, "FPE block"),
//! so the branches are free to go different ways.

use super::rewriter::Rewriter;
use crate::graph::params::{ParamId, ParamStore};
use crate::graph::{Graph, NodeId};
use crate::ops::{Cascade, Conv1x1, Norm, Op};

/// A strided block: expansion, cascade, projection.
struct Block<'a> {
    expand: (NodeId, &'a Conv1x1),
    cascade: (NodeId, &'a Cascade, &'a [ParamId]),
    project: (NodeId, &'a Conv1x1),
}

pub(super) fn rewrite(graph: &Graph, old: &ParamStore) -> (Graph, ParamStore) {
    let consumers = graph.consumers();
    let blocks: Vec<Block> =
        (0..graph.nodes.len()).filter_map(|i| find(graph, &consumers, NodeId(i))).collect();
    let mut new = Rewriter::new(graph, old);
    for i in 0..graph.nodes.len() {
        let id = NodeId(i);
        if blocks.iter().any(|block| block.expand.0 == id) {
            continue; // written with its cascade, in parts
        }
        if let Some(block) = blocks.iter().find(|block| block.cascade.0 == id) {
            let branches = split(&mut new, block);
            new.replace(id, branches);
        } else if let Some(block) = blocks.iter().find(|block| block.project.0 == id) {
            let op = reorder_columns(&mut new, block);
            new.keep_with(id, op);
        } else {
            new.keep(id);
        }
    }
    new.finish()
}

/// The block around a strided cascade with an even dilation.
fn find<'a>(graph: &'a Graph, consumers: &[Vec<NodeId>], id: NodeId) -> Option<Block<'a>> {
    let node = graph.node(id);
    let Op::Cascade(cascade) = &node.op else { return None };
    let Norm::Folded(biases) = &cascade.norm else { return None };
    let even = cascade.dilations.iter().any(|d| d.is_multiple_of(2));
    if cascade.stride != 2 || cascade.addition || !even {
        return None;
    }
    let before = node.inputs[0];
    let Op::Conv1x1(expand) = &graph.node(before).op else { return None };
    let plain = graph.node(before).inputs.len() == 1 && consumers[before.0].len() == 1;
    let [after] = consumers[id.0][..] else { return None };
    let Op::Conv1x1(project) = &graph.node(after).op else { return None };
    plain.then_some(Block {
        expand: (before, expand),
        cascade: (id, cascade, biases),
        project: (after, project),
    })
}

/// Branches of odd dilation, then those of even dilation: the order in the rewritten block.
fn order(cascade: &Cascade) -> (Vec<usize>, Vec<usize>) {
    (0..cascade.dilations.len()).partition(|&i| !cascade.dilations[i].is_multiple_of(2))
}

fn split(new: &mut Rewriter, block: &Block) -> NodeId {
    let (odd, even) = order(block.cascade.1);
    let x = new.at(new.graph.node(block.expand.0).inputs[0]);
    let mut parts = Vec::new();
    if !odd.is_empty() {
        parts.push(part(new, block, &odd, "fine", 2, x));
    }
    let name = new.graph.node(block.cascade.0).name.clone();
    let coarse = new.node(format!("{name}.subsample"), Op::Subsample, vec![x]);
    parts.push(part(new, block, &even, "coarse", 1, coarse));
    match parts[..] {
        [only] => only,
        _ => new.node(name, Op::Concat, parts),
    }
}

/// Expansion and convolutions of some branches, at the resolution of `x`.
fn part(
    new: &mut Rewriter,
    block: &Block,
    branches: &[usize],
    label: &str,
    stride: usize,
    x: NodeId,
) -> NodeId {
    let (old, graph) = (new.old, new.graph);
    let ((expand_id, expand), (cascade_id, cascade, biases)) = (block.expand, block.cascade);
    let (width, inputs) = (cascade.width(), expand.in_channels);
    let rows = |values: &[f32], row: usize| -> Vec<f32> {
        let rows = branches.iter().map(|b| &values[b * width * row..(b + 1) * width * row]);
        rows.flatten().copied().collect()
    };
    let channels = branches.len() * width;
    let name = format!("{}.{label}", graph.node(expand_id).name);
    let weights = rows(old.get(expand.weight), inputs);
    let op = Conv1x1 {
        out_channels: channels,
        weight: new.params.weight(&name, [channels, inputs], weights),
        bias: expand.bias.map(|b| new.params.bias(&name, rows(old.get(b), 1))),
        ..expand.clone()
    };
    let x = new.node(name, Op::Conv1x1(op), vec![x]);

    let mut copy = |id: ParamId| new.params.copy(old, id);
    // Dilation d on every second pixel is d / 2 on what is left.
    let divisor = 2 / stride;
    let op = Cascade {
        channels,
        stride,
        dilations: branches.iter().map(|&b| cascade.dilations[b] / divisor).collect(),
        addition: false,
        weights: branches.iter().map(|&b| copy(cascade.weights[b])).collect(),
        norm: Norm::Folded(branches.iter().map(|&b| copy(biases[b])).collect()),
    };
    new.node(format!("{}.{label}", graph.node(cascade_id).name), Op::Cascade(op), vec![x])
}

/// The projection with its columns in the order in which the branches now come.
fn reorder_columns(new: &mut Rewriter, block: &Block) -> Op {
    let (old, project) = (new.old, block.project.1);
    let (odd, even) = order(block.cascade.1);
    let width = block.cascade.1.width();
    let name = new.graph.node(block.project.0).name.clone();
    let values = old.get(project.weight);
    let rows = values.chunks(project.in_channels).flat_map(|row| {
        let branches = odd.iter().chain(&even);
        branches.flat_map(|b| row[b * width..(b + 1) * width].iter().copied())
    });
    let shape = [project.out_channels, project.in_channels];
    Op::Conv1x1(Conv1x1 {
        weight: new.params.weight(&name, shape, rows.collect()),
        bias: project.bias.map(|b| new.params.bias(&name, old.get(b).to_vec())),
        ..project.clone()
    })
}
