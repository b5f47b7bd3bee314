use std::path::Path;

use super::*;
use crate::backend::gpu::cards::CARDS;
use crate::backend::gpu::choice;
use crate::backend::gpu::device::Element;
use crate::backend::gpu::variants::Variants;
use crate::exec;
use crate::graph::{Mode, Plan, PlaneLayout};
use crate::{Model, ModelConfig};

fn plan((w, h): (usize, usize)) -> Plan {
    let model = Model::init(ModelConfig::default(), 0).unwrap();
    let wanted = (PlaneLayout::Dense, choice::REWRITES);
    exec::plan_inference(&model, wanted, (1, h, w), Mode::Labels).unwrap().0
}

fn work(
    size: (usize, usize),
    element: Element,
    card: &Card,
    variants: Variants,
) -> Vec<CommandCost> {
    choice::work(&plan(size), element, card.shared_per_block, variants).unwrap()
}

/// KERNELS.md section 1 has the same bound from the same data; the structure of the network's kernels
/// differs, so only the order of magnitude is held here.
#[test]
fn the_roofline_of_the_whole_network_is_that_of_the_design_study() {
    let card = &CARDS[0];
    let costs = work((1024, 512), Element::F16, card, Variants::default());
    let prediction = total(&costs, card, true);
    assert!((150e-6..1500e-6).contains(&prediction.roofline), "{prediction:?}");
    assert!(prediction.expected > prediction.roofline);
    assert!(total(&costs, card, false).expected > prediction.expected);
}

#[test]
fn a_prediction_is_bounded_by_bandwidth_or_by_arithmetic() {
    let card = &CARDS[3];
    let cost = CommandCost {
        kernel: "none_f32",
        bytes: 1 << 30,
        again: 0,
        flops: 1,
        unit: Unit::Fp32,
        beside: 0,
        last: (0, 0),
        blocks: 1 << 16,
        threads: 256,
        shared_bytes: 0,
        behind_barrier: false,
    };
    // 1 GiB, 50 MiB of it from L2.
    let l2 = card.l2_bytes / card.l2;
    let memory = (f64::from(1 << 30) - card.l2_bytes) / card.dram;
    assert!((cost.predict(card, true).roofline / (l2 + memory) - 1.0).abs() < 1e-9);
    let heavy = CommandCost { flops: 1 << 40, bytes: 1, ..cost };
    let seconds = (1u64 << 40) as f64 / card.fp32;
    assert!((heavy.predict(card, true).roofline / seconds - 1.0).abs() < 1e-9);
    assert!(heavy.predict(card, true).expected >= seconds / efficiency::ELEMENTWISE);
    // One block keeps one multiprocessor busy.
    let single = CommandCost { blocks: 1, ..heavy };
    assert!(single.predict(card, true).expected > 100.0 * heavy.predict(card, true).expected);
    let tensor = CommandCost { unit: Unit::Tensor, ..heavy };
    assert!(tensor.predict(card, true).expected < heavy.predict(card, true).expected / 5.0);
}

/// What `fpenet tune` timed for one size and precision.
struct Timed {
    size: (usize, usize),
    element: Element,
    /// Every choice that ran as a CUDA graph, and its microseconds.
    trials: Vec<(Variants, f64)>,
}

/// On an H100.
fn timed() -> Vec<Timed> {
    let file = "benches/results/tune-2026-11-26-h100.json";
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let tuned: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let read = |tuned: &serde_json::Value| {
        let (w, h) = tuned["size"].as_str().unwrap().split_once('x').unwrap();
        let trials = tuned["trials"].as_array().unwrap().iter();
        let trials = trials.filter(|trial| trial["graphs"] == true).map(|trial| {
            let variants = trial["variants"].as_str().unwrap().parse().unwrap();
            (variants, trial["microseconds"].as_f64().unwrap())
        });
        Timed {
            size: (w.parse().unwrap(), h.parse().unwrap()),
            element: if tuned["precision"] == "f16" { Element::F16 } else { Element::F32 },
            trials: trials.collect(),
        }
    };
    tuned.iter().map(read).collect()
}

/// The model was fitted to these, so this is no proof for other cards: it says how closely it follows what
/// it was given, from 244 us to 3 ms. Left out are kernels that do not overlap, of which the model does not
/// know.
#[test]
fn the_model_follows_what_was_timed_on_an_h100() {
    let card = CARDS.iter().find(|card| card.id == "h100").unwrap();
    let mut count = 0;
    for Timed { size, element, trials } in timed() {
        let best = trials.iter().map(|(_, time)| *time).fold(f64::MAX, f64::min);
        for (variants, time) in &trials {
            if !variants.dependent_launch {
                continue;
            }
            let expected = 1e6 * total(&work(size, element, card, *variants), card, true).expected;
            let bounds = if *time < 1.05 * best { 0.87..1.15 } else { 0.7..1.4 };
            let ratio = expected / time;
            assert!(
                bounds.contains(&ratio),
                "{size:?} {element:?} {variants}: {expected:.0} us, timed {time:.0}"
            );
            count += 1;
        }
        // And what it would choose there was among the fastest.
        let chosen = choice::by_model(&plan(size), element, card).unwrap().0.variants;
        let (_, time) = trials.iter().find(|(variants, _)| *variants == chosen).unwrap();
        assert!(
            *time < 1.05 * best,
            "{size:?} {element:?}: {chosen}: {time:.0} us, best {best:.0}"
        );
    }
    assert!(count > 90, "{count}");
}
