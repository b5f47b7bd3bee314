//! Host copies through pinned memory, which the GPU reads and writes by itself: large ones in pieces, so
//! that the copy engine works while threads fill or empty the next.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::ops::Range;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUdeviceptr, CUevent, CUevent_flags, CUstream};

use super::helpers::Helpers;

/// Most bytes copied at once: bounds the pinned memory, which the system cannot page out.
const CHUNK: usize = 32 << 20;
/// Up to here a copy goes through a small buffer. A training step makes two of them (label count, rates)
/// and two large ones (images, labels): the host gets two steps ahead of the GPU before it has to wait.
const SMALL: usize = 4096;
/// Most bytes copied out at once, of which two are under way beside those that the host takes over.
const PART: usize = 4 << 20;

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
        helpers: &Helpers,
        stream: CUstream,
        to: CUdeviceptr,
        len: usize,
        fill: impl Fn(Range<usize>, &mut [u8]) + Sync,
    ) -> Result<(), DriverError> {
        for start in (0..len).step_by(CHUNK) {
            let part = len.min(start + CHUNK) - start;
            let slot = self.slot(part)?;
            let copied = helpers.fill(
                slot.memory.bytes(part),
                |range, host| fill(start + range.start..start + range.end, host),
                |first, host| unsafe {
                    result::memcpy_htod_async(to + (start + first) as u64, host, stream)
                },
            );
            // Also after an error: pieces before it are under way.
            let recorded = unsafe { result::event::record(slot.done, stream) };
            copied.and(recorded)?;
        }
        Ok(())
    }

    /// Copies device memory out, after all earlier work of the stream.
    pub(super) fn download(
        &mut self,
        helpers: &Helpers,
        stream: CUstream,
        from: CUdeviceptr,
        bytes: &mut [u8],
    ) -> Result<(), DriverError> {
        if bytes.len() <= PART {
            let slot = self.slot(bytes.len())?;
            let host = slot.memory.bytes(bytes.len());
            unsafe { result::memcpy_dtoh_async(host, from, stream)? };
            unsafe { result::stream::synchronize(stream)? };
            helpers.copy(host, bytes);
            return Ok(());
        }
        // Slots of the ring, fewer than it has, with what is to be done with them.
        let mut under_way: VecDeque<(usize, &mut [u8])> = VecDeque::new();
        for (i, part) in bytes.chunks_mut(PART).enumerate() {
            if under_way.len() == 2 {
                self.large.empty(helpers, under_way.pop_front())?;
            }
            self.large.turn();
            let slot = self.large.free(PART)?;
            let host = slot.memory.bytes(part.len());
            let from = from + (i * PART) as u64;
            unsafe { result::memcpy_dtoh_async(host, from, stream)? };
            unsafe { result::event::record(slot.done, stream)? };
            under_way.push_back((self.large.next, part));
        }
        under_way.into_iter().try_for_each(|next| self.large.empty(helpers, Some(next)))
    }

    /// The next buffer, large enough and no longer in use by the GPU.
    fn slot(&mut self, bytes: usize) -> Result<&mut Slot, DriverError> {
        if bytes <= SMALL {
            self.small.turn();
            return self.small.free(SMALL);
        }
        self.large.turn();
        self.large.free(bytes)
    }
}

impl<const N: usize> Ring<N> {
    fn new() -> Result<Self, DriverError> {
        let slots: Result<Vec<Slot>, DriverError> = (0..N).map(|_| Slot::new()).collect();
        let slots = slots?.try_into().unwrap_or_else(|_| unreachable!("N slots were made"));
        Ok(Ring { slots, next: 0 })
    }

    fn turn(&mut self) {
        self.next = (self.next + 1) % N;
    }

    /// The slot whose turn it is, when the GPU no longer uses it, with room for so many bytes.
    fn free(&mut self, bytes: usize) -> Result<&mut Slot, DriverError> {
        let slot = &mut self.slots[self.next];
        // An event that was never recorded counts as done.
        unsafe { result::event::synchronize(slot.done)? };
        slot.memory.reserve(bytes)?;
        Ok(slot)
    }

    /// Waits for what is copied into a slot and takes it over.
    fn empty(
        &mut self,
        helpers: &Helpers,
        copy: Option<(usize, &mut [u8])>,
    ) -> Result<(), DriverError> {
        let Some((slot, to)) = copy else { return Ok(()) };
        let slot = &mut self.slots[slot];
        unsafe { result::event::synchronize(slot.done)? };
        helpers.copy(slot.memory.bytes(to.len()), to);
        Ok(())
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
