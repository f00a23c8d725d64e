//! A toy model as a Hugging Face folder.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{ToyModel, ToyTensor, vocab};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FloatType {
    F32,
    F16,
    BF16,
}

/// How a folder stores its tensors: the type, and the number of safetensors files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storage {
    float: FloatType,
    files: usize,
}

impl Storage {
    pub const F32: Storage = Storage { float: FloatType::F32, files: 1 };
    pub const F16: Storage = Storage { float: FloatType::F16, files: 1 };
    pub const BF16: Storage = Storage { float: FloatType::BF16, files: 1 };

    /// The same type over `files` files with `model.safetensors.index.json`. Layers do not
    /// respect file borders, as in real checkpoints.
    pub const fn sharded(self, files: usize) -> Storage {
        Storage { float: self.float, files }
    }

    fn names(self) -> (&'static str, &'static str) {
        match self.float {
            FloatType::F32 => ("F32", "float32"),
            FloatType::F16 => ("F16", "float16"),
            FloatType::BF16 => ("BF16", "bfloat16"),
        }
    }

    fn encode(self, values: &[f32]) -> Vec<u8> {
        match self.float {
            FloatType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            FloatType::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
            FloatType::BF16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        }
    }
}

impl ToyModel {
    /// Writes `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`
    /// and the weights into `dir`, which is made when missing. Costs well under a second.
    pub fn write_hf(&self, dir: &Path, storage: Storage) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let mut config = self.config.clone();
        config["torch_dtype"] = storage.names().1.into();
        write_json(&dir.join("config.json"), &config)?;
        write_json(&dir.join("generation_config.json"), &vocab::generation_config())?;
        write_json(&dir.join("tokenizer.json"), &vocab::tokenizer_json())?;
        write_json(&dir.join("tokenizer_config.json"), &vocab::tokenizer_config())?;
        let tensors = self.tensors();
        if storage.files <= 1 {
            return fs::write(dir.join("model.safetensors"), safetensors(&tensors, storage));
        }
        let mut weight_map = Map::new();
        let mut total_bytes = 0;
        for (file, part) in tensors.chunks(tensors.len().div_ceil(storage.files)).enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", file + 1, storage.files);
            fs::write(dir.join(&name), safetensors(part, storage))?;
            for tensor in part {
                weight_map.insert(tensor.name.clone(), name.clone().into());
                total_bytes += storage.encode(&tensor.values).len();
            }
        }
        let index = json!({"metadata": {"total_size": total_bytes}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index)
    }
}

fn write_json(path: &Path, value: &Value) -> io::Result<()> {
    fs::write(path, serde_json::to_string_pretty(value)?)
}

/// One safetensors file: header length, JSON header padded to 8 bytes, data.
fn safetensors(tensors: &[ToyTensor], storage: Storage) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for tensor in tensors {
        let start = data.len();
        data.extend(storage.encode(&tensor.values));
        let entry =
            json!({"dtype": storage.names().0, "shape": tensor.shape, "data_offsets": [start, data.len()]});
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.extend(data);
    file
}
