//! The GPU engine: plans lowered to kernel launches and matrix products ([`lower`]), and the devices
//! that execute them: a CUDA GPU, or the emulation of one on the CPU, which runs the very same
//! kernels with the same launch shapes.

mod backend;
pub mod cards;
pub mod choice;
mod control;
pub mod cost;
pub mod cuda;
pub mod device;
#[cfg(emulated_kernels)]
pub mod emulated;
pub mod kernel_report;
pub mod launch;
pub mod lower;
pub mod predict;
mod prepared;
pub mod variants;

pub use backend::GpuBackend;
pub use device::{Buffer, Element, GpuDevice, LANES, Place};
pub use launch::{Arg, Command, Gemm, Launch, Matrix};
pub use variants::Variants;
