//! Llama: TinyLlama, SmolLM2, Llama 2 and 3.x.
//!
//! Pre-norm decoder with RMSNorm (arXiv:1910.07467), SwiGLU (arXiv:2002.05202), RoPE
//! (arXiv:2104.09864) and grouped-query attention (arXiv:2305.13245), put together as in LLaMA,
//! arXiv:2302.13971 section 2.2, and Llama 2, arXiv:2307.09288 section 2.2. Llama 3.x, arXiv:2407.21783,
//! adds a RoPE scaling only. Biases occur in derived models whose configuration asks for them. A sliding
//! window occurs in GGUF files of Mistral models, which call themselves `llama`; see [`super::mistral`].

use super::{Part, Parts};

pub(super) const PARTS: Parts = Parts {
    qkv_bias: Part::Maybe,
    o_proj_bias: Part::Maybe,
    mlp_bias: Part::Maybe,
    qk_norm: Part::Never,
    sliding_window: Part::Maybe,
};
