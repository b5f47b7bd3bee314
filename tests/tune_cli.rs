//! `fpenet tune` as a user runs it: predictions without a GPU, choices measured on the emulated one.

use std::path::Path;

use assert_cmd::Command;
use serde_json::Value;

fn fpenet(cache: &Path, args: &[&str]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("fpenet").unwrap();
    command.env("FPENET_CACHE_DIR", cache).env_remove("FPENET_VARIANTS").args(args);
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

const SMALL: [&str; 8] = ["--p", "1", "--q", "1", "--size", "16x16", "--device", "emulated"];

/// Tunes a small network on the emulated device; none in a build without it.
fn tune(cache: &Path, more: &[&str]) -> Option<String> {
    let args = [&["tune", "--precision", "f16"], &SMALL[..], more].concat();
    let (code, stdout, stderr) = fpenet(cache, &args);
    if stderr.contains("does not hold the emulated kernels") {
        return None;
    }
    assert_eq!(code, 0, "{stdout}{stderr}");
    Some(stdout)
}

/// What a benchmark of the same network says of its variants, and what it warns of.
fn bench(cache: &Path) -> (Value, String) {
    let json = cache.join("bench.json");
    let fixed = ["bench", "--precision", "f16", "--iterations", "1", "--warmup", "0", "--json"];
    let args = [&fixed[..], &[json.to_str().unwrap()], &SMALL[..]].concat();
    let (code, stdout, stderr) = fpenet(cache, &args);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let report = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    std::fs::remove_file(json).unwrap();
    (report, stderr)
}

#[test]
fn a_dry_run_predicts_three_cards_and_calls_it_a_prediction() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("dry.json");
    let args = ["tune", "--dry-run", "--json", json.to_str().unwrap()];
    let (code, stdout, stderr) = fpenet(dir.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("prediction, not a measurement"), "{stdout}");
    for card in ["TITAN V (sm_70), 1024x512", "TITAN RTX (sm_75)", "H200 (sm_90)"] {
        assert!(stdout.contains(card), "{card}: {stdout}");
    }
    let all: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 6, "three cards, two precisions");
    for prediction in all {
        let number = |key: &str| prediction[key].as_f64().unwrap();
        // Between the roofline and a fiftieth of it, whatever the variants.
        assert!(number("predicted_fps") < number("roofline_fps"), "{prediction}");
        assert!(number("predicted_fps") > number("roofline_fps") / 50.0, "{prediction}");
        // Shown, and not chosen: nobody has measured what its barriers cost.
        assert!(!prediction["variants"].as_str().unwrap().contains("persistent"), "{prediction}");
        let together = &prediction["persistent"];
        assert!(together["variants"].as_str().unwrap().contains("stage3=persistent"));
        assert!(together["commands"].as_u64() < prediction["commands"].as_u64(), "{prediction}");
        let classes = prediction["classes"].as_array().unwrap();
        let sum: f64 = classes.iter().map(|class| class["predicted_us"].as_f64().unwrap()).sum();
        assert!((sum / number("predicted_us") - 1.0).abs() < 1e-6, "{sum}");
    }
    let fps = |card: &str, precision: &str| {
        let found = all.iter().find(|p| p["card"] == card && p["precision"] == precision);
        found.unwrap()["predicted_fps"].as_f64().unwrap()
    };
    assert!(fps("H200", "f16") > fps("TITAN V", "f16"));
    assert!(fps("TITAN V", "f16") > fps("TITAN V", "f32"));
}

#[test]
fn a_measured_choice_is_kept_and_used_until_its_file_is_broken() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path();
    let Some(stdout) = tune(cache, &[]) else { return };
    assert!(stdout.contains("fastest") && stdout.contains("products="), "{stdout}");
    let files: Vec<_> = std::fs::read_dir(cache).unwrap().map(|f| f.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    let (report, stderr) = bench(cache);
    assert_eq!((&report["variants_from"], stderr.as_str()), (&"cache".into(), ""), "{report}");

    std::fs::write(&files[0], "{\"half a file").unwrap();
    let (report, stderr) = bench(cache);
    assert_eq!(report["variants_from"], "model");
    assert!(stderr.starts_with("warning: ") && stderr.lines().count() == 1, "{stderr}");
    let name = files[0].file_name().unwrap().to_str().unwrap();
    assert!(stderr.contains(name) && stderr.contains("ignored"), "{stderr}");
    // Tuning again repairs it.
    tune(cache, &[]).unwrap();
    assert_eq!(bench(cache).0["variants_from"], "cache");
}

#[test]
fn two_processes_may_tune_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path();
    std::thread::scope(|scope| {
        for batch in ["1", "1", "2"] {
            scope.spawn(move || tune(cache, &["--batch", batch]));
        }
    });
    let names = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name());
    let names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    // None in a build without the emulated device.
    assert!(names.len() == 2 || names.is_empty(), "{names:?}");
    assert!(names.iter().all(|name| name.ends_with(".json")), "{names:?}");
    if !names.is_empty() {
        assert_eq!(bench(dir.path()).0["variants_from"], "cache");
    }
}

#[test]
fn a_cpu_has_thread_counts_to_compare_and_nothing_to_store() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("never");
    let args = ["tune", "--device", "cpu", "--p", "1", "--q", "1", "--size", "64x32"];
    let (code, stdout, stderr) = fpenet(&cache, &args);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("threads=1") && stdout.contains("store"), "{stdout}");
    assert!(!cache.exists());
}

#[test]
fn wrong_usage_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["tune", "--card", "titan-v"][..],
        &["tune", "--dry-run", "--card", "voodoo"],
        &["tune", "--dry-run", "--iterations", "3"],
        &["tune", "--size", "1x1"],
        &["tune", "--device", "cpu", "--precision", "f16"],
        &["tune", "--model", "x.safetensors", "--q", "1"],
    ] {
        let (code, _, stderr) = fpenet(dir.path(), args);
        assert_eq!(code, 2, "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    }
    let (_, _, stderr) = fpenet(dir.path(), &["tune", "--dry-run", "--card", "voodoo"]);
    assert!(stderr.contains("titan-v, titan-rtx, h100, h200"), "{stderr}");
}
