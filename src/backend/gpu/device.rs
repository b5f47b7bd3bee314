//! What a GPU has to offer for the GPU backend: memory, kernel launches,
//! matrix products. Two devices implement it: a CUDA GPU, and the emulation on the CPU.

use std::time::{Duration, Instant};

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::cards::Card;
use super::launch::{Command, Gemm, Launch};
use crate::backend::{Mark, Precision};
use crate::error::Result;

/// Batches that can be under way at once: one is copied while the device works on the other.
pub const LANES: usize = 2;

/// Handle of device memory, valid for the device that gave it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Buffer(pub u32);

/// A byte address in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// Which memory.
    pub buffer: Buffer,
    /// Bytes from its start.
    pub byte_offset: usize,
}

impl Place {
    /// The address `bytes` further on.
    pub fn offset(self, bytes: usize) -> Place {
        Place { byte_offset: self.byte_offset + bytes, ..self }
    }
}

impl From<Buffer> for Place {
    fn from(buffer: Buffer) -> Self {
        Place { buffer, byte_offset: 0 }
    }
}

/// Storage type of tensors; arithmetic is in f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
}

impl From<Precision> for Element {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Element::F32,
            Precision::F16 => Element::F16,
        }
    }
}

impl Element {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 => 2,
        }
    }

    /// Stored elements as f32; `bytes` may hold more than there are values.
    pub fn widen(self, bytes: &[u8], values: &mut [f32]) {
        match self {
            Element::F32 => {
                for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_ne_bytes(*bytes);
                }
            }
            Element::F16 => {
                // In pieces, since the bytes may lie at an odd address.
                let mut half = [f16::ZERO; 512];
                let pieces = bytes.chunks(2 * half.len());
                for (values, bytes) in values.chunks_mut(half.len()).zip(pieces) {
                    let half = &mut half[..values.len()];
                    let bytes = &bytes[..2 * values.len()];
                    bytemuck::cast_slice_mut(half).copy_from_slice(bytes);
                    half.convert_to_f32_slice(values);
                }
            }
        }
    }
}

/// A device that executes commands in the order given. Commands may return before their work is
/// done; [`GpuDevice::download`] and [`GpuDevice::synchronize`] wait for it.
pub trait GpuDevice: Send {
    /// Device kind as on the command line: `cuda`, `emulated`.
    fn kind(&self) -> &'static str;

    /// Device in words, for logs and result files.
    fn describe(&self) -> String;

    /// Most dynamic shared memory that one block may ask for, in bytes (the opt-in limit). Launch
    /// shapes are chosen by it.
    fn shared_memory_limit(&self) -> usize;

    /// Reserves memory, aligned to 256 bytes; its contents are undefined. `purpose` ("arena",
    /// "scratch") is for the error message.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when out of memory, with needed and free bytes.
    fn alloc(&mut self, bytes: usize, purpose: &'static str) -> Result<Buffer>;

    /// Gives memory back.
    ///
    /// # Errors
    /// What the driver says.
    fn free(&mut self, buffer: Buffer) -> Result<()>;

    /// Copies host memory in; the slice may be reused on return.
    ///
    /// # Errors
    /// What the driver says.
    fn upload(&mut self, to: Place, bytes: &[u8]) -> Result<()>;

    /// The same for values that are stored in half precision.
    ///
    /// # Errors
    /// What the driver says.
    fn upload_half(&mut self, to: Place, values: &[f32]) -> Result<()> {
        let mut half = vec![f16::ZERO; values.len()];
        half.convert_from_f32_slice(values);
        self.upload(to, bytemuck::cast_slice(&half))
    }

    /// Copies device memory out, after all commands so far.
    ///
    /// # Errors
    /// What the driver says, errors of earlier commands included.
    fn download(&mut self, from: Place, bytes: &mut [u8]) -> Result<()>;

    /// Copies bytes to the device beside the commands, for [`GpuDevice::deliver`]; the slice may be
    /// reused on return. A lane (below [`LANES`]) holds one thing sent and one fetched.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) where what was sent before was not delivered, or what
    /// the driver says.
    fn send(&mut self, lane: usize, bytes: &[u8]) -> Result<()>;

    /// Puts what was sent in its place, as a command: those that follow see it.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) where nothing was sent, or what the driver says.
    fn deliver(&mut self, lane: usize, to: Place) -> Result<()>;

    /// Takes bytes away, as a command, and copies them to the host beside those that follow.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) where what was fetched before was not received, or what
    /// the driver says.
    fn fetch(&mut self, lane: usize, from: Place, bytes: usize) -> Result<()>;

    /// Waits for what was fetched.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) where that is not as many bytes, or what the driver
    /// says.
    fn receive(&mut self, lane: usize, out: &mut [u8]) -> Result<()>;

    /// Fills memory with zero bytes.
    ///
    /// # Errors
    /// What the driver says.
    fn zero(&mut self, at: Place, bytes: usize) -> Result<()>;

    /// Makes these kernels ready, which may take seconds, so that no launch has to.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) with the file of a kernel and what the compiler says.
    fn load(&mut self, kernels: &[&'static str]) -> Result<()> {
        let _ = kernels;
        Ok(())
    }

    /// Launches a kernel.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) with the kernel's name.
    fn launch(&mut self, launch: &Launch) -> Result<()>;

    /// Runs a (batched) matrix product.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel).
    fn gemm(&mut self, gemm: &Gemm) -> Result<()>;

    /// Runs a list of commands that will be asked for again under the same number until
    /// [`GpuDevice::forget_sequences`]: a device may record it once and replay it.
    ///
    /// # Errors
    /// Those of the commands.
    fn submit(&mut self, sequence: u32, commands: &[Command]) -> Result<()> {
        let _ = sequence;
        commands.iter().try_for_each(|command| match command {
            Command::Launch(launch) => self.launch(launch),
            Command::Gemm(gemm) => self.gemm(gemm),
        })
    }

    /// Drops what [`GpuDevice::submit`] has recorded.
    fn forget_sequences(&mut self) {}

    /// Whether [`GpuDevice::submit`] may record; drops what it has recorded.
    fn use_graphs(&mut self, on: bool) {
        let _ = on;
    }

    /// Whether [`GpuDevice::submit`] records.
    fn records(&self) -> bool {
        false
    }

    /// The data sheet of this card, where there is one in [`cards`](super::cards).
    fn card(&self) -> Option<&'static Card> {
        None
    }

    /// Compute capability times 10.
    fn capability(&self) -> u32;

    /// Card, driver and architecture, as far as they decide what is fast: the key of tuned choices.
    fn identity(&self) -> String {
        self.describe()
    }

    /// Notes this moment in the order of commands, without waiting.
    ///
    /// # Errors
    /// What the driver says.
    fn mark(&mut self) -> Result<Mark> {
        Ok(Mark::Host(Instant::now()))
    }

    /// Time from one mark to a later one; waits for the later one.
    ///
    /// # Errors
    /// Errors of earlier commands, or of a mark that is not this device's.
    fn between(&mut self, from: Mark, to: Mark) -> Result<Duration> {
        Mark::host_time(from, to)
    }

    /// Whether kernels launched from now on may start before the ones before them end, waiting by
    /// themselves where they need to (programmatic dependent launch); devices without it ignore it.
    fn overlap_launches(&mut self, on: bool) {
        let _ = on;
    }

    /// Waits until all commands are done.
    ///
    /// # Errors
    /// Errors of earlier commands.
    fn synchronize(&mut self) -> Result<()>;
}
