use std::collections::HashMap;
use std::io::{Cursor, Write};
use std::path::PathBuf;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use zip::write::SimpleFileOptions;

use super::*;
use crate::config::ModelConfig;
use crate::graph::Graph;
use crate::model::Model;

/// A small network with values of its own everywhere, the running statistics included.
fn model() -> Model {
    let config = ModelConfig { classes: 3, p: 1, q: 1, ..Default::default() };
    let mut model = Model::init(config, 5).unwrap();
    for (i, value) in model.params.values.iter_mut().enumerate() {
        *value = *value * 0.5 + 0.001 * (i % 97) as f32;
    }
    // The gaps between tensors hold zeros.
    let mut values = vec![0.0; model.params.values.len()];
    for spec in &model.params.specs {
        values[spec.range()].copy_from_slice(&model.params.values[spec.range()]);
    }
    model.params.values = values;
    model
}

#[derive(Clone)]
struct Stored {
    kind: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

type StateDict = Vec<(String, Stored)>;

fn stored(values: &[f32], shape: &[usize], kind: Dtype) -> Stored {
    let data = match kind {
        Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::F64 => values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
        Dtype::I64 => values.iter().flat_map(|v| (*v as i64).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    };
    Stored { kind, shape: shape.to_vec(), data }
}

/// What `model.state_dict()` holds: every tensor, and a counter per batch norm.
fn state_dict(model: &Model, kind: Dtype) -> StateDict {
    let mut dict = StateDict::new();
    for spec in &model.params.specs {
        let values = &model.params.values[spec.range()];
        dict.push((spec.name.clone(), stored(values, &spec.shape, kind)));
        if let Some(stem) = spec.name.strip_suffix("running_var") {
            let counter = stored(&[100.0], &[], Dtype::I64);
            dict.push((format!("{stem}num_batches_tracked"), counter));
        }
    }
    dict
}

fn safetensors(dict: &StateDict) -> Vec<u8> {
    let mut views = Vec::new();
    for (name, s) in dict {
        views.push((name.clone(), TensorView::new(s.kind, s.shape.clone(), &s.data).unwrap()));
    }
    safetensors::serialize(views, None).unwrap()
}

/// As `numpy.savez` or, compressed, `numpy.savez_compressed` writes it.
fn npz(dict: &StateDict, method: zip::CompressionMethod) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(method);
    for (name, stored) in dict {
        let descr = match stored.kind {
            Dtype::F16 => "<f2",
            Dtype::F64 => "<f8",
            Dtype::I64 => "<i8",
            _ => "<f4",
        };
        let sides: String = stored.shape.iter().map(|side| format!("{side},")).collect();
        let header =
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({sides}), }}\n");
        archive.start_file(format!("{name}.npy"), options).unwrap();
        archive.write_all(b"\x93NUMPY\x01\x00").unwrap();
        archive.write_all(&(header.len() as u16).to_le_bytes()).unwrap();
        archive.write_all(header.as_bytes()).unwrap();
        archive.write_all(&stored.data).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn imported(bytes: &[u8], mapping: &Mapping) -> Result<Imported> {
    let weights = Weights::parse(Path::new("weights"), bytes)?;
    let specs = Graph::fpenet(&model().config).unwrap().params;
    import(&weights, &specs, mapping)
}

fn refused(bytes: &[u8], mapping: &Mapping, expected: &[&str]) {
    let message = imported(bytes, mapping).unwrap_err().to_string();
    assert!(message.starts_with("weights") && !message.contains('\n'), "{message}");
    for part in expected {
        assert!(message.contains(part), "{part}: {message}");
    }
}

fn mapping(json: &str) -> Result<Mapping> {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("map.json");
    std::fs::write(&path, json).unwrap();
    Mapping::load(&path)
}

#[test]
fn a_state_dict_comes_back_whole_from_both_formats() {
    let model = model();
    let dict = state_dict(&model, Dtype::F32);
    let deflated = zip::CompressionMethod::Deflated;
    for bytes in
        [safetensors(&dict), npz(&dict, zip::CompressionMethod::Stored), npz(&dict, deflated)]
    {
        let imported = imported(&bytes, &Mapping::default()).unwrap();
        assert_eq!(imported.params, model.params);
        let norms = dict.len() - model.params.specs.len();
        assert_eq!(imported.notes, [format!("{norms} num_batches_tracked passed over")]);
    }
}

#[test]
fn other_precisions_become_f32() {
    let model = model();
    let round = |kind: Dtype, v: f32| match kind {
        Dtype::F16 => f16::from_f32(v).to_f32(),
        Dtype::BF16 => bf16::from_f32(v).to_f32(),
        _ => v,
    };
    for kind in [Dtype::F16, Dtype::BF16, Dtype::F64] {
        let dict = state_dict(&model, kind);
        let mut files = vec![safetensors(&dict)];
        if kind != Dtype::BF16 {
            files.push(npz(&dict, zip::CompressionMethod::Stored));
        }
        for bytes in files {
            let imported = imported(&bytes, &Mapping::default()).unwrap();
            for (found, value) in imported.params.values.iter().zip(&model.params.values) {
                assert_eq!(*found, round(kind, *value), "{kind}");
            }
            assert!(imported.notes[0].contains("tensors converted from"), "{:?}", imported.notes);
        }
    }
}

#[test]
fn wrappers_prefixes_are_taken_off() {
    let model = model();
    let mut dict = state_dict(&model, Dtype::F32);
    dict.iter_mut().for_each(|(name, _)| *name = format!("module.model.{name}"));
    let imported = imported(&safetensors(&dict), &Mapping::default()).unwrap();
    assert_eq!(imported.params, model.params);
    let specs = model.params.specs.len();
    assert_eq!(imported.notes[0], format!("prefix module.model. taken off {specs} names"));
}

#[test]
fn a_mapping_renames_names_and_prefixes_and_passes_over() {
    let model = model();
    let mut dict = state_dict(&model, Dtype::F32);
    for (name, _) in &mut dict {
        *name = match name.split_once('.') {
            Some(("stage2", rest)) => format!("net.encoder.two.{rest}"),
            Some(("classifier", "weight")) => "net.head".to_string(),
            _ => name.clone(),
        };
    }
    dict.push(("net.loss.weight".into(), stored(&[1.0], &[1], Dtype::F32)));
    let json =
        r#"{"net.encoder.two.": "stage2.", "net.head": "classifier.weight", "net.loss.": null}"#;
    let bytes = safetensors(&dict);
    let with = mapping(json).unwrap();
    let result = imported(&bytes, &with).unwrap();
    assert_eq!(result.params, model.params);
    assert!(result.notes.contains(&"1 tensors passed over, as the mapping says".to_string()));
    let weights = Weights::parse(Path::new("weights"), &bytes).unwrap();
    assert_eq!(classes(&weights, &with).unwrap(), Some(3));
    assert_eq!(classes(&weights, &Mapping::default()).unwrap(), None);

    refused(
        &bytes,
        &mapping(r#"{"nothing": "stem"}"#).unwrap(),
        &["by the mapping but not there (nothing)"],
    );
    for wrong in [r#"{"a.": "b"}"#, r#"{"a": "b."}"#, "[]", r#"{"a": 1}"#] {
        assert!(mapping(wrong).unwrap_err().to_string().contains("map.json"), "{wrong}");
    }
}

#[test]
fn one_error_tells_everything_that_does_not_fit() {
    let model = model();
    let mut dict = state_dict(&model, Dtype::F32);
    dict.retain(|(name, _)| name != "stem.bn.bias");
    dict.push(("aux.weight".into(), stored(&[1.0], &[1], Dtype::F32)));
    dict.push(("module.classifier.bias".into(), stored(&[1.0; 3], &[3], Dtype::F32)));
    for (name, stored) in &mut dict {
        if name == "stem.conv.weight" {
            stored.shape = vec![3, 16, 3, 3];
        }
    }
    let parts = [
        "expected the ",
        "1 missing (stem.bn.bias)",
        "1 that it does not have (aux.weight)",
        "1 of another shape (stem.conv.weight: 3 x 16 x 3 x 3, not 16 x 3 x 3 x 3)",
        "1 given twice (classifier.bias: classifier.bias and module.classifier.bias)",
    ];
    refused(&safetensors(&dict), &Mapping::default(), &parts);

    let deeper = Model::init(ModelConfig { p: 2, q: 3, ..model.config }, 0).unwrap();
    let bytes = safetensors(&state_dict(&deeper, Dtype::F32));
    refused(&bytes, &Mapping::default(), &["its blocks are those of --p 2 --q 3"]);
}

#[test]
fn values_that_no_network_has_are_refused() {
    let model = model();
    let place = |name: &str, value: f64, kind: Dtype| {
        let mut dict = state_dict(&model, kind);
        let stored: HashMap<_, _> = dict.iter_mut().map(|(n, s)| (n.clone(), s)).collect();
        for (n, s) in stored {
            if n == name {
                match kind {
                    Dtype::F64 => s.data[..8].copy_from_slice(&value.to_le_bytes()),
                    _ => s.data[..4].copy_from_slice(&(value as f32).to_le_bytes()),
                }
            }
        }
        safetensors(&dict)
    };
    let cases = [
        ("stem.conv.weight", f64::NAN, Dtype::F32, "NaN at element 0"),
        ("classifier.bias", f64::INFINITY, Dtype::F32, "inf at element 0"),
        ("classifier.bias", 1e300, Dtype::F64, "inf at element 0"),
        ("stem.bn.running_var", -1.0, Dtype::F32, "not negative"),
    ];
    for (name, value, kind, expected) in cases {
        refused(&place(name, value, kind), &Mapping::default(), &[name, expected]);
    }
    let mut dict = state_dict(&model, Dtype::F32);
    dict.iter_mut().filter(|(n, _)| n == "classifier.bias").for_each(|(_, s)| {
        *s = stored(&[1.0, 2.0, 3.0], &[3], Dtype::I64);
    });
    refused(&safetensors(&dict), &Mapping::default(), &["classifier.bias", "found I64"]);
    refused(&npz(&dict, zip::CompressionMethod::Stored), &Mapping::default(), &["'<i8'"]);
}

#[test]
fn other_files_and_cut_off_ones_are_refused() {
    let dict = state_dict(&model(), Dtype::F32);
    let (whole, zipped) = (safetensors(&dict), npz(&dict, zip::CompressionMethod::Deflated));
    for cut in [0, 1, 7, 9, 500, whole.len() - 1] {
        refused(&whole[..cut], &Mapping::default(), &["expected a safetensors or npz file"]);
    }
    for cut in [2, 30, zipped.len() / 2, zipped.len() - 1] {
        refused(&zipped[..cut], &Mapping::default(), &["expected a safetensors or npz file"]);
    }
    // A byte of the packed data: the checksum tells.
    let mut damaged = zipped.clone();
    damaged[200] ^= 0x55;
    assert!(imported(&damaged, &Mapping::default()).is_err());

    refused(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j", &Mapping::default(), &["a PyTorch pickle"]);
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    archive.start_file("archive/data.pkl", SimpleFileOptions::default()).unwrap();
    let pickle = archive.finish().unwrap().into_inner();
    refused(&pickle, &Mapping::default(), &["a PyTorch pickle", "save_file"]);
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    archive.start_file("notes.txt", SimpleFileOptions::default()).unwrap();
    let other = archive.finish().unwrap().into_inner();
    refused(&other, &Mapping::default(), &["notes.txt"]);
}
