//! Build-time choices: whether the trained weights are there to be put into the binary, and the
//! kernels, as PTX and for the emulated device.

#[path = "build/host_kernels.rs"]
mod host_kernels;
#[path = "build/ptx.rs"]
mod ptx;

use std::path::Path;
use std::process::ExitCode;

const MODELS: &str = "models";
const BUNDLED: &str = "models/fpenet-camvid.safetensors";

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    bundle_model();
    host_kernels::build();
    if let Err(error) = ptx::build() {
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
