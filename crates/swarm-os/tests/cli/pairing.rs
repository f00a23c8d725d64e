//! Two computers meet by a code, answer together, and part again: real processes, two homes, two networks' ends.

use std::time::Instant;

use serde_json::Value;
use swarm_testkit::NetLab;

use crate::common::{Bench, SOON, event};
use crate::computer::{Computer, code, other_code, refused};

#[test]
fn two_computers_pair_answer_and_part() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let computer = |node| Computer::new(&lab, node);
    let (here, there, stranger) = (computer(0), computer(1), computer(0));
    let toy = here.bench.toy();
    let model = toy.to_str().unwrap();
    let mut worker =
        there.start(&["worker", "--json", "--name", "kitchen", "--threads", "1", "--model", model]);
    let first = code(&mut worker);
    // A script is told what it lacks; a wrong code costs a try, and the third wrong one the code.
    refused(&here.ask(&toy, &[]), &["not paired", "--join CODE", "SWARM_OS_JOIN"]);
    for tries_left in [2, 1, 0] {
        refused(&here.ask(&toy, &["--join", &other_code(&first)]), &["did not take the code"]);
        let wrong = event(&worker.expect(SOON, "\"wrong_code\"").unwrap());
        assert_eq!(wrong["tries_left"], tries_left, "{wrong}");
    }
    let second = code(&mut worker);
    assert_ne!(first, second);
    // Its user reads what to do, and once: nothing of another swarm while a code is shown.
    let shown = worker.output();
    assert!(shown.contains("the code that is shown here pairs them"), "{shown}");
    assert!(!shown.contains("another swarm") && !shown.contains("another pairing code"), "{shown}");
    // A person types the new one when the rest is over, and both are paired for good.
    let deadline = Instant::now() + SOON;
    let mut chat = loop {
        let mut chat = here.at_terminal(&[
            "--role",
            "A",
            "--split",
            "always",
            "--model",
            model,
            "--wait",
            "4",
            "--max-tokens",
            "8",
        ]);
        if chat.expect(SOON, "not paired with this computer yet").is_ok() {
            break chat;
        }
        assert!(Instant::now() < deadline, "{}", chat.output());
    };
    chat.say(&second).unwrap();
    chat.expect(SOON, "paired with kitchen").unwrap();
    chat.expect(SOON, "/help lists commands").unwrap();
    chat.say("the hen").unwrap();
    chat.expect(SOON, "frames x").unwrap();
    chat.say("exit").unwrap();
    assert!(chat.wait(SOON).unwrap().success(), "{}", chat.output());
    worker.expect(SOON, "\"paired\"").unwrap();
    assert_eq!((here.peers().len(), there.peers().len()), (1, 1));
    // From now on nothing is typed.
    let answer: Value = serde_json::from_str(&here.ask(&toy, &[]).stdout).unwrap();
    assert!(answer["nodes"][1]["name"].as_str().unwrap().starts_with("kitchen-"), "{answer}");
    refused(&stranger.ask(&toy, &[]), &["another swarm"]);
    // Parted: the worker runs on with the old secret, and is nobody to this swarm.
    let forgotten = here.run(&["forget", "kitchen", "--wait", "1"]);
    assert!(forgotten.stdout.contains("kitchen is forgotten"), "{forgotten:?}");
    refused(&here.ask(&toy, &[]), &["no worker was found"]);
    assert!(here.peers().is_empty() && worker.is_running());
}

#[test]
fn who_is_forgotten_stays_out_and_the_rest_stays_together() {
    let Some(lab) = NetLab::open(3).unwrap() else { return };
    let computer = |node| Computer::new(&lab, node);
    let (here, kitchen, guest) = (computer(0), computer(1), computer(2));
    let toy = here.bench.toy();
    let model = toy.to_str().unwrap();
    // One that shows a code on its own, and a worker that types it before it begins.
    for (other, name) in [(&kitchen, "kitchen"), (&guest, "guest")] {
        let mut stand = here.start(&["pair", "--json", "--name", "here"]);
        let shown = code(&mut stand);
        let joined = other.run(&["pair", &shown, "--name", name]);
        assert!(joined.stdout.contains("paired with here"), "{joined:?}");
        assert!(stand.wait(SOON).unwrap().success());
    }
    let worker = |computer: &Computer<'_>, name: &str| {
        let args = ["worker", "--json", "--name", name, "--threads", "1", "--model", model];
        let mut worker = computer.start(&args);
        worker.expect(SOON, "\"waiting\"").unwrap();
        worker
    };
    let (mut in_kitchen, at_guest) = (worker(&kitchen, "kitchen"), worker(&guest, "guest"));
    let forgotten = here.run(&["forget", "guest", "--json"]);
    let forgotten: Value = serde_json::from_str(&forgotten.stdout).unwrap();
    assert_eq!((&forgotten["forgotten"], &forgotten["told"][0]), (&"guest".into(), &"kitchen".into()));
    let answer: Value = serde_json::from_str(&here.ask(&toy, &[]).stdout).unwrap();
    let names: Vec<_> = answer["nodes"].as_array().unwrap().iter().map(|node| &node["name"]).collect();
    assert!(names.len() == 2 && names[1].as_str().unwrap().starts_with("kitchen-"), "{answer}");
    in_kitchen.expect(SOON, "\"left\"").unwrap();
    // Its own worker would do.
    drop(at_guest);
    refused(&guest.ask(&toy, &[]), &["no worker was found", "another swarm"]);
    assert_eq!(kitchen.peers(), ["here"]);
}

#[test]
fn names_and_codes_that_fit_nobody() {
    let bench = Bench::new();
    bench.refused(&["forget", "attic"], 2, &["no machine \"attic\"", "swarm-os peers"]);
    bench.refused(&["pair", "12-34"], 2, &["CODE: \"12-34\" is no pairing code", "eight digits"]);
    bench.refused(&["pair", "--peer", "127.0.0.1:9"], 2, &["`swarm-os pair CODE`"]);
    let closed = format!("127.0.0.1:{}", swarm_testkit::free_port().unwrap());
    let args = ["pair", "--join", "1234-5678", "--peer", &closed, "--wait", "1"];
    bench.refused(&args, 3, &["no machine that shows a code", "--peer HOST:PORT"]);
    let toy = bench.toy();
    let args = ["run", "--model", toy.to_str().unwrap(), "--join", "abc", "hi"];
    bench.refused(&args, 2, &["--join: ", "is no pairing code", "eight digits"]);
    assert_eq!(bench.run(&["forget"]).status.code(), Some(2));
    let shown = bench.run(&["pair", "--wait", "1"]);
    assert_eq!(shown.status.code(), Some(3), "{shown:?}");
    assert!(shown.stdout.contains("pairing code") && shown.stderr.contains("within 1 s"), "{shown:?}");
    let left = bench.run(&["forget", "--all"]);
    assert!(left.status.success() && left.stderr.contains("new secret"), "{left:?}");
}

#[cfg(unix)]
#[test]
fn files_that_others_may_read_are_refused_at_start() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    assert!(bench.run(&["peers"]).status.success());
    for name in ["node.key", "swarm.secret", "swarm.members"] {
        let path = bench.home.path().join(name);
        let set = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        set(0o644);
        for args in [&["peers"][..], &["worker"], &["pair"]] {
            bench.refused(args, 1, &[name, "chmod 600"]);
        }
        set(0o600);
    }
}
