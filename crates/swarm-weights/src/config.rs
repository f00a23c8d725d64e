//! The shape of a model: what every other room reads instead of `config.json` or GGUF metadata.

use std::ops::Range;

/// Largest values accepted. Far above any published model of these families, far below what would
/// let a product of two overflow 64 bits or a table exhaust memory.
mod max {
    pub const WIDTH: usize = 1 << 20;
    pub const LAYERS: usize = 4096;
    pub const HEADS: usize = 1 << 14;
    pub const HEAD_DIM: usize = 1 << 12;
    pub const VOCAB: usize = 1 << 21;
    pub const CONTEXT: usize = 1 << 30;
}

/// The architectures this program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Family {
    /// The `model_type` of `config.json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// A decoder-only transformer, as its checkpoint describes it. Field names are those of
/// `config.json`. [`ModelConfig::validate`] holds for every value a [`crate::Checkpoint`] gives out.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Even; need not be `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    pub vocab_size: usize,
    pub rms_norm_eps: f32,
    pub rope: RopeConfig,
    pub max_position_embeddings: usize,
    /// One entry per layer: `Some(window)` when position `p` of that layer attends to
    /// `p - window + 1 ..= p` only, `None` when it attends to everything before it.
    pub layer_windows: Vec<Option<usize>>,
    /// The head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// `q_proj`, `k_proj` and `v_proj` have biases.
    pub attention_bias: bool,
    pub o_proj_bias: bool,
    /// `gate_proj`, `up_proj` and `down_proj` have biases.
    pub mlp_bias: bool,
    /// `q_norm` and `k_norm`: RMS norms over each head, before RoPE.
    pub qk_norm: bool,
}

/// Rotary position embedding over the first `rotary_dim` elements of each head, half-split layout:
/// element `i` is rotated with element `i + rotary_dim / 2` by `position * theta^(-2i / rotary_dim)`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    pub theta: f64,
    /// Even, at most `head_dim`.
    pub rotary_dim: usize,
    pub scaling: RopeScaling,
}

/// How the rotary frequencies are stretched for long contexts. Names and meaning are those of the
/// Hugging Face `rope_parameters`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by `factor`.
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
    /// YaRN, arXiv:2309.00071. `attention_factor`, when given, replaces the factor on cos and sin that is
    /// otherwise `get_mscale(factor, mscale) / get_mscale(factor, mscale_all_dim)` when both are given,
    /// else `get_mscale(factor, 1)`, with `get_mscale(s, m) = 0.1 m ln s + 1` for `s > 1`, else 1.
    Yarn {
        factor: f64,
        original_max_position_embeddings: usize,
        beta_fast: f64,
        beta_slow: f64,
        attention_factor: Option<f64>,
        mscale: Option<f64>,
        mscale_all_dim: Option<f64>,
        /// Round the ends of the ramp outwards to whole dimensions.
        truncate: bool,
    },
    /// `rotary_dim / 2` divisors, one per frequency: GGUF's `rope_freqs.weight`.
    Factors(Vec<f32>),
}

/// A configuration that cannot be run. The text names the key.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    #[error("{key} is missing")]
    Missing { key: String },
    #[error("{key} is {got}, which is not {want}")]
    Type { key: String, want: &'static str, got: String },
    #[error("{what} is not supported; supported: {supported}")]
    Unsupported { what: String, supported: &'static str },
    #[error("{key} is {got}: {why}")]
    Range { key: &'static str, got: String, why: String },
}

impl ModelConfig {
    /// The sliding window of `layer` in positions, `None` for full attention.
    pub fn layer_window(&self, layer: usize) -> Option<usize> {
        self.layer_windows.get(layer).copied().flatten()
    }

    /// Rows of `q_proj`: `num_attention_heads * head_dim`.
    pub fn q_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Rows of `k_proj` and of `v_proj`: `num_key_value_heads * head_dim`.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// All layers, `0..num_hidden_layers`.
    pub fn layers(&self) -> Range<usize> {
        0..self.num_hidden_layers
    }

    /// Holds every size against its limit and against the others.
    ///
    /// # Errors
    /// [`ConfigError::Range`] naming the first key that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        within("hidden_size", self.hidden_size, max::WIDTH)?;
        within("intermediate_size", self.intermediate_size, max::WIDTH)?;
        within("num_hidden_layers", self.num_hidden_layers, max::LAYERS)?;
        within("num_attention_heads", self.num_attention_heads, max::HEADS)?;
        within("num_key_value_heads", self.num_key_value_heads, max::HEADS)?;
        within("head_dim", self.head_dim, max::HEAD_DIM)?;
        within("vocab_size", self.vocab_size, max::VOCAB)?;
        within("max_position_embeddings", self.max_position_embeddings, max::CONTEXT)?;
        even("head_dim", self.head_dim)?;
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let why = format!("{} query heads cannot share them evenly", self.num_attention_heads);
            return range("num_key_value_heads", self.num_key_value_heads, why);
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return range("rms_norm_eps", self.rms_norm_eps, "a positive number is needed".into());
        }
        if self.layer_windows.len() != self.num_hidden_layers {
            let why = format!("one entry for each of {} layers is needed", self.num_hidden_layers);
            return range("layer_types", self.layer_windows.len(), why);
        }
        if self.layer_windows.contains(&Some(0)) {
            return range("sliding_window", 0, "a window holds at least one position".into());
        }
        self.rope.validate(self.head_dim)
    }
}

impl RopeConfig {
    fn validate(&self, head_dim: usize) -> Result<(), ConfigError> {
        positive("rope_theta", self.theta)?;
        even("rotary dimension", self.rotary_dim)?;
        if self.rotary_dim == 0 || self.rotary_dim > head_dim {
            return range("rotary dimension", self.rotary_dim, format!("the head has {head_dim} dimensions"));
        }
        self.scaling.validate(self.rotary_dim)
    }
}

impl RopeScaling {
    fn validate(&self, rotary_dim: usize) -> Result<(), ConfigError> {
        match self {
            Self::None => Ok(()),
            Self::Linear { factor } => positive("rope scaling factor", *factor),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                positive("rope scaling factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    let why = format!("it must be larger than low_freq_factor {low_freq_factor}");
                    return range("high_freq_factor", *high_freq_factor, why);
                }
                within("original_max_position_embeddings", *original_max_position_embeddings, max::CONTEXT)
            }
            Self::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate: _,
            } => {
                positive("rope scaling factor", *factor)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                for (key, value) in [
                    ("attention_factor", attention_factor),
                    ("mscale", mscale),
                    ("mscale_all_dim", mscale_all_dim),
                ] {
                    value.map_or(Ok(()), |value| positive(key, value))?;
                }
                within("original_max_position_embeddings", *original_max_position_embeddings, max::CONTEXT)
            }
            Self::Factors(factors) => {
                if factors.len() != rotary_dim / 2 {
                    let why = format!("{} frequencies need one factor each", rotary_dim / 2);
                    return range("number of rope_freqs", factors.len(), why);
                }
                factors.iter().try_for_each(|&factor| positive("rope_freqs", f64::from(factor)))
            }
        }
    }
}

fn range<T>(key: &'static str, got: impl ToString, why: String) -> Result<T, ConfigError> {
    Err(ConfigError::Range { key, got: got.to_string(), why })
}

fn within(key: &'static str, got: usize, max: usize) -> Result<(), ConfigError> {
    if got == 0 || got > max {
        return range(key, got, format!("1 to {max} is possible"));
    }
    Ok(())
}

fn even(key: &'static str, got: usize) -> Result<(), ConfigError> {
    if got.is_multiple_of(2) {
        Ok(())
    } else {
        range(key, got, "RoPE turns pairs, so it must be even".into())
    }
}

fn positive(key: &'static str, got: f64) -> Result<(), ConfigError> {
    if got.is_finite() && got > 0.0 { Ok(()) } else { range(key, got, "a positive number is needed".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
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
            layer_windows: vec![None, Some(8)],
            tie_word_embeddings: false,
            attention_bias: false,
            o_proj_bias: false,
            mlp_bias: false,
            qk_norm: false,
        }
    }

    #[test]
    fn a_sound_configuration_passes() {
        let config = sound();
        config.validate().unwrap();
        assert_eq!((config.q_width(), config.kv_width(), config.layers()), (64, 32, 0..2));
        assert_eq!([0, 1, 2].map(|layer| config.layer_window(layer)), [None, Some(8), None]);
    }

    #[test]
    fn each_broken_size_is_named() {
        type Break = fn(&mut ModelConfig);
        let cases: [(&str, Break); 16] = [
            ("hidden_size", |c| c.hidden_size = 0),
            ("hidden_size", |c| c.hidden_size = usize::MAX),
            ("intermediate_size", |c| c.intermediate_size = 0),
            ("num_hidden_layers", |c| c.num_hidden_layers = 1 << 20),
            ("num_attention_heads", |c| c.num_attention_heads = 0),
            ("num_key_value_heads", |c| c.num_key_value_heads = 3),
            ("num_key_value_heads", |c| c.num_key_value_heads = 0),
            ("head_dim", |c| c.head_dim = 15),
            ("vocab_size", |c| c.vocab_size = 1 << 40),
            ("rms_norm_eps", |c| c.rms_norm_eps = f32::NAN),
            ("rope_theta", |c| c.rope.theta = -1.0),
            ("rotary dimension", |c| c.rope.rotary_dim = 18),
            ("rotary dimension", |c| c.rope.rotary_dim = 0),
            ("layer_types", |c| c.layer_windows = vec![]),
            ("sliding_window", |c| c.layer_windows = vec![Some(0), None]),
            ("number of rope_freqs", |c| c.rope.scaling = RopeScaling::Factors(vec![1.0; 7])),
        ];
        for (key, break_it) in cases {
            let mut config = sound();
            break_it(&mut config);
            let text = config.validate().unwrap_err().to_string();
            assert!(text.starts_with(key), "{key}: {text}");
        }
    }

    #[test]
    fn scaling_factors_must_be_positive_numbers() {
        for bad in [0.0, -2.0, f64::NAN, f64::INFINITY] {
            let mut config = sound();
            config.rope.scaling = RopeScaling::Linear { factor: bad };
            assert!(config.validate().is_err(), "{bad}");
        }
    }
}
