use std::collections::{HashMap, HashSet};

use super::proto::{AttributeProto, NodeProto};
use super::*;
use crate::config::{Attention, Decoder, ModelConfig};

fn model(config: ModelConfig) -> Model {
    Model::init(ModelConfig { classes: 5, p: 2, q: 1, ..config }, 7).unwrap()
}

/// Through the bytes, as a reader gets it.
fn exported(model: &Model, options: &Options) -> (ModelProto, GraphProto) {
    let bytes = export(model, options).unwrap().encode_to_vec();
    let onnx = ModelProto::decode(bytes.as_slice()).unwrap();
    let graph = onnx.graph.clone().unwrap();
    (onnx, graph)
}

fn attributes(node: &NodeProto) -> HashMap<&str, &AttributeProto> {
    node.attribute.iter().map(|a| (a.name.as_str(), a)).collect()
}

fn dims(value: &ValueInfoProto) -> Vec<String> {
    let tensor = value.r#type.clone().unwrap().tensor_type.unwrap();
    let side = |d: Dimension| match d.value.unwrap() {
        DimensionValue::Fixed(side) => side.to_string(),
        DimensionValue::Named(name) => name,
    };
    tensor.shape.unwrap().dim.into_iter().map(side).collect()
}

fn configs() -> Vec<ModelConfig> {
    vec![
        ModelConfig::default(),
        ModelConfig { decoder: Decoder::Ca, long_skip: false, ..Default::default() },
        ModelConfig { decoder: Decoder::Bilinear, branches: 2, ..Default::default() },
        ModelConfig { attention: Attention::Sigmoid, branches: 1, ..Default::default() },
        ModelConfig { branch_addition: false, ..Default::default() },
    ]
}

#[test]
fn every_tensor_is_written_once_and_before_it_is_read() {
    for config in configs() {
        for argmax in [false, true] {
            for size in [None, Some((43, 33))] {
                let options = Options { argmax, size, ..Default::default() };
                let (_, graph) = exported(&model(config.clone()), &options);
                let mut known: HashSet<&str> = HashSet::from([INPUT, ""]);
                for constant in &graph.initializer {
                    assert!(known.insert(&constant.name), "{} twice", constant.name);
                }
                let mut names = HashSet::new();
                for node in &graph.node {
                    assert!(names.insert(&node.name), "{} twice", node.name);
                    for input in &node.input {
                        assert!(known.contains(input.as_str()), "{}: {input}", node.name);
                    }
                    for output in &node.output {
                        assert!(known.insert(output), "{output} twice");
                    }
                }
                let output = if argmax { LABELS } else { LOGITS };
                assert_eq!(graph.output[0].name, output);
                assert!(known.contains(output));
            }
        }
    }
}

#[test]
fn constants_hold_the_folded_weights_of_the_engine() {
    let model = model(ModelConfig::default());
    let (_, graph) = exported(&model, &Options::default());
    let (_, params) = passes::for_inference(&Graph::fpenet(&model.config).unwrap(), &model.params);
    let constants: HashMap<&str, _> =
        graph.initializer.iter().map(|t| (t.name.as_str(), t)).collect();
    for spec in &params.specs {
        let constant = constants[spec.name.as_str()];
        let shape: Vec<usize> = constant.dims.iter().map(|&d| d as usize).collect();
        assert_eq!(shape, spec.shape, "{}", spec.name);
        let bytes = constant.raw_data.clone().unwrap();
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(values, params.values[spec.range()], "{}", spec.name);
    }
}

#[test]
fn sides_are_named_unless_they_are_fixed_and_the_batch_always_is() {
    let model = model(ModelConfig::default());
    let (onnx, graph) = exported(&model, &Options::default());
    assert_eq!(dims(&graph.input[0]), ["batch", "3", "height", "width"]);
    assert_eq!(dims(&graph.output[0]), ["batch", "5", "height", "width"]);
    assert_eq!((onnx.ir_version, onnx.opset_import[0].version), (8, 17));

    let options = Options { size: Some((43, 33)), argmax: true, opset: 21 };
    let (onnx, graph) = exported(&model, &options);
    assert_eq!(dims(&graph.input[0]), ["batch", "3", "33", "43"]);
    assert_eq!(dims(&graph.output[0]), ["batch", "33", "43"]);
    assert_eq!((onnx.ir_version, onnx.opset_import[0].version), (10, 21));
    // ceil(33 / 2) x ceil(43 / 2): what decoder1 upsamples to.
    let size = graph.initializer.iter().find(|t| t.name == "decoder1/up/height_width").unwrap();
    let bytes = size.raw_data.as_deref().unwrap();
    let sides: Vec<i64> = bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
    assert_eq!(sides, [17, 22]);
}

#[test]
fn convolutions_keep_their_dilation_and_pad_to_ceil_sizes() {
    let (_, graph) = exported(&model(ModelConfig::default()), &Options::default());
    let find = |name: &str| graph.node.iter().find(|n| n.name == name).unwrap();
    let branch = attributes(find("stage2.0.branches/3/conv:Conv"));
    assert_eq!(branch["dilations"].ints, [8, 8]);
    assert_eq!(branch["pads"].ints, [8; 4]);
    assert_eq!(branch["strides"].ints, [2, 2]);
    assert_eq!(branch["group"].i, Some(32));
    let stem = attributes(find("stem.conv/conv:Conv"));
    assert_eq!((&stem["pads"].ints[..], &stem["strides"].ints[..]), (&[1; 4][..], &[2; 2][..]));
    let resize = attributes(find("logits:Resize"));
    let mode = resize["coordinate_transformation_mode"].s.as_deref();
    assert_eq!(mode, Some(b"half_pixel".as_slice()));
}

#[test]
fn metadata_says_how_to_feed_and_read_the_network() {
    let model = model(ModelConfig::default());
    let (onnx, _) = exported(&model, &Options::default());
    let found: HashMap<_, _> =
        onnx.metadata_props.iter().map(|e| (e.key.as_str(), e.value.as_str())).collect();
    for key in ["format", "config", "classes", "palette", "mean", "std"] {
        assert!(found.contains_key(key), "{key}");
    }
    let mean: [f32; 3] = serde_json::from_str(found["mean"]).unwrap();
    assert_eq!(mean, model.mean);
    let config: ModelConfig = serde_json::from_str(found["config"]).unwrap();
    assert_eq!(config, model.config);
}

#[test]
fn files_are_the_same_at_every_run_and_wrong_requests_leave_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    let model = model(ModelConfig::default());
    for wrong in [
        Options { opset: 16, ..Default::default() },
        Options { opset: 99, ..Default::default() },
        Options { size: Some((8, 8)), ..Default::default() },
    ] {
        assert_eq!(write(&path, &model, &wrong).unwrap_err().exit_code(), 2);
        assert!(!path.exists());
    }
    let written = write(&path, &model, &Options::default()).unwrap();
    let first = std::fs::read(&path).unwrap();
    assert_eq!(written.bytes, first.len());
    write(&path, &model, &Options::default()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), first);
}
