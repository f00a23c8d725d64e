//! An evening with two laptops, as new users have it: two networks' ends, two homes, a wrong code, a guest, a lid that
//! closes, and a network that stops carrying multicast.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use swarm_testkit::{NetLab, Proc, demo_model, wait_for};

use crate::common::SOON;
use crate::computer::{Computer, code, other_code, refused};

/// From a death to the console's word of it.
const NOTICED: Duration = Duration::from_secs(5);

const QUESTION: &str = "What is the capital of France?";

fn start_worker(there: &Computer<'_>, model: &str) -> Proc {
    there.start(&["worker", "--json", "--name", "kitchen", "--threads", "1", "--model", model])
}

/// A console that shares the layers, whoever is there.
fn console(here: &Computer<'_>, model: &str) -> Proc {
    let args = [
        "chat",
        "--split",
        "always",
        "--workers",
        "1",
        "--max-tokens",
        "40",
        "--threads",
        "1",
        "--model",
        model,
    ];
    let mut chat = here.start(&args);
    chat.expect(SOON, "2 nodes").unwrap();
    chat
}

fn ask(chat: &mut Proc) {
    chat.say(QUESTION).unwrap();
    chat.expect(SOON, "tok/s, first token after").unwrap();
}

/// The answer of one command, with everything measured.
fn answer(here: &Computer<'_>, model: &str, more: &[&str]) -> Value {
    let args = ["run", "--json", "--max-tokens", "6", "--threads", "1", "--model", model];
    let finished = here.run(&[&args[..], more, &[QUESTION]].concat());
    assert!(finished.status.success(), "{finished:?}");
    serde_json::from_str(&finished.stdout).unwrap()
}

/// Three wrong codes use up the code that is shown; the one that follows it pairs.
fn pair(here: &Computer<'_>, worker: &mut Proc, model: &Path) {
    let first = code(worker);
    for _ in 0..3 {
        refused(&here.ask(model, &["--join", &other_code(&first)]), &["did not take the code"]);
    }
    let second = code(worker);
    assert_ne!(first, second);
    // It rests a little first.
    let deadline = Instant::now() + SOON;
    loop {
        let paired = here.run(&["pair", "--join", &second, "--name", "desk", "--wait", "5"]);
        if paired.status.success() {
            assert!(paired.stdout.contains("paired with kitchen"), "{paired:?}");
            return;
        }
        assert!(Instant::now() < deadline, "{paired:?}");
    }
}

/// The plan shows both, and why.
fn plan(here: &Computer<'_>, model: &str) {
    let args = ["plan", "--json", "--workers", "1", "--threads", "1", "--model", model];
    let planned = here.run(&[&args[..], &["--split", "always"]].concat());
    let planned: Value = serde_json::from_str(&planned.stdout).unwrap_or_else(|_| panic!("{planned:?}"));
    let stages = planned["stages"].as_array().unwrap_or_else(|| panic!("{planned:#}"));
    assert_eq!(stages.len(), 2, "{planned:#}");
    assert!(stages[1]["name"].as_str().unwrap().starts_with("kitchen"), "{planned:#}");
    let words = here.run(&["plan", "--workers", "1", "--threads", "1", "--model", model]);
    assert!(words.status.success() && words.stdout.contains("alone"), "{words:?}");
}

#[test]
fn an_evening_with_two_laptops() {
    let Some(lab) = NetLab::open(3).unwrap() else { return };
    let [here, there, guest] = [0, 1, 2].map(|node| Computer::new(&lab, node));
    let path = demo_model().unwrap();
    let model = path.to_str().unwrap();
    let mut worker = start_worker(&there, model);
    pair(&here, &mut worker, &path);
    refused(&guest.ask(&path, &[]), &["another swarm"]);
    plan(&here, model);
    let alone = answer(&here, model, &[]);

    // The lid of the worker's laptop closes in the middle of an answer.
    let mut chat = console(&here, model);
    ask(&mut chat);
    chat.say(QUESTION).unwrap();
    worker.expect(SOON, "\"joined\"").unwrap();
    worker.expect(SOON, "\"step\"").unwrap();
    let steps = worker.output().matches("\"step\"").count();
    wait_for(SOON, "the second answer", || worker.output().matches("\"step\"").count() > steps).unwrap();
    worker.kill();
    let since = Instant::now();
    let told = chat.expect(NOTICED, "the ring was lost").unwrap();
    assert!(since.elapsed() < NOTICED);
    assert!(told.contains("kitchen-") && told.contains("layers "), "{told}");
    // The console lives, and answers with what is left.
    ask(&mut chat);
    assert!(chat.output().contains("placed anew"), "{}", chat.output());

    // It is opened again: the worker is where it was, nothing is typed, and both answer.
    let mut worker = start_worker(&there, model);
    worker.expect(SOON, "\"joined\"").unwrap();
    wait_for(SOON, "an answer over both", || {
        ask(&mut chat);
        worker.output().contains("\"step\"")
    })
    .unwrap();
    chat.say("exit").unwrap();
    assert!(chat.wait(SOON).unwrap().success(), "{}", chat.output());
    worker.expect(SOON, "\"left\"").unwrap();
    let both = answer(&here, model, &["--discover", "--split", "always"]);
    assert_eq!((&both["token_ids"], &both["logits_hash"]), (&alone["token_ids"], &alone["logits_hash"]));
    assert_eq!(both["nodes"].as_array().unwrap().len(), 2, "{both:#}");
    multicast_falls_silent(&lab, [&here, &there, &guest], worker, &alone);
}

/// The worker is found where it was last, also after it was started again, because it takes the port of last time.
fn multicast_falls_silent(lab: &NetLab, computers: [&Computer<'_>; 3], worker: Proc, alone: &Value) {
    let [here, there, guest] = computers;
    let path = demo_model().unwrap();
    let model = path.to_str().unwrap();
    lab.set_multicast(false).unwrap();
    let silent = answer(here, model, &["--discover", "--split", "always"]);
    assert_eq!(silent["nodes"].as_array().unwrap().len(), 2, "{silent:#}");
    assert_eq!(silent["token_ids"], alone["token_ids"]);
    drop(worker);
    let mut worker = start_worker(there, model);
    worker.expect(SOON, "\"waiting\"").unwrap();
    assert_eq!(answer(here, model, &["--workers", "1"])["token_ids"], alone["token_ids"]);
    worker.expect(SOON, "\"left\"").unwrap();
    let report = here.run(&["doctor", "--json", "--wait", "3"]);
    assert_eq!(report.status.code(), Some(1), "{report:?}");
    let report: Value = serde_json::from_str(&report.stdout).unwrap();
    let machine = &report["machines"][0];
    assert_eq!((&machine["state"], &machine["announced"]), (&"member".into(), &false.into()), "{report:#}");
    let next = report["next"].as_str().unwrap();
    assert!(next.contains("none goes between this computer and kitchen"), "{report:#}");
    // The guest sees no more than before.
    let address = machine["address"].as_str().unwrap();
    refused(&guest.ask(&path, &["--peer", address]), &["another swarm"]);
}
