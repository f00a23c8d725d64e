//! What each family of models is: which optional parts its layers have, and where its maths is from.
//!
//! One decoder layer serves all of them ([`crate::decoder`]); a family is the list of parts it has.
//! Weights whose configuration asks for a part the family does not have are refused: the result would
//! be text, but not that model's.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use swarm_weights::{Family, ModelConfig};

/// Whether the layers of a family have an optional part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Never,
    /// The configuration says so.
    Maybe,
    Always,
}

/// The optional parts of a family's layers.
struct Parts {
    /// Biases of `q_proj`, `k_proj` and `v_proj`.
    qkv_bias: Part,
    o_proj_bias: Part,
    mlp_bias: Part,
    /// `q_norm` and `k_norm`: an RMS norm over each head of the queries and keys, before RoPE.
    qk_norm: Part,
    /// Attention to the last `window` positions only.
    sliding_window: Part,
}

/// A configuration that is not one of its family's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FamilyError {
    #[error("a {family} model with {part} is not supported")]
    Unexpected { family: &'static str, part: &'static str },
    #[error("a {family} model without {part} is not supported")]
    Lacking { family: &'static str, part: &'static str },
}

/// Holds `config` against what its family allows and needs.
///
/// # Errors
/// [`FamilyError`] naming the first part that does not belong, or is lacking.
pub fn check(config: &ModelConfig) -> Result<(), FamilyError> {
    let family = config.family.name();
    let parts = match config.family {
        Family::Llama => llama::PARTS,
        Family::Mistral => mistral::PARTS,
        Family::Qwen2 => qwen2::PARTS,
        Family::Qwen3 => qwen3::PARTS,
    };
    let rows = [
        (parts.qkv_bias, config.attention_bias, "biases on q_proj, k_proj and v_proj"),
        (parts.o_proj_bias, config.o_proj_bias, "a bias on o_proj"),
        (parts.mlp_bias, config.mlp_bias, "biases in the MLP"),
        (parts.qk_norm, config.qk_norm, "q_norm and k_norm"),
        (parts.sliding_window, config.layer_windows.iter().any(Option::is_some), "a sliding window"),
    ];
    for (allowed, present, part) in rows {
        match (allowed, present) {
            (Part::Never, true) => return Err(FamilyError::Unexpected { family, part }),
            (Part::Always, false) => return Err(FamilyError::Lacking { family, part }),
            _ => {}
        }
    }
    Ok(())
}
