//! How the tail picks a token from logits.

use serde::{Deserialize, Serialize};

/// Sampling parameters of one session, as they travel in `Open`. The tail's random stream is
/// keyed by `(seed, position)`, so that any node can resume it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 picks the most likely token. In `0.0 ..= 100.0`.
    pub temperature: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the most likely tokens whose probabilities reach this sum; above 0, at most 1.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one, in `0.0 ..= 1.0`.
    pub min_p: f32,
    /// Divides (or multiplies) the logits of tokens already seen; 1 changes nothing. In
    /// `0.01 ..= 100.0`.
    pub repetition_penalty: f32,
    /// Key of the random stream.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy: the most likely token, always.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// A sampling number outside its range. The caller's fault when it comes from a request, the
/// peer's when it comes from a frame.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{what} is {value}, but it must be {range}")]
pub struct SamplingError {
    /// The field.
    pub what: &'static str,
    /// Its value.
    pub value: f32,
    /// What it may be, in words.
    pub range: &'static str,
}

impl Sampling {
    /// Checks every number: finite and in range.
    ///
    /// # Errors
    /// [`SamplingError`] naming the first number that is not.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let Self { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        // Comparisons with NaN are false, and each infinity fails one bound.
        let checks = [
            ("temperature", temperature, (0.0..=100.0).contains(&temperature), "between 0 and 100"),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", min_p, (0.0..=1.0).contains(&min_p), "between 0 and 1"),
            (
                "repetition_penalty",
                repetition_penalty,
                (0.01..=100.0).contains(&repetition_penalty),
                "between 0.01 and 100",
            ),
        ];
        for (what, value, fine, range) in checks {
            if !fine {
                return Err(SamplingError { what, value, range });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_range_are_refused() {
        Sampling::default().validate().unwrap();
        let base = Sampling::default();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, -f32::MIN_POSITIVE] {
            assert!(Sampling { temperature: bad, ..base }.validate().is_err());
            assert!(Sampling { top_p: bad, ..base }.validate().is_err());
            assert!(Sampling { min_p: bad, ..base }.validate().is_err());
            assert!(Sampling { repetition_penalty: bad, ..base }.validate().is_err());
        }
        assert!(Sampling { top_p: 0.0, ..base }.validate().is_err());
        assert!(Sampling { repetition_penalty: 0.0, ..base }.validate().is_err());
    }
}
