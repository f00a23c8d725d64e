//! Small models of every family. The specs are in `goldens/specs.json`, which the script that
//! makes the goldens reads too; the weights come from the formula in `formula.rs`.

mod formula;
mod gguf;
mod hf;
mod quantize;
mod vocab;

use std::fmt;

use serde_json::{Value, json};

pub use gguf::GgufType;
pub use hf::Storage;
pub use vocab::{BOS, CHAT_TEMPLATE, EOS, IM_END, IM_START, VOCAB_SIZE};

/// Names of all specs, in the order of `goldens/specs.json`.
pub const NAMES: [&str; 10] = [
    "llama",        // grouped-query attention 4/2, untied head; 80 golden positions cross a tile of 64
    "llama3",       // rope type llama3, tied head
    "llama_linear", // linear rope scaling, spelled `rope_parameters` as transformers 5 does
    "llama_yarn",   // yarn rope scaling, spelled `type` instead of `rope_type`
    "llama_bias",   // attention_bias and mlp_bias; intermediate size 96
    "llama_k",      // hidden 256, intermediate 512: rows that K-quant blocks fit; 2 layers
    "mistral",      // window of 20 under 96 positions; head_dim differs from hidden / heads
    "qwen2",        // biases on q, k, v; tied head
    "qwen2_window", // sliding window from layer 2 on
    "qwen3",        // q/k norms, head_dim 32 with hidden 64 / 4 heads, one kv head
];

/// One toy model: a Hugging Face configuration and a seed. Cheap to clone; tensors are made
/// when asked for.
#[derive(Clone)]
pub struct ToyModel {
    name: String,
    seed: u64,
    config: Value,
}

impl fmt::Debug for ToyModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ToyModel({}, {} layers)", self.name, self.layers())
    }
}

/// One tensor under its Hugging Face name. `values` is `[rows, cols]` row-major; a vector has
/// `shape` of one axis.
#[derive(Clone, Debug, PartialEq)]
pub struct ToyTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl ToyTensor {
    /// Length of the last axis.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }
}

/// The toy model `name`, one of [`NAMES`], with the number of layers its golden has.
///
/// # Panics
/// When there is no such spec: a typing error in a test.
pub fn spec(name: &str) -> ToyModel {
    let specs: Value =
        serde_json::from_str(include_str!("../../goldens/specs.json")).expect("goldens/specs.json is JSON");
    let specs = specs.as_array().expect("goldens/specs.json is a list");
    let spec = specs.iter().find(|spec| spec["name"] == name);
    let spec = spec.unwrap_or_else(|| panic!("no toy spec named {name}; there are {NAMES:?}"));
    ToyModel {
        name: name.to_owned(),
        seed: spec["seed"].as_u64().expect("a spec has a seed"),
        config: spec["config"].clone(),
    }
}

/// A model of the shape of TinyLlama-1.1B with `layers` layers (the original has 22), for
/// benchmarks: its weights are random, and its vocabulary is the toy one, padded to 32000.
pub fn tinyllama(layers: usize) -> ToyModel {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        // More than the original's 2048, so that long contexts can be measured.
        "max_position_embeddings": 8192,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": false,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    });
    ToyModel { name: "tinyllama".to_owned(), seed: 1, config }
}

/// All toy models, in the order of [`NAMES`].
pub fn all() -> Vec<ToyModel> {
    NAMES.iter().map(|name| spec(name)).collect()
}

impl ToyModel {
    /// The same model with `layers` layers. Layers that both have keep their weights. The golden
    /// is of the spec's own number of layers only.
    pub fn with_layers(mut self, layers: usize) -> Self {
        self.config["num_hidden_layers"] = layers.into();
        self
    }

    /// The same model with another seed, so with other weights and another fingerprint.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The same model with one configuration key set, for tests of other shapes or of refusals.
    pub fn with_config(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The `config.json` that [`ToyModel::write_hf`] writes.
    pub fn config(&self) -> &Value {
        &self.config
    }

    pub fn layers(&self) -> usize {
        self.size("num_hidden_layers")
    }

    pub fn hidden_size(&self) -> usize {
        self.size("hidden_size")
    }

    pub fn vocab_size(&self) -> usize {
        self.size("vocab_size")
    }

    pub fn heads(&self) -> usize {
        self.size("num_attention_heads")
    }

    pub fn kv_heads(&self) -> usize {
        self.size("num_key_value_heads")
    }

    pub fn head_dim(&self) -> usize {
        match self.config.get("head_dim").and_then(Value::as_u64) {
            Some(head_dim) => head_dim as usize,
            None => self.hidden_size() / self.heads(),
        }
    }

    fn model_type(&self) -> &str {
        self.config["model_type"].as_str().expect("a spec has a model_type")
    }

    fn size(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap_or_else(|| panic!("{} has no {key}", self.name)) as usize
    }

    fn flag(&self, key: &str) -> bool {
        self.config.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Every tensor of the model, in forward order.
    pub fn tensors(&self) -> Vec<ToyTensor> {
        self.shapes().into_iter().map(|(name, shape)| self.make(name, shape)).collect()
    }

    /// One tensor by its Hugging Face name.
    pub fn tensor(&self, name: &str) -> Option<ToyTensor> {
        let found = self.shapes().into_iter().find(|(known, _)| known == name);
        found.map(|(name, shape)| self.make(name, shape))
    }

    fn make(&self, name: String, shape: Vec<usize>) -> ToyTensor {
        let cols = shape.last().copied().unwrap_or(0);
        let values = formula::weights(self.seed, &name, shape.iter().product(), cols);
        ToyTensor { name, shape, values }
    }

    fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, vocab) = (self.hidden_size(), self.vocab_size());
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
        for layer in 0..self.layers() {
            self.layer_shapes(&format!("model.layers.{layer}"), &mut shapes);
        }
        shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !self.flag("tie_word_embeddings") {
            shapes.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
        }
        shapes
    }

    fn layer_shapes(&self, layer: &str, shapes: &mut Vec<(String, Vec<usize>)>) {
        let (hidden, intermediate, head_dim) =
            (self.hidden_size(), self.size("intermediate_size"), self.head_dim());
        let (q_rows, kv_rows) = (self.heads() * head_dim, self.kv_heads() * head_dim);
        let qwen2 = self.model_type() == "qwen2";
        let qkv_bias = qwen2 || self.flag("attention_bias");
        let o_bias = !qwen2 && self.flag("attention_bias");
        let mlp_bias = self.flag("mlp_bias");
        let mut push = |name: &str, shape: Vec<usize>| shapes.push((format!("{layer}.{name}"), shape));
        push("input_layernorm.weight", vec![hidden]);
        for (name, rows, cols, bias) in [
            ("self_attn.q_proj", q_rows, hidden, qkv_bias),
            ("self_attn.k_proj", kv_rows, hidden, qkv_bias),
            ("self_attn.v_proj", kv_rows, hidden, qkv_bias),
            ("self_attn.o_proj", hidden, q_rows, o_bias),
            ("mlp.gate_proj", intermediate, hidden, mlp_bias),
            ("mlp.up_proj", intermediate, hidden, mlp_bias),
            ("mlp.down_proj", hidden, intermediate, mlp_bias),
        ] {
            push(&format!("{name}.weight"), vec![rows, cols]);
            if bias {
                push(&format!("{name}.bias"), vec![rows]);
            }
        }
        if self.model_type() == "qwen3" {
            push("self_attn.q_norm.weight", vec![head_dim]);
            push("self_attn.k_norm.weight", vec![head_dim]);
        }
        push("post_attention_layernorm.weight", vec![hidden]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_the_goldens_were_made_with() {
        let index: Value = serde_json::from_str(include_str!("../../goldens/index.json")).unwrap();
        for model in all() {
            let total = model
                .tensors()
                .iter()
                .fold(0u64, |sum, tensor| sum.wrapping_add(formula::digest(&tensor.name, &tensor.values)));
            let want = index["goldens"][model.name()]["weights_digest"].as_str().unwrap();
            assert_eq!(format!("{total:016x}"), want, "{model:?}");
        }
    }

    #[test]
    fn every_value_is_exact_in_f16_and_bf16() {
        for model in all() {
            for tensor in model.tensors() {
                for &value in &tensor.values {
                    assert_eq!(half::f16::from_f32(value).to_f32(), value, "{}", tensor.name);
                    assert_eq!(half::bf16::from_f32(value).to_f32(), value, "{}", tensor.name);
                }
            }
        }
    }

    #[test]
    fn names_are_those_of_the_specs() {
        let specs: Value = serde_json::from_str(include_str!("../../goldens/specs.json")).unwrap();
        let names: Vec<_> =
            specs.as_array().unwrap().iter().map(|spec| spec["name"].as_str().unwrap()).collect();
        assert_eq!(names, NAMES);
    }
}
