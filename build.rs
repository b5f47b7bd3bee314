//! Build-time choices: whether the trained weights are there to be put into the binary, and the
//! kernels, as PTX and for the emulated device. Why without the crate `cudaforge`: build/ptx.rs.

#[path = "build/host_kernels.rs"]
mod host_kernels;
#[path = "build/ptx.rs"]
mod ptx;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

const MODELS: &str = "models";
const REPORTS: &str = "benches/results";
const BUNDLED: &str = "models/fpenet-camvid.safetensors";

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    bundle_model();
    host_kernels::build();
    if let Err(error) = ptx::build().and_then(|()| kernel_report()) {
        for line in error.lines() {
            println!("cargo::error={line}");
        }
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Sets `cfg(bundled_model)` where the trained weights exist: a checkout without them still builds,
/// and asks for `--model` when it runs.
fn bundle_model() {
    println!("cargo:rustc-check-cfg=cfg(bundled_model)");
    // The folder, since a file that is missing would count as changed at every build.
    println!("cargo:rerun-if-changed={MODELS}");
    if Path::new(BUNDLED).is_file() {
        println!("cargo:rustc-cfg=bundled_model");
    } else {
        println!("cargo:warning={BUNDLED} is missing: the binary will need --model FILE");
    }
}

/// Puts the compiler's newest report on the kernels into the binary, for the cost model: registers per
/// thread decide how many blocks fit on a multiprocessor.
fn kernel_report() -> Result<(), String> {
    println!("cargo:rerun-if-changed={REPORTS}");
    let entries = fs::read_dir(REPORTS).into_iter().flatten();
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let is_report = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("kernel-report-") && name.ends_with(".md")
    };
    // Names end in the date.
    let newest = paths.filter(is_report).max();
    let text = newest.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("run me through cargo")?);
    let out = out.join("kernel-report.md");
    fs::write(&out, text).map_err(|error| format!("{}: {error}", out.display()))
}
