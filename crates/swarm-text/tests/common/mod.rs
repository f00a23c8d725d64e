//! Reads the fixtures that `make_goldens.py` wrote.
#![allow(dead_code)] // each test binary uses its part

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use swarm_text::{EncodeOptions, GgufParts, Tokenizer};

pub fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn read(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap_or_else(|error| panic!("fixture {name}: {error}"))
}

pub fn fixture<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    serde_json::from_slice(&read(name)).unwrap_or_else(|error| panic!("fixture {name}: {error}"))
}

#[derive(Deserialize, Clone)]
pub struct Gguf {
    pub model: String,
    pub tokens: Vec<String>,
    pub token_types: Vec<i32>,
    #[serde(default)]
    pub scores: Vec<f32>,
    #[serde(default)]
    pub merges: Vec<String>,
    pub bos: u32,
    pub eos: u32,
    pub unk: u32,
}

impl Gguf {
    pub fn parts(&self) -> GgufParts {
        GgufParts {
            model: self.model.clone(),
            tokens: self.tokens.clone(),
            token_types: self.token_types.clone(),
            scores: self.scores.clone(),
            merges: self.merges.clone(),
            bos: Some(self.bos),
            eos: Some(self.eos),
            unk: Some(self.unk),
            ..GgufParts::default()
        }
    }
}

/// `[ids, ids with special tokens taken literally, if different]`
pub type Row = (Vec<u32>, Option<Vec<u32>>);
/// `[ids, text without special tokens, text with them]`
pub type Decoding = (Vec<u32>, String, String);

#[derive(Deserialize)]
pub struct Goldens {
    #[serde(default)]
    pub parts: Map<String, Value>,
    #[serde(default)]
    pub ignore_merges: bool,
    pub prefix: Vec<u32>,
    pub rows: Vec<Row>,
    #[serde(default)]
    pub decode: Vec<Decoding>,
}

/// The whole `tokenizer.json`: the fixture's frame with the vocabulary put back and `goldens.parts` in place.
pub fn tokenizer_json(frame: &Value, gguf: &Gguf, merges: Value, goldens: &Goldens) -> Value {
    let mut file = frame.clone();
    for (key, value) in &goldens.parts {
        file[key] = value.clone();
    }
    file["model"]["vocab"] =
        gguf.tokens.iter().zip(0..).map(|(token, id)| (token.clone(), json!(id))).collect();
    file["model"]["merges"] = merges;
    file["model"]["ignore_merges"] = json!(goldens.ignore_merges);
    file
}

pub fn load(file: &Value) -> Tokenizer {
    Tokenizer::from_hf_json(file.to_string().as_bytes(), None).expect("the fixture is sound")
}

/// Holds a tokenizer against goldens, in every way of encoding.
pub fn check_encode(label: &str, tokenizer: &Tokenizer, texts: &[String], goldens: &Goldens) {
    assert_eq!(texts.len(), goldens.rows.len());
    for (text, (ids, literal)) in texts.iter().zip(&goldens.rows) {
        let encode = |add_special, parse_special| {
            tokenizer.encode(text, EncodeOptions { add_special, parse_special }).expect("it encodes")
        };
        assert_eq!(&encode(false, true), ids, "{label}: {text:?}");
        assert_eq!(encode(true, true), [&goldens.prefix[..], ids].concat(), "{label}, around: {text:?}");
        assert_eq!(&encode(false, false), literal.as_ref().unwrap_or(ids), "{label}, literal: {text:?}");
    }
}

pub fn check_decode(label: &str, tokenizer: &Tokenizer, decodings: &[Decoding]) {
    assert!(!decodings.is_empty(), "{label}: nothing to decode");
    for (ids, without, with) in decodings {
        assert_eq!(&tokenizer.decode(ids, true), without, "{label}: {ids:?}");
        assert_eq!(&tokenizer.decode(ids, false), with, "{label}, with special tokens: {ids:?}");
    }
}
