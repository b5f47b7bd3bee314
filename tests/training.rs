//! Training as a user sees it: it learns, it is reproducible bit for bit, it survives being
//! stopped and killed, and it refuses what it cannot continue from.
//!
//! A network of one block per stage on coloured rectangles of 64x48 keeps each run around a
//! second; everything but the amount of work is as in a real run.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fpenet::backend::DeviceChoice;
use fpenet::data::DatasetKind;
use fpenet::model::Model;
use fpenet::train::{
    Checkpoint, ClassWeights, EpochRecord, Observer, Outcome, Request, RunState, StepReport, train,
};
use image::{GrayImage, Luma, Rgb, RgbImage};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

const WIDTH: u32 = 64;
const HEIGHT: u32 = 48;
const EPOCHS: usize = 8;
/// 10 images in batches of 4: 2 updates, and 2 images left over each epoch.
const STEPS: u64 = 2 * EPOCHS as u64;

/// A folder in CamVid's layout: rectangles of the colours of three classes on a road-coloured
/// ground, with noise, and a void border.
fn dataset() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        write_split(folder.path(), "train", 10, 1);
        write_split(folder.path(), "val", 3, 2);
        folder
    });
    folder.path()
}

fn write_split(root: &Path, split: &str, count: usize, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let classes: [(u8, [u8; 3]); 4] =
        [(3, [90, 60, 90]), (0, [230, 230, 250]), (8, [40, 20, 180]), (5, [50, 160, 40])];
    let annotations = format!("{split}annot");
    fs::create_dir_all(root.join(split)).unwrap();
    fs::create_dir_all(root.join(&annotations)).unwrap();
    for i in 0..count {
        let mut labels = GrayImage::from_pixel(WIDTH, HEIGHT, Luma([3]));
        for _ in 0..4 {
            let (class, _) = classes[rng.random_range(1..classes.len())];
            let (x, y) = (rng.random_range(0..WIDTH - 20), rng.random_range(0..HEIGHT - 16));
            let (w, h) = (rng.random_range(10..20), rng.random_range(8..16));
            for (dx, dy) in (0..w).flat_map(|dx| (0..h).map(move |dy| (dx, dy))) {
                labels.put_pixel(x + dx, y + dy, Luma([class]));
            }
        }
        let image = RgbImage::from_fn(WIDTH, HEIGHT, |x, y| {
            let class = labels.get_pixel(x, y).0[0];
            let (_, colour) = classes.iter().find(|(c, _)| *c == class).unwrap();
            Rgb(colour.map(|v| v.saturating_add(rng.random_range(0..20))))
        });
        for x in 0..WIDTH {
            labels.put_pixel(x, 0, Luma([11]));
        }
        image.save(root.join(split).join(format!("{i:04}.png"))).unwrap();
        labels.save(root.join(&annotations).join(format!("{i:04}.png"))).unwrap();
    }
}

/// A small request; the learning rate is high because there are few updates.
fn request(out: &Path) -> Request {
    let mut request = Request::new(dataset(), out);
    request.dataset = Some(DatasetKind::Camvid);
    request.epochs = Some(EPOCHS);
    request.batch = Some(4);
    request.lr = Some(1e-2);
    request.seed = Some(7);
    request.size = Some((WIDTH as usize, HEIGHT as usize));
    request.val_every = Some(3);
    request.config.insert("p".into(), 1.into());
    request.config.insert("q".into(), 1.into());
    request.runtime.device = DeviceChoice::Cpu;
    request.runtime.threads = Some(1);
    request
}

/// The shortest command line, to resume with.
fn bare_command(out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fpenet"));
    command.arg("train").arg("--data").arg(dataset()).arg("--out").arg(out);
    command.args(["--device", "cpu", "--threads", "1"]);
    command
}

/// [`request`] as a command line, with the default number of epochs.
fn command(out: &Path) -> Command {
    let mut command = bare_command(out);
    let size = format!("{WIDTH}x{HEIGHT}");
    command.args(["--dataset", "camvid", "--batch", "4", "--lr", "0.01", "--seed", "7"]);
    command.args(["--size", &size, "--p", "1", "--q", "1"]);
    command
}

fn run(request: &Request) -> Outcome {
    train(request, &AtomicBool::new(false), &mut ()).unwrap()
}

/// An uninterrupted run that others are compared with.
fn reference() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        assert!(run(&request(folder.path())).finished);
        folder
    });
    folder.path()
}

/// All state that decides how training would go on, bit for bit: timings are left out.
#[derive(PartialEq)]
struct Bits {
    params: Vec<u32>,
    moments: [Vec<u32>; 2],
    step: u64,
    /// Epoch, loss, mIoU.
    figures: Vec<(usize, u64, Option<u64>)>,
}

fn bits(run: &Path) -> Bits {
    let c = Checkpoint::load(&run.join("checkpoint.safetensors")).unwrap();
    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let figures = |r: &EpochRecord| {
        (r.epoch, r.loss.to_bits(), r.validation.as_ref().map(|v| v.miou.to_bits()))
    };
    Bits {
        params: bits(&c.params.values),
        moments: [bits(&c.moment1), bits(&c.moment2)],
        step: c.state.step,
        figures: c.state.history.iter().map(figures).collect(),
    }
}

fn weights(file: PathBuf) -> Vec<u32> {
    Model::load(&file).unwrap().params.values.iter().map(|v| v.to_bits()).collect()
}

fn assert_same_run(a: &Path, b: &Path) {
    assert!(bits(a) == bits(b), "checkpoints of {} and {} differ", a.display(), b.display());
    for file in ["last.safetensors", "best.safetensors"] {
        assert!(weights(a.join(file)) == weights(b.join(file)), "{file} differs");
    }
}

/// Lines of log.csv by epoch; fails on a repeated one.
fn log_epochs(run: &Path) -> Vec<usize> {
    let text = fs::read_to_string(run.join("log.csv")).unwrap();
    text.lines().skip(1).map(|l| l.split(',').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn the_loss_falls_and_the_run_leaves_its_files() {
    let run = reference();
    let c = Checkpoint::load(&run.join("checkpoint.safetensors")).unwrap();
    let history = &c.state.history;
    assert_eq!(history.len(), EPOCHS);
    assert_eq!(c.state.step, STEPS);
    let (first, last) = (history[0].loss, history[EPOCHS - 1].loss);
    // Guessing gives ln 11 = 2.4; telling four plain colours apart is easy.
    assert!(last < 0.6 * first, "loss {first} -> {last}");

    // Validated every third epoch and after the last.
    let validated: Vec<usize> =
        history.iter().filter(|r| r.validation.is_some()).map(|r| r.epoch).collect();
    assert_eq!(validated, [3, 6, 8]);
    let best = history.iter().filter_map(|r| r.validation.as_ref()).map(|v| v.miou);
    assert_eq!(c.state.best.unwrap().1, best.fold(0.0, f64::max));

    assert_eq!(log_epochs(run), (1..=EPOCHS).collect::<Vec<_>>());
    image::open(run.join("plot.png")).unwrap();
    let model = Model::load(&run.join("last.safetensors")).unwrap();
    assert_eq!(model.classes.len(), 11);
    assert_eq!(model.train_size, Some((WIDTH as usize, HEIGHT as usize)));
    assert_eq!(model.mean, c.state.mean);
    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&model.params.values), bits(&c.params.values));
    assert!(
        fs::read_dir(run)
            .unwrap()
            .all(|f| { !f.unwrap().file_name().to_string_lossy().ends_with(".partial") })
    );
}

#[test]
fn the_mean_of_the_images_is_what_the_network_subtracts() {
    let state = Checkpoint::load(&reference().join("checkpoint.safetensors")).unwrap().state;
    let (mut sum, mut count) = ([0.0f64; 3], 0.0);
    for i in 0..10 {
        let image = image::open(dataset().join(format!("train/{i:04}.png"))).unwrap().to_rgb8();
        for p in image.pixels() {
            (0..3).for_each(|c| sum[c] += f64::from(p.0[c]) / 255.0);
            count += 1.0;
        }
    }
    for (mean, sum) in state.mean.iter().zip(sum) {
        // f32 holds seven digits.
        assert!((f64::from(*mean) - sum / count).abs() < 1e-6, "{mean}, not {}", sum / count);
    }
    assert!(state.std.iter().all(|s| (0.05..0.5).contains(s)), "{:?}", state.std);
}

#[test]
fn the_same_seed_gives_the_same_weights_and_another_seed_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let mut again = request(&folder.path().join("again"));
    again.runtime.workers = Some(3);
    run(&again);
    assert_same_run(reference(), &again.out);

    let mut other = request(&folder.path().join("other"));
    other.seed = Some(8);
    run(&other);
    let file = "last.safetensors";
    assert!(weights(reference().join(file)) != weights(other.out.join(file)));
}

#[test]
fn validation_does_not_change_training() {
    let folder = tempfile::tempdir().unwrap();
    let mut without = request(folder.path());
    without.val_split = Some("none".into());
    let outcome = run(&without);
    assert_eq!(outcome.best, None);
    let file = "last.safetensors";
    assert!(weights(reference().join(file)) == weights(without.out.join(file)));
}

/// Stops after given updates, counted from the start of the run.
struct StopAt<'a> {
    steps: &'a [u64],
    stop: &'a AtomicBool,
}

impl Observer for StopAt<'_> {
    fn step(&mut self, report: &StepReport) {
        if self.steps.contains(&report.step) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_run_stopped_within_and_between_epochs_continues_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path());
    // Updates 1 and 7 are within an epoch of two, 4 ends one.
    let mut sessions = 0;
    loop {
        let stop = AtomicBool::new(false);
        let mut observer = StopAt { steps: &[1, 4, 7], stop: &stop };
        let outcome = train(&request, &stop, &mut observer).unwrap();
        sessions += 1;
        if outcome.finished {
            break;
        }
        // As a user would: without repeating the options.
        let runtime = request.runtime.clone();
        request = Request::new(dataset(), folder.path());
        request.runtime = runtime;
        request.resume = true;
    }
    assert_eq!(sessions, 4);
    assert_same_run(reference(), folder.path());
    assert_eq!(log_epochs(folder.path()), (1..=EPOCHS).collect::<Vec<_>>());
}

#[test]
fn a_killed_run_continues_bit_for_bit() {
    const LONG: usize = 20;
    let folder = tempfile::tempdir().unwrap();
    let (killed, whole) = (folder.path().join("killed"), folder.path().join("whole"));
    let options = ["--epochs", "20", "--val-every", "10", "--checkpoint-every", "1"];
    let start = |resume: bool| {
        let mut command = command(&killed);
        command.args(options).args(resume.then_some("--resume"));
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let checkpoint = killed.join("checkpoint.safetensors");
    let state = || Checkpoint::load(&checkpoint).ok().map(|c| c.state);
    // Kill once within an epoch, and once wherever the next session happens to be.
    let conditions: [fn(&RunState) -> bool; 2] =
        [|s| s.epoch >= 1 && s.batch == 1, |s| s.epoch >= 8];
    for (i, reached) in conditions.into_iter().enumerate() {
        let mut child = start(i > 0);
        let begun = Instant::now();
        while !state().is_some_and(|s| reached(&s)) {
            assert!(begun.elapsed() < Duration::from_secs(60), "no progress");
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap(); // SIGKILL
        assert!(!child.wait().unwrap().success(), "finished before it was killed");
    }
    assert!(state().unwrap().epoch < LONG);
    assert!(start(true).wait().unwrap().success());

    assert!(command(&whole).args(options).output().unwrap().status.success());
    assert_same_run(&killed, &whole);
    assert_eq!(log_epochs(&killed), (1..=LONG).collect::<Vec<_>>());
}

/// Twenty sessions in a row end by SIGKILL: half of them some time after they began, half of them
/// within a millisecond or so of a checkpoint being written.
#[test]
fn a_run_killed_twenty_times_at_random_moments_never_breaks_and_ends_as_if_it_had_not_been() {
    const KILLS: usize = 20;
    let folder = tempfile::tempdir().unwrap();
    let (killed, whole) = (folder.path().join("killed"), folder.path().join("whole"));
    let options = ["--epochs", "60", "--val-every", "20", "--checkpoint-every", "1"];
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let checkpoint = killed.join("checkpoint.safetensors");
    // Every checkpoint is a new file under the old name.
    let written = || fs::metadata(&checkpoint).and_then(|m| m.modified()).ok();
    let mut reached = 0;
    for kill in 0..KILLS {
        let mut command = command(&killed);
        command.args(options).args(checkpoint.exists().then_some("--resume"));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        if kill % 2 == 0 {
            std::thread::sleep(Duration::from_millis(rng.random_range(0..120)));
        } else {
            let (begun, mut last) = (Instant::now(), written());
            for _ in 0..rng.random_range(1..4) {
                while written() == last {
                    assert!(begun.elapsed() < Duration::from_secs(60), "no progress");
                    std::thread::sleep(Duration::from_micros(200));
                }
                last = written();
            }
            std::thread::sleep(Duration::from_micros(rng.random_range(0..12_000)));
        }
        child.kill().unwrap(); // SIGKILL
        assert!(!child.wait().unwrap().success(), "kill {kill} came after the end");

        if checkpoint.exists() {
            let step = Checkpoint::load(&checkpoint).unwrap().state.step;
            assert!(step >= reached, "kill {kill}: back from update {reached} to {step}");
            reached = step;
        }
        for model in ["last.safetensors", "best.safetensors"].map(|name| killed.join(name)) {
            assert!(!model.exists() || Model::load(&model).is_ok(), "{}", model.display());
        }
    }
    assert!(reached >= KILLS as u64 / 2, "{reached} updates: the kills hit nothing");
    let output = command(&killed).args(options).arg("--resume").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(command(&whole).args(options).output().unwrap().status.success());
    assert_same_run(&killed, &whole);
    assert_eq!(log_epochs(&killed), (1..=60).collect::<Vec<_>>());
    // What the killed sessions were writing is gone too.
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name());
        entries.collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(names(&killed), names(&whole));
}

#[test]
fn damaged_checkpoints_are_named_and_left_alone() {
    let good = fs::read(reference().join("checkpoint.safetensors")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let mut flipped = good.clone();
    let middle = flipped.len() - flipped.len() / 3;
    flipped[middle] ^= 0x10;
    let cases: HashMap<&str, Vec<u8>> = HashMap::from([
        ("empty", Vec::new()),
        ("truncated", good[..good.len() / 2].to_vec()),
        ("one byte short", good[..good.len() - 1].to_vec()),
        ("a flipped bit", flipped),
        ("a text", b"epoch,step\n1,2\n".to_vec()),
        ("a model", fs::read(reference().join("last.safetensors")).unwrap()),
    ]);
    for (case, bytes) in cases {
        fs::write(&path, &bytes).unwrap();
        let output = bare_command(folder.path()).arg("--resume").output().unwrap();
        let words = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{case}: {words}");
        assert!(words.contains("checkpoint.safetensors"), "{case}: {words}");
        assert_eq!(words.lines().count(), 1, "{case}: {words}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "{case}");
    }
}

#[test]
fn a_run_is_neither_overwritten_nor_resumed_with_other_settings() {
    let before = fs::read(reference().join("checkpoint.safetensors")).unwrap();
    let cases: [(&[&str], &str); 5] = [
        (&[], "--resume"),
        (&["--resume", "--lr", "0.001"], "--lr"),
        (&["--resume", "--q", "2"], "config q"),
        (&["--resume", "--no-flip"], "--no-flip"),
        (&["--resume", "--class-weights", "log"], "--class-weights"),
    ];
    for (options, named) in cases {
        let output = bare_command(reference()).args(options).output().unwrap();
        let words = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{options:?}: {words}");
        assert!(words.contains(named), "{options:?}: {words}");
    }
    assert_eq!(fs::read(reference().join("checkpoint.safetensors")).unwrap(), before);
}

#[test]
fn mistakes_are_usage_errors_and_leave_no_run() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let cases: [(&[&str], &str); 6] = [
        (&["--classes", "19"], "expected 11"),
        (&["--resume"], "none"),
        (&["--epochs", "0"], "--epochs"),
        (&["--splits", "train,train"], "twice"),
        (&["--scale", "2,1"], "--scale"),
        (&["--class-weights", "enet"], "--class-weights"),
    ];
    for (options, named) in cases {
        let output = command(&out).args(options).output().unwrap();
        let words = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{options:?}: {words}");
        assert!(words.contains(named), "{options:?}: {words}");
        assert!(!out.exists(), "{options:?} made a run");
    }
}

#[test]
fn a_split_of_nothing_but_void_is_an_error_before_any_update_and_an_image_of_it_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    write_split(&data, "train", 4, 1);
    write_split(&data, "val", 2, 2);
    let void = |label: &str| {
        GrayImage::from_pixel(WIDTH, HEIGHT, Luma([11])).save(data.join(label)).unwrap();
    };
    let mut request = request(&folder.path().join("run"));
    (request.data, request.epochs) = (data.clone(), Some(1));
    let refused = |words: &[&str]| {
        let error = train(&request, &AtomicBool::new(false), &mut ()).unwrap_err();
        for word in words {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
        assert!(!request.out.exists());
    };

    void("valannot/0000.png");
    void("valannot/0001.png");
    refused(&["in val, found only void in its 2 label images", "valannot/0000.png", "choose"]);
    write_split(&data, "val", 2, 2);
    (0..4).for_each(|i| void(&format!("trainannot/000{i}.png")));
    refused(&["in train, found only void in its 4 label images", "trainannot/0000.png"]);
    write_split(&data, "train", 4, 1);
    void("trainannot/0000.png");
    void("valannot/0000.png");
    assert!(run(&request).finished);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path());
    // The first update makes weights of this size, which the second forward pass overflows.
    request.lr = Some(1e37);
    request.runtime.checkpoint_steps = Some(1);
    let error = train(&request, &AtomicBool::new(false), &mut ()).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    let words = error.to_string();
    assert!(words.contains("epoch 1 step") && words.contains("--lr"), "{words}");
    let kept = folder.path().join("checkpoint.safetensors");
    if kept.exists() {
        Checkpoint::load(&kept).unwrap().params.check_finite().unwrap();
    }
}

/// Weights are counted once, kept in the checkpoint, and decide the result.
#[test]
fn class_weights_are_kept_and_a_run_with_them_continues_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let weighted = |name: &str, way| {
        let mut request = request(&folder.path().join(name));
        request.epochs = Some(2);
        request.val_split = Some("none".into());
        request.class_weights = Some(way);
        request
    };
    let state = |request: &Request| {
        Checkpoint::load(&request.out.join("checkpoint.safetensors")).unwrap().state
    };
    let whole = weighted("whole", ClassWeights::Log);
    run(&whole);
    let kept = state(&whole).class_weights;
    assert_eq!(kept.len(), 11);
    // Road is everywhere; classes that the pictures do not show keep 1.
    let road = kept[state(&whole).classes.iter().position(|c| c == "Road").unwrap()];
    assert!(road < 1.0 && kept.iter().any(|&w| w > 1.5) && kept.contains(&1.0), "{kept:?}");

    let mut parts = weighted("parts", ClassWeights::Log);
    let stop = AtomicBool::new(false);
    train(&parts, &stop, &mut StopAt { steps: &[1], stop: &stop }).unwrap();
    (parts.resume, parts.class_weights) = (true, None);
    run(&parts);
    assert!(bits(&whole.out) == bits(&parts.out));
    assert_eq!(state(&parts).class_weights, kept);

    for (name, way) in [("none", ClassWeights::None), ("median", ClassWeights::MedianFrequency)] {
        let other = weighted(name, way);
        run(&other);
        assert_eq!(state(&other).class_weights.is_empty(), way == ClassWeights::None);
        assert!(bits(&whole.out) != bits(&other.out), "{name}");
    }

    // Without its weights the run would go on as another one.
    let path = whole.out.join("checkpoint.safetensors");
    let mut checkpoint = Checkpoint::load(&path).unwrap();
    checkpoint.state.class_weights.clear();
    checkpoint.save(&path).unwrap();
    let words = Checkpoint::load(&path).err().unwrap().to_string();
    assert!(words.contains("checkpoint.safetensors") && words.contains("class weights"), "{words}");
}

#[test]
fn a_model_file_can_be_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut tuned = Request::new(dataset(), folder.path());
    tuned.runtime = request(folder.path()).runtime;
    tuned.init_from = Some(reference().join("last.safetensors"));
    tuned.epochs = Some(1);
    tuned.batch = Some(4);
    tuned.lr = Some(1e-4);
    tuned.size = Some((WIDTH as usize, HEIGHT as usize));
    run(&tuned);
    let before = Checkpoint::load(&reference().join("checkpoint.safetensors")).unwrap().state;
    let after = Checkpoint::load(&folder.path().join("checkpoint.safetensors")).unwrap().state;
    assert_eq!(after.protocol.config, before.protocol.config);
    assert_eq!(after.mean, before.mean);
    // It goes on from where the other run ended rather than from guessing.
    let (first, last) = (before.history[0].loss, before.history[EPOCHS - 1].loss);
    assert!(after.history[0].loss < (first + last) / 2.0);
    let again =
        bare_command(folder.path()).args(["--resume", "--init-from", "x"]).output().unwrap();
    let words = String::from_utf8(again.stderr).unwrap();
    assert!(again.status.success() && words.contains("warning: --init-from: not read"), "{words}");
}

#[test]
fn two_processes_do_not_train_in_one_folder() {
    let folder = tempfile::tempdir().unwrap();
    let lock = fs::File::create(folder.path().join(".lock")).unwrap();
    lock.lock().unwrap();
    let output = command(folder.path()).args(["--epochs", "1"]).output().unwrap();
    let words = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(words.contains("another process"), "{words}");
    drop(lock);
    // Once it is free, an empty folder is as good as a new one.
    assert!(command(folder.path()).args(["--epochs", "1"]).output().unwrap().status.success());
}

/// Five updates on the emulated GPU in half precision: everything that decides how the run goes on,
/// the loss scaling included, comes back from the checkpoint.
#[cfg(emulated_kernels)]
#[test]
fn a_run_in_half_precision_continues_bit_for_bit() {
    use fpenet::backend::Precision;

    let small = |out: &Path| {
        let mut request = request(out);
        request.epochs = Some(1);
        request.batch = Some(2);
        request.size = Some((32, 24));
        request.val_split = Some("none".into());
        request.config.insert("branches".into(), 1.into());
        request.runtime.device = DeviceChoice::Emulated;
        request.runtime.precision = Precision::F16;
        request
    };
    let whole = tempfile::tempdir().unwrap();
    assert!(run(&small(whole.path())).finished);

    let parts = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let mut observer = StopAt { steps: &[3], stop: &stop };
    let mut request = small(parts.path());
    assert!(!train(&request, &stop, &mut observer).unwrap().finished);
    request.resume = true;
    assert!(run(&request).finished);

    assert!(bits(whole.path()) == bits(parts.path()));
    let scaling = |folder: &Path| {
        Checkpoint::load(&folder.join("checkpoint.safetensors")).unwrap().state.scaling
    };
    let found = scaling(whole.path());
    assert_eq!(found, scaling(parts.path()));
    // 2^16 is too much for gradients of so few pixels: some updates were left out on the way.
    assert!((1..5).contains(&found.skipped), "{found:?}");
}
