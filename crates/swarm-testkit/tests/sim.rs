//! Ten thousand lives of a swarm, and the proof that a broken rule would be noticed.
//!
//! `SWARM_SIM_SEED=n` lives one life alone; `SWARM_SIM_LIVES=n` changes how many are lived, `SWARM_SIM_FIRST=n` where
//! they begin.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use swarm_testkit::sim::{Bug, Report, Violation, live};

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, which is no number")))
}

/// What many lives add up to.
#[derive(Default)]
struct Sum {
    tokens: u64,
    completed: u64,
    errors: u64,
    met: BTreeMap<&'static str, u64>,
}

impl Sum {
    fn add(&mut self, report: &Report) {
        self.tokens += report.tokens;
        self.completed += report.completed;
        self.errors += report.errors;
        report.seen.iter().for_each(|(what, count)| *self.met.entry(what).or_default() += count);
    }
}

/// Lives `seeds` on all cores until one breaks a promise.
fn live_all(seeds: Range<u64>) -> Result<Sum, Violation> {
    let next = AtomicU64::new(seeds.start);
    let sum: Mutex<Result<Sum, Violation>> = Mutex::new(Ok(Sum::default()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let lived = live(seed, None);
            let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
            match (&mut *sum, lived) {
                (Ok(sum), Ok(report)) => sum.add(&report),
                (Ok(_), Err(violation)) => *sum = Err(violation),
                (Err(_), _) => return,
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    sum.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Faults and their consequences that the lives together must have met: a simulator whose network has become kind
/// proves nothing.
const MET: [&str; 23] = [
    "cut one way",
    "cut both ways",
    "node cut off",
    "link slowed",
    "connection lost",
    "node paused",
    "node killed",
    "node without power",
    "frame repeated",
    "frames swapped",
    "old frame replayed",
    "stale frame dropped",
    "frame refused",
    "answer refused",
    "session refused",
    "rows of no session",
    "session failed at a stage",
    "member given up",
    "lap overdue",
    "silent coordinator given up",
    "second coordinator refused",
    "ring lost",
    "ring up",
];

#[test]
fn ten_thousand_lives_keep_every_promise() {
    if let Some(seed) = number("SWARM_SIM_SEED") {
        match live(seed, None) {
            Ok(report) => return println!("{report:#?}"),
            Err(violation) => panic!("{violation}"),
        }
    }
    let first = number("SWARM_SIM_FIRST").unwrap_or(0);
    let lives = number("SWARM_SIM_LIVES").unwrap_or(10_000);
    let began = Instant::now();
    let sum = live_all(first..first + lives).unwrap_or_else(|violation| panic!("{violation}"));
    let Sum { tokens, completed, errors, met } = sum;
    println!("{met:#?}");
    println!(
        "{lives} lives in {:.1} s: {tokens} tokens checked, {completed} sessions answered, {errors} ended in an error",
        began.elapsed().as_secs_f64()
    );
    if lives >= 10_000 {
        MET.iter().for_each(|what| assert!(met.contains_key(what), "no life met this: {what}"));
        assert!(completed > 4 * lives && errors > lives / 10, "{completed} answered, {errors} not");
    }
}

#[test]
fn a_seed_is_a_life() {
    for seed in 0..50 {
        assert_eq!(live(seed, None), live(seed, None));
    }
    assert_ne!(live(1, None).unwrap().digest, live(2, None).unwrap().digest);
}

/// A broken rule is noticed as the breach of one of these promises, and its seed replays.
fn caught(bug: Bug, promises: &[&str]) {
    let violation = (0..2_000).find_map(|seed| live(seed, Some(bug)).err());
    let violation = violation.unwrap_or_else(|| panic!("2000 lives did not notice {bug:?}"));
    assert!(promises.iter().any(|promise| violation.what.starts_with(promise)), "{bug:?}: {violation}");
    assert!(!violation.story.is_empty());
    let again = live(violation.seed, Some(bug)).unwrap_err();
    assert_eq!(again, violation, "the seed of {bug:?} does not replay");
    let text = violation.to_string();
    assert!(text.contains(&format!("SWARM_SIM_SEED={}", violation.seed)), "{text}");
    println!("{bug:?} is noticed in life {}: {}", violation.seed, violation.what);
}

#[test]
fn rows_in_any_order_are_noticed() {
    caught(Bug::TakesAnyOrder, &["P1"]);
}

#[test]
fn a_token_from_the_wrong_row_is_noticed() {
    caught(Bug::SamplesFirstRow, &["P1"]);
}

#[test]
fn a_layer_left_out_is_noticed() {
    caught(Bug::SkipsLayer, &["P1"]);
}

#[test]
fn sessions_that_are_never_freed_are_noticed() {
    caught(Bug::KeepsSessions, &["P4", "P2", "P1: session refused"]);
}

#[test]
fn a_worker_that_waits_for_ever_is_noticed() {
    caught(Bug::WaitsForever, &["P2", "P4"]);
}

#[test]
fn a_coordinator_that_waits_for_ever_is_noticed() {
    caught(Bug::NeverGivesUp, &["P2"]);
}

#[test]
fn a_placement_without_a_new_number_is_noticed() {
    caught(Bug::KeepsEpoch, &["P2"]);
}
