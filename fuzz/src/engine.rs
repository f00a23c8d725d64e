//! The loop: change an input, run it, keep it when its outcome is new.

use std::collections::BTreeSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use swarm_testkit::sim::Rng;

use crate::Target;
use crate::mutate::mutate;

/// No single input may take longer, in any profile.
const SLOW: Duration = Duration::from_secs(2);
/// Inputs kept; beyond it new ones take the place of old ones.
const CORPUS_MAX: usize = 512;

/// How long to go on.
#[derive(Clone, Copy, Debug)]
pub enum Budget {
    /// So many inputs: equal runs for equal seeds.
    Runs(u64),
    /// Until then.
    Until(Instant),
}

/// What a run without a crash came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Inputs tried.
    pub runs: u64,
    /// Different outcomes seen.
    pub outcomes: usize,
    /// Inputs kept.
    pub corpus: usize,
}

/// An input that breaks a promise.
#[derive(Clone, Debug)]
pub struct Crash {
    /// Which target.
    pub target: &'static str,
    /// What it was given.
    pub input: Vec<u8>,
    /// What happened.
    pub why: String,
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, input, why } = self;
        writeln!(f, "{target}: {why}")?;
        write!(f, "input of {} bytes: \"{}\"", input.len(), input.escape_ascii())
    }
}

/// Runs one input.
///
/// # Errors
/// [`Crash`] when it panics or takes longer than 2 s. A process that dies of it (a stack that overflows) cannot be
/// caught; the last input is then in the file that [`fuzz`] was told to write.
pub fn check(target: &Target, input: &[u8]) -> Result<u64, Crash> {
    let began = Instant::now();
    let ran = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let crash = |why: String| Crash { target: target.name, input: input.to_vec(), why };
    let outcome = ran.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        crash(format!(
            "panic: {}",
            text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without a text")
        ))
    })?;
    let took = began.elapsed();
    if took > SLOW { Err(crash(format!("it took {} ms", took.as_millis()))) } else { Ok(outcome) }
}

/// Fuzzes a target from its seeds; `before` sees every input before it runs.
///
/// # Errors
/// The first [`Crash`], with the smallest input that a few cuts led to.
pub fn fuzz(
    target: &Target,
    seed: u64,
    budget: Budget,
    mut before: impl FnMut(&[u8]),
) -> Result<Stats, Crash> {
    let mut rng = Rng::new(seed);
    let mut corpus = (target.seeds)();
    let mut outcomes = BTreeSet::new();
    for input in &corpus {
        before(input);
        outcomes.insert(check(target, input)?);
    }
    let mut runs = corpus.len() as u64;
    loop {
        let done = match budget {
            Budget::Runs(max) => runs >= max,
            Budget::Until(at) => Instant::now() >= at,
        };
        if done {
            return Ok(Stats { runs, outcomes: outcomes.len(), corpus: corpus.len() });
        }
        runs += 1;
        let (one, other) = (rng.index(corpus.len()), rng.index(corpus.len()));
        let input = mutate(&mut rng, target.shape, target.words, &corpus[one], &corpus[other]);
        before(&input);
        let outcome = check(target, &input).map_err(|crash| shrink(target, crash))?;
        if outcomes.insert(outcome) {
            if corpus.len() < CORPUS_MAX {
                corpus.push(input);
            } else {
                let place = rng.index(corpus.len());
                corpus[place] = input;
            }
        }
    }
}

/// Cuts pieces out as long as it still crashes.
fn shrink(target: &Target, mut crash: Crash) -> Crash {
    let mut piece = crash.input.len() / 2;
    let until = Instant::now() + Duration::from_secs(10);
    while piece > 0 && Instant::now() < until {
        let mut at = 0;
        while at < crash.input.len() && Instant::now() < until {
            let mut less = crash.input.clone();
            less.drain(at..(at + piece).min(less.len()));
            match check(target, &less) {
                Err(smaller) => crash = smaller,
                Ok(_) => at += piece,
            }
        }
        piece /= 2;
    }
    crash
}
