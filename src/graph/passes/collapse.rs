//! The MEU decoder and the classifier as one linear map onto the class scores.
//!
//! No batch norm or non-linearity stands between decoder2, decoder1 and classifier; the gates only
//! scale. With `Wc`, `bc` the classifier, `G = Wc Wh1`, and per image the gates `ca2`, `sa2`, `ca1`,
//! `sa1` (SPEC, "MEU"; paper, section 3.2):
//! ```text
//! d2     = diag(ca2) (Wl2 x2 + bl2) + sa2 up(Wh2 s3 + bh2)
//! scores = Wc d1 + bc,   d1 = diag(ca1) (Wl1 x1 + bl1) + sa1 up(Wh1 d2 + bh1)
//! ```
//! becomes two steps that are C classes wide ([`MeuScores`]), since a 1x1 convolution commutes with
//! bilinear upsampling, whose weights add up to 1:
//! ```text
//! z      = G diag(ca2) (Wl2 x2 + bl2) + sa2 up(G Wh2 s3 + G bh2) + Wc bh1
//! scores = Wc diag(ca1) (Wl1 x1 + bl1) + sa1 up(z) + bc
//! ```
//! The gates need means over pixels, which are linear as well: `mean(h2) = Wh2 mean(s3) + bh2`,
//! `mean_c(l) = (mean row of Wl) x + mean(bl)`, and `mean(h1) = Wh1 mean(d2) + bh1` with
//! `mean(d2) = ca2 (Wl2 mean(x2) + bl2) + [Wh2 bh2] [mean(sa2 up(s3)); mean(sa2)]`
//! ([`Op::WeightedPool`]).

use super::rewriter::Rewriter;
use crate::graph::params::{ParamId, ParamStore};
use crate::graph::{Graph, NodeId};
use crate::ops::{Act, Conv1x1, MeuFuse, MeuScores, Op};

/// Weights and bias of a 1x1 convolution in double precision.
#[derive(Clone)]
struct Affine {
    rows: usize,
    columns: usize,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

impl Affine {
    fn of(params: &ParamStore, conv: &Conv1x1) -> Self {
        let wide = |id: ParamId| params.get(id).iter().map(|&v| f64::from(v)).collect();
        let rows = conv.out_channels;
        Affine {
            rows,
            columns: conv.in_channels,
            weight: wide(conv.weight),
            bias: conv.bias.map_or_else(|| vec![0.0; rows], wide),
        }
    }

    /// x -> self(inner(x)).
    fn after(&self, inner: &Affine) -> Affine {
        let row = |r: usize| &self.weight[r * self.columns..(r + 1) * self.columns];
        let dot = |r: usize, column: &dyn Fn(usize) -> f64| -> f64 {
            row(r).iter().enumerate().map(|(k, w)| w * column(k)).sum()
        };
        let (rows, columns) = (self.rows, inner.columns);
        let weight = (0..rows * columns)
            .map(|i| dot(i / columns, &|k| inner.weight[k * columns + i % columns]))
            .collect();
        let bias = (0..rows).map(|r| self.bias[r] + dot(r, &|k| inner.bias[k])).collect();
        Affine { rows, columns, weight, bias }
    }

    /// Without the bias.
    fn linear(&self) -> Affine {
        Affine { bias: vec![0.0; self.rows], ..self.clone() }
    }

    /// One row: the mean of all rows.
    fn mean_row(&self) -> Affine {
        let rows = self.rows as f64;
        let mean = |c: usize| self.weight[c..].iter().step_by(self.columns).sum::<f64>() / rows;
        Affine {
            rows: 1,
            columns: self.columns,
            weight: (0..self.columns).map(mean).collect(),
            bias: vec![self.bias.iter().sum::<f64>() / rows],
        }
    }

    /// Linear in (x, 1): the bias as one more column.
    fn with_bias_column(&self) -> Affine {
        let rows = self.weight.chunks(self.columns).zip(&self.bias);
        let weight = rows.flat_map(|(row, &b)| row.iter().copied().chain([b])).collect();
        Affine { rows: self.rows, columns: self.columns + 1, weight, bias: vec![0.0; self.rows] }
    }

    fn weight_f32(&self) -> Vec<f32> {
        self.weight.iter().map(|&v| v as f32).collect()
    }

    fn bias_f32(&self) -> Vec<f32> {
        self.bias.iter().map(|&v| v as f32).collect()
    }
}

/// One MEU module of the graph.
struct Meu {
    /// What the high-level and the low-level convolution read.
    inputs: [NodeId; 2],
    high: Affine,
    low: Affine,
    channel: (Affine, Act),
    spatial: (Affine, Act),
    /// First of its nodes.
    first: usize,
}

/// The parts of a decoder that can be collapsed.
struct Decoder {
    meus: [Meu; 2],
    classifier: Affine,
    /// First node of decoder2: everything from here on is written anew.
    first: usize,
}

pub(super) fn rewrite(graph: &Graph, old: &ParamStore) -> (Graph, ParamStore) {
    let mut new = Rewriter::new(graph, old);
    let decoder = find(graph, old);
    let kept = decoder.as_ref().map_or(graph.nodes.len(), |decoder| decoder.first);
    (0..kept).for_each(|i| new.keep(NodeId(i)));
    if let Some(decoder) = decoder {
        let logits = graph.node(graph.logits);
        let scores = write(&mut new, &decoder);
        let image = new.at(logits.inputs[1]);
        let resized = new.node(logits.name.clone(), Op::Resize, vec![scores, image]);
        new.replace(graph.logits, resized);
    }
    new.finish()
}

fn write(new: &mut Rewriter, decoder: &Decoder) -> NodeId {
    let [d2, d1] = &decoder.meus;
    let classifier = &decoder.classifier;
    let (s3, x2, x1) = (new.at(d2.inputs[0]), new.at(d2.inputs[1]), new.at(d1.inputs[1]));

    // decoder2's gates.
    let pooled = new.node("decoder2.pool", Op::GlobalAvgPool, vec![s3]);
    let gate = d2.channel.0.after(&d2.high);
    let ca2 = conv(new, "decoder2.channel_attention", &gate, d2.channel.1, pooled);
    let gate = d2.spatial.0.after(&d2.low.mean_row());
    let sa2 = conv(new, "decoder2.spatial_attention", &gate, d2.spatial.1, x2);

    // decoder1's gates; the mean of decoder2's output from means of what goes into it.
    let pooled = new.node("decoder2.low_pool", Op::GlobalAvgPool, vec![x2]);
    let low = conv(new, "decoder2.low_mean", &d2.low, Act::None, pooled);
    let pooled = new.node("decoder2.high_pool", Op::WeightedPool, vec![s3, sa2]);
    let high = conv(new, "decoder2.high_mean", &d2.high.with_bias_column(), Act::None, pooled);
    let fuse = Op::MeuFuse(MeuFuse { spatial: false });
    let mean = new.node("decoder2.mean", fuse, vec![high, low, ca2]);
    let gate = d1.channel.0.after(&d1.high);
    let ca1 = conv(new, "decoder1.channel_attention", &gate, d1.channel.1, mean);
    let gate = d1.spatial.0.after(&d1.low.mean_row());
    let sa1 = conv(new, "decoder1.spatial_attention", &gate, d1.spatial.1, x1);

    // The features, as class scores from here on.
    let mix = classifier.linear().after(&d1.high.linear());
    let t = conv(new, "decoder2.scores.high", &mix.after(&d2.high), Act::None, s3);
    let constant = classifier.linear().after(&d1.high).bias;
    let z = scores(new, "decoder2.scores", &mix, &d2.low, &constant, vec![t, x2, ca2, sa2]);
    let inputs = vec![z, x1, ca1, sa1];
    scores(new, "decoder1.scores", classifier, &d1.low, &classifier.bias, inputs)
}

fn conv(new: &mut Rewriter, name: &str, map: &Affine, act: Act, x: NodeId) -> NodeId {
    let weight = new.params.weight(name, [map.rows, map.columns], map.weight_f32());
    let bias = Some(new.params.bias(name, map.bias_f32()));
    let (in_channels, out_channels) = (map.columns, map.rows);
    new.node(name, Op::Conv1x1(Conv1x1 { in_channels, out_channels, weight, bias, act }), vec![x])
}

fn scores(
    new: &mut Rewriter,
    name: &str,
    mix: &Affine,
    low: &Affine,
    constant: &[f64],
    inputs: Vec<NodeId>,
) -> NodeId {
    let part = |part: &str| format!("{name}.{part}");
    let params = &mut new.params;
    let op = MeuScores {
        in_channels: low.columns,
        width: low.rows,
        classes: mix.rows,
        mix: params.weight(&part("mix"), [mix.rows, mix.columns], mix.weight_f32()),
        low: params.weight(&part("low"), [low.rows, low.columns], low.weight_f32()),
        low_bias: params.bias(&part("low"), low.bias_f32()),
        bias: params.bias(name, constant.iter().map(|&v| v as f32).collect()),
    };
    new.node(name, Op::MeuScores(op), inputs)
}

fn find(graph: &Graph, params: &ParamStore) -> Option<Decoder> {
    let consumers = graph.consumers();
    let classifier = graph.node(graph.logits).inputs[0];
    let Op::Conv1x1(op) = &graph.node(classifier).op else { return None };
    let d1 = find_meu(graph, params, &consumers, graph.node(classifier).inputs[0])?;
    let d2 = find_meu(graph, params, &consumers, d1.inputs[0])?;
    let first = d2.first;
    // What comes before must not read what is written anew, nor the other way round.
    let outside = [d2.inputs[0], d2.inputs[1], d1.inputs[1]];
    let separate = outside.iter().all(|input| input.0 < first) && d1.first > first;
    separate.then(|| Decoder { meus: [d2, d1], classifier: Affine::of(params, op), first })
}

/// The module that ends in node `id`, if it is one with both attentions whose parts nobody else
/// reads.
fn find_meu(
    graph: &Graph,
    params: &ParamStore,
    consumers: &[Vec<NodeId>],
    id: NodeId,
) -> Option<Meu> {
    let node = graph.node(id);
    let Op::MeuFuse(MeuFuse { spatial: true }) = node.op else { return None };
    let [h, l, ca, sa] = node.inputs[..] else { return None };
    let conv = |id: NodeId| match &graph.node(id).op {
        Op::Conv1x1(conv) if graph.node(id).inputs.len() == 1 => Some(conv),
        _ => None,
    };
    let linear = |id: NodeId| conv(id).filter(|conv| conv.act == Act::None);
    let (high, low, channel, spatial) = (linear(h)?, linear(l)?, conv(ca)?, conv(sa)?);
    let (pool, mean) = (graph.node(ca).inputs[0], graph.node(sa).inputs[0]);
    let reads = |id: NodeId, input: NodeId| graph.node(id).inputs == [input];
    let gates = matches!(graph.node(pool).op, Op::GlobalAvgPool)
        && matches!(graph.node(mean).op, Op::ChannelMean)
        && reads(pool, h)
        && reads(mean, l);
    let readers = [(id, 1), (h, 2), (l, 2), (ca, 1), (sa, 1), (pool, 1), (mean, 1)];
    let alone = readers.iter().all(|&(id, count)| consumers[id.0].len() == count);
    let parts = [h, l, ca, sa, pool, mean, id];
    (gates && alone).then(|| Meu {
        inputs: [graph.node(h).inputs[0], graph.node(l).inputs[0]],
        high: Affine::of(params, high),
        low: Affine::of(params, low),
        channel: (Affine::of(params, channel), channel.act),
        spatial: (Affine::of(params, spatial), spatial.act),
        first: parts.iter().map(|part| part.0).min().unwrap_or(id.0),
    })
}
