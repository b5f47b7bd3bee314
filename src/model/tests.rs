use std::fs;
use std::path::PathBuf;

use super::*;
use crate::config::Decoder;

fn small() -> ModelConfig {
    ModelConfig { classes: 3, p: 1, q: 1, ..Default::default() }
}

/// A saved model with bytes of its header and its data changed by `edit`.
fn edited(folder: &tempfile::TempDir, edit: impl FnOnce(&mut String, &mut Vec<u8>)) -> PathBuf {
    let path = folder.path().join("edited.safetensors");
    Model::init(small(), 1).unwrap().save(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    let mut data = bytes[8 + length..].to_vec();
    edit(&mut header, &mut data);
    let length = (header.len() as u64).to_le_bytes();
    fs::write(&path, [&length[..], header.as_bytes(), &data].concat()).unwrap();
    path
}

/// Replaces text that must be there.
fn swap(header: &mut String, from: &str, to: &str) {
    assert!(header.contains(from), "{from} not in {header}");
    *header = header.replacen(from, to, 1);
}

#[test]
fn a_model_survives_its_file_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let configs = [
        small(),
        ModelConfig { decoder: Decoder::Bilinear, long_skip: false, branches: 1, ..small() },
        ModelConfig { decoder: Decoder::Ca, classes: 19, ..small() },
    ];
    for config in configs {
        let mut model = Model::init(config, 7).unwrap();
        model.classes[1] = "rüsch \"weg\"\\".into();
        model.mean = [0.1, 1.0 / 3.0, 0.7];
        model.train_size = Some((480, 360));
        model.save(&path).unwrap();
        assert_eq!(Model::load(&path).unwrap(), model);
        let bytes = fs::read(&path).unwrap();
        model.save(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes, "one model, one file");
    }
}

#[test]
fn a_seed_decides_the_weights() {
    let weights = |seed| Model::init(small(), seed).unwrap().params;
    assert_eq!(weights(3), weights(3));
    assert_ne!(weights(3), weights(4));
}

#[test]
fn files_of_pytorch_load() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/ca_decoder");
    let model = Model::load(&folder.join("model.safetensors")).unwrap();
    assert_eq!(model.config.decoder, Decoder::Ca);
    assert_eq!(model.classes.len(), model.config.classes);
    assert_eq!(model.palette.len(), model.config.classes);
    assert_ne!(model.params, Model::init(model.config.clone(), 0).unwrap().params);
}

#[test]
fn names_and_normalisation_have_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let path = edited(&folder, |header, _| {
        for key in ["classes", "palette", "mean", "std"] {
            swap(header, &format!("\"{key}\":"), &format!("\"other {key}\":"));
        }
    });
    assert_eq!(Model::load(&path).unwrap(), Model::init(small(), 1).unwrap());
}

#[test]
fn counters_of_pytorch_are_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = edited(&folder, |header, data| {
        let end = data.len();
        let entry = format!(
            "\"stem.bn.num_batches_tracked\":{{\"dtype\":\"I64\",\"shape\":[],\
             \"data_offsets\":[{end},{}]}}}}",
            end + 8
        );
        *header = format!("{},{entry}", header.trim_end().strip_suffix('}').unwrap());
        data.extend([0; 8]);
    });
    assert!(Model::load(&path).is_ok());
}

#[test]
fn a_wrong_file_gets_an_error_that_names_the_fault() {
    type Edit = fn(&mut String, &mut Vec<u8>);
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&str, Edit); 19] = [
        ("cut off", |_, data| data.truncate(1000)),
        ("cut off", |_, data| data.push(0)),
        ("invalid JSON", |header, _| *header = "{\"stem\": ".into()),
        ("metadata key \"config\"", |header, _| swap(header, "\"config\":", "\"conf\":")),
        ("metadata key \"format\"", |header, _| swap(header, "\"format\":", "\"form\":")),
        ("hold fpenet-1, found fpenet-9", |header, _| swap(header, "fpenet-1", "fpenet-9")),
        ("valid JSON", |header, _| swap(header, "\\\"p\\\":1", "\\\"p\\\":-1")),
        ("expected 1 to 64 blocks, found 0", |header, _| {
            swap(header, "\\\"p\\\":1", "\\\"p\\\":0");
        }),
        ("unknown field", |header, _| swap(header, "\\\"p\\\":1", "\\\"pp\\\":1")),
        ("classes", |header, _| swap(header, "\\\"class 0\\\",", "")),
        ("names of one line, found \"class\\n0\"", |header, _| {
            swap(header, "class 0", "class\\\\n0");
        }),
        ("palette", |header, _| swap(header, "[0,128,0]", "[0,128]")),
        ("\"mean\"", |header, _| swap(header, "\"mean\":", "\"men\":")),
        ("\"std\"", |header, _| swap(header, "0.229", "0")),
        ("a tensor classifier.bias", |header, _| {
            swap(header, "\"classifier.bias\"", "\"classifier.bia\"");
        }),
        ("tensor classifier.weight to be F32 3 x 32 x 1 x 1, found F32 32 x 3", |header, _| {
            swap(header, "[3,32,1,1]", "[32,3,1,1]");
        }),
        ("tensor stem.conv.weight to be F32 16 x 3 x 3 x 3, found I32", |header, _| {
            let at = header.find("\"stem.conv.weight\"").unwrap();
            let tail = header.split_off(at).replacen("F32", "I32", 1);
            header.push_str(&tail);
        }),
        ("finite values, found NaN at element 0", |_, data| {
            data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }),
        ("an extra tensor more", |header, data| {
            let (from, to) = (data.len(), data.len() + 4);
            let entry = format!(
                "\"more\":{{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[{from},{to}]}}}}"
            );
            *header = format!("{},{entry}", header.trim_end().strip_suffix('}').unwrap());
            data.extend([0; 4]);
        }),
    ];
    for (expected, edit) in cases {
        let message = Model::load(&edited(&folder, edit)).unwrap_err().to_string();
        assert!(message.contains(expected), "expected {expected:?} in {message:?}");
        assert!(message.contains("edited.safetensors") && !message.contains('\n'), "{message}");
    }
}

#[test]
fn other_kinds_of_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let cases: [&[u8]; 4] = [b"", b"short", b"\x89PNG\r\n\x1a\n, and more of it", &[0xff; 100]];
    for bytes in cases {
        fs::write(&path, bytes).unwrap();
        let message = Model::load(&path).unwrap_err().to_string();
        assert!(message.contains("a safetensors file"), "{message}");
    }
    assert!(Model::load(folder.path()).is_err());
    assert!(Model::load(&folder.path().join("absent")).is_err());
}

#[test]
fn a_negative_variance_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let mut model = Model::init(small(), 1).unwrap();
    let id = model.params.find("stem.bn.running_var").unwrap();
    model.params.get_mut(id)[2] = -0.5;
    model.save(&path).unwrap();
    let message = Model::load(&path).unwrap_err().to_string();
    assert!(message.contains("stem.bn.running_var") && message.contains("-0.5"), "{message}");
}

#[test]
fn a_model_that_is_not_finite_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let mut model = Model::init(small(), 1).unwrap();
    model.params.values[0] = f32::INFINITY;
    assert!(model.save(&path).is_err());
    assert!(!path.exists());
}
