//! Writers of small GGUF and safetensors files, and toy models in both formats.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value as Json, json};
use swarm_weights::{Family, FileSource, Source, SourceError};

/// A GGUF metadata value as it is written.
#[derive(Clone, Debug)]
pub enum Meta {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(u8),
    Str(String),
    U64(u64),
    I64(i64),
    F64(f64),
    Strs(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// Type id and payload, for what the other variants cannot say.
    Raw(u32, Vec<u8>),
}

pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

pub fn array(element: u32, count: usize, payload: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &(count as u64).to_le_bytes(), payload].concat()
}

impl Meta {
    fn encode(&self) -> (u32, Vec<u8>) {
        match self {
            Self::U8(v) => (0, v.to_le_bytes().to_vec()),
            Self::I8(v) => (1, v.to_le_bytes().to_vec()),
            Self::U16(v) => (2, v.to_le_bytes().to_vec()),
            Self::I16(v) => (3, v.to_le_bytes().to_vec()),
            Self::U32(v) => (4, v.to_le_bytes().to_vec()),
            Self::I32(v) => (5, v.to_le_bytes().to_vec()),
            Self::F32(v) => (6, v.to_le_bytes().to_vec()),
            Self::Bool(v) => (7, vec![*v]),
            Self::Str(v) => (8, string(v)),
            Self::U64(v) => (10, v.to_le_bytes().to_vec()),
            Self::I64(v) => (11, v.to_le_bytes().to_vec()),
            Self::F64(v) => (12, v.to_le_bytes().to_vec()),
            Self::Strs(v) => (9, array(8, v.len(), &v.iter().flat_map(string).collect::<Vec<_>>())),
            Self::I32s(v) => {
                (9, array(5, v.len(), &v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()))
            }
            Self::F32s(v) => {
                (9, array(6, v.len(), &v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()))
            }
            Self::Raw(kind, bytes) => (*kind, bytes.clone()),
        }
    }
}

/// A tensor as it is written. `dims` in GGUF order, row length first.
#[derive(Clone, Debug)]
pub struct GgufEntry {
    pub name: Vec<u8>,
    pub dims: Vec<u64>,
    pub kind: u32,
    /// Instead of the next aligned offset.
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

/// A GGUF file under construction. Every part can be made wrong.
#[derive(Clone, Debug)]
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    pub tensor_count: Option<u64>,
    pub key_count: Option<u64>,
    pub alignment: u64,
    pub keys: Vec<(Vec<u8>, Meta)>,
    pub tensors: Vec<GgufEntry>,
}

impl Default for Gguf {
    fn default() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            key_count: None,
            alignment: 32,
            keys: vec![],
            tensors: vec![],
        }
    }
}

impl Gguf {
    pub fn key(mut self, key: &str, value: Meta) -> Self {
        self.keys.push((key.into(), value));
        self
    }

    /// Replaces or adds.
    pub fn set(&mut self, key: &str, value: Meta) {
        self.keys.retain(|(k, _)| k != key.as_bytes());
        self.keys.push((key.into(), value));
    }

    pub fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: Vec<u8>) -> Self {
        self.tensors.push(GgufEntry { name: name.into(), dims: dims.to_vec(), kind, offset: None, data });
        self
    }

    pub fn entry(&mut self, name: &str) -> &mut GgufEntry {
        self.tensors.iter_mut().find(|tensor| tensor.name == name.as_bytes()).unwrap()
    }

    pub fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            let (kind, payload) = value.encode();
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(payload);
        }
        let mut next = 0_u64;
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(next).to_le_bytes());
            next = (next + tensor.data.len() as u64).next_multiple_of(self.alignment);
        }
        out
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
            out.extend(&tensor.data);
        }
        out
    }
}

/// A tensor of a safetensors file: name, type, shape, data.
pub type Stored = (String, &'static str, Vec<u64>, Vec<u8>);

pub fn safetensors(tensors: &[Stored]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend(bytes);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    safetensors_raw(&Json::Object(header).to_string(), &data)
}

pub fn safetensors_raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// Sizes of a toy model.
#[derive(Clone, Debug)]
pub struct Toy {
    pub family: Family,
    pub layers: usize,
    pub tied: bool,
    /// Llama only: biases everywhere.
    pub biased: bool,
}

pub const WIDTH: usize = 16;
pub const INNER: usize = 24;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 8;
pub const VOCAB: usize = 20;

/// Name in both formats, shape, and whether GGUF `llama` files interleave its rows.
type Part = (String, String, Vec<usize>, bool);

impl Toy {
    pub fn new(family: Family) -> Self {
        Self { family, layers: 3, tied: false, biased: false }
    }

    fn parts(&self) -> Vec<Part> {
        let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        let mut parts: Vec<Part> = vec![
            ("model.embed_tokens.weight".into(), "token_embd.weight".into(), vec![VOCAB, WIDTH], false),
            ("model.norm.weight".into(), "output_norm.weight".into(), vec![WIDTH], false),
        ];
        if !self.tied {
            parts.push(("lm_head.weight".into(), "output.weight".into(), vec![VOCAB, WIDTH], false));
        }
        let qkv_bias = self.biased || self.family == Family::Qwen2;
        for layer in 0..self.layers {
            let mut push = |hf: &str, gguf: &str, shape: &[usize], rotated: bool, bias: bool| {
                let name = |kind: &str| {
                    (format!("model.layers.{layer}.{hf}.{kind}"), format!("blk.{layer}.{gguf}.{kind}"))
                };
                let (hf, gguf) = name("weight");
                parts.push((hf, gguf, shape.to_vec(), rotated));
                if bias {
                    let (hf, gguf) = name("bias");
                    parts.push((hf, gguf, shape[..1].to_vec(), rotated));
                }
            };
            push("input_layernorm", "attn_norm", &[WIDTH], false, false);
            push("self_attn.q_proj", "attn_q", &[q, WIDTH], true, qkv_bias);
            push("self_attn.k_proj", "attn_k", &[kv, WIDTH], true, qkv_bias);
            push("self_attn.v_proj", "attn_v", &[kv, WIDTH], false, qkv_bias);
            push("self_attn.o_proj", "attn_output", &[WIDTH, q], false, self.biased);
            if self.family == Family::Qwen3 {
                push("self_attn.q_norm", "attn_q_norm", &[HEAD_DIM], false, false);
                push("self_attn.k_norm", "attn_k_norm", &[HEAD_DIM], false, false);
            }
            push("post_attention_layernorm", "ffn_norm", &[WIDTH], false, false);
            push("mlp.gate_proj", "ffn_gate", &[INNER, WIDTH], false, self.biased);
            push("mlp.up_proj", "ffn_up", &[INNER, WIDTH], false, self.biased);
            push("mlp.down_proj", "ffn_down", &[WIDTH, INNER], false, self.biased);
        }
        parts
    }

    /// Hugging Face names, all f32, every value different.
    pub fn tensors(&self) -> Vec<Stored> {
        let mut next = 0_u32;
        let mut values = |count: usize| {
            let data = (next..next + count as u32).flat_map(|v| (v as f32).to_le_bytes()).collect();
            next += count as u32;
            data
        };
        let shape = |shape: &[usize]| shape.iter().map(|&dim| dim as u64).collect();
        let parts = self.parts();
        parts.iter().map(|(hf, _, s, _)| (hf.clone(), "F32", shape(s), values(s.iter().product()))).collect()
    }

    pub fn config(&self) -> Json {
        let architecture = match self.family {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
        };
        json!({
            "architectures": [architecture], "model_type": self.family.name(), "hidden_act": "silu",
            "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
            "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": null,
            "max_position_embeddings": 64, "tie_word_embeddings": self.tied,
            "attention_bias": self.biased, "mlp_bias": self.biased, "eos_token_id": 2,
        })
    }

    /// Writes `config.json` and `model.safetensors`.
    pub fn write_folder(&self, folder: &Path) {
        std::fs::write(folder.join("config.json"), self.config().to_string()).unwrap();
        std::fs::write(folder.join("model.safetensors"), safetensors(&self.tensors())).unwrap();
    }

    /// The same model as a GGUF file, with the converter's row order for `llama`.
    pub fn gguf(&self) -> Gguf {
        let arch = match self.family {
            Family::Llama | Family::Mistral => "llama",
            other => other.name(),
        };
        let key = |key: &str| format!("{arch}.{key}");
        let tokens: Vec<String> = (0..VOCAB).map(|id| format!("t{id}")).collect();
        let mut gguf = Gguf::default()
            .key("general.architecture", Meta::Str(arch.into()))
            .key(&key("block_count"), Meta::U32(self.layers as u32))
            .key(&key("context_length"), Meta::U32(64))
            .key(&key("embedding_length"), Meta::U32(WIDTH as u32))
            .key(&key("feed_forward_length"), Meta::U32(INNER as u32))
            .key(&key("attention.head_count"), Meta::U32(HEADS as u32))
            .key(&key("attention.head_count_kv"), Meta::U32(KV_HEADS as u32))
            .key(&key("attention.key_length"), Meta::U32(HEAD_DIM as u32))
            .key(&key("attention.value_length"), Meta::U32(HEAD_DIM as u32))
            .key(&key("attention.layer_norm_rms_epsilon"), Meta::F32(1e-5))
            .key(&key("rope.dimension_count"), Meta::U32(HEAD_DIM as u32))
            .key(&key("rope.freq_base"), Meta::F32(10000.0))
            .key("tokenizer.ggml.model", Meta::Str("gpt2".into()))
            .key("tokenizer.ggml.tokens", Meta::Strs(tokens))
            .key("tokenizer.ggml.eos_token_id", Meta::U32(2));
        for ((_, name, shape, rotated), (.., data)) in self.parts().into_iter().zip(self.tensors()) {
            let dims: Vec<u64> = shape.iter().rev().map(|&dim| dim as u64).collect();
            let row_bytes = data.len() / shape[0];
            let data = if rotated && arch == "llama" { interleave(&data, row_bytes) } else { data };
            gguf = gguf.tensor(&name, &dims, 0, data);
        }
        gguf
    }
}

/// What the converter does to `q_proj` and `k_proj` of `llama` models, head by head.
fn interleave(data: &[u8], row_bytes: usize) -> Vec<u8> {
    let rows: Vec<&[u8]> = data.chunks(row_bytes).collect();
    let order = (0..rows.len()).map(|row| {
        let (head, row) = (row / HEAD_DIM, row % HEAD_DIM);
        head * HEAD_DIM + row / 2 + (row % 2) * (HEAD_DIM / 2)
    });
    order.flat_map(|row| rows[row].to_vec()).collect()
}

/// A source that notes what is read from it.
pub struct Noting {
    pub inner: FileSource,
    pub reads: Arc<Mutex<Vec<Range<u64>>>>,
}

impl Source for Noting {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        self.reads.lock().unwrap().push(offset..offset + out.len() as u64);
        self.inner.read_at(offset, out)
    }
}
