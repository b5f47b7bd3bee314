//! Totals of `fpenet summary`: those that SPEC.md lists, and PyTorch's counts for the ablations.

use fpenet::ModelConfig;
use fpenet::config::{Attention, BlockActivation, Decoder};
use fpenet::graph::summary::{Summary, summarise};

fn at(config: &ModelConfig, width: usize, height: usize) -> Summary {
    summarise(config, 1, height, width).unwrap()
}

fn parameters(config: ModelConfig) -> usize {
    at(&config, 64, 32).parameters
}

#[test]
fn parameters_of_table_4() {
    let rows = [
        (3, 5, 233_495),
        (3, 7, 305_943),
        (5, 7, 325_783),
        (3, 9, 378_391),
        (5, 9, 398_231),
        (3, 11, 450_839),
    ];
    for (p, q, expected) in rows {
        let found = parameters(ModelConfig { p, q, ..Default::default() });
        assert_eq!(found, expected, "p = {p}, q = {q}");
    }
}

/// Counted by PyTorch: `parameter_count(FPENet(Config(...)))` of tools/fpenet_torch.py.
#[test]
fn parameters_of_the_ablations() {
    let default = ModelConfig::default;
    let bare = ModelConfig {
        classes: 5,
        p: 1,
        q: 2,
        long_skip: false,
        decoder: Decoder::Bilinear,
        ..default()
    };
    let rows = [
        (ModelConfig { branches: 1, ..default() }, 378_391),
        (ModelConfig { branches: 2, ..default() }, 378_391),
        (ModelConfig { branch_addition: false, ..default() }, 378_391),
        (ModelConfig { long_skip: false, ..default() }, 343_639),
        (ModelConfig { decoder: Decoder::Ca, ..default() }, 378_387),
        (ModelConfig { decoder: Decoder::Bilinear, ..default() }, 359_443),
        (ModelConfig { attention: Attention::Sigmoid, ..default() }, 378_391),
        (ModelConfig { block_activation: BlockActivation::Relu, ..default() }, 378_391),
        (ModelConfig { classes: 11, ..default() }, 378_127),
        (ModelConfig { p: 1, q: 1, ..default() }, 68_759),
        (bare, 55_813),
    ];
    for (config, expected) in rows {
        assert_eq!(parameters(config.clone()), expected, "{config:?}");
    }
}

#[test]
fn flops_of_table_7() {
    let rows = [(1024, 512, 5.64, 5.23), (768, 384, 3.17, 2.94), (1536, 768, 12.68, 11.77)];
    for (width, height, published, executed) in rows {
        let summary = at(&ModelConfig::default(), width, height);
        let giga = |flops: u64| (flops as f64 / 1e7).round() / 100.0;
        assert_eq!(giga(summary.flops_as_published), published, "{width}x{height}");
        assert_eq!(giga(summary.flops_as_executed), executed, "{width}x{height}");
    }
}

/// MACs from the SPEC's description alone, stage by stage, at a size that halves evenly.
#[test]
fn multiply_accumulates_follow_from_the_structure() {
    let (width, height, p, q, classes) = (1024u64, 512, 3, 9, 19);
    let plane = |level: u32| (width >> level) * (height >> level);
    let block = |c_in: u64, c_out: u64, k: u64, from: u64, to: u64| {
        let e = k * c_in;
        c_in * e * from + 9 * e * to + e * c_out * to
    };
    let stem = 27 * 16 * plane(1);
    let stage1 = block(16, 16, 1, plane(1), plane(1));
    let stage2 =
        block(32, 32, 4, plane(1), plane(2)) + (p - 1) * block(32, 32, 4, plane(2), plane(2));
    let stage3 =
        block(64, 64, 4, plane(2), plane(3)) + (q - 1) * block(64, 64, 4, plane(3), plane(3));
    let meu = |high: u64, low: u64, o: u64, h: u64, l: u64| {
        high * o * h + low * o * l + o * o + l // the last two: the attention convolutions
    };
    let decoder2 = meu(128, 64, 64, plane(3), plane(2));
    let decoder1 = meu(64, 32, 32, plane(2), plane(1));
    let classifier = 32 * classes * plane(1);
    let expected = stem + stage1 + stage2 + stage3 + decoder2 + decoder1 + classifier;
    assert_eq!(at(&ModelConfig::default(), 1024, 512).macs, expected);
}

#[test]
fn totals_are_the_sums_of_the_layers() {
    let config = ModelConfig { decoder: Decoder::Ca, long_skip: false, ..Default::default() };
    let summary = summarise(&config, 2, 37, 51).unwrap();
    let sum = |figure: fn(&fpenet::graph::summary::Layer) -> u64| -> u64 {
        summary.layers.iter().map(figure).sum()
    };
    assert_eq!(sum(|l| l.macs), summary.macs);
    assert_eq!(sum(|l| l.flops), summary.flops_as_executed);
    assert_eq!(sum(|l| l.parameters as u64), summary.parameters as u64);
    assert!(summary.flops_as_published > summary.flops_as_executed);
    let bilinear = ModelConfig { decoder: Decoder::Bilinear, ..config };
    let summary = summarise(&bilinear, 1, 37, 51).unwrap();
    assert_eq!(summary.flops_as_published, summary.flops_as_executed, "nothing to move");
}

#[test]
fn receptive_fields_grow_with_the_dilations() {
    let field = |config: &ModelConfig, name: &str| {
        let summary = at(config, 1024, 512);
        let layer = summary.layers.iter().find(|layer| layer.name == name).unwrap();
        layer.receptive_field
    };
    let config = ModelConfig::default();
    // Stem: 3. Stage 1 at stride 2: + 2 * 2 * 1. First block of stage 2, where branches stay
    // apart: + 2 * 2 * 8. Second, at stride 4, through all dilations in turn: + 2 * 4 * 15.
    assert_eq!(field(&config, "stem.conv"), Some(3));
    assert_eq!(field(&config, "stage1"), Some(7));
    assert_eq!(field(&config, "stage2.0.branches"), Some(39));
    assert_eq!(field(&config, "stage2.1.branches"), Some(159));
    assert_eq!(field(&config, "logits"), None, "global pooling sees the whole image");
    let apart = ModelConfig { branch_addition: false, ..config.clone() };
    assert_eq!(field(&apart, "stage2.1.branches"), Some(39 + 2 * 4 * 8));
    let bilinear = ModelConfig { decoder: Decoder::Bilinear, q: 1, ..config };
    let stage3 = field(&bilinear, "stage3").unwrap();
    // One more sample at stride 8 in the bilinear resize.
    assert_eq!(field(&bilinear, "logits"), Some(stage3 + 8));
}
