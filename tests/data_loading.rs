//! Data sets and loader on generated files: layouts, pairing, bad input, order, resuming.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fpenet::Error;
use fpenet::data::loader::{Batch, Loader, LoaderOptions, Position};
use fpenet::data::{Dataset, DatasetKind, LabelEncoding, VOID};
use image::{GrayImage, Luma, Rgb, RgbImage};
use tempfile::TempDir;

const NORMALISATION: ([f32; 3], [f32; 3]) = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]);

/// A CamVid split of `n` samples, each of its own brightness and label.
fn camvid(n: u8) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for dir in ["train", "trainannot"] {
        std::fs::create_dir(root.path().join(dir)).unwrap();
    }
    for i in 0..n {
        let name = format!("frame_{i:02}.png");
        let image = RgbImage::from_fn(24, 16, |x, y| Rgb([i * 10, x as u8, y as u8]));
        image.save(root.path().join("train").join(&name)).unwrap();
        let labels = GrayImage::from_fn(24, 16, |x, _| Luma([if x == 0 { 11 } else { i % 11 }]));
        labels.save(root.path().join("trainannot").join(&name)).unwrap();
    }
    root
}

fn train() -> Vec<String> {
    vec!["train".to_string()]
}

fn open(root: &TempDir) -> Arc<Dataset> {
    Arc::new(Dataset::open(DatasetKind::Camvid, root.path(), &train()).unwrap())
}

/// The message of an error that must be there, name `file` and contain every word of `words`.
#[track_caller]
fn complaint<T>(result: Result<T, Error>, file: &Path, words: &[&str]) -> Error {
    let error = result.err().expect("an error");
    let message = error.to_string();
    assert!(message.contains(file.to_str().unwrap()), "does not name {file:?}: {message}");
    for word in words {
        assert!(message.contains(word), "lacks {word:?}: {message}");
    }
    assert!(!message.contains('\n'), "more than a line: {message}");
    error
}

fn options(batch: usize) -> LoaderOptions {
    LoaderOptions::training(batch, (24, 16), 5, NORMALISATION)
}

fn batches(root: &TempDir, options: LoaderOptions, start: Position, n: usize) -> Vec<Batch> {
    let loader = Loader::new(open(root), options, start).unwrap();
    loader.take(n).map(|b| b.unwrap()).collect()
}

#[test]
fn camvid_samples_are_paired_sorted_and_void_becomes_255() {
    let root = camvid(3);
    let data = open(&root);
    let names: Vec<&str> = data.samples.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["frame_00", "frame_01", "frame_02"]);
    assert_eq!((data.classes.len(), data.palette.len()), (11, 11));
    assert_eq!(data.classes[3], "Road");
    let (image, label) = data.load(2).unwrap();
    assert_eq!(image.get_pixel(5, 7), &Rgb([20, 5, 7]));
    assert_eq!(label.get_pixel(0, 3), &Luma([VOID]));
    assert_eq!(label.get_pixel(1, 3), &Luma([2]));
    assert_eq!(data.working_size().unwrap(), (24, 16));
}

#[test]
fn a_list_selects_and_orders_the_samples() {
    let root = camvid(4);
    let list = root.path().join("train.txt");
    // Both the plain form and SegNet's.
    std::fs::write(&list, "frame_03.png\n\n/SegNet/train/frame_01.png /x/frame_01.png\n").unwrap();
    let names: Vec<String> = open(&root).samples.iter().map(|s| s.name.clone()).collect();
    assert_eq!(names, ["frame_03", "frame_01"]);

    let open = || Dataset::open(DatasetKind::Camvid, root.path(), &train());
    std::fs::write(&list, "frame_03.png\nframe_77.png\n").unwrap();
    complaint(open(), &list, &["line 2", "frame_77.png"]);
    std::fs::write(&list, "frame_03.png\nframe_03.png\n").unwrap();
    complaint(open(), &list, &["once", "line 2"]);
    std::fs::write(&list, "\n").unwrap();
    complaint(open(), &list, &["empty list"]);
}

#[test]
fn missing_empty_and_unpaired_folders_are_told_apart() {
    let root = camvid(2);
    let open = |split: &str| Dataset::open(DatasetKind::Camvid, root.path(), &[split.to_string()]);
    let dir = |name: &str| root.path().join(name);

    complaint(open("val"), &dir("val"), &["no such folder"]);
    std::fs::create_dir(dir("val")).unwrap();
    complaint(open("val"), &dir("valannot"), &["no such folder"]);
    std::fs::create_dir(dir("valannot")).unwrap();
    complaint(open("val"), &dir("val"), &["*.png", "none"]);

    let image = dir("train").join("frame_00.png");
    let label = dir("trainannot").join("frame_00.png");
    std::fs::rename(&label, dir("aside.png")).unwrap();
    complaint(open("train"), &image, &["label", label.to_str().unwrap()]);
    std::fs::rename(dir("aside.png"), &label).unwrap();
    std::fs::remove_file(&image).unwrap();
    complaint(open("train"), &label, &["image", image.to_str().unwrap()]);

    assert_eq!(open("../x").unwrap_err().exit_code(), 2);
    let twice = Dataset::open(DatasetKind::Camvid, root.path(), &[train(), train()].concat());
    assert_eq!(twice.unwrap_err().exit_code(), 2);
    assert_eq!(Dataset::open(DatasetKind::Camvid, root.path(), &[]).unwrap_err().exit_code(), 2);
}

#[test]
fn bad_label_files_are_named_with_what_is_wrong() {
    let root = camvid(1);
    let data = open(&root);
    let label = data.samples[0].label.clone();
    let good = std::fs::read(&label).unwrap();

    let mut plane = GrayImage::from_pixel(24, 16, Luma([1]));
    plane.put_pixel(4, 9, Luma([12]));
    plane.save(&label).unwrap();
    complaint(data.load(0), &label, &["0 to 10", "found 12", "x 4, y 9"]);

    RgbImage::new(24, 16).save(&label).unwrap();
    complaint(data.load(0), &label, &["8-bit channel", "Rgb"]);
    image::ImageBuffer::<Luma<u16>, _>::new(24, 16).save(&label).unwrap();
    complaint(data.load(0), &label, &["Grayscale with 16 bits"]);

    GrayImage::new(16, 24).save(&label).unwrap();
    complaint(data.load(0), &label, &["24x16", "found 16x24"]);

    for bytes in [&good[..good.len() / 2], b"not a PNG at all", b""] {
        std::fs::write(&label, bytes).unwrap();
        let error = complaint(data.load(0), &label, &["label PNG"]);
        assert_eq!(error.exit_code(), 1);
    }
    std::fs::remove_file(&label).unwrap();
    complaint(data.load(0), &label, &["cannot read"]);
}

#[test]
fn bad_images_are_named_with_what_is_wrong() {
    let root = camvid(1);
    let data = open(&root);
    let image = data.samples[0].image.clone();
    let good = std::fs::read(&image).unwrap();
    for bytes in [&good[..good.len() / 2], &good[..20], b"not an image", b""] {
        std::fs::write(&image, bytes).unwrap();
        complaint(data.load(0), &image, &["expected"]);
    }
    std::fs::remove_file(&image).unwrap();
    complaint(data.load(0), &image, &["cannot read"]);
}

/// Writes palette indices as a PNG of the given depth.
fn save_palette(path: &Path, width: u32, height: u32, depth: png::BitDepth, packed: &[u8]) {
    let mut encoder = png::Encoder::new(std::fs::File::create(path).unwrap(), width, height);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_depth(depth);
    encoder.set_palette([7; 3 * 16].to_vec());
    encoder.write_header().unwrap().write_image_data(packed).unwrap();
}

#[test]
fn palette_labels_are_read_as_indices_at_any_depth() {
    let root = camvid(1);
    let data = open(&root);
    let label = &data.samples[0].label;
    let index = |x: usize, y: usize| ((x + y) % 12) as u8;
    let plane: Vec<u8> = (0..24 * 16).map(|i| index(i % 24, i / 24)).collect();
    let nibbles: Vec<u8> = plane.chunks(2).map(|p| p[0] << 4 | p[1]).collect();
    let expected: Vec<u8> = plane.iter().map(|v| if *v == 11 { VOID } else { *v }).collect();
    for (depth, packed) in [(png::BitDepth::Eight, &plane), (png::BitDepth::Four, &nibbles)] {
        save_palette(label, 24, 16, depth, packed);
        assert_eq!(data.load(0).unwrap().1.as_raw(), &expected, "{depth:?}");
    }
}

/// A Cityscapes split with one frame of a city, labels written with the given suffixes.
fn cityscapes(suffixes: &[(&str, u8)]) -> (TempDir, PathBuf, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let images = root.path().join("leftImg8bit/train/aachen");
    let labels = root.path().join("gtFine/train/aachen");
    std::fs::create_dir_all(&images).unwrap();
    std::fs::create_dir_all(&labels).unwrap();
    RgbImage::from_pixel(32, 16, Rgb([9, 8, 7]))
        .save(images.join("aachen_000000_000019_leftImg8bit.png"))
        .unwrap();
    for (suffix, value) in suffixes {
        GrayImage::from_pixel(32, 16, Luma([*value]))
            .save(labels.join(format!("aachen_000000_000019_gtFine_{suffix}.png")))
            .unwrap();
    }
    (root, images, labels)
}

#[test]
fn cityscapes_label_ids_become_train_ids_and_ready_train_ids_are_preferred() {
    // 26 is the label id of car (train id 13), 13 its train id.
    for (files, encoding) in [
        (&[("labelIds", 26)][..], LabelEncoding::CityscapesIds),
        (&[("labelIds", 0), ("labelTrainIds", 13)], LabelEncoding::CityscapesTrainIds),
    ] {
        let (root, ..) = cityscapes(files);
        assert_eq!(DatasetKind::detect(root.path()).unwrap(), DatasetKind::Cityscapes);
        let data = Dataset::open(DatasetKind::Cityscapes, root.path(), &train()).unwrap();
        assert_eq!(data.samples[0].encoding, encoding);
        assert_eq!(data.samples[0].name, "aachen_000000_000019");
        let (image, label) = data.load(0).unwrap();
        assert_eq!(image.dimensions(), (32, 16));
        assert!(label.as_raw().iter().all(|v| *v == 13), "car");
        assert_eq!(data.classes[13], "car");
        // Training works from half the size.
        let (image, label) = data.load_working(0).unwrap();
        assert_eq!((image.dimensions(), label.dimensions()), ((16, 8), (16, 8)));
        assert_eq!(data.working_size().unwrap(), (16, 8));
    }
}

#[test]
fn cityscapes_folders_with_missing_parts_are_refused() {
    let open = |root: &TempDir| Dataset::open(DatasetKind::Cityscapes, root.path(), &train());
    let (root, images, labels) = cityscapes(&[]);
    let image = images.join("aachen_000000_000019_leftImg8bit.png");
    complaint(open(&root), &image, &["labelIds.png"]);
    let (root, images, _labels) = cityscapes(&[("labelIds", 7)]);
    std::fs::remove_file(images.join("aachen_000000_000019_leftImg8bit.png")).unwrap();
    complaint(open(&root), &root.path().join("leftImg8bit/train"), &["CITY/*_leftImg8bit.png"]);
    RgbImage::new(4, 4).save(images.join("aachen_000001_000019_leftImg8bit.png")).unwrap();
    let orphan = root.path().join("gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png");
    complaint(open(&root), &orphan, &["its image"]);
    std::fs::remove_dir_all(root.path().join("gtFine")).unwrap();
    complaint(open(&root), &root.path().join("gtFine/train"), &["no such folder"]);
    drop(labels);

    let (root, _, labels) = cityscapes(&[("labelIds", 34)]);
    let data = open(&root).unwrap();
    let file = labels.join("aachen_000000_000019_gtFine_labelIds.png");
    complaint(data.load(0), &file, &["0 to 33", "found 34"]);
}

#[test]
fn the_layout_is_told_from_the_folders() {
    let root = camvid(1);
    assert_eq!(DatasetKind::detect(root.path()).unwrap(), DatasetKind::Camvid);
    let empty = tempfile::tempdir().unwrap();
    complaint(DatasetKind::detect(empty.path()), empty.path(), &["CamVid", "Cityscapes"]);
    let missing = empty.path().join("nowhere");
    complaint(DatasetKind::detect(&missing), &missing, &["no such folder"]);
}

#[test]
fn evaluation_keeps_order_values_and_the_last_incomplete_batch() {
    let root = camvid(5);
    let options = LoaderOptions::evaluation(2, (24, 16), NORMALISATION);
    let got = batches(&root, options, Position::default(), 99);
    let samples: Vec<Vec<usize>> = got.iter().map(|b| b.samples.clone()).collect();
    assert_eq!(samples, [vec![0, 1], vec![2, 3], vec![4]]);
    assert_eq!(got[2].input.len(), 3 * 24 * 16);
    // Sample 4: red 40 everywhere, label 4 but for the void first column.
    let expected = (40.0 / 255.0 - 0.4) / 0.2;
    assert!((got[2].input[0] - expected).abs() < 1e-6);
    assert_eq!(got[2].labels[..3], [VOID, 4, 4]);
}

#[test]
fn training_drops_the_incomplete_batch_and_reshuffles_each_epoch() {
    let root = camvid(7);
    let got = batches(&root, options(2), Position::default(), 9);
    let places: Vec<(u64, usize)> =
        got.iter().map(|b| (b.position.epoch, b.position.batch)).collect();
    assert_eq!(places[..4], [(0, 0), (0, 1), (0, 2), (1, 0)]);
    let epoch = |e: usize| -> Vec<usize> {
        got[3 * e..3 * e + 3].iter().flat_map(|b| b.samples.clone()).collect()
    };
    for e in 0..3 {
        let mut samples = epoch(e);
        samples.sort();
        samples.dedup();
        assert_eq!(samples.len(), 6, "every sample at most once an epoch");
    }
    assert!(epoch(0) != epoch(1) && epoch(1) != epoch(2), "orders differ");
    assert_ne!(
        batches(&root, LoaderOptions { seed: 6, ..options(2) }, Position::default(), 9),
        got
    );
}

#[test]
fn batches_do_not_depend_on_workers_prefetch_or_cache() {
    let root = camvid(7);
    let expected = batches(&root, options(2), Position::default(), 8);
    for (workers, prefetch, cache_bytes) in [(3, 1, 0), (4, 6, 3000), (1, 9, 1 << 20)] {
        let other = LoaderOptions { workers, prefetch, cache_bytes, ..options(2) };
        assert_eq!(batches(&root, other, Position::default(), 8), expected);
    }
}

#[test]
fn a_resumed_stream_continues_bit_for_bit() {
    let root = camvid(7);
    let whole = batches(&root, options(2), Position::default(), 8);
    for done in 1..7 {
        let Position { epoch, batch } = whole[done - 1].position;
        // What a checkpoint holds: the batch after the last one used, past the end or not.
        let start = Position { epoch, batch: batch + 1 };
        assert_eq!(batches(&root, options(2), start, 8 - done), whole[done..], "after {done}");
    }
}

#[test]
fn a_failing_sample_ends_the_stream_with_the_files_name() {
    let root = camvid(6);
    let data = open(&root);
    let image = data.samples[3].image.clone();
    std::fs::write(&image, b"\x89PNG\r\n\x1a\n cut").unwrap();
    for workers in [1, 3] {
        let options =
            LoaderOptions { workers, ..LoaderOptions::evaluation(1, (24, 16), NORMALISATION) };
        let mut loader = Loader::new(Arc::clone(&data), options, Position::default()).unwrap();
        let before: Vec<bool> = loader.by_ref().take(3).map(|b| b.is_ok()).collect();
        assert_eq!(before, [true; 3]);
        complaint(loader.next().unwrap(), &image, &[]);
        assert!(loader.next().is_none(), "the stream is over");
    }
}

#[test]
fn dropping_a_loader_ends_its_threads() {
    let root = camvid(6);
    let data = open(&root);
    let options = LoaderOptions { workers: 3, prefetch: 8, ..options(2) };
    let mut loader = Loader::new(Arc::clone(&data), options, Position::default()).unwrap();
    loader.next().unwrap().unwrap();
    drop(loader);
    // The workers hold the data set: once they have been joined, this is its only owner.
    assert_eq!(Arc::strong_count(&data), 1);
}

#[test]
fn too_few_images_and_senseless_options_are_usage_errors() {
    let root = camvid(3);
    let new = |options| Loader::new(open(&root), options, Position::default()).err();
    let error = new(options(4)).unwrap();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("at least 4 images") && error.to_string().contains("3"));
    for bad in [
        LoaderOptions { batch: 0, ..options(2) },
        LoaderOptions { workers: 0, ..options(2) },
        LoaderOptions { std: [0.2, 0.0, 0.2], ..options(2) },
        LoaderOptions { size: (32, 32), ..options(2) },
    ] {
        assert_eq!(new(bad).unwrap().exit_code(), 2);
    }
}
