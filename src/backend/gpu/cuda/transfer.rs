//! Host copies through pinned memory, which the GPU reads and writes by itself.

use std::ffi::c_void;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUdeviceptr, CUevent, CUevent_flags, CUstream};

/// Most bytes copied at once: bounds the pinned memory, which the system cannot page out.
const CHUNK: usize = 32 << 20;

/// Two pinned buffers, used in turns: the host fills one while the GPU reads the other.
pub(super) struct Staging {
    slots: [Slot; 2],
    next: usize,
}

impl Staging {
    /// Empty buffers; the context must be current, now and whenever they are used or dropped.
    pub(super) fn new() -> Result<Self, DriverError> {
        Ok(Staging { slots: [Slot::new()?, Slot::new()?], next: 0 })
    }

    /// Copies host memory in, behind all earlier work of the stream. `bytes` may be reused on
    /// return.
    pub(super) fn upload(
        &mut self,
        stream: CUstream,
        to: CUdeviceptr,
        bytes: &[u8],
    ) -> Result<(), DriverError> {
        for (i, part) in bytes.chunks(CHUNK).enumerate() {
            let slot = self.slot(part.len())?;
            slot.memory(part.len()).copy_from_slice(part);
            let to = to + (i * CHUNK) as u64;
            unsafe { result::memcpy_htod_async(to, slot.memory(part.len()), stream)? };
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
            let from = from + (i * CHUNK) as u64;
            unsafe { result::memcpy_dtoh_async(slot.memory(part.len()), from, stream)? };
            unsafe { result::stream::synchronize(stream)? };
            part.copy_from_slice(slot.memory(part.len()));
        }
        Ok(())
    }

    /// The next buffer, large enough and no longer in use by the GPU.
    fn slot(&mut self, bytes: usize) -> Result<&mut Slot, DriverError> {
        self.next = (self.next + 1) % self.slots.len();
        let slot = &mut self.slots[self.next];
        // An event that was never recorded counts as done.
        unsafe { result::event::synchronize(slot.done)? };
        if slot.bytes < bytes {
            slot.release();
            slot.host = unsafe { result::malloc_host(bytes, 0)? };
            slot.bytes = bytes;
        }
        Ok(slot)
    }
}

struct Slot {
    host: *mut c_void,
    bytes: usize,
    /// Recorded behind the last copy out of this buffer.
    done: CUevent,
}

impl Slot {
    fn new() -> Result<Self, DriverError> {
        let done = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        Ok(Slot { host: std::ptr::null_mut(), bytes: 0, done })
    }

    /// The first `bytes` of the buffer, which must be that large.
    fn memory(&mut self, bytes: usize) -> &mut [u8] {
        assert!(bytes <= self.bytes && !self.host.is_null());
        // Pinned memory is ordinary host memory, and nobody else has the pointer.
        unsafe { std::slice::from_raw_parts_mut(self.host.cast(), bytes) }
    }

    fn release(&mut self) {
        if !self.host.is_null() {
            // An error would be one of an earlier kernel, which has been reported.
            let _ = unsafe { result::free_host(self.host) };
            (self.host, self.bytes) = (std::ptr::null_mut(), 0);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.release();
        let _ = unsafe { result::event::destroy(self.done) };
    }
}
