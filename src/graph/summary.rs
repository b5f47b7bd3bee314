//! Layer table of a network: shapes, parameters, FLOPs, receptive fields (`fpenet summary`).

use serde::Serialize;

use super::{Graph, Shape};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::ops::Op;

/// One node of the network, as built for training: batch norms and activations have their own.
#[derive(Debug, Clone, Serialize)]
pub struct Layer {
    /// Node name, after the SPEC's parameter names.
    pub name: String,
    /// Operator.
    pub kind: &'static str,
    /// Shape of the output: N, C, H, W.
    pub shape: [usize; 4],
    /// Trainable parameters.
    pub parameters: usize,
    /// Multiply-accumulates of convolutions.
    pub macs: u64,
    /// FLOPs by the SPEC's count.
    pub flops: u64,
    /// Side of the square of input pixels that an output pixel can see; none where it sees the
    /// whole image, as everything behind a global pooling does.
    pub receptive_field: Option<usize>,
}

/// A network's layers and totals for one input size.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Trainable parameters; running statistics are not counted.
    pub parameters: usize,
    /// Multiply-accumulates of convolutions, as executed.
    pub macs: u64,
    /// FLOPs with the high-level 1x1 convolutions of the decoder counted at the resolution that
    /// they are upsampled to: the paper's Table 7.
    pub flops_as_published: u64,
    /// FLOPs with those convolutions at the resolution of their input, which gives the same
    /// result, since a 1x1 convolution and a bilinear resize commute.
    pub flops_as_executed: u64,
    /// Every node in execution order.
    pub layers: Vec<Layer>,
}

/// Describes the network of a configuration for a batch of n x 3 x h x w.
///
/// FLOPs are multiply-accumulates of convolutions, two per batch-norm output, one per activation
/// output and one per bias addition (SPEC, "Totals that must come out").
///
/// # Errors
/// [`crate::Error::Usage`] for an invalid configuration or size.
pub fn summarise(config: &ModelConfig, n: usize, h: usize, w: usize) -> Result<Summary> {
    let graph = Graph::fpenet(config)?;
    let shapes = graph.infer_shapes(n, h, w)?;
    let views = views(&graph);
    let layer = |i: usize| {
        let node = &graph.nodes[i];
        let cost = node.op.cost(shapes[i]);
        let trainable = node.op.params().into_iter().map(|id| &graph.params[id.0]);
        Layer {
            name: node.name.clone(),
            kind: node.op.kind(),
            shape: [shapes[i].n, shapes[i].c, shapes[i].h, shapes[i].w],
            parameters: trainable.filter(|p| p.role.trainable()).map(|p| p.len()).sum(),
            macs: cost.macs,
            flops: cost.flops,
            receptive_field: views[i].field,
        }
    };
    let layers: Vec<Layer> = (0..graph.nodes.len()).map(layer).collect();
    let flops_as_executed = layers.iter().map(|l| l.flops).sum();
    Ok(Summary {
        parameters: layers.iter().map(|l| l.parameters).sum(),
        macs: layers.iter().map(|l| l.macs).sum(),
        flops_as_published: flops_as_executed + upsampled_surplus(&graph, &shapes),
        flops_as_executed,
        layers,
    })
}

/// What the decoder's high-level 1x1 convolutions would cost more behind the upsampling.
fn upsampled_surplus(graph: &Graph, shapes: &[Shape]) -> u64 {
    let fusions = graph.nodes.iter().filter(|node| matches!(node.op, Op::MeuFuse(_)));
    let surplus = fusions.map(|fusion| {
        let [high, low, ..] = fusion.inputs[..] else { return 0 };
        let (op, low) = (&graph.node(high).op, shapes[low.0]);
        let output = shapes[high.0];
        op.cost(low.with_channels(output.c)).flops - op.cost(output).flops
    });
    surplus.sum()
}

/// What a pixel of a tensor sees of the input.
#[derive(Debug, Clone, Copy)]
struct View {
    /// Side of the square of input pixels, none for the whole image.
    field: Option<usize>,
    /// Input pixels from one pixel to the next.
    step: usize,
}

impl View {
    /// Behind a window that reaches `taps` pixels further in all.
    fn widened(self, taps: usize) -> View {
        View { field: self.field.map(|f| f + taps * self.step), ..self }
    }

    /// Of whichever sees more.
    fn joined(self, other: View) -> View {
        let field = self.field.zip(other.field).map(|(a, b)| a.max(b));
        View { field, ..self }
    }
}

fn views(graph: &Graph) -> Vec<View> {
    let mut views: Vec<View> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let input = |i: usize| views[node.inputs[i].0];
        let view = match &node.op {
            Op::Input { .. } => View { field: Some(1), step: 1 },
            Op::Conv3x3(op) => {
                let x = input(0).widened(2);
                View { step: x.step * op.stride, ..x }
            }
            Op::Cascade(op) => {
                // With additions the last branch sees through all the dilations in turn.
                let dilations = op.dilations.iter().copied();
                let reach =
                    if op.addition { dilations.sum() } else { dilations.max().unwrap_or(0) };
                let x = input(0).widened(2 * reach);
                View { step: x.step * op.stride, ..x }
            }
            Op::Subsample => View { step: 2 * input(0).step, ..input(0) },
            Op::GlobalAvgPool | Op::WeightedPool => View { field: None, ..input(0) },
            // A bilinear sample has two taps per axis, one more than the pixel alone.
            Op::Resize => View { step: input(1).step, ..input(0).widened(1) },
            Op::MeuFuse(_) | Op::MeuScores(_) => {
                let gates = (2..node.inputs.len()).map(input);
                gates.fold(input(1).joined(input(0).widened(1)), View::joined)
            }
            Op::Conv1x1(_)
            | Op::BatchNorm(_)
            | Op::Activation(_)
            | Op::Add
            | Op::Concat
            | Op::ChannelMean => (1..node.inputs.len()).map(input).fold(input(0), View::joined),
        };
        views.push(view);
    }
    views
}
