//! Copies beside the commands: a stream for each direction, and per lane memory on both sides.
//!
//! What was sent waits on the device in the lane's own memory until a command on the main stream puts
//! it in place; what is fetched is put aside there by a command, too. So a lane's copy to or from the
//! host never touches memory that kernels use, and only events order the streams.

use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUdeviceptr, CUevent, CUevent_flags, CUevent_wait_flags, CUstream};
use cudarc::driver::{CudaContext, CudaStream};

use super::super::LANES;
use super::helpers::Helpers;
use super::transfer::Pinned;
use super::{Memory, kernel_error, reserve};
use crate::error::{Error, Result};

/// Both directions of every lane; the context must be current whenever they are used or dropped.
pub(super) struct Lanes {
    up: [Way; LANES],
    down: [Way; LANES],
    uploads: Arc<CudaStream>,
    downloads: Arc<CudaStream>,
}

/// One direction of a lane.
struct Way {
    host: Pinned,
    device: Option<Memory>,
    /// The copy between host and device is over.
    copied: CUevent,
    /// The command that emptied (or filled) the device's memory is over.
    moved: CUevent,
    /// Bytes under way.
    bytes: Option<usize>,
}

impl Way {
    fn new() -> Result<Self, DriverError> {
        let event = || result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let (copied, moved) = (event()?, event()?);
        Ok(Way { host: Pinned::default(), device: None, copied, moved, bytes: None })
    }

    /// Memory for so many bytes on both sides; what was there is no longer in use.
    fn reserve(&mut self, bytes: usize) -> Result<CUdeviceptr> {
        let failed = |error| kernel_error("copy", "cannot be prepared", error);
        // Events that were never recorded count as over.
        unsafe { result::event::synchronize(self.copied) }.map_err(failed)?;
        self.host.reserve(bytes).map_err(failed)?;
        match &self.device {
            Some(memory) if memory.bytes >= bytes => Ok(memory.address),
            _ => {
                unsafe { result::event::synchronize(self.moved) }.map_err(failed)?;
                self.device = None;
                let memory = reserve(bytes, "images and labels under way")?;
                Ok(self.device.insert(memory).address)
            }
        }
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        for event in [self.copied, self.moved] {
            // An error would be one of an earlier kernel, which has been reported.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}

impl Lanes {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        let both = || Ok::<_, DriverError>([Way::new()?, Way::new()?]);
        let (uploads, downloads) = (context.new_stream()?, context.new_stream()?);
        Ok(Lanes { up: both()?, down: both()?, uploads, downloads })
    }

    pub(super) fn send(&mut self, helpers: &Helpers, lane: usize, bytes: &[u8]) -> Result<()> {
        let way = &mut self.up[lane];
        if way.bytes.is_some() {
            return Err(misused("send", format!("lane {lane} was not delivered")));
        }
        let address = way.reserve(bytes.len())?;
        let host = way.host.bytes(bytes.len());
        let stream = self.uploads.cu_stream();
        let mut copy = || {
            unsafe { wait(stream, way.moved)? };
            let copied = helpers.fill(
                host,
                |range, host| host.copy_from_slice(&bytes[range]),
                |first, host| unsafe {
                    result::memcpy_htod_async(address + first as u64, host, stream)
                },
            );
            // Also after an error: pieces before it are under way.
            let recorded = unsafe { result::event::record(way.copied, stream) };
            copied.and(recorded)
        };
        copy().map_err(|error| kernel_error("send", "failed", error))?;
        way.bytes = Some(bytes.len());
        Ok(())
    }

    /// `to` has room for [`Lanes::sent`] bytes.
    pub(super) fn deliver(&mut self, lane: usize, to: CUdeviceptr, main: CUstream) -> Result<()> {
        let way = &mut self.up[lane];
        let (Some(bytes), Some(memory)) = (way.bytes.take(), &way.device) else {
            return Err(misused("deliver", format!("nothing was sent in lane {lane}")));
        };
        let copy = || unsafe {
            wait(main, way.copied)?;
            result::memcpy_dtod_async(to, memory.address, bytes, main)?;
            result::event::record(way.moved, main)
        };
        copy().map_err(|error| kernel_error("deliver", "failed", error))
    }

    /// Bytes that wait to be delivered.
    pub(super) fn sent(&self, lane: usize) -> usize {
        self.up[lane].bytes.unwrap_or(0)
    }

    pub(super) fn fetch(
        &mut self,
        lane: usize,
        from: CUdeviceptr,
        bytes: usize,
        main: CUstream,
    ) -> Result<()> {
        let way = &mut self.down[lane];
        if way.bytes.is_some() {
            return Err(misused("fetch", format!("lane {lane} was not received")));
        }
        let address = way.reserve(bytes)?;
        let host = way.host.bytes(bytes);
        let stream = self.downloads.cu_stream();
        let mut copy = || unsafe {
            result::memcpy_dtod_async(address, from, bytes, main)?;
            result::event::record(way.moved, main)?;
            wait(stream, way.moved)?;
            result::memcpy_dtoh_async(host, address, stream)?;
            result::event::record(way.copied, stream)
        };
        copy().map_err(|error| kernel_error("fetch", "failed", error))?;
        way.bytes = Some(bytes);
        Ok(())
    }

    /// Errors of earlier commands come as the driver's.
    pub(super) fn receive(
        &mut self,
        helpers: &Helpers,
        lane: usize,
        out: &mut [u8],
    ) -> Result<std::result::Result<(), DriverError>> {
        let way = &mut self.down[lane];
        let bytes = way.bytes.take().unwrap_or(0);
        if bytes != out.len() {
            let problem = format!("lane {lane} has {bytes} bytes, not {}", out.len());
            return Err(misused("receive", problem));
        }
        let over = unsafe { result::event::synchronize(way.copied) };
        if over.is_ok() {
            helpers.copy(way.host.bytes(bytes), out);
        }
        Ok(over)
    }

    /// Waits for both streams.
    pub(super) fn synchronize(&self) -> Result<(), DriverError> {
        self.uploads.synchronize()?;
        self.downloads.synchronize()
    }
}

/// Lets what is put into a stream from now on wait for an event.
unsafe fn wait(stream: CUstream, event: CUevent) -> Result<(), DriverError> {
    let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
    unsafe { result::stream::wait_event(stream, event, flags) }
}

fn misused(call: &str, problem: String) -> Error {
    Error::Kernel { kernel: call.into(), problem }
}
