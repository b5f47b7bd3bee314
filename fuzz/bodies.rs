//! What is done with a fuzzer's bytes. Shared by the targets of `cargo fuzz` and by
//! `tests/damaged_input.rs`, which runs the same over the corpus and its mutations.
//!
//! A body panics where the library breaks its word: any bytes give a value that is consistent in
//! itself, or an error of one line that names the file.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use fpenet::config::{Attention, BlockActivation, Decoder};
use fpenet::graph::{Graph, ParamStore};
use fpenet::model::npy;
use fpenet::segment::decode::decode_bytes;
use fpenet::segment::input::{network_size, normalise, resize};
use fpenet::stream::y4m::{Reader, write_frame, write_header};
use fpenet::{Model, ModelConfig};

/// Pixels up to which a decoded photo is taken all the way: beyond, it is only slow.
const MAX_PIXELS: u32 = 1 << 20;

/// A target: its name, which is that of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// Every body.
pub const TARGETS: [Target; 5] =
    [("npy", npy), ("model", model), ("image", image), ("config", config), ("y4m", y4m)];

/// A NumPy array.
pub fn npy(bytes: &[u8]) {
    let path = Path::new("fuzz.npy");
    match npy::f32_from_bytes(bytes, path) {
        Ok((shape, values)) => {
            assert_eq!(shape.iter().product::<usize>(), values.len());
            assert!(4 * values.len() < bytes.len());
            let _ = npy::check_finite(path, &values).map_err(|e| check_error(path, &e));
        }
        Err(error) => check_error(path, &error),
    }
}

/// A model file; what is a JSON object of texts is tried as the metadata of a good one as well.
pub fn model(bytes: &[u8]) {
    whole_model(bytes);
    if let Ok(metadata) = serde_json::from_slice::<BTreeMap<String, String>>(bytes) {
        whole_model(&tiny_model_with(&metadata));
    }
}

fn whole_model(bytes: &[u8]) {
    let path = Path::new("fuzz.safetensors");
    match Model::from_bytes(bytes, path) {
        Ok(model) => {
            let classes = model.config.classes;
            assert_eq!((model.classes.len(), model.palette.len()), (classes, classes));
            assert!(model.params.values.iter().all(|v| v.is_finite()));
            assert!(model.std.iter().all(|s| *s > 0.0));
        }
        Err(error) => check_error(path, &error),
    }
}

/// The bytes of a small good model with other metadata.
pub fn tiny_model_with(metadata: &BTreeMap<String, String>) -> Vec<u8> {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    let good = GOOD.get_or_init(|| {
        let config = ModelConfig {
            classes: 2,
            p: 1,
            q: 1,
            branches: 1,
            dilations: vec![1],
            branch_addition: false,
            long_skip: false,
            decoder: Decoder::Bilinear,
            attention: Attention::Relu,
            block_activation: BlockActivation::Linear,
        };
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        Model::init(config, 1).and_then(|m| m.save(file.path())).expect("a good model");
        std::fs::read(file.path()).expect("the model just written")
    });
    let (length, rest) = good.split_at(8);
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes")) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&rest[..length]).expect("a header");
    header["__metadata__"] = serde_json::json!(metadata);
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &rest[length..]].concat()
}

/// A photo, through to the network's input.
pub fn image(bytes: &[u8]) {
    let path = Path::new("fuzz.image");
    let photo = match decode_bytes(bytes, path) {
        Ok(photo) => photo,
        Err(error) => return check_error(path, &error),
    };
    let (width, height) = photo.dimensions();
    assert!(width > 0 && height > 0);
    assert_eq!(photo.as_raw().len(), 3 * width as usize * height as usize);
    if width.saturating_mul(height) > MAX_PIXELS {
        return;
    }
    let network = network_size((width, height), None, Some((64, 48)));
    if network.width * network.height > MAX_PIXELS as usize {
        return;
    }
    let photo = resize(&photo, network.width, network.height).expect("sizes within the bounds");
    let mut input = Vec::new();
    normalise(&photo, [0.5; 3], [0.25; 3], &mut input);
    assert_eq!(input.len(), 3 * network.width * network.height);
    assert!(input.iter().all(|v| v.abs() <= 2.0 + 1e-5), "0 to 1 less 0.5, by 0.25");
}

/// A configuration, through to the network's parameters.
pub fn config(bytes: &[u8]) {
    let Ok(config) = serde_json::from_slice::<ModelConfig>(bytes) else { return };
    let graph = match Graph::fpenet(&config) {
        Ok(graph) => graph,
        Err(error) => {
            let text = error.to_string();
            assert!(text.starts_with("config: ") && !text.contains('\n'), "{text}");
            return;
        }
    };
    let shapes = graph.infer_shapes(1, 33, 47).expect("a size that every network takes");
    assert_eq!(shapes.len(), graph.nodes.len());
    let store = ParamStore::zeros(&graph.params);
    // Ranges may be padded.
    assert!(store.values.len() >= graph.params.iter().map(|p| p.range().len()).sum::<usize>());
    let text = serde_json::to_string(&config).expect("plain data");
    assert_eq!(serde_json::from_str::<ModelConfig>(&text).expect("what was written"), config);
}

/// A stream of frames.
pub fn y4m(bytes: &[u8]) {
    let path = Path::new("fuzz.y4m");
    let mut reader = match Reader::new(bytes, path) {
        Ok(reader) => reader,
        Err(error) => return check_error(path, &error),
    };
    let header = reader.header();
    let (length, expected) = (header.frame_len(), *header);
    let mut copy = Vec::new();
    write_header(&mut copy, &expected).expect("memory");
    let (mut planes, mut frames) = (Vec::new(), 0);
    loop {
        match reader.read_frame(&mut planes) {
            Ok(true) => assert_eq!(planes.len(), length),
            Ok(false) => break,
            Err(error) => return check_error(path, &error),
        }
        write_frame(&mut copy, &planes).expect("memory");
        frames += 1;
        assert!(frames * length <= bytes.len(), "frames that are not in the stream");
    }
    // What is written again reads as the same.
    let mut again = Reader::new(copy.as_slice(), path).expect("what was written");
    assert_eq!(again.header(), &expected);
    for _ in 0..frames {
        assert!(again.read_frame(&mut planes).expect("what was written"));
    }
    assert!(!again.read_frame(&mut planes).expect("what was written"));
}

fn check_error(path: &Path, error: &fpenet::Error) {
    let text = error.to_string();
    assert!(text.starts_with(&path.display().to_string()), "names no file: {text:?}");
    assert!(!text.contains(['\n', '\r', '\0']), "more than a line: {text:?}");
    assert!(text.len() < 4096, "{} bytes of message", text.len());
    assert_eq!(error.exit_code(), 1, "{text}");
}
