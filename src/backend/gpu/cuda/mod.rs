//! A CUDA GPU as a [`GpuDevice`]: driver API and cuBLAS through cudarc, both opened at run time.
//!
//! All commands run in order on one stream; copies that may overlap with them have two of their own
//! (`lanes.rs`). A sequence that is asked for again is captured into a
//! CUDA graph and replayed: one launch instead of hundreds. `CUDA_VISIBLE_DEVICES` chooses the
//! GPU; `FPENET_CUDA_GRAPHS=0` launches every command by itself unless the caller decides
//! ([`GpuDevice::use_graphs`]).

mod blas;
mod events;
mod helpers;
mod lanes;
mod modules;
mod probe;
mod transfer;

use std::collections::HashMap;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::result::{self, DriverError, occupancy};
use cudarc::driver::sys::{
    self, CUdevice_attribute, CUdeviceptr, CUfunction, CUgraphInstantiate_flags, CUlaunchAttribute,
    CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUresult, CUstream,
    CUstreamCaptureMode,
};
use cudarc::driver::{CudaContext, CudaGraph, CudaStream};
use half::f16;
use half::slice::HalfFloatSliceExt;

pub use self::modules::on_compiling;

use self::blas::Blas;
use self::events::Events;
use self::helpers::Helpers;
use self::lanes::Lanes;
use self::modules::{Gpu, Kernels};
use self::probe::unusable;
use self::transfer::Staging;
use super::cards::{self, Card};
use super::launch::{Cells, resident_grid};
use super::{Buffer, Command, Gemm, GpuDevice, Launch, Place};
use crate::backend::Mark;
use crate::error::{Error, Result};

/// The first CUDA GPU.
pub struct CudaDevice {
    // In the order in which they must go: what uses memory first, the context last.
    sequences: HashMap<u32, Sequence>,
    blas: Blas,
    kernels: Kernels,
    staging: Staging,
    helpers: Helpers,
    events: Events,
    lanes: Lanes,
    memory: Vec<Option<Memory>>,
    _workspace: Memory,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    description: String,
    /// Card, architecture and driver: what decides which launch shapes are fast.
    identity: String,
    card: Option<&'static Card>,
    capability: u32,
    shared_limit: usize,
    multiprocessors: usize,
    use_graphs: bool,
    /// Whether GPU and driver have programmatic dependent launch, and whether it is wanted.
    can_overlap: bool,
    overlap: bool,
    /// What was launched last, for errors that show up only when waiting.
    last: &'static str,
}

// The raw handles inside belong to a context that any thread may use, as long as it makes it
// current first (every method does) and only one does so at a time (&mut self).
unsafe impl Send for CudaDevice {}

/// A sequence of commands that has been asked for.
enum Sequence {
    /// Has run once, command by command: everything that is set up on first use has been.
    Known,
    /// Has been recorded.
    Graph(CudaGraph),
}

/// Device memory, freed on drop; the context must be current then.
struct Memory {
    address: CUdeviceptr,
    bytes: usize,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // An error would be one of an earlier kernel, which has been reported.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

impl CudaDevice {
    /// Opens the GPU and sees that the driver compiles for it; which kernels it does compile, and keeps
    /// on disk, is for [`GpuDevice::load`] to say.
    ///
    /// # Errors
    /// [`Error::Device`] naming what is missing or too old, and the remedy.
    pub fn open() -> Result<Self> {
        let driver = probe::probe(Kernels::built())?;
        let context = CudaContext::new(0).map_err(no_gpu)?;
        let failed = |error| unusable(driver_words(error), "see nvidia-smi for the GPU's state");
        let name = context.name().map_err(failed)?;
        let (major, minor) = context.compute_capability().map_err(failed)?;
        let capability = (10 * major + minor) as u32;
        let limit = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared_limit = context.attribute(limit).map_err(failed)? as usize;
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(count).map_err(failed)? as usize;
        let total = context.total_mem().map_err(failed)?;

        let gpu = Gpu { name, capability, driver };
        let kernels = Kernels::open(context.clone(), gpu, shared_limit)?;
        let stream = context.new_stream().map_err(failed)?;
        let staging = Staging::new().map_err(failed)?;
        let lanes = Lanes::new(&context).map_err(failed)?;
        // What cuBLAS itself would take: 32 MiB from Hopper on, else 4 MiB.
        let workspace = reserve(if major >= 9 { 32 << 20 } else { 4 << 20 }, "cuBLAS workspace")?;
        let blas = Blas::new(stream.cu_stream(), workspace.address, workspace.bytes);
        let blas = blas.map_err(|error| {
            let (major, minor) = driver;
            unusable(
                format!("cuBLAS does not start: {error}"),
                format!("install a cuBLAS for CUDA {major}.{minor} or older that knows this GPU"),
            )
        })?;
        let archs: Vec<String> = kernels.archs.iter().map(|arch| format!("sm_{arch}")).collect();
        let description = format!(
            "{}, sm_{capability}, {:.1} GiB, driver for CUDA {}.{}, kernels for {}",
            kernels.gpu(),
            total as f64 / (1u64 << 30) as f64,
            driver.0,
            driver.1,
            archs.join(" and ")
        );
        let identity =
            format!("{}, sm_{capability}, {}", kernels.gpu(), probe::driver_release(driver));
        let card = cards::find(kernels.gpu());
        Ok(CudaDevice {
            sequences: HashMap::new(),
            blas,
            kernels,
            staging,
            helpers: Helpers::default(),
            events: Events::default(),
            lanes,
            memory: Vec::new(),
            _workspace: workspace,
            stream,
            context,
            description,
            identity,
            card,
            capability,
            shared_limit,
            multiprocessors,
            use_graphs: std::env::var_os("FPENET_CUDA_GRAPHS").is_none_or(|value| value != "0"),
            // Graphs take such launches over from CUDA 12.3 on.
            can_overlap: capability >= 90 && driver >= (12, 3),
            overlap: false,
            last: "nothing",
        })
    }

    /// Makes the context current in this thread.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| kernel_error("context", "is lost", error))
    }

    /// The address of a place with room for `bytes` behind it.
    fn address(&self, place: Place, bytes: usize) -> Result<CUdeviceptr> {
        let memory = self.memory.get(place.buffer.0 as usize).and_then(Option::as_ref);
        match memory {
            Some(memory) if place.byte_offset + bytes <= memory.bytes => {
                Ok(memory.address + place.byte_offset as u64)
            }
            _ => Err(Error::Kernel {
                kernel: "memory access".into(),
                problem: format!(
                    "{bytes} bytes at {place:?} lie outside ({} bytes)",
                    memory.map_or(0, |memory| memory.bytes)
                ),
            }),
        }
    }

    /// Copies `len` bytes in, which `fill` writes into pinned memory part by part.
    fn upload_by(
        &mut self,
        to: Place,
        len: usize,
        fill: impl Fn(Range<usize>, &mut [u8]) + Sync,
    ) -> Result<()> {
        self.bind()?;
        let address = self.address(to, len)?;
        let stream = self.stream.cu_stream();
        let copied = self.staging.upload(&self.helpers, stream, address, len, fill);
        copied.map_err(|error| self.late(error))
    }

    fn run(&mut self, commands: &[Command]) -> Result<()> {
        commands.iter().try_for_each(|command| match command {
            Command::Launch(launch) => self.launch(launch),
            Command::Gemm(gemm) => self.gemm(gemm),
        })
    }

    /// Launches a kernel whose blocks wait for each other, as many as the GPU holds at once. A CUDA
    /// graph takes such a launch over as one of its nodes.
    ///
    /// # Safety
    /// The arguments are the kernel's.
    unsafe fn launch_cooperative(
        &self,
        function: CUfunction,
        launch: &Launch,
        arguments: &mut [*mut c_void],
    ) -> std::result::Result<(), DriverError> {
        let (threads, shared) = (launch.block.iter().product::<u32>(), launch.shared_bytes);
        let per_multiprocessor = unsafe {
            occupancy::max_active_block_per_multiprocessor(
                function,
                threads as i32,
                shared as usize,
            )
        }?;
        let resident = per_multiprocessor as usize * self.multiprocessors;
        let too_large = DriverError(CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
        let grid = resident_grid(launch, resident).ok_or(too_large)?;
        let (grid, block, stream) = (grid.into(), launch.block.into(), self.stream.cu_stream());
        unsafe {
            result::launch_cooperative_kernel(function, grid, block, shared, stream, arguments)
        }
    }

    /// Records the commands without running them.
    fn capture(&mut self, commands: &[Command]) -> Result<CudaGraph> {
        let failed = |error| Error::Kernel {
            kernel: "CUDA graph".into(),
            problem: format!("{} (FPENET_CUDA_GRAPHS=0 does without)", driver_words(error)),
        };
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed)?;
        let recorded = self.run(commands);
        // Also after an error: the stream must not stay in capture.
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        recorded?;
        graph.map_err(failed)?.ok_or_else(|| failed(DriverError(CUresult::CUDA_ERROR_UNKNOWN)))
    }

    /// An error that the driver reports some time after the launch that caused it.
    fn late(&self, error: DriverError) -> Error {
        let last = self.last;
        kernel_error(
            last,
            "or a command before it failed (CUDA_LAUNCH_BLOCKING=1 and FPENET_CUDA_GRAPHS=0 tell \
             which)",
            error,
        )
    }
}

impl GpuDevice for CudaDevice {
    fn kind(&self) -> &'static str {
        "cuda"
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn shared_memory_limit(&self) -> usize {
        self.shared_limit
    }

    fn alloc(&mut self, bytes: usize, purpose: &'static str) -> Result<Buffer> {
        self.bind()?;
        let memory = reserve(bytes, purpose)?;
        let free = self.memory.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.memory.push(None);
            self.memory.len() - 1
        });
        self.memory[index] = Some(memory);
        Ok(Buffer(index as u32))
    }

    fn free(&mut self, buffer: Buffer) -> Result<()> {
        // Work that still uses the memory ends first, and reports its errors here.
        self.synchronize()?;
        if let Some(slot) = self.memory.get_mut(buffer.0 as usize) {
            *slot = None;
        }
        Ok(())
    }

    fn upload(&mut self, to: Place, bytes: &[u8]) -> Result<()> {
        self.upload_by(to, bytes.len(), |part, host| host.copy_from_slice(&bytes[part]))
    }

    fn upload_half(&mut self, to: Place, values: &[f32]) -> Result<()> {
        self.upload_by(to, 2 * values.len(), |part, host| {
            let host: &mut [f16] = bytemuck::cast_slice_mut(host);
            host.convert_from_f32_slice(&values[part.start / 2..part.end / 2]);
        })
    }

    fn download(&mut self, from: Place, bytes: &mut [u8]) -> Result<()> {
        self.bind()?;
        let address = self.address(from, bytes.len())?;
        let stream = self.stream.cu_stream();
        let copied = self.staging.download(&self.helpers, stream, address, bytes);
        copied.map_err(|error| self.late(error))
    }

    fn send(&mut self, lane: usize, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        self.lanes.send(&self.helpers, lane, bytes)
    }

    fn deliver(&mut self, lane: usize, to: Place) -> Result<()> {
        self.bind()?;
        let address = self.address(to, self.lanes.sent(lane))?;
        self.lanes.deliver(lane, address, self.stream.cu_stream())
    }

    fn fetch(&mut self, lane: usize, from: Place, bytes: usize) -> Result<()> {
        self.bind()?;
        let address = self.address(from, bytes)?;
        self.lanes.fetch(lane, address, bytes, self.stream.cu_stream())
    }

    fn receive(&mut self, lane: usize, out: &mut [u8]) -> Result<()> {
        self.bind()?;
        self.lanes.receive(&self.helpers, lane, out)?.map_err(|error| self.late(error))
    }

    fn zero(&mut self, at: Place, bytes: usize) -> Result<()> {
        self.bind()?;
        let address = self.address(at, bytes)?;
        let stream = self.stream.cu_stream();
        let filled = unsafe { result::memset_d8_async(address, 0, bytes, stream) };
        filled.map_err(|error| kernel_error("memset", "cannot be launched", error))
    }

    fn load(&mut self, kernels: &[&'static str]) -> Result<()> {
        self.bind()?;
        self.kernels.load(kernels.iter().copied())
    }

    fn launch(&mut self, launch: &Launch) -> Result<()> {
        self.bind()?;
        let function = self.kernels.get(launch.kernel)?;
        let mut cells = Cells::new(&launch.args, |place| self.address(place, 0))?;
        let mut pointers = cells.pointers();
        self.last = launch.kernel;
        let stream = self.stream.cu_stream();
        // The driver copies the arguments before it returns; launch descriptions and kernels are
        // checked against each other on the emulated device.
        let launched = unsafe {
            if launch.cooperative {
                self.launch_cooperative(function.handle, launch, &mut pointers)
            } else if self.overlap && function.waits {
                launch_dependent(function.handle, launch, stream, &mut pointers)
            } else {
                let (grid, block) = (launch.grid.into(), launch.block.into());
                let shared = launch.shared_bytes;
                result::launch_kernel(function.handle, grid, block, shared, stream, &mut pointers)
            }
        };
        launched.map_err(|error| {
            let Launch { grid, block, shared_bytes, .. } = launch;
            let shape = format!("grid {grid:?}, block {block:?}, {shared_bytes} bytes shared");
            kernel_error(launch.kernel, &format!("cannot be launched with {shape}"), error)
        })
    }

    fn gemm(&mut self, gemm: &Gemm) -> Result<()> {
        self.bind()?;
        let mut addresses = [0; 3];
        for (address, matrix) in addresses.iter_mut().zip([&gemm.a, &gemm.b, &gemm.c]) {
            *address = self.address(matrix.at, 0)?;
        }
        self.last = blas::CALL;
        self.blas.gemm(gemm, addresses)
    }

    fn submit(&mut self, sequence: u32, commands: &[Command]) -> Result<()> {
        self.bind()?;
        if let Some(Sequence::Known) = self.sequences.get(&sequence)
            && self.use_graphs
        {
            // Nothing may be loaded while the stream records.
            self.kernels.load(commands.iter().filter_map(Command::kernel))?;
            let graph = self.capture(commands)?;
            self.sequences.insert(sequence, Sequence::Graph(graph));
        }
        if let Some(Sequence::Graph(graph)) = self.sequences.get(&sequence) {
            self.last = "CUDA graph";
            return graph.launch().map_err(|error| self.late(error));
        }
        self.run(commands)?;
        self.sequences.insert(sequence, Sequence::Known);
        Ok(())
    }

    fn forget_sequences(&mut self) {
        if self.bind().is_ok() {
            // A graph may go while it runs: the driver keeps what is in use.
            self.sequences.clear();
        }
    }

    fn use_graphs(&mut self, on: bool) {
        self.forget_sequences();
        self.use_graphs = on;
    }

    fn records(&self) -> bool {
        self.use_graphs
    }

    fn card(&self) -> Option<&'static Card> {
        self.card
    }

    fn capability(&self) -> u32 {
        self.capability
    }

    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn mark(&mut self) -> Result<Mark> {
        self.bind()?;
        let recorded = self.events.record(self.stream.cu_stream());
        recorded.map_err(|error| self.late(error)).map(Mark::Event)
    }

    fn between(&mut self, from: Mark, to: Mark) -> Result<Duration> {
        let (Mark::Event(from), Mark::Event(to)) = (from, to) else {
            return Mark::host_time(from, to);
        };
        self.bind()?;
        self.events.elapsed(from, to).map_err(|error| self.late(error))
    }

    fn overlap_launches(&mut self, on: bool) {
        self.overlap = on && self.can_overlap;
    }

    fn synchronize(&mut self) -> Result<()> {
        self.stream.synchronize().map_err(|error| self.late(error))
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // Errors were reported where they arose; the fields go in their order after this.
        let _ = self.context.bind_to_thread();
        let _ = self.stream.synchronize();
        let _ = self.lanes.synchronize();
    }
}

/// Launches a kernel that may start before the one before it ends (programmatic dependent launch).
///
/// # Safety
/// The arguments are the kernel's, and the kernel waits before it reads another's results.
unsafe fn launch_dependent(
    function: CUfunction,
    launch: &Launch,
    stream: CUstream,
    arguments: &mut [*mut c_void],
) -> std::result::Result<(), DriverError> {
    let mut attribute = CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = CUlaunchConfig {
        gridDimX: launch.grid[0],
        gridDimY: launch.grid[1],
        gridDimZ: launch.grid[2],
        blockDimX: launch.block[0],
        blockDimY: launch.block[1],
        blockDimZ: launch.block[2],
        sharedMemBytes: launch.shared_bytes,
        hStream: stream,
        attrs: &mut attribute,
        numAttrs: 1,
    };
    let none = std::ptr::null_mut();
    unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), none) }.result()
}

/// Device memory, aligned to 256 bytes by the driver; the context must be current.
fn reserve(bytes: usize, purpose: &str) -> Result<Memory> {
    // The driver refuses to reserve nothing.
    match unsafe { result::malloc_sync(bytes.max(1)) } {
        Ok(address) => Ok(Memory { address, bytes }),
        Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
            Err(out_of_memory(purpose, bytes, result::mem_get_info().ok()))
        }
        Err(error) => Err(kernel_error("cuMemAlloc", "failed", error)),
    }
}

/// `memory` is free and total bytes.
fn out_of_memory(purpose: &str, needed: usize, memory: Option<(usize, usize)>) -> Error {
    let state = match memory {
        Some((free, total)) => format!("{free} of the GPU's {total} bytes are free"),
        None => "the driver does not say how much is free".to_string(),
    };
    unusable(
        format!("out of memory: {purpose} needs {needed} bytes, {state}"),
        "use a smaller --size or --batch, or end other programs on the GPU (see nvidia-smi)",
    )
}

/// The driver's name and words for an error.
fn driver_words(error: DriverError) -> String {
    // The numbers of the CUDA manual; the text comes from the driver itself.
    let words = error.error_string().map(|words| words.to_string_lossy().into_owned());
    format!("{:?}: {}", error.0, words.unwrap_or_else(|_| "no description".into()))
}

fn kernel_error(kernel: &str, what: &str, error: DriverError) -> Error {
    Error::Kernel { kernel: kernel.into(), problem: format!("{what}: {}", driver_words(error)) }
}

/// Why there is no GPU, although there is a driver.
fn no_gpu(error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => unusable(
            "the driver finds no CUDA GPU",
            "check nvidia-smi and the variable CUDA_VISIBLE_DEVICES",
        ),
        _ => unusable(
            format!("the GPU cannot be opened: {}", driver_words(error)),
            "check nvidia-smi; after a driver update the machine must be restarted",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_memory_names_purpose_needed_and_free_bytes() {
        let text = out_of_memory("arena", 5_000_000, Some((1_000_000, 8_000_000))).to_string();
        for part in ["arena needs 5000000 bytes", "1000000 of the GPU's 8000000", "--batch"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    /// Where there is a GPU this opens it; where there is none, the error says why and nothing
    /// panics.
    #[test]
    fn a_machine_without_cuda_gets_one_clear_error() {
        match CudaDevice::open() {
            Ok(device) => assert!(device.describe().contains("sm_")),
            Err(error) => {
                let text = error.to_string();
                assert!(text.starts_with("device cuda: ") && !text.contains('\n'), "{text}");
            }
        }
    }
}
