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

#[cfg(test)]
mod tests {
    use swarm_weights::{RopeConfig, RopeScaling};

    use super::*;

    /// A configuration of `family` with exactly the parts it needs.
    fn plain(family: Family) -> ModelConfig {
        ModelConfig {
            family,
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 100,
            rms_norm_eps: 1e-5,
            rope: RopeConfig { theta: 1e4, rotary_dim: 16, scaling: RopeScaling::None },
            max_position_embeddings: 512,
            layer_windows: vec![None, None],
            tie_word_embeddings: false,
            attention_bias: family == Family::Qwen2,
            o_proj_bias: false,
            mlp_bias: false,
            qk_norm: family == Family::Qwen3,
        }
    }

    #[test]
    fn each_family_takes_its_own_parts_and_refuses_the_others_by_name() {
        type Change = fn(&mut ModelConfig);
        let changes: [(&str, Change); 6] = [
            ("biases on q_proj, k_proj and v_proj", |c| c.attention_bias = !c.attention_bias),
            ("a bias on o_proj", |c| c.o_proj_bias = true),
            ("biases in the MLP", |c| c.mlp_bias = true),
            ("q_norm and k_norm", |c| c.qk_norm = !c.qk_norm),
            ("a sliding window", |c| c.layer_windows[1] = Some(8)),
            ("", |_| {}),
        ];
        let families = [
            (Family::Llama, [true, true, true, false, true, true]),
            (Family::Mistral, [false, false, false, false, true, true]),
            (Family::Qwen2, [false, false, false, false, true, true]),
            (Family::Qwen3, [true, true, false, false, true, true]),
        ];
        for (family, allowed) in families {
            for ((part, change), allowed) in changes.iter().zip(allowed) {
                let mut config = plain(family);
                change(&mut config);
                match check(&config) {
                    Ok(()) => assert!(allowed, "{family:?} accepted a change of {part}"),
                    Err(error) => {
                        assert!(!allowed, "{family:?}: {error}");
                        assert!(error.to_string().contains(part), "{error}");
                    }
                }
            }
        }
    }
}
