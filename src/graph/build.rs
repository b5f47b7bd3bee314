//! FPENet from a configuration (SPEC, "Network"; paper, section 3).

use super::params::{ParamId, ParamRole, ParamSpec, assign_offsets};
use super::{Graph, Node, NodeId};
use crate::config::{Attention, BlockActivation, Decoder, ModelConfig};
use crate::error::Result;
use crate::ops::{
    Act, Activation, BatchNorm, BnParams, Cascade, Conv1x1, Conv3x3, MeuFuse, Norm, Op,
};

/// Widths of stem and stage 1, stage 2, stage 3.
pub const WIDTHS: [usize; 3] = [16, 32, 64];
/// Expansion k of the FPE blocks in stages 2 and 3.
pub const EXPANSION: usize = 4;

impl Graph {
    /// The network of a configuration, as built for training: batch norm, activations and
    /// additions are nodes of their own. See [`super::passes`] for what inference runs.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] for an invalid configuration.
    pub fn fpenet(config: &ModelConfig) -> Result<Graph> {
        config.validate()?;
        let mut b = Builder { config, nodes: Vec::new(), params: Vec::new(), named: Vec::new() };
        let input = b.node("input", Op::Input { channels: 3 }, &[]);

        let stem_weight = b.weight("stem.conv", [WIDTHS[0], 3, 3, 3], 1);
        let stem = Conv3x3 {
            in_channels: 3,
            out_channels: WIDTHS[0],
            stride: 2,
            weight: stem_weight,
            bias: None,
            act: Act::None,
        };
        let x = b.node("stem.conv", Op::Conv3x3(stem), &[input]);
        let x = b.batch_norm("stem.bn", x, WIDTHS[0]);
        let stem = b.activation("stem.relu", x, Act::Relu);

        let block = b.fpe_block("stage1.0", stem, Block::normal_bottleneck(WIDTHS[0]));
        let stage1 = b.long_skip("stage1", stem, block);
        let stage2 = b.stage("stage2", stage1, WIDTHS[1], config.p);
        let stage3 = b.stage("stage3", stage2, WIDTHS[2], config.q);

        let (features, channels) = match config.decoder {
            Decoder::Bilinear => (stage3, b.channels_after(WIDTHS[2])),
            Decoder::Meu | Decoder::Ca => {
                let (high, low) = (b.channels_after(WIDTHS[2]), b.channels_after(WIDTHS[1]));
                let d2 = b.meu("decoder2", (stage3, high), (stage2, low), 64);
                let low = b.channels_after(WIDTHS[0]);
                (b.meu("decoder1", (d2, 64), (stage1, low), 32), 32)
            }
        };
        let scores = b.conv1x1_bias("classifier", features, channels, config.classes, None);
        let logits = b.node("logits", Op::Resize, &[scores, input]);

        let mut params = b.params;
        assign_offsets(&mut params);
        Ok(Graph { nodes: b.nodes, params, logits, named: b.named })
    }
}

/// Shape of one FPE block.
struct Block<'a> {
    in_channels: usize,
    out_channels: usize,
    expansion: usize,
    stride: usize,
    dilations: &'a [usize],
}

impl Block<'_> {
    /// Stage 1's "normal bottleneck block": k = 1, one branch, dilation 1.
    fn normal_bottleneck(channels: usize) -> Self {
        Block {
            in_channels: channels,
            out_channels: channels,
            expansion: 1,
            stride: 1,
            dilations: &[1],
        }
    }
}

struct Builder<'a> {
    config: &'a ModelConfig,
    nodes: Vec<Node>,
    params: Vec<ParamSpec>,
    named: Vec<(String, NodeId)>,
}

impl Builder<'_> {
    fn node(&mut self, name: impl Into<String>, op: Op, inputs: &[NodeId]) -> NodeId {
        self.nodes.push(Node::new(name, op, inputs.to_vec()));
        NodeId(self.nodes.len() - 1)
    }

    fn param(&mut self, name: String, shape: Vec<usize>, role: ParamRole) -> ParamId {
        self.params.push(ParamSpec { name, shape, role, offset: 0 });
        ParamId(self.params.len() - 1)
    }

    /// Convolution weights, out x in/groups x kh x kw.
    fn weight(&mut self, name: &str, shape: [usize; 4], groups: usize) -> ParamId {
        let fan_out = shape[0] * shape[2] * shape[3] / groups;
        self.param(format!("{name}.weight"), shape.to_vec(), ParamRole::Weight { fan_out })
    }

    fn bn_params(&mut self, name: &str, channels: usize) -> BnParams {
        let mut param = |key: &str, role| self.param(format!("{name}.{key}"), vec![channels], role);
        BnParams {
            weight: param("weight", ParamRole::Scale),
            bias: param("bias", ParamRole::Bias),
            running_mean: param("running_mean", ParamRole::RunningMean),
            running_var: param("running_var", ParamRole::RunningVar),
        }
    }

    fn batch_norm(&mut self, name: &str, x: NodeId, channels: usize) -> NodeId {
        let params = self.bn_params(name, channels);
        let op = Op::BatchNorm(BatchNorm { channels, params, act: Act::None });
        self.node(name, op, &[x])
    }

    fn activation(&mut self, name: &str, x: NodeId, act: Act) -> NodeId {
        self.node(name, Op::Activation(Activation { act }), &[x])
    }

    fn conv1x1(&mut self, name: &str, x: NodeId, inp: usize, out: usize) -> NodeId {
        let weight = self.weight(name, [out, inp, 1, 1], 1);
        let conv =
            Conv1x1 { in_channels: inp, out_channels: out, weight, bias: None, act: Act::None };
        self.node(name, Op::Conv1x1(conv), &[x])
    }

    /// 1x1 convolution with bias; `gate` gives the non-linearity of an attention convolution.
    fn conv1x1_bias(
        &mut self,
        name: &str,
        x: NodeId,
        inp: usize,
        out: usize,
        gate: Option<Act>,
    ) -> NodeId {
        let weight = self.weight(name, [out, inp, 1, 1], 1);
        let role = if gate.is_some() { ParamRole::GateBias } else { ParamRole::Bias };
        let bias = Some(self.param(format!("{name}.bias"), vec![out], role));
        let conv = Conv1x1 { in_channels: inp, out_channels: out, weight, bias, act: Act::None };
        let y = self.node(name, Op::Conv1x1(conv), &[x]);
        match gate {
            Some(act) => self.activation(&format!("{name}.act"), y, act),
            None => y,
        }
    }

    /// FPE block (paper, section 3.1): expand, cascade of dilated branches, linear projection.
    fn fpe_block(&mut self, name: &str, x: NodeId, block: Block) -> NodeId {
        let expanded = block.expansion * block.in_channels;
        let branches = block.dilations.len();
        let y = self.conv1x1(&format!("{name}.expand.conv"), x, block.in_channels, expanded);
        let y = self.batch_norm(&format!("{name}.expand.bn"), y, expanded);
        let y = self.activation(&format!("{name}.expand.relu"), y, Act::Relu);

        let width = expanded / branches;
        let mut weights = Vec::new();
        let mut norms = Vec::new();
        for i in 0..branches {
            let branch = format!("{name}.branches.{i}");
            weights.push(self.weight(&format!("{branch}.conv"), [width, 1, 3, 3], width));
            norms.push(self.bn_params(&format!("{branch}.bn"), width));
        }
        let cascade = Cascade {
            channels: expanded,
            stride: block.stride,
            dilations: block.dilations.to_vec(),
            addition: self.config.branch_addition && block.stride == 1,
            weights,
            norm: Norm::Batch(norms),
        };
        let y = self.node(format!("{name}.branches"), Op::Cascade(cascade), &[y]);

        let y = self.conv1x1(&format!("{name}.project.conv"), y, expanded, block.out_channels);
        let mut y = self.batch_norm(&format!("{name}.project.bn"), y, block.out_channels);
        if block.stride == 1 && block.in_channels == block.out_channels {
            y = self.node(format!("{name}.add"), Op::Add, &[y, x]);
        }
        if self.config.block_activation == BlockActivation::Relu {
            y = self.activation(&format!("{name}.relu"), y, Act::Relu);
        }
        y
    }

    fn stage(&mut self, name: &str, x: NodeId, channels: usize, blocks: usize) -> NodeId {
        let config = self.config;
        let mut in_channels = self.channels_after(channels / 2);
        let (mut first, mut y) = (x, x);
        for i in 0..blocks {
            let block = Block {
                in_channels,
                out_channels: channels,
                expansion: EXPANSION,
                stride: if i == 0 { 2 } else { 1 },
                dilations: config.branch_dilations(),
            };
            y = self.fpe_block(&format!("{name}.{i}"), y, block);
            if i == 0 {
                first = y;
            }
            in_channels = channels;
        }
        self.long_skip(name, first, y)
    }

    /// Channels that leave a stage of the given width.
    fn channels_after(&self, width: usize) -> usize {
        if self.config.long_skip { 2 * width } else { width }
    }

    /// concat(first unit, last block), or the last block alone; registers the SPEC's name.
    fn long_skip(&mut self, name: &str, first: NodeId, last: NodeId) -> NodeId {
        let out =
            if self.config.long_skip { self.node(name, Op::Concat, &[first, last]) } else { last };
        self.named.push((name.to_string(), out));
        out
    }

    /// Mutual embedding upsampling (paper, section 3.2):
    /// out = l * ca + upsample(h) * sa, each operand an (id, channels) pair.
    fn meu(
        &mut self,
        name: &str,
        (high, high_channels): (NodeId, usize),
        (low, low_channels): (NodeId, usize),
        out: usize,
    ) -> NodeId {
        let act = match self.config.attention {
            Attention::Relu => Act::Relu,
            Attention::Sigmoid => Act::Sigmoid,
        };
        let h = self.conv1x1_bias(&format!("{name}.high"), high, high_channels, out, None);
        let l = self.conv1x1_bias(&format!("{name}.low"), low, low_channels, out, None);
        let pooled = self.node(format!("{name}.pool"), Op::GlobalAvgPool, &[h]);
        let gate = format!("{name}.channel_attention");
        let ca = self.conv1x1_bias(&gate, pooled, out, out, Some(act));
        let mut inputs = vec![h, l, ca];
        let spatial = self.config.decoder == Decoder::Meu;
        if spatial {
            let mean = self.node(format!("{name}.mean"), Op::ChannelMean, &[l]);
            let gate = format!("{name}.spatial_attention");
            inputs.push(self.conv1x1_bias(&gate, mean, 1, 1, Some(act)));
        }
        let y = self.node(name, Op::MeuFuse(MeuFuse { spatial }), &inputs);
        self.named.push((name.to_string(), y));
        y
    }
}
