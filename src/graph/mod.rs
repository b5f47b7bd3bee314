//! The typed graph of operators: nodes in execution order, each with one output tensor.
//!
//! [`build`] writes it from a [`ModelConfig`](crate::ModelConfig), [`passes`] rewrite it,
//! [`plan`] places its tensors in memory. Tensors are N x C x H x W throughout.

pub mod build;
pub mod params;
pub mod passes;
pub mod plan;
pub mod summary;

pub use params::{ParamId, ParamRole, ParamSpec, ParamStore};
pub use plan::{GradSlot, Mode, Plan, PlaneLayout, Step, Tensor};

use crate::error::{Error, Result};
use crate::ops::Op;

/// Smallest height and width the network accepts.
pub const MIN_SIDE: usize = 16;
/// Largest height and width accepted: above it a request is taken for a mistake.
pub const MAX_SIDE: usize = 32768;

/// Shape of a tensor: batch, channels, height, width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Batch size N.
    pub n: usize,
    /// Channels C.
    pub c: usize,
    /// Height H.
    pub h: usize,
    /// Width W.
    pub w: usize,
}

impl Shape {
    /// N x C x H x W.
    pub const fn new(n: usize, c: usize, h: usize, w: usize) -> Self {
        Shape { n, c, h, w }
    }

    /// Elements of one plane, H * W.
    pub const fn plane(&self) -> usize {
        self.h * self.w
    }

    /// Elements in all, N * C * H * W.
    pub const fn len(&self) -> usize {
        self.n * self.c * self.h * self.w
    }

    /// Whether the tensor has no element.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same tensor with another number of channels.
    pub const fn with_channels(self, c: usize) -> Self {
        Shape { c, ..self }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} x {} x {} x {}", self.n, self.c, self.h, self.w)
    }
}

/// Index of a node, and so of its output tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub usize);

/// An operator applied to the outputs of earlier nodes.
#[derive(Debug, Clone)]
pub struct Node {
    /// Name, after the SPEC's parameter names ("stage2.0.expand.conv").
    pub name: String,
    /// What is computed.
    pub op: Op,
    /// Where its operands come from; always nodes of a smaller index.
    pub inputs: Vec<NodeId>,
    /// Whether it runs together with the node just before it, whose result is its first operand. A third
    /// may join a pair. The plan keeps the operands of all until all are done. Of two 1x1 convolutions it
    /// may put the second one's output over the first operand of the first: an executor that runs both at
    /// once reads all operands of a pixel before it writes a result. In between of other operators nobody
    /// else reads what is handed on, and it need not be written. An executor that runs one after the other
    /// is right as well.
    pub joined: bool,
    /// Scales by which the output, never negative, may be kept in 8 bits: value = scale * byte, one
    /// per channel, then one over each (2 x C). For executors that can; what they compute is the same
    /// up to half a step, and what is above 255 steps is cut off.
    pub byte_scale: Option<ParamId>,
}

impl Node {
    /// A node that runs by itself.
    pub fn new(name: impl Into<String>, op: Op, inputs: Vec<NodeId>) -> Self {
        Node { name: name.into(), op, inputs, joined: false, byte_scale: None }
    }
}

/// Refuses batches and sizes that no network takes.
///
/// # Errors
/// [`Error::Usage`] for a size outside [`MIN_SIDE`]..[`MAX_SIDE`], no image, or more than 4096.
pub fn check_input(n: usize, h: usize, w: usize) -> Result<()> {
    if n == 0 || n > 4096 {
        return Err(Error::Usage(format!("batch: expected 1 to 4096 images, found {n}")));
    }
    if !(MIN_SIDE..=MAX_SIDE).contains(&h) || !(MIN_SIDE..=MAX_SIDE).contains(&w) {
        return Err(Error::Usage(format!(
            "size: expected width and height from {MIN_SIDE} to {MAX_SIDE}, found {w}x{h}"
        )));
    }
    Ok(())
}

/// A network: nodes in execution order and the table of their parameters.
#[derive(Debug, Clone)]
pub struct Graph {
    /// Nodes; an input's index is always smaller than its consumer's.
    pub nodes: Vec<Node>,
    /// Parameter table.
    pub params: Vec<ParamSpec>,
    /// Node that yields the logits at the input's resolution.
    pub logits: NodeId,
    /// Intermediates that have a name in the SPEC: stage1 .. stage3, decoder2, decoder1.
    pub named: Vec<(String, NodeId)>,
}

impl Graph {
    /// The node behind an id.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// Shapes of every node's output for an input of the given batch and size.
    ///
    /// # Errors
    /// [`Error::Usage`] for a size outside [`MIN_SIDE`]..[`MAX_SIDE`] or an empty batch,
    /// [`Error::Shape`] where an operator's operands do not fit.
    pub fn infer_shapes(&self, n: usize, h: usize, w: usize) -> Result<Vec<Shape>> {
        check_input(n, h, w)?;
        let mut shapes: Vec<Shape> = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let inputs: Vec<Shape> = node.inputs.iter().map(|i| shapes[i.0]).collect();
            let shape = match &node.op {
                Op::Input { channels } => Shape::new(n, *channels, h, w),
                op => op.shape(&inputs).map_err(|rule| Error::Shape {
                    node: node.name.clone(),
                    expected: rule,
                    found: inputs.iter().map(Shape::to_string).collect::<Vec<_>>().join(", "),
                })?,
            };
            shapes.push(shape);
        }
        Ok(shapes)
    }

    /// Consumers of each node's output, in order.
    pub fn consumers(&self) -> Vec<Vec<NodeId>> {
        let mut consumers = vec![Vec::new(); self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            for input in &node.inputs {
                consumers[input.0].push(NodeId(i));
            }
        }
        consumers
    }

    /// The SPEC's name for a node's output, if it has one.
    pub fn intermediate(&self, name: &str) -> Option<NodeId> {
        self.named.iter().find(|(n, _)| n == name).map(|(_, id)| *id)
    }
}
