//! The bodies of the fuzz targets, over their corpus and over mutations of it: the same few
//! thousand at every run, in seconds. `tools/fuzz.sh` searches on from there.
//!
//! The allocator counts, so that a file of a few bytes which makes the library ask for gigabytes
//! is found as well as one that makes it panic.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fpenet::{Model, ModelConfig};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "../fuzz/bodies.rs"]
mod bodies;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(block, layout) }
    }
}

fn grow(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(live, Relaxed);
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Mutations per file of a corpus.
const MUTATIONS: usize = 150;
/// For one input; every one takes milliseconds on an idle machine.
const SLOWEST: Duration = Duration::from_secs(10);

/// Most memory that an input of a target may ask for at a time. A file of a few bytes may well be
/// a photo of 32768x32768 pixels (a decoder's zeroed memory costs nothing until it is written);
/// the largest network that a configuration allows has 10 MB of weights.
fn memory_bound(target: &str) -> usize {
    if target == "image" { 5 << 30 } else { 64 << 20 }
}

/// A file with one to four random injuries.
fn mutated(seed: &[u8], other: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..rng.random_range(1..=4) {
        if bytes.is_empty() {
            return other.to_vec();
        }
        let at = rng.random_range(0..bytes.len());
        let end = (at + rng.random_range(1..=16)).min(bytes.len());
        match rng.random_range(0..8) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = [0, 1, 0x7F, 0x80, 0xFF, b'9', b'(', b'"'][rng.random_range(0..8)],
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let copy = bytes[at..end].to_vec();
                let to = rng.random_range(0..=bytes.len());
                bytes.splice(to..to, copy);
            }
            5 => {
                let big = [u32::MAX, i32::MAX as u32, 1 << 16, 0][rng.random_range(0..4)];
                bytes.splice(at..at.saturating_add(4).min(bytes.len()), big.to_le_bytes());
            }
            6 => {
                let digits = "9".repeat(rng.random_range(1..25));
                bytes.splice(at..end, digits.bytes());
            }
            _ => {
                let from = rng.random_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
    bytes
}

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<(String, Vec<u8>)> = entries
        .map(|entry| entry.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .collect();
    files.sort();
    assert!(files.len() >= 3, "{}: a corpus of at least 3 files", folder.display());
    files
}

/// Runs a body and says which input it was that broke it.
fn survive(target: &str, name: &str, bytes: &[u8], body: fn(&[u8])) {
    let begun = Instant::now();
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = catch_unwind(AssertUnwindSafe(|| body(bytes)));
    let (asked, took) = (PEAK.load(Relaxed).saturating_sub(before), begun.elapsed());
    let complaint = if result.is_err() {
        "panicked".to_string()
    } else if asked > memory_bound(target) {
        format!("asked for {asked} bytes")
    } else if took > SLOWEST {
        format!("took {took:?}")
    } else {
        return;
    };
    let kept = std::env::temp_dir().join(format!("fpenet-{target}-{name}"));
    fs::write(&kept, bytes).unwrap();
    panic!("{target}: {complaint} on a mutation of {name}, kept as {}", kept.display());
}

/// One test for all, since the allocator counts for the whole process.
#[test]
fn damaged_files_give_one_line_errors_and_neither_panic_nor_take_memory() {
    for (target, body) in bodies::TARGETS {
        let files = corpus(target);
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for (name, bytes) in &files {
            survive(target, name, bytes, body);
            for _ in 0..MUTATIONS {
                let (_, other) = &files[rng.random_range(0..files.len())];
                survive(target, name, &mutated(bytes, other, &mut rng), body);
            }
        }
    }
}

#[test]
fn the_corpus_holds_good_files_too() {
    let good = |target: &str, check: &dyn Fn(&[u8]) -> bool| {
        let files = corpus(target);
        assert!(files.iter().any(|(_, bytes)| check(bytes)), "{target}");
        assert!(files.iter().any(|(_, bytes)| !check(bytes)), "{target}");
    };
    let path = Path::new("file");
    good("npy", &|b| fpenet::model::npy::f32_from_bytes(b, path).is_ok());
    good("image", &|b| fpenet::segment::decode::decode_bytes(b, path).is_ok());
    good("model", &|b| {
        let metadata = serde_json::from_slice(b);
        metadata.is_ok_and(|m| Model::from_bytes(&bodies::tiny_model_with(&m), path).is_ok())
    });
    good("config", &|b| {
        let config = serde_json::from_slice::<ModelConfig>(b);
        config.is_ok_and(|config| config.validate().is_ok())
    });
}
