//! From one row of logits to one token: a pure function of logits, parameters, history and
//! `(seed, position)`. Any node that has these picks the same token.
//!
//! The steps and their order are those of Hugging Face `generate`: repetition penalty, temperature,
//! top-k, top-p, min-p, draw. Probabilities are integers: each token weighs
//! `floor(2^40 * e^((logit - max) / temperature))`. Integer sums are exact in any order, so neither
//! the sort nor the number of survivors can move the draw; a token a trillion times less likely than
//! the best one weighs nothing.
//!
//! The vocabulary is large and few tokens matter, so it is read in chunks: a chunk's largest logit says whether any of
//! its tokens can weigh anything, and which chunks hold the most likely ones.

use std::cmp::Ordering;

use swarm_kernels::{exp_in_place, math};

use crate::random::uniform_bits;

/// Temperatures below this are greedy: at 1e-6 a logit 1e-4 below the best is e^100 less likely.
const TEMPERATURE_MIN: f32 = 1e-6;
/// The weight of the most likely token.
const WEIGHT_ONE: f32 = (1u64 << 40) as f32;
/// Scaled logits below this weigh nothing: `2^40 * e^-28 < 1`. Most of a vocabulary ends here.
const SCALED_MIN: f32 = -28.0;
/// How many tokens are put in order first; most draws end among them.
const SORT_FIRST: usize = 64;
/// Logits that share a largest one.
const CHUNK: usize = 64;
/// Chunks whose exponentials are taken together.
const BLOCK: usize = 16;

/// How a token is picked. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 (anything below 1e-6) picks the most likely token, the lowest id among equals.
    pub temperature: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest most likely tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0 drops none.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the history; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Key of the random stream.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// Why no token could be picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    #[error(
        "the largest of {vocab} logits is not a finite number; the weights or the hidden rows are broken"
    )]
    NotFinite { vocab: usize },
}

/// Buffers [`sample`] reuses. One per sampling thread.
#[derive(Default)]
pub struct SampleScratch {
    logits: Vec<f32>,
    /// The largest logit of each chunk; and once more, to select from.
    largest: Vec<f32>,
    order: Vec<f32>,
    candidates: Vec<Candidate>,
    weights: Vec<u64>,
}

#[derive(Clone, Copy)]
struct Candidate {
    logit: f32,
    id: u32,
}

impl Candidate {
    /// Most likely first, lowest id first among equals. Total, for NaN never gets here.
    fn rank(&self, other: &Self) -> Ordering {
        other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal).then(self.id.cmp(&other.id))
    }
}

/// Picks the token for `position` from `logits`, `[vocab]`.
///
/// `history` holds the ids the repetition penalty applies to, each once however often it occurs:
/// prompt and answer so far, or the end of them for a window. `position` is the index the token will
/// have in the session; with `seed` it keys the random stream. NaN never wins. Parameters out of
/// range give some token, never a panic; checking them is the caller's part.
///
/// Costs one pass over the vocabulary when greedy or with top-k; else one more, with an exponential per token that can
/// weigh anything; and the order of a few.
///
/// # Errors
/// [`SampleError::NotFinite`] when no logit is finite, or the largest is infinite.
pub fn sample(
    logits: &[f32],
    sampling: &Sampling,
    history: &[u32],
    position: u64,
    scratch: &mut SampleScratch,
) -> Result<u32, SampleError> {
    let SampleScratch { logits: penalised, largest, order, candidates, weights } = scratch;
    let logits = if sampling.repetition_penalty == 1.0 {
        logits
    } else {
        penalise(logits, sampling.repetition_penalty, history, penalised);
        penalised
    };
    largest.clear();
    largest.extend(logits.chunks(CHUNK).map(largest_of));
    let best = argmax(logits, largest)?;
    if sampling.temperature < TEMPERATURE_MIN {
        return Ok(best.id);
    }

    let scale = Scale { best: best.logit, inverse_temperature: math::recip(sampling.temperature) };
    candidates.clear();
    weights.clear();
    let limit = if sampling.top_k == 0 { usize::MAX } else { sampling.top_k as usize };
    let mut ranked = Ranked {
        logits,
        largest,
        scale,
        order,
        candidates,
        weights,
        above: f32::INFINITY,
        complete: false,
        limit,
    };
    let kept = ranked.kept_weight(sampling);
    let bits = uniform_bits(sampling.seed, position, 0);
    let mut target = ((u128::from(bits) * u128::from(kept)) >> 64) as u64; // uniform in 0..kept
    let mut index = 0;
    while let Some(weight) = ranked.weight(index) {
        match target.checked_sub(weight) {
            Some(rest) => target = rest,
            None => return Ok(ranked.candidates[index].id),
        }
        index += 1;
    }
    Ok(best.id) // only when nothing weighs anything, as for a temperature of NaN
}

/// From logits to weights.
#[derive(Clone, Copy)]
struct Scale {
    best: f32,
    inverse_temperature: f32,
}

impl Scale {
    fn scaled(&self, logit: f32) -> f32 {
        (logit - self.best) * self.inverse_temperature
    }

    /// False for what weighs nothing, and for NaN. Falls with the logit.
    fn matters(&self, logit: f32) -> bool {
        self.scaled(logit) > SCALED_MIN
    }

    /// What all tokens weigh together. Chunks without a token that matters are passed over.
    fn sum(&self, logits: &[f32], largest: &[f32]) -> u64 {
        let mut buffer = [0.0; BLOCK * CHUNK];
        let mut sum = 0;
        for (logits, largest) in logits.chunks(BLOCK * CHUNK).zip(largest.chunks(BLOCK)) {
            if !largest.iter().any(|&logit| self.matters(logit)) {
                continue;
            }
            let scaled = &mut buffer[..logits.len()];
            for (scaled, &logit) in scaled.iter_mut().zip(logits) {
                *scaled = self.scaled(logit);
            }
            exp_in_place(scaled);
            sum += weight_sum(scaled);
        }
        sum
    }
}

/// `floor(2^40 * exponential)`; more than 1 only at a temperature that is out of range.
fn weight_of(exponential: f32) -> u64 {
    ((exponential * WEIGHT_ONE) as u64).min(WEIGHT_ONE as u64)
}

/// The sum of [`weight_of`] over at most 2048 numbers, in halves of 20 bits that fit 32-bit lanes: a number times 2^20
/// less its whole part is exact.
fn weight_sum(exponentials: &[f32]) -> u64 {
    const HALF: f32 = (1u32 << 20) as f32;
    let (mut high, mut low) = (0u32, 0u32);
    for &exponential in exponentials {
        let scaled = HALF * if exponential > 1.0 { 1.0 } else { exponential };
        let whole = scaled as i32; // NaN is 0, and nothing is negative
        high = high.wrapping_add(whole as u32);
        low = low.wrapping_add(((scaled - whole as f32) * HALF) as i32 as u32);
    }
    (u64::from(high) << 20) + u64::from(low)
}

/// The largest of at most a chunk of logits; NaN never is.
fn largest_of(logits: &[f32]) -> f32 {
    let larger = |max: f32, logit: f32| if logit > max { logit } else { max };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (whole, rest) = logits.as_chunks::<16>();
    for logits in whole {
        for (max, &logit) in lanes.iter_mut().zip(logits) {
            *max = larger(*max, logit);
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |max, &logit| larger(max, logit))
}

/// The largest logit, the lowest id among equals.
fn argmax(logits: &[f32], largest: &[f32]) -> Result<Candidate, SampleError> {
    let best = largest_of(largest);
    let chunk = largest.iter().position(|&logit| logit == best).unwrap_or(0);
    let start = chunk * CHUNK;
    let within = logits.iter().skip(start).position(|&logit| logit == best);
    match within {
        Some(index) if best.is_finite() => {
            Ok(Candidate { logit: best, id: (start + index) as u32 }) // a vocabulary is counted in u32
        }
        _ => Err(SampleError::NotFinite { vocab: logits.len() }),
    }
}

/// CTRL, arXiv:1909.05858 section 4.1, with the sign rule of Hugging Face: the penalty always makes
/// a token less likely. It multiplies by the reciprocal, for division is not in the contract.
fn penalise(logits: &[f32], penalty: f32, history: &[u32], out: &mut Vec<f32>) {
    out.clear();
    out.extend_from_slice(logits);
    let inverse = math::recip(penalty);
    for &id in history {
        let id = id as usize;
        // Read from `logits`, so that a token seen twice is penalised once.
        if let (Some(&logit), Some(out)) = (logits.get(id), out.get_mut(id)) {
            *out = if logit < 0.0 { logit * penalty } else { logit * inverse };
        }
    }
}

/// The tokens in order of likelihood, as far as they were asked for.
struct Ranked<'a> {
    logits: &'a [f32],
    /// The largest logit of each chunk.
    largest: &'a [f32],
    scale: Scale,
    order: &'a mut Vec<f32>,
    /// All tokens that matter whose logit is `above` or larger. As many of them as there are weights are in order.
    candidates: &'a mut Vec<Candidate>,
    weights: &'a mut Vec<u64>,
    above: f32,
    /// No token that matters is missing.
    complete: bool,
    /// Ranks from here on are dropped by top-k.
    limit: usize,
}

impl Ranked<'_> {
    /// The weight of the candidate of rank `index`, which then is `candidates[index]`; sorts as far as that needs, in
    /// growing steps.
    fn weight(&mut self, index: usize) -> Option<u64> {
        if index >= self.limit {
            return None;
        }
        if index >= self.weights.len() {
            self.sort((4 * index).max(SORT_FIRST).min(self.limit));
        }
        self.weights.get(index).copied()
    }

    /// Puts the first `count` candidates in order, or all there are, and weighs them.
    fn sort(&mut self, count: usize) {
        while self.candidates.len() < count && !self.complete {
            self.grow(count.max(2 * self.candidates.len()));
        }
        let sorted = self.weights.len();
        let rest = &mut self.candidates[sorted..];
        let count = count.saturating_sub(sorted);
        if count < rest.len() {
            rest.select_nth_unstable_by(count, Candidate::rank);
        }
        let count = count.min(rest.len());
        let next = &mut rest[..count];
        next.sort_unstable_by(Candidate::rank);
        self.order.clear();
        self.order.extend(next.iter().map(|candidate| self.scale.scaled(candidate.logit)));
        exp_in_place(self.order);
        self.weights.extend(self.order.iter().map(|&exponential| weight_of(exponential)));
    }

    /// Makes at least `want` candidates, or all that matter: the `want` chunks with the largest logits each have one
    /// that is not below the least of these.
    fn grow(&mut self, want: usize) {
        let mut above = f32::NEG_INFINITY;
        if want < self.largest.len() {
            self.order.clear();
            self.order.extend_from_slice(self.largest);
            let (_, &mut least, _) = self.order.select_nth_unstable_by(want - 1, |a, b| b.total_cmp(a));
            above = least;
        }
        for (chunk, (logits, &largest)) in self.logits.chunks(CHUNK).zip(self.largest).enumerate() {
            if largest < above || !self.scale.matters(largest) {
                continue;
            }
            for (index, &logit) in logits.iter().enumerate() {
                if logit >= above && logit < self.above && self.scale.matters(logit) {
                    self.candidates.push(Candidate { logit, id: (chunk * CHUNK + index) as u32 });
                }
            }
        }
        self.complete = above == f32::NEG_INFINITY || !self.scale.matters(above);
        self.above = above;
    }

    /// What the tokens that top-k, top-p and min-p keep weigh together.
    fn kept_weight(&mut self, sampling: &Sampling) -> u64 {
        let total = if self.limit == usize::MAX {
            self.scale.sum(self.logits, self.largest)
        } else {
            (0..self.limit).map_while(|index| self.weight(index)).sum()
        };
        if sampling.top_p >= 1.0 && sampling.min_p <= 0.0 {
            return total;
        }
        let nucleus = (total as f64 * f64::from(sampling.top_p)).ceil() as u64;
        let floor = (f64::from(WEIGHT_ONE) * f64::from(sampling.min_p)).ceil() as u64;
        let (mut kept, mut index) = (0, 0);
        while let Some(next) = self.weight(index) {
            // The most likely token is always kept, then all until either limit is reached.
            if index > 0 && (kept >= nucleus || next < floor.max(1)) {
                break;
            }
            kept += next;
            index += 1;
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::philox4x32;

    fn pick(logits: &[f32], sampling: Sampling, history: &[u32], position: u64) -> u32 {
        sample(logits, &sampling, history, position, &mut SampleScratch::default()).unwrap()
    }

    /// The same choice the slow way: full sort, no selection, no early end.
    fn pick_slowly(logits: &[f32], sampling: Sampling, history: &[u32], position: u64) -> u32 {
        let mut logits = logits.to_vec();
        let mut seen = history.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(logit) = logits.get_mut(id as usize).filter(|_| sampling.repetition_penalty != 1.0) {
                let penalty = sampling.repetition_penalty;
                *logit *= if *logit < 0.0 { penalty } else { math::recip(penalty) };
            }
        }
        let numbered = (0..).zip(&logits).map(|(id, &logit)| Candidate { logit, id });
        let mut ranked: Vec<Candidate> = numbered.filter(|c| !c.logit.is_nan()).collect();
        ranked.sort_by(Candidate::rank);
        let best = ranked[0];
        if sampling.temperature < TEMPERATURE_MIN {
            return best.id;
        }
        if sampling.top_k > 0 {
            ranked.truncate(sampling.top_k as usize);
        }
        let weights: Vec<u64> = ranked
            .iter()
            .map(|c| {
                let scaled = (c.logit - best.logit) * math::recip(sampling.temperature);
                (math::exp(scaled) * WEIGHT_ONE) as u64
            })
            .collect();
        let total: u64 = weights.iter().sum();
        let mut before = 0;
        let mut kept = Vec::new();
        for (candidate, &weight) in ranked.iter().zip(&weights) {
            let in_nucleus = (before as f64) < (total as f64 * f64::from(sampling.top_p)).ceil();
            let likely = weight as f64 >= f64::from(WEIGHT_ONE) * f64::from(sampling.min_p);
            if kept.is_empty() || (in_nucleus && likely) {
                kept.push((candidate.id, weight));
            }
            before += weight;
        }
        let mass: u64 = kept.iter().map(|&(_, weight)| weight).sum();
        let bits = uniform_bits(sampling.seed, position, 0);
        let target = ((u128::from(bits) * u128::from(mass)) >> 64) as u64;
        let mut passed = 0;
        for (id, weight) in kept {
            passed += weight;
            if passed > target {
                return id;
            }
        }
        best.id
    }

    const WARM: Sampling =
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 3 };

    #[test]
    fn greedy_takes_the_lowest_id_of_equals_and_never_nan() {
        assert_eq!(pick(&[1.0, 3.0, 3.0, f32::NAN, f32::NEG_INFINITY], Sampling::default(), &[], 0), 1);
        assert_eq!(pick(&[f32::NAN, -5.0], Sampling::default(), &[], 0), 1);
    }

    #[test]
    fn logits_without_a_finite_largest_are_an_error() {
        for bad in [&[][..], &[f32::NAN, f32::NAN], &[f32::NEG_INFINITY], &[0.0, f32::INFINITY]] {
            for sampling in [Sampling::default(), WARM] {
                let result = sample(bad, &sampling, &[], 0, &mut SampleScratch::default());
                assert_eq!(result, Err(SampleError::NotFinite { vocab: bad.len() }));
            }
        }
    }

    #[test]
    fn the_penalty_moves_both_signs_down_and_counts_a_token_once() {
        let greedy = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(pick(&[4.0, 3.0], greedy, &[0], 0), 1);
        assert_eq!(pick(&[4.0, 1.5], greedy, &[0, 0, 0], 0), 0); // 2.0 against 1.5, not 0.5
        assert_eq!(pick(&[-1.0, -1.5], greedy, &[0, 77], 0), 1); // an id outside the vocabulary is nothing
    }

    #[test]
    fn top_k_one_and_tiny_top_p_and_min_p_one_are_greedy() {
        let logits = [0.1, 0.3, 0.2, 0.299];
        for position in 0..50 {
            for sampling in [
                Sampling { top_k: 1, ..WARM },
                Sampling { top_p: 1e-9, ..WARM },
                Sampling { min_p: 1.0, ..WARM },
                Sampling { temperature: 1e-5, ..WARM },
            ] {
                assert_eq!(pick(&logits, sampling, &[], position), 1);
            }
        }
    }

    /// The draw follows the probabilities: chi-squared over 40 000 draws, 3 degrees of freedom.
    #[test]
    fn draws_follow_the_distribution() {
        let probabilities = [0.5f64, 0.3, 0.15, 0.05];
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32).collect();
        let mut counts = [0f64; 4];
        let draws = 40_000;
        for position in 0..draws {
            counts[pick(&logits, WARM, &[], position) as usize] += 1.0;
        }
        let chi_squared: f64 = counts
            .iter()
            .zip(probabilities)
            .map(|(count, p)| (count - p * draws as f64).powi(2) / (p * draws as f64))
            .sum();
        assert!(chi_squared < 16.3, "{counts:?}"); // p = 0.001
    }

    #[test]
    fn nonsense_parameters_do_not_panic() {
        for nonsense in [f32::NAN, f32::INFINITY, -1.0, 0.0, f32::MIN_POSITIVE, 1e30] {
            let all = Sampling {
                temperature: nonsense,
                top_k: u32::MAX,
                top_p: nonsense,
                min_p: nonsense,
                repetition_penalty: nonsense,
                seed: u64::MAX,
            };
            let _token_or_error =
                sample(&[1.0, 2.0, -3.0], &all, &[1, u32::MAX], u64::MAX, &mut SampleScratch::default());
        }
    }

    /// A vocabulary of many chunks, with equals and NaN, at temperatures from cold to hot: walks that end at once, and
    /// walks that need every candidate.
    #[test]
    fn equals_its_slow_twin_on_a_large_vocabulary() {
        let noise = |i: u32| (philox4x32([i, 0, 0, 0], [7, 7])[0] >> 8) as f32 / (1 << 24) as f32;
        for (steps, vocab) in [(0.0f32, 49_152), (64.0, 30_011), (2.0, 5_000)] {
            let mut logits: Vec<f32> = (0..vocab).map(|i| 24.0 * noise(i) * noise(i + 1)).collect();
            if steps > 0.0 {
                logits.iter_mut().for_each(|logit| *logit = (*logit * steps).round() / steps); // many equals
            }
            logits[777] = f32::NAN;
            logits[779] = f32::NEG_INFINITY;
            for position in 0..12 {
                for temperature in [0.3, 1.0, 5.0, 300.0] {
                    for (top_k, top_p, min_p) in
                        [(0, 1.0, 0.0), (40, 1.0, 0.0), (3000, 0.9, 0.0), (0, 0.95, 0.0), (0, 1.0, 0.02)]
                    {
                        let sampling = Sampling { temperature, top_k, top_p, min_p, ..WARM };
                        let want = pick_slowly(&logits, sampling, &[], position);
                        assert_eq!(pick(&logits, sampling, &[], position), want, "{sampling:?}");
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn sums_of_weights_are_exact(
            exponentials in prop::collection::vec(prop_oneof![0.0f32..1.0, 0.0f32..1e-9, Just(1.0), Just(f32::NAN), Just(9.0)], 0..2048),
        ) {
            let want: u64 = exponentials.iter().map(|&exponential| weight_of(exponential)).sum();
            prop_assert_eq!(weight_sum(&exponentials), want);
        }

        #[test]
        fn equals_its_slow_twin(
            logits in prop::collection::vec(prop_oneof![9 => -8.0f32..8.0, 1 => Just(1.5f32), 1 => Just(f32::NAN)], 1..400),
            temperature in prop_oneof![Just(0.0f32), 0.05f32..3.0],
            top_k in prop_oneof![Just(0u32), 1u32..80],
            top_p in prop_oneof![Just(1.0f32), 0.01f32..1.0],
            min_p in prop_oneof![Just(0.0f32), 0.0f32..0.9],
            repetition_penalty in prop_oneof![Just(1.0f32), 0.5f32..2.0],
            history in prop::collection::vec(0u32..500, 0..20),
            seed: u64,
            position in 0u64..1 << 40,
        ) {
            prop_assume!(logits.iter().any(|logit| !logit.is_nan()));
            let sampling = Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed };
            let want = pick_slowly(&logits, sampling, &history, position);
            prop_assert_eq!(pick(&logits, sampling, &history, position), want);
        }
    }
}
