//! What rewritten graphs consist of, and that they compute what they should.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::backend::cpu::{CpuBackend, Isa};
use crate::config::{Attention, BlockActivation, Decoder, ModelConfig};
use crate::exec::Inference;
use crate::graph::{Mode, Node, ParamId, ParamRole, Shape};
use crate::model::Model;
use crate::ops::Norm;

/// All combinations of the switches, on a small network.
pub(super) fn configs() -> Vec<ModelConfig> {
    let mut all = Vec::new();
    for decoder in [Decoder::Meu, Decoder::Ca, Decoder::Bilinear] {
        for (branches, flags) in [1, 2, 4].into_iter().flat_map(|b| (0..16).map(move |f| (b, f))) {
            let flag = |bit: u32| flags >> bit & 1 == 1;
            all.push(ModelConfig {
                classes: 5,
                p: 1 + usize::from(flag(0)),
                q: 2,
                branches,
                long_skip: flag(1),
                decoder,
                attention: if flag(2) { Attention::Sigmoid } else { Attention::Relu },
                block_activation: if flag(3) {
                    BlockActivation::Relu
                } else {
                    BlockActivation::Linear
                },
                ..ModelConfig::default()
            });
        }
    }
    all
}

/// A trained model's look: every parameter and running statistic away from its initial value.
pub(super) fn model(config: ModelConfig, seed: u64) -> Model {
    let mut model = Model::init(config, seed).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for i in 0..model.params.specs.len() {
        let role = model.params.specs[i].role;
        for v in model.params.get_mut(ParamId(i)) {
            *v += match role {
                ParamRole::Weight { .. } => 0.0,
                ParamRole::RunningVar => rng.random_range(0.0..1.0),
                _ => rng.random_range(-0.3..0.3),
            };
        }
    }
    model
}

pub(super) fn input(shape: Shape, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..shape.len()).map(|_| rng.random_range(-2.0..2.0)).collect()
}

/// Inputs come before their consumers, parameters exist and belong to one node each.
pub(super) fn check_links(graph: &Graph) {
    let mut owners = vec![0; graph.params.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        assert!(node.inputs.iter().all(|input| input.0 < i), "{}", node.name);
        node.op.params().iter().for_each(|id| owners[id.0] += 1);
    }
    assert!(owners.iter().all(|&n| n == 1), "{owners:?}");
}

fn elements(graph: &Graph, wanted: impl Fn(ParamRole) -> bool) -> usize {
    graph.params.iter().filter(|p| wanted(p.role)).map(|p| p.len()).sum()
}

#[test]
fn inference_graphs_are_folded_and_fused_as_far_as_they_can_be() {
    for config in configs() {
        let graph = Graph::fpenet(&config).unwrap();
        let params = ParamStore::init(&graph.params, 1);
        let (folded, values) = for_inference(&graph, &params);
        check_links(&folded);
        for node in &folded.nodes {
            let left = matches!(node.op, Op::BatchNorm(_) | Op::Add | Op::Activation(_));
            assert!(!left, "{config:?}: {} is left", node.name);
            if let Op::Cascade(cascade) = &node.op {
                assert!(matches!(cascade.norm, Norm::Folded(_)), "{}", node.name);
            }
        }
        // A batch norm's four vectors become the bias of the convolution before it.
        let running = |role| role == ParamRole::RunningMean;
        let before = elements(&graph, |role| role.trainable());
        assert_eq!(elements(&folded, running), 0);
        assert_eq!(elements(&folded, |_| true), before - elements(&graph, running));
        assert_eq!(values.trainable_count(), elements(&folded, |_| true));
        let names = |g: &Graph| g.named.iter().map(|n| n.0.clone()).collect::<Vec<_>>();
        assert_eq!(names(&folded), names(&graph));
    }
}

#[test]
fn training_graphs_keep_all_parameters_and_lose_additions_and_relus_behind_batch_norms() {
    for config in configs() {
        let graph = Graph::fpenet(&config).unwrap();
        let fused = for_training(&graph);
        check_links(&fused);
        assert_eq!(fused.params, graph.params);
        for node in &fused.nodes {
            let gate = node.name.contains("attention");
            let left = matches!(node.op, Op::Add | Op::Activation(_)) && !gate;
            assert!(!left, "{config:?}: {} is left", node.name);
        }
        // Every addition is now a second operand, and every output keeps its shape.
        let count = |g: &Graph, f: fn(&Node) -> bool| g.nodes.iter().filter(|n| f(n)).count();
        let residuals = count(&fused, |n| matches!(n.op, Op::BatchNorm(_)) && n.inputs.len() == 2);
        assert_eq!(residuals, count(&graph, |n| matches!(n.op, Op::Add)));
        let (before, after) =
            (graph.infer_shapes(1, 37, 50).unwrap(), fused.infer_shapes(1, 37, 50).unwrap());
        for ((name, a), (_, b)) in graph.named.iter().zip(&fused.named) {
            assert_eq!(before[a.0], after[b.0], "{name}");
        }
    }
}

#[test]
fn folding_a_batch_norm_is_what_the_batch_norm_did() {
    let model = model(ModelConfig { p: 1, q: 1, ..ModelConfig::default() }, 3);
    let graph = Graph::fpenet(&model.config).unwrap();
    let (folded, values) = for_inference(&graph, &model.params);
    let old = |name: &str| model.params.get(model.params.find(name).unwrap());
    let new = |name: &str| values.get(values.find(name).unwrap());
    for name in ["stem", "stage2.0.expand", "stage2.0.branches.3", "stage3.0.project"] {
        let of = |key: &str, c: usize| f64::from(old(&format!("{name}.bn.{key}"))[c]);
        let (w, bias) = (new(&format!("{name}.conv.weight")), new(&format!("{name}.conv.bias")));
        let before = old(&format!("{name}.conv.weight"));
        let row = w.len() / bias.len();
        // A convolution output v of channel c: y = weight * (v - mean) / sqrt(var + eps) + bias.
        for (c, &b) in bias.iter().enumerate() {
            let scale = of("weight", c) / (of("running_var", c) + 1e-5).sqrt();
            let shift = of("bias", c) - scale * of("running_mean", c);
            // One rounding to f32 each (and eps, which f32 holds to 1e-8 of itself).
            assert!((f64::from(b) - shift).abs() < 1e-7, "{name}: bias {c}");
            for (&w, &before) in w[c * row..][..row].iter().zip(&before[c * row..][..row]) {
                let expected = scale * f64::from(before);
                assert!((f64::from(w) - expected).abs() <= 1e-7 * expected.abs(), "{name}");
            }
        }
    }
    check_links(&folded);
}

fn logits(model: &Model, shape: Shape, input: &[f32], isa: Isa, threads: usize) -> Vec<f32> {
    let backend = Box::new(CpuBackend::with_isa(Some(threads), isa).unwrap());
    let Shape { n, h, w, .. } = shape;
    let mut run = Inference::new(model, backend, n, h, w, Mode::Logits).unwrap();
    run.run(input).unwrap();
    let first = run.logits().unwrap();
    // A second run starts from the memory that the first one left.
    run.run(input).unwrap();
    assert_eq!(run.logits().unwrap(), first);
    first
}

#[test]
fn images_of_a_batch_do_not_touch_each_other() {
    for config in configs().into_iter().step_by(11) {
        let model = model(config, 4);
        let one = Shape::new(1, 3, 37, 50);
        let images = [5, 6].map(|seed| input(one, seed));
        let isa = Isa::detect();
        let alone = images.clone().map(|image| logits(&model, one, &image, isa, 1));
        assert!(alone[0].iter().all(|v| v.is_finite()));
        assert_ne!(alone[0], alone[1]);
        let batch = [&images[0][..], &images[1], &images[0]].concat();
        let together = logits(&model, Shape { n: 3, ..one }, &batch, isa, 2);
        // Bit for bit: a tile never spans two images.
        assert_eq!(together, [&alone[0][..], &alone[1], &alone[0]].concat());
    }
}

#[test]
fn instruction_sets_agree_on_the_whole_network() {
    let model = model(ModelConfig { p: 2, q: 2, ..ModelConfig::default() }, 7);
    let shape = Shape::new(2, 3, 45, 61);
    let image = input(shape, 8);
    let all: Vec<Vec<f32>> =
        Isa::available().into_iter().map(|isa| logits(&model, shape, &image, isa, 2)).collect();
    for other in &all[1..] {
        let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
        let error = crate::ops::testing::relative_l2(&wide(other), &wide(&all[0]));
        // The SPEC's bound for logits between two implementations.
        assert!(error <= 1e-5, "{error:e}");
    }
}

#[test]
fn a_stage_of_one_block_hands_on_its_block_twice() {
    let model = model(ModelConfig { p: 1, q: 1, ..ModelConfig::default() }, 9);
    let backend = Box::new(CpuBackend::new(Some(1)).unwrap());
    let mut run = Inference::new(&model, backend, 2, 33, 47, Mode::Inspect).unwrap();
    run.run(&input(Shape::new(2, 3, 33, 47), 10)).unwrap();
    for (name, shape, values) in run.intermediates().unwrap() {
        if !["stage2", "stage3"].contains(&name.as_str()) {
            continue;
        }
        for image in values.chunks(shape.c * shape.plane()) {
            let (first, last) = image.split_at(image.len() / 2);
            assert!(first.iter().any(|&v| v != 0.0), "{name}");
            assert_eq!(first, last, "{name}: the first unit is the last block");
        }
    }
}

#[test]
fn nan_in_the_image_reaches_the_logits() {
    for decoder in [Decoder::Meu, Decoder::Ca, Decoder::Bilinear] {
        let config = ModelConfig { p: 1, q: 1, decoder, ..ModelConfig::default() };
        let model = model(config, 11);
        let shape = Shape::new(1, 3, 32, 32);
        let mut image = input(shape, 12);
        image[500] = f32::NAN;
        for isa in Isa::available() {
            let logits = logits_once(&model, shape, &image, isa);
            assert!(logits.iter().any(|v| v.is_nan()), "{decoder:?}, {}", isa.name());
        }
    }
}

fn logits_once(model: &Model, shape: Shape, image: &[f32], isa: Isa) -> Vec<f32> {
    let backend = Box::new(CpuBackend::with_isa(Some(1), isa).unwrap());
    let mut run = Inference::new(model, backend, 1, shape.h, shape.w, Mode::Logits).unwrap();
    run.run(image).unwrap();
    run.logits().unwrap()
}
