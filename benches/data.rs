//! Speed of the data path on one core: warps of a 480x360 sample, decoding, and whole batches.
//!
//! `cargo bench --bench data`; with `FPENET_CAMVID=DIR` on the real data set, else on noise.

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fpenet::data::augment::{Augment, Normalise, Warp, WarpParams};
use fpenet::data::loader::{Loader, LoaderOptions, Position};
use fpenet::data::{Dataset, DatasetKind};
use image::{GrayImage, RgbImage};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SIZE: (usize, usize) = (480, 360);

fn noise() -> (RgbImage, GrayImage) {
    let (w, h) = SIZE;
    let mut rgb = vec![0; 3 * w * h];
    let mut labels = vec![0; w * h];
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    rng.fill_bytes(&mut rgb);
    rng.fill_bytes(&mut labels);
    labels.iter_mut().for_each(|v| *v %= 11);
    let (w, h) = (w as u32, h as u32);
    (RgbImage::from_raw(w, h, rgb).unwrap(), GrayImage::from_raw(w, h, labels).unwrap())
}

/// The real data set where it is named, else 16 samples of noise in a temporary folder.
fn dataset() -> (Arc<Dataset>, Option<tempfile::TempDir>) {
    let open = |root: PathBuf| {
        Arc::new(Dataset::open(DatasetKind::Camvid, &root, &["train".into()]).unwrap())
    };
    if let Some(root) = std::env::var_os("FPENET_CAMVID") {
        return (open(root.into()), None);
    }
    let folder = tempfile::tempdir().unwrap();
    let (image, labels) = noise();
    for dir in ["train", "trainannot"] {
        std::fs::create_dir(folder.path().join(dir)).unwrap();
    }
    for i in 0..16 {
        image.save(folder.path().join(format!("train/{i}.png"))).unwrap();
        labels.save(folder.path().join(format!("trainannot/{i}.png"))).unwrap();
    }
    (open(folder.path().to_path_buf()), Some(folder))
}

fn warps(c: &mut Criterion) {
    let (image, labels) = noise();
    let normalise = Normalise::new([0.4; 3], [0.3; 3]);
    let mut input = vec![0.0; 3 * SIZE.0 * SIZE.1];
    let mut out = vec![0; SIZE.0 * SIZE.1];
    let mut group = c.benchmark_group("warp_480x360");
    group.throughput(Throughput::Elements(1));
    for (name, degrees, scale) in
        [("flipped", 0.0, 1.0), ("halved", 7.0, 0.6), ("turned", 7.0, 1.0), ("grown", -9.0, 1.7)]
    {
        let offset = |side: usize| (side as f64 * (scale - 1.0) / 2.0).round();
        let warp = Warp::new(WarpParams {
            source: SIZE,
            size: SIZE,
            flip: true,
            degrees,
            scale: (scale, scale),
            offset: (offset(SIZE.0), offset(SIZE.1)),
        });
        group.bench_function(name, |b| {
            b.iter(|| {
                warp.image(black_box(&image), &normalise, &mut input);
                warp.labels(black_box(&labels), &mut out);
            });
        });
    }
    group.finish();
}

fn batches(c: &mut Criterion) {
    let (data, _folder) = dataset();
    let mut group = c.benchmark_group("data");
    group.sample_size(20);
    group.throughput(Throughput::Elements(1));
    let mut index = 0;
    group.bench_function("decode", |b| {
        b.iter(|| {
            index = (index + 1) % data.len();
            data.load(index).unwrap()
        });
    });
    group.throughput(Throughput::Elements(8));
    for (name, cache_bytes) in [("batch_of_8_decoded_anew", 0), ("batch_of_8_cached", 2 << 30)] {
        let options = LoaderOptions {
            cache_bytes,
            augment: Some(Augment::paper(SIZE)),
            ..LoaderOptions::training(8, SIZE, 1, ([0.4; 3], [0.3; 3]))
        };
        let mut loader = Loader::new(Arc::clone(&data), options, Position::default()).unwrap();
        // Two epochs fill the cache.
        (0..2 * loader.batches_per_epoch()).for_each(|_| drop(loader.next().unwrap().unwrap()));
        group.bench_function(name, |b| b.iter(|| loader.next().unwrap().unwrap()));
    }
    group.finish();
}

criterion_group!(benches, warps, batches);
criterion_main!(benches);
