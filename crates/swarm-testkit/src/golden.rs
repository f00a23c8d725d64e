//! Committed results of other implementations. `make_goldens.py` writes them.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

/// What `transformers` computes for one toy model, in f32 with eager attention.
#[derive(Clone, Debug)]
pub struct Golden {
    /// The prompt; position `i` holds `ids[i]`.
    pub ids: Vec<u32>,
    pub vocab: usize,
    /// `[ids.len(), vocab]`, row-major.
    pub logits: Vec<f32>,
}

impl Golden {
    /// Logits after `position`, `[vocab]`.
    pub fn row(&self, position: usize) -> &[f32] {
        &self.logits[position * self.vocab..(position + 1) * self.vocab]
    }

    /// Largest |logit| of all positions; tolerances are relative to it.
    pub fn max_abs(&self) -> f32 {
        self.logits.iter().fold(0.0, |max, x| max.max(x.abs()))
    }
}

fn path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("goldens").join(file)
}

fn read(file: &str) -> Vec<u8> {
    let path = path(file);
    fs::read(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|chunk| f32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]])).collect()
}

/// The golden of the toy model `name` with its own number of layers.
///
/// # Panics
/// When there is no such golden: a typing error in a test.
pub fn golden(name: &str) -> Golden {
    let index: Value = serde_json::from_slice(&read("index.json")).expect("goldens/index.json is JSON");
    let entry = &index["goldens"][name];
    let ids =
        entry["ids"].as_array().unwrap_or_else(|| panic!("no golden named {name} in goldens/index.json"));
    let ids: Vec<u32> = ids.iter().map(|id| id.as_u64().expect("an id is a number") as u32).collect();
    let vocab = entry["vocab"].as_u64().expect("a golden has a vocab") as usize;
    let logits = floats(&read(&format!("{name}.bin")));
    assert_eq!(logits.len(), ids.len() * vocab, "goldens/{name}.bin has another size than index.json says");
    Golden { ids, vocab, logits }
}

/// Raw blocks of one format and the f32 values the `gguf` Python package reads from them.
#[derive(Clone, Debug)]
pub struct QuantVector {
    /// Spelled as in GGUF: `F32`, `Q4_0`, `Q4_K`.
    pub dtype_name: &'static str,
    pub bytes: Vec<u8>,
    pub values: Vec<f32>,
}

const QUANT_NAMES: [&str; 13] =
    ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"];

/// One vector for each of the 13 formats: four blocks each (ordinary scale, negative scale, all
/// bits set with a subnormal scale, all bits clear with a zero scale); 64 values for the floats.
pub fn quant_vectors() -> Vec<QuantVector> {
    let entries: Value = serde_json::from_slice(&read("quants.json")).expect("goldens/quants.json is JSON");
    let blob = read("quants.bin");
    let mut rest = blob.as_slice();
    let mut take = |len: &Value| {
        let (head, tail) = rest.split_at(len.as_u64().expect("a length is a number") as usize);
        rest = tail;
        head
    };
    let vectors = QUANT_NAMES.iter().zip(entries.as_array().expect("goldens/quants.json is a list")).map(
        |(name, entry)| {
            assert_eq!(entry["dtype"], *name, "goldens/quants.json has another order");
            let bytes = take(&entry["bytes"]).to_vec();
            let values =
                floats(take(&Value::from(4 * entry["values"].as_u64().expect("a length is a number"))));
            QuantVector { dtype_name: name, bytes, values }
        },
    );
    let vectors: Vec<_> = vectors.collect();
    assert_eq!(vectors.len(), QUANT_NAMES.len(), "goldens/quants.json does not hold every format");
    vectors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toy;

    #[test]
    fn every_spec_has_a_golden() {
        for name in toy::NAMES {
            let golden = golden(name);
            assert_eq!(golden.vocab, toy::VOCAB_SIZE);
            assert!(golden.ids.len() >= 40);
            assert!(golden.ids.iter().all(|&id| (id as usize) < golden.vocab));
            assert!(golden.max_abs() > 5.0 && golden.logits.iter().all(|x| x.is_finite()));
        }
    }

    #[test]
    fn every_format_has_a_vector() {
        for vector in quant_vectors() {
            assert!(!vector.bytes.is_empty(), "{}", vector.dtype_name);
            assert!(vector.values.len() >= 64, "{}", vector.dtype_name);
        }
    }
}
