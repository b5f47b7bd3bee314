use super::*;
use crate::backend::gpu::cards::CARDS;
use crate::exec;
use crate::graph::{Mode, PlaneLayout};
use crate::{Model, ModelConfig};

fn plan(size: (usize, usize)) -> Plan {
    let config = ModelConfig { p: 1, q: 2, ..ModelConfig::default() };
    let model = Model::init(config, 0).unwrap();
    exec::plan_inference(&model, (PlaneLayout::Dense, REWRITES), (1, size.1, size.0), Mode::Labels)
        .unwrap()
        .0
}

fn key() -> Key {
    Key::new("NVIDIA TITAN V, sm_70, driver 550.54.15".into(), &plan((64, 32)), Element::F16)
}

fn entry(key: Key) -> Entry {
    let variants = changed(Variants::default(), "cascade_kb", "48").unwrap();
    Entry { key, choice: Choice { variants, graphs: true }, microseconds: 1.5 }
}

#[test]
fn every_variant_is_a_dimension_of_the_tuner() {
    let text = Variants::default().to_string();
    let keys: Vec<&str> = text.split(',').filter_map(|item| item.split('=').next()).collect();
    for key in keys {
        let tried = DIMENSIONS.iter().any(|(tried, _)| *tried == key);
        assert!(tried || SETTLED.contains(&key), "{key} is in variants.rs and not in choice.rs");
    }
    assert!(dimensions().count() >= 6);
    for (key, values) in dimensions() {
        assert!(values.iter().all(|value| changed(Variants::PLAIN, key, value).is_ok()), "{key}");
    }
}

#[test]
fn storage_in_bytes_is_never_tried_and_shares_what_was_measured() {
    assert!(dimensions().all(|(key, _)| key != "expanded"));
    let bytes = Variants { expanded: Expanded::Bytes, ..Variants::default() };
    let config = ModelConfig { p: 1, q: 2, ..ModelConfig::default() };
    let model = Model::init(config, 0).unwrap();
    let wanted = (PlaneLayout::Dense, rewrites(bytes));
    let scaled = exec::plan_inference(&model, wanted, (1, 32, 64), Mode::Labels).unwrap().0;
    assert!(scaled.params.len() > plan((64, 32)).params.len());
    assert_eq!(Key::new(key().device, &scaled, Element::F16), key());
    // The model's choice is in bytes for a plan that was made for them, and for no other.
    let chosen = |plan: &Plan, element| by_model(plan, element, &CARDS[0]).unwrap().0.variants;
    for card in &CARDS {
        let (_, costs, _) = by_model(&scaled, Element::F16, card).unwrap();
        assert!(costs.iter().any(|cost| cost.kernel.ends_with("_u8")), "{}", card.id);
    }
    assert_eq!(chosen(&scaled, Element::F16).expanded, Expanded::Bytes);
    assert_eq!(chosen(&scaled, Element::F32).expanded, Expanded::Stored);
    assert_eq!(chosen(&plan((64, 32)), Element::F16).expanded, Expanded::Stored);
}

#[test]
fn what_is_stored_is_found_again_under_the_same_key_alone() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path().join("below"));
    assert_eq!(cache.load(&key()).unwrap(), None);
    cache.store(&entry(key())).unwrap();
    assert_eq!(cache.load(&key()).unwrap(), Some(entry(key())));
    for other in [
        Key { device: "NVIDIA TITAN V, sm_70, driver 580.95.05".into(), ..key() },
        Key { precision: "f32".into(), ..key() },
        Key { shape: [2, 3, 32, 64], ..key() },
        Key { version: "0.0.1".into(), ..key() },
        Key { network: "training".into(), ..key() },
    ] {
        assert_eq!(cache.load(&other).unwrap(), None, "{other:?}");
    }
    // So has one without the rewrites, whose choice says so.
    let model = Model::init(ModelConfig::default(), 0).unwrap();
    let layout = (PlaneLayout::Dense, Rewrites::NONE);
    let plain = exec::plan_inference(&model, layout, (1, 32, 64), Mode::Labels).unwrap().0;
    assert_ne!(Key::new(key().device, &plain, Element::F16), key());
    assert!(!by_model(&plain, Element::F16, &CARDS[0]).unwrap().0.variants.rewrites);
    // A network of another structure has another key by itself.
    let small = Model::init(ModelConfig { p: 1, q: 1, ..ModelConfig::default() }, 0).unwrap();
    let made =
        exec::plan_inference(&small, (PlaneLayout::Dense, REWRITES), (1, 32, 64), Mode::Labels)
            .unwrap();
    assert_ne!(Key::new(key().device, &made.0, Element::F16), key());
}

#[test]
fn a_file_that_holds_something_else_is_named_and_does_without() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let other = Entry { key: Key { version: "9.9.9".into(), ..key() }, ..entry(key()) };
    let other = serde_json::to_vec(&other).unwrap();
    for bytes in [&b""[..], b"{", b"null", b"{\"key\": 1}", &[0xff; 100], &[b' '; 1 << 17], &other]
    {
        std::fs::write(cache.path(&key()), bytes).unwrap();
        let chosen = cache.choose(&key(), || Ok(Choice::default())).unwrap();
        assert_eq!((chosen.choice, chosen.source), (Choice::default(), Source::Model));
        let warning = chosen.warning.unwrap();
        assert!(warning.contains("NVIDIA-TITAN-V") && warning.contains("ignored"), "{warning}");
        assert!(!warning.contains('\n'), "{warning}");
    }
    // What was broken is written anew.
    cache.store(&entry(key())).unwrap();
    let chosen = cache.choose(&key(), || Ok(Choice::default())).unwrap();
    assert_eq!((chosen.choice, chosen.source), (entry(key()).choice, Source::Cache));
    assert_eq!(chosen.warning, None);
}

/// Writers of the same and of other keys, and readers, all at once: nothing is lost, and nobody ever
/// sees half a file.
#[test]
fn writers_and_readers_may_share_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    cache.store(&entry(key())).unwrap();
    let own = |writer: usize| Key { shape: [writer + 2, 3, 32, 64], ..key() };
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let cache = &cache;
            scope.spawn(move || {
                for round in 0..10 {
                    let microseconds = f64::from(round);
                    cache.store(&Entry { microseconds, ..entry(key()) }).unwrap();
                    cache.store(&Entry { microseconds, ..entry(own(writer)) }).unwrap();
                }
            });
            scope.spawn(move || {
                for _ in 0..50 {
                    assert!(cache.load(&key()).unwrap().is_some());
                }
            });
        }
    });
    for writer in 0..4 {
        assert_eq!(cache.load(&own(writer)).unwrap().unwrap().microseconds, 9.0);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 5, "temporary files are left");
}

#[test]
fn the_climb_finds_the_cheapest_and_asks_for_each_choice_once() {
    let mut asked = Vec::new();
    let start = Variants::default();
    let (best, found) = climb(start, 0.0, |variants| {
        assert!(!asked.contains(&variants), "{variants} again");
        asked.push(variants);
        let text = variants.to_string();
        let cost = |part: &str| if text.contains(part) { 0.0 } else { 1.0 };
        // One that cannot run is passed over.
        let runs = !text.contains("pair_pixels=128");
        Ok(runs
            .then(|| 1.0 + cost("products=blas") + cost("pair_pixels=32") + cost("cascade_kb=96")))
    })
    .unwrap();
    assert_eq!(found, 1.0);
    let text = best.to_string();
    assert!(["products=blas", "pair_pixels=32", "cascade_kb=96"].iter().all(|p| text.contains(p)));
    assert!(climb(start, 0.0, |_| Ok(None)).is_err());
    // Gains within the margin are noise.
    let (kept, _) = climb(start, 0.1, |v| Ok(Some(if v == start { 1.0 } else { 0.95 }))).unwrap();
    assert_eq!(kept, start);
}

#[test]
fn the_model_never_chooses_what_it_holds_to_be_slower_than_the_plain_way() {
    let plan = plan((256, 128));
    for card in &CARDS {
        for element in [Element::F32, Element::F16] {
            let (choice, costs, prediction) = by_model(&plan, element, card).unwrap();
            let plain = work(&plan, element, card.shared_per_block, Variants::PLAIN).unwrap();
            let plain = predict::total(&plain, card, true);
            assert!(prediction.expected <= plain.expected, "{} {choice:?}", card.id);
            assert!(prediction.roofline > 0.0 && prediction.roofline < prediction.expected);
            let fits = |cost: &CommandCost| cost.shared_bytes <= card.shared_per_block;
            assert!(costs.iter().all(fits), "{}", card.id);
        }
    }
}

#[test]
fn what_only_a_measurement_may_choose_is_tried_by_it_and_never_by_the_model() {
    for (key, value) in MEASURED {
        assert!(DIMENSIONS.iter().any(|(k, values)| *k == key && values.contains(&value)), "{key}");
        assert!(measured_only(changed(Variants::default(), key, value).unwrap()));
    }
    assert!(!measured_only(Variants::default()));
    let plan = plan((1024, 512));
    for card in &CARDS {
        for element in [Element::F32, Element::F16] {
            let (choice, ..) = by_model(&plan, element, card).unwrap();
            assert!(!measured_only(choice.variants), "{} {choice:?}", card.id);
        }
    }
}

#[test]
fn the_models_work_grows_with_the_pixels_and_its_time_no_faster() {
    let card = &CARDS[0];
    let at = |size| {
        let plan = plan(size);
        let costs = work(&plan, Element::F16, card.shared_per_block, Variants::default()).unwrap();
        let bytes: u64 = costs.iter().map(|cost| cost.bytes).sum();
        let flops: u64 = costs.iter().map(|cost| cost.flops).sum();
        (bytes as f64, flops as f64, predict::total(&costs, card, true).expected)
    };
    let (small, large) = (at((512, 256)), at((1024, 512)));
    assert!((large.1 / small.1 - 4.0).abs() < 0.2, "{:?}", (small, large));
    assert!(large.0 / small.0 < 4.6 && large.0 / small.0 > 3.4, "{:?}", (small, large));
    assert!(large.2 > small.2 && large.2 / small.2 < 8.0, "{:?}", (small, large));
}
