//! Qwen3 (dense): the Llama layer, with an RMS norm over each query and key head before RoPE.
//!
//! Qwen3, arXiv:2505.09388 section 2: the biases of Qwen2 are gone, QK-Norm (arXiv:2302.05442) takes
//! their place. `attention_bias` may bring biases back, on all four projections. `head_dim` is its own
//! number, not `hidden_size / num_attention_heads`.

use super::{Part, Parts};

pub(super) const PARTS: Parts = Parts {
    qkv_bias: Part::Maybe,
    o_proj_bias: Part::Maybe,
    mlp_bias: Part::Never,
    qk_norm: Part::Always,
    sliding_window: Part::Maybe,
};
