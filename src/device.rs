//! Which device runs the work: the choices of the command line, and how each is opened.

use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::backend::gpu::choice::Cache;
use crate::backend::gpu::cuda::CudaDevice;
use crate::backend::gpu::{GpuBackend, GpuDevice};
use crate::error::{Error, Result};

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DeviceChoice {
    /// CUDA where it works, else the CPU.
    #[default]
    Auto,
    /// The CPU backend.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// The CUDA kernels, executed on the CPU: slow, for tests.
    Emulated,
}

/// `--precision`: what activations and weights are stored in; sums are f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Precision {
    /// Single precision.
    #[default]
    F32,
    /// Half precision, on devices that have it.
    F16,
}

impl Precision {
    /// `f32` or `f16`, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::F16 => "f16",
        }
    }
}

/// What `fpenet devices` says about one device.
#[derive(Debug, Clone, serde::Serialize)]
pub struct DeviceReport {
    /// As on the command line: `cpu`, `cuda`, `emulated`.
    pub kind: &'static str,
    /// Device in words; empty where there is none.
    pub name: String,
    /// Whether work can run on it.
    pub available: bool,
    /// What is missing and how to get it, or other remarks.
    pub note: String,
}

/// Opens a device. `threads` is the number of CPU threads, by default one per core.
///
/// # Errors
/// [`Error::Usage`] for a combination that does not exist, [`Error::Device`] where the device
/// does not work. [`DeviceChoice::Auto`] falls back to the CPU and does not fail for want of a GPU.
pub fn open(
    device: DeviceChoice,
    precision: Precision,
    threads: Option<usize>,
) -> Result<Box<dyn Backend>> {
    open_with(device, precision, threads, None)
}

/// [`open`](fn@open), with the variants of a GPU's kernels chosen by what `fpenet tune` measured on the card
/// for the shape at hand, or else by the cost model.
///
/// # Errors
/// Those of [`open`](fn@open).
pub fn open_tuned(
    device: DeviceChoice,
    precision: Precision,
    threads: Option<usize>,
) -> Result<Box<dyn Backend>> {
    // Without a cache directory the folder is one that cannot exist: the model chooses.
    let cache = Cache::of_user().unwrap_or_else(|| Cache::at("/dev/null/fpenet"));
    open_with(device, precision, threads, Some(cache))
}

fn open_with(
    device: DeviceChoice,
    precision: Precision,
    threads: Option<usize>,
    cache: Option<Cache>,
) -> Result<Box<dyn Backend>> {
    match device {
        DeviceChoice::Auto => open_cuda(precision, cache).or_else(|_| open_cpu(precision, threads)),
        DeviceChoice::Cpu => open_cpu(precision, threads),
        DeviceChoice::Cuda => open_cuda(precision, cache),
        DeviceChoice::Emulated => open_emulated(precision, cache),
    }
}

/// Every kind of device with its state, those that do not work included.
pub fn list() -> Vec<DeviceReport> {
    let report = |kind, opened: Result<Box<dyn Backend>>| match opened {
        Ok(backend) => {
            DeviceReport { kind, name: backend.describe(), available: true, note: String::new() }
        }
        Err(error) => {
            // The report names the kind already.
            let note = match error {
                Error::Device { problem, remedy, .. } => format!("{problem}; {remedy}"),
                other => other.to_string(),
            };
            DeviceReport { kind, name: String::new(), available: false, note }
        }
    };
    vec![
        report("cpu", open(DeviceChoice::Cpu, Precision::F32, None)),
        report("cuda", open(DeviceChoice::Cuda, Precision::F32, None)),
        report("emulated", open(DeviceChoice::Emulated, Precision::F32, None)),
    ]
}

fn open_cpu(precision: Precision, threads: Option<usize>) -> Result<Box<dyn Backend>> {
    match precision {
        Precision::F32 => Ok(Box::new(CpuBackend::new(threads)?)),
        Precision::F16 => Err(Error::Usage(
            "--precision f16: expected a cuda or emulated device, found cpu, which computes in f32"
                .into(),
        )),
    }
}

#[cfg(emulated_kernels)]
fn open_emulated(precision: Precision, cache: Option<Cache>) -> Result<Box<dyn Backend>> {
    let device = crate::backend::gpu::emulated::Emulated::default();
    Ok(with_cache(GpuBackend::new(device, precision), cache))
}

#[cfg(not(emulated_kernels))]
fn open_emulated(_: Precision, _: Option<Cache>) -> Result<Box<dyn Backend>> {
    Err(Error::Device {
        device: "emulated".into(),
        problem: "this build does not hold the emulated kernels".into(),
        remedy: "build on x86-64 Linux with g++ installed, or use --device cpu".into(),
    })
}

fn open_cuda(precision: Precision, cache: Option<Cache>) -> Result<Box<dyn Backend>> {
    Ok(with_cache(GpuBackend::new(CudaDevice::open()?, precision), cache))
}

fn with_cache<D: GpuDevice + 'static>(
    backend: GpuBackend<D>,
    cache: Option<Cache>,
) -> Box<dyn Backend> {
    match cache {
        Some(cache) => Box::new(backend.with_cache(cache)),
        None => Box::new(backend),
    }
}
