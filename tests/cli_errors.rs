//! Bad input on the command line: one line on stderr that names the file and what was expected,
//! exit code 2 for wrong usage and 1 for work that failed, no panic, nothing half written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use fpenet::ModelConfig;
use fpenet::model::{Model, npy};

fn fpenet(args: &[&str]) -> Output {
    assert_cmd::cargo::cargo_bin_cmd!("fpenet").args(args).output().unwrap()
}

/// Asserts the exit code and one line on stderr that holds every part of `expected`.
#[track_caller]
fn refused(args: &[&str], code: i32, expected: &[&str]) {
    let output = fpenet(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{args:?}: one line: {stderr}");
    assert!(stderr.starts_with("error: ") && !stderr.contains("panicked"), "{args:?}: {stderr}");
    for part in expected {
        assert!(stderr.contains(part), "{args:?}: expected {part:?} in {stderr}");
    }
}

/// A folder with a small model and an input that fits it.
struct Fixture {
    folder: tempfile::TempDir,
    model: Model,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = ModelConfig { classes: 3, p: 1, q: 1, ..Default::default() };
        let model = Model::init(config, 1).unwrap();
        model.save(&folder.path().join("model.safetensors")).unwrap();
        npy::write_f32(&folder.path().join("x.npy"), &[1, 3, 16, 20], &[0.5; 3 * 16 * 20]).unwrap();
        Fixture { folder, model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// `fpenet run` with these files must fail and leave the output file as it was: absent.
    #[track_caller]
    fn run_refused(&self, model: &Path, input: &Path, code: i32, expected: &[&str]) {
        let output = self.path("logits.npy");
        let before = names(self.folder.path());
        let paths = [model, input, &output].map(|p| p.to_str().unwrap());
        let args = ["run", "--model", paths[0], "--input", paths[1], "--output", paths[2]];
        refused(&[&args[..], &["--device", "cpu"]].concat(), code, expected);
        assert_eq!(names(self.folder.path()), before, "a file was left behind");
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn wrong_usage_is_one_line_and_exit_code_2() {
    refused(&["bogus"], 2, &["bogus", "--help"]);
    refused(&["summary", "--bogus"], 2, &["--bogus", "fpenet summary --help"]);
    refused(&["check"], 2, &["--reference"]);
    refused(&["run", "--model", "m"], 2, &["--input", "--output"]);
    for size in ["0x0", "0x512", "1024", "-4x16", "99999x99999", "8x8", "axb"] {
        refused(&["summary", &format!("--size={size}")], 2, &["--size", "WIDTHxHEIGHT"]);
    }
    refused(&["summary", "--device", "tpu"], 2, &["--device"]);
    refused(&["summary", "--classes", "0"], 2, &["classes", "1 to 255", "found 0"]);
    refused(&["summary", "--classes", "256"], 2, &["classes"]);
    refused(&["summary", "--p", "0"], 2, &["p: expected"]);
    refused(&["summary", "--q", "x"], 2, &["--q"]);
    refused(&["summary", "--branches", "3"], 2, &["branches", "1, 2 or 4"]);
    refused(&["summary", "--dilations", "1,2"], 2, &["dilations"]);
    refused(&["summary", "--dilations", "1,2,0,8"], 2, &["dilations"]);
    refused(&["summary", "--decoder", "unet"], 2, &["--decoder", "bilinear"]);
    refused(&["check", "--reference", "x", "--threads", "0"], 2, &["--threads"]);
    refused(&["init", "--out", ""], 2, &["--out"]);
    refused(&["bench", "--json", ""], 2, &["--json"]);
}

#[test]
fn help_and_version_are_no_errors() {
    for args in [&["--help"][..], &["--version"], &["run", "--help"]] {
        let output = fpenet(args);
        assert!(output.status.success() && output.stderr.is_empty(), "{args:?}");
        assert!(!output.stdout.is_empty());
    }
}

#[test]
fn a_good_run_passes_so_that_the_refusals_below_mean_something() {
    let fixture = Fixture::new();
    let output = fixture.path("logits.npy");
    let paths = [fixture.path("model.safetensors"), fixture.path("x.npy"), output.clone()];
    let [m, x, y] = paths.each_ref().map(|p| p.to_str().unwrap());
    let done = fpenet(&["run", "--model", m, "--input", x, "--output", y, "--device", "cpu"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let (shape, logits) = npy::read_f32(&output).unwrap();
    assert_eq!(shape, [1, 3, 16, 20]);
    assert!(logits.iter().all(|v| v.is_finite()));
}

#[test]
fn bad_models_are_refused() {
    let fixture = Fixture::new();
    let good = fs::read(fixture.path("model.safetensors")).unwrap();
    let x = fixture.path("x.npy");
    let cases: [(&str, Vec<u8>, &[&str]); 4] = [
        ("empty", vec![], &["safetensors"]),
        ("cut", good[..good.len() / 2].to_vec(), &["safetensors", "cut off"]),
        ("photo", b"\x89PNG\r\n\x1a\nand more bytes of a photo".to_vec(), &["safetensors"]),
        ("long", [&good[..], b"tail"].concat(), &["safetensors"]),
    ];
    for (name, bytes, expected) in cases {
        let path = fixture.file(name, &bytes);
        fixture.run_refused(&path, &x, 1, &[&[name][..], expected].concat());
    }
    let absent = fixture.path("absent.safetensors");
    fixture.run_refused(&absent, &x, 1, &["absent.safetensors", "cannot read"]);
    fixture.run_refused(fixture.folder.path(), &x, 1, &["cannot read"]);
}

#[test]
fn models_that_do_not_fit_their_config_are_refused() {
    let fixture = Fixture::new();
    let x = fixture.path("x.npy");
    let save = |name: &str, edit: &dyn Fn(&mut Model)| {
        let mut model = fixture.model.clone();
        edit(&mut model);
        let path = fixture.path(name);
        model.save(&path).unwrap();
        path
    };
    let path = save("missing", &|m| m.config.p = 2);
    fixture.run_refused(&path, &x, 1, &["missing", "stage2.1.expand.conv.weight"]);
    let path = save("shape", &|m| m.config.branches = 2);
    fixture.run_refused(&path, &x, 1, &["shape", "branches.0.conv.weight", "64 x 1 x 3 x 3"]);
    let path = save("extra", &|m| m.config.decoder = fpenet::config::Decoder::Ca);
    fixture.run_refused(&path, &x, 1, &["extra tensor decoder1.spatial_attention.bias"]);
    let path = save("names", &|m| m.classes.truncate(2));
    fixture.run_refused(&path, &x, 1, &["names", "classes", "found 2 entries"]);
    // A NaN cannot be saved, so it is put into the last tensor's last element afterwards.
    let mut bytes = fs::read(fixture.path("model.safetensors")).unwrap();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    fixture.run_refused(&fixture.file("nan", &bytes), &x, 1, &["nan", "tensor stem.conv", "NaN"]);
}

#[test]
fn bad_arrays_are_refused() {
    let fixture = Fixture::new();
    let model = fixture.path("model.safetensors");
    let good = fs::read(fixture.path("x.npy")).unwrap();
    let mut doubles = good.clone();
    let at = good.windows(3).position(|w| w == b"<f4").unwrap();
    doubles[at + 2] = b'8';
    let array = |name: &str, shape: &[usize]| {
        let path = fixture.path(name);
        npy::write_f32(&path, shape, &vec![0.5; shape.iter().product()]).unwrap();
        path
    };
    let refused = |path: &Path, code, expected: &[&str]| {
        fixture.run_refused(&model, path, code, expected);
    };
    refused(&fixture.file("type.npy", &doubles), 1, &["type.npy", "f32", "<f8"]);
    refused(&fixture.file("cut.npy", &good[..good.len() - 3]), 1, &["cut.npy", "bytes"]);
    refused(&fixture.file("text.npy", b"1 2 3 4 5 6 7 8 9"), 1, &["text.npy", ".npy file"]);
    refused(&fixture.file("empty.npy", b""), 1, &["empty.npy", "an empty file"]);
    refused(&array("rank3.npy", &[3, 16, 20]), 1, &["rank3.npy", "N x 3 x H x W"]);
    refused(&array("channels.npy", &[1, 4, 16, 20]), 1, &["channels.npy", "N x 3 x H x W"]);
    refused(&array("zero.npy", &[1, 3, 0, 20]), 1, &["zero.npy", "from 16"]);
    refused(&array("batch.npy", &[0, 3, 16, 20]), 1, &["batch.npy", "batch"]);
    refused(&array("small.npy", &[1, 3, 16, 15]), 1, &["small.npy", "15x16"]);
    refused(&array("wide.npy", &[1, 3, 16, 40_000]), 1, &["wide.npy", "40000x16"]);
    let path = fixture.path("nan.npy");
    npy::write_f32(&path, &[1, 3, 16, 20], &[f32::NAN; 960]).unwrap();
    refused(&path, 1, &["nan.npy", "finite", "NaN"]);
    refused(&fixture.path("absent.npy"), 1, &["absent.npy", "cannot read"]);
}

#[test]
fn unwritable_outputs_are_refused_and_existing_files_survive_a_failure() {
    let fixture = Fixture::new();
    let below_a_file = fixture.path("x.npy").join("logits.npy");
    let nowhere = fixture.path("no/such/folder/m.safetensors");
    let folder = fixture.folder.path().to_path_buf();
    for path in [&below_a_file, &nowhere, &folder] {
        let out = path.to_str().unwrap();
        refused(&["init", "--out", out], 1, &[out, "cannot write"]);
        refused(&["export", "--onnx", out], 1, &[out, "cannot write"]);
        let (m, x) = (fixture.path("model.safetensors"), fixture.path("x.npy"));
        let (m, x) = (m.to_str().unwrap(), x.to_str().unwrap());
        refused(&["run", "--model", m, "--input", x, "--output", out], 1, &[out, "cannot write"]);
    }
    let old = fixture.file("old.npy", b"precious");
    let absent = fixture.path("absent.npy");
    let model = fixture.path("model.safetensors");
    let [m, x, y] = [&model, &absent, &old].map(|p| p.to_str().unwrap());
    refused(&["run", "--model", m, "--input", x, "--output", y], 1, &["absent.npy"]);
    assert_eq!(fs::read(&old).unwrap(), b"precious");
}

#[test]
fn bad_reference_folders_are_refused() {
    let fixture = Fixture::new();
    let check = |dir: &Path, expected: &[&str]| {
        refused(&["check", "--reference", dir.to_str().unwrap(), "--device", "cpu"], 1, expected);
    };
    check(&fixture.path("absent"), &["absent", "cannot read"]);
    let empty = tempfile::tempdir().unwrap();
    check(empty.path(), &["model.safetensors", "cannot read"]);
    fs::rename(fixture.path("x.npy"), fixture.path("input.npy")).unwrap();
    check(fixture.folder.path(), &["nothing to compare"]);
    npy::write_f32(&fixture.path("logits.npy"), &[1, 3, 16, 16], &[0.0; 768]).unwrap();
    check(fixture.folder.path(), &["logits.npy", "1 x 3 x 16 x 20", "1 x 3 x 16 x 16"]);
    npy::write_f32(&fixture.path("input.npy"), &[1, 3, 8, 8], &[0.5; 192]).unwrap();
    check(fixture.folder.path(), &["input.npy", "from 16", "8x8"]);
}

#[test]
fn a_miss_prints_the_table_and_exits_with_1() {
    let fixture = Fixture::new();
    fs::rename(fixture.path("x.npy"), fixture.path("input.npy")).unwrap();
    npy::write_f32(&fixture.path("logits.npy"), &[1, 3, 16, 20], &[1e6; 960]).unwrap();
    let dir = fixture.folder.path().to_str().unwrap();
    let output = fpenet(&["check", "--reference", dir, "--device", "cpu"]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    assert!(stdout.contains("MISS") && stdout.contains("FAIL: 1 of 1"), "{stdout}");
    assert!(stdout.contains("skipped: labels.npy (absent)"), "{stdout}");
}

#[test]
fn half_precision_needs_a_gpu() {
    let fixture = Fixture::new();
    let m = fixture.path("model.safetensors");
    let (m, x) = (m.to_str().unwrap(), fixture.path("x.npy"));
    let (x, y) = (x.to_str().unwrap(), fixture.path("y.npy"));
    let run = ["run", "--model", m, "--input", x, "--output", y.to_str().unwrap()];
    let args = [&run[..], &["--device", "cpu", "--precision", "f16"]].concat();
    refused(&args, 2, &["--precision f16", "cpu"]);
    let args = [&run[..], &["--device", "cpu", "--expanded", "bytes"]].concat();
    refused(&args, 2, &["expanded=bytes", "--precision f16", "cpu"]);
    let args = [&run[..], &["--device", "cpu", "--expanded", "bits"]].concat();
    refused(&args, 2, &["--expanded", "stored, bytes"]);
}

/// `--expanded bytes` is of inference alone: taken and not heeded, it would make a run or a table look
/// like what it is not.
#[test]
fn training_refuses_expanded_tensors_in_bytes() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let (data, out_text) = (place.path().to_str().unwrap(), out.to_str().unwrap());
    for command in [&["train"][..], &["reproduce", "table2"], &["reproduce", "table8"]] {
        let options = ["--data", data, "--out", out_text, "--expanded", "bytes"];
        refused(&[command, &options].concat(), 2, &["--expanded bytes", "training"]);
        assert!(!out.exists());
    }
}

#[test]
fn the_summary_prints_the_keys_that_others_read() {
    let output = fpenet(&["summary", "--size", "768x384", "--q", "5", "--json"]);
    assert!(output.status.success());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["parameters"], 233_495);
    for key in ["macs", "flops_as_published", "flops_as_executed"] {
        assert!(json[key].as_u64().unwrap() > 1_000_000_000, "{key}");
    }
    assert!(json["layers"].as_array().unwrap().len() > 50);
}

/// `fpenet summary | head -1`: the reader closes the pipe while the table is being written.
#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_is_no_error() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Command, Stdio};

    let program = assert_cmd::cargo::cargo_bin!("fpenet");
    // Twice as many layers as a pipe's buffer holds.
    let args = ["summary", "--p", "64", "--q", "64", "--json"];
    let mut child = Command::new(program)
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "{\n");
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(child.wait().unwrap().success(), "{stderr}");
    assert_eq!(stderr, "");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_behind_stdout_is_reported() {
    use std::process::{Command, Stdio};

    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("fpenet"));
    let output = command.arg("summary").stdout(Stdio::from(full)).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error: stdout: cannot write: No space left"), "{stderr}");
}
