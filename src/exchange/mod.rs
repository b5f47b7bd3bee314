//! Exchange with other tools: models go out as ONNX, PyTorch's weights come in.

pub mod import;
pub mod onnx;
