//! Compiles `kernels/*.cu` to PTX with nvcc, and embeds it: the table in `OUT_DIR/ptx.rs` is what
//! `src/backend/gpu/cuda.rs` loads. Without nvcc the table is empty and everything else builds.
//!
//! nvcc 13 targets compute_75 and newer. Where tools/install-nvcc.sh --sm70 was run, NVRTC 12.9
//! compiles everything for compute_70 as well, and the binary serves a TITAN V, too.
//!
//! Not candle's `cudaforge`: it gives a kernel file one architecture, by its name
//! (`with_compute_override("sm90_*.cu", 90)`) or from nvidia-smi, where a file here has up to three;
//! it knows nvcc alone. It would serve if every variant were a file of its own that includes the
//! plain one, without compute_70. What remains to be done is to run one command per file.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, thread};

/// Oldest architecture that the kernels are written for (TITAN V).
const OLDEST_ARCH: u32 = 70;
/// What NVRTC 12.9 compiles for.
const NVRTC_ARCH: u32 = 70;
/// Its version, as tools/install-nvcc.sh asks for it.
const NVRTC_VERSION: (u32, u32) = (12, 9);
/// Architecture of the Hopper variants.
const HOPPER: u32 = 90;
/// A kernel file with this call (kernels/common.cuh), or with a header that has it, has a Hopper
/// variant.
const HOPPER_MARK: &str = "wait_for_previous();";

/// An nvcc that was found, and what it can do.
struct Nvcc {
    path: PathBuf,
    /// As "13.0" in "release 13.0".
    version: (u32, u32),
    /// Virtual architectures, ascending.
    archs: Vec<u32>,
    /// Folder of NVRTC, where it works.
    nvrtc: Option<PathBuf>,
}

/// One PTX file to be made.
struct Job {
    source: PathBuf,
    name: String,
    arch: u32,
    out: PathBuf,
}

/// Compiles the kernels and writes the table.
///
/// # Errors
/// nvcc's own words for a kernel that does not compile, or what else went wrong.
pub fn build() -> Result<(), String> {
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "FPENET_CUDA_ARCH", "NVCC_CCBIN"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=kernels");

    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("run me through cargo")?);
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("run me through cargo")?);
    let kernels = files(&root.join("kernels"), "cu")?;
    let mut nvcc = if kernels.is_empty() { None } else { find_nvcc(&root)? };
    if let Some(nvcc) = &mut nvcc {
        nvcc.nvrtc = find_nvrtc(&root, nvcc);
    }
    let mut jobs = Vec::new();
    if let Some(nvcc) = &nvcc {
        println!("cargo::rerun-if-changed={}", nvcc.path.display());
        for source in &kernels {
            for arch in wanted_archs(nvcc, source)? {
                let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                let out = out.join(format!("{name}.{arch}.ptx"));
                jobs.push(Job { source: source.clone(), name, arch, out });
            }
        }
        compile(nvcc, &jobs, &headers(&root)?)?;
    } else if !kernels.is_empty() {
        println!(
            "cargo::warning=no nvcc found: --device cuda will not work in this build (to add it: \
             tools/install-nvcc.sh, or set NVCC or CUDA_HOME, then build again)"
        );
    }
    write_table(&out.join("ptx.rs"), nvcc.as_ref(), &jobs)
}

/// `NVCC`, then `CUDA_HOME` and `CUDA_PATH`, `PATH`, the usual place, and where
/// `tools/install-nvcc.sh` puts it (the script touches this file, so that cargo looks again).
fn find_nvcc(root: &Path) -> Result<Option<Nvcc>, String> {
    if let Some(path) = env::var_os("NVCC").filter(|path| !path.is_empty()) {
        return query(Path::new(&path)).map(Some).map_err(|error| format!("NVCC: {error}"));
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let mut candidates: Vec<PathBuf> = homes.map(|home| Path::new(&home).join("bin")).collect();
    candidates.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    candidates.push("/usr/local/cuda/bin".into());
    candidates.push(root.join("target/cuda-toolkit/bin"));
    let found = candidates.iter().map(|folder| folder.join("nvcc")).find(|path| path.is_file());
    found.map(|path| query(&path)).transpose()
}

/// Version and architectures of an nvcc.
fn query(path: &Path) -> Result<Nvcc, String> {
    let ask = |argument: &str| {
        let answer = Command::new(path).arg(argument).output();
        let answer = answer.map_err(|error| format!("cannot run {}: {error}", path.display()))?;
        Ok::<_, String>(String::from_utf8_lossy(&answer.stdout).into_owned())
    };
    let strange = |what: &str| format!("{}: cannot read its {what}", path.display());
    let text = ask("--version")?;
    let release = text.split("release ").nth(1).and_then(|rest| rest.split(',').next());
    let version = release.and_then(|release| {
        let (major, minor) = release.trim().split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    let text = ask("--list-gpu-arch")?;
    let numbers =
        text.lines().filter_map(|line| line.trim().strip_prefix("compute_")?.parse().ok());
    let mut archs: Vec<u32> = numbers.collect();
    archs.sort_unstable();
    if archs.is_empty() {
        return Err(strange("architectures (--list-gpu-arch)"));
    }
    let version = version.ok_or_else(|| strange("version (--version)"))?;
    Ok(Nvcc { path: path.into(), version, archs, nvrtc: None })
}

/// NVRTC in `target/cuda-toolkit/sm70`, for what nvcc no longer targets. It is a library without a
/// program: tools/nvrtc.py calls it.
fn find_nvrtc(root: &Path, nvcc: &Nvcc) -> Option<PathBuf> {
    let folder = root.join("target/cuda-toolkit/sm70");
    if nvcc.archs.contains(&NVRTC_ARCH) || !folder.join("lib/libnvrtc.so.12").is_file() {
        return None;
    }
    let python = Command::new("python3").arg("--version").output();
    if python.is_ok_and(|output| output.status.success()) {
        return Some(folder);
    }
    println!("cargo::warning=no kernels for sm_{NVRTC_ARCH} in this build: python3 is missing");
    None
}

/// The lowest architecture from compute_70 up, so that the driver can compile the PTX for any
/// newer card, compute_90 for a file with a Hopper variant, and compute_70 where NVRTC is there;
/// `FPENET_CUDA_ARCH` (for example `75,90`) overrides.
fn wanted_archs(nvcc: &Nvcc, source: &Path) -> Result<Vec<u32>, String> {
    let nvrtc = nvcc.nvrtc.is_some().then_some(NVRTC_ARCH);
    let known: Vec<u32> = nvrtc.into_iter().chain(nvcc.archs.iter().copied()).collect();
    if let Some(list) = env::var_os("FPENET_CUDA_ARCH").filter(|list| !list.is_empty()) {
        let list = list.to_string_lossy().into_owned();
        let arch = |item: &str| {
            let item = item.trim();
            let digits = item.strip_prefix("compute_").or_else(|| item.strip_prefix("sm_"));
            let arch = digits.unwrap_or(item).parse().ok().filter(|arch| known.contains(arch));
            arch.ok_or_else(|| {
                let path = nvcc.path.display();
                format!("FPENET_CUDA_ARCH: expected some of {known:?} ({path}), found {item:?}")
            })
        };
        return list.split(',').map(arch).collect();
    }
    let oldest = nvcc.archs.iter().copied().find(|arch| *arch >= OLDEST_ARCH);
    let oldest = oldest.ok_or_else(|| {
        format!("{}: targets nothing from compute_{OLDEST_ARCH} up", nvcc.path.display())
    })?;
    let hopper = known.contains(&HOPPER) && oldest < HOPPER && marked(source)?;
    Ok([nvrtc, Some(oldest), hopper.then_some(HOPPER)].into_iter().flatten().collect())
}

/// Whether a file or one of the kernels' headers that it includes has a Hopper variant.
fn marked(source: &Path) -> Result<bool, String> {
    let text = read(source)?;
    if text.contains(HOPPER_MARK) {
        return Ok(true);
    }
    let folder = source.parent().unwrap_or(Path::new("."));
    let included =
        text.lines().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next());
    let mut headers = included.filter(|name| name.ends_with(".cuh"));
    headers.try_fold(false, |found, name| Ok(found || marked(&folder.join(name))?))
}

/// Runs the jobs, as many at a time as cargo allows; the first error ends it.
fn compile(nvcc: &Nvcc, jobs: &[Job], headers: &str) -> Result<(), String> {
    let workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    let queue = Mutex::new(jobs.iter());
    let next = || queue.lock().ok()?.next();
    let work = || {
        while let Some(job) = next() {
            compile_one(nvcc, job, headers)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..workers.min(jobs.len())).map(|_| scope.spawn(work)).collect();
        let mut results = running.into_iter().map(|worker| worker.join());
        results.try_for_each(|result| result.map_err(|_| "a worker panicked".to_string())?)
    })
}

fn compile_one(nvcc: &Nvcc, job: &Job, headers: &str) -> Result<(), String> {
    let source = job.source.display();
    let (program, arguments) = command(nvcc, job);
    // What the PTX was made from, kept beside it: a change of one kernel costs one compilation.
    let key =
        format!("{program:?} {:?} {arguments:?}\n{headers}{}", nvcc.version, read(&job.source)?);
    let key_file = job.out.with_extension("key");
    if job.out.exists() && fs::read_to_string(&key_file).is_ok_and(|old| old == key) {
        return Ok(());
    }
    let _ = fs::remove_file(&key_file); // absent on the first build
    let result = Command::new(&program).args(&arguments).output();
    let result = result.map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    let words =
        [result.stderr, result.stdout].map(|text| String::from_utf8_lossy(&text).into_owned());
    let words = words.join("\n");
    let words = words.trim();
    if !result.status.success() {
        let path = program.display();
        return Err(format!("{source}: {path} failed for compute_{}:\n{words}", job.arch));
    }
    for line in words.lines() {
        println!("cargo::warning={line}");
    }
    fs::write(&key_file, key).map_err(|error| format!("{}: {error}", key_file.display()))
}

fn by_nvrtc(nvcc: &Nvcc, job: &Job) -> bool {
    nvcc.nvrtc.is_some() && job.arch == NVRTC_ARCH
}

/// The program that makes a job's PTX, and its arguments.
fn command(nvcc: &Nvcc, job: &Job) -> (PathBuf, Vec<OsString>) {
    let (source, out) = (job.source.clone(), job.out.clone());
    if let Some(folder) = nvcc.nvrtc.as_ref().filter(|_| by_nvrtc(nvcc, job)) {
        let mut arguments =
            ["tools/nvrtc.py", "--arch", "70", "--toolkit"].map(OsString::from).to_vec();
        arguments.extend([folder.clone(), source, out].map(OsString::from));
        return ("python3".into(), arguments);
    }
    let mut arguments: Vec<OsString> =
        vec!["--ptx".into(), format!("-arch=compute_{}", job.arch).into()];
    arguments.extend(["-std=c++17", "-O3", "-o"].map(OsString::from));
    arguments.extend([out, source].map(OsString::from));
    (nvcc.path.clone(), arguments)
}

fn write_table(path: &Path, nvcc: Option<&Nvcc>, jobs: &[Job]) -> Result<(), String> {
    let mut text = String::from("pub(super) static MODULES: &[Module] = &[\n");
    for (nvcc, job) in nvcc.into_iter().flat_map(|nvcc| jobs.iter().map(move |job| (nvcc, job))) {
        let Job { name, arch, out, .. } = job;
        let cuda = if by_nvrtc(nvcc, job) { NVRTC_VERSION } else { nvcc.version };
        let ptx = format!("include_str!({:?})", out.display().to_string());
        let fields = format!("name: {name:?}, arch: {arch}, cuda: {cuda:?}, ptx: {ptx}");
        let _ = writeln!(text, "    Module {{ {fields} }},");
    }
    let _ = writeln!(text, "];");
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// All headers of the kernels, one after the other.
fn headers(root: &Path) -> Result<String, String> {
    files(&root.join("kernels"), "cuh")?.iter().map(|header| read(header)).collect()
}

/// The files of a folder with an extension, sorted; none where there is no folder.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut paths: Vec<_> =
        paths.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}
