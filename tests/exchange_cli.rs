//! `fpenet export` and `fpenet import` as a user runs them.

use std::path::PathBuf;
use std::process::Output;

use assert_cmd::Command;
use fpenet::exchange::onnx::proto::ModelProto;
use fpenet::{Model, ModelConfig};
use prost::Message;

struct Workplace(tempfile::TempDir);

impl Workplace {
    fn new() -> Self {
        Workplace(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn model(&self, name: &str, config: ModelConfig) -> Model {
        let mut model = Model::init(config, 3).unwrap();
        model.mean = [0.1, 0.2, 0.3];
        model.save(&self.at(name)).unwrap();
        model
    }

    fn fpenet(&self, args: &[&str]) -> Output {
        let mut command = Command::cargo_bin("fpenet").unwrap();
        command.current_dir(self.0.path()).args(args).output().unwrap()
    }

    #[track_caller]
    fn succeeds(&self, args: &[&str]) -> String {
        let output = self.fpenet(args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn refused(&self, args: &[&str], code: i32, words: &[&str]) {
        let output = self.fpenet(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        for word in words {
            assert!(stderr.contains(word), "{word}: {stderr}");
        }
    }
}

fn small(classes: usize) -> ModelConfig {
    ModelConfig { classes, p: 1, q: 1, ..Default::default() }
}

#[test]
fn export_writes_what_it_says() {
    let place = Workplace::new();
    place.model("m.safetensors", small(4));
    let said = place.succeeds(&["export", "--onnx", "m.onnx", "--model", "m.safetensors"]);
    assert!(
        said.contains("opset 17, input f32 N x 3 x H x W -> logits f32 N x 4 x H x W"),
        "{said}"
    );
    let onnx = ModelProto::decode(std::fs::read(place.at("m.onnx")).unwrap().as_slice()).unwrap();
    let nodes = onnx.graph.unwrap().node.len();
    assert!(said.contains(&format!("{nodes} nodes")), "{said}");

    let fixed = ["--size", "64x48", "--argmax", "--opset", "20"];
    let args = [&["export", "--onnx", "l.onnx", "--model", "m.safetensors"][..], &fixed].concat();
    let said = place.succeeds(&args);
    assert!(
        said.contains("opset 20, input f32 N x 3 x 48 x 64 -> labels int64 N x 48 x 64"),
        "{said}"
    );
}

#[test]
fn export_refuses_what_it_cannot_write() {
    let place = Workplace::new();
    place.model("m.safetensors", small(4));
    let model = ["--model", "m.safetensors"];
    let with = |args: &[&'static str]| [&["export"], &model[..], args].concat();
    place.refused(&with(&["--onnx", "m.onnx", "--opset", "16"]), 2, &["16", "17..=22"]);
    place.refused(&with(&["--onnx", "m.onnx", "--size", "8x8"]), 2, &["from 16 to 32768"]);
    place.refused(&with(&["--onnx", "no/such/m.onnx"]), 1, &["no/such/m.onnx: cannot write"]);
    place.refused(&["export", "--onnx", "m.onnx", "--model", "x"], 1, &["x: cannot read"]);
    assert!(!place.at("m.onnx").exists());
}

#[test]
fn import_takes_names_and_normalisation_from_a_model_or_the_command_line() {
    let place = Workplace::new();
    let model = place.model("m.safetensors", small(3));
    // A model file is a state dict too.
    let import = ["import", "--from", "m.safetensors", "--out", "i.safetensors"];
    let network = ["--p", "1", "--q", "1"];
    let with = |args: &[&'static str]| [&import[..], &network, args].concat();

    let said = place.succeeds(&with(&["--classes-from", "m.safetensors"]));
    assert!(said.contains("3 classes, from m.safetensors (safetensors, "), "{said}");
    assert_eq!(Model::load(&place.at("i.safetensors")).unwrap(), model);

    let named = ["--class-names", "sky,road,tree", "--mean", "0.5,0.4,0.3", "--std", "1,0.5,0.25"];
    place.succeeds(&with(&named));
    let imported = Model::load(&place.at("i.safetensors")).unwrap();
    assert_eq!(imported.classes, ["sky", "road", "tree"]);
    assert_eq!((imported.mean, imported.std), ([0.5, 0.4, 0.3], [1.0, 0.5, 0.25]));
    assert_eq!(imported.params, model.params);
}

#[test]
fn import_refuses_with_one_line_and_keeps_what_was_there() {
    let place = Workplace::new();
    place.model("m.safetensors", small(3));
    place.model("four.safetensors", small(4));
    std::fs::write(place.at("i.safetensors"), "precious").unwrap();
    let import = ["import", "--from", "m.safetensors", "--out", "i.safetensors"];
    let with = |args: &[&'static str]| [&import[..], args].concat();
    place.refused(&with(&[]), 1, &["m.safetensors: expected the", "missing", "--p 1 --q 1"]);
    let depth = ["--p", "1", "--q", "1"];
    let deep = |args: &[&'static str]| [&import[..], &depth, args].concat();
    place.refused(&deep(&["--class-names", "a,b"]), 2, &["class names: expected 3", "found 2"]);
    place.refused(
        &deep(&["--class-names", "a,,c"]),
        2,
        &["--class-names", "an empty one at index 1"],
    );
    place.refused(&deep(&["--class-names", "a,\u{1b}[31mb,c"]), 2, &["--class-names", "[31mb"]);
    let twice = ["class names: expected each of them once", "found \" a\" at index 0 and 2"];
    place.refused(&deep(&["--class-names", "a,b, a"]), 2, &twice);
    place.refused(&deep(&["--classes-from", "four.safetensors"]), 2, &["expected 3", "found 4"]);
    place.refused(&deep(&["--classes", "4"]), 1, &["classifier.bias: 3, not 4"]);
    place.refused(&deep(&["--mean", "1,2"]), 2, &["three numbers"]);
    let zero = ["--mean", "0,0,0", "--std", "1,0,1"];
    place.refused(&deep(&zero), 2, &["--std: expected positive numbers"]);
    place.refused(&deep(&["--map", "none.json"]), 1, &["none.json: cannot read"]);
    place.refused(&["import", "--from", "i.safetensors", "--out", "o"], 1, &["i.safetensors"]);
    assert_eq!(std::fs::read(place.at("i.safetensors")).unwrap(), b"precious");
}
