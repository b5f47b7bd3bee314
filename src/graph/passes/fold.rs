//! Batch norms folded into the convolutions before them.

use super::rewriter::Rewriter;
use crate::graph::params::{ParamId, ParamRole, ParamStore};
use crate::graph::{Graph, NodeId};
use crate::ops::batch_norm::EPS;
use crate::ops::{BnParams, Norm, Op};

/// Every batch norm of this network follows a convolution (or is part of a cascade) and goes into
/// its weights; what is left of it is a bias.
pub(super) fn batch_norms(graph: &Graph, old: &ParamStore) -> (Graph, ParamStore) {
    let consumers = graph.consumers();
    let mut new = Rewriter::new(graph, old);
    for (i, node) in graph.nodes.iter().enumerate() {
        let id = NodeId(i);
        let follower = match consumers[i].as_slice() {
            [next] => match &graph.node(*next).op {
                Op::BatchNorm(bn) => Some(bn.params),
                _ => None,
            },
            _ => None,
        };
        match (&node.op, follower) {
            // Its convolution took it in.
            (Op::BatchNorm(_), _) => new.replace(id, new.at(node.inputs[0])),
            (Op::Conv1x1(conv), Some(bn)) => {
                let mut conv = conv.clone();
                (conv.weight, conv.bias) = fold(&mut new, conv.weight, conv.bias, &bn);
                new.keep_with(id, Op::Conv1x1(conv));
            }
            (Op::Conv3x3(conv), Some(bn)) => {
                let mut conv = conv.clone();
                (conv.weight, conv.bias) = fold(&mut new, conv.weight, conv.bias, &bn);
                new.keep_with(id, Op::Conv3x3(conv));
            }
            (Op::Cascade(cascade), _) => {
                let mut cascade = cascade.clone();
                if let Norm::Batch(norms) = &cascade.norm {
                    let pairs = cascade.weights.iter().zip(norms);
                    let folded: Vec<(ParamId, Option<ParamId>)> =
                        pairs.map(|(&w, bn)| fold(&mut new, w, None, bn)).collect();
                    cascade.weights = folded.iter().map(|f| f.0).collect();
                    cascade.norm = Norm::Folded(folded.iter().filter_map(|f| f.1).collect());
                }
                new.keep_with(id, Op::Cascade(cascade));
            }
            _ => new.keep(id),
        }
    }
    new.finish()
}

/// Weights and bias of a convolution (rows of equal length, one per output channel) with the
/// batch norm behind it: scale = weight / sqrt(var + eps), w' = scale * w,
/// b' = bias + scale * (b - mean).
fn fold(
    new: &mut Rewriter,
    weight: ParamId,
    bias: Option<ParamId>,
    bn: &BnParams,
) -> (ParamId, Option<ParamId>) {
    let old = new.old;
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
    let stem = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
    let weight = new.params.push(spec.name.clone(), spec.shape.clone(), spec.role, w);
    let bias = new.params.push(format!("{stem}.bias"), vec![channels], ParamRole::Bias, b);
    (weight, Some(bias))
}
