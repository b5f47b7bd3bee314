use super::*;
use crate::backend::gpu::cards::CARDS;
use crate::backend::gpu::choice;
use crate::backend::gpu::variants::{CascadePlanes, Expanded, Strided, Variants};
use crate::exec;
use crate::graph::{Mode, PlaneLayout};
use crate::{Model, ModelConfig};

fn plan(mode: Mode) -> Plan {
    let model = Model::init(ModelConfig::default(), 0).unwrap();
    exec::plan_inference(&model, (PlaneLayout::Dense, choice::REWRITES), (1, 512, 1024), mode)
        .unwrap()
        .0
}

fn work(element: Element, shared: usize, variants: Variants) -> Vec<CommandCost> {
    choice::work(&plan(Mode::Labels), element, shared, variants).unwrap()
}

fn sum(costs: &[CommandCost], of: impl Fn(&CommandCost) -> u64) -> f64 {
    costs.iter().map(of).sum::<u64>() as f64
}

/// The network's multiply-accumulates are in the summary; what else is computed is small beside them.
#[test]
fn all_the_networks_arithmetic_is_in_the_commands_whatever_the_variants() {
    let macs: u64 = crate::bench::macs(&plan(Mode::Labels));
    for variants in [Variants::PLAIN, Variants::default()] {
        for element in [Element::F32, Element::F16] {
            let flops = sum(&work(element, 96 << 10, variants), |cost| cost.flops);
            let ratio = flops / (2 * macs) as f64;
            // The halos of cascades in tiles are computed again; in f16 those of strided blocks and of the
            // decoder's tiles, too.
            let most = if element == Element::F16 { 1.3 } else { 1.2 };
            assert!((0.98..most).contains(&ratio), "{variants} {element:?}: {ratio}");
        }
    }
}

#[test]
fn half_precision_halves_the_bytes_of_fused_kernels_and_fusing_saves_some() {
    let bytes = |element, variants| sum(&work(element, 228 << 10, variants), |cost| cost.bytes);
    // Strided blocks are fused in f16 alone.
    let same = Variants { strided: Strided::Separate, ..Variants::default() };
    let ratio = bytes(Element::F16, same) / bytes(Element::F32, same);
    assert!((0.4..0.65).contains(&ratio), "{ratio}");
    assert!(bytes(Element::F16, Variants::default()) < bytes(Element::F16, same));
    assert!(bytes(Element::F16, same) < bytes(Element::F16, Variants::PLAIN));
}

/// Expanded tensors of stride-1 blocks in 8 bits halve what their kernels move of them; what they read
/// and write besides stays. KERNELS.md (style f) has 285 MB and 172 MB for the network.
#[test]
fn expanded_tensors_in_bytes_move_fewer_bytes_and_nothing_else_changes() {
    // A strided block that goes on to the next expansion leaves halves; bytes are walked.
    let cascade = CascadePlanes::Stored;
    let same = Variants { strided: Strided::Fused, cascade, ..Variants::default() };
    let variants = Variants { expanded: Expanded::Bytes, ..same };
    let model = Model::init(ModelConfig::default(), 0).unwrap();
    let wanted = (PlaneLayout::Dense, choice::rewrites(variants));
    let plan = exec::plan_inference(&model, wanted, (1, 512, 1024), Mode::Labels).unwrap().0;
    let bytes = choice::work(&plan, Element::F16, 228 << 10, variants).unwrap();
    let stored = work(Element::F16, 228 << 10, same);
    assert_eq!(bytes.len(), stored.len());
    // Elements of an expanded tensor, in stages 2 and 3; a block writes and reads two.
    let (two, three) = (128 * 128 * 256, 256 * 64 * 128);
    let moved = |costs: &[CommandCost]| costs.iter().map(|cost| cost.bytes).sum::<u64>();
    assert_eq!(moved(&stored) - moved(&bytes), 4 * (2 * two + 8 * three));
    for (a, b) in bytes.iter().zip(&stored) {
        assert_eq!(a.class(), b.class());
        assert_eq!(a.flops, b.flops);
    }
    // Scales without 8 bits to use them for change nothing.
    let plain = choice::work(&plan, Element::F16, 228 << 10, same).unwrap();
    assert_eq!(sum(&plain, |cost| cost.bytes), sum(&stored, |cost| cost.bytes));
}

#[test]
fn a_cascade_that_takes_whole_planes_loads_each_element_once_and_tiles_load_more() {
    let mut plan = plan(Mode::Labels);
    // A block of stage 3, stride 1: 64 x 128 planes.
    plan.steps.retain(|step| step.name == "stage3.1.branches");
    assert_eq!(plan.steps.len(), 1, "the step has another name");
    let cascade = |kb| {
        let variants = choice::changed(Variants::PLAIN, "cascade_kb", kb).unwrap();
        let costs = choice::work(&plan, Element::F32, 228 << 10, variants).unwrap();
        *costs.iter().find(|cost| cost.class() == "cascade_forward").unwrap()
    };
    let elements = 256 * 64 * 128;
    let weights = 4 * 10 * 256;
    assert_eq!(cascade("0").bytes, (4 * 2 * elements + weights) as u64);
    let tiled = cascade("32");
    assert!(tiled.blocks > cascade("0").blocks);
    // Halos are read again, from L2; the elements themselves stay the same.
    assert_eq!((tiled.bytes, cascade("0").again), (cascade("0").bytes, 0));
    assert!(tiled.again > 0 && tiled.again < 2 * tiled.bytes);
    assert!(tiled.shared_bytes <= 32 << 10);
}

/// What a persistent stage computes and moves is what its launches would; barriers take the place of
/// their dependencies.
#[test]
fn a_persistent_stage_is_its_launches_with_barriers_between_them() {
    let card = &CARDS[3];
    for element in [Element::F32, Element::F16] {
        // Its cascades walk.
        let walked = Variants { cascade: CascadePlanes::Stored, ..Variants::default() };
        let separate = work(element, card.shared_per_block, walked);
        let persistent = choice::changed(walked, "stage3", "persistent").unwrap();
        let persistent = work(element, card.shared_per_block, persistent);
        assert_eq!(persistent.len(), separate.len());
        let parts = persistent.iter().filter(|cost| cost.class() == "stage_blocks").count();
        let fewer = launches(&separate) - launches(&persistent);
        assert_eq!((fewer, launches(&separate)), (parts - 1, separate.len()));
        for (one, other) in persistent.iter().zip(&separate) {
            // The last projection is another kernel's, which counts its weights otherwise.
            let same = other.class() == "conv1x1" || other.class() == "conv1x1_tile";
            assert_eq!(one.flops, other.flops, "{one:?} {other:?}");
            assert!(same || one.bytes == other.bytes, "{one:?} {other:?}");
        }
        let barrier = *persistent.iter().find(|cost| cost.behind_barrier).unwrap();
        let launch = CommandCost { behind_barrier: false, ..barrier };
        let saved = launch.predict(card, true).expected - barrier.predict(card, true).expected;
        assert!((saved - (card.dependency - card.barrier)).abs() < 1e-12, "{saved}");
    }
}

#[test]
fn kernels_are_grouped_by_what_they_do() {
    assert_eq!(class("pair_f16_c64_p64"), "pair");
    assert_eq!(class("conv1x1_f16_r64"), "conv1x1");
    assert_eq!(class("cascade_forward_f32"), "cascade_forward");
    assert_eq!(class("gemm"), "gemm");
}
