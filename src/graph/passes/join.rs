//! Operators that read, pixel by pixel or row by row, what the one before has just written, marked as
//! one step with it: a block's projection and the next one's expansion, in strided blocks the expansion
//! with its neighbour, and all of a block whose only branch has dilation 1. A kernel that does both keeps
//! what is between them in registers, shared memory or cache. The mark changes nothing but the plan: see
//! [`Node::joined`](crate::graph::Node::joined).

use crate::graph::{Graph, Node, NodeId};
use crate::ops::{Act, Op, row_by_row};

pub(super) fn rewrite(mut graph: Graph) -> Graph {
    let consumers = graph.consumers();
    for i in 1..graph.nodes.len() {
        let (before, node) = (&graph.nodes[i - 1], &graph.nodes[i]);
        // Only the projection's result has other readers.
        let alone = consumers[i - 1].len() == 1;
        graph.nodes[i].joined = suit(before, node, NodeId(i - 1), alone);
    }
    graph
}

/// Whether `node` can run with the one before it, `id`, whose result only `node` reads if `alone`.
fn suit(before: &Node, node: &Node, id: NodeId, alone: bool) -> bool {
    if node.inputs.first() != Some(&id) {
        return false;
    }
    let plain = |node: &Node| node.inputs.len() == 1;
    match (&before.op, &node.op) {
        (Op::Conv1x1(first), Op::Conv1x1(second)) => {
            let pointwise = first.act != Act::Sigmoid && second.act != Act::Sigmoid;
            pointwise && plain(node) && !before.joined
        }
        (Op::Subsample, Op::Conv1x1(conv)) => alone && plain(node) && conv.act != Act::Sigmoid,
        (Op::Conv1x1(conv), Op::Cascade(cascade)) => {
            let first = plain(before) && conv.act != Act::Sigmoid && !before.joined;
            alone && first && row_by_row::near(cascade)
        }
        // A third one. What it adds is there already.
        (Op::Cascade(_), Op::Conv1x1(conv)) => {
            let apart = node.inputs[1..].iter().all(|input| input.0 + 1 < id.0);
            alone && before.joined && apart && conv.act != Act::Sigmoid
        }
        _ => false,
    }
}
