//! The CPU backend: f32, vectorised, multi-threaded. It is the reference for all others.

mod backend;
mod backward;
pub mod depthwise;
mod forward;
pub mod gemm;
pub mod peak;
pub mod planes;
pub mod scratch;
pub mod simd;
mod view;

pub use backend::CpuBackend;
pub use simd::Isa;
pub use view::{View, ViewMut};
