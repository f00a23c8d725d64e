//! How likely a text is to a model: the measure that tells whether arithmetic lost something.

use swarm_kernels::{Pool, exp_in_place};

use crate::{KvPool, Scratch, Segment, Stage, StepError};

/// Rows whose logits exist at once: a vocabulary of 150 000 makes them 40 MB.
const ROWS: usize = 64;

/// The score of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Tokens whose probability was asked for: all but the first.
    pub tokens: usize,
    /// The sum of the natural logarithms of their probabilities, in order of position.
    pub log_probability: f64,
}

impl Score {
    /// `e` to the mean negative log probability; `None` of a text without a second token.
    pub fn perplexity(&self) -> Option<f64> {
        (self.tokens > 0).then(|| libm::exp(-self.log_probability / self.tokens as f64))
    }
}

/// The natural logarithm of the probability that `logits`, `[vocab]`, give `token`.
///
/// `(logit - max) - ln(sum of exp(logit - max))`: the differences and their [exp](swarm_kernels::math::exp) in f32,
/// the sum in f64 in order of id, the logarithm by a pinned libm. Equal logits give equal bits on every computer.
/// NaN where the largest logit is not finite or `token` is none. `buffer` is reused from call to call.
pub fn log_probability(logits: &[f32], token: u32, buffer: &mut Vec<f32>) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &logit| if logit > max { logit } else { max });
    let Some(&logit) = logits.get(token as usize).filter(|_| max.is_finite()) else { return f64::NAN };
    buffer.clear();
    buffer.extend(logits.iter().map(|logit| logit - max));
    exp_in_place(buffer);
    let sum: f64 = buffer.iter().map(|&weight| f64::from(weight)).sum();
    f64::from(logit - max) - libm::log(sum)
}

/// Scores a text on a stage that holds the whole model.
///
/// `ids` are cut into windows of `stage.context()` positions, each a session of its own in `kv`. A window begins with
/// the last token of the one before, so every token but the first is scored once, with at most `context - 1` tokens
/// before it. `progress` is told how many are done. Costs one prefill of the text and a pass over the head per token.
///
/// # Errors
/// [`StepError`], for one when the stage is not a whole model.
pub fn score(
    stage: &Stage,
    pool: &Pool,
    kv: &KvPool,
    ids: &[u32],
    progress: &mut dyn FnMut(usize),
) -> Result<Score, StepError> {
    let (width, vocab) = (stage.config().hidden_size, stage.config().vocab_size);
    let (mut scratch, mut buffer) = (Scratch::default(), Vec::new());
    let (mut hidden, mut logits) = (Vec::new(), Vec::new());
    let mut score = Score::default();
    let mut rest = ids;
    while rest.len() > 1 {
        let window = &rest[..rest.len().min(stage.context().max(2))];
        let mut session = kv.open();
        // The last token of a window is only asked about.
        let inputs = window.len() - 1;
        for start in (0..inputs).step_by(ROWS) {
            let rows = ROWS.min(inputs - start);
            hidden.resize(rows * width, 0.0);
            logits.resize(rows * vocab, 0.0);
            stage.embed(&window[start..start + rows], &mut hidden)?;
            let segment = Segment { position: start, tokens: rows, logits: rows, kv: &mut session };
            stage.forward(pool, &mut [segment], &mut hidden, &mut scratch)?;
            stage.logits(pool, &hidden, &mut logits, &mut scratch)?;
            for (logits, &next) in logits.chunks_exact(vocab).zip(&window[start + 1..]) {
                score.log_probability += log_probability(logits, next, &mut buffer);
                score.tokens += 1;
            }
            progress(score.tokens);
        }
        rest = &rest[inputs..];
    }
    Ok(score)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_close_to_f64_and_sum_to_one() {
        let logits: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 9.0).collect();
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let mut buffer = Vec::new();
        let mut sum = 0.0;
        for (token, &logit) in (0..).zip(&logits) {
            let got = log_probability(&logits, token, &mut buffer);
            assert!((got - (f64::from(logit) - total.ln())).abs() < 2e-6, "{token}: {got}");
            sum += got.exp();
        }
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    }

    #[test]
    fn what_is_no_probability_is_nan() {
        let mut buffer = Vec::new();
        assert_eq!(log_probability(&[0.0, f32::NEG_INFINITY], 0, &mut buffer), 0.0);
        assert!(log_probability(&[0.0], 1, &mut buffer).is_nan());
        assert!(log_probability(&[], 0, &mut buffer).is_nan());
        assert!(log_probability(&[f32::INFINITY, 0.0], 0, &mut buffer).is_nan());
        assert_eq!(Score::default().perplexity(), None);
    }
}
