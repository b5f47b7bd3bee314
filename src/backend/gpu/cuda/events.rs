//! Events with time stamps: how long the GPU took, whatever the host did meanwhile.

use std::time::Duration;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUresult, CUstream};

/// Events in use at a time: several times the commands of a training step. The oldest is used again.
const RING: u32 = 16384;

/// A ring of events, made as they are needed; the context must be current whenever it is used or
/// dropped.
#[derive(Default)]
pub(super) struct Events {
    ring: Vec<CUevent>,
    recorded: u32,
}

impl Events {
    /// Records an event behind all earlier work of the stream, and returns its number.
    pub(super) fn record(&mut self, stream: CUstream) -> Result<u32, DriverError> {
        let number = self.recorded;
        let slot = (number % RING) as usize;
        if slot == self.ring.len() {
            self.ring.push(result::event::create(CUevent_flags::CU_EVENT_DEFAULT)?);
        }
        unsafe { result::event::record(self.ring[slot], stream)? };
        self.recorded = number.wrapping_add(1);
        Ok(number)
    }

    /// Time from one event to a later one, for which it waits. An event that the ring has used again
    /// is an invalid handle.
    pub(super) fn elapsed(&self, from: u32, to: u32) -> Result<Duration, DriverError> {
        let (from, to) = (self.event(from)?, self.event(to)?);
        unsafe { result::event::synchronize(to)? };
        let milliseconds = unsafe { milliseconds(from, to)? };
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }

    fn event(&self, number: u32) -> Result<CUevent, DriverError> {
        let age = self.recorded.wrapping_sub(number);
        let event = self.ring.get((number % RING) as usize);
        let kept = event.filter(|_| (1..=RING).contains(&age));
        kept.copied().ok_or(DriverError(CUresult::CUDA_ERROR_INVALID_HANDLE))
    }
}

/// By the driver's name for the call that every version has: cudarc asks for `cuEventElapsedTime_v2`, which
/// came with the driver for CUDA 12.8, and panics where it is missing.
///
/// # Safety
/// Both events exist and were recorded with time stamps.
unsafe fn milliseconds(from: CUevent, to: CUevent) -> Result<f32, DriverError> {
    type ElapsedTime = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;
    let mut milliseconds = 0.0;
    unsafe {
        let call = sys::culib().get::<ElapsedTime>(b"cuEventElapsedTime\0");
        let call = call.map_err(|_| DriverError(CUresult::CUDA_ERROR_NOT_FOUND))?;
        call(&mut milliseconds, from, to).result()?;
    }
    Ok(milliseconds)
}

impl Drop for Events {
    fn drop(&mut self) {
        for event in &self.ring {
            // An error would be one of an earlier kernel, which has been reported.
            let _ = unsafe { result::event::destroy(*event) };
        }
    }
}
