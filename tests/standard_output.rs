//! `-` where a command writes a file: the result goes to standard output, byte for byte what the
//! file would have held, and the words for people to standard error.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use fpenet::ModelConfig;
use fpenet::model::{Model, npy};
use image::{GrayImage, Luma, RgbImage};

fn fpenet(folder: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fpenet"));
    command.args(line.split(' ')).current_dir(folder).output().unwrap()
}

#[test]
fn a_dash_stands_for_standard_output() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let config = ModelConfig { classes: 11, p: 1, q: 1, ..Default::default() };
    Model::init(config, 1).unwrap().save(&folder.join("m.safetensors")).unwrap();
    npy::write_f32(&folder.join("x.npy"), &[1, 3, 16, 20], &[0.5; 3 * 16 * 20]).unwrap();
    for name in ["data/val", "data/valannot"] {
        fs::create_dir_all(folder.join(name)).unwrap();
    }
    RgbImage::new(32, 24).save(folder.join("data/val/0.png")).unwrap();
    GrayImage::from_pixel(32, 24, Luma([3])).save(folder.join("data/valannot/0.png")).unwrap();

    for (line, words) in [
        ("init --p 1 --q 1 --seed 3 --out", "parameters, seed 3"),
        ("import --from m.safetensors --p 1 --q 1 --out", "11 classes"),
        ("export --model m.safetensors --argmax --onnx", "opset 17"),
        ("run --model m.safetensors --input x.npy --device cpu --output", "logits 1 x 11"),
        ("eval --model m.safetensors --data data --device cpu --json", "global accuracy"),
    ] {
        let filed = fpenet(folder, &format!("{line} file"));
        assert!(filed.status.success(), "{line}: {}", String::from_utf8_lossy(&filed.stderr));
        assert!(String::from_utf8_lossy(&filed.stdout).contains(words), "{line}");
        let piped = fpenet(folder, &format!("{line} -"));
        let stderr = String::from_utf8_lossy(&piped.stderr);
        assert!(piped.status.success(), "{line}: {stderr}");
        assert!(stderr.contains(words), "{line}: {stderr}");
        assert!(!folder.join("-").exists(), "{line}: a file named -");
        if line.starts_with("eval") {
            // It holds times.
            let parse = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
            let (filed, piped) =
                (parse(&fs::read(folder.join("file")).unwrap()), parse(&piped.stdout));
            assert_eq!(filed["confusion"], piped["confusion"]);
        } else {
            assert!(piped.stdout == fs::read(folder.join("file")).unwrap(), "{line}: other bytes");
        }
    }
}

#[test]
fn a_dash_is_standard_input_to_stream() {
    let frame = [b"YUV4MPEG2 W32 H16 F25:1 C444\nFRAME\n".as_slice(), &[90; 3 * 32 * 16]].concat();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("in.y4m"), frame).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_fpenet"));
    command.args("stream --input - --show labels --device cpu".split(' '));
    command.stdin(fs::File::open(dir.path().join("in.y4m")).unwrap()).stdout(Stdio::piped());
    let output = command.output().unwrap();
    assert!(output.status.success());
    assert!(output.stdout.starts_with(b"YUV4MPEG2 W32 H16 F25:1"));
}
