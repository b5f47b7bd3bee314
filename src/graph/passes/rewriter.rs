//! What the rewrites share: a graph that is written anew, node by node, with its parameters.

use crate::graph::params::{ParamId, ParamRole, ParamSpec, ParamStore, assign_offsets};
use crate::graph::{Graph, Node, NodeId};
use crate::ops::Op;

/// The parameter table of a rewritten graph, with values.
#[derive(Default)]
pub(super) struct NewParams {
    specs: Vec<ParamSpec>,
    values: Vec<Vec<f32>>,
}

impl NewParams {
    pub(super) fn push(
        &mut self,
        name: String,
        shape: Vec<usize>,
        role: ParamRole,
        values: Vec<f32>,
    ) -> ParamId {
        self.specs.push(ParamSpec { name, shape, role, offset: 0 });
        self.values.push(values);
        ParamId(self.specs.len() - 1)
    }

    /// Weights of a 1x1 convolution, out x in.
    pub(super) fn weight(&mut self, name: &str, shape: [usize; 2], values: Vec<f32>) -> ParamId {
        let role = ParamRole::Weight { fan_out: shape[0] };
        self.push(format!("{name}.weight"), vec![shape[0], shape[1], 1, 1], role, values)
    }

    pub(super) fn bias(&mut self, name: &str, values: Vec<f32>) -> ParamId {
        self.push(format!("{name}.bias"), vec![values.len()], ParamRole::Bias, values)
    }

    /// A parameter as it was.
    pub(super) fn copy(&mut self, old: &ParamStore, id: ParamId) -> ParamId {
        let spec = &old.specs[id.0];
        self.push(spec.name.clone(), spec.shape.clone(), spec.role, old.get(id).to_vec())
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

/// A rewrite in progress. Nodes are kept, replaced or left out, in the old graph's order.
pub(super) struct Rewriter<'a> {
    pub(super) graph: &'a Graph,
    pub(super) old: &'a ParamStore,
    pub(super) params: NewParams,
    nodes: Vec<Node>,
    moved: Vec<Option<NodeId>>,
}

impl<'a> Rewriter<'a> {
    pub(super) fn new(graph: &'a Graph, old: &'a ParamStore) -> Self {
        let moved = vec![None; graph.nodes.len()];
        Rewriter { graph, old, params: NewParams::default(), nodes: Vec::new(), moved }
    }

    /// Adds a node.
    pub(super) fn node(&mut self, name: impl Into<String>, op: Op, inputs: Vec<NodeId>) -> NodeId {
        self.nodes.push(Node::new(name, op, inputs));
        NodeId(self.nodes.len() - 1)
    }

    /// Keeps an old node as it is.
    pub(super) fn keep(&mut self, id: NodeId) {
        let (old, params) = (self.old, &mut self.params);
        let op = self.graph.node(id).op.map_params(|id| params.copy(old, id));
        self.keep_with(id, op);
    }

    /// Keeps an old node's name and operands with another operator.
    pub(super) fn keep_with(&mut self, id: NodeId, op: Op) {
        let node = self.graph.node(id);
        let inputs = node.inputs.iter().map(|&input| self.at(input)).collect();
        let new = self.node(node.name.clone(), op, inputs);
        self.moved[id.0] = Some(new);
    }

    /// Keeps an old node, with a scale per channel for 8-bit storage of its output.
    pub(super) fn keep_in_bytes(&mut self, id: NodeId, mut scales: Vec<f32>) {
        self.keep(id);
        let (name, channels) = (format!("{}.byte_scale", self.graph.node(id).name), scales.len());
        scales.extend_from_within(..);
        scales[channels..].iter_mut().for_each(|scale| *scale = 1.0 / *scale);
        // Like a variance, not trained.
        let scale = self.params.push(name, vec![2, channels], ParamRole::RunningVar, scales);
        if let Some(node) = self.nodes.last_mut() {
            node.byte_scale = Some(scale);
        }
    }

    /// Lets the consumers of an old node read a new one.
    pub(super) fn replace(&mut self, id: NodeId, new: NodeId) {
        self.moved[id.0] = Some(new);
    }

    /// The new node in the place of an old one.
    pub(super) fn at(&self, id: NodeId) -> NodeId {
        self.moved[id.0].expect("operands come before their consumers and are not left out")
    }

    /// The new graph; names of nodes that were left out are gone.
    pub(super) fn finish(self) -> (Graph, ParamStore) {
        let params = self.params.finish();
        let named = self.graph.named.iter();
        let graph = Graph {
            params: params.specs.clone(),
            logits: self.moved[self.graph.logits.0].expect("logits are never left out"),
            named: named.filter_map(|(name, id)| Some((name.clone(), self.moved[id.0]?))).collect(),
            nodes: self.nodes,
        };
        (graph, params)
    }
}
