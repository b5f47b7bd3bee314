//! The GPU engine: plans lowered to kernel launches and matrix products, and the devices that
//! execute them.

pub mod device;
pub mod launch;

pub use device::{Buffer, Element, GpuDevice, Place};
pub use launch::{Arg, Command, Gemm, Launch, Matrix};
