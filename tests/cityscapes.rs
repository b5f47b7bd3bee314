//! Cityscapes from folder to figures on generated data: label ids, half-resolution network,
//! full-resolution predictions in the test server's form, and `fpenet eval` against a count of
//! its own over the written PNGs. `tools/check_cityscapes.py` compares with cityscapesScripts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use fpenet::config::{Decoder, ModelConfig};
use fpenet::data::cityscapes::TRAIN_IDS;
use fpenet::model::Model;
use image::{GrayImage, Luma, Rgb, RgbImage};
use serde_json::Value;
use tempfile::TempDir;

/// The evaluated label ids in train-id order, from cityscapesScripts' labels.py.
const LABEL_IDS: [u8; 19] =
    [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33];
const SIZE: (u32, u32) = (96, 64);

fn fpenet(args: &[&str]) -> Output {
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("fpenet");
    command.args(args).args(["--device", "cpu", "--threads", "1"]);
    command.output().unwrap()
}

#[track_caller]
fn succeeds(args: &[&str]) -> String {
    let output = fpenet(args);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {err}");
    String::from_utf8(output.stdout).unwrap()
}

/// Frames of two cities; every label id from 0 to 33 occurs.
struct Fixture {
    root: TempDir,
    frames: Vec<String>,
    model: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let frames: Vec<String> =
            ["aachen_000000_000019", "aachen_000001_000019", "ulm_000000_000019"]
                .map(String::from)
                .into();
        for (i, frame) in frames.iter().enumerate() {
            let city = frame.split('_').next().unwrap();
            for part in ["leftImg8bit", "gtFine"] {
                fs::create_dir_all(root.path().join(part).join("val").join(city)).unwrap();
            }
            let i = i as u32;
            let image = RgbImage::from_fn(SIZE.0, SIZE.1, |x, y| {
                let v = |k: u32| ((x * (3 + k) + y * (5 + i) + 60 * (x / 24) + 40 * i) % 256) as u8;
                Rgb([v(0), v(1), v(2)])
            });
            let labels = GrayImage::from_fn(SIZE.0, SIZE.1, |x, y| {
                Luma([((x / 8 + 5 * (y / 8) + 3 * i) % 34) as u8])
            });
            let path = |part: &str, suffix: &str| {
                root.path().join(part).join("val").join(city).join(format!("{frame}{suffix}"))
            };
            image.save(path("leftImg8bit", "_leftImg8bit.png")).unwrap();
            labels.save(path("gtFine", "_gtFine_labelIds.png")).unwrap();
        }
        let config = ModelConfig { p: 1, q: 1, decoder: Decoder::Bilinear, ..Default::default() };
        let model = root.path().join("model.safetensors");
        Model::init(config, 5).unwrap().save(&model).unwrap();
        Fixture { root, frames, model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn labels(&self, frame: &str) -> PathBuf {
        let city = frame.split('_').next().unwrap();
        self.path("gtFine/val").join(city).join(format!("{frame}_gtFine_labelIds.png"))
    }

    fn export(&self, out: &Path) -> Vec<String> {
        ["export-predictions", "--data", self.root.path().to_str().unwrap(), "--split", "val"]
            .into_iter()
            .chain(["--out", out.to_str().unwrap(), "--model", self.model.to_str().unwrap()])
            .map(String::from)
            .collect()
    }

    fn eval(&self) -> Value {
        let json = self.path("figures.json");
        let data = self.root.path().to_str().unwrap();
        succeeds(&[
            "eval",
            "--data",
            data,
            "--split",
            "val",
            "--json",
            json.to_str().unwrap(),
            "--model",
            self.model.to_str().unwrap(),
        ]);
        serde_json::from_slice(&fs::read(json).unwrap()).unwrap()
    }
}

fn strings(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn prediction(out: &Path, frame: &str) -> GrayImage {
    let path = out.join(format!("{frame}_pred_labelIds.png"));
    let image = image::open(&path).unwrap();
    assert_eq!(image.color(), image::ColorType::L8, "8-bit grey, as the server asks");
    image.into_luma8()
}

#[test]
fn the_figures_of_eval_follow_from_the_exported_pngs_alone() {
    let fixture = Fixture::new();
    let out = fixture.path("predictions");
    succeeds(&strings(&fixture.export(&out)));

    // cityscapesScripts' rule over label ids: pixels whose true label is not evaluated count
    // nowhere; IoU = hits / (hits + misses + false alarms); the mean leaves absent classes out.
    let mut counts = [[0u64; 256]; 256];
    for frame in &fixture.frames {
        let prediction = prediction(&out, frame);
        assert_eq!(prediction.dimensions(), SIZE, "full resolution");
        let truth = image::open(fixture.labels(frame)).unwrap().into_luma8();
        for (t, p) in truth.as_raw().iter().zip(prediction.as_raw()) {
            assert!(LABEL_IDS.contains(p), "label id {p} is not an evaluated one");
            if LABEL_IDS.contains(t) {
                counts[usize::from(*t)][usize::from(*p)] += 1;
            }
        }
    }
    let figures = fixture.eval();
    let mut present = Vec::new();
    for (train_id, &id) in LABEL_IDS.iter().enumerate() {
        assert_eq!(usize::from(TRAIN_IDS[usize::from(id)]), train_id);
        let id = usize::from(id);
        let hits = counts[id][id];
        let of_truth: u64 = counts[id].iter().sum();
        let predicted: u64 = counts.iter().map(|row| row[id]).sum();
        let class = figures["classes"][train_id].as_str().unwrap();
        let found = &figures["per_class_iou"][class];
        if of_truth + predicted == 0 {
            assert!(found.is_null(), "{class}");
            continue;
        }
        let iou = hits as f64 / (of_truth + predicted - hits) as f64;
        // The same integers divided in the same way.
        assert!((found.as_f64().unwrap() - iou).abs() < 1e-12, "{class}: {found} and {iou}");
        present.push(iou);
    }
    assert!(present.len() >= 15, "the data hold nearly every class");
    let mean = present.iter().sum::<f64>() / present.len() as f64;
    assert!((figures["miou"].as_f64().unwrap() - mean).abs() < 1e-12);
    assert!(mean > 0.0, "a mean of zero would agree with anything that is wrong");
    assert_eq!(figures["network_size"], serde_json::json!([SIZE.0 / 2, SIZE.1 / 2]));
}

#[test]
fn ready_train_ids_give_the_same_figures() {
    let fixture = Fixture::new();
    let from_ids = fixture.eval();
    for frame in &fixture.frames {
        let path = fixture.labels(frame);
        let mut labels = image::open(&path).unwrap().into_luma8();
        labels.pixels_mut().for_each(|p| p.0[0] = TRAIN_IDS[usize::from(p.0[0])]);
        let name = path.to_str().unwrap().replace("_labelIds", "_labelTrainIds");
        labels.save(name).unwrap();
        fs::remove_file(path).unwrap();
    }
    let from_train_ids = fixture.eval();
    for key in ["miou", "global_accuracy", "confusion"] {
        assert_eq!(from_ids[key], from_train_ids[key], "{key}");
    }
}

#[test]
fn an_export_is_continued_and_never_mixed_with_another_models() {
    let fixture = Fixture::new();
    let out = fixture.path("predictions");
    let args = fixture.export(&out);
    let text = succeeds(&strings(&args));
    assert!(text.contains("3 written, 0 kept"), "{text}");
    let first = prediction(&out, &fixture.frames[1]);

    let lost = out.join(format!("{}_pred_labelIds.png", fixture.frames[1]));
    fs::remove_file(&lost).unwrap();
    let text = succeeds(&strings(&args));
    assert!(text.contains("1 written, 2 kept"), "{text}");
    assert_eq!(prediction(&out, &fixture.frames[1]), first);
    // PNGs and the note of their origin, no half-written file.
    assert_eq!(fs::read_dir(&out).unwrap().count(), 4);

    let config = ModelConfig { p: 1, q: 1, decoder: Decoder::Bilinear, ..Default::default() };
    Model::init(config, 6).unwrap().save(&fixture.model).unwrap();
    let output = fpenet(&strings(&args));
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("another model") && err.lines().count() == 1, "{err}");
}

#[test]
fn a_test_split_without_labels_can_be_exported() {
    let fixture = Fixture::new();
    fs::remove_dir_all(fixture.path("gtFine")).unwrap();
    fs::rename(fixture.path("leftImg8bit/val"), fixture.path("leftImg8bit/test")).unwrap();
    let out = fixture.path("predictions");
    let args: Vec<String> = fixture
        .export(&out)
        .into_iter()
        .map(|arg| if arg == "val" { "test".to_string() } else { arg })
        .collect();
    let text = succeeds(&strings(&args));
    assert!(text.contains("Cityscapes test: 3 written"), "{text}");
}

#[test]
fn a_model_of_other_classes_is_refused_before_anything_is_written() {
    let fixture = Fixture::new();
    let config =
        ModelConfig { classes: 11, p: 1, q: 1, decoder: Decoder::Bilinear, ..Default::default() };
    Model::init(config, 6).unwrap().save(&fixture.model).unwrap();
    let out = fixture.path("predictions");
    let output = fpenet(&strings(&fixture.export(&out)));
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("19 classes") && err.contains("11"), "{err}");
    assert!(!out.exists());
}
