//! 8-bit RGB into the stem, and batches that overlap: the same bits as one normalised image at a time.

use fpenet::backend::cpu::CpuBackend;
use fpenet::backend::{Backend, DeviceChoice, Precision};
use fpenet::exec::Inference;
use fpenet::graph::Mode;
use fpenet::segment::input::{NetworkSize, SizeReason};
use fpenet::segment::{Segmenter, Settings};
use fpenet::{Model, ModelConfig};

use super::Order;
use super::harness::{Random, SHARED, distance, emulated};

/// Odd, so that the stem's last column and row read padding.
const H: usize = 33;
const W: usize = 21;

fn model() -> Model {
    let config = ModelConfig { classes: 5, p: 1, q: 1, branches: 2, ..ModelConfig::default() };
    let mut model = Model::init(config, 3).unwrap();
    (model.mean, model.std) = ([0.4, 0.5, 0.3], [0.2, 0.3, 0.25]);
    model
}

fn photos(count: usize, pixels: usize) -> Vec<u8> {
    let mut random = Random(17);
    (0..count * 3 * pixels).map(|_| random.next() as u8).collect()
}

/// (value / 255 - mean) / std, planar.
fn normalised(model: &Model, photos: &[u8], plane: usize) -> Vec<f32> {
    let image = |pixels: &[u8]| -> Vec<f32> {
        let value = |c: usize, i: usize| {
            (f32::from(pixels[3 * i + c]) / 255.0 - model.mean[c]) / model.std[c]
        };
        (0..3).flat_map(|c| (0..plane).map(move |i| (c, i))).map(|(c, i)| value(c, i)).collect()
    };
    photos.chunks(3 * plane).flat_map(image).collect()
}

fn gpu(precision: Precision) -> Box<dyn Backend> {
    Box::new(emulated(Order::Forward, SHARED, precision))
}

#[test]
fn logits_of_rgb_are_those_of_the_normalised_image() {
    // Rows that begin at odd addresses; more than one tile, of rows that are read many bytes at once.
    for (h, w) in [(H, W), (20, 144)] {
        logits_of_rgb_are_those(h, w);
    }
}

fn logits_of_rgb_are_those(h: usize, w: usize) {
    let (model, photos) = (model(), photos(2, h * w));
    let run = |backend, rgb: bool| {
        let mut inference = Inference::new(&model, backend, 2, h, w, Mode::Logits).unwrap();
        match rgb {
            true => inference.run_rgb(&photos).unwrap(),
            false => inference.run(&normalised(&model, &photos, h * w)).unwrap(),
        }
        inference.logits().unwrap()
    };
    let cpu = || -> Box<dyn Backend> { Box::new(CpuBackend::new(Some(1)).unwrap()) };
    let expected = run(cpu(), false);
    // The two roundings of the formula against the one of a fused multiply-add: a few ulp each.
    assert!(distance(&run(cpu(), true), &expected) < 1e-5);
    assert!(distance(&run(gpu(Precision::F32), false), &expected) < 1e-5);
    assert!(distance(&run(gpu(Precision::F32), true), &expected) < 1e-5);
    assert!(distance(&run(gpu(Precision::F16), true), &expected) < 1e-2);
    assert!(distance(&run(gpu(Precision::F16), false), &expected) < 1e-2);
}

#[test]
fn a_normalised_image_after_rgb_is_read_as_what_it_is() {
    let (model, photos) = (model(), photos(1, H * W));
    let mut inference = Inference::new(&model, gpu(Precision::F32), 1, H, W, Mode::Logits).unwrap();
    let other: Vec<f32> = normalised(&model, &photos, H * W).iter().map(|v| -v).collect();
    inference.run(&other).unwrap();
    let expected = inference.logits().unwrap();
    inference.run_rgb(&photos).unwrap();
    assert!(inference.logits().unwrap() != expected);
    inference.run(&other).unwrap();
    assert!(inference.logits().unwrap() == expected);
}

#[test]
fn pixels_of_another_size_are_refused() {
    let model = model();
    let mut inference = Inference::new(&model, gpu(Precision::F32), 1, H, W, Mode::Labels).unwrap();
    let message = inference.run_rgb(&[0; 30]).unwrap_err().to_string();
    assert!(message.contains("2079 bytes of RGB") && message.contains("found 30"), "{message}");
}

#[test]
fn batches_under_way_do_not_touch_each_other() {
    let (model, photos) = (model(), photos(5, H * W));
    let photos: Vec<&[u8]> = photos.chunks(3 * H * W).collect();
    for mode in [Mode::Labels, Mode::Logits] {
        for precision in [Precision::F32, Precision::F16] {
            let mut inference = Inference::new(&model, gpu(precision), 1, H, W, mode).unwrap();
            let collect = |inference: &mut Inference| -> Vec<f32> {
                if mode == Mode::Logits {
                    return inference.collect_logits().unwrap();
                }
                let mut labels = vec![0; H * W];
                inference.collect_labels(&mut labels).unwrap();
                labels.iter().map(|&label| f32::from(label)).collect()
            };
            let mut overlapped = Vec::new();
            for photo in &photos {
                if !inference.has_room() {
                    overlapped.push(collect(&mut inference));
                }
                inference.launch_rgb(photo).unwrap();
            }
            assert_eq!(inference.in_flight(), 2);
            assert!(inference.launch_rgb(photos[0]).unwrap_err().exit_code() == 2);
            while inference.in_flight() > 0 {
                overlapped.push(collect(&mut inference));
            }
            for (photo, overlapped) in photos.iter().zip(&overlapped) {
                inference.launch_rgb(photo).unwrap();
                assert!(collect(&mut inference) == *overlapped, "{mode:?} {precision:?}");
            }
            assert!(inference.collect_labels(&mut []).is_err(), "nothing is left");
        }
    }
}

#[test]
fn photos_of_changing_sizes_get_the_labels_that_they_get_alone() {
    let model = model();
    let settings = Settings {
        device: DeviceChoice::Emulated,
        precision: Precision::F32,
        threads: None,
        expanded: None,
    };
    let pixels = photos(1, H * W);
    let network = NetworkSize { width: W, height: H, reason: SizeReason::Own };
    let (own, larger) = ((W as u32, H as u32), (2 * W as u32, 50));
    let alone = |photo| {
        let mut segmenter = Segmenter::new(&model, settings).unwrap();
        segmenter.submit(&pixels, network, photo).unwrap();
        segmenter.collect().unwrap()
    };
    let expected = [alone(own), alone(larger)];
    let mut segmenter = Segmenter::new(&model, settings).unwrap();
    let mut found = Vec::new();
    segmenter.submit(&pixels, network, own).unwrap();
    assert!(segmenter.prepare(network, larger).is_err(), "its result would be lost");
    found.push(segmenter.collect().unwrap());
    for photo in [own, own, larger, own] {
        while !segmenter.has_room(network, photo) {
            found.push(segmenter.collect().unwrap());
        }
        segmenter.submit(&pixels, network, photo).unwrap();
    }
    while segmenter.under_way() > 0 {
        found.push(segmenter.collect().unwrap());
    }
    let [own, larger] = &expected;
    assert!(found.iter().eq([own, own, own, larger, own]));
    assert_eq!(larger.dimensions(), (2 * W as u32, 50));
    // Classes in the labels, so that the comparison means something.
    assert!(own.iter().any(|label| *label != own.as_raw()[0]));
}
