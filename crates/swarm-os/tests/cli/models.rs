//! `models`: what the room has, asked of those who are known, and of nobody else.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use swarm_testkit::{NetLab, Proc};

use crate::common::{Bench, SOON};
use crate::computer::{Computer, code};
use crate::hub::Room;

#[test]
fn nobody_is_asked_where_nobody_is_known() {
    let bench = Bench::new();
    let began = Instant::now();
    assert_eq!(bench.json(&["models", "--json"])["room"], Value::Null);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    // Not even an identity is made.
    assert!(!swarm_link::Identity::is_made(bench.home.path()));
}

#[test]
fn a_worker_tells_what_it_has_and_how_complete_it_is() {
    let room = Room::safetensors(2);
    let (_one, first) = room.worker("one");
    room.json("one", &["pull", "org/toy", "--layers", "2..5", "--json"]);
    // One that serves a model of its own says nothing of what else is there.
    let toy = room.bench.toy();
    let (_own, second) = room.bench.worker("own", &toy);
    let listed = room.json("me", &["models", "--json", "--peer", &first, "--peer", &second]);
    let nodes = listed["room"]["nodes"].as_array().unwrap();
    assert_eq!((nodes.len(), &listed["room"]["silent"]), (2, &json!([])), "{listed}");
    let model = &nodes[0]["models"][0];
    assert_eq!((&nodes[0]["node"], &nodes[0]["address"]), (&json!("one"), &json!(first)));
    assert_eq!((&model["name"], &model["layers_held"]), (&json!("org/toy"), &json!([[2, 5]])));
    assert!(model["bytes_held"].as_u64().unwrap() * 2 < model["bytes"].as_u64().unwrap(), "{model}");
    assert_eq!(nodes[1]["models"].as_array().unwrap().len(), 1, "{listed}");
    assert_eq!(nodes[1]["models"][0]["layers_held"], json!([[0, 4]]));
    assert_eq!(listed["fetched"], json!([]), "this computer has a store of its own");
    // Who is not there is named, and soon.
    let began = Instant::now();
    let mut gone = room.command("me", &["models", "--peer", &first, "--peer", "127.0.0.1:9"]);
    let shown = Proc::spawn(&mut gone).unwrap().finish(SOON).unwrap();
    assert!(shown.status.success() && began.elapsed() < Duration::from_secs(5), "{shown:?}");
    for words in ["one   org/toy", "2..5 of 10", "no answer from 127.0.0.1:9"] {
        assert!(shown.stdout.contains(words), "{words:?}: {}", shown.stdout);
    }
    // Of a worker with nothing, that is said.
    let (_two, third) = room.worker("two");
    let mut empty = room.command("me", &["models", "--peer", &third]);
    let shown = Proc::spawn(&mut empty).unwrap().finish(SOON).unwrap();
    assert!(shown.stdout.contains("two   no model"), "{}", shown.stdout);
}

#[test]
fn paired_machines_are_found_and_those_that_are_away_are_named() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let [here, there] = [0, 1].map(|node| Computer::new(&lab, node));
    let model = there.bench.toy();
    let args = ["worker", "--json", "--name", "kitchen", "--threads", "1", "--model"];
    let mut worker = there.start(&[&args[..], &[model.to_str().unwrap()]].concat());
    let shown = code(&mut worker);
    let paired = here.run(&["pair", "--join", &shown, "--name", "desk", "--wait", "20"]);
    assert!(paired.status.success(), "{paired:?}");
    let listed = || -> Value {
        let finished = here.run(&["models", "--json"]);
        assert!(finished.status.success(), "{finished:?}");
        serde_json::from_str(finished.stdout.trim()).unwrap()
    };
    let found = listed();
    assert_eq!(found["room"]["nodes"][0]["node"], "kitchen", "{found}");
    assert_eq!(found["room"]["nodes"][0]["models"][0]["layers_held"], json!([[0, 4]]), "{found}");
    drop(worker);
    let began = Instant::now();
    let away = listed();
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    assert_eq!(away["room"]["nodes"], json!([]));
    assert_eq!(away["room"]["silent"][0]["node"], "kitchen", "{away}");
    let began = Instant::now();
    let alone = here.run(&["models", "--alone"]);
    assert!(alone.status.success() && !alone.stdout.contains("kitchen"), "{alone:?}");
    assert!(began.elapsed() < Duration::from_secs(2));
}
