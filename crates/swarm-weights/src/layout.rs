//! Which tensors a model has, and their shapes: the list every checkpoint is held against.

use std::collections::BTreeMap;

use swarm_kernels::DType;

use crate::config::ModelConfig;
use crate::error::WeightsError;

/// The embedding matrix, `[vocab_size, hidden_size]`.
pub const EMBED: &str = "model.embed_tokens.weight";
/// The final norm, `[hidden_size]`.
pub const NORM: &str = "model.norm.weight";
/// The head, `[vocab_size, hidden_size]`. Absent when it is tied to the embedding.
pub const HEAD: &str = "lm_head.weight";

/// A tensor as a header describes it, before it is known whether the model wants it.
#[derive(Clone, Debug)]
pub(crate) struct RawTensor {
    /// The name in the file.
    pub stored_name: String,
    /// `Err` with the spelling of a type that is not one of ours: an error only if the tensor is needed.
    pub dtype: Result<DType, String>,
    /// Row-major, slowest dimension first.
    pub shape: Vec<u64>,
    /// Index of the file.
    pub source: usize,
    pub offset: u64,
    pub bytes: u64,
}

/// One tensor of an opened model. Vectors have one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Hugging Face spelling, whatever the file's own.
    pub name: String,
    /// As stored.
    pub dtype: DType,
    /// As a stage holds it: another one when it is quantized while it is loaded.
    pub held: DType,
    pub rows: usize,
    pub cols: usize,
    /// As stored, and as [`crate::Checkpoint::read`] gives them.
    pub bytes: u64,
    pub(crate) source: usize,
    pub(crate) offset: u64,
    /// The file stores RoPE pairs next to each other.
    pub(crate) interleaved: bool,
}

impl TensorInfo {
    /// Where it is stored, as something to sort by: which file, and where in it.
    pub fn place(&self) -> (usize, u64) {
        (self.source, self.offset)
    }
}

/// A tensor the model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    pub name: String,
    /// `[n]` for vectors, `[rows, cols]` for matrices.
    pub shape: Vec<usize>,
}

/// The tensors of one decoder layer, in the order the forward pass uses them.
pub(crate) fn layer(config: &ModelConfig, layer: usize) -> Vec<Want> {
    let (width, inner, head) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q, kv) = (config.q_width(), config.kv_width());
    let mut wants = Vec::new();
    let mut push = |part: &str, shape: &[usize]| {
        wants.push(Want { name: format!("model.layers.{layer}.{part}"), shape: shape.to_vec() });
    };
    push("input_layernorm.weight", &[width]);
    for (part, rows) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
        push(&format!("self_attn.{part}.weight"), &[rows, width]);
        if config.attention_bias {
            push(&format!("self_attn.{part}.bias"), &[rows]);
        }
    }
    if config.qk_norm {
        push("self_attn.q_norm.weight", &[head]);
        push("self_attn.k_norm.weight", &[head]);
    }
    push("self_attn.o_proj.weight", &[width, q]);
    if config.o_proj_bias {
        push("self_attn.o_proj.bias", &[width]);
    }
    push("post_attention_layernorm.weight", &[width]);
    for (part, rows, cols) in
        [("gate_proj", inner, width), ("up_proj", inner, width), ("down_proj", width, inner)]
    {
        push(&format!("mlp.{part}.weight"), &[rows, cols]);
        if config.mlp_bias {
            push(&format!("mlp.{part}.bias"), &[rows]);
        }
    }
    wants
}

pub(crate) fn embed(config: &ModelConfig) -> Want {
    Want { name: EMBED.into(), shape: vec![config.vocab_size, config.hidden_size] }
}

pub(crate) fn norm(config: &ModelConfig) -> Want {
    Want { name: NORM.into(), shape: vec![config.hidden_size] }
}

/// `None` when the head is the embedding.
pub(crate) fn head(config: &ModelConfig) -> Option<Want> {
    let shape = vec![config.vocab_size, config.hidden_size];
    (!config.tie_word_embeddings).then(|| Want { name: HEAD.into(), shape })
}

impl Want {
    /// Takes this tensor out of `raw`, holding type and shape against what is wanted.
    pub fn take(
        self,
        raw: &mut BTreeMap<String, RawTensor>,
        model: &str,
    ) -> Result<TensorInfo, WeightsError> {
        let Self { name, shape } = self;
        let Some(found) = raw.remove(&name) else {
            return Err(WeightsError::MissingTensor { model: model.to_owned(), name });
        };
        let want: Vec<u64> = shape.iter().map(|&dim| dim as u64).collect();
        // GGUF may spell trailing dimensions of 1, which row-major order puts first.
        let ones = found.shape.len().saturating_sub(want.len());
        let (leading, rest) = found.shape.split_at_checked(ones).unwrap_or((&[], &found.shape));
        if rest != want || leading.iter().any(|&dim| dim != 1) {
            return Err(WeightsError::Shape { name, want, got: found.shape });
        }
        let dtype = match found.dtype {
            Ok(dtype) => dtype,
            Err(dtype) => {
                let hint = "; use a checkpoint in F32, F16 or BF16";
                return Err(WeightsError::Dtype { name, dtype, hint });
            }
        };
        let (rows, cols) = match shape.as_slice() {
            &[rows, cols] => (rows, cols),
            _ => (1, shape.iter().product()),
        };
        if shape.len() == 1 && dtype.block_len() > 1 {
            let hint = " for a vector; norms and biases must be F32, F16 or BF16";
            return Err(WeightsError::Dtype { name, dtype: dtype.name().into(), hint });
        }
        // Both formats computed this from the shape already; this ties it to the shape wanted here.
        let bytes = dtype.row_bytes(cols).and_then(|row| row.checked_mul(rows));
        if bytes.map(|bytes| bytes as u64) != Some(found.bytes) {
            return Err(WeightsError::Shape { name, want, got: found.shape });
        }
        let RawTensor { source, offset, bytes, .. } = found;
        Ok(TensorInfo { name, dtype, held: dtype, rows, cols, bytes, source, offset, interleaved: false })
    }
}
