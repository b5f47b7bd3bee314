//! `fpenet bench` and `fpenet devices` as a user runs them.

use assert_cmd::Command;
use serde_json::Value;

fn fpenet(args: &[&str]) -> (i32, String, String) {
    let output = Command::cargo_bin("fpenet").unwrap().args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// A benchmark small enough for a test; returns what it wrote.
fn bench(args: &[&str]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("bench.json");
    let fixed = ["bench", "--device", "cpu", "--threads", "1", "--p", "1", "--q", "1", "--json"];
    let all = [&fixed, &[json.to_str().unwrap()][..], args].concat();
    let (code, stdout, stderr) = fpenet(&all);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.contains("latency") && stdout.contains("images/s"), "{stdout}");
    serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap()
}

#[test]
fn the_json_holds_the_keys_that_others_read() {
    let report = bench(&["--size", "64x32", "--batch", "2", "--iterations", "5", "--warmup", "1"]);
    assert_eq!(report["device"], "cpu");
    assert_eq!(report["size"], "64x32");
    assert_eq!(report["batch"], 2);
    assert_eq!(report["precision"], "f32");
    assert_eq!(report["mode"], "logits");
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["samples_ms"].as_array().unwrap().len(), 5);
    let latency = |key: &str| report["latency_ms"][key].as_f64().unwrap();
    let sorted = ["min", "median", "p90", "p95", "p99"].map(latency);
    assert!(sorted.is_sorted() && sorted[0] > 0.0, "{sorted:?}");
    assert!(latency("min") <= latency("mean") && latency("mean") <= latency("p99") * 5.0);
    let fps = report["throughput_fps"].as_f64().unwrap();
    // Two images a run: the figures are written with all their digits.
    assert!((fps - 2000.0 / latency("mean")).abs() < 1e-6 * fps, "{fps}");
    assert!(report["gmacs"].as_f64().unwrap() > 0.0);
    assert!(report["arena_bytes"].as_u64().unwrap() > 0);
    // A CPU runs operators: there are no launches to count.
    for key in ["launches", "gemms", "graph", "device_bytes", "layers"] {
        assert!(report[key].is_null(), "{key}: {}", report[key]);
    }
    // In the place of a data sheet what its units do on registers alone.
    let number = |key: &str| report[key].as_f64().unwrap();
    let bound = 2.0 * number("gmacs") / number("peak_gflops") * 1e3;
    assert!((number("roofline_ms") - bound).abs() < 1e-9 * bound, "{report}");
    let share = bound / report["compute_ms"]["median"].as_f64().unwrap();
    assert!((number("roofline_share") - share).abs() < 1e-9, "{report}");
    assert!(share > 0.0 && number("bytes_moved") > 1e5, "{report}");
}

#[test]
fn copies_and_compute_are_timed_apart_and_add_up() {
    let small = ["--size", "96x64", "--iterations", "4", "--warmup", "1"];
    let median = |report: &Value, key: &str| report[key]["median"].as_f64().unwrap();
    let parts = ["host_to_device_ms", "compute_ms", "device_to_host_ms"];
    let report = bench(&small);
    assert_eq!(report["copies_included"], false);
    assert!(parts.iter().all(|key| median(&report, key) > 0.0), "{report}");
    let with = bench(&[&small[..], &["--include-copies"]].concat());
    assert_eq!(with["copies_included"], true);
    // The smallest whole run holds at least the smallest of each part.
    let sum: f64 = parts.iter().map(|key| with[key]["min"].as_f64().unwrap()).sum();
    let whole = with["latency_ms"]["min"].as_f64().unwrap();
    assert!(sum <= whole && sum > 0.5 * whole, "{sum} of {whole}");
}

#[test]
fn an_emulated_gpu_counts_its_commands_and_their_bytes() {
    let mut args = "bench --device emulated --p 1 --q 1 --size 32x16 --iterations 1 --warmup 0 \
        --no-graph --profile --json"
        .split_whitespace()
        .collect::<Vec<_>>();
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("bench.json");
    args.push(json.to_str().unwrap());
    let (code, stdout, stderr) = fpenet(&args);
    if code == 1 && stderr.contains("does not hold the emulated kernels") {
        return; // A build without a C++ compiler for x86-64 Linux.
    }
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("launches") && stdout.contains("MB moved"), "{stdout}");
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert!(report["launches"].as_u64().unwrap() > 10, "{report}");
    assert_eq!(report["graph"], false);
    let kernels = report["kernels"].as_array().unwrap();
    let launches: u64 = kernels.iter().map(|kernel| kernel["launches"].as_u64().unwrap()).sum();
    assert_eq!(launches, report["launches"].as_u64().unwrap(), "{kernels:?}");
    let layers = report["layers"].as_array().unwrap();
    let bytes = |layer: &Value| layer["bytes"].as_u64().unwrap();
    // What commands move is at least what the layers cannot avoid, and not much more.
    let (least, moved) = (layers.iter().map(bytes).sum::<u64>(), bytes_moved(&report));
    assert!(moved >= least / 2 && moved < 3 * least, "{moved} of {least}");
    assert!(report["device_bytes"].as_u64().unwrap() > report["arena_bytes"].as_u64().unwrap());
    assert!(report["roofline_ms"].is_null(), "an emulated device has no data sheet");
}

fn bytes_moved(report: &Value) -> u64 {
    report["bytes_moved"].as_u64().unwrap()
}

#[test]
fn labels_and_training_steps_are_measured_too() {
    let small = ["--size", "48x32", "--iterations", "2", "--warmup", "0"];
    let labels = bench(&[&small[..], &["--argmax"]].concat());
    assert_eq!(labels["mode"], "labels");
    let training = bench(&[&small[..], &["--train", "--batch", "2"]].concat());
    assert_eq!(training["mode"], "train");
    assert_eq!(training["samples_ms"].as_array().unwrap().len(), 2);
}

#[test]
fn a_profile_lists_every_layer_once() {
    let args = "bench --device cpu --p 1 --q 1 --size 64x32 --iterations 2 --warmup 1 --profile";
    let (code, stdout, stderr) = fpenet(&args.split(' ').collect::<Vec<_>>());
    assert_eq!(code, 0, "{stderr}");
    for layer in ["stem.conv ", "stage2.0.branches ", "stage3.0.project.conv "] {
        let lines = stdout.lines().filter(|line| line.starts_with(layer)).count();
        assert_eq!(lines, 1, "{layer}: {stdout}");
    }
}

/// Of a training step: every layer with its forward and backward pass, and the same time by operator.
fn check_training_profile(report: &Value, stdout: &str) {
    let list = |key: &str| report[key].as_array().unwrap().clone();
    let (layers, kernels) = (list("training_layers"), list("kernels"));
    let sum = |rows: &[Value], key: &str| rows.iter().map(|row| row[key].as_f64().unwrap()).sum();
    let counted: [f64; 2] = [sum(&layers, "commands"), sum(&kernels, "launches")];
    assert!(counted[0] == counted[1] && counted[0] > layers.len() as f64, "{counted:?}");
    let whole: f64 = sum(&kernels, "mean_ms");
    let (forward, backward): (f64, f64) = (sum(&layers, "forward_ms"), sum(&layers, "backward_ms"));
    assert!((forward + backward - whole).abs() < 1e-6 * whole, "{forward} {backward} {whole}");
    assert!(forward > 0.0 && backward > forward / 4.0, "{forward} {backward}");
    for rows in [&layers, &kernels] {
        let share: f64 = sum(rows, "share");
        assert!((share - 1.0).abs() < 1e-6, "{share}");
    }
    let row = |name: &str| layers.iter().find(|row| row["name"] == name).unwrap().clone();
    assert!(row("stage2.0.branches")["backward_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(row("update")["forward_ms"], 0.0);
    for layer in ["stem.conv ", "stage2.0.branches ", "loss ", "update "] {
        let lines = stdout.lines().filter(|line| line.starts_with(layer)).count();
        assert_eq!(lines, 1, "{layer}: {stdout}");
    }
}

#[test]
fn a_training_step_is_profiled_by_layer_and_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("bench.json");
    let line = "--p 1 --q 1 --size 32x24 --batch 2 --iterations 2 --warmup 1 --train --profile";
    for device in ["cpu", "emulated"] {
        let args = ["bench", "--device", device, "--json", json.to_str().unwrap()];
        let (code, stdout, stderr) =
            fpenet(&[&args[..], &line.split(' ').collect::<Vec<_>>()].concat());
        if code == 1 && stderr.contains("does not hold the emulated kernels") {
            continue; // A build without a C++ compiler for x86-64 Linux.
        }
        assert_eq!(code, 0, "{stderr}");
        let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
        check_training_profile(&report, &stdout);
        let kernel = if device == "cpu" { "cascade " } else { "adam_f32 " };
        assert!(stdout.lines().any(|line| line.starts_with(kernel)), "{kernel}: {stdout}");
    }
}

#[test]
fn a_dash_sends_the_json_to_standard_output_and_the_words_to_standard_error() {
    let dir = tempfile::tempdir().unwrap();
    let bench = "bench --device cpu --threads 1 --p 1 --q 1 --size 64x32 --iterations 2 --warmup 0 \
        --profile --json -";
    let tune = "tune --dry-run --card h200 --precision f16 --p 1 --q 1 --json -";
    for (command, words) in [(bench, "latency ms"), (tune, "prediction")] {
        let mut fpenet = Command::cargo_bin("fpenet").unwrap();
        let output = fpenet.args(command.split_whitespace()).current_dir(&dir).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap();
        assert!(stderr.contains(words), "{stderr}");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "a file was written");
    }
}

#[test]
fn wrong_usage_and_unwritable_outputs_are_told_before_any_work() {
    for args in [
        &["bench", "--size", "0x0"][..],
        &["bench", "--batch", "0"],
        &["bench", "--iterations", "0"],
        &["bench", "--device", "cpu", "--precision", "f16"],
        &["bench", "--train", "--argmax"],
        &["bench", "--train", "--include-copies"],
        &["bench", "--train", "--device", "emulated", "--precision", "f16", "--expanded", "bytes"],
    ] {
        let (code, _, stderr) = fpenet(args);
        assert_eq!(code, 2, "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    }
    let (code, stdout, stderr) = fpenet(&["bench", "--json", "/nonexistent/folder/x.json"]);
    assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
    assert!(stderr.contains("/nonexistent/folder/x.json"), "{stderr}");
}

#[test]
fn devices_lists_every_kind() {
    let (code, stdout, _) = fpenet(&["devices"]);
    assert_eq!(code, 0);
    for kind in ["cpu", "cuda", "emulated"] {
        assert!(stdout.lines().any(|line| line.starts_with(kind)), "{stdout}");
    }
    let cpu = stdout.lines().find(|line| line.starts_with("cpu")).unwrap();
    assert!(cpu.contains("available") && cpu.contains("thread"), "{cpu}");
}
