//! ONNX files, written from the typed graph and the model's weights.
//!
//! Batch norms are folded into the convolutions before them, as this engine's own inference does:
//! every runtime folds them first thing, the file holds the weights that will be multiplied, and
//! what is compared with ONNX Runtime is the arithmetic that both sides run. Who wants to train
//! on takes the safetensors file, which keeps them apart.

mod convert;
pub mod proto;

use std::path::Path;

use prost::Message;

use crate::error::{Error, Result};
use crate::files;
use crate::graph::{Graph, passes};
use crate::model::Model;
use proto::{
    DataType, Dimension, DimensionValue, GraphProto, ModelProto, OperatorSetIdProto,
    StringStringEntryProto, TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
};

/// The oldest operator set that is written (ONNX 1.12, 2022), and the default: what it can say is
/// enough, and it is the one that most runtimes read.
pub const MIN_OPSET: u32 = 17;
/// The newest operator set that is written and tested.
pub const MAX_OPSET: u32 = 22;
/// Name of the graph's input: N x 3 x H x W, f32, normalised.
pub const INPUT: &str = "input";
/// Name of the output without argmax: N x C x H x W, f32.
pub const LOGITS: &str = "logits";
/// Name of the output with argmax: N x H x W, int64.
pub const LABELS: &str = "labels";

/// How a model is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Operator set, [`MIN_OPSET`] to [`MAX_OPSET`].
    pub opset: u32,
    /// Width and height of the input; both are dynamic where none. The batch always is.
    pub size: Option<(usize, usize)>,
    /// Whether the output is the class per pixel instead of the logits. The labels are int64,
    /// ONNX's own type for ArgMax, which every runtime has; TensorRT's parser casts to no uint8.
    pub argmax: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { opset: MIN_OPSET, size: None, argmax: false }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Nodes of the ONNX graph.
    pub nodes: usize,
    /// Bytes of the file.
    pub bytes: usize,
}

/// Writes a model as an ONNX file, as a whole or not at all. The same model and options give the
/// same bytes.
///
/// # Errors
/// As [`export`]; [`Error::Io`] where the file cannot be written.
pub fn write(path: &Path, model: &Model, options: &Options) -> Result<Written> {
    let (bytes, written) = encode(model, options)?;
    files::write_atomic(path, |w| w.write_all(&bytes))?;
    Ok(written)
}

/// The bytes of [`write()`], for a pipe.
///
/// # Errors
/// As [`export`].
pub fn encode(model: &Model, options: &Options) -> Result<(Vec<u8>, Written)> {
    let onnx = export(model, options)?;
    let bytes = onnx.encode_to_vec();
    let nodes = onnx.graph.map_or(0, |graph| graph.node.len());
    let written = Written { nodes, bytes: bytes.len() };
    Ok((bytes, written))
}

/// The model as ONNX's messages. Classes, palette, mean, std and config stand in the metadata
/// under the keys of the model file (SPEC, "Model file").
///
/// # Errors
/// [`Error::Usage`] for an operator set or a size out of range, [`Error::Failed`] where a weight
/// is not finite.
pub fn export(model: &Model, options: &Options) -> Result<ModelProto> {
    if !(MIN_OPSET..=MAX_OPSET).contains(&options.opset) {
        return Err(Error::Usage(format!(
            "opset: expected {MIN_OPSET} to {MAX_OPSET}, found {}",
            options.opset
        )));
    }
    model.params.check_finite()?;
    let (graph, params) = passes::for_inference(&Graph::fpenet(&model.config)?, &model.params);
    let body = convert::convert(&graph, &params, options)?;

    let (height, width) = match options.size {
        Some((width, height)) => (fixed(height), fixed(width)),
        None => (named("height"), named("width")),
    };
    let image = |channels| vec![named("batch"), fixed(channels), height.clone(), width.clone()];
    let output = if options.argmax {
        value(LABELS, DataType::Int64, vec![named("batch"), height.clone(), width.clone()])
    } else {
        value(LOGITS, DataType::Float, image(model.config.classes))
    };
    let entry = |(key, value)| StringStringEntryProto { key, value };
    Ok(ModelProto {
        ir_version: ir_version(options.opset),
        producer_name: env!("CARGO_PKG_NAME").to_string(),
        producer_version: env!("CARGO_PKG_VERSION").to_string(),
        doc_string: "FPENet (Liu & Yin, BMVC 2019). Input: RGB / 255, minus mean, over std (see \
                     the metadata), N x 3 x H x W."
            .to_string(),
        graph: Some(GraphProto {
            node: body.nodes,
            name: "fpenet".to_string(),
            initializer: body.constants,
            input: vec![value(INPUT, DataType::Float, image(3))],
            output: vec![output],
        }),
        opset_import: vec![OperatorSetIdProto {
            domain: Some(String::new()),
            version: i64::from(options.opset),
        }],
        metadata_props: model.metadata().into_iter().map(entry).collect(),
    })
}

/// The file format's version that came with an operator set (ONNX, docs/Versioning.md).
fn ir_version(opset: u32) -> i64 {
    match opset {
        ..=18 => 8,
        19..=20 => 9,
        _ => 10,
    }
}

fn fixed(side: usize) -> Dimension {
    Dimension { value: Some(DimensionValue::Fixed(side as i64)) }
}

fn named(name: &str) -> Dimension {
    Dimension { value: Some(DimensionValue::Named(name.to_string())) }
}

fn value(name: &str, elements: DataType, dim: Vec<Dimension>) -> ValueInfoProto {
    let shape = Some(TensorShapeProto { dim });
    let tensor_type = Some(TensorTypeProto { elem_type: elements.into(), shape });
    ValueInfoProto { name: name.to_string(), r#type: Some(TypeProto { tensor_type }) }
}

#[cfg(test)]
mod tests;
