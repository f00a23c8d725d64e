//! Nodes that die in the middle of an answer. Nobody hangs, everybody says whom they lost.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use swarm_testkit::lossy::{Relay, Settings};
use swarm_testkit::{NetLab, Proc, demo_model};

use crate::common::{Bench, SOON, event};
use crate::computer::Computer;

/// From a death to the end of the command that needed the dead.
const NOTICED: Duration = Duration::from_secs(5);

fn model() -> PathBuf {
    demo_model().unwrap()
}

/// A command whose answer takes far longer than any test.
fn long_answer(bench: &Bench, peers: &[&str]) -> Proc {
    let model = model();
    let mut args = vec!["run", "--model", model.to_str().unwrap(), "--max-tokens", "4000"];
    peers.iter().for_each(|peer| args.extend(["--peer", peer]));
    let workers = peers.len().to_string();
    args.extend(["--workers", &workers, "--layers"]);
    args.push(if peers.len() == 1 { "0..15,15..30" } else { "0..10,10..20,20..30" });
    args.push("What is the capital of France?");
    bench.start(&args)
}

fn lost(mut run: Proc, node: &str) {
    let since = Instant::now();
    let status = run.wait(NOTICED).unwrap();
    assert!(since.elapsed() < NOTICED);
    let stderr = run.stderr();
    assert_eq!(status.code(), Some(3), "{stderr}");
    let error = stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(
        error.contains("the ring was lost") && error.contains(node) && error.contains("layers "),
        "{stderr}"
    );
}

#[test]
fn a_worker_killed_in_the_middle_of_an_answer_is_named() {
    let bench = Bench::new();
    let (mut middle, first) = bench.worker("b-middle", &model());
    let (mut tail, second) = bench.worker("c-tail", &model());
    let run = long_answer(&bench, &[&first, &second]);
    middle.expect(SOON, "\"step\"").unwrap();
    tail.expect(SOON, "\"step\"").unwrap();
    middle.kill();
    lost(run, "b-middle");
    // The tail is free again and says so.
    tail.expect(SOON, "\"left\"").unwrap();
    let (mut other, third) = bench.worker("b-other", &model());
    let run = long_answer(&bench, &[&third, &second]);
    other.expect(SOON, "\"step\"").unwrap();
    tail.expect(SOON, "\"step\"").unwrap();
    tail.kill();
    lost(run, "c-tail");
}

#[test]
fn a_coordinator_that_is_killed_leaves_a_worker_that_serves_the_next() {
    let bench = Bench::new();
    let (mut worker, address) = bench.worker("there", &model());
    let mut run = long_answer(&bench, &[&address]);
    worker.expect(SOON, "\"step\"").unwrap();
    run.kill();
    let left = worker.expect(SOON, "\"left\"").unwrap();
    assert!(event(&left)["coordinator"].is_string(), "{left}");
    let path = model();
    let args = [
        "run",
        "--json",
        "--split",
        "always",
        "--peer",
        &address,
        "--model",
        path.to_str().unwrap(),
        "--max-tokens",
        "4",
        "Hi",
    ];
    let answer = bench.json(&args);
    assert_eq!(answer["completion_tokens"], 4);
    let step: Value = event(&worker.expect(SOON, "\"tokens_predicted\"").unwrap());
    assert!(step["bytes_in"].as_u64().unwrap() > 0 && step["compute_ms"].as_f64().unwrap() > 0.0, "{step}");
}

/// What `status` says of the worker.
fn worker_status(bench: &Bench) -> Value {
    let status = bench.json(&["status", "--json"]);
    let processes = status["processes"].as_array().unwrap();
    processes.iter().find(|process| process["role"] == "worker").unwrap().clone()
}

#[test]
fn a_coordinator_that_vanishes_without_a_word_leaves_nothing_behind() {
    let bench = Bench::new();
    let (mut worker, address) = bench.worker("there", &model());
    let relay = Relay::to(&address, Settings::default()).unwrap();
    let mut run = long_answer(&bench, &[&relay.address().to_string()]);
    worker.expect(SOON, "\"step\"").unwrap();
    let busy = worker_status(&bench);
    assert!(busy["stage"]["kv_bytes"].as_u64().unwrap() > 0, "{busy}");
    // Its power fails: no link is closed.
    relay.command("cut both").unwrap();
    run.kill();
    let since = Instant::now();
    worker.expect(Duration::from_secs(10), "\"left\"").unwrap();
    swarm_testkit::wait_for(Duration::from_secs(10) - since.elapsed(), "everything to be freed", || {
        let idle = worker_status(&bench);
        idle["stage"].is_null() && idle["kept_bytes"] == 0 && idle["coordinators"] == 0
    })
    .unwrap();
    let next = long_answer(&bench, &[&address]);
    worker.expect(SOON, "\"step\"").unwrap();
    drop(next);
}

#[test]
fn a_worker_that_reboots_in_the_middle_of_an_answer_is_used_again() {
    let bench = Bench::new();
    let (mut worker, address) = bench.worker("b-there", &model());
    let relay = Relay::to(&address, Settings::default()).unwrap();
    let mut chat = console(&bench, &[&relay.address().to_string()]);
    chat.say("What is the capital of France?").unwrap();
    worker.expect(SOON, "\"step\"").unwrap();
    // Gone without a word, and back at the same address before it is missed: it knows nothing of the ring.
    relay.command("cut both").unwrap();
    worker.kill();
    let port = address.rsplit(':').next().unwrap().parse().unwrap();
    let (mut again, _) = bench.worker_at("b-there", &model(), port);
    relay.command("heal").unwrap();
    let since = Instant::now();
    let told = chat.expect(NOTICED, "the ring was lost").unwrap();
    assert!(since.elapsed() < NOTICED);
    assert!(told.contains("b-there-") && told.contains("layers "), "{told}");
    ask(&mut chat);
    again.expect(SOON, "\"joined\"").unwrap();
    swarm_testkit::wait_for(SOON, "an answer over both", || {
        ask(&mut chat);
        again.output().contains("\"step\"")
    })
    .unwrap();
    chat.say("exit").unwrap();
    assert!(chat.wait(SOON).unwrap().success());
}

#[test]
fn a_worker_that_stops_answering_is_given_up() {
    let bench = Bench::new();
    let (mut worker, address) = bench.worker("there", &model());
    let run = long_answer(&bench, &[&address]);
    worker.expect(SOON, "\"step\"").unwrap();
    worker.signal("STOP").unwrap();
    lost(run, "there");
}

/// It computes a twentieth of the time: heartbeats and receipts are late, and none of them is taken for a loss.
#[test]
fn a_worker_that_is_slow_is_not_taken_for_dead() {
    let bench = Bench::new();
    let toy = bench.toy();
    let ask = |more: &[&str]| {
        let args = ["run", "--raw", "--max-tokens", "400", "--model", toy.to_str().unwrap(), "in the tin"];
        bench.start(&[&args[..], more].concat())
    };
    let want = ask(&[]).finish(SOON).unwrap();
    let (mut worker, address) = bench.worker("there", &toy);
    let mut run = ask(&["--peer", &address, "--workers", "1", "--layers", "0..2,2..4"]);
    worker.expect(SOON, "\"step\"").unwrap();
    let (mut stops, deadline) = (0, Instant::now() + SOON);
    while run.is_running() {
        assert!(Instant::now() < deadline, "{}", run.output());
        worker.signal("STOP").unwrap();
        // Not a wait for something: this is how slow it is.
        std::thread::sleep(Duration::from_millis(190));
        worker.signal("CONT").unwrap();
        std::thread::sleep(Duration::from_millis(10));
        stops += 1;
    }
    let finished = run.finish(SOON).unwrap();
    assert!(stops > 3, "it was not slow: {stops}");
    assert!(finished.status.success(), "{finished:?}");
    assert_eq!(finished.stdout, want.stdout);
}

/// Nothing closes a link here, and the kernel of neither side tells anybody.
#[test]
fn a_cable_that_is_pulled_in_the_middle_of_an_answer() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let [here, there] = [0, 1].map(|node| Computer::new(&lab, node));
    let secret = there.run(&["secret", "export"]).stdout;
    assert!(here.run(&["secret", "import", secret.trim()]).status.success());
    let model = model();
    let path = model.to_str().unwrap();
    let mut worker =
        there.start(&["worker", "--json", "--name", "kitchen", "--threads", "1", "--model", path]);
    worker.expect(SOON, "\"waiting\"").unwrap();
    let args = ["chat", "--split", "always", "--workers", "1", "--max-tokens", "40", "--threads", "1"];
    let mut chat = here.start(&[&args[..], &["--model", path]].concat());
    chat.expect(SOON, "2 nodes").unwrap();
    chat.say("What is the capital of France?").unwrap();
    worker.expect(SOON, "\"step\"").unwrap();
    lab.set_link(1, false).unwrap();
    let since = Instant::now();
    let told = chat.expect(NOTICED, "the ring was lost").unwrap();
    assert!(since.elapsed() < NOTICED);
    assert!(told.contains("kitchen-") && told.contains("layers "), "{told}");
    // One answers alone; the other keeps nothing for a coordinator that it does not hear.
    ask(&mut chat);
    worker.expect(Duration::from_secs(10).saturating_sub(since.elapsed()), "\"left\"").unwrap();
    lab.set_link(1, true).unwrap();
    worker.expect(SOON, "\"joined\"").unwrap();
    swarm_testkit::wait_for(SOON, "an answer over both", || {
        ask(&mut chat);
        worker.output().rsplit("\"joined\"").next().unwrap().contains("\"step\"")
    })
    .unwrap();
    chat.say("exit").unwrap();
    assert!(chat.wait(SOON).unwrap().success(), "{}", chat.output());
}

/// A console over workers at `peers`.
fn console(bench: &Bench, peers: &[&str]) -> Proc {
    let model = model();
    let mut args = vec!["chat", "--no-discovery", "--split", "always", "--max-tokens", "40", "--model"];
    args.push(model.to_str().unwrap());
    peers.iter().for_each(|peer| args.extend(["--peer", peer]));
    let workers = peers.len().to_string();
    args.extend(["--workers", &workers]);
    let mut chat = bench.start(&args);
    chat.expect(SOON, &format!("{} nodes", peers.len() + 1)).unwrap();
    chat
}

/// Asks and waits for the whole answer.
fn ask(chat: &mut Proc) {
    chat.say("What is the capital of France?").unwrap();
    chat.expect(SOON, "tok/s, first token after").unwrap();
}

/// A worker that dies of `signal` in the middle of an answer: the console names it, goes on with those who are left,
/// and takes it in again when it is back.
fn console_survives(signal: &str) {
    let bench = Bench::new();
    let (mut middle, first) = bench.worker("b-middle", &model());
    let (mut tail, second) = bench.worker("c-tail", &model());
    let mut chat = console(&bench, &[&first, &second]);
    chat.say("What is the capital of France?").unwrap();
    middle.expect(SOON, "\"step\"").unwrap();
    middle.signal(signal).unwrap();
    let since = Instant::now();
    let told = chat.expect(NOTICED, "the ring was lost").unwrap();
    assert!(since.elapsed() < NOTICED);
    assert!(told.contains("b-middle-") && told.contains("layers "), "{told}");
    // The worker that is left forgets the session at once.
    tail.expect(SOON, "\"ended\"").unwrap();
    chat.say("/nodes").unwrap();
    ask(&mut chat);
    tail.expect(SOON, "\"step\"").unwrap();
    assert!(chat.output().contains("placed anew"), "{}", chat.output());
    let (mut middle, _) = if signal == "STOP" {
        middle.signal("CONT").unwrap();
        (middle, first)
    } else {
        middle.kill();
        let port = first.rsplit(':').next().unwrap().parse().unwrap();
        bench.worker_at("b-middle", &model(), port)
    };
    // It is seen within a second or two, and used from the next prompt on.
    middle.expect(SOON, "\"joined\"").unwrap();
    swarm_testkit::wait_for(SOON, "an answer over all three", || {
        ask(&mut chat);
        middle.output().rsplit("\"joined\"").next().unwrap().contains("\"step\"")
    })
    .unwrap();
    chat.say("exit").unwrap();
    assert!(chat.wait(SOON).unwrap().success());
}

#[test]
fn the_console_survives_a_worker_that_is_killed() {
    console_survives("KILL");
}

#[test]
fn the_console_survives_a_worker_that_is_stopped() {
    console_survives("STOP");
}

#[test]
fn ctrl_c_ends_an_answer() {
    let bench = Bench::new();
    let (mut worker, address) = bench.worker("there", &model());
    let mut run = long_answer(&bench, &[&address]);
    worker.expect(SOON, "\"step\"").unwrap();
    run.signal("INT").unwrap();
    let status = run.wait(SOON).unwrap();
    assert_eq!(status.code(), Some(130), "{}", run.output());
    assert!(!run.output().contains("error"), "{}", run.output());
    worker.expect(SOON, "\"left\"").unwrap();
}

#[test]
fn ctrl_c_in_the_console_ends_the_answer_only() {
    let bench = Bench::new();
    let (mut worker, address) = bench.worker("there", &model());
    let model = model();
    let args = [
        "chat",
        "--no-discovery",
        "--split",
        "always",
        "--peer",
        &address,
        "--max-tokens",
        "4000",
        "--model",
    ];
    let mut chat = bench.start(&[&args[..], &[model.to_str().unwrap()]].concat());
    chat.say("What is the capital of France?").unwrap();
    for _ in 0..5 {
        worker.expect(SOON, "\"step\"").unwrap();
    }
    chat.signal("INT").unwrap();
    chat.expect(SOON, "tok/s, first token after").unwrap();
    chat.say("/nodes").unwrap();
    chat.expect(SOON, "round trip").unwrap();
    chat.say("exit").unwrap();
    assert!(chat.wait(SOON).unwrap().success());
}

#[test]
fn a_worker_leaves_in_order_when_asked() {
    let bench = Bench::new();
    // A machine of some swarm shows no code: other tests of this computer must not find one.
    assert!(bench.run(&["secret", "export"]).status.success());
    let mut worker = bench.start(&["worker", "--name", "here"]);
    worker.expect(SOON, "worker here-").unwrap();
    worker.expect(SOON, "GB/s").unwrap();
    worker.expect(SOON, "Ctrl-C ends it").unwrap();
    worker.signal("INT").unwrap();
    assert!(worker.wait(SOON).unwrap().success());
    let mut local = bench.start(&["worker", "--local"]);
    local.expect(SOON, "waits on port").unwrap();
    local.close_stdin();
    assert!(local.wait(SOON).unwrap().success());
}
