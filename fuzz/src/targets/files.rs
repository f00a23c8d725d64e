//! Headers of model files. An input is the header; the file is said to go on behind it.

use std::path::Path;

use safetensors::SafeTensors;
use swarm_testkit::toy::{GgufType, Storage, spec};
use swarm_weights::Checkpoint;
use swarm_weights::gguf::{Parsed, parse};
use swarm_weights::safetensors::SafetensorsHeader;

use super::{Shape, Target, chain, outcome};

pub const GGUF: Target = Target {
    name: "gguf",
    shape: Shape::Binary,
    words: &[
        "GGUF",
        "general.architecture",
        "general.alignment",
        "llama",
        "qwen2",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.merges",
        "llama.block_count",
        "token_embd.weight",
    ],
    seeds: gguf_seeds,
    run: gguf,
    runs: 40_000,
};

pub const SAFETENSORS: Target = Target {
    name: "safetensors",
    shape: Shape::Json,
    words: &[
        "__metadata__",
        "dtype",
        "shape",
        "data_offsets",
        "F32",
        "F16",
        "BF16",
        "I64",
        "BOOL",
        "F8_E4M3",
        "F4",
    ],
    seeds: safetensors_seeds,
    run: safetensors,
    runs: 25_000,
};

/// Bytes of data that every header is followed by.
const DATA_BYTES: u64 = 4096;

/// A file of a toy model, made in a folder that is gone afterwards.
fn toy(write: impl FnOnce(&Path) -> std::io::Result<()>, name: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join(name);
    write(&path).expect("a toy model can be written");
    std::fs::read(path).expect("and read")
}

fn gguf_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for name in ["llama", "qwen2"] {
        let file = toy(|path| spec(name).write_gguf(path, GgufType::Q8_0), "toy.gguf");
        let len = match parse(&file, file.len() as u64) {
            Ok(Parsed::Done(header)) => header.tensors.values().map(|tensor| tensor.offset).min(),
            other => panic!("the toy model is no GGUF file: {other:?}"),
        };
        // The data behind it need not be there: only its length is looked at.
        seeds.push(file.get(..len.unwrap_or(0) as usize).unwrap_or_default().to_vec());
    }
    // The smallest files: nothing in them, one value of each simple type, an array in an array.
    let head = |tensors: u64, values: u64| {
        [b"GGUF".as_slice(), &3u32.to_le_bytes(), &tensors.to_le_bytes(), &values.to_le_bytes()].concat()
    };
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    seeds.push(head(0, 0));
    seeds.push([head(0, 1), text("k"), 4u32.to_le_bytes().to_vec(), 7u32.to_le_bytes().to_vec()].concat());
    let inner =
        [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &8u32.to_le_bytes(), &1u64.to_le_bytes()].concat();
    seeds.push([head(0, 1), text("k"), 9u32.to_le_bytes().to_vec(), inner, text("v")].concat());
    let dims =
        [&1u32.to_le_bytes()[..], &32u64.to_le_bytes(), &0u32.to_le_bytes(), &0u64.to_le_bytes()].concat();
    seeds.push([head(1, 0), text("t"), dims].concat());
    seeds
}

fn gguf(bytes: &[u8]) -> u64 {
    let mut seen = 0;
    for more in [0, DATA_BYTES, 64 << 20] {
        let file_len = bytes.len() as u64 + more;
        seen ^= match parse(bytes, file_len) {
            Ok(Parsed::Need(need)) => {
                assert!(
                    need > bytes.len() as u64 && need <= file_len,
                    "{need} of {file_len} bytes are asked for"
                );
                outcome("more")
            }
            Ok(Parsed::Done(header)) => {
                for tensor in header.tensors.values() {
                    let end = tensor.offset.checked_add(tensor.bytes).expect("an end that is no number");
                    assert!(end <= file_len, "a tensor leaves the file");
                }
                for key in header.metadata.keys() {
                    let _ = (header.string(key), header.unsigned(key), header.float(key), header.bool(key));
                    let _ = (header.strings(key, 1 << 20), header.i32s(key), header.f32s(key));
                }
                if more == DATA_BYTES { open(bytes) } else { outcome("sound") }
            }
            Err(error) => outcome(&chain(&error)),
        }
        .rotate_left((more % 63) as u32);
    }
    seen
}

/// The whole way from a file to a model's configuration and vocabulary, which a sound header may still not have.
fn open(header: &[u8]) -> u64 {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("x.gguf");
    let mut file = header.to_vec();
    file.resize(header.len() + DATA_BYTES as usize, 0);
    std::fs::write(&path, file).expect("a temporary file");
    match Checkpoint::open(&path) {
        Ok(_) => outcome("a model"),
        // Without the name of the folder, which is new each time.
        Err(error) => outcome(&chain(&error).replace(&path.display().to_string(), "")),
    }
}

fn safetensors_seeds() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    spec("llama").write_hf(folder.path(), Storage::F32).expect("a toy model can be written");
    let file = std::fs::read(folder.path().join("model.safetensors")).expect("and read");
    let len = file.first_chunk().map_or(0, |len| u64::from_le_bytes(*len));
    let toy = file.get(8..8 + len as usize).unwrap_or_default().to_vec();
    let entry = |dtype: &str, shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let small = format!(
        r#"{{"__metadata__":{{"format":"pt"}},"a":{},"b":{},"c":{},"d":{}}}"#,
        entry("F32", "[8,64]", 0, 2048),
        entry("F16", "[1024]", 2048, 4096),
        entry("BF16", "[0,7]", 4096, 4096),
        entry("F32", "[0]", 4096, 4096),
    );
    vec![toy, small.into_bytes(), b"{}".to_vec()]
}

fn safetensors(bytes: &[u8]) -> u64 {
    let file_len = 8 + bytes.len() as u64 + DATA_BYTES;
    match SafetensorsHeader::parse(bytes, file_len) {
        Ok(header) => {
            let mut file = (bytes.len() as u64).to_le_bytes().to_vec();
            file.extend_from_slice(bytes);
            file.resize(file_len as usize, 0);
            let reference =
                SafeTensors::deserialize(&file).expect("the reference refuses what is accepted here");
            assert_eq!(reference.len(), header.tensors.len());
            for (name, tensor) in &header.tensors {
                let view = reference.tensor(name).expect("a tensor the reference does not know");
                let range = tensor.offset as usize..(tensor.offset + tensor.bytes) as usize;
                assert_eq!(file.get(range).map(<[u8]>::len), Some(view.data().len()));
            }
            outcome("sound") ^ header.tensors.len() as u64
        }
        Err(error) => outcome(&chain(&error)),
    }
}
