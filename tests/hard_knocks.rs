//! What the world does to a program: disks that fill up, files that change while they are read,
//! and what this one must not do to the world: reach for the network.

#![cfg(unix)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fpenet::segment::decode::decode_file;
use fpenet::train::Checkpoint;
use fpenet::{Model, ModelConfig, bundled, data};
use image::{GrayImage, Luma, Rgb, RgbImage};

/// A folder with a small model, a photo, and a data set in CamVid's layout.
struct Workplace {
    dir: tempfile::TempDir,
}

impl Workplace {
    fn new() -> Self {
        let place = Workplace { dir: tempfile::tempdir().unwrap() };
        model(3).save(&place.at("model.safetensors")).unwrap();
        fs::write(place.at("street.jpg"), bundled::PHOTO).unwrap();
        for split in ["train", "val"] {
            let labels = format!("{split}annot");
            fs::create_dir_all(place.at("data").join(split)).unwrap();
            fs::create_dir_all(place.at("data").join(&labels)).unwrap();
            for i in 0..4u32 {
                let name = format!("{i}.png");
                photo(64, 48, i).save(place.at("data").join(split).join(&name)).unwrap();
                GrayImage::from_fn(64, 48, |x, y| Luma([((x / 16 + y / 16 + i) % 11) as u8]))
                    .save(place.at("data").join(&labels).join(&name))
                    .unwrap();
            }
        }
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The binary in this folder; `script` is a shell's, with `$F` for the binary.
    fn shell(&self, script: &str) -> Output {
        let mut command = Command::new("bash");
        command.arg("-c").arg(script).env("F", env!("CARGO_BIN_EXE_fpenet"));
        command.current_dir(self.dir.path()).output().unwrap()
    }

    /// Everything in a folder, by name.
    fn contents(&self, folder: &str) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(self.at(folder)).unwrap().map(|e| e.unwrap());
        let files = entries.filter(|e| e.path().is_file());
        files.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
    }
}

fn model(seed: u64) -> Model {
    let config = ModelConfig { classes: 11, p: 1, q: 1, ..ModelConfig::default() };
    Model::init(config, seed).unwrap()
}

fn photo(width: u32, height: u32, seed: u32) -> RgbImage {
    let value = |x: u32, y: u32, k: u32| ((x * (7 + k) + y * (11 + seed) + 40 * k) % 256) as u8;
    RgbImage::from_fn(width, height, |x, y| Rgb([0, 1, 2].map(|k| value(x, y, k))))
}

/// Exit code 1 and one line of error that holds `words`; training tells its progress before it.
#[track_caller]
fn assert_fails(output: &Output, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{text}");
    let text = text.lines().last().unwrap_or_default();
    assert!(text.starts_with("error: ") && !text.contains(".partial"), "{text}");
    for word in words {
        assert!(text.contains(word), "{word}: {text}");
    }
}

const TRAIN: &str = "$F train --data data --out run --device cpu --threads 1 --dataset camvid \
    --batch 2 --size 64x48 --p 1 --q 1 --checkpoint-every 1 --epochs";
const SEGMENT: &str = "$F segment street.jpg --device cpu --model model.safetensors --out out";
const EVAL: &str = "$F eval --data data --device cpu --model model.safetensors --json eval.json";
const INIT: &str = "$F init --p 1 --q 1 --classes 11 --seed 4 --out made.safetensors";

/// Files may grow up to this many KiB; a write beyond fails, as on a full disk. The error's text
/// ("File too large") tells the two apart.
fn with_files_up_to(kib: u32, command: &str) -> String {
    format!("trap '' XFSZ; ulimit -f {kib}; exec {command}")
}

#[test]
fn a_write_that_fails_halfway_keeps_the_old_file_and_leaves_no_other() {
    let place = Workplace::new();
    let cases = [
        (INIT, "made.safetensors", 30, "made.safetensors: cannot write"),
        (EVAL, "eval.json", 0, "eval.json: cannot write"),
    ];
    for (command, file, kib, words) in cases {
        fs::write(place.at(file), "what was there").unwrap();
        let before = place.contents(".");
        assert_fails(&place.shell(&with_files_up_to(kib, command)), &[words, "too large"]);
        assert!(place.contents(".") == before, "{command} changed something");
        // With room it works.
        let output = place.shell(command);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_ne!(fs::read(place.at(file)).unwrap(), b"what was there");
    }
}

#[test]
fn segment_on_a_full_disk_leaves_whole_pictures_only() {
    let place = Workplace::new();
    assert!(place.shell(SEGMENT).status.success());
    let whole = place.contents("out");
    assert_eq!(whole.len(), 3);
    let sizes: Vec<u64> = whole.values().map(|bytes| bytes.len() as u64).collect();
    let [labels, mask, overlay] = sizes[..] else { unreachable!() };
    // Room for the label map and the mask, not for the overlay.
    let kib = labels.max(mask) / 1024 + 1;
    assert!(kib * 1024 < overlay, "labels {labels}, mask {mask}, overlay {overlay} bytes");
    fs::write(place.at("out/street.overlay.png"), "what was there").unwrap();
    let output = place.shell(&with_files_up_to(kib as u32, SEGMENT));
    assert_fails(&output, &["out/street.overlay.png: cannot write"]);
    let mut expected = whole;
    expected.insert("street.overlay.png".into(), b"what was there".to_vec());
    assert!(place.contents("out") == expected);
}

#[test]
fn commands_whose_first_file_does_not_fit_leave_no_folder() {
    let place = Workplace::new();
    let data = "--data data --device cpu --threads 1";
    let model = "--model model.safetensors";
    let short = "--epochs 1 --batch 2 --size 32x32 --workers 1";
    for (command, kib, words) in [
        (format!("segment street.jpg {model} --out deep/out"), 0, "labels.png: cannot write"),
        (format!("eval {data} {model} --report deep/report"), 0, "worst.png: cannot write"),
        (format!("export-predictions {data} {model} --out deep/p"), 0, "json: cannot write"),
        ("reproduce table4 --out deep/tables".into(), 0, "table4.md: cannot write"),
        (format!("reproduce table3 {data} {short} --out deep/t"), 64, "safetensors: cannot write"),
    ] {
        let output = place.shell(&with_files_up_to(kib, &format!("$F {command}")));
        assert_fails(&output, &[words, "too large"]);
        assert!(!place.at("deep").exists(), "{command}: {:?}", place.contents("deep").keys());
    }
}

#[test]
fn predictions_that_come_to_nothing_do_not_claim_their_folder() {
    let place = Workplace::new();
    let command =
        "$F export-predictions --data data --model model.safetensors --device cpu --out p";
    let (photo, kept) = (place.at("data/val/0.png"), place.at("0.png"));
    fs::rename(&photo, &kept).unwrap();
    fs::write(&photo, "not an image").unwrap();
    assert_fails(&place.shell(command), &["val/0.png"]);
    assert!(!place.at("p").exists());

    // Those that are there by the time of the failure stay, with what they were made with.
    fs::rename(&kept, &photo).unwrap();
    fs::write(place.at("data/val/3.png"), "not an image").unwrap();
    assert_fails(&place.shell(command), &["val/3.png"]);
    let names: Vec<String> = place.contents("p").into_keys().collect();
    assert_eq!(names, ["0.png", "1.png", "2.png", "predictions.json"]);
}

#[test]
fn training_on_a_full_disk_keeps_the_last_checkpoint_and_goes_on_once_there_is_room() {
    let place = Workplace::new();
    let begun = place.shell(&format!("{TRAIN} 2"));
    assert!(begun.status.success(), "{}", String::from_utf8_lossy(&begun.stderr));
    fs::remove_dir_all(place.at("run")).unwrap();

    // From the start: no run comes to be that would have to be moved out of the way.
    let output = place.shell(&with_files_up_to(64, &format!("{TRAIN} 4")));
    assert_fails(&output, &["run/", "cannot write"]);
    assert!(!place.at("run").exists(), "{:?}", place.contents("run").keys());

    // In the middle: a run that was stopped is resumed on a disk that is full by now.
    let mut child = Command::new("bash");
    child.args(["-c", &format!("exec {TRAIN} 4000")]).env("F", env!("CARGO_BIN_EXE_fpenet"));
    let mut child =
        child.current_dir(place.dir.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let checkpoint = place.at("run/checkpoint.safetensors");
    let begun = Instant::now();
    while !Checkpoint::load(&checkpoint).is_ok_and(|c| c.state.epoch >= 1) {
        assert!(begun.elapsed() < Duration::from_secs(60), "no progress");
        std::thread::sleep(Duration::from_millis(2));
    }
    let child = child.as_mut().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let resume = "$F train --data data --out run --device cpu --threads 1 --resume";
    // Log and plot follow from the checkpoint; small enough to be written, they may catch up.
    let weights = || {
        let mut files = place.contents("run");
        files.retain(|name, _| name.ends_with(".safetensors"));
        files
    };
    let before = weights();
    let output = place.shell(&with_files_up_to(64, resume));
    assert_fails(&output, &["run/", "cannot write"]);
    assert!(weights() == before, "the failed session changed the run");
    let step = Checkpoint::load(&checkpoint).unwrap().state.step;

    let more = format!("timeout -s INT 2 {resume}");
    place.shell(&more);
    assert!(Checkpoint::load(&checkpoint).unwrap().state.step > step, "it goes on");
}

/// The same on a real file system without space, where this process may mount one.
#[test]
fn a_file_system_without_space_loses_nothing() {
    let place = Workplace::new();
    let mount = "unshare --user --map-root-user --mount bash -c \
                 'mount -t tmpfs -o size=256k tmpfs disk && eval \"$0\"'";
    fs::create_dir(place.at("disk")).unwrap();
    let run = |script: &str| {
        let quoted = format!("'{}'", script.replace('\'', r"'\''"));
        place.shell(&format!("export F; {mount} {quoted}"))
    };
    if !run("true").status.success() {
        eprintln!("skipped: this machine lets no user mount a tmpfs");
        return;
    }
    // 236 KiB are taken: the small model (some 300 KB) does not fit, nor do the pictures.
    let fill = "head -c 236K /dev/zero > disk/other; echo old > disk/made.safetensors; \
                echo old > disk/street.labels.png; echo old > disk/eval.json";
    let look = "ls -A disk; cat disk/made.safetensors disk/street.labels.png disk/eval.json";
    let untouched = "eval.json\nmade.safetensors\nother\nstreet.labels.png\nold\nold\nold\n";
    let init = INIT.replace("--out ", "--out disk/");
    let segment = SEGMENT.replace("--out out", "--out disk");
    for command in [init, segment] {
        let output = run(&format!("{fill}; {command} > said; code=$?; {look}; exit $code"));
        assert_fails(&output, &["disk/", "No space left on device"]);
        let left = String::from_utf8(output.stdout).unwrap();
        if command.contains("segment") {
            // Pictures that still fitted are there, whole, and no part of any other.
            assert!(!left.contains(".partial"), "{left}");
        } else {
            assert_eq!(left, untouched, "{command}");
        }
    }
}

#[test]
fn outputs_to_a_device_without_space_are_errors() {
    let place = Workplace::new();
    let cases =
        [INIT.replace("made.safetensors", "/dev/full"), EVAL.replace("eval.json", "/dev/full")];
    for command in cases {
        assert_fails(&place.shell(&command), &["/dev/full: cannot write", "No space left"]);
        assert!(!fs::metadata("/dev/full").unwrap().is_file());
    }
    for command in ["summary", "devices", "init --out x.safetensors", "--help", "eval -h", "-V"] {
        let output = place.shell(&format!("$F {command} > /dev/full"));
        assert_fails(&output, &["stdout: cannot write"]);
    }
}

#[test]
fn an_evaluation_that_fails_leaves_no_folder_for_its_report() {
    let place = Workplace::new();
    let report = format!("{EVAL} --report deep/report");
    fs::rename(place.at("data/val/3.png"), place.at("3.png")).unwrap();
    fs::write(place.at("data/val/3.png"), "not an image").unwrap();
    assert_fails(&place.shell(&report), &["3.png"]);
    assert!(!place.at("deep").exists() && !place.at("eval.json").exists());
    fs::rename(place.at("3.png"), place.at("data/val/3.png")).unwrap();
    let output = place.shell(&report);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(place.contents("deep/report").len(), 3);
}

/// Linux takes any bytes as a name.
#[cfg(target_os = "linux")]
#[test]
fn names_that_are_no_text_are_as_good_as_others() {
    let place = Workplace::new();
    let begin = "set -e; D=$'d\\xff'; mkdir $D; mv data model.safetensors street.jpg $D";
    assert!(place.shell(begin).status.success());
    for command in [
        "segment $D/street.jpg --model $D/model.safetensors --out $D/out",
        "eval --data $D/data --model $D/model.safetensors --json $D/eval.json --report $D/report",
        "export-predictions --data $D/data --split val --out $D/p --model $D/model.safetensors",
        "stream --input $D/data/val --model $D/model.safetensors --quiet",
        "export --onnx $D/model.onnx --model $D/model.safetensors",
        "import --from $D/model.safetensors --p 1 --q 1 --out $D/imported.safetensors",
        "bench --size 64x48 --iterations 1 --model $D/model.safetensors --json $D/bench.json",
        "train --data $D/data --out $D/run --epochs 1 --batch 2 --size 32x32 --p 1 --q 1",
        "train --data $D/data --out $D/run --resume",
        "reproduce table8 --data $D/data --splits train --test-split val --out $D/tables --epochs 1 \
         --batch 2 --size 32x32",
    ] {
        let output = place.shell(&format!("D=$'d\\xff'; $F {command}"));
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Replaces `path` by one of two versions over and over while `read` reads it a number of times:
/// by rename, which a reader must never notice, and by writing over it, which it may.
fn replaced_while_read<T: PartialEq>(
    path: &Path,
    versions: [&[u8]; 2],
    read: impl Fn() -> fpenet::Result<T>,
) {
    let whole = versions.map(|version| {
        fs::write(path, version).unwrap();
        read().unwrap()
    });
    for in_place in [false, true] {
        let stop = AtomicBool::new(false);
        let (mut seen, mut errors) = ([0, 0], 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let other = path.with_extension("new");
                for i in (0..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    let version = versions[i % 2];
                    if in_place {
                        // As an editor or a copy does it: cut off first, then piece by piece.
                        let mut file = fs::File::create(path).unwrap();
                        version.chunks(4096).for_each(|part| file.write_all(part).unwrap());
                    } else {
                        fs::write(&other, version).unwrap();
                        fs::rename(&other, path).unwrap();
                    }
                }
            });
            for _ in 0..150 {
                match read() {
                    Ok(value) if value == whole[0] => seen[0] += 1,
                    Ok(value) if value == whole[1] => seen[1] += 1,
                    // Pieces of both may make up a third that nothing can tell from a file.
                    Ok(_) => assert!(in_place, "neither the old file nor the new one"),
                    Err(error) => {
                        errors += 1;
                        let text = error.to_string();
                        assert!(in_place, "{text}");
                        assert!(text.starts_with(&path.display().to_string()), "{text}");
                        assert_eq!(text.lines().count(), 1, "{text}");
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        let [old, new] = seen;
        assert!(in_place || (old > 0 && new > 0), "{old} old, {new} new, {errors} errors");
    }
}

#[test]
fn a_model_replaced_while_it_is_read_is_the_old_one_or_the_new_one_or_a_clean_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let versions = [1, 2].map(|seed| {
        model(seed).save(&path).unwrap();
        fs::read(&path).unwrap()
    });
    replaced_while_read(&path, [&versions[0], &versions[1]], || Model::load(&path));
}

#[test]
fn a_photo_replaced_while_it_is_read_is_the_old_one_or_the_new_one_or_a_clean_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("photo.png");
    let versions = [(160, 120), (200, 90)].map(|(width, height)| {
        photo(width, height, 1).save(&path).unwrap();
        fs::read(&path).unwrap()
    });
    let versions = [versions[0].as_slice(), &versions[1]];
    replaced_while_read(&path, versions, || decode_file(&path));
    // The loader of the data sets reads by itself.
    replaced_while_read(&path, versions, || data::decode::image(&path));
}

/// The socket calls of a process and its children.
struct Calls(String);

impl Calls {
    fn of(&self, call: &str) -> Vec<&str> {
        let call = format!("{call}(");
        self.0.lines().filter(|line| line.contains(&call)).collect()
    }
}

/// `strace` where it is there and may trace.
fn tracer(log: &Path) -> Option<Command> {
    let mut command = Command::new("strace");
    // -D: the tracer is the child, so that signals reach the program.
    command.args(["-D", "-f", "-q", "-e", "trace=network", "-o"]).arg(log);
    let works = Command::new("strace").args(["-e", "trace=network", "true"]).output();
    if works.is_ok_and(|output| output.status.success()) {
        return Some(command);
    }
    eprintln!("skipped: no strace, or it may not trace");
    None
}

/// What the tracer wrote, once the first process has ended.
fn calls(log: &Path) -> Calls {
    let begun = Instant::now();
    loop {
        let text = fs::read_to_string(log).unwrap_or_default();
        if text.lines().last().is_some_and(|line| line.contains("+++ exited")) {
            return Calls(text);
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{text}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn no_command_but_view_opens_a_socket() {
    let place = Workplace::new();
    if tracer(&place.at("log")).is_none() {
        return;
    }
    fpenet::model::npy::write_f32(&place.at("x.npy"), &[1, 3, 32, 48], &vec![0.5; 3 * 32 * 48])
        .unwrap();
    let commands = [
        "init --p 1 --q 1 --out made.safetensors",
        "segment street.jpg --model model.safetensors",
        "eval --data data --model model.safetensors --json eval.json",
        "train --data data --dataset camvid --out run --epochs 1 --batch 2 --size 64x48 --p 1 --q 1",
        "run --model model.safetensors --input x.npy --output y.npy",
        "stream --input data/val --model model.safetensors",
        "export-predictions --data data --split val --out predictions --model model.safetensors",
        "export --onnx model.onnx --model model.safetensors",
        "import --from model.safetensors --p 1 --q 1 --out imported.safetensors",
        concat!("check --reference ", env!("CARGO_MANIFEST_DIR"), "/tests/data/meu_odd_size"),
        "reproduce table4",
        "tune --dry-run --card h200 --precision f16 --size 64x48 --p 1 --q 1",
        "bench --size 64x48 --iterations 1 --warmup 0 --p 1 --q 1",
        "summary --size 64x48",
        "devices",
    ];
    for (i, line) in commands.into_iter().enumerate() {
        let log = place.at(&format!("log{i}"));
        let mut command = tracer(&log).unwrap();
        command.arg(env!("CARGO_BIN_EXE_fpenet")).args(line.split(' '));
        let output = command.current_dir(place.dir.path()).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        let calls = calls(&log);
        assert!(calls.of("socket").is_empty(), "{line}: {}", calls.0);
        assert!(calls.of("connect").is_empty(), "{line}: {}", calls.0);
    }
}

#[test]
fn view_listens_on_loopback_and_connects_to_nothing() {
    let place = Workplace::new();
    let log = place.at("log");
    let Some(mut command) = tracer(&log) else { return };
    command.arg(env!("CARGO_BIN_EXE_fpenet"));
    command.args(["view", "--port", "0", "--device", "cpu", "--model", "model.safetensors"]);
    let mut child = command.current_dir(place.dir.path()).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    let page = lines.map(Result::unwrap).find(|line| line.starts_with("page ")).unwrap();
    let host = page.split("http://").nth(1).unwrap().split('/').next().unwrap();
    for (head, body) in [
        ("GET / HTTP/1.1\r\n".to_string(), &b""[..]),
        (
            format!(
                "POST /segment HTTP/1.1\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n",
                bundled::PHOTO.len()
            ),
            bundled::PHOTO,
        ),
    ] {
        let mut stream = TcpStream::connect(host).unwrap();
        write!(stream, "{head}Host: {host}\r\nConnection: close\r\n\r\n").unwrap();
        stream.write_all(body).unwrap();
        let mut status = String::new();
        BufReader::new(stream).read_line(&mut status).unwrap();
        assert!(status.contains(" 200 "), "{status}");
    }
    assert!(
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success()
    );
    assert!(child.wait().unwrap().success());
    let calls = calls(&log);
    assert_eq!(calls.of("socket").len(), 1, "{}", calls.0);
    assert_eq!(calls.of("bind").len(), 1, "{}", calls.0);
    assert!(calls.of("bind")[0].contains("inet_addr(\"127.0.0.1\")"), "{}", calls.0);
    assert!(calls.of("connect").is_empty(), "{}", calls.0);
}
