//! `fpenet segment` as a user runs it: what it writes, what it says, how it fails.

mod common;

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use common::Run;
use fpenet::{Model, ModelConfig};
use image::{GrayImage, Rgb, RgbImage};

const CLASSES: usize = 11;

/// A folder with a small model; weights are initial, since only the plumbing is under test.
struct Workplace {
    dir: tempfile::TempDir,
}

impl Workplace {
    fn new() -> Self {
        let place = Workplace { dir: tempfile::tempdir().unwrap() };
        let config = ModelConfig { classes: CLASSES, p: 1, q: 1, ..ModelConfig::default() };
        Model::init(config, 3).unwrap().save(&place.at("model.safetensors")).unwrap();
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A photo of coloured stripes.
    fn photo(&self, name: &str, width: u32, height: u32) -> PathBuf {
        let path = self.at(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let stripes = |x, y| Rgb([(x * 7 % 256) as u8, (y * 11 % 256) as u8, (x / 8 * 40) as u8]);
        RgbImage::from_fn(width, height, stripes).save(&path).unwrap();
        path
    }

    /// `fpenet segment` on the CPU with this place's model and its folder `out`.
    fn segment(&self, args: &[&dyn AsRef<std::ffi::OsStr>]) -> Run {
        let mut command = Command::cargo_bin("fpenet").unwrap();
        command.current_dir(self.dir.path()).arg("segment");
        command.args(["--device", "cpu", "--model", "model.safetensors", "--out", "out"]);
        for arg in args {
            command.arg(arg);
        }
        Run::of(command.output().unwrap())
    }

    fn outputs(&self) -> Vec<String> {
        files_in(&self.at("out"))
    }
}

fn files_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn grey(path: &Path) -> GrayImage {
    match image::open(path).unwrap() {
        image::DynamicImage::ImageLuma8(labels) => labels,
        other => panic!("{}: expected 8-bit grey, found {:?}", path.display(), other.color()),
    }
}

#[test]
fn a_photo_gives_labels_mask_and_overlay_of_its_own_size() {
    let place = Workplace::new();
    let photo = place.photo("street.png", 97, 61);
    let run = place.segment(&[&photo]);
    run.succeeds();
    let expected = ["street.labels.png", "street.mask.png", "street.overlay.png"];
    assert_eq!(place.outputs(), expected);

    let labels = grey(&place.at("out/street.labels.png"));
    assert_eq!(labels.dimensions(), (97, 61));
    assert!(labels.as_raw().iter().all(|&l| usize::from(l) < CLASSES));

    let palette = Model::load(&place.at("model.safetensors")).unwrap().palette;
    let mask = image::open(place.at("out/street.mask.png")).unwrap().into_rgb8();
    for (pixel, &label) in mask.pixels().zip(labels.as_raw()) {
        assert_eq!(pixel.0, palette[usize::from(label)]);
    }
    for word in ["cpu: ", "97x61", "inference", " %"] {
        assert!(run.stdout.contains(word), "{word}: {}", run.stdout);
    }
}

#[test]
fn shares_in_the_report_are_those_of_the_labels_and_sum_to_100() {
    let place = Workplace::new();
    let photo = place.photo("p.png", 64, 48);
    let run = place.segment(&[&photo]);
    run.succeeds();
    let classes = Model::load(&place.at("model.safetensors")).unwrap().classes;
    let labels = grey(&place.at("out/p.labels.png"));
    let mut sum = 0.0;
    for (index, class) in classes.iter().enumerate() {
        let pixels = labels.as_raw().iter().filter(|&&l| usize::from(l) == index).count();
        let percent = 100.0 * pixels as f64 / (64.0 * 48.0);
        let line = run.stdout.lines().find(|l| l.trim_start().starts_with(class.as_str()));
        match line {
            None => assert_eq!(pixels, 0, "{class} is missing from {}", run.stdout),
            Some(line) => {
                let shown = line.split_whitespace().rev().nth(1).unwrap().trim_start_matches('<');
                let shown: f64 = shown.parse().unwrap();
                // One decimal is printed, and what would round to nothing reads <0.1.
                assert!((shown - percent).abs() <= 0.1, "{line}: {percent}");
                sum += percent;
            }
        }
    }
    assert!((sum - 100.0).abs() < 1e-9, "{sum}");
}

#[test]
fn a_large_photo_overlay_keeps_its_size_and_shows_the_legend() {
    let place = Workplace::new();
    let photo = place.photo("wide.png", 480, 360);
    place.segment(&[&photo, &"--size", &"96x72"]).succeeds();
    let labels = grey(&place.at("out/wide.labels.png"));
    assert_eq!(labels.dimensions(), (480, 360), "labels come back to the photo's size");
    let overlay = image::open(place.at("out/wide.overlay.png")).unwrap().into_rgb8();
    assert_eq!(overlay.dimensions(), (480, 360));

    // The legend holds a swatch in the pure colour of every class that is present.
    let palette = Model::load(&place.at("model.safetensors")).unwrap().palette;
    let present: std::collections::BTreeSet<u8> = labels.as_raw().iter().copied().collect();
    for &class in &present {
        let colour = palette[usize::from(class)];
        let pure = overlay.pixels().filter(|p| p.0 == colour).count();
        assert!(pure >= 64, "class {class}: {pure} pixels in its colour");
    }
}

#[test]
fn any_size_works_down_to_one_pixel() {
    let place = Workplace::new();
    for (width, height) in [(1, 1), (3, 40), (17, 16), (200, 5)] {
        let photo = place.photo("small.png", width, height);
        let run = place.segment(&[&photo]);
        run.succeeds();
        assert_eq!(grey(&place.at("out/small.labels.png")).dimensions(), (width, height));
    }
}

#[test]
fn labels_are_the_same_for_a_photo_alone_and_among_others() {
    let place = Workplace::new();
    let a = place.photo("in/a.png", 64, 40);
    place.photo("in/b.png", 40, 64);
    place.photo("in/c.png", 33, 47);
    place.photo("in/d.png", 64, 40);
    let run = place.segment(&[&place.at("in")]);
    run.succeeds();
    assert_eq!(place.outputs().len(), 12);
    let position = |name: &str| run.stdout.find(name).unwrap();
    assert!(position("a.png") < position("b.png") && position("c.png") < position("d.png"));
    let together = std::fs::read(place.at("out/a.labels.png")).unwrap();
    place.segment(&[&a]).succeeds();
    assert_eq!(std::fs::read(place.at("out/a.labels.png")).unwrap(), together);
}

#[test]
fn in_a_folder_one_bad_file_is_reported_and_the_rest_are_processed() {
    let place = Workplace::new();
    place.photo("in/a.png", 32, 32);
    let whole = std::fs::read(place.photo("in/c.jpg", 64, 64)).unwrap();
    std::fs::write(place.at("in/b.jpg"), &whole[..whole.len() / 2]).unwrap();
    std::fs::write(place.at("in/notes.txt"), "not by this name").unwrap();
    let run = place.segment(&[&place.at("in")]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    let lines: Vec<_> = run.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{}", run.stderr);
    assert!(lines[0].contains("b.jpg: expected a complete image"), "{}", run.stderr);
    assert!(lines[1].contains("1 of 3"), "{}", run.stderr);
    let outputs = place.outputs();
    assert_eq!(outputs.len(), 6, "{outputs:?}");
    assert!(outputs.iter().all(|name| name.starts_with("a.") || name.starts_with("c.")));
}

#[test]
fn a_single_bad_input_is_one_line_and_leaves_nothing() {
    let place = Workplace::new();
    place.segment(&[&"gone.png"]).fails(1, &["gone.png", "cannot read"]);
    std::fs::write(place.at("text.png"), "not an image").unwrap();
    place.segment(&[&"text.png"]).fails(1, &["text.png", "expected a complete image"]);
    std::fs::write(place.at("empty.png"), "").unwrap();
    place.segment(&[&"empty.png"]).fails(1, &["empty.png", "empty"]);
    std::fs::create_dir(place.at("none")).unwrap();
    place.segment(&[&"none"]).fails(1, &["none", "a folder with images"]);
    let run = place.segment(&[&"text.png", &"gone.png"]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(!place.at("out").exists(), "{:?}", place.outputs());

    // Nor a folder above it.
    let mut command = Command::cargo_bin("fpenet").unwrap();
    command.current_dir(place.dir.path()).arg("segment").args(["--device", "cpu", "gone.png"]);
    let run = Run::of(command.args(["--out", "deep/out"]).output().unwrap());
    run.fails(1, &["gone.png"]);
    assert!(!place.at("deep").exists());
}

#[test]
fn photos_of_the_same_name_do_not_overwrite_each_other() {
    let place = Workplace::new();
    let (a, b) = (place.photo("x/s.png", 20, 30), place.photo("y/s.png", 30, 20));
    place.segment(&[&a, &b]).succeeds();
    assert_eq!(grey(&place.at("out/s.labels.png")).dimensions(), (20, 30));
    assert_eq!(grey(&place.at("out/s-2.labels.png")).dimensions(), (30, 20));
    assert_eq!(place.outputs().len(), 6);
}

#[test]
fn an_unwritable_output_is_an_error_before_any_work() {
    let place = Workplace::new();
    let photo = place.photo("p.png", 32, 32);
    std::fs::write(place.at("out"), "a file where the folder should be").unwrap();
    place.segment(&[&photo]).fails(1, &["out", "folder"]);
    assert_eq!(std::fs::read_to_string(place.at("out")).unwrap().len(), 33, "it is untouched");
}

#[test]
fn absurd_sizes_and_unknown_options_are_wrong_usage() {
    let place = Workplace::new();
    let photo = place.photo("p.png", 32, 32);
    for size in ["0x0", "15x64", "999999x64", "64", "64x", "-64x64", "axb"] {
        let size = format!("--size={size}");
        place.segment(&[&photo, &size]).fails(2, &["size"]);
    }
    place.segment(&[&photo, &"--colour"]).fails(2, &["--colour"]);
    assert_eq!(place.outputs(), [""; 0]);
}

#[test]
fn a_size_beyond_the_memory_is_refused_not_tried() {
    // 63 GiB are the least it takes: a machine that has them would go on and compute for minutes.
    if fpenet::memory::available_bytes().is_none_or(|free| free > 60 << 30) {
        return;
    }
    let place = Workplace::new();
    let photo = place.photo("p.png", 32, 32);
    place.segment(&[&photo, &"--size", &"32768x32768"]).fails(1, &["memory", "--size"]);
}

#[test]
fn a_damaged_model_file_is_named() {
    let place = Workplace::new();
    let photo = place.photo("p.png", 32, 32);
    let whole = std::fs::read(place.at("model.safetensors")).unwrap();
    std::fs::write(place.at("model.safetensors"), &whole[..whole.len() - 100]).unwrap();
    place.segment(&[&photo]).fails(1, &["model.safetensors"]);
    std::fs::remove_file(place.at("model.safetensors")).unwrap();
    place.segment(&[&photo]).fails(1, &["model.safetensors", "cannot read"]);
    assert!(!place.at("out").exists());
}

#[test]
fn earlier_results_in_the_folder_are_not_segmented_again() {
    let place = Workplace::new();
    let photo = place.photo("out/p.png", 32, 32);
    place.segment(&[&photo]).succeeds();
    place.segment(&[&place.at("out")]).succeeds();
    assert_eq!(place.outputs(), ["p.labels.png", "p.mask.png", "p.overlay.png", "p.png"]);
}
