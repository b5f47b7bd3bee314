//! The CPU backend against what PyTorch computed in double precision (tests/data/README.md).

use std::fs;
use std::path::{Path, PathBuf};

use fpenet::backend::{DeviceChoice, Precision, open};
use fpenet::reference::{Part, Report, check};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn check_cpu(dir: &Path) -> fpenet::Result<Report> {
    check(dir, Precision::F32, &|| open(DeviceChoice::Cpu, Precision::F32, None))
}

/// A copy of a reference folder that a test may spoil.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(data().join(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

fn count(report: &Report, part: Part) -> usize {
    report.rows.iter().filter(|row| row.part == part).count()
}

#[test]
fn every_folder_passes_on_the_cpu() {
    let entries = fs::read_dir(data()).unwrap().map(|e| e.unwrap().path());
    let folders: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    assert!(folders.len() >= 5, "{folders:?}");
    let mut covered = [0; 5];
    for folder in folders {
        let report = check_cpu(&folder).unwrap();
        for row in report.rows.iter().filter(|row| !row.passed()) {
            eprintln!("{}: {row:?}", folder.display());
        }
        assert!(report.passed(), "{}: {} misses", folder.display(), report.misses());
        let parts = [Part::Logits, Part::Intermediate, Part::Loss, Part::Gradient, Part::AfterStep];
        for (covered, part) in covered.iter_mut().zip(parts) {
            *covered += count(&report, part);
        }
    }
    assert!(covered.iter().all(|&n| n > 0), "every part is compared somewhere: {covered:?}");
}

#[test]
fn absent_files_are_listed_and_a_bare_folder_is_an_error() {
    let folder = copy("batch2_no_long_skip");
    fs::remove_file(folder.path().join("labels.npy")).unwrap();
    let report = check_cpu(folder.path()).unwrap();
    assert_eq!(report.rows.len(), 1);
    let expected = ["labels.npy (absent)", "grads.safetensors (needs labels.npy)"];
    for text in expected {
        assert!(report.skipped.iter().any(|s| s == text), "{:?}", report.skipped);
    }
    fs::remove_file(folder.path().join("logits.npy")).unwrap();
    let message = check_cpu(folder.path()).unwrap_err().to_string();
    assert!(message.contains("nothing to compare"), "{message}");
}

#[test]
fn one_wrong_value_is_a_miss() {
    let folder = copy("batch2_no_long_skip");
    // The last four bytes are the last element: of the logits, and of some gradient tensor.
    for name in ["logits.npy", "grads.safetensors", "after_step.safetensors", "loss.npy"] {
        let path = folder.path().join(name);
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.len() - 4;
        let value = f32::from_le_bytes(bytes[at..].try_into().unwrap());
        bytes[at..].copy_from_slice(&(value + 0.5).to_le_bytes());
        fs::write(&path, bytes).unwrap();
    }
    let report = check_cpu(folder.path()).unwrap();
    let missed: Vec<_> =
        report.rows.iter().filter(|row| !row.passed()).map(|row| row.part).collect();
    assert_eq!(missed, [Part::Logits, Part::Loss, Part::Gradient, Part::AfterStep]);
}

#[test]
fn nan_in_a_reference_never_passes() {
    let folder = copy("batch2_no_long_skip");
    let path = folder.path().join("logits.npy");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    assert!(!check_cpu(folder.path()).unwrap().passed());
}

#[test]
fn labels_outside_the_classes_are_refused() {
    let folder = copy("batch2_no_long_skip");
    let path = folder.path().join("labels.npy");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() = 200;
    fs::write(&path, bytes).unwrap();
    let message = check_cpu(folder.path()).unwrap_err().to_string();
    assert!(message.contains("labels.npy") && message.contains("found 200"), "{message}");
}
