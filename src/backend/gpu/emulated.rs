//! A GPU emulated on the CPU: the kernels of `kernels/*.cu` built with the host's C++ compiler, a
//! fiber per CUDA thread (kernels/host/scheduler.cpp), matrix products by the `gemm` crate.
//!
//! It is there to find mistakes, not to be fast: memory is poisoned with NaN and fenced with
//! canaries, barriers are checked, and threads and blocks can run in other orders, which must not
//! change a bit of the result.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use gemm::Parallelism;
use half::f16;

use super::device::{Buffer, Element, GpuDevice, LANES, Place};
use super::launch::{Cells, Gemm, Launch, Matrix, kinds, resident_grid};
use super::{Command, GpuBackend};
use crate::backend::{Backend, Precision};
use crate::error::{Error, Result};

/// NaN as f32 and as f16.
const POISON: u8 = 0xff;
/// Bytes before and after every buffer that nothing may write; as they hold NaN, what is read there
/// shows too.
const FENCE: usize = 4096;
/// Shared memory that a block of compute capability 7.0 may opt in to.
const SHARED_MEMORY: usize = 96 * 1024;

/// Blocks of a cooperative launch that run side by side: few, so that each has to work through several
/// of the pieces that a card would spread over its multiprocessors.
const RESIDENT_BLOCKS: usize = 6;

/// In which order threads between barriers, and blocks, run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// From the first to the last.
    Forward,
    /// From the last to the first.
    Reverse,
    /// At random, by a seed.
    Shuffled(u64),
}

/// The emulated device.
pub struct Emulated {
    order: Order,
    shared_memory: usize,
    resident_blocks: usize,
    launches: u64,
    buffers: Vec<Option<Fenced>>,
    lanes: [Lane; LANES],
}

/// Copies beside the commands; here they are done at once.
#[derive(Default)]
struct Lane {
    sent: Option<Vec<u8>>,
    fetched: Option<Vec<u8>>,
}

#[repr(C)]
struct KernelEntry {
    name: *const c_char,
    signature: *const c_char,
    sizes: *const usize,
    invoke: *const c_void,
}

unsafe extern "C" {
    fn fpenet_host_kernel(name: *const c_char) -> *const KernelEntry;
    fn fpenet_host_launch(
        kernel: *const KernelEntry,
        grid: *const u32,
        block: *const u32,
        shared_bytes: usize,
        cooperative: c_int,
        args: *const *const c_void,
        order: c_int,
        seed: u64,
        message: *mut c_char,
        len: usize,
    ) -> c_int;
}

/// Device memory between two fences.
struct Fenced {
    purpose: &'static str,
    memory: Vec<u64>,
    start: usize,
    len: usize,
}

impl Fenced {
    fn new(len: usize, purpose: &'static str) -> Option<Self> {
        const ALIGN: usize = 256;
        let words = (len + 2 * FENCE + ALIGN).div_ceil(8);
        let mut memory = Vec::new();
        memory.try_reserve_exact(words).ok()?;
        memory.resize(words, u64::from_ne_bytes([POISON; 8]));
        let base = memory.as_ptr() as usize;
        let start = (base + FENCE).next_multiple_of(ALIGN) - base;
        Some(Fenced { purpose, memory, start, len })
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.memory)[self.start..][..self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.memory)[self.start..][..self.len]
    }

    fn intact(&self) -> bool {
        let bytes: &[u8] = bytemuck::cast_slice(&self.memory);
        let (before, after) = (&bytes[..self.start], &bytes[self.start + self.len..]);
        before.iter().chain(after).fold(POISON, |all, &b| all & b) == POISON
    }
}

impl Default for Emulated {
    fn default() -> Self {
        Self::new(Order::Forward, SHARED_MEMORY)
    }
}

impl Emulated {
    /// A device whose threads run in the given order and whose blocks have `shared_memory` bytes.
    pub fn new(order: Order, shared_memory: usize) -> Self {
        let lanes = Default::default();
        Emulated {
            order,
            shared_memory,
            resident_blocks: RESIDENT_BLOCKS,
            launches: 0,
            buffers: Vec::new(),
            lanes,
        }
    }

    /// The same with another number of blocks that a cooperative launch has at most.
    pub fn with_resident_blocks(self, resident_blocks: usize) -> Self {
        Emulated { resident_blocks, ..self }
    }

    fn get(&self, buffer: Buffer) -> Result<&Fenced> {
        let found = self.buffers.get(buffer.0 as usize).and_then(Option::as_ref);
        found.ok_or_else(|| failed("memory", format!("buffer {} does not exist", buffer.0)))
    }

    fn get_mut(&mut self, buffer: Buffer) -> Result<&mut Fenced> {
        let found = self.buffers.get_mut(buffer.0 as usize).and_then(Option::as_mut);
        found.ok_or_else(|| failed("memory", format!("buffer {} does not exist", buffer.0)))
    }

    /// `len` bytes at a place.
    fn slice_mut(&mut self, at: Place, len: usize) -> Result<&mut [u8]> {
        let memory = self.get_mut(at.buffer)?;
        let (total, purpose) = (memory.len, memory.purpose);
        let range = at.byte_offset..at.byte_offset.saturating_add(len);
        memory.bytes_mut().get_mut(range.clone()).ok_or_else(|| {
            failed("memory", format!("bytes {range:?} of {purpose}, which has {total}"))
        })
    }

    /// Address of a place inside its buffer.
    fn pointer(&self, at: Place, kernel: &str) -> Result<*mut u8> {
        let memory = self.get(at.buffer)?;
        if at.byte_offset >= memory.len {
            let (offset, len) = (at.byte_offset, memory.len);
            let problem = format!("byte {offset} of {}, which has {len}", memory.purpose);
            return Err(failed(kernel, problem));
        }
        Ok(memory.bytes()[at.byte_offset..].as_ptr().cast_mut())
    }

    fn check_fences(&self, kernel: &str) -> Result<()> {
        match self.buffers.iter().flatten().find(|memory| !memory.intact()) {
            Some(memory) => Err(failed(kernel, format!("wrote outside of {}", memory.purpose))),
            None => Ok(()),
        }
    }

    /// Address of a matrix operand all of whose elements lie inside its buffer.
    fn operand(
        &self,
        matrix: &Matrix,
        (rows, columns): (usize, usize),
        batch: usize,
        element: Element,
    ) -> Result<Operand> {
        let (stored_rows, stored_columns) =
            if matrix.transposed { (columns, rows) } else { (rows, columns) };
        let last = (batch - 1) * matrix.batch_stride
            + (stored_rows - 1) * matrix.row_stride
            + stored_columns;
        let len = self.get(matrix.at.buffer)?.len;
        if matrix.at.byte_offset + last * element.size() > len || stored_columns > matrix.row_stride
        {
            return Err(failed("gemm", format!("operand {matrix:?} exceeds its {len} bytes")));
        }
        let (row, column) = (matrix.row_stride as isize, 1);
        let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
        Ok(Operand { at: self.pointer(matrix.at, "gemm")?, row, column })
    }
}

/// A matrix in memory: element strides from row to row and from column to column.
struct Operand {
    at: *mut u8,
    row: isize,
    column: isize,
}

impl Operand {
    /// Index of element (r, c) of the matrix that starts at `offset`.
    fn index(&self, offset: usize, r: usize, c: usize) -> usize {
        offset + r * self.row.unsigned_abs() + c * self.column.unsigned_abs()
    }
}

impl GpuDevice for Emulated {
    fn kind(&self) -> &'static str {
        "emulated"
    }

    fn describe(&self) -> String {
        format!("CUDA kernels emulated on the CPU, {} KiB shared memory", self.shared_memory / 1024)
    }

    /// As of the cards whose tensor cores have mma.sync: the kernels that the model chooses for them
    /// are the ones to be tried.
    fn capability(&self) -> u32 {
        75
    }

    fn shared_memory_limit(&self) -> usize {
        self.shared_memory
    }

    fn alloc(&mut self, bytes: usize, purpose: &'static str) -> Result<Buffer> {
        let memory = Fenced::new(bytes, purpose).ok_or_else(|| Error::Device {
            device: "emulated".into(),
            problem: format!("cannot allocate {bytes} bytes for {purpose}"),
            remedy: "use a smaller --size or --batch".into(),
        })?;
        self.buffers.push(Some(memory));
        Ok(Buffer(self.buffers.len() as u32 - 1))
    }

    fn free(&mut self, buffer: Buffer) -> Result<()> {
        self.get(buffer)?;
        self.buffers[buffer.0 as usize] = None;
        Ok(())
    }

    fn upload(&mut self, to: Place, bytes: &[u8]) -> Result<()> {
        self.slice_mut(to, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    fn download(&mut self, from: Place, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(self.slice_mut(from, bytes.len())?);
        Ok(())
    }

    fn send(&mut self, lane: usize, bytes: &[u8]) -> Result<()> {
        match self.lanes[lane].sent.replace(bytes.to_vec()) {
            None => Ok(()),
            Some(_) => Err(failed("send", format!("lane {lane} was not delivered"))),
        }
    }

    fn deliver(&mut self, lane: usize, to: Place) -> Result<()> {
        let sent = self.lanes[lane].sent.take();
        let sent = sent.ok_or_else(|| failed("deliver", format!("nothing was sent in {lane}")))?;
        self.upload(to, &sent)
    }

    fn fetch(&mut self, lane: usize, from: Place, bytes: usize) -> Result<()> {
        let taken = self.slice_mut(from, bytes)?.to_vec();
        match self.lanes[lane].fetched.replace(taken) {
            None => Ok(()),
            Some(_) => Err(failed("fetch", format!("lane {lane} was not received"))),
        }
    }

    fn receive(&mut self, lane: usize, out: &mut [u8]) -> Result<()> {
        match self.lanes[lane].fetched.take() {
            Some(taken) if taken.len() == out.len() => {
                out.copy_from_slice(&taken);
                Ok(())
            }
            taken => {
                let found = taken.map_or(0, |taken| taken.len());
                let problem = format!("lane {lane} has {found} bytes, not {}", out.len());
                Err(failed("receive", problem))
            }
        }
    }

    fn zero(&mut self, at: Place, bytes: usize) -> Result<()> {
        self.slice_mut(at, bytes)?.fill(0);
        Ok(())
    }

    fn launch(&mut self, launch: &Launch) -> Result<()> {
        let kernel = launch.kernel;
        let wrong = |problem: String| Err(failed(kernel, problem));
        let name = CString::new(kernel).map_err(|e| failed(kernel, e.to_string()))?;
        let entry = unsafe { fpenet_host_kernel(name.as_ptr()) };
        if entry.is_null() {
            return wrong("no such kernel in kernels/*.cu".into());
        }
        let threads: u32 = launch.block.iter().product();
        let [x, y, z] = launch.grid;
        if threads == 0 || threads > 1024 || !threads.is_multiple_of(32) {
            return wrong(format!("a block of {:?} threads", launch.block));
        }
        if x == 0 || x > i32::MAX as u32 || !(1..=65535).contains(&y) || !(1..=65535).contains(&z) {
            return wrong(format!("a grid of {:?} blocks", launch.grid));
        }
        if launch.shared_bytes as usize > self.shared_memory {
            return wrong(format!("{} bytes of shared memory", launch.shared_bytes));
        }
        let mut cells = Cells::new(&launch.args, |place| Ok(self.pointer(place, kernel)? as u64))?;
        let found = kinds(&launch.args);
        let signature = unsafe { CStr::from_ptr((*entry).signature) }.to_string_lossy();
        if found != signature {
            return wrong(format!("arguments {found} for parameters {signature}"));
        }
        let expected = unsafe { std::slice::from_raw_parts((*entry).sizes, found.len()) };
        if !cells.sizes().eq(expected.iter().copied()) {
            let sizes: Vec<usize> = cells.sizes().collect();
            return wrong(format!("arguments of {sizes:?} bytes for parameters of {expected:?}"));
        }
        let args = cells.pointers();
        let grid = match launch.cooperative {
            false => launch.grid,
            true => match resident_grid(launch, self.resident_blocks) {
                Some(grid) => grid,
                None => return wrong(format!("a cooperative grid of {:?} blocks", launch.grid)),
            },
        };
        let (order, seed) = match self.order {
            Order::Forward => (0, 0),
            Order::Reverse => (1, 0),
            Order::Shuffled(seed) => (2, seed.wrapping_add(self.launches)),
        };
        self.launches += 1;
        let mut message = [0u8; 512];
        let status = unsafe {
            fpenet_host_launch(
                entry,
                grid.as_ptr(),
                launch.block.as_ptr(),
                launch.shared_bytes as usize,
                launch.cooperative.into(),
                args.as_ptr().cast(),
                order,
                seed,
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        if status != 0 {
            let text = CStr::from_bytes_until_nul(&message).unwrap_or_default();
            return wrong(text.to_string_lossy().into_owned());
        }
        self.check_fences(kernel)
    }

    fn gemm(&mut self, gemm: &Gemm) -> Result<()> {
        let (m, n, k) = (gemm.m, gemm.n, gemm.k);
        let mixed = gemm.result != gemm.element && gemm.result != Element::F32;
        if [m, n, k, gemm.batch].contains(&0) || gemm.c.transposed || mixed {
            return Err(failed(
                "gemm",
                format!("an empty product, or a result that cannot be: {gemm:?}"),
            ));
        }
        let a = self.operand(&gemm.a, (m, k), gemm.batch, gemm.element)?;
        let b = self.operand(&gemm.b, (k, n), gemm.batch, gemm.element)?;
        let c = self.operand(&gemm.c, (m, n), gemm.batch, gemm.result)?;
        for i in 0..gemm.batch {
            let offsets = [gemm.a, gemm.b, gemm.c].map(|matrix| i * matrix.batch_stride);
            match gemm.element {
                Element::F32 => unsafe { multiply(gemm, [&a, &b, &c], offsets) },
                Element::F16 => unsafe { multiply_half(gemm, [&a, &b, &c], offsets) },
            }
        }
        self.check_fences("gemm")
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    fn submit(&mut self, _sequence: u32, commands: &[Command]) -> Result<()> {
        commands.iter().try_for_each(|command| match command {
            Command::Launch(launch) => self.launch(launch),
            Command::Gemm(gemm) => self.gemm(gemm),
        })
    }
}

/// C = A B + beta C in f32, operands checked against their buffers.
unsafe fn multiply(gemm: &Gemm, [a, b, c]: [&Operand; 3], offsets: [usize; 3]) {
    unsafe {
        gemm::gemm(
            gemm.m,
            gemm.n,
            gemm.k,
            c.at.cast::<f32>().add(offsets[2]),
            c.column,
            c.row,
            gemm.beta != 0.0,
            a.at.cast::<f32>().add(offsets[0]).cast_const(),
            a.column,
            a.row,
            b.at.cast::<f32>().add(offsets[1]).cast_const(),
            b.column,
            b.row,
            gemm.beta,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// The same for half-precision operands, summed up in f32.
unsafe fn multiply_half(gemm: &Gemm, [a, b, c]: [&Operand; 3], offsets: [usize; 3]) {
    let (m, n, k) = (gemm.m, gemm.n, gemm.k);
    let widen = |operand: &Operand, offset: usize, rows: usize, columns: usize| -> Vec<f32> {
        let at = |i: usize| unsafe {
            *operand.at.cast::<f16>().add(operand.index(offset, i / columns, i % columns))
        };
        (0..rows * columns).map(|i| at(i).to_f32()).collect()
    };
    let (left, right) = (widen(a, offsets[0], m, k), widen(b, offsets[1], k, n));
    let mut product = vec![0.0f32; m * n];
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            product.as_mut_ptr(),
            1,
            n as isize,
            false,
            left.as_ptr(),
            1,
            k as isize,
            right.as_ptr(),
            1,
            n as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
        for (i, &value) in product.iter().enumerate() {
            let (row, column) = (i / n, i % n);
            match gemm.result {
                Element::F32 => {
                    let target = c.at.cast::<f32>().add(c.index(offsets[2], row, column));
                    let before = if gemm.beta == 0.0 { 0.0 } else { gemm.beta * *target };
                    *target = value + before;
                }
                Element::F16 => {
                    let target = c.at.cast::<f16>().add(c.index(offsets[2], row, column));
                    let before =
                        if gemm.beta == 0.0 { 0.0 } else { gemm.beta * (*target).to_f32() };
                    *target = f16::from_f32(value + before);
                }
            }
        }
    }
}

fn failed(kernel: &str, problem: String) -> Error {
    Error::Kernel { kernel: kernel.into(), problem }
}

/// The emulated device as a backend.
pub fn open(precision: Precision) -> Box<dyn Backend> {
    Box::new(GpuBackend::new(Emulated::default(), precision))
}
