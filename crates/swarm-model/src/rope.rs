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
    /// [`LoadError::Rope`] when the scaling gives a frequency that is not a finite number, when it has
    /// a factor per frequency whose count is not `rotary_dim / 2`, or when memory does not suffice.
    pub fn new(config: &RopeConfig, context: usize) -> Result<Self, LoadError> {
        let (inv_freq, attention_factor) = inverse_frequencies(config)?;
        let half = inv_freq.len();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        let len = context.saturating_mul(half);
        if cos.try_reserve_exact(len).and_then(|()| sin.try_reserve_exact(len)).is_err() {
            return Err(LoadError::Rope { why: format!("no memory for a table of {context} positions") });
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn llama32() -> RopeConfig {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        RopeConfig { theta: 500_000.0, rotary_dim: 64, scaling }
    }

    fn qwen25_yarn() -> RopeConfig {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 32_768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        };
        RopeConfig { theta: 1e6, rotary_dim: 128, scaling }
    }

    fn yarn_with_every_option() -> RopeConfig {
        let scaling = RopeScaling::Yarn {
            factor: 16.0,
            original_max_position_embeddings: 1024,
            beta_fast: 24.0,
            beta_slow: 2.0,
            attention_factor: None,
            mscale: Some(0.8),
            mscale_all_dim: Some(0.5),
            truncate: false,
        };
        RopeConfig { theta: 1e4, rotary_dim: 64, scaling }
    }

    fn linear() -> RopeConfig {
        RopeConfig { theta: 1e4, rotary_dim: 64, scaling: RopeScaling::Linear { factor: 4.0 } }
    }

    /// Every fourth frequency, and the factor on cos and sin, as transformers 5.23 computes them in f32.
    #[test]
    fn frequencies_are_those_of_transformers() {
        #[rustfmt::skip]
        let cases: [(RopeConfig, &[f64], f64); 4] = [
            (llama32(), &[1.0, 0.19392276, 0.037606031, 0.0072926651, 0.00042955671, 8.5702559e-06, 1.6619674e-06,
                3.2229329e-07], 1.0),
            (qwen25_yarn(), &[1.0, 0.42169651, 0.17782794, 0.074989416, 0.031622779, 0.013335215, 0.0053753215,
                0.0018482766, 0.00060294115, 0.00017984115, 4.4456985e-05, 1.8747356e-05, 7.9056936e-06,
                3.3338035e-06, 1.4058534e-06, 5.9284343e-07], 1.138629436111989),
            (yarn_with_every_option(), &[1.0, 0.31622776, 0.085397676, 0.013269541, 0.00062499999, 0.00019764237,
                6.2500003e-05, 1.9764237e-05], 1.0730506862278348),
            (linear(), &[0.25, 0.079056941, 0.025, 0.0079056947, 0.0024999999, 0.00079056947, 0.00025000001,
                7.9056947e-05], 1.0),
        ];
        for (config, want, want_factor) in cases {
            let (inv_freq, factor) = inverse_frequencies(&config).unwrap();
            assert_eq!(inv_freq.len(), config.rotary_dim / 2);
            assert!((factor - want_factor).abs() < 1e-12);
            for (got, want) in inv_freq.iter().step_by(4).zip(want) {
                assert!((got / want - 1.0).abs() < 2e-6, "{config:?}: {got:e} for {want:e}");
            }
        }
    }

    /// The bits of whole tables. A platform that computes another table would compute other tokens.
    #[test]
    fn tables_have_the_committed_digests() {
        let digest = |config: &RopeConfig| {
            let table = RopeTable::new(config, 4096).unwrap();
            let mut hasher = blake3::Hasher::new();
            for value in table.cos.iter().chain(&table.sin) {
                hasher.update(&value.to_le_bytes());
            }
            hasher.finalize().to_hex()[..16].to_owned()
        };
        let plain = RopeConfig { scaling: RopeScaling::None, ..qwen25_yarn() };
        let got = [plain, linear(), llama32(), qwen25_yarn(), yarn_with_every_option()].map(|c| digest(&c));
        let want = [
            "6b592113f18a5de7",
            "e1bc75b7ad04a1df",
            "6d95fdf0d3c118b9",
            "b7d4718980ccafba",
            "f67699ba6d87e501",
        ];
        assert_eq!(got, want);
    }

    #[test]
    fn the_first_row_turns_nothing_and_a_later_one_by_its_angle() {
        let config = RopeConfig { theta: 1e4, rotary_dim: 4, scaling: RopeScaling::Factors(vec![1.0, 2.0]) };
        let table = RopeTable::new(&config, 8).unwrap();
        assert_eq!(table.at(0), (&[1.0, 1.0][..], &[0.0, 0.0][..]));
        let (cos, sin) = table.at(7);
        assert_eq!((cos[0], sin[0]), (7f64.cos() as f32, 7f64.sin() as f32));
        assert_eq!((cos[1], sin[1]), (0.035f64.cos() as f32, 0.035f64.sin() as f32));
    }

    #[test]
    fn factors_that_do_not_fit_are_refused() {
        for factors in [vec![], vec![1.0; 3], vec![0.0, 1.0], vec![f32::NAN, 1.0]] {
            let config = RopeConfig { theta: 1e4, rotary_dim: 4, scaling: RopeScaling::Factors(factors) };
            assert!(RopeTable::new(&config, 8).is_err(), "{config:?}");
        }
    }
}
