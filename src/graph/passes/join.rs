//! A block's projection and the next block's expansion, marked as one step.
//!
//! The expansion reads, pixel by pixel, what the projection has just written: a kernel that does both
//! keeps it in registers or shared memory. The mark changes nothing but the plan: see
//! [`Node::joined`](crate::graph::Node::joined).

use crate::graph::{Graph, NodeId};
use crate::ops::{Act, Op};

pub(super) fn rewrite(mut graph: Graph) -> Graph {
    for i in 1..graph.nodes.len() {
        let before = &graph.nodes[i - 1];
        let node = &graph.nodes[i];
        let (Op::Conv1x1(first), Op::Conv1x1(second)) = (&before.op, &node.op) else { continue };
        let pointwise = first.act != Act::Sigmoid && second.act != Act::Sigmoid;
        graph.nodes[i].joined = pointwise && !before.joined && node.inputs == [NodeId(i - 1)];
    }
    graph
}
