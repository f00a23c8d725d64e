//! GGUF metadata to [`ModelConfig`].
//!
//! Every key under the architecture's own prefix may change the maths, so every such key must be
//! known here: read, known to be without effect, or off. Anything else is an error that names it.

use std::collections::BTreeMap;

use super::{GgufError, GgufHeader, Value};
use crate::config::{ConfigError, Family, ModelConfig, RopeConfig, RopeScaling};
use crate::layout::{self, RawTensor};

/// Keys read below, without the architecture's prefix.
const READ: [&str; 21] = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
];

/// Keys without effect on the forward pass of these architectures. The vocabulary's size is the
/// embedding's; some fine-tunes added tokens and left `vocab_size` as it was.
const WITHOUT_EFFECT: [&str; 5] = [
    "vocab_size",
    "rope.scaling.finetuned",
    "attention.layer_norm_epsilon",
    "pooling_type",
    "decoder_start_token_id",
];

/// Why metadata did not make a configuration: the file is malformed, or the model is not ours.
#[derive(Debug)]
pub enum MetadataError {
    Gguf(GgufError),
    Config(ConfigError),
}

impl From<GgufError> for MetadataError {
    fn from(error: GgufError) -> Self {
        Self::Gguf(error)
    }
}

impl From<ConfigError> for MetadataError {
    fn from(error: ConfigError) -> Self {
        Self::Config(error)
    }
}

fn unsupported<T>(what: String, supported: &'static str) -> Result<T, MetadataError> {
    Err(ConfigError::Unsupported { what, supported }.into())
}

struct Metadata<'a> {
    header: &'a GgufHeader,
    arch: &'a str,
}

impl Metadata<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn size(&self, key: &str) -> Result<Option<usize>, MetadataError> {
        let key = self.key(key);
        let Some(value) = self.header.unsigned(&key)? else { return Ok(None) };
        match usize::try_from(value) {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(ConfigError::Type { key, want: "a size", got: value.to_string() }.into()),
        }
    }

    fn required(&self, key: &str) -> Result<usize, MetadataError> {
        self.size(key)?.ok_or_else(|| ConfigError::Missing { key: self.key(key) }.into())
    }

    fn float(&self, key: &str) -> Result<Option<f64>, MetadataError> {
        Ok(self.header.float(&self.key(key))?)
    }

    fn refuse_unknown_keys(&self) -> Result<(), MetadataError> {
        for (key, value) in &self.header.metadata {
            let own = key.strip_prefix(self.arch).and_then(|rest| rest.strip_prefix('.'));
            let Some(own) = own else { continue };
            if READ.contains(&own) || WITHOUT_EFFECT.contains(&own) || self.is_harmless(own, value)? {
                continue;
            }
            return unsupported(
                format!("metadata key {key}"),
                "the keys of plain llama, qwen2 and qwen3 models",
            );
        }
        Ok(())
    }

    /// An option that is switched off is not used.
    fn is_harmless(&self, own: &str, value: &Value) -> Result<bool, MetadataError> {
        Ok(match value {
            Value::Unsigned(value) => *value == 0,
            Value::Signed(value) => *value == 0,
            Value::Float(value) => *value == 0.0,
            Value::Bool(value) => *value == (own == "attention.causal"),
            Value::String(range) => {
                own == "tensor_data_layout"
                    && matches!(
                        self.header.text(own, range.clone())?,
                        "Meta AI original pth" | "Meta AI original transformers"
                    )
                    || range.is_empty()
            }
            Value::Array { .. } => false,
        })
    }
}

/// The configuration of the model in `header`. `tensors` (by Hugging Face name) tell what metadata
/// does not: the vocabulary's rows, which biases exist, whether the head is tied.
/// `rope_factors` is the content of `rope_freqs.weight`.
pub fn config_from(
    header: &GgufHeader,
    tensors: &BTreeMap<String, RawTensor>,
    rope_factors: Option<Vec<f32>>,
) -> Result<ModelConfig, MetadataError> {
    let arch = header
        .string("general.architecture")?
        .ok_or_else(|| ConfigError::Missing { key: "general.architecture".into() })?;
    let family = match arch {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        other => return unsupported(format!("architecture {other:?}"), "llama, qwen2, qwen3"),
    };
    let metadata = Metadata { header, arch };
    metadata.refuse_unknown_keys()?;

    let hidden_size = metadata.required("embedding_length")?;
    let num_hidden_layers = metadata.required("block_count")?;
    let num_attention_heads = metadata.required("attention.head_count")?;
    let head_dim = match metadata.size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => hidden_size.checked_div(num_attention_heads).unwrap_or(0),
    };
    if let Some(value_dim) = metadata.size("attention.value_length")?
        && value_dim != head_dim
    {
        return unsupported(
            format!("attention.value_length {value_dim} beside key length {head_dim}"),
            "equal lengths",
        );
    }
    let max_position_embeddings = metadata.required("context_length")?;
    let window = metadata.size("attention.sliding_window")?.filter(|&window| window > 0);
    let eps = metadata.float("attention.layer_norm_rms_epsilon")?;
    let eps =
        eps.ok_or_else(|| ConfigError::Missing { key: metadata.key("attention.layer_norm_rms_epsilon") })?;
    let has = |name: &str| tensors.contains_key(name);
    let config = ModelConfig {
        family,
        hidden_size,
        intermediate_size: metadata.required("feed_forward_length")?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: metadata.size("attention.head_count_kv")?.unwrap_or(num_attention_heads),
        head_dim,
        vocab_size: vocab_size(header, tensors)?,
        rms_norm_eps: eps as f32,
        rope: rope(&metadata, head_dim, max_position_embeddings, rope_factors)?,
        max_position_embeddings,
        layer_windows: vec![window; num_hidden_layers.min(1 << 16)], // validate() knows the real limit
        tie_word_embeddings: !has(layout::HEAD),
        attention_bias: family == Family::Qwen2 || has("model.layers.0.self_attn.q_proj.bias"),
        o_proj_bias: has("model.layers.0.self_attn.o_proj.bias"),
        mlp_bias: has("model.layers.0.mlp.gate_proj.bias"),
        qk_norm: family == Family::Qwen3,
    };
    config.validate()?;
    Ok(config)
}

/// The embedding's rows are the vocabulary; the token list, when there is one, must agree.
fn vocab_size(header: &GgufHeader, tensors: &BTreeMap<String, RawTensor>) -> Result<usize, MetadataError> {
    let Some(embedding) = tensors.get(layout::EMBED) else {
        return Err(ConfigError::Missing { key: "token_embd.weight".into() }.into());
    };
    let rows = embedding.shape.first().copied().unwrap_or(0);
    if let Some(Value::Array { count, .. }) = header.metadata.get("tokenizer.ggml.tokens")
        && *count != rows
    {
        let (key, got) = ("number of tokenizer.ggml.tokens", count.to_string());
        return Err(ConfigError::Range { key, got, why: format!("the embedding has {rows} rows") }.into());
    }
    Ok(usize::try_from(rows).unwrap_or(usize::MAX))
}

fn rope(
    metadata: &Metadata<'_>,
    head_dim: usize,
    context: usize,
    factors: Option<Vec<f32>>,
) -> Result<RopeConfig, MetadataError> {
    let scaling = scaling(metadata, context)?;
    let scaling = match (scaling, factors) {
        (RopeScaling::None, Some(factors)) => RopeScaling::Factors(factors),
        (scaling, None) => scaling,
        (_, Some(_)) => {
            return unsupported("rope_freqs.weight together with rope.scaling.type".into(), "one of the two");
        }
    };
    Ok(RopeConfig {
        theta: metadata.float("rope.freq_base")?.unwrap_or(10_000.0),
        rotary_dim: metadata.size("rope.dimension_count")?.unwrap_or(head_dim),
        scaling,
    })
}

fn scaling(metadata: &Metadata<'_>, context: usize) -> Result<RopeScaling, MetadataError> {
    let factor = match metadata.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => metadata.float("rope.scale_linear")?,
    };
    let factor = factor.filter(|&factor| factor != 0.0);
    let key = metadata.key("rope.scaling.type");
    // A factor without a type is a linear one: files from before the type existed.
    let kind = metadata.header.string(&key)?.unwrap_or("linear");
    match (kind, factor) {
        ("none", _) | ("linear", None) => Ok(RopeScaling::None),
        ("linear", Some(1.0)) => Ok(RopeScaling::None),
        ("linear", Some(factor)) => Ok(RopeScaling::Linear { factor }),
        ("yarn", Some(factor)) => yarn(metadata, factor, context),
        ("yarn", None) => Err(ConfigError::Missing { key: metadata.key("rope.scaling.factor") }.into()),
        (other, _) => unsupported(format!("rope scaling type {other:?}"), "none, linear, yarn"),
    }
}

fn yarn(metadata: &Metadata<'_>, factor: f64, context: usize) -> Result<RopeScaling, MetadataError> {
    // Below zero means "not set" to llama.cpp, and then YaRN uses 1.
    if let Some(ext) = metadata.float("rope.scaling.yarn_ext_factor")?
        && ext >= 0.0
        && ext != 1.0
    {
        return unsupported(format!("rope.scaling.yarn_ext_factor {ext}"), "1");
    }
    // `yarn_attn_factor` is the checkpoint's `attention_factor`; `attn_factor` multiplies the usual one.
    let own = metadata.float("rope.scaling.yarn_attn_factor")?;
    let times = metadata.float("rope.scaling.attn_factor")?.filter(|&times| times != 1.0);
    let attention_factor = match (own, times) {
        (own, None) => own,
        (None, Some(times)) => Some(times * (1.0 + 0.1 * factor.max(1.0).ln())),
        (Some(_), Some(_)) => {
            return unsupported("rope.scaling.attn_factor beside yarn_attn_factor".into(), "one of the two");
        }
    };
    let original = metadata.size("rope.scaling.original_context_length")?.filter(|&length| length > 0);
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original.unwrap_or(context),
        beta_fast: metadata.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: metadata.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        attention_factor,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    })
}

/// End-of-sequence, end-of-turn and end-of-message tokens, in that order, each once.
pub fn eos_token_ids(header: &GgufHeader) -> Result<Vec<u32>, GgufError> {
    let mut ids = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        if let Some(id) = super::vocab::token_id(header, key)?
            && !ids.contains(&id)
        {
            ids.push(id);
        }
    }
    Ok(ids)
}
