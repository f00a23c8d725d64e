//! Rotary position embedding: the table of cos and sin a stage turns its queries and keys by.
//!
//! RoPE: arXiv:2104.09864. The table is the one place where transcendental functions are needed. It
//! is computed once on the host, in f64 with a pinned libm, and rounded to f32 at the end; the same
//! bits come out on every platform, and a test holds them against committed digests.

use swarm_weights::{RopeConfig, RopeScaling};

use crate::LoadError;

/// cos and sin for every position of a context. Half-split layout: element `i` of a head turns
/// with element `i + rotary_dim / 2`.
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>, // [context, rotary_dim / 2]
    sin: Vec<f32>, // [context, rotary_dim / 2]
}

impl RopeTable {
    /// Computes the table for positions `0..context`. Holds `4 * rotary_dim * context` bytes.
    ///
    /// # Errors
    /// [`LoadError::Rope`] when the scaling gives a frequency that is not a finite number, or a
    /// factor per frequency whose count is not `rotary_dim / 2`.
    pub fn new(config: &RopeConfig, context: usize) -> Result<Self, LoadError> {
        let (inv_freq, attention_factor) = inverse_frequencies(config)?;
        let half = inv_freq.len();
        let mut cos = Vec::with_capacity(context.saturating_mul(half));
        let mut sin = Vec::with_capacity(context.saturating_mul(half));
        for position in 0..context {
            for freq in &inv_freq {
                let angle = position as f64 * freq;
                cos.push((libm::cos(angle) * attention_factor) as f32);
                sin.push((libm::sin(angle) * attention_factor) as f32);
            }
        }
        Ok(Self { half, cos, sin })
    }

    /// cos and sin of one position, each `[rotary_dim / 2]`. The caller checked the context.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let row = position * self.half..(position + 1) * self.half;
        (&self.cos[row.clone()], &self.sin[row])
    }
}

/// Bytes of the table for `context` positions.
pub fn table_bytes(config: &RopeConfig, context: usize) -> usize {
    config.rotary_dim.saturating_mul(context).saturating_mul(size_of::<f32>())
}

/// Radians per position of each rotated pair, `[rotary_dim / 2]`, and the factor on cos and sin.
///
/// Follows `modeling_rope_utils.py` of Hugging Face transformers case by case.
fn inverse_frequencies(config: &RopeConfig) -> Result<(Vec<f64>, f64), LoadError> {
    let dim = config.rotary_dim as f64;
    let plain: Vec<f64> = (0..config.rotary_dim / 2)
        .map(|pair| 1.0 / libm::pow(config.theta, (2 * pair) as f64 / dim))
        .collect();
    let (inv_freq, attention_factor) = match &config.scaling {
        RopeScaling::None => (plain, 1.0),
        RopeScaling::Linear { factor } => (plain.iter().map(|freq| freq / factor).collect(), 1.0),
        RopeScaling::Llama3 { .. } => {
            (plain.iter().map(|&freq| llama3(freq, &config.scaling)).collect(), 1.0)
        }
        RopeScaling::Yarn { .. } => yarn(&plain, config),
        RopeScaling::Factors(factors) => {
            if factors.len() != plain.len() {
                return Err(LoadError::Rope {
                    why: format!("{} factors for {} frequencies", factors.len(), plain.len()),
                });
            }
            (plain.iter().zip(factors).map(|(freq, &factor)| freq / f64::from(factor)).collect(), 1.0)
        }
    };
    if inv_freq.iter().chain([&attention_factor]).all(|value| value.is_finite()) {
        Ok((inv_freq, attention_factor))
    } else {
        Err(LoadError::Rope { why: format!("{:?} gives a frequency that is not finite", config.scaling) })
    }
}

/// Llama 3.1: slow frequencies are divided by `factor`, fast ones kept, those between blended
/// (arXiv:2407.21783 raises the context so; the formula is the one of its reference code).
fn llama3(freq: f64, scaling: &RopeScaling) -> f64 {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } =
        scaling
    else {
        return freq;
    };
    let context = *original_max_position_embeddings as f64;
    let wavelength = std::f64::consts::TAU / freq;
    if wavelength < context / high_freq_factor {
        freq
    } else if wavelength > context / low_freq_factor {
        freq / factor
    } else {
        let smooth = (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
        (1.0 - smooth) * freq / factor + smooth * freq
    }
}

/// YaRN, arXiv:2309.00071 section 3: pairs that turn often within the original context keep their
/// frequency, pairs that do not complete a turn are interpolated, a linear ramp lies between.
fn yarn(plain: &[f64], config: &RopeConfig) -> (Vec<f64>, f64) {
    let RopeScaling::Yarn {
        factor,
        original_max_position_embeddings,
        beta_fast,
        beta_slow,
        attention_factor,
        mscale,
        mscale_all_dim,
        truncate,
    } = &config.scaling
    else {
        return (plain.to_vec(), 1.0);
    };
    let dim = config.rotary_dim as f64;
    let context = *original_max_position_embeddings as f64;
    // The pair that makes `turns` turns within the original context.
    let pair_of = |turns: f64| {
        dim * libm::log(context / (turns * std::f64::consts::TAU)) / (2.0 * libm::log(config.theta))
    };
    let (mut low, mut high) = (pair_of(*beta_fast), pair_of(*beta_slow));
    if *truncate {
        (low, high) = (libm::floor(low), libm::ceil(high));
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001; // a ramp of no width would divide by zero
    }
    let inv_freq = plain
        .iter()
        .enumerate()
        .map(|(pair, freq)| {
            let interpolated = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            freq / factor * interpolated + freq * (1.0 - interpolated)
        })
        .collect();
    let given_scales = mscale.zip(*mscale_all_dim).filter(|&(a, b)| a != 0.0 && b != 0.0);
    let on_cos_and_sin = match (attention_factor, given_scales) {
        (Some(given), _) => *given,
        (None, Some((mscale, all_dim))) => yarn_mscale(*factor, mscale) / yarn_mscale(*factor, all_dim),
        (None, None) => yarn_mscale(*factor, 1.0),
    };
    (inv_freq, on_cos_and_sin)
}

fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * libm::log(factor) + 1.0 }
}
