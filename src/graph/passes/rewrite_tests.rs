//! The rewrites of [`Rewrites`]: what they leave, and that the function stays the same.

use super::tests::{check_links, configs, input, model};
use super::*;
use crate::backend::cpu::CpuBackend;
use crate::config::{BlockActivation, Decoder, ModelConfig};
use crate::exec::Inference;
use crate::graph::{Mode, Plan, PlaneLayout, Shape};
use crate::model::Model;
use crate::ops::testing::relative_l2;

const EACH: [Rewrites; 4] = [
    Rewrites { even_grid: true, ..Rewrites::NONE },
    Rewrites { collapse_decoder: true, ..Rewrites::NONE },
    Rewrites { join_pointwise: true, ..Rewrites::NONE },
    Rewrites::ALL,
];
/// The SPEC's bound for logits between two implementations: sums are grouped in another way.
const TOLERANCE: f64 = 1e-5;

fn logits(model: &Model, shape: Shape, image: &[f32], rewrites: Rewrites) -> Vec<f64> {
    let backend = CpuBackend::new(Some(2)).unwrap().with_rewrites(rewrites);
    let Shape { n, h, w, .. } = shape;
    let mut run = Inference::new(model, Box::new(backend), n, h, w, Mode::Logits).unwrap();
    run.run(image).unwrap();
    // A second run starts from the memory that the first one left.
    run.run(image).unwrap();
    run.logits().unwrap().into_iter().map(f64::from).collect()
}

#[test]
fn every_rewrite_computes_the_same_logits() {
    let odd = ModelConfig {
        classes: 7,
        p: 2,
        q: 2,
        dilations: vec![4, 1, 2, 3],
        ..ModelConfig::default()
    };
    for config in configs().into_iter().step_by(5).chain([odd]) {
        let model = model(config, 21);
        for (n, h, w) in [(2, 37, 51), (1, 64, 48)] {
            let shape = Shape::new(n, 3, h, w);
            let image = input(shape, 22);
            let plain = logits(&model, shape, &image, Rewrites::NONE);
            for rewrites in EACH {
                let error = relative_l2(&logits(&model, shape, &image, rewrites), &plain);
                let config = &model.config;
                assert!(error <= TOLERANCE, "{rewrites:?}, {shape}, {config:?}: {error:e}");
            }
        }
    }
}

fn rewritten(config: &ModelConfig, rewrites: Rewrites) -> (Graph, Graph) {
    let graph = Graph::fpenet(config).unwrap();
    let params = ParamStore::init(&graph.params, 1);
    let (new, values) = for_inference_with(&graph, &params, rewrites);
    check_links(&new);
    assert_eq!(values.specs, new.params);
    (for_inference(&graph, &params).0, new)
}

fn macs(graph: &Graph, (h, w): (usize, usize)) -> u64 {
    let shapes = graph.infer_shapes(1, h, w).unwrap();
    let nodes = graph.nodes.iter().zip(&shapes);
    nodes.map(|(node, &shape)| node.op.cost(shape).macs).sum()
}

#[test]
fn the_savings_are_those_of_the_design_study() {
    let config = ModelConfig::default();
    let even_grid = Rewrites { even_grid: true, ..Rewrites::NONE };
    let both = Rewrites { collapse_decoder: true, ..even_grid };
    // KERNELS.md, "What matters most": 4.94 G, 4.33 G, 3.99 G at 1024x512.
    for (rewrites, expected) in [(Rewrites::NONE, 4.94), (even_grid, 4.33), (both, 3.99)] {
        let found = macs(&rewritten(&config, rewrites).1, (512, 1024)) as f64 / 1e9;
        // Its figures are rounded, and leave out the gates' few products.
        assert!((found - expected).abs() < 0.01, "{rewrites:?}: {found} GMAC");
    }
}

#[test]
fn only_a_decoder_with_both_attentions_collapses() {
    for config in configs() {
        let collapse = Rewrites { collapse_decoder: true, ..Rewrites::NONE };
        let (plain, new) = rewritten(&config, collapse);
        let scores = new.nodes.iter().filter(|node| matches!(node.op, Op::MeuScores(_))).count();
        if config.decoder == Decoder::Meu {
            assert_eq!(scores, 2, "{config:?}");
            assert!(new.intermediate("decoder1").is_none() && new.intermediate("stage3").is_some());
        } else {
            assert_eq!(scores, 0);
            assert_eq!(new.nodes.len(), plain.nodes.len());
        }
    }
}

#[test]
fn pairs_are_a_projection_and_the_expansion_that_reads_it() {
    let join = Rewrites { join_pointwise: true, ..Rewrites::NONE };
    let (_, graph) = rewritten(&ModelConfig::default(), join);
    let pointwise = |i: usize| matches!(graph.nodes[i].op, Op::Conv1x1(_));
    let pairs: Vec<(&str, &str)> = (1..graph.nodes.len())
        .filter(|&i| graph.nodes[i].joined && pointwise(i - 1) && pointwise(i))
        .map(|i| (&graph.nodes[i - 1].name[..], &graph.nodes[i].name[..]))
        .collect();
    // Blocks 0 to 2 of stage 2 and 0 to 8 of stage 3.
    assert_eq!(pairs.len(), 2 + 8);
    assert_eq!(pairs[0], ("stage2.0.project.conv", "stage2.1.expand.conv"));
    assert_eq!(pairs[9], ("stage3.7.project.conv", "stage3.8.expand.conv"));
    // Stage 1's block is one step. With the other rewrites so are the parts of strided blocks.
    assert_eq!(graph.nodes.iter().filter(|node| node.joined).count(), 10 + 2);
    let (_, graph) = rewritten(&ModelConfig::default(), Rewrites::ALL);
    let others: Vec<&str> =
        graph.nodes.iter().filter(|node| node.joined).map(|node| &node.name[..]).collect();
    assert_eq!(others.len(), 10 + 2 + 4);
    for name in ["stage2.0.branches.fine", "stage3.0.expand.conv.coarse"] {
        assert!(others.contains(&name), "{name}");
    }
    let relu = ModelConfig { block_activation: BlockActivation::Relu, ..ModelConfig::default() };
    let (_, graph) = rewritten(&relu, join);
    assert_eq!(graph.nodes.iter().filter(|node| node.joined).count(), 10 + 2);
}

#[test]
fn a_stage_expands_in_place_from_block_to_block() {
    let (_, graph) = rewritten(&ModelConfig::default(), Rewrites::ALL);
    let plan = Plan::new(&graph, (1, 64, 96), Mode::Labels, PlaneLayout::Dense).unwrap();
    let place = |name: &str| {
        let step = plan.steps.iter().find(|step| step.name == name);
        step.unwrap_or_else(|| panic!("no step {name}")).output.offset
    };
    for block in 2..9 {
        for part in ["expand.conv", "branches"] {
            assert_eq!(place(&format!("stage3.{block}.{part}")), place("stage3.1.expand.conv"));
        }
    }
}

#[test]
fn operators_without_a_backward_are_refused_in_training() {
    let (_, graph) = rewritten(&ModelConfig::default(), Rewrites::ALL);
    let refused = Plan::new(&graph, (1, 64, 64), Mode::Training, PlaneLayout::Dense);
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("has no backward") && text.contains("stage2.0"), "{text}");
}
