//! `fpenet reproduce` as a user runs it: counted and timed tables without data, trained ones that
//! keep what is finished, continue what is begun, and refuse what was made otherwise.

use std::fs;
use std::path::Path;
use std::process::Output;

use image::{GrayImage, Luma, Rgb, RgbImage};
use serde_json::Value;
use tempfile::TempDir;

fn fpenet(args: &[&str]) -> Output {
    assert_cmd::cargo::cargo_bin_cmd!("fpenet").args(args).output().unwrap()
}

#[track_caller]
fn succeeds(args: &[&str]) -> (String, String) {
    let output = fpenet(args);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert_eq!(output.status.code(), Some(0), "{args:?}: {err}");
    (out, err)
}

#[track_caller]
fn refused(args: &[&str], code: i32, words: &[&str]) {
    let output = fpenet(args);
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {err}");
    let last = err.trim_end().lines().last().unwrap_or_default();
    assert!(last.starts_with("error: "), "{args:?}: {err}");
    for word in words {
        assert!(last.contains(word), "{args:?}: expected {word:?} in {last}");
    }
}

/// CamVid's layout: vertical halves of two classes, in the colours that tell them.
fn camvid(splits: &[(&str, usize)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for &(split, count) in splits {
        let (images, labels) = (root.path().join(split), root.path().join(format!("{split}annot")));
        fs::create_dir(&images).unwrap();
        fs::create_dir(&labels).unwrap();
        for i in 0..count as u32 {
            let class = |x: u32| if x < 12 + 2 * i { 3 } else { 0 };
            let colour = |x: u32| if class(x) == 3 { Rgb([90, 60, 90]) } else { Rgb([220; 3]) };
            RgbImage::from_fn(40, 32, |x, _| colour(x))
                .save(images.join(format!("{i}.png")))
                .unwrap();
            GrayImage::from_fn(40, 32, |x, _| Luma([class(x)]))
                .save(labels.join(format!("{i}.png")))
                .unwrap();
        }
    }
    root
}

/// The shortest training that is one: an epoch of one update.
fn short<'a>(table: &'a str, data: &'a Path, out: &'a Path) -> Vec<&'a str> {
    let mut args = vec!["reproduce", table, "--data", data.to_str().unwrap()];
    args.extend(["--out", out.to_str().unwrap(), "--epochs", "1", "--batch", "2"]);
    args.extend(["--size", "32x32", "--device", "cpu", "--threads", "1", "--workers", "1"]);
    args
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn table_4_stands_beside_the_papers_parameters() {
    let out = tempfile::tempdir().unwrap();
    let (text, _) = succeeds(&["reproduce", "table4", "--out", out.path().to_str().unwrap()]);
    assert!(text.contains("| 3 | 9 | 378,391 | 378K | 5.23 | 5.64 | 4.98 |"), "{text}");
    let file = fs::read_to_string(out.path().join("table4.md")).unwrap();
    assert!(text.starts_with(&file), "what is printed is what is written");
}

#[test]
fn table_7_is_timed_at_the_papers_sizes() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().to_str().unwrap();
    let args = ["reproduce", "table7", "--out", folder, "--iterations", "1", "--device", "cpu"];
    let (text, _) = succeeds(&args);
    for row in
        ["| 768x384 | 3.17 | 3.2 |", "| 1024x512 | 5.64 | 5.7 |", "| 1536x768 | 12.68 | 12.8 |"]
    {
        assert!(text.contains(row), "{row} in {text}");
    }
    let measured = &json(&out.path().join("table7.json"))["data"];
    assert!(measured[2]["latency_ms"]["median"].as_f64().unwrap() > 0.0, "{measured}");
}

#[test]
fn a_finished_run_is_kept_shared_between_tables_and_never_mistaken_for_another() {
    let (data, out) = (camvid(&[("train", 2), ("val", 1)]), tempfile::tempdir().unwrap());
    let args = short("table5", data.path(), out.path());
    let (text, err) = succeeds(&args);
    assert_eq!(err.matches("(to train)").count(), 2, "{err}");
    assert!(!text.contains("not finished"), "{text}");
    let rows = json(&out.path().join("table5.json"))["table"]["rows"].clone();
    assert_eq!(rows.as_array().unwrap().len(), 2);
    assert!(rows[1][4].as_str().unwrap().parse::<f64>().is_ok(), "an mIoU: {rows}");
    assert_eq!(rows[1][5], "-", "the paper's figure is not on record");

    // Again: nothing is trained, and table 3 shares the full network.
    let checkpoint = out.path().join("runs/full/checkpoint.safetensors");
    let before = fs::metadata(&checkpoint).unwrap().modified().unwrap();
    let (again, err) = succeeds(&args);
    assert_eq!(err.matches("finished before, kept").count(), 2, "{err}");
    assert_eq!(again, text);
    let (_, err) = succeeds(&short("table3", data.path(), out.path()));
    assert_eq!((err.matches("kept").count(), err.matches("to train").count()), (1, 1), "{err}");
    assert_eq!(fs::metadata(&checkpoint).unwrap().modified().unwrap(), before);

    // Other settings are no reason to throw a run away, nor to pass it off as theirs.
    let mut other = args.clone();
    other.extend(["--lr", "0.01", "--attention", "sigmoid"]);
    let words = ["runs/no-long-skip", "lr 0.0005, now 0.01", "attention \"relu\", now", "--out"];
    refused(&other, 2, &words);
    assert_eq!(fs::metadata(&checkpoint).unwrap().modified().unwrap(), before);
}

#[test]
fn a_begun_run_is_continued() {
    let (data, out) = (camvid(&[("train", 2), ("val", 1)]), tempfile::tempdir().unwrap());
    let mut args = short("table3", data.path(), out.path());
    args.extend(["--epochs", "2"]);
    let epochs = args.iter().position(|arg| *arg == "--epochs").unwrap();
    args.drain(epochs..epochs + 2);
    // As `reproduce` would have begun it, cut off after one update.
    let run = out.path().join("runs/full");
    let mut train = vec!["train", "--data", data.path().to_str().unwrap()];
    train.extend([
        "--out",
        run.to_str().unwrap(),
        "--epochs",
        "2",
        "--batch",
        "2",
        "--size",
        "32x32",
    ]);
    train.extend(["--val-every", "2", "--stop-after-minutes", "0"]);
    train.extend(["--device", "cpu", "--threads", "1", "--workers", "1"]);
    succeeds(&train);
    let (text, err) = succeeds(&args);
    assert!(err.contains("full (continued after") && err.contains("resuming"), "{err}");
    assert!(!text.contains("not finished"), "{text}");
}

#[test]
fn table_8_trains_on_train_and_val_and_measures_on_test() {
    let data = camvid(&[("train", 2), ("val", 1), ("test", 2)]);
    let out = tempfile::tempdir().unwrap();
    let (text, _) = succeeds(&short("table8", data.path(), out.path()));
    assert!(text.contains("3 images of train+val") && text.contains("2 frames of test"), "{text}");
    assert!(text.contains("| **mIoU** | "), "{text}");

    // The test frames of the public CamVid copies are sometimes missing: told before training.
    let part = camvid(&[("train", 2), ("val", 1)]);
    let out = tempfile::tempdir().unwrap();
    let words = ["test", "no such folder", "--splits train --test-split val"];
    refused(&short("table8", part.path(), out.path()), 1, &words);
    assert!(!out.path().join("runs").exists());
    let mut val = short("table8", part.path(), out.path());
    val.extend(["--test-split", "val"]);
    refused(&val, 2, &["--test-split val", "not trained on"]);
    val.extend(["--splits", "train"]);
    let (text, _) = succeeds(&val);
    assert!(text.contains("1 frames of val"), "{text}");
}

#[test]
fn wrong_requests_say_what_is_missing() {
    refused(&["reproduce"], 2, &["TABLE"]);
    refused(&["reproduce", "table1"], 2, &["table1", "table2"]);
    refused(&["reproduce", "table2"], 2, &["table2", "--data"]);
    refused(&["reproduce", "table2", "--data", "/nonexistent"], 1, &["/nonexistent"]);
}

#[test]
fn options_that_no_chosen_table_reads_are_refused() {
    let out = tempfile::tempdir().unwrap();
    let command = ["reproduce", "--out", out.path().to_str().unwrap()];
    let with = |line: &'static str| [&command[..], &Vec::from_iter(line.split(' '))].concat();
    for (line, words) in [
        ("table4 --data camvid", ["--data: expected with table2", "found table4, which"]),
        ("table4 table7 --lr 0.01", ["--lr: expected with table2", "found table4, table7, which"]),
        ("table7 --size 64x48", ["--size: expected with table2", "found table7, which"]),
        ("table7 --seed 1", ["--seed: expected with table2", "found table7, which"]),
        ("table2 --iterations 3", ["--iterations: expected with table7 only", "found table2"]),
        ("table5 --test-split val", ["--test-split: expected with table8 only", "found table5"]),
    ] {
        refused(&with(line), 2, &words);
    }
    // One table that reads it is enough, and what counts the network heeds its switches.
    refused(&with("table4 table2 --data /nonexistent"), 1, &["/nonexistent"]);
    succeeds(&with("table4 --attention sigmoid --block-activation relu --device cpu"));
}
