//! What the command line says of GPUs, whatever this machine has.

use assert_cmd::Command;

const FOLDER: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/sigmoid_attention_one_branch");

fn fpenet(args: &[&str]) -> (i32, String, String) {
    fpenet_with("", args)
}

/// With these kernels in `FPENET_VARIANTS`.
fn fpenet_with(variants: &str, args: &[&str]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("fpenet").unwrap();
    let output = command.env("FPENET_VARIANTS", variants).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// The line of `fpenet devices` about CUDA.
fn cuda() -> String {
    let (code, stdout, _) = fpenet(&["devices"]);
    assert_eq!(code, 0);
    stdout.lines().find(|line| line.starts_with("cuda")).unwrap().to_string()
}

#[test]
fn a_missing_gpu_is_one_clear_line_and_auto_does_without() {
    let line = cuda();
    let (code, _, stderr) = fpenet(&["check", "--reference", FOLDER, "--device", "cuda"]);
    if line.contains("not available") {
        // What is missing, and after the semicolon how to get it.
        assert!(line.contains("; "), "{line}");
        assert_eq!(code, 1);
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.starts_with("error: device cuda: "), "{stderr}");
    } else {
        assert_eq!(code, 0, "{stderr}");
    }
    let (code, stdout, stderr) = fpenet(&["check", "--reference", FOLDER, "--device", "auto"]);
    assert_eq!(code, 0, "{stdout}{stderr}");
}

#[test]
fn the_self_test_is_for_gpus() {
    let (code, _, stderr) = fpenet(&["selftest", "--device", "cpu"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("expected cuda or emulated"), "{stderr}");
}

fn passes_the_self_test(precision: &str, variants: &str) {
    let args = ["selftest", "--device", "emulated", "--seed", "1", "--precision", precision];
    let (code, stdout, stderr) = fpenet_with(variants, &args);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.contains("PASS: "), "{stdout}");
}

#[test]
fn the_emulated_device_passes_the_self_test_in_f32() {
    passes_the_self_test("f32", "");
}

#[test]
fn the_emulated_device_passes_the_self_test_in_f16() {
    passes_the_self_test("f16", "");
}

/// Launches that do more than one step are compared where they leave something.
#[test]
fn the_emulated_device_passes_the_self_test_with_a_persistent_stage() {
    passes_the_self_test("f16", "stage3=persistent");
}
