//! Graph rewrites. Training runs [`for_training`], inference [`for_inference`].

use super::params::{ParamId, ParamRole, ParamSpec, ParamStore, assign_offsets};
use super::{Graph, Node, NodeId};
use crate::ops::batch_norm::EPS;
use crate::ops::{Act, BnParams, Norm, Op};

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
    let (graph, params) = fold_batch_norms(graph, params);
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
            nodes.push(Node { name: node.name.clone(), op: node.op.clone(), inputs });
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

/// The parameter table of a rewritten graph, with values.
#[derive(Default)]
struct NewParams {
    specs: Vec<ParamSpec>,
    values: Vec<Vec<f32>>,
}

impl NewParams {
    fn push(&mut self, name: String, shape: Vec<usize>, role: ParamRole, v: Vec<f32>) -> ParamId {
        self.specs.push(ParamSpec { name, shape, role, offset: 0 });
        self.values.push(v);
        ParamId(self.specs.len() - 1)
    }

    fn copy(&mut self, old: &ParamStore, id: ParamId) -> ParamId {
        let spec = &old.specs[id.0];
        self.push(spec.name.clone(), spec.shape.clone(), spec.role, old.get(id).to_vec())
    }

    /// Weights and bias of a convolution (rows of equal length, one per output channel) with the
    /// batch norm behind it: scale = weight / sqrt(var + eps), w' = scale * w,
    /// b' = bias + scale * (b - mean).
    fn fold(
        &mut self,
        old: &ParamStore,
        weight: ParamId,
        bias: Option<ParamId>,
        bn: &BnParams,
    ) -> (ParamId, ParamId) {
        let spec = &old.specs[weight.0];
        let channels = spec.shape[0];
        let row = spec.len() / channels;
        let (mut w, mut b) = (old.get(weight).to_vec(), Vec::with_capacity(channels));
        for (c, w) in w.chunks_mut(row).enumerate() {
            let at = |id: ParamId| f64::from(old.get(id)[c]);
            let scale = at(bn.weight) / (at(bn.running_var) + f64::from(EPS)).sqrt();
            let before = bias.map_or(0.0, at);
            b.push((at(bn.bias) + scale * (before - at(bn.running_mean))) as f32);
            w.iter_mut().for_each(|w| *w = (f64::from(*w) * scale) as f32);
        }
        let bias_name = match spec.name.strip_suffix(".weight") {
            Some(stem) => format!("{stem}.bias"),
            None => format!("{}.bias", spec.name),
        };
        let weight = self.push(spec.name.clone(), spec.shape.clone(), spec.role, w);
        (weight, self.push(bias_name, vec![channels], ParamRole::Bias, b))
    }

    fn finish(mut self) -> ParamStore {
        assign_offsets(&mut self.specs);
        let mut store = ParamStore::zeros(&self.specs);
        for (i, values) in self.values.iter().enumerate() {
            store.get_mut(ParamId(i)).copy_from_slice(values);
        }
        store
    }
}

fn fold_batch_norms(graph: &Graph, old: &ParamStore) -> (Graph, ParamStore) {
    let consumers = graph.consumers();
    let mut params = NewParams::default();
    let mut nodes: Vec<Node> = Vec::new();
    let mut moved: Vec<NodeId> = Vec::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        let follower = match consumers[i].as_slice() {
            [next] => match &graph.node(*next).op {
                Op::BatchNorm(bn) => Some(bn.params),
                _ => None,
            },
            _ => None,
        };
        let op = match &node.op {
            // Its convolution took it in; every batch norm of this network follows one.
            Op::BatchNorm(_) => {
                moved.push(moved[node.inputs[0].0]);
                continue;
            }
            Op::Conv1x1(conv) => {
                let mut conv = conv.clone();
                (conv.weight, conv.bias) = match follower {
                    Some(bn) => {
                        let (w, b) = params.fold(old, conv.weight, conv.bias, &bn);
                        (w, Some(b))
                    }
                    None => (params.copy(old, conv.weight), conv.bias.map(|b| params.copy(old, b))),
                };
                Op::Conv1x1(conv)
            }
            Op::Conv3x3(conv) => {
                let mut conv = conv.clone();
                (conv.weight, conv.bias) = match follower {
                    Some(bn) => {
                        let (w, b) = params.fold(old, conv.weight, conv.bias, &bn);
                        (w, Some(b))
                    }
                    None => (params.copy(old, conv.weight), conv.bias.map(|b| params.copy(old, b))),
                };
                Op::Conv3x3(conv)
            }
            Op::Cascade(cascade) => {
                let mut cascade = cascade.clone();
                if let Norm::Batch(norms) = &cascade.norm {
                    let folded: Vec<(ParamId, ParamId)> = cascade
                        .weights
                        .iter()
                        .zip(norms)
                        .map(|(&w, bn)| params.fold(old, w, None, bn))
                        .collect();
                    cascade.weights = folded.iter().map(|f| f.0).collect();
                    cascade.norm = Norm::Folded(folded.iter().map(|f| f.1).collect());
                }
                Op::Cascade(cascade)
            }
            other => other.clone(),
        };
        let inputs = node.inputs.iter().map(|i| moved[i.0]).collect();
        nodes.push(Node { name: node.name.clone(), op, inputs });
        moved.push(NodeId(nodes.len() - 1));
    }
    let params = params.finish();
    let graph = Graph {
        nodes,
        params: params.specs.clone(),
        logits: moved[graph.logits.0],
        named: graph.named.iter().map(|(name, id)| (name.clone(), moved[id.0])).collect(),
    };
    (graph, params)
}

#[cfg(test)]
#[path = "passes_tests.rs"]
mod tests;
