//! The C interface, `include/fpenet.h`: create an engine, run it on RGB buffers, destroy it.
//!
//! Nothing unwinds into C: a panic becomes [`Status::Internal`]. Every failure leaves a text that
//! `fpenet_last_error` gives to the thread that caused it.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use clap::ValueEnum;
use image::{GrayImage, RgbImage};

use crate::bundled;
use crate::device::{DeviceChoice, Precision};
use crate::error::{Error, Result};
use crate::graph::MAX_SIDE;
use crate::model::Model;
use crate::segment::input::{check_memory, check_size, network_size, resize};
use crate::segment::{Segmenter, Settings};

/// What every function returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub enum Status {
    /// It worked.
    Ok = 0,
    /// The work failed: a file, a device, memory.
    Failed = 1,
    /// The call makes no sense as given.
    Usage = 2,
    /// A defect of this library.
    Internal = 3,
}

/// A model on a device. C sees a pointer only.
pub struct Engine {
    running: Mutex<Running>,
    names: Vec<CString>,
    palette: Vec<[u8; 3]>,
}

/// What a call to run changes. The segmenter borrows the model, so it is dropped before it.
struct Running {
    segmenter: Segmenter<'static>,
    /// Kept for the segmenter.
    _model: Owned,
    /// Size of the network, where it is fixed.
    size: Option<(usize, usize)>,
    photo: RgbImage,
    labels: GrayImage,
}

/// A model at a fixed address that goes with the value.
struct Owned(*mut Model);

// SAFETY: the pointer is the only one that owns the model, and a model may be sent.
unsafe impl Send for Owned {}

impl Owned {
    fn new(model: Model) -> Self {
        Owned(Box::into_raw(Box::new(model)))
    }

    /// # Safety
    /// The reference must not be used after `self` is dropped.
    unsafe fn get(&self) -> &'static Model {
        // SAFETY: the pointer is valid until the drop, and nothing writes through it.
        unsafe { &*self.0 }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: it came from a box, and `Owned::get` promised that nobody looks any more.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs `work`; keeps its error's text and returns its code.
fn guarded(work: impl FnOnce() -> Result<()>) -> c_int {
    let status = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return Status::Ok as c_int,
        Ok(Err(error)) => {
            set_error(&error.to_string());
            if error.exit_code() == 2 { Status::Usage } else { Status::Failed }
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
            set_error(&format!("internal error: {text}"));
            Status::Internal
        }
    };
    status as c_int
}

fn set_error(text: &str) {
    let line = text.replace(['\0', '\n'], " ");
    LAST_ERROR.with_borrow_mut(|last| *last = CString::new(line).unwrap_or_default());
}

fn usage(text: impl Into<String>) -> Error {
    Error::Usage(text.into())
}

/// # Safety
/// `text` is null or ends with a zero byte.
unsafe fn string<'a>(text: *const c_char, name: &str) -> Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: as promised.
    let text = unsafe { CStr::from_ptr(text) };
    let text = text.to_str().map_err(|_| usage(format!("{name}: expected UTF-8")))?;
    Ok(Some(text))
}

/// Creates an engine; see `include/fpenet.h`.
///
/// # Safety
/// `model` and `device` are null or zero-terminated; `engine` points to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fpenet_create(
    model: *const c_char,
    width: c_int,
    height: c_int,
    device: *const c_char,
    engine: *mut *mut Engine,
) -> c_int {
    guarded(|| {
        if engine.is_null() {
            return Err(usage("engine: expected room for a pointer, found NULL"));
        }
        // SAFETY: as promised. An engine that could not be made is NULL.
        unsafe { *engine = ptr::null_mut() };
        // SAFETY: as promised.
        let (model, device) = unsafe { (string(model, "model")?, string(device, "device")?) };
        let model = match model {
            Some(path) => Model::load(Path::new(path))?,
            None => bundled::model()?,
        };
        let device = match device {
            Some(name) => DeviceChoice::from_str(name, false).map_err(|_| {
                usage(format!("device: expected auto, cpu, cuda or emulated, found \"{name}\""))
            })?,
            None => DeviceChoice::Auto,
        };
        let made = Box::new(Engine::new(model, (width, height), device)?);
        // SAFETY: as promised.
        unsafe { *engine = Box::into_raw(made) };
        Ok(())
    })
}

impl Engine {
    fn new(model: Model, (width, height): (c_int, c_int), device: DeviceChoice) -> Result<Self> {
        let size = match (usize::try_from(width), usize::try_from(height)) {
            (Ok(0), Ok(0)) => None,
            (Ok(width), Ok(height)) => {
                check_size((width, height))?;
                Some((width, height))
            }
            _ => return Err(usage(format!("size: expected pixels, found {width}x{height}"))),
        };
        let name = |name: &String| CString::new(name.replace('\0', " ")).unwrap_or_default();
        let names = model.classes.iter().map(name).collect();
        let palette = model.palette.clone();
        let model = Owned::new(model);
        let settings =
            Settings { device, precision: Precision::F32, threads: None, expanded: None };
        // SAFETY: the segmenter stands before the model in `Running`, and is dropped first.
        let mut segmenter = Segmenter::new(unsafe { model.get() }, settings)?;
        if let Some((width, height)) = size {
            let photo = (width as u32, height as u32);
            let network = network_size(photo, size, None);
            check_memory(network)?;
            segmenter.prepare(network, photo)?;
        }
        let (photo, labels) = Default::default();
        let running = Running { segmenter, _model: model, size, photo, labels };
        Ok(Engine { running: Mutex::new(running), names, palette })
    }
}

/// Labels one frame; see `include/fpenet.h`.
///
/// # Safety
/// `engine` came from `fpenet_create` and is not destroyed; `rgb` and `labels` point to `height`
/// rows of their stride, the last one at least as long as its pixels.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fpenet_run(
    engine: *mut Engine,
    rgb: *const u8,
    width: c_int,
    height: c_int,
    rgb_stride: usize,
    labels: *mut u8,
    labels_stride: usize,
) -> c_int {
    guarded(|| {
        // SAFETY: as promised.
        let engine = unsafe { engine.as_ref() }.ok_or_else(|| usage("engine: found NULL"))?;
        if rgb.is_null() || labels.is_null() {
            return Err(usage("rgb and labels: expected buffers, found NULL"));
        }
        let side = |side: c_int| usize::try_from(side).ok().filter(|s| (1..=MAX_SIDE).contains(s));
        let (Some(w), Some(h)) = (side(width), side(height)) else {
            let text =
                format!("frame: expected sides from 1 to {MAX_SIDE}, found {width}x{height}");
            return Err(usage(text));
        };
        let stride = |name: &str, given: usize, least: usize| match given {
            0 => Ok(least),
            given if given >= least => Ok(given),
            given => Err(usage(format!("{name}: expected 0 or at least {least}, found {given}"))),
        };
        let rgb_stride = stride("rgb_stride", rgb_stride, 3 * w)?;
        let labels_stride = stride("labels_stride", labels_stride, w)?;

        // A panic in an earlier call leaves nothing half done that this one reads.
        let mut running = engine.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.resize(w as u32, h as u32);
        for (y, row) in running.photo.chunks_exact_mut(3 * w).enumerate() {
            // SAFETY: as promised, the row is there.
            unsafe { ptr::copy_nonoverlapping(rgb.add(y * rgb_stride), row.as_mut_ptr(), 3 * w) };
        }
        running.run()?;
        for (y, row) in running.labels.chunks_exact(w).enumerate() {
            // SAFETY: as promised, the row is there.
            unsafe { ptr::copy_nonoverlapping(row.as_ptr(), labels.add(y * labels_stride), w) };
        }
        Ok(())
    })
}

impl Running {
    fn resize(&mut self, width: u32, height: u32) {
        if self.photo.dimensions() != (width, height) {
            self.photo = RgbImage::new(width, height);
            self.labels = GrayImage::new(width, height);
        }
    }

    /// Labels of `photo`.
    fn run(&mut self) -> Result<()> {
        let model = self.segmenter.model();
        let network = network_size(self.photo.dimensions(), self.size, model.train_size);
        let photo = self.photo.dimensions();
        check_memory(network)?;
        self.segmenter.prepare(network, photo)?;
        if photo == (network.width as u32, network.height as u32) {
            self.segmenter.submit(&self.photo, network, photo)?;
        } else {
            let resized = resize(&self.photo, network.width, network.height)?;
            self.segmenter.submit(&resized, network, photo)?;
        }
        self.segmenter.collect_into(&mut self.labels)
    }
}

/// Number of classes, 0 without an engine.
///
/// # Safety
/// `engine` is null or came from `fpenet_create` and is not destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fpenet_class_count(engine: *const Engine) -> c_int {
    // SAFETY: as promised.
    unsafe { engine.as_ref() }.map_or(0, |engine| engine.names.len() as c_int)
}

/// Name of a class, which lives as long as the engine; null for an index out of range.
///
/// # Safety
/// `engine` is null or came from `fpenet_create` and is not destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fpenet_class_name(engine: *const Engine, index: c_int) -> *const c_char {
    // SAFETY: as promised.
    let engine = unsafe { engine.as_ref() };
    let index = usize::try_from(index).ok();
    let name = engine.zip(index).and_then(|(engine, index)| engine.names.get(index));
    name.map_or(ptr::null(), |name| name.as_ptr())
}

/// Colour of a class as 3 bytes RGB.
///
/// # Safety
/// `engine` is null or came from `fpenet_create` and is not destroyed; `rgb` is null or has room
/// for 3 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fpenet_class_colour(
    engine: *const Engine,
    index: c_int,
    rgb: *mut u8,
) -> c_int {
    guarded(|| {
        // SAFETY: as promised.
        let engine = unsafe { engine.as_ref() }.ok_or_else(|| usage("engine: found NULL"))?;
        let colour = usize::try_from(index).ok().and_then(|index| engine.palette.get(index));
        let colour = colour.ok_or_else(|| {
            usage(format!("class: expected 0 to {}, found {index}", engine.palette.len() - 1))
        })?;
        if rgb.is_null() {
            return Err(usage("rgb: expected room for 3 bytes, found NULL"));
        }
        // SAFETY: as promised.
        unsafe { ptr::copy_nonoverlapping(colour.as_ptr(), rgb, colour.len()) };
        Ok(())
    })
}

/// Text of this thread's last failure, valid until its next call; empty without one.
#[unsafe(no_mangle)]
pub extern "C" fn fpenet_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|last| last.as_ptr())
}

/// Version of the library.
#[unsafe(no_mangle)]
pub extern "C" fn fpenet_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => panic!("the version holds no zero byte"),
        };
    VERSION.as_ptr()
}

/// Frees an engine; null is fine.
///
/// # Safety
/// `engine` is null or came from `fpenet_create`, and is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fpenet_destroy(engine: *mut Engine) {
    if !engine.is_null() {
        // SAFETY: as promised. A panic while freeing has nobody to tell.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(unsafe { Box::from_raw(engine) })));
    }
}
