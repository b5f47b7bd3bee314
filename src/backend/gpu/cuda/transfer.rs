//! Host copies through pinned memory, which the GPU reads and writes by itself.

use std::ffi::c_void;
use std::ops::Range;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUdeviceptr, CUevent, CUevent_flags, CUstream};

/// Most bytes copied at once: bounds the pinned memory, which the system cannot page out.
const CHUNK: usize = 32 << 20;
/// Up to here a copy goes through a small buffer. A training step makes two of them (label count, rates)
/// and two large ones (images, labels): the host gets two steps ahead of the GPU before it has to wait.
const SMALL: usize = 4096;

/// Pinned buffers, used in turns: the host fills one while the GPU reads the others.
pub(super) struct Staging {
    large: Ring<4>,
    small: Ring<8>,
}

struct Ring<const N: usize> {
    slots: [Slot; N],
    next: usize,
}

impl Staging {
    /// Empty buffers; the context must be current, now and whenever they are used or dropped.
    pub(super) fn new() -> Result<Self, DriverError> {
        Ok(Staging { large: Ring::new()?, small: Ring::new()? })
    }

    /// Copies `len` bytes in, behind all earlier work of the stream: `fill` writes those of a range into
    /// pinned memory.
    pub(super) fn upload(
        &mut self,
        stream: CUstream,
        to: CUdeviceptr,
        len: usize,
        fill: impl Fn(Range<usize>, &mut [u8]),
    ) -> Result<(), DriverError> {
        for start in (0..len).step_by(CHUNK) {
            let part = start..len.min(start + CHUNK);
            let slot = self.slot(part.len())?;
            let host = slot.memory.bytes(part.len());
            fill(part, host);
            unsafe { result::memcpy_htod_async(to + start as u64, host, stream)? };
            unsafe { result::event::record(slot.done, stream)? };
        }
        Ok(())
    }

    /// Copies device memory out, after all earlier work of the stream.
    pub(super) fn download(
        &mut self,
        stream: CUstream,
        from: CUdeviceptr,
        bytes: &mut [u8],
    ) -> Result<(), DriverError> {
        for (i, part) in bytes.chunks_mut(CHUNK).enumerate() {
            let slot = self.slot(part.len())?;
            let host = slot.memory.bytes(part.len());
            let from = from + (i * CHUNK) as u64;
            unsafe { result::memcpy_dtoh_async(host, from, stream)? };
            unsafe { result::stream::synchronize(stream)? };
            part.copy_from_slice(host);
        }
        Ok(())
    }

    /// The next buffer, large enough and no longer in use by the GPU.
    fn slot(&mut self, bytes: usize) -> Result<&mut Slot, DriverError> {
        let slot = if bytes <= SMALL { self.small.turn() } else { self.large.turn() };
        // An event that was never recorded counts as done.
        unsafe { result::event::synchronize(slot.done)? };
        slot.memory.reserve(bytes.max(SMALL))?;
        Ok(slot)
    }
}

impl<const N: usize> Ring<N> {
    fn new() -> Result<Self, DriverError> {
        let slots: Result<Vec<Slot>, DriverError> = (0..N).map(|_| Slot::new()).collect();
        let slots = slots?.try_into().unwrap_or_else(|_| unreachable!("N slots were made"));
        Ok(Ring { slots, next: 0 })
    }

    fn turn(&mut self) -> &mut Slot {
        self.next = (self.next + 1) % N;
        &mut self.slots[self.next]
    }
}

struct Slot {
    memory: Pinned,
    /// Recorded behind the last copy out of this buffer.
    done: CUevent,
}

impl Slot {
    fn new() -> Result<Self, DriverError> {
        let done = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        Ok(Slot { memory: Pinned::default(), done })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let _ = unsafe { result::event::destroy(self.done) };
    }
}

/// Host memory that cannot be paged out.
pub(super) struct Pinned {
    host: *mut c_void,
    bytes: usize,
}

impl Default for Pinned {
    fn default() -> Self {
        Pinned { host: std::ptr::null_mut(), bytes: 0 }
    }
}

impl Pinned {
    /// Makes room; what was there is lost where it was too small, and must not be in use.
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<(), DriverError> {
        if self.bytes < bytes {
            self.release();
            self.host = unsafe { result::malloc_host(bytes, 0)? };
            self.bytes = bytes;
        }
        Ok(())
    }

    /// The first `len` bytes, for which there must be room.
    pub(super) fn bytes(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.bytes && !self.host.is_null());
        // Pinned memory is ordinary host memory, and nobody else has the pointer.
        unsafe { std::slice::from_raw_parts_mut(self.host.cast(), len) }
    }

    fn release(&mut self) {
        if !self.host.is_null() {
            // An error would be one of an earlier kernel, which has been reported.
            let _ = unsafe { result::free_host(self.host) };
            (self.host, self.bytes) = (std::ptr::null_mut(), 0);
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.release();
    }
}
