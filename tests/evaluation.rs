//! Evaluation of a model over a split, against the same computation by hand, and `fpenet eval`.

use std::path::Path;

use fpenet::backend::Backend;
use fpenet::config::{Decoder, ModelConfig};
use fpenet::data::{Dataset, DatasetKind, VOID};
use fpenet::device::{self, DeviceChoice, Precision};
use fpenet::evaluate::evaluate;
use fpenet::exec::Inference;
use fpenet::graph::Mode;
use fpenet::metrics::Confusion;
use fpenet::model::Model;
use image::{GrayImage, Luma, Rgb, RgbImage};
use tempfile::TempDir;

fn model(classes: usize) -> Model {
    let config =
        ModelConfig { classes, p: 1, q: 1, decoder: Decoder::Bilinear, ..ModelConfig::default() };
    Model::init(config, 3).unwrap()
}

fn cpu() -> fpenet::Result<Box<dyn Backend>> {
    device::open(DeviceChoice::Cpu, Precision::F32, Some(1))
}

fn image(seed: u32, w: u32, h: u32) -> RgbImage {
    RgbImage::from_fn(w, h, |x, y| {
        let v = |k: u32| ((x * (3 + k) + y * (5 + seed) + 40 * seed) % 256) as u8;
        Rgb([v(0), v(1), v(2)])
    })
}

/// A CamVid split with one sample per size.
fn camvid(sizes: &[(u32, u32)], label: impl Fn(u32, u32) -> u8) -> (TempDir, Dataset) {
    let root = tempfile::tempdir().unwrap();
    for dir in ["val", "valannot"] {
        std::fs::create_dir(root.path().join(dir)).unwrap();
    }
    for (i, &(w, h)) in sizes.iter().enumerate() {
        image(i as u32, w, h).save(root.path().join(format!("val/{i}.png"))).unwrap();
        GrayImage::from_fn(w, h, |x, y| Luma([label(x, y)]))
            .save(root.path().join(format!("valannot/{i}.png")))
            .unwrap();
    }
    let data = Dataset::open(DatasetKind::Camvid, root.path(), &["val".to_string()]).unwrap();
    (root, data)
}

fn stripes(x: u32, y: u32) -> u8 {
    ((x / 4 + y / 3) % 12) as u8
}

/// Network input by the definition, ((v / 255) - mean) / std, NCHW.
fn normalised(model: &Model, image: &RgbImage) -> Vec<f32> {
    let value = |c: usize, v: u8| (f32::from(v) / 255.0 - model.mean[c]) / model.std[c];
    (0..3).flat_map(|c| image.pixels().map(move |p| value(c, p[c]))).collect()
}

#[test]
fn figures_are_those_of_running_each_image_by_hand() {
    let model = model(11);
    // Two sizes, so that the network has to be planned again in between.
    let sizes = [(48, 32), (48, 32), (40, 36)];
    let (_root, data) = camvid(&sizes, stripes);
    let mut seen = Vec::new();
    let got = evaluate(&model, &data, None, &mut cpu, &mut |done, _| seen.push(done)).unwrap();
    assert_eq!((got.images, seen), (3, vec![1, 2, 3]));

    let mut expected = Confusion::new(11);
    for (i, &(w, h)) in sizes.iter().enumerate() {
        let (width, height) = (w as usize, h as usize);
        let mut inference =
            Inference::new(&model, cpu().unwrap(), 1, height, width, Mode::Logits).unwrap();
        inference.run(&normalised(&model, &image(i as u32, w, h))).unwrap();
        let logits = inference.logits().unwrap();
        let plane = width * height;
        let best = |p: usize| {
            (0..11)
                .fold(0, |b, c| if logits[c * plane + p] > logits[b * plane + p] { c } else { b })
        };
        let prediction: Vec<u8> = (0..plane).map(|p| best(p) as u8).collect();
        let truth: Vec<u8> = (0..plane)
            .map(|p| stripes((p % width) as u32, (p / width) as u32))
            .map(|v| if v == 11 { VOID } else { v })
            .collect();
        expected.add(&prediction, &truth).unwrap();
    }
    assert_eq!(got.confusion.total(), expected.total());
    // Labels are taken on the device without ever forming the logits: rounding may turn a tie.
    assert!((got.confusion.miou() - expected.miou()).abs() < 1e-3);
    assert!((got.confusion.global_accuracy() - expected.global_accuracy()).abs() < 1e-3);
}

#[test]
fn another_network_size_still_counts_every_labelled_pixel() {
    let (_root, data) = camvid(&[(60, 44)], stripes);
    let labelled = (0..60 * 44).filter(|i| stripes(i % 60, i / 60) != 11).count() as u64;
    for size in [(32, 24), (60, 44), (96, 80)] {
        let got = evaluate(&model(11), &data, Some(size), &mut cpu, &mut |_, _| ()).unwrap();
        assert_eq!((got.confusion.total(), got.size), (labelled, size));
    }
}

#[test]
fn a_model_of_another_number_of_classes_is_wrong_usage() {
    let (root, data) = camvid(&[(48, 32)], stripes);
    let error = evaluate(&model(19), &data, None, &mut cpu, &mut |_, _| ()).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let message = error.to_string();
    for word in ["11", "19", "CamVid", root.path().to_str().unwrap()] {
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn a_bad_sample_or_a_split_of_void_is_an_error_that_names_it() {
    let (root, data) = camvid(&[(48, 32), (48, 32), (48, 32)], stripes);
    std::fs::write(root.path().join("val/1.png"), b"cut").unwrap();
    let error = evaluate(&model(11), &data, None, &mut cpu, &mut |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("val/1.png"), "{error}");

    let (root, data) = camvid(&[(48, 32)], |_, _| 11);
    let mut unused = || -> fpenet::Result<_> { panic!("it can be known without inference") };
    let error = evaluate(&model(11), &data, None, &mut unused, &mut |_, _| ()).unwrap_err();
    assert!(error.to_string().contains(root.path().to_str().unwrap()), "{error}");
    assert!(error.to_string().contains("only void"), "{error}");
}

/// `fpenet eval` on one CPU thread; gives exit code, stdout and stderr.
fn eval(data: &Path, model: &Path, more: &[&str]) -> (i32, String, String) {
    let output = assert_cmd::cargo::cargo_bin_cmd!("fpenet")
        .args(["eval", "--device", "cpu", "--threads", "1", "--data"])
        .arg(data)
        .arg("--model")
        .arg(model)
        .args(more)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_command_prints_a_table_and_writes_the_figures() {
    let (root, data) = camvid(&[(48, 32), (40, 36)], stripes);
    let (file, json) = (root.path().join("m.safetensors"), root.path().join("figures.json"));
    model(11).save(&file).unwrap();
    let (code, out, err) = eval(root.path(), &file, &["--json", json.to_str().unwrap()]);
    assert_eq!((code, err.as_str()), (0, ""));

    let expected = evaluate(&model(11), &data, None, &mut cpu, &mut |_, _| ()).unwrap().confusion;
    let figures: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(figures["miou"].as_f64().unwrap(), expected.miou());
    assert_eq!(figures["global_accuracy"].as_f64().unwrap(), expected.global_accuracy());
    assert_eq!(figures["images"], 2);
    for (class, iou) in data.classes.iter().zip(expected.per_class_iou()) {
        assert_eq!(figures["per_class_iou"][class].as_f64().unwrap(), iou, "{class}");
        assert!(out.contains(class.as_str()), "no {class} in {out}");
    }
    assert!(out.contains(&format!("{:.2}", 100.0 * expected.miou())), "{out}");
}

#[test]
fn a_report_shows_the_worst_frames_and_lists_every_frame() {
    let (root, data) = camvid(&[(48, 32), (40, 36), (48, 32)], stripes);
    let (file, folder) = (root.path().join("m.safetensors"), root.path().join("report"));
    model(11).save(&file).unwrap();
    let report = folder.to_str().unwrap();
    let (code, out, err) = eval(root.path(), &file, &["--worst", "2", "--report", report]);
    assert_eq!((code, err.as_str()), (0, ""));
    for name in ["worst.png", "confusion.png", "frames.csv"] {
        assert!(out.contains(name) && folder.join(name).is_file(), "{name}: {out}");
    }
    let csv = std::fs::read_to_string(folder.join("frames.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + data.len());
    let scores: Vec<f64> =
        csv.lines().skip(1).map(|line| line.split(',').nth(1).unwrap().parse().unwrap()).collect();
    assert!(scores.is_sorted(), "the worst first: {scores:?}");
    // Two frames side by side: six pictures and their gaps.
    let sheet = image::open(folder.join("worst.png")).unwrap();
    assert!(sheet.width() > 6 * 320, "{}", sheet.width());
}

#[test]
fn a_class_that_occurs_nowhere_is_null_in_the_figures() {
    let (root, _data) = camvid(&[(48, 32)], |_, _| 3);
    let (file, json) = (root.path().join("m.safetensors"), root.path().join("figures.json"));
    let mut model = model(11);
    // A classifier that gives class 3 everywhere, whatever it sees.
    let bias = model.params.specs.iter().position(|s| s.name == "classifier.bias").unwrap();
    let bias = model.params.specs[bias].offset;
    model.params.values[bias + 3] = 1e6;
    model.save(&file).unwrap();
    let (code, out, _) = eval(root.path(), &file, &["--json", json.to_str().unwrap()]);
    assert_eq!(code, 0);
    let figures: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(figures["miou"], 1.0);
    assert_eq!(figures["per_class_iou"]["Road"], 1.0);
    assert!(figures["per_class_iou"]["Sky"].is_null() && out.contains("absent"));
}

#[test]
fn a_size_beyond_the_memory_is_refused_before_it_is_filled() {
    if fpenet::memory::available_bytes().is_none_or(|free| free > 60 << 30) {
        return; // 63 GiB are asked for below, where they would not fit.
    }
    let (root, _data) = camvid(&[(48, 32)], stripes);
    let file = root.path().join("m.safetensors");
    model(11).save(&file).unwrap();
    let begun = std::time::Instant::now();
    let (code, _, err) = eval(root.path(), &file, &["--size", "32768x32768"]);
    assert_eq!((code, err.lines().count()), (1, 1), "{err}");
    assert!(err.contains("32768x32768") && err.contains("out of memory"), "{err}");
    assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
}

#[test]
fn bad_requests_are_one_line_and_leave_no_figures() {
    let (root, _data) = camvid(&[(48, 32)], stripes);
    let (file, json) = (root.path().join("m.safetensors"), root.path().join("figures.json"));
    let json = json.to_str().unwrap();
    model(11).save(&file).unwrap();
    let nowhere = root.path().join("nowhere");
    let unwritable = nowhere.join("figures.json");
    let unwritable = unwritable.to_str().unwrap();
    for (code, data, more, words) in [
        (1, nowhere.as_path(), vec!["--json", json], "no such folder"),
        (1, root.path(), vec!["--json", json, "--split", "test"], "no such folder"),
        (1, root.path(), vec!["--json", json, "--dataset", "cityscapes"], "leftImg8bit"),
        (1, root.path(), vec!["--json", unwritable], unwritable),
        (2, root.path(), vec!["--json", json, "--size", "0x16"], "--size"),
        (2, root.path(), vec!["--json", json, "--split", "val,val"], "twice"),
    ] {
        let (got, _, err) = eval(data, &file, &more);
        assert_eq!(got, code, "{more:?}: {err}");
        assert!(err.contains(words) && err.lines().count() == 1, "{more:?}: {err}");
        assert!(!Path::new(json).exists(), "{more:?}");
    }
}
