//! What a stage takes, known before it is loaded: for the memory check and for placement.

use std::ops::Range;

use swarm_kernels::{KvType, Matrix};
use swarm_weights::{Checkpoint, EMBED, HEAD, ModelConfig, NORM, TensorInfo};

use crate::load::held_tensors;
use crate::scratch::Widths;
use crate::stage::check_layers;
use crate::{KvLayout, LoadError, rope};

/// Memory of a stage, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageSize {
    /// Weights as they are held: matrices packed for this CPU, vectors as f32. Without an embedding that is only looked
    /// up in.
    pub weight_bytes: u64,
    /// KV rows of one position in all layers of the stage.
    pub kv_bytes_per_position: u64,
    rope_bytes_per_position: u64,
    floats_per_token: u64,
    vocab: u64,
}

impl StageSize {
    /// Buffers of a step of at most `tokens_max` tokens, of which `sampled_max` want logits here.
    pub fn scratch_bytes(&self, tokens_max: usize, sampled_max: usize) -> u64 {
        // Activations, and once more the widest of them as the matmul packs them: at most f32 again.
        let activations = self.floats_per_token.saturating_mul(2 * 4).saturating_mul(tokens_max as u64);
        activations.saturating_add(self.vocab.saturating_mul(4).saturating_mul(sampled_max as u64))
    }

    /// The RoPE table of a context.
    pub fn rope_bytes(&self, context: usize) -> u64 {
        self.rope_bytes_per_position.saturating_mul(context as u64)
    }
}

/// What `layers` of `checkpoint` take as a stage. Reads no tensor.
///
/// # Errors
/// [`LoadError::Layers`] when `layers` is not a stage of the model.
pub fn stage_size(
    checkpoint: &Checkpoint,
    layers: Range<usize>,
    kv_type: KvType,
) -> Result<StageSize, LoadError> {
    let config = checkpoint.config();
    check_layers(config, &layers)?;
    let weight_bytes = held_tensors(checkpoint, &layers).iter().map(|tensor| held_bytes(tensor)).sum();
    let tail = layers.end == config.num_hidden_layers;
    Ok(StageSize {
        weight_bytes,
        kv_bytes_per_position: kv_layout(config, layers.len(), kv_type).bytes_per_position() as u64,
        rope_bytes_per_position: rope::table_bytes(&config.rope, 1) as u64,
        floats_per_token: Widths::of(config).floats_per_token() as u64,
        vocab: if tail { config.vocab_size as u64 } else { 0 },
    })
}

/// Weights of a model as a stage holds them, in bytes. The embedding is not among them unless it is the head: rows that
/// are looked up are read from the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightSizes {
    /// Each layer.
    pub layers: Vec<u64>,
    /// The final norm.
    pub norm: u64,
    /// The head: the embedding, where that is the head.
    pub head: u64,
}

/// What the weights of `checkpoint` take, part by part. Reads no tensor.
pub fn weight_sizes(checkpoint: &Checkpoint) -> WeightSizes {
    let config = checkpoint.config();
    let of = |name: &str| checkpoint.tensor(name).map_or(0, held_bytes);
    let layer = |layer: usize| {
        let prefix = format!("model.layers.{layer}.");
        let tensors = checkpoint.stage_tensors(layer..layer + 1);
        tensors
            .iter()
            .filter(|tensor| tensor.name.starts_with(&prefix))
            .map(|tensor| held_bytes(tensor))
            .sum()
    };
    WeightSizes {
        layers: (0..config.num_hidden_layers).map(layer).collect(),
        norm: of(NORM),
        head: of(if config.tie_word_embeddings { EMBED } else { HEAD }),
    }
}

/// A tensor in memory: a matrix in this CPU's layout, a vector as f32.
fn held_bytes(tensor: &TensorInfo) -> u64 {
    if tensor.rows == 1 {
        return 4 * tensor.cols as u64;
    }
    // A shape that cannot be is refused when it is loaded.
    Matrix::bytes_needed(tensor.held, tensor.rows, tensor.cols).map_or(tensor.bytes, |bytes| bytes as u64)
}

/// The KV pages of `layers` layers of a model.
pub fn kv_layout(config: &ModelConfig, layers: usize, kv_type: KvType) -> KvLayout {
    KvLayout { layers, kv_heads: config.num_key_value_heads, head_dim: config.head_dim, kv_type }
}
