//! Residual additions and non-linearities, done by the step before them.
//!
//! Not a [`Rewriter`](super::rewriter::Rewriter)'s work: nodes are changed after they were written,
//! parameters are not, and the graph of a training step comes without their values.

use crate::graph::{Graph, Node, NodeId};
use crate::ops::{Act, Op};

/// Merges `Add` and `Activation` nodes into the node before them where that node has no other
/// consumer and `slot` offers a place for an activation (an addition needs a free one too).
pub(super) fn epilogues(graph: &Graph, slot: impl Fn(&mut Op, Act) -> Option<&mut Act>) -> Graph {
    let consumers = graph.consumers();
    let mut nodes: Vec<Node> = Vec::new();
    let mut moved: Vec<NodeId> = Vec::new();
    for node in &graph.nodes {
        let inputs: Vec<NodeId> = node.inputs.iter().map(|i| moved[i.0]).collect();
        let alone = node.inputs.first().is_some_and(|i| consumers[i.0].len() == 1);
        let at = match inputs.first() {
            Some(&before)
                if alone && merge(&mut nodes[before.0], before, &node.op, &inputs, &slot) =>
            {
                before
            }
            _ => {
                nodes.push(Node { inputs, ..node.clone() });
                NodeId(nodes.len() - 1)
            }
        };
        moved.push(at);
    }
    Graph {
        nodes,
        params: graph.params.clone(),
        logits: moved[graph.logits.0],
        named: graph.named.iter().map(|(name, id)| (name.clone(), moved[id.0])).collect(),
    }
}

/// Merges an operator into its first operand, node `id`, where there is room for it.
fn merge(
    before: &mut Node,
    id: NodeId,
    op: &Op,
    inputs: &[NodeId],
    slot: impl Fn(&mut Op, Act) -> Option<&mut Act>,
) -> bool {
    match op {
        Op::Activation(activation) => {
            let act = activation.act;
            slot(&mut before.op, act).map(|slot| *slot = act).is_some()
        }
        Op::Add => {
            // The other operand must be there before the node that adds it now. An activation after
            // the node would come before the addition.
            let fits = inputs[1] < id
                && before.inputs.len() == 1
                && slot(&mut before.op, Act::Relu).is_some();
            if fits {
                before.inputs.push(inputs[1]);
            }
            fits
        }
        _ => false,
    }
}
