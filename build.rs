//! Build-time choices: whether the trained weights are there to be put into the binary, and the
//! kernels for the emulated device.

#[path = "build/host_kernels.rs"]
mod host_kernels;

use std::path::Path;

const MODELS: &str = "models";
const BUNDLED: &str = "models/fpenet-camvid.safetensors";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    bundle_model();
    host_kernels::build();
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
