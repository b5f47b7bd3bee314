//! Compiles `kernels/*.cu` with the host's C++ compiler for `--device emulated`, and writes the table
//! by which the kernels are found.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

const FLAGS: [&str; 4] = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wno-unknown-pragmas"];

/// Sets `cfg(emulated_kernels)` and links the kernels where a C++ compiler is there. Without one the
/// build goes on, and `--device emulated` says what is missing.
pub fn build() {
    println!("cargo:rustc-check-cfg=cfg(emulated_kernels)");
    println!("cargo:rerun-if-changed=kernels");
    // Fibers are switched by a few lines of x86-64 assembly (kernels/host/scheduler.cpp).
    let env = |key: &str| std::env::var(key).unwrap_or_default();
    if env("CARGO_CFG_TARGET_ARCH") != "x86_64" || env("CARGO_CFG_TARGET_OS") != "linux" {
        return;
    }
    match compile(Path::new(&env("OUT_DIR"))) {
        Ok(()) => println!("cargo:rustc-cfg=emulated_kernels"),
        Err(problem) => println!(
            "cargo:warning=no emulated device in this build: {}; install g++ to have it",
            problem.replace('\n', " ")
        ),
    }
}

fn compile(out: &Path) -> Result<(), String> {
    let kernels = Path::new("kernels").canonicalize().map_err(|e| format!("kernels: {e}"))?;
    let mut sources = Vec::new();
    for folder in [&kernels, &kernels.join("host")] {
        let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        sources.extend(paths.filter(|path| path.extension().is_some_and(|e| e == "cu")));
    }
    sources.sort();

    let mut build = cc::Build::new();
    build.cpp(true).warnings(false).debug(false).opt_level(2).define("FPENET_HOST", None);
    build.include(&kernels).cpp_link_stdlib(None);
    for flag in FLAGS {
        build.flag(flag);
    }
    let mut registry = String::from("#include \"host/cuda_host.h\"\n");
    let mut tables = String::new();
    for source in &sources {
        let text = fs::read_to_string(source).map_err(|e| format!("{}: {e}", source.display()))?;
        let stem = source.file_stem().unwrap_or_default().to_string_lossy();
        let mut unit = format!("#include \"{}\"\n", source.display());
        let _ = writeln!(unit, "extern const fpenet_host::KernelEntry table_{stem}[];");
        let _ = writeln!(unit, "const fpenet_host::KernelEntry table_{stem}[] = {{");
        for name in entry_points(&text) {
            let kernel = format!("fpenet_host::Kernel<{name}>");
            let _ = writeln!(
                unit,
                "{{\"{name}\", {kernel}::signature, {kernel}::sizes, {kernel}::invoke}},"
            );
        }
        unit.push_str("{nullptr, nullptr, nullptr, nullptr}};\n");
        let path = out.join(format!("host_{stem}.cpp"));
        fs::write(&path, unit).map_err(|e| format!("{}: {e}", path.display()))?;
        build.file(path);
        let _ = writeln!(registry, "extern const fpenet_host::KernelEntry table_{stem}[];");
        let _ = write!(tables, "table_{stem}, ");
    }
    let _ = writeln!(
        registry,
        "extern \"C\" const fpenet_host::KernelEntry* fpenet_host_kernel(const char* name) {{\n\
         for (const fpenet_host::KernelEntry* table : {{{tables}}}) {{\n\
         for (; table->name; ++table) if (!std::strcmp(table->name, name)) return table;\n\
         }}\nreturn nullptr;\n}}"
    );
    let path = out.join("host_registry.cpp");
    fs::write(&path, registry).map_err(|e| format!("{}: {e}", path.display()))?;
    build.file(path).file(kernels.join("host/scheduler.cpp"));
    build.try_compile("fpenet_host_kernels").map_err(|e| e.to_string())?;
    link_standard_library(build.get_compiler().path());
    Ok(())
}

/// Links the C++ standard library statically where the compiler has it so: the binary should start
/// on machines without it.
fn link_standard_library(compiler: &Path) {
    let output = Command::new(compiler).arg("-print-file-name=libstdc++.a").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string());
    // A compiler without the file answers with its bare name.
    match text.as_deref().map(Path::new) {
        Ok(path) if path.is_absolute() && path.is_file() => {
            let folder = path.parent().unwrap_or(path);
            println!("cargo:rustc-link-search=native={}", folder.display());
            println!("cargo:rustc-link-lib=static:-bundle=stdc++");
        }
        _ => println!("cargo:rustc-link-lib=stdc++"),
    }
}

/// Names of the `extern "C" __global__` functions of a source file.
fn entry_points(source: &str) -> Vec<&str> {
    let after = source.split("extern \"C\" __global__").skip(1);
    after
        .filter_map(|text| {
            let mut text = text.trim_start().strip_prefix("void")?.trim_start();
            if let Some(bounds) = text.strip_prefix("__launch_bounds__") {
                text = bounds.split_once(')')?.1.trim_start();
            }
            Some(text.split_once('(')?.0.trim())
        })
        .collect()
}
