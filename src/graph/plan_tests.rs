//! Plans are run on a simulated arena whose elements remember what was written there last, so
//! that a value overwritten before its last reader is found, whatever the planner believed.

use proptest::prelude::*;

use super::*;
use crate::config::{Attention, BlockActivation, Decoder, ModelConfig};
use crate::graph::passes::{self, Rewrites};
use crate::graph::{Node, ParamId, ParamStore};
use crate::ops::{Act, Activation, BatchNorm, BnParams, Conv1x1, Conv3x3};

fn lifetimes() -> impl Strategy<Value = Vec<Lifetime>> {
    let block = (1usize..500, 0usize..40, 0usize..15);
    let block = block.prop_map(|(len, start, span)| Lifetime { len, start, end: start + span });
    proptest::collection::vec(block, 0..60)
}

/// The same cases every time.
fn cases(count: u32) -> ProptestConfig {
    let rng_seed = proptest::test_runner::RngSeed::Fixed(7);
    ProptestConfig { cases: count, rng_seed, failure_persistence: None, ..Default::default() }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn blocks_alive_together_never_overlap(blocks in lifetimes()) {
        let (offsets, total) = place(&blocks);
        for (i, a) in blocks.iter().enumerate() {
            prop_assert!(offsets[i] + a.len <= total);
            for (j, b) in blocks.iter().enumerate().skip(i + 1) {
                let meet = a.start <= b.end && b.start <= a.end;
                let apart = offsets[i] + a.len <= offsets[j] || offsets[j] + b.len <= offsets[i];
                prop_assert!(!meet || apart, "{a:?} at {}, {b:?} at {}", offsets[i], offsets[j]);
            }
        }
        let live = |t: usize| blocks.iter().filter(move |b| b.start <= t && t <= b.end);
        let peak = (0..60).map(|t| live(t).map(|b| b.len).sum::<usize>()).max().unwrap_or(0);
        prop_assert!(total >= peak);
    }
}

/// What an element of the arena holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// Nothing that anybody may read.
    Garbage,
    /// Channel of a node's output, of one image.
    Value { node: usize, image: usize, channel: usize },
    /// What a node keeps for its backward.
    Saved { node: usize, which: usize },
    /// Gradient of a node's output, with this many contributions added up.
    Gradient { node: usize, contributions: usize },
}

struct Simulation<'a> {
    graph: &'a Graph,
    plan: &'a Plan,
    arena: Vec<Content>,
    contributions: Vec<usize>,
}

type Checked = std::result::Result<(), String>;

impl<'a> Simulation<'a> {
    fn new(graph: &'a Graph, plan: &'a Plan) -> Self {
        let arena = vec![Content::Garbage; plan.arena_len];
        Simulation { graph, plan, arena, contributions: vec![0; graph.nodes.len()] }
    }

    /// Who computed a channel: a concat hands on what its operands hold.
    fn origin(&self, node: usize, channel: usize) -> (usize, usize) {
        let Op::Concat = self.graph.nodes[node].op else { return (node, channel) };
        let mut from = 0;
        for input in &self.graph.nodes[node].inputs {
            let step = self.plan.steps.iter().position(|s| s.name == self.graph.node(*input).name);
            // The image has no step.
            let tensor = step.map_or(&self.plan.input, |i| &self.plan.steps[i].output);
            let channels = tensor.shape.c;
            if channel < from + channels {
                return self.origin(input.0, channel - from);
            }
            from += channels;
        }
        unreachable!("a channel of a concat belongs to one of its operands")
    }

    fn value(&self, node: usize, image: usize, channel: usize) -> Content {
        let (node, channel) = self.origin(node, channel);
        Content::Value { node, image, channel }
    }

    /// Applies `f` to (image, channel, elements) of every plane of a tensor.
    fn planes(
        &mut self,
        tensor: &Tensor,
        mut f: impl FnMut(&Self, usize, usize, &[Content]) -> Option<Content>,
    ) -> Checked {
        assert!(tensor.plane_stride >= tensor.shape.plane());
        assert!(tensor.batch_stride >= tensor.shape.c * tensor.plane_stride);
        for (image, channel) in
            (0..tensor.shape.n).flat_map(|n| (0..tensor.shape.c).map(move |c| (n, c)))
        {
            let start = tensor.offset + image * tensor.batch_stride + channel * tensor.plane_stride;
            let range = start..start + tensor.shape.plane();
            if range.end > self.arena.len() {
                return Err(format!("{range:?} lies outside the arena"));
            }
            if let Some(content) = f(self, image, channel, &self.arena[range.clone()]) {
                self.arena[range].fill(content);
            }
        }
        Ok(())
    }

    fn write(&mut self, tensor: &Tensor, content: Content) -> Checked {
        self.planes(tensor, |_, _, _, _| Some(content))
    }

    fn write_value(&mut self, tensor: &Tensor, node: usize) -> Checked {
        self.planes(tensor, |s, image, channel, _| Some(s.value(node, image, channel)))
    }

    fn expect(
        &mut self,
        what: &str,
        tensor: &Tensor,
        content: impl Fn(&Self, usize, usize) -> Content,
    ) -> Checked {
        let mut wrong = None;
        self.planes(tensor, |s, image, channel, found| {
            let expected = content(s, image, channel);
            if let Some(&found) = found.iter().find(|&&f| f != expected) {
                wrong = Some(format!("{what}: expected {expected:?}, found {found:?}"));
            }
            None
        })?;
        wrong.map_or(Ok(()), Err)
    }

    fn expect_value(&mut self, what: &str, tensor: &Tensor, node: usize) -> Checked {
        self.expect(what, tensor, |s, image, channel| s.value(node, image, channel))
    }

    fn forward(&mut self, node: usize, step: &Step) -> Checked {
        let inputs: Vec<usize> = self.graph.nodes[node].inputs.iter().map(|i| i.0).collect();
        // A write may begin before the last read ends, so the output must not lie on an operand:
        // but for operators that work in place, and for operands of a concat that are where it
        // wants them.
        let in_place = step.op.in_place() && step.inputs[0] == step.output;
        let mut kept = Vec::new();
        if let Op::Concat = step.op {
            let mut from = 0;
            for input in &step.inputs {
                let place = step.output.channels(from, input.shape.c);
                if *input == place {
                    kept.push(from..from + input.shape.c);
                }
                from += input.shape.c;
            }
        }
        if !in_place {
            self.planes(&step.output, |_, _, c, _| {
                (!kept.iter().any(|range| range.contains(&c))).then_some(Content::Garbage)
            })?;
        }
        for saved in &step.saved {
            self.write(saved, Content::Garbage)?;
        }
        for (i, input) in step.inputs.iter().enumerate().filter(|(i, _)| step.op.reads(*i)) {
            self.expect_value(&format!("{} reads operand {i}", step.name), input, inputs[i])?;
        }
        self.write_value(&step.output, node)?;
        for (which, saved) in step.saved.iter().enumerate() {
            self.write(saved, Content::Saved { node, which })?;
        }
        Ok(())
    }

    /// What the CPU's backward dispatch reads: operands and output.
    fn read_backward(step: &Step) -> (Vec<usize>, bool) {
        match &step.op {
            Op::Conv3x3(_) | Op::Conv1x1(_) => (vec![0], false),
            Op::BatchNorm(bn) => (vec![0], bn.act == crate::ops::Act::Relu),
            Op::Cascade(_) => (vec![0], true),
            Op::Activation(_) => (vec![], true),
            Op::MeuFuse(_) => ((0..step.inputs.len()).collect(), false),
            _ => (vec![], false),
        }
    }

    fn expect_gradient(&mut self, what: &str, node: usize, tensor: &Tensor) -> Checked {
        let content = Content::Gradient { node, contributions: self.contributions[node] };
        self.expect(&format!("{what}, gradient of node {node}"), tensor, |_, _, _| content)
    }

    fn backward(&mut self, node: usize, step: &Step) -> Checked {
        let inputs: Vec<usize> = self.graph.nodes[node].inputs.iter().map(|i| i.0).collect();
        let slots = || step.grad_inputs.iter().enumerate().filter_map(|(i, s)| Some((i, (*s)?)));
        for (_, slot) in slots().filter(|(_, slot)| !slot.accumulate) {
            self.write(&slot.tensor, Content::Garbage)?;
        }
        let readers: usize = self
            .graph
            .nodes
            .iter()
            .map(|n| {
                (0..n.inputs.len()).filter(|&i| n.inputs[i].0 == node && n.op.reads(i)).count()
            })
            .sum();
        // The loss is one more reader of the logits.
        let readers = readers + usize::from(node == self.graph.logits.0);
        if self.contributions[node] != readers {
            return Err(format!("{}: {} of {readers}", step.name, self.contributions[node]));
        }
        self.expect_gradient(&step.name, node, &step.grad_output.expect("training"))?;
        let (operands, output) = Self::read_backward(step);
        for i in operands {
            let what = format!("backward of {} reads operand {i}", step.name);
            self.expect_value(&what, &step.inputs[i], inputs[i])?;
        }
        if output {
            self.expect_value(&format!("backward of {}", step.name), &step.output, node)?;
        }
        for (which, saved) in step.saved.iter().enumerate() {
            let what = format!("{} saved {which}", step.name);
            self.expect(&what, saved, |_, _, _| Content::Saved { node, which })?;
        }
        for (i, slot) in slots() {
            let operand = inputs[i];
            if slot.accumulate != (self.contributions[operand] > 0) {
                return Err(format!("{}: accumulate is wrong for operand {i}", step.name));
            }
            if slot.accumulate {
                self.expect_gradient(&step.name, operand, &slot.tensor)?;
            }
            self.contributions[operand] += 1;
            let contributions = self.contributions[operand];
            self.write(&slot.tensor, Content::Gradient { node: operand, contributions })?;
        }
        Ok(())
    }

    fn run(&mut self) -> Checked {
        let (plan, logits) = (self.plan, self.graph.logits.0);
        self.write_value(&plan.input, 0)?;
        // Step i is node i + 1: the input has none.
        for (i, step) in plan.steps.iter().enumerate() {
            assert_eq!(step.name, self.graph.nodes[i + 1].name);
            self.forward(i + 1, step)?;
        }
        let last = plan.steps.len();
        match plan.mode {
            Mode::Labels => assert_eq!(self.graph.node(self.graph.logits).inputs[0].0, last),
            _ => assert_eq!(last, logits),
        }
        for (name, tensor) in &plan.named {
            let node = self.graph.intermediate(name).expect("a named node").0;
            self.expect_value(name, tensor, node)?;
        }
        if plan.mode == Mode::Training {
            let gradient = plan.grad_logits.expect("training");
            self.write(&gradient, Content::Garbage)?;
            self.expect_value("the loss reads the logits", &plan.logits, last)?;
            self.contributions[logits] = 1;
            self.write(&gradient, Content::Gradient { node: logits, contributions: 1 })?;
            for (i, step) in plan.steps.iter().enumerate().rev() {
                self.backward(i + 1, step)?;
            }
            return Ok(());
        }
        self.expect_value("the logits are read at the end", &plan.logits, last)
    }
}

fn configs() -> impl Strategy<Value = ModelConfig> {
    let blocks = (1usize..4, 1usize..5);
    let branches = prop_oneof![Just(1usize), Just(2), Just(4)];
    let decoder = prop_oneof![Just(Decoder::Meu), Just(Decoder::Ca), Just(Decoder::Bilinear)];
    (1usize..21, blocks, branches, decoder, any::<[bool; 4]>()).prop_map(
        |(classes, (p, q), branches, decoder, [addition, skip, sigmoid, relu])| ModelConfig {
            classes,
            p,
            q,
            branches,
            branch_addition: addition,
            long_skip: skip,
            decoder,
            attention: if sigmoid { Attention::Sigmoid } else { Attention::Relu },
            block_activation: if relu { BlockActivation::Relu } else { BlockActivation::Linear },
            ..ModelConfig::default()
        },
    )
}

const LAYOUTS: [PlaneLayout; 2] = [PlaneLayout::Dense, PlaneLayout::CachePadded];

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn no_tensor_is_overwritten_before_its_last_reader(
        config in configs(), n in 1usize..3, h in 16usize..71, w in 16usize..71
    ) {
        let graph = Graph::fpenet(&config).unwrap();
        let (inference, _) = passes::for_inference(&graph, &ParamStore::zeros(&graph.params));
        let training = passes::for_training(&graph);
        let modes = [Mode::Logits, Mode::Labels, Mode::Inspect];
        let runs = modes.map(|mode| (&inference, mode)).into_iter();
        // The graph without passes has more nodes and must be as safe.
        let runs = runs.chain([(&training, Mode::Training), (&graph, Mode::Training)]);
        // Joined steps may also run one after the other, which is what the simulation does.
        let params = ParamStore::zeros(&graph.params);
        let (rewritten, _) = passes::for_inference_with(&graph, &params, Rewrites::ALL);
        let runs = runs.chain([Mode::Logits, Mode::Labels].map(|mode| (&rewritten, mode)));
        for ((graph, mode), layout) in runs.flat_map(|run| LAYOUTS.map(|layout| (run, layout))) {
            let plan = Plan::new(graph, (n, h, w), mode, layout).unwrap();
            if let Err(problem) = Simulation::new(graph, &plan).run() {
                prop_assert!(false, "{mode:?}, {layout:?}: {problem}");
            }
        }
    }
}

#[test]
fn the_simulation_notices_memory_that_is_shared_too_early() {
    let graph = passes::for_training(&Graph::fpenet(&ModelConfig::default()).unwrap());
    let plan = Plan::new(&graph, (1, 32, 48), Mode::Training, PlaneLayout::Dense).unwrap();
    assert_eq!(Simulation::new(&graph, &plan).run(), Ok(()));
    // Each step in turn writes to where an earlier tensor lives that the backward still reads.
    let stem = plan.steps[0].output.offset;
    for i in (3..plan.steps.len()).step_by(7) {
        let mut broken = plan.clone();
        broken.steps[i].output.offset = stem;
        assert!(Simulation::new(&graph, &broken).run().is_err(), "{}", plan.steps[i].name);
    }
}

#[test]
fn default_network_at_1024x512_stays_under_120_megabytes() {
    let graph = Graph::fpenet(&ModelConfig::default()).unwrap();
    let (graph, _) = passes::for_inference(&graph, &ParamStore::zeros(&graph.params));
    for (mode, layout) in
        [Mode::Logits, Mode::Labels].into_iter().flat_map(|m| LAYOUTS.map(|l| (m, l)))
    {
        let plan = Plan::new(&graph, (1, 512, 1024), mode, layout).unwrap();
        assert!(plan.arena_bytes() < 120_000_000, "{mode:?}: {}", plan.arena_bytes());
        assert!(plan.arena_bytes() > 3 * 4 * 512 * 1024, "at least the image");
    }
}

#[test]
fn padded_planes_avoid_the_strides_that_share_cache_sets() {
    let graph = Graph::fpenet(&ModelConfig::default()).unwrap();
    let shape = (1, 64, 128);
    let plan = Plan::new(&graph, shape, Mode::Training, PlaneLayout::CachePadded).unwrap();
    for step in &plan.steps {
        for tensor in step.inputs.iter().chain([&step.output]) {
            let stride = tensor.plane_stride;
            assert!(stride.is_multiple_of(16) && !stride.is_multiple_of(256), "{stride}");
            assert!(tensor.offset.is_multiple_of(16), "{}: {}", step.name, tensor.offset);
        }
    }
}

/// A node of a random graph: its operator, and where its operands come from.
type Choice = (usize, usize, usize);

/// A graph that no configuration gives: operators in any order over any earlier nodes. Whatever
/// is left unread at the end goes into the logits.
fn random_graph(choices: &[Choice]) -> Graph {
    let mut g = RandomGraph { nodes: Vec::new(), shapes: Vec::new(), read: Vec::new() };
    g.push(Op::Input { channels: 3 }, &[]);
    for &(kind, a, b) in choices {
        let x = a % g.nodes.len();
        let shape = g.shapes[x];
        let act = if b.is_multiple_of(2) { Act::Relu } else { Act::None };
        let like = g.other(x, b, |s| s == shape);
        let beside = g.other(x, b, |s| (s.h, s.w) == (shape.h, shape.w));
        match (kind, like, beside) {
            (0, ..) => g.conv1x1(x, 1 + b % 5),
            (1, Some(r), _) => g.push(batch_norm(shape.c, act), &[x, r]),
            (2, Some(r), _) => g.push(Op::Add, &[x, r]),
            (3 | 4, _, Some(y)) => g.push(Op::Concat, &[x, y]),
            (5, ..) => g.push(Op::Activation(Activation { act: Act::Sigmoid }), &[x]),
            (6, ..) => g.push(Op::GlobalAvgPool, &[x]),
            (7, ..) => g.push(Op::ChannelMean, &[x]),
            (8, ..) => g.push(Op::Resize, &[x, b % g.nodes.len()]),
            (9, ..) => g.push(conv3x3(shape.c), &[x]),
            _ => g.push(batch_norm(shape.c, act), &[x]),
        };
    }
    let unread: Vec<usize> = (0..g.nodes.len()).filter(|&i| !g.read[i]).collect();
    let ends: Vec<usize> = unread.into_iter().map(|i| g.push(Op::Resize, &[i, 0])).collect();
    let all = if ends.len() == 1 { ends[0] } else { g.push(Op::Concat, &ends) };
    let scores = g.conv1x1(all, 4);
    let logits = NodeId(g.push(Op::Resize, &[scores, 0]));
    let named = vec![("stage1".to_string(), NodeId(scores / 2))];
    Graph { nodes: g.nodes, params: Vec::new(), logits, named }
}

struct RandomGraph {
    nodes: Vec<Node>,
    shapes: Vec<Shape>,
    read: Vec<bool>,
}

impl RandomGraph {
    fn push(&mut self, op: Op, inputs: &[usize]) -> usize {
        let shapes: Vec<Shape> = inputs.iter().map(|&i| self.shapes[i]).collect();
        self.shapes.push(match op {
            Op::Input { channels } => Shape::new(1, channels, 20, 24),
            _ => op.shape(&shapes).unwrap(),
        });
        for (i, &input) in inputs.iter().enumerate() {
            self.read[input] |= op.reads(i);
        }
        self.read.push(false);
        let (name, id) = (format!("node{}", self.nodes.len()), self.nodes.len());
        self.nodes.push(Node::new(name, op, inputs.iter().map(|&i| NodeId(i)).collect()));
        id
    }

    fn conv1x1(&mut self, x: usize, out_channels: usize) -> usize {
        let in_channels = self.shapes[x].c;
        let (weight, bias, act) = (ParamId(0), None, Act::None);
        self.push(Op::Conv1x1(Conv1x1 { in_channels, out_channels, weight, bias, act }), &[x])
    }

    /// Another node of a shape that fits; the operators take no tensor twice.
    fn other(&self, x: usize, b: usize, fits: impl Fn(Shape) -> bool) -> Option<usize> {
        let count = self.nodes.len();
        (0..count).map(|i| (i + b) % count).find(|&i| i != x && i > 0 && fits(self.shapes[i]))
    }
}

fn batch_norm(channels: usize, act: Act) -> Op {
    let id = ParamId(0);
    let params = BnParams { weight: id, bias: id, running_mean: id, running_var: id };
    Op::BatchNorm(BatchNorm { channels, params, act })
}

fn conv3x3(in_channels: usize) -> Op {
    let (weight, bias, act) = (ParamId(0), None, Act::None);
    Op::Conv3x3(Conv3x3 { in_channels, out_channels: 5, stride: 2, weight, bias, act })
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn random_graphs_keep_every_tensor_until_its_last_reader(
        choices in proptest::collection::vec((0usize..11, 0usize..1000, 0usize..1000), 0..40),
    ) {
        let graph = random_graph(&choices);
        let modes = [Mode::Logits, Mode::Labels, Mode::Inspect, Mode::Training];
        for (mode, layout) in modes.into_iter().flat_map(|m| LAYOUTS.map(|l| (m, l))) {
            let plan = Plan::new(&graph, (2, 20, 24), mode, layout).unwrap();
            if let Err(problem) = Simulation::new(&graph, &plan).run() {
                let nodes: Vec<_> = graph.nodes.iter().map(|n| (n.op.kind(), &n.inputs)).collect();
                prop_assert!(false, "{mode:?}, {layout:?}: {problem} in {nodes:?}");
            }
        }
    }
}
