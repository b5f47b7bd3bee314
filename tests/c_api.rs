//! The C interface: the header compiles as C and C++, the example runs, and the functions keep
//! their promises when they are called wrongly.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;

use fpenet::capi::*;
use fpenet::{Model, ModelConfig};

const OK: c_int = Status::Ok as c_int;
const FAILED: c_int = Status::Failed as c_int;
const USAGE: c_int = Status::Usage as c_int;

fn model(folder: &Path) -> PathBuf {
    let config = ModelConfig { classes: 5, p: 1, q: 1, ..Default::default() };
    let path = folder.join("m.safetensors");
    Model::init(config, 3).unwrap().save(&path).unwrap();
    path
}

fn c(text: impl AsRef<Path>) -> CString {
    CString::new(text.as_ref().to_str().unwrap()).unwrap()
}

fn last_error() -> String {
    unsafe { CStr::from_ptr(fpenet_last_error()) }.to_str().unwrap().to_string()
}

/// A frame of stripes with rows `stride` bytes apart.
fn frame(width: usize, height: usize, stride: usize) -> Vec<u8> {
    let mut rgb = vec![255; stride * height];
    for y in 0..height {
        for x in 0..width {
            let pixel = [(9 * x) as u8, (7 * y) as u8, (60 * (x / 8)) as u8];
            rgb[y * stride + 3 * x..][..3].copy_from_slice(&pixel);
        }
    }
    rgb
}

fn create(model: &Path, size: (c_int, c_int), device: &str) -> (c_int, *mut Engine) {
    let mut engine = ptr::dangling_mut();
    let (model, device) = (c(model), CString::new(device).unwrap());
    let code =
        unsafe { fpenet_create(model.as_ptr(), size.0, size.1, device.as_ptr(), &raw mut engine) };
    (code, engine)
}

#[test]
fn strides_and_threads_do_not_change_the_labels() {
    let folder = tempfile::tempdir().unwrap();
    let (code, engine) = create(&model(folder.path()), (0, 0), "cpu");
    assert_eq!(code, OK, "{}", last_error());
    let (w, h) = (37, 21);
    let run = |engine, stride: usize, out: usize| -> Vec<u8> {
        let rgb = frame(w, h, stride.max(3 * w));
        let mut labels = vec![99; out.max(w) * h];
        let (rgb, to) = (rgb.as_ptr(), labels.as_mut_ptr());
        let code = unsafe { fpenet_run(engine, rgb, w as c_int, h as c_int, stride, to, out) };
        assert_eq!(code, OK, "{}", last_error());
        labels
    };
    let tight = run(engine, 0, 0);
    assert!(tight.iter().all(|&label| label < 5));
    let padded = run(engine, 3 * w + 13, w + 5);
    for (row, padded) in tight.chunks(w).zip(padded.chunks(w + 5)) {
        assert_eq!(row, &padded[..w]);
        assert_eq!(padded[w..], [99; 5], "gaps between rows are left alone");
    }
    let address = engine as usize;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(run(address as *mut Engine, 0, 0), tight));
        }
    });
    unsafe { fpenet_destroy(engine) };
}

#[test]
fn classes_have_names_and_colours() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let model = Model::load(&path).unwrap();
    let (_, engine) = create(&path, (32, 16), "cpu");
    unsafe {
        assert_eq!(fpenet_class_count(engine), 5);
        for (i, name) in model.classes.iter().enumerate() {
            let found = CStr::from_ptr(fpenet_class_name(engine, i as c_int));
            assert_eq!(found.to_str().unwrap(), name);
            let mut rgb = [0; 3];
            assert_eq!(fpenet_class_colour(engine, i as c_int, rgb.as_mut_ptr()), OK);
            assert_eq!(rgb, model.palette[i]);
        }
        for index in [-1, 5, c_int::MAX] {
            assert!(fpenet_class_name(engine, index).is_null());
            assert_eq!(fpenet_class_colour(engine, index, [0; 3].as_mut_ptr()), USAGE);
        }
        assert_eq!(fpenet_class_count(ptr::null()), 0);
        assert!(fpenet_class_name(ptr::null(), 0).is_null());
        fpenet_destroy(engine);
        fpenet_destroy(ptr::null_mut());
        let version = CStr::from_ptr(fpenet_version()).to_str().unwrap();
        assert_eq!(version, env!("CARGO_PKG_VERSION"));
    }
}

#[test]
fn wrong_calls_return_codes_and_texts() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let cases = [
        (Path::new("/no/such/file"), (0, 0), "cpu", FAILED, "/no/such/file: cannot read"),
        (&path, (0, 0), "abacus", USAGE, "found \"abacus\""),
        (&path, (8, 8), "cpu", USAGE, "found 8x8"),
        (&path, (-1, 16), "cpu", USAGE, "-1x16"),
        (&path, (0, 16), "cpu", USAGE, "0x16"),
    ];
    for (model, size, device, expected, text) in cases {
        let (code, engine) = create(model, size, device);
        assert_eq!(code, expected, "{}", last_error());
        assert!(engine.is_null() && last_error().contains(text), "{}", last_error());
    }
    let not_utf8 = [0xffu8, 0];
    let mut engine = ptr::null_mut();
    unsafe {
        let name = not_utf8.as_ptr().cast::<c_char>();
        assert_eq!(fpenet_create(name, 0, 0, ptr::null(), &raw mut engine), USAGE);
        assert_eq!(fpenet_create(ptr::null(), 0, 0, ptr::null(), ptr::null_mut()), USAGE);
    }

    let (_, engine) = create(&path, (0, 0), "cpu");
    let (rgb, mut labels) = (frame(20, 20, 60), vec![7; 400]);
    let mut run = |engine, rgb, (w, h), strides: (usize, usize)| unsafe {
        fpenet_run(engine, rgb, w, h, strides.0, labels.as_mut_ptr(), strides.1)
    };
    assert_eq!(run(ptr::null_mut(), rgb.as_ptr(), (20, 20), (0, 0)), USAGE);
    assert_eq!(run(engine, ptr::null(), (20, 20), (0, 0)), USAGE);
    for size in [(0, 20), (20, -3), (40000, 20)] {
        assert_eq!(run(engine, rgb.as_ptr(), size, (0, 0)), USAGE);
        assert!(last_error().contains("expected sides from 1 to 32768"), "{}", last_error());
    }
    assert_eq!(run(engine, rgb.as_ptr(), (20, 20), (59, 0)), USAGE);
    assert!(last_error().contains("rgb_stride: expected 0 or at least 60, found 59"));
    assert_eq!(run(engine, rgb.as_ptr(), (20, 20), (0, 19)), USAGE);
    assert_eq!(labels, vec![7; 400], "a failure leaves the labels as they were");
    // Errors are the thread's own.
    assert_eq!(std::thread::spawn(last_error).join().unwrap(), "");
    unsafe { fpenet_destroy(engine) };
}

/// A compiler by its usual name or by what the environment says; none where there is none.
fn compiler(name: &str, variable: &str) -> Option<String> {
    let name = std::env::var(variable).unwrap_or_else(|_| name.to_string());
    let found = Command::new(&name).arg("--version").output().is_ok();
    if !found {
        eprintln!("skipped: no compiler ({name}); install one or set {variable}");
    }
    found.then_some(name)
}

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

#[test]
fn the_header_is_valid_c99_and_cpp() {
    let header = Path::new(ROOT).join("include/fpenet.h");
    let strict = ["-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"];
    for (name, variable, language) in
        [("cc", "CC", ["-xc", "-std=c99"]), ("c++", "CXX", ["-xc++", "-std=c++11"])]
    {
        let Some(compiler) = compiler(name, variable) else { continue };
        let output =
            Command::new(compiler).args(strict).args(language).arg(&header).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// The shared library that Cargo built with this test.
fn library() -> PathBuf {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_path_buf();
    let name = format!("{}fpenet{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let places = [deps.join(&name), deps.parent().unwrap().join(&name)];
    let found = places.iter().find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("expected {name} in one of {places:?}")).clone()
}

#[cfg(unix)]
#[test]
fn the_c_example_gives_the_labels_of_the_library() {
    let Some(compiler) = compiler("cc", "CC") else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let library = library();
    let libraries = library.parent().unwrap().display();
    let output = Command::new(compiler)
        .args(["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"])
        .arg(format!("-I{ROOT}/include"))
        .arg(format!("{ROOT}/examples/c/segment.c"))
        .arg("-o")
        .arg(at("segment"))
        .args([format!("-L{libraries}"), "-lfpenet".into(), format!("-Wl,-rpath,{libraries}")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let path = model(folder.path());
    let (w, h) = (45, 30);
    let rgb = frame(w, h, 3 * w);
    let mut ppm = format!("P6 {w} {h} 255\n").into_bytes();
    ppm.extend(&rgb);
    std::fs::write(at("photo.ppm"), ppm).unwrap();
    let run = |args: &[&Path]| Command::new(at("segment")).args(args).output().unwrap();
    let output = run(&[&at("photo.ppm"), &at("labels.pgm"), &path]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8(output.stdout).unwrap().contains(" %  class "));

    let (_, engine) = create(&path, (0, 0), "auto");
    let mut labels = vec![0; w * h];
    let to = labels.as_mut_ptr();
    let code = unsafe { fpenet_run(engine, rgb.as_ptr(), w as c_int, h as c_int, 0, to, 0) };
    assert_eq!(code, OK);
    unsafe { fpenet_destroy(engine) };
    let pgm = std::fs::read(at("labels.pgm")).unwrap();
    assert_eq!(pgm.strip_prefix(b"P5\n45 30\n255\n".as_slice()), Some(labels.as_slice()));

    let output = run(&[&at("photo.ppm"), &at("labels.pgm"), &at("none")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("none: cannot read"));
}
