//! The CUDA backend against a driver and a cuBLAS played on the CPU (tests/driver/driver.h): opening, copies, streams,
//! graphs, arguments and errors, where there is no GPU. That results are right and fast on a card is for
//! tools/gpu-check.sh to say.
//!
//! Passed over where the binary holds no kernels (built without nvcc). To run any command so, after these tests:
//! `LD_LIBRARY_PATH=target/tmp/driver target/release/fpenet COMMAND --device cuda`.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use common::Run;
use fpenet::{Model, ModelConfig};
use image::{Rgb, RgbImage};

const REFERENCE: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/sigmoid_attention_one_branch");
/// When work in streams is done (driver.h): as late as may be, at once, now and then.
const ORDERS: [&str; 4] = ["late", "early", "1", "2"];

/// The two libraries and the program with mistakes.
struct Libraries {
    folder: PathBuf,
}

/// None where they cannot be used, after saying why.
fn libraries() -> Option<&'static Libraries> {
    static BUILT: OnceLock<Option<Libraries>> = OnceLock::new();
    BUILT
        .get_or_init(|| {
            if let Some(reason) = impossible() {
                eprintln!("passed over: {reason}");
                return None;
            }
            let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("driver");
            // A folder of its own per process: two test runs may overlap.
            let own = folder.with_extension(std::process::id().to_string());
            fs::create_dir_all(&own).unwrap();
            build(&own);
            let _ = fs::remove_dir_all(&folder);
            fs::rename(&own, &folder).unwrap();
            Some(Libraries { folder })
        })
        .as_ref()
}

fn impossible() -> Option<&'static str> {
    let devices = Command::new(env!("CARGO_BIN_EXE_fpenet")).arg("devices").output().unwrap();
    let devices = String::from_utf8(devices.stdout).unwrap();
    let line = |kind| devices.lines().find(|line: &&str| line.starts_with(kind)).unwrap_or("");
    if line("cuda").contains("built without nvcc") {
        return Some("this binary holds no CUDA kernels (tools/install-nvcc.sh, then build again)");
    }
    line("emulated").contains("not available").then_some("there is no host build of the kernels")
}

/// As build/host_kernels.rs does, and with the checks that a GPU makes and a CPU does not: a vector that is loaded
/// from an odd address faults there.
const KERNEL_FLAGS: [&str; 8] = [
    "-DFPENET_HOST",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
    "-Wno-unused-function",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,null",
    "-fno-sanitize-recover=all",
    "-c",
];
const FLAGS: [&str; 6] = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"];

fn compile(arguments: &[&str], inputs: &[PathBuf], out: &Path) {
    let mut command = Command::new("c++");
    command.args(FLAGS).arg("-I").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels"));
    command.args(arguments).args(inputs).arg("-o").arg(out);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn build(folder: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The units that build.rs wrote: a kernel file and the table of its kernels each.
    let units = fs::read_dir(env!("OUT_DIR")).unwrap().map(|entry| entry.unwrap().path());
    let is_unit = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("host_") && name.ends_with(".cpp")
    };
    let mut units: Vec<PathBuf> = units.filter(is_unit).collect();
    units.push(root.join("kernels/host/scheduler.cpp"));
    let object = |unit: &Path| folder.join(unit.file_name().unwrap()).with_extension("o");
    let (kernels, queue) = (units.iter().map(|unit| object(unit)), Mutex::new(units.iter()));
    let work = || {
        let next = || queue.lock().unwrap().next();
        while let Some(unit) = next() {
            compile(&KERNEL_FLAGS, std::slice::from_ref(unit), &object(unit));
        }
    };
    std::thread::scope(|scope| {
        let workers = std::thread::available_parallelism().unwrap().get();
        (0..workers).for_each(|_| drop(scope.spawn(work)));
    });

    let source = |name: &str| root.join("tests/driver").join(name).with_extension("cpp");
    let driver = folder.join("libcuda.so.1");
    let mut inputs: Vec<PathBuf> = ["device", "streams", "memory", "modules"].map(source).into();
    inputs.extend(kernels);
    let library = ["-shared", "-Werror", "-static-libstdc++", "-static-libgcc"];
    let alone = ["-Wl,-soname,libcuda.so.1", "-fsanitize=undefined"];
    compile(&[&library[..], &alone[..]].concat(), &inputs, &driver);
    let beside = ["-Wl,-soname,libcublas.so.12", "-Wl,-rpath,$ORIGIN"];
    let cublas = folder.join("libcublas.so.12");
    compile(&[&library[..], &beside].concat(), &[source("cublas"), driver.clone()], &cublas);
    let mistakes = folder.join("mistakes");
    compile(&["-Wl,-rpath,$ORIGIN"], &[source("mistakes"), driver], &mistakes);
}

impl Libraries {
    /// fpenet with the stand-in for a driver; `settings` are FPENET_DRIVER_ or other variables.
    fn fpenet(&self, settings: &[(&str, &str)], args: &[&str]) -> Run {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fpenet"));
        command.env("LD_LIBRARY_PATH", &self.folder).env_remove("FPENET_CUDA_GRAPHS");
        command.env_remove("FPENET_VARIANTS").envs(settings.iter().copied()).args(args);
        Run::of(command.output().unwrap())
    }

    fn mistake(&self, order: &str, name: &str) -> Run {
        let program = self.folder.join("mistakes");
        Run::of(Command::new(program).arg(name).env("FPENET_DRIVER_ORDER", order).output().unwrap())
    }
}

/// Two photos to go back and forth, and a small network.
fn workplace() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig { classes: 11, p: 1, q: 1, ..ModelConfig::default() };
    Model::init(config, 3).unwrap().save(&dir.path().join("model.safetensors")).unwrap();
    fs::create_dir(dir.path().join("photos")).unwrap();
    for i in 0..6u32 {
        let stripes = |x: u32, y: u32| Rgb([x * (5 + i), y * (9 + 2 * i), (x / 8) * 40 + 31 * i]);
        let photo = RgbImage::from_fn(48, 32, |x, y| Rgb(stripes(x, y).0.map(|v| v as u8)));
        photo.save(dir.path().join(format!("photos/{i}.png"))).unwrap();
    }
    dir
}

/// Names and contents of the label maps in a folder.
fn labels(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut labels: Vec<(String, Vec<u8>)> = files
        .filter(|path| path.to_string_lossy().ends_with(".labels.png"))
        .map(|path| (path.file_name().unwrap().to_string_lossy().into(), fs::read(&path).unwrap()))
        .collect();
    labels.sort();
    labels
}

#[test]
fn the_stand_in_finds_mistakes_and_nothing_else() {
    let Some(libraries) = libraries() else { return };
    let outcome = |order: &str, name: &str| libraries.mistake(order, name).stdout;
    for order in ORDERS {
        assert_eq!(outcome(order, "nothing"), "found 1\n", "{order}");
    }
    // Which of the two runs first is the scheduler's choice: a mistake shows in one order at least.
    assert_eq!(outcome("early", "no event between streams"), "found 1\n");
    assert_eq!(outcome("late", "no event between streams"), "found 255\n");
    assert_eq!(outcome("early", "host memory used again too early"), "found 1\n");
    assert_eq!(outcome("late", "host memory used again too early"), "found 2\n");
    for name in ["pinned memory freed too early", "memory that is not pinned"] {
        let Run { code, stderr, .. } = libraries.mistake("late", name);
        assert!(code == 99 && stderr.starts_with("stand-in driver: "), "{name}: {stderr}");
    }
    let status = |name| outcome("late", name).lines().map(String::from).collect::<Vec<_>>();
    assert_eq!(status("copy beyond the end"), ["unexpected status 1"]);
    let broken = ["unexpected status 900", "unexpected status 901"];
    assert_eq!(status("memory reserved while captured"), broken);
    assert_eq!(status("event of another stream while captured"), ["unexpected status 905"]);
}

#[test]
fn references_pass_on_every_architecture_whose_kernels_are_here() {
    let Some(libraries) = libraries() else { return };
    let mut checked = 0;
    for (gpu, precision) in [("75", "f32"), ("75", "f16"), ("90", "f16"), ("70", "f16")] {
        let args =
            ["check", "--reference", REFERENCE, "--device", "cuda", "--precision", precision];
        let run = libraries.fpenet(&[("FPENET_DRIVER_GPU", gpu)], &args);
        if run.code != 0 && gpu == "70" {
            // Without NVRTC 12.9 there are no kernels for it, and it is told so.
            run.fails(1, &["is sm_70, the kernels in this binary need sm_", "--sm70"]);
            continue;
        }
        let stdout = run.succeeds();
        assert!(stdout.contains(&format!("sm_{gpu}")) && stdout.contains("PASS: "), "{stdout}");
        checked += 1;
    }
    assert!(checked >= 3);
}

/// Sizes that nobody would emulate: grids, threads and registers, shared memory and the order of calls are checked,
/// for the choices that the cost model makes for a card and for every one that `tune` would time on it.
#[test]
fn launches_at_real_sizes_keep_to_the_limits_of_every_card() {
    let Some(libraries) = libraries() else { return };
    for (gpu, name) in [("70", "TITAN V"), ("75", "TITAN RTX"), ("90", "H200")] {
        let cache = tempfile::tempdir().unwrap();
        let name = format!("NVIDIA {name} (stand-in)");
        let settings = [
            ("FPENET_DRIVER_WORKS", "0"),
            ("FPENET_DRIVER_GPU", gpu),
            ("FPENET_DRIVER_NAME", &name),
            ("FPENET_CACHE_DIR", cache.path().to_str().unwrap()),
        ];
        let fpenet = |line: &str| {
            let args: Vec<&str> = line.split(' ').collect();
            libraries.fpenet(&settings, &args)
        };
        let devices = fpenet("devices");
        let devices = devices.succeeds();
        if !devices.contains("kernels for sm_") {
            assert!(gpu == "70" && devices.contains("need sm_"), "{devices}");
            continue;
        }
        for precision in ["f32", "f16"] {
            for size in ["1024x512", "2048x1024", "--batch 3 --size 481x361"] {
                let size = if size.contains(' ') { size.into() } else { format!("--size {size}") };
                let runs = "--iterations 2 --warmup 2";
                let line = format!("bench --device cuda --precision {precision} {size} {runs}");
                let run = fpenet(&line);
                let stdout = run.succeeds();
                assert!(stdout.contains("(model)") && stdout.contains("data sheet"), "{stdout}");
            }
            let training =
                "bench --train --profile --device cuda --size 480x360 --batch 8 --iterations 2";
            fpenet(&format!("{training} --precision {precision}")).succeeds();
        }
        let inference = "--device cuda --size 1024x512 --precision f16 --iterations 1";
        fpenet(&format!("bench {inference} --expanded bytes")).succeeds();
        fpenet(&format!("tune {inference}")).succeeds();
        let run = fpenet(&format!("bench {inference} --warmup 1"));
        let stdout = run.succeeds();
        assert!(stdout.contains("(cache)"), "{stdout}");
    }
}

/// Every product that the emulated device gives to a library of its own goes through cuBLAS's arguments here: which
/// operand comes first, what is transposed, leading dimensions, strides between batch items.
#[test]
fn products_through_cublas_are_those_of_the_cpu() {
    let Some(libraries) = libraries() else { return };
    let batches = Path::new(REFERENCE).with_file_name("batch2_no_long_skip");
    let reference = ["check", "--reference", batches.to_str().unwrap(), "--device", "cuda"];
    let operators = ["selftest", "--device", "cuda", "--precision", "f16", "--seed", "1"];
    for args in [&reference[..], &operators] {
        let settings = [("FPENET_VARIANTS", "products=blas,pairs=separate")];
        let run = libraries.fpenet(&settings, args);
        let stdout = run.succeeds();
        assert!(stdout.contains("PASS: "), "{stdout}");
    }
}

#[test]
fn photos_under_way_do_not_mix_whenever_the_gpu_does_its_work() {
    let Some(libraries) = libraries() else { return };
    let dir = workplace();
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let segment = |device: &str, out: &str, settings: &[(&str, &str)]| {
        let (photos, model, out) = (at("photos"), at("model.safetensors"), at(out));
        let args = ["segment", &photos, "--model", &model, "--out", &out, "--device", device];
        libraries.fpenet(settings, &args).succeeds();
        labels(Path::new(&out))
    };
    let expected = segment("emulated", "emulated", &[]);
    assert_eq!(expected.len(), 6);
    let mut distinct: Vec<&[u8]> = expected.iter().map(|(_, map)| map.as_slice()).collect();
    distinct.dedup();
    assert_eq!(distinct.len(), 6, "photos must differ in their labels");
    for order in ORDERS {
        for graphs in ["1", "0"] {
            let settings = [("FPENET_DRIVER_ORDER", order), ("FPENET_CUDA_GRAPHS", graphs)];
            let found = segment("cuda", &format!("{order}-{graphs}"), &settings);
            assert!(found == expected, "order {order}, graphs {graphs}");
        }
    }
}

/// Input and logits go through pinned memory in several pieces, some filled and emptied by other threads.
#[test]
fn large_arrays_arrive_whole_whenever_the_gpu_does_its_work() {
    let Some(libraries) = libraries() else { return };
    let dir = workplace();
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let shape = [1, 3, 256, 384];
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|i: usize| (i * 7919 % 4001) as f32 / 2000.0 - 1.0)
        .collect();
    fpenet::model::npy::write_f32(Path::new(&at("input.npy")), &shape, &values).unwrap();
    let run = |device: &str, settings: &[(&str, &str)]| {
        let (model, input, output) = (at("model.safetensors"), at("input.npy"), at("output.npy"));
        let args = ["run", "--model", &model, "--input", &input, "--output", &output];
        libraries.fpenet(settings, &[&args[..], &["--device", device]].concat()).succeeds();
        fs::read(output).unwrap()
    };
    let expected = run("emulated", &[]);
    assert!(expected.len() > 4 << 20);
    for order in ["late", "1"] {
        let log = at(&format!("log-{order}"));
        let settings = [("FPENET_DRIVER_ORDER", order), ("FPENET_DRIVER_LOG", &log)];
        assert!(run("cuda", &settings) == expected, "{order}");
        let log = fs::read_to_string(log).unwrap();
        let count = |start: &str| log.lines().filter(|line| line.starts_with(start)).count();
        let alone = std::thread::available_parallelism().unwrap().get() == 1;
        assert!(count("to device 524288") == 2 || alone, "{log}");
        assert!(count("to host 4194304") == 1, "{log}");
    }
}

/// A folder in CamVid's layout with six photos for training, three batches of two.
fn data(dir: &tempfile::TempDir) -> PathBuf {
    let data = dir.path().join("data");
    fs::create_dir_all(data.join("trainannot")).unwrap();
    fs::rename(dir.path().join("photos"), data.join("train")).unwrap();
    for i in 0..6u32 {
        let stripes = |x: u32, y: u32| image::Luma([((x / 8 + y / 8 + i) % 11) as u8]);
        let map = image::GrayImage::from_fn(48, 32, stripes);
        map.save(data.join(format!("trainannot/{i}.png"))).unwrap();
    }
    data
}

/// What a training run leaves is the same bits in every order, or something was not waited for.
#[test]
fn training_does_not_depend_on_when_the_gpu_does_its_work() {
    let Some(libraries) = libraries() else { return };
    let dir = workplace();
    let data = data(&dir);
    let run = |order: &str| {
        let out = dir.path().join(format!("run-{order}"));
        let line = "--device cuda --size 32x24 --batch 2 --p 1 --q 1 --epochs 1 --val-split none";
        let mut args = vec!["train", "--data", data.to_str().unwrap()];
        args.extend(["--out", out.to_str().unwrap()]);
        args.extend(line.split(' '));
        let run = libraries.fpenet(&[("FPENET_DRIVER_ORDER", order)], &args);
        assert_eq!(run.code, 0, "{}", run.stderr);
        fs::read(out.join("last.safetensors")).unwrap()
    };
    let expected = run("late");
    for order in ["early", "1"] {
        assert!(run(order) == expected, "{order}");
    }
}

/// In front of a GPU that has not begun yet, the host gets two whole steps ahead, and it waits for the device's
/// results at the end of the epoch only.
#[test]
fn training_steps_wait_for_nothing() {
    let Some(libraries) = libraries() else { return };
    let dir = workplace();
    let (data, out, log) = (data(&dir), dir.path().join("run"), dir.path().join("log"));
    let settings = [("FPENET_DRIVER_WORKS", "0"), ("FPENET_DRIVER_LOG", log.to_str().unwrap())];
    let line = "--device cuda --size 96x72 --batch 2 --p 1 --q 1 --epochs 2 --val-split none";
    for precision in ["f32", "f16"] {
        let _ = fs::remove_file(&log);
        let mut args = vec!["train", "--data", data.to_str().unwrap(), "--precision", precision];
        let out = out.with_extension(precision);
        args.extend(["--out", out.to_str().unwrap()]);
        args.extend(line.split(' '));
        let run = libraries.fpenet(&settings, &args);
        assert_eq!(run.code, 0, "{}", run.stderr);
        let log = fs::read_to_string(&log).unwrap();
        let lines: Vec<&str> = log.lines().collect();
        // Each step ends in Adam's two launches.
        let is_adam = |&line: &usize| lines[line] == "graph of 2 commands";
        let ends: Vec<usize> = (0..lines.len()).filter(is_adam).collect();
        let &[.., before, first, second, third] = ends.as_slice() else { panic!("{log}") };
        // The epoch before ends in reading losses and parameters: nothing is read after that.
        let read = lines[..third].iter().rposition(|line| *line == "synchronize").unwrap();
        let work = lines[before + 1..read].iter().any(|line| line.starts_with("graph of "));
        assert!(before < read && read < first && !work, "{precision}: {log}");
        let ahead = &lines[read..second];
        assert!(!ahead.contains(&"wait for event"), "{precision}: {ahead:?}");
    }
}

/// What the driver compiles is what is about to run: a single kernel to see that it can, those of a plan before it
/// runs, at the same time, and none twice or while a graph is recorded (which the stand-in would refuse).
#[test]
fn kernels_are_compiled_when_a_plan_wants_them_and_several_at_once() {
    let Some(libraries) = libraries() else { return };
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let run = |settings: &[(&str, &str)], line: &str| {
        let _ = fs::remove_file(&log);
        let works = [("FPENET_DRIVER_WORKS", "0"), ("FPENET_DRIVER_LOG", log.to_str().unwrap())];
        let args: Vec<&str> = line.split(' ').collect();
        let run = libraries.fpenet(&[&works[..], settings].concat(), &args);
        assert_eq!(run.code, 0, "{}", run.stderr);
        let log = fs::read_to_string(&log).unwrap();
        let lines: Vec<String> = log.lines().map(String::from).collect();
        (lines, run.stderr)
    };
    let modules = |log: &[String]| -> Vec<(String, usize)> {
        let found = log.iter().filter_map(|line| line.strip_prefix("module of "));
        let found = found.map(|line| line.trim_end_matches(" at once").split_once(", ").unwrap());
        found.map(|(name, at_once)| (name.to_string(), at_once.parse().unwrap())).collect()
    };
    for gpu in ["75", "90"] {
        let (log, _) = run(&[("FPENET_DRIVER_GPU", gpu)], "devices");
        assert_eq!(modules(&log).len(), 1, "{log:?}");
    }
    let bench = "bench --device cuda --size 64x32 --iterations 2 --precision f16";
    let (log, stderr) = run(&[("FPENET_DRIVER_COMPILES", "300")], bench);
    let all = modules(&log);
    let names: std::collections::HashSet<&String> = all.iter().map(|(name, _)| name).collect();
    assert!(names.len() == all.len() && (5..60).contains(&all.len()), "{all:?}");
    let cores = std::thread::available_parallelism().unwrap().get();
    assert_eq!(all.iter().map(|(_, at_once)| *at_once).max(), Some(cores.min(all.len() - 1)));
    // Nothing is left for later, and the user hears of it where it takes long.
    let last = log.iter().rposition(|line| line.starts_with("module of ")).unwrap();
    let first = log.iter().position(|line| line.starts_with("to device ")).unwrap();
    assert!(last < first, "{log:?}");
    let told = "note: compiling kernels for stand-in driver, no GPU, once per driver ...\n";
    assert!(stderr.matches(told).count() == 1 || all.len() < 4 * cores, "{stderr}");
    let (_, stderr) = run(&[], bench);
    assert!(!stderr.contains("compiling"), "{stderr}");
}

/// After warm-up: one launch of a graph per image, nothing reserved, whatever the driver does.
#[test]
fn a_warm_inference_is_one_graph_launch_and_reserves_nothing() {
    let Some(libraries) = libraries() else { return };
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let settings = [("FPENET_DRIVER_GPU", "90"), ("FPENET_DRIVER_LOG", log.to_str().unwrap())];
    let network = ["--p", "1", "--q", "1", "--size", "32x32", "--precision", "f16"];
    let runs = ["--iterations", "5", "--warmup", "3"];
    let args = [&["bench", "--device", "cuda"], &network[..], &runs[..]].concat();
    let run = libraries.fpenet(&settings, &args);
    let stdout = run.succeeds();
    assert!(stdout.contains("replayed as one CUDA graph"), "{stdout}");
    let log = fs::read_to_string(log).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    // Hopper's kernels are recorded with leave to start early.
    let captured = lines.iter().rposition(|line| line.starts_with("capture of ")).unwrap();
    assert!(lines[..captured].contains(&"dependent launch"), "{log}");
    let replays: Vec<usize> =
        (captured..lines.len()).filter(|&line| lines[line].starts_with("graph of ")).collect();
    // The last four of the measured ones, and what lies between them.
    let &[.., first, _, _, last] = replays.as_slice() else { panic!("{log}") };
    for line in &lines[first..=last] {
        let expected = ["graph of ", "to device ", "synchronize"];
        assert!(expected.iter().any(|start| line.starts_with(start)), "{line} in {log}");
    }
}

#[test]
fn what_the_driver_reports_reaches_the_user_as_one_line() {
    let Some(libraries) = libraries() else { return };
    let check = ["check", "--reference", REFERENCE, "--device", "cuda"];
    let fails = |settings: &[(&str, &str)], parts: &[&str]| {
        libraries.fpenet(settings, &check).fails(1, parts);
    };
    fails(&[("FPENET_DRIVER_CUDA", "12040")], &["supports CUDA 12.4", "PTX of CUDA", "update"]);
    fails(&[("FPENET_DRIVER_MEMORY", "500000")], &["out of memory", "bytes", "are free"]);
    fails(&[("FPENET_DRIVER_MEMORY", "4700000")], &["out of memory", "bytes", "are free"]);
    // Of several kernels that are not compiled it is always the same one that is named.
    let refused = ["kernels/conv3x3.cu (PTX for sm_75)", "INVALID_PTX", "ptxas fatal: refused"];
    fails(&[("FPENET_DRIVER_REFUSES", "conv3x3")], &refused);
    for _ in 0..5 {
        let refused = ["kernels/conv1x1.cu (PTX for sm_75)", "ptxas fatal: refused"];
        fails(&[("FPENET_DRIVER_REFUSES", "c")], &refused);
    }
    // A kernel that fails is reported by a later call; both ways of finding out which it was are named.
    let fault = ("FPENET_DRIVER_FAULT", "conv3x3_forward_f32");
    let hints = ["CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_LAUNCH_BLOCKING=1", "FPENET_CUDA_GRAPHS=0"];
    fails(&[fault], &hints);
    fails(&[fault, ("FPENET_DRIVER_ORDER", "early")], &["CUDA_ERROR_ILLEGAL_ADDRESS"]);
}

#[test]
fn a_driver_without_cublas_is_told_apart() {
    let Some(libraries) = libraries() else { return };
    let alone = tempfile::tempdir().unwrap();
    fs::copy(libraries.folder.join("libcuda.so.1"), alone.path().join("libcuda.so.1")).unwrap();
    let alone = Libraries { folder: alone.path().to_path_buf() };
    let run = alone.fpenet(&[], &["check", "--reference", REFERENCE, "--device", "cuda"]);
    run.fails(1, &["there is no cuBLAS", "pip install nvidia-cublas"]);
}
