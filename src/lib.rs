//! FPENet (Liu & Yin, BMVC 2019) as an engine: a typed operator graph, hand-derived forward and
//! backward passes, a fast CPU backend, and hand-written CUDA kernels.
//!
//! Data flows one way: [`config`] -> [`graph`] -> passes -> plan -> [`exec`] -> [`backend`].

#![warn(missing_docs)]

pub mod backend;
pub mod bench;
pub mod bundled;
pub mod capi;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod exchange;
pub mod exec;
pub mod files;
pub mod font;
pub mod graph;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod ops;
pub mod predict;
pub mod predictions;
pub mod profile;
pub mod reference;
pub mod report;
pub mod reproduce;
pub mod segment;
pub mod selftest;
pub mod stream;
pub mod train;
pub mod tune;
pub mod view;

pub use config::ModelConfig;
pub use error::{Error, Result};
pub use model::Model;
