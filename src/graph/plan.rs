//! Memory plan: every tensor of a graph gets its place in one arena by its lifetime.
//!
//! A forward pass of F steps and its backward are one timeline of 2F + 1 moments (the loss in
//! the middle). A tensor is live from the moment that writes it to the last that reads it; two
//! tensors may share memory only where their lifetimes do not meet. Placement is greedy by size:
//! the largest first, each at the lowest offset free for the whole of its lifetime.

use super::{Graph, NodeId, ParamId, ParamSpec, Shape};
use crate::error::{Error, Result};
use crate::graph::params::flat_len;
use crate::ops::Op;

/// What a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Forward pass to the logits at the input's resolution.
    Logits,
    /// Forward pass to the classifier's scores; resize and argmax are done row by row afterwards.
    Labels,
    /// Like `Logits`, with every named intermediate kept.
    Inspect,
    /// Forward with batch statistics, loss and backward.
    Training,
}

/// A tensor's place: offset and strides in elements; rows are dense, planes may be padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// First element.
    pub offset: usize,
    /// N x C x H x W.
    pub shape: Shape,
    /// From one image to the next.
    pub batch_stride: usize,
    /// From one channel to the next, at least H * W.
    pub plane_stride: usize,
}

impl Tensor {
    /// Elements from the first to the end of the last plane.
    pub fn extent(&self) -> usize {
        (self.shape.n - 1) * self.batch_stride + self.shape.c * self.plane_stride
    }

    /// The channels `from .. from + c` of this tensor, in place.
    pub fn channels(&self, from: usize, c: usize) -> Tensor {
        Tensor {
            offset: self.offset + from * self.plane_stride,
            shape: self.shape.with_channels(c),
            ..*self
        }
    }
}

/// How planes are laid out in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaneLayout {
    /// Plane stride is H * W.
    Dense,
    /// Plane stride is a multiple of 16 elements (64 bytes) and never of 256: planes with
    /// power-of-two strides would fall into the same few cache sets.
    CachePadded,
}

impl PlaneLayout {
    /// Whether an operator also works in place inside a concat that its output is a part of: what is in
    /// a processor's cache already need not be fetched to be overwritten. A GPU's tiled cascade works
    /// from one place to another, and would need a copy.
    fn in_place_in_concat(self) -> bool {
        self == PlaneLayout::CachePadded
    }

    pub(crate) fn stride(self, plane: usize) -> usize {
        match self {
            PlaneLayout::Dense => plane,
            PlaneLayout::CachePadded => {
                let padded = plane.next_multiple_of(16);
                if padded.is_multiple_of(256) { padded + 16 } else { padded }
            }
        }
    }
}

/// Gradient of an operand: where it goes and whether it is added to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GradSlot {
    /// Gradient tensor, the operand's shape.
    pub tensor: Tensor,
    /// True where an earlier step of the backward pass has written it.
    pub accumulate: bool,
}

/// One operator with its operands placed.
#[derive(Debug, Clone)]
pub struct Step {
    /// Node name, for messages and profiles.
    pub name: String,
    /// Operator.
    pub op: Op,
    /// Operands.
    pub inputs: Vec<Tensor>,
    /// Result.
    pub output: Tensor,
    /// What the training forward keeps for the backward ([`Op::saved`]).
    pub saved: Vec<Tensor>,
    /// Gradient of the result; none outside training.
    pub grad_output: Option<Tensor>,
    /// Gradients of the operands; none where nobody needs one.
    pub grad_inputs: Vec<Option<GradSlot>>,
    /// Whether it may run at once with the step before it; see
    /// [`Node::joined`](super::Node::joined).
    pub joined: bool,
    /// Scale per channel of an output that may be kept in 8 bits; see
    /// [`Node::byte_scale`](super::Node::byte_scale).
    pub byte_scale: Option<ParamId>,
}

/// A graph with every tensor placed, ready to run on a backend.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Purpose.
    pub mode: Mode,
    /// Operators in forward order, without the input node.
    pub steps: Vec<Step>,
    /// Where the input image goes.
    pub input: Tensor,
    /// The logits (in [`Mode::Labels`] the classifier's scores at its own resolution).
    pub logits: Tensor,
    /// Gradient of the logits, in training.
    pub grad_logits: Option<Tensor>,
    /// Named intermediates that are readable after the forward pass.
    pub named: Vec<(String, Tensor)>,
    /// Parameter table of the graph.
    pub params: Vec<ParamSpec>,
    /// Length of the flat parameter vector.
    pub param_len: usize,
    /// Length of its trainable part.
    pub trainable_len: usize,
    /// Arena size in elements: the peak of live activations, gradients and saved tensors.
    pub arena_len: usize,
}

impl Plan {
    /// Places every tensor of `graph` for inputs of n x 3 x h x w.
    ///
    /// # Errors
    /// Those of [`Graph::infer_shapes`]; [`Error::Usage`] for training with an operator that has no
    /// backward.
    pub fn new(
        graph: &Graph,
        (n, h, w): (usize, usize, usize),
        mode: Mode,
        layout: PlaneLayout,
    ) -> Result<Plan> {
        let shapes = graph.infer_shapes(n, h, w)?;
        let forward_only = graph.nodes.iter().find(|node| node.op.inference_only());
        if let (Mode::Training, Some(node)) = (mode, forward_only) {
            return Err(Error::Usage(format!(
                "node {}: {} has no backward; train the graph without rewrites for inference",
                node.name,
                node.op.kind()
            )));
        }
        Ok(Planner::new(graph, shapes, mode, layout).plan())
    }

    /// Peak bytes of activations, gradients and saved tensors (f32).
    pub fn arena_bytes(&self) -> usize {
        self.arena_len * size_of::<f32>()
    }

    /// Place of a parameter in the flat vector.
    pub fn param(&self, id: super::ParamId) -> std::ops::Range<usize> {
        self.params[id.0].range()
    }
}

/// A block of the arena with the moments between which it must keep its contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime {
    /// Elements.
    pub len: usize,
    /// Moment of the first write.
    pub start: usize,
    /// Moment of the last read, inclusive.
    pub end: usize,
}

/// Offsets for blocks so that no two with meeting lifetimes overlap, and the length needed.
pub fn place(blocks: &[Lifetime]) -> (Vec<usize>, usize) {
    const ALIGN: usize = 16;
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(blocks[i].len), blocks[i].start, i));
    let mut offsets = vec![0; blocks.len()];
    let mut placed: Vec<usize> = Vec::new();
    let mut total = 0;
    for i in order {
        let block = blocks[i];
        let mut busy: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&j| blocks[j].start <= block.end && block.start <= blocks[j].end)
            .map(|&j| (offsets[j], offsets[j] + blocks[j].len))
            .collect();
        busy.sort_unstable();
        let mut offset = 0;
        for (from, to) in busy {
            if offset + block.len <= from {
                break;
            }
            offset = offset.max(to.next_multiple_of(ALIGN));
        }
        offsets[i] = offset;
        total = total.max(offset + block.len);
        placed.push(i);
    }
    (offsets, total)
}

/// A value that lives inside another one: a concat's operand, or an output written over its input.
#[derive(Debug, Clone, Copy)]
struct Home {
    root: usize,
    channel: usize,
}

struct Planner<'a> {
    graph: &'a Graph,
    shapes: Vec<Shape>,
    mode: Mode,
    layout: PlaneLayout,
    consumers: Vec<Vec<NodeId>>,
    /// Node whose scores or logits the plan ends with.
    last: usize,
    blocks: Vec<Lifetime>,
}

impl<'a> Planner<'a> {
    fn new(graph: &'a Graph, shapes: Vec<Shape>, mode: Mode, layout: PlaneLayout) -> Self {
        let last = match mode {
            Mode::Labels => graph.node(graph.logits).inputs[0].0,
            _ => graph.logits.0,
        };
        let consumers = graph.consumers();
        Planner { graph, shapes, mode, layout, consumers, last, blocks: Vec::new() }
    }

    fn training(&self) -> bool {
        self.mode == Mode::Training
    }

    /// Moment of the loss; forward step i is at i, backward step i at 2 * loss - i.
    fn loss(&self) -> usize {
        self.graph.nodes.len()
    }

    /// Forward moment of a node: its place in the order, for those that run at once the first's.
    fn moment(&self, node: usize) -> usize {
        (0..=node).rev().find(|&i| !self.graph.nodes[i].joined).unwrap_or(node)
    }

    /// Moment after which nothing reads a node's operands any more.
    fn done(&self, node: usize) -> usize {
        let behind = &self.graph.nodes[node + 1..=self.last.max(node)];
        node + behind.iter().take_while(|next| next.joined).count()
    }

    fn backward(&self, node: usize) -> usize {
        2 * self.loss() - node
    }

    fn kept(&self, node: usize) -> bool {
        node == self.last
            || self.mode == Mode::Inspect && self.graph.named.iter().any(|(_, id)| id.0 == node)
    }

    /// Moment of the last read of a node's output.
    fn last_use(&self, node: usize) -> usize {
        if self.kept(node) {
            return if self.training() { self.loss() } else { 2 * self.loss() };
        }
        let mut end = node;
        for consumer in &self.consumers[node] {
            let op = &self.graph.node(*consumer).op;
            let inputs = &self.graph.node(*consumer).inputs;
            let reads = (0..inputs.len()).any(|i| inputs[i].0 == node && op.reads(i));
            if reads && consumer.0 <= self.last {
                end = end.max(self.done(consumer.0));
                if self.training() && op.backward_needs().inputs {
                    end = end.max(self.backward(consumer.0));
                }
            }
        }
        if self.training() && self.graph.nodes[node].op.backward_needs().output {
            end = end.max(self.backward(node));
        }
        end
    }

    /// Where each value lives: itself, or a place inside another value.
    fn homes(&self) -> Vec<Home> {
        let count = self.graph.nodes.len();
        let mut homes: Vec<Home> = (0..count).map(|root| Home { root, channel: 0 }).collect();
        // Operands of a concat are written where the concat wants them.
        for (i, node) in self.graph.nodes.iter().enumerate() {
            if !matches!(node.op, Op::Concat) {
                continue;
            }
            let mut channel = 0;
            for input in &node.inputs {
                let producer = &self.graph.node(*input).op;
                let free = homes[input.0].root == input.0 && !matches!(producer, Op::Concat);
                if free && !matches!(producer, Op::Input { .. }) {
                    homes[input.0] = Home { root: i, channel };
                }
                channel += self.shapes[input.0].c;
            }
        }
        // In inference an operator may write over its input when nothing reads it afterwards, and
        // the second of a joined pair over the first one's.
        if !self.training() {
            for (i, node) in self.graph.nodes.iter().enumerate() {
                // Two 1x1 convolutions: all of a pixel's operands are read before a result is written.
                let pointwise = |i: usize| matches!(self.graph.nodes[i].op, Op::Conv1x1(_));
                let pair = node.joined && pointwise(i - 1) && pointwise(i);
                let reader = if pair { i - 1 } else { i };
                if !(pair || !node.joined && node.op.in_place()) {
                    continue;
                }
                let input = self.graph.nodes[reader].inputs[0].0;
                let root = homes[input].root;
                let alone = self.consumers[input].len() == 1 && !self.kept(input);
                let owner = &self.graph.nodes[root].op;
                let whole = self.shapes[root] == self.shapes[input]
                    && !matches!(owner, Op::Concat | Op::Input { .. });
                let same = alone && self.shapes[input] == self.shapes[i];
                if homes[i].root != i {
                    // The other way round: where a concat wants the output.
                    let free = root == input && !matches!(owner, Op::Concat | Op::Input { .. });
                    if same && free && self.layout.in_place_in_concat() {
                        homes[input] = homes[i];
                    }
                } else if same && whole {
                    homes[i] = Home { root, channel: 0 };
                }
            }
        }
        homes
    }

    fn block(&mut self, shape: Shape, start: usize, end: usize) -> (usize, Tensor) {
        let plane_stride = self.layout.stride(shape.plane());
        let batch_stride = shape.c * plane_stride;
        self.blocks.push(Lifetime { len: shape.n * batch_stride, start, end });
        (self.blocks.len() - 1, Tensor { offset: 0, shape, batch_stride, plane_stride })
    }

    fn plan(mut self) -> Plan {
        let count = self.last + 1;
        let homes = self.homes();

        // Lifetime of a root: from the first write of any member to the last read of any.
        let mut spans: Vec<Option<(usize, usize)>> = vec![None; self.graph.nodes.len()];
        for node in 0..count {
            let (start, end) = (self.moment(node), self.last_use(node));
            let span = spans[homes[node].root].get_or_insert((start, end));
            *span = (span.0.min(start), span.1.max(end));
        }
        let mut roots: Vec<Option<(usize, Tensor)>> = vec![None; self.graph.nodes.len()];
        for (root, span) in spans.iter().enumerate() {
            if let Some((start, end)) = *span {
                roots[root] = Some(self.block(self.shapes[root], start, end));
            }
        }

        let needs_grad = |node: usize| !matches!(self.graph.nodes[node].op, Op::Input { .. });
        let mut saved: Vec<Vec<(usize, Tensor)>> = vec![Vec::new(); count];
        let mut grads: Vec<Option<(usize, Tensor)>> = vec![None; count];
        if self.training() {
            let wants: Vec<usize> = (0..count).filter(|&i| needs_grad(i)).collect();
            for &node in &wants {
                let inputs: Vec<Shape> =
                    self.graph.nodes[node].inputs.iter().map(|i| self.shapes[i.0]).collect();
                for shape in self.graph.nodes[node].op.saved(&inputs, self.shapes[node]) {
                    let block = self.block(shape, node, self.backward(node));
                    saved[node].push(block);
                }
                let first_write = match self.consumers[node].last() {
                    Some(consumer) => self.backward(consumer.0),
                    None => self.loss(),
                };
                let block = self.block(self.shapes[node], first_write, self.backward(node));
                grads[node] = Some(block);
            }
        }

        let (offsets, arena_len) = place(&self.blocks);
        let at = |(block, tensor): (usize, Tensor)| Tensor { offset: offsets[block], ..tensor };
        let value = |node: usize| {
            let home = homes[node];
            let root = at(roots[home.root].expect("every value has a root"));
            root.channels(home.channel, self.shapes[node].c)
        };

        let mut written = vec![false; count];
        let mut grad_inputs: Vec<Vec<Option<GradSlot>>> = vec![Vec::new(); count];
        for node in (0..count).rev().filter(|_| self.training()) {
            let op = &self.graph.nodes[node].op;
            for (i, input) in self.graph.nodes[node].inputs.iter().enumerate() {
                let slot = grads[input.0].filter(|_| op.reads(i)).map(|grad| {
                    let accumulate = std::mem::replace(&mut written[input.0], true);
                    GradSlot { tensor: at(grad), accumulate }
                });
                grad_inputs[node].push(slot);
            }
        }

        let steps = (0..count)
            .filter(|&i| needs_grad(i))
            .map(|i| {
                let node = &self.graph.nodes[i];
                Step {
                    name: node.name.clone(),
                    op: node.op.clone(),
                    inputs: node.inputs.iter().map(|input| value(input.0)).collect(),
                    output: value(i),
                    saved: saved[i].iter().map(|&s| at(s)).collect(),
                    grad_output: grads[i].map(at),
                    grad_inputs: std::mem::take(&mut grad_inputs[i]),
                    joined: node.joined,
                    byte_scale: node.byte_scale,
                }
            })
            .collect();
        let named = match self.mode {
            Mode::Inspect => {
                self.graph.named.iter().map(|(name, id)| (name.clone(), value(id.0))).collect()
            }
            _ => Vec::new(),
        };
        let (param_len, trainable_len) = flat_len(&self.graph.params);
        Plan {
            mode: self.mode,
            steps,
            input: value(0),
            logits: value(self.last),
            grad_logits: grads[self.last].map(at),
            named,
            params: self.graph.params.clone(),
            param_len,
            trainable_len,
            arena_len,
        }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
