//! Real processes over bad links: the right tokens, or an error that names the node; never others.

use std::path::Path;
use std::time::{Duration, Instant};

use swarm_testkit::Proc;
use swarm_testkit::lossy::{Relay, Settings};

use crate::common::{Bench, SOON};

/// From the moment a link breaks to the end of the command that needed it: silence counts after 3 s.
const NOTICED: Duration = Duration::from_secs(8);
/// One that the toy model answers at length.
const PROMPT: &str = "in the tin";
const DELAY: Settings =
    Settings { delay: Duration::from_millis(4), jitter: Duration::from_millis(2), rate: None, seed: 5 };

/// A worker behind a bad link.
struct Far {
    worker: Proc,
    relay: Relay,
}

impl Far {
    fn new(bench: &Bench, toy: &Path, name: &str, settings: Settings) -> Self {
        let (worker, address) = bench.worker(name, toy);
        let relay = Relay::to(&address, settings).unwrap();
        Self { worker, relay }
    }

    /// A few tokens of the answer have been computed here.
    fn in_the_middle(&mut self) {
        for _ in 0..8 {
            self.worker.expect(SOON, "\"step\"").unwrap();
        }
    }
}

fn ask(bench: &Bench, toy: &Path, far: &[&Far], more: &[&str]) -> Proc {
    let model = toy.to_str().unwrap();
    let mut args = vec!["run", "--raw", "--model", model, PROMPT];
    let addresses: Vec<String> = far.iter().map(|far| far.relay.address().to_string()).collect();
    addresses.iter().for_each(|address| args.extend(["--peer", address]));
    let workers = far.len().to_string();
    args.extend(["--workers", &workers, "--layers"]);
    args.push(match far.len() {
        1 => "0..2,2..4",
        2 => "0..1,1..3,3..4",
        _ => "0..1,1..2,2..3,3..4",
    });
    args.extend(more);
    bench.start(&args)
}

/// What one machine alone says.
fn alone(bench: &Bench, toy: &Path, more: &[&str]) -> String {
    let args = [&["run", "--raw", "--model", toy.to_str().unwrap(), PROMPT], more].concat();
    let finished = bench.run(&args);
    assert!(finished.status.success(), "{finished:?}");
    finished.stdout
}

/// A link that is slow, thin or stands still for a while changes no token.
#[test]
fn a_bad_link_is_slow_and_right() {
    let bench = Bench::new();
    let toy = bench.toy();
    let want = alone(&bench, &toy, &["--max-tokens", "60"]);
    let mut middle = Far::new(&bench, &toy, "b-middle", DELAY);
    let tail = Far::new(&bench, &toy, "c-tail", DELAY);
    let run = ask(&bench, &toy, &[&middle, &tail], &["--max-tokens", "60"]);
    middle.in_the_middle();
    tail.relay.command("stall 500").unwrap();
    middle.in_the_middle();
    middle.relay.command("stall 300 down").unwrap();
    middle.relay.command("rate 60000").unwrap();
    middle.relay.command("delay 15 15").unwrap();
    let finished = run.finish(SOON).unwrap();
    assert!(finished.status.success(), "{finished:?}");
    assert_eq!(finished.stdout, want);
}

/// Breaks the link in the middle of an answer: the command ends soon, names the node, and has said nothing wrong.
fn broken_by(command: &str) {
    let bench = Bench::new();
    let toy = bench.toy();
    let tokens = ["--max-tokens", "400"];
    let want = alone(&bench, &toy, &tokens);
    let mut far = Far::new(&bench, &toy, "far-away", DELAY);
    let mut run = ask(&bench, &toy, &[&far], &tokens);
    far.in_the_middle();
    far.relay.command(command).unwrap();
    let since = Instant::now();
    let status = run.wait(NOTICED).unwrap_or_else(|error| panic!("{command}: {error}"));
    let took = since.elapsed();
    let (said, stderr) = (run.stdout(), run.stderr());
    if status.success() && command.starts_with("corrupt") {
        // The bit was in nothing that the answer needed.
        return assert_eq!(said, want, "{command}");
    }
    assert_eq!(status.code(), Some(3), "{command}: {stderr}");
    let error = stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(error.contains("far-away") && error.contains("layers 2..4"), "{command}: {stderr}");
    assert!(took < NOTICED, "{command}: {took:?}");
    // Half a character that was cut off is shown as one that stands for it.
    let said = said.trim_end_matches(['\n', '\u{fffd}']);
    assert!(!said.is_empty() && want.starts_with(said), "{command}: {said:?} is no beginning of {want:?}");
    // The worker is free again, and its next answer is right.
    far.relay.command("heal").unwrap();
    far.worker.expect(SOON, "\"left\"").unwrap();
    let few = ["--max-tokens", "20"];
    let again = ask(&bench, &toy, &[&far], &few).finish(SOON).unwrap();
    assert!(again.status.success(), "{again:?}");
    assert_eq!(again.stdout, alone(&bench, &toy, &few));
}

/// The coordinator reaches both workers, and the one does not reach the other.
#[test]
fn a_cut_between_two_workers_is_named() {
    let bench = Bench::new();
    let toy = bench.toy();
    let first = Far::new(&bench, &toy, "b-first", DELAY);
    let mut middle = Far::new(&bench, &toy, "c-middle", DELAY);
    let tail = Far::new(&bench, &toy, "d-tail", DELAY);
    let mut run = ask(&bench, &toy, &[&first, &middle, &tail], &["--max-tokens", "400"]);
    middle.in_the_middle();
    // The coordinator's connection to it is older than its neighbour's.
    middle.relay.command("cut up newest").unwrap();
    let status = run.wait(NOTICED).unwrap();
    let stderr = run.stderr();
    assert_eq!(status.code(), Some(3), "{stderr}");
    let error = stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    let parts = ["the link from b-first-", "(layers 1..2) to c-middle-", "(layers 2..3) broke"];
    assert!(parts.iter().all(|part| error.contains(part)), "{stderr}");
}

#[test]
fn a_flipped_bit_on_the_way_there_is_noticed() {
    broken_by("corrupt 1 up");
}

#[test]
fn a_flipped_bit_on_the_way_back_is_noticed() {
    broken_by("corrupt 1 down");
}

#[test]
fn a_link_that_is_cut_on_the_way_there_is_noticed() {
    broken_by("cut up");
}

#[test]
fn a_link_that_is_cut_on_the_way_back_is_noticed() {
    broken_by("cut down");
}

#[test]
fn a_link_that_stands_still_is_noticed() {
    broken_by("stall 60000");
}

#[test]
fn a_reset_is_noticed() {
    broken_by("reset");
}
