//! What a running swarm shows of itself: `status`, and the trace of an answer.

use serde_json::Value;
use swarm_testkit::{demo_model, wait_for};

use crate::common::{Bench, SOON};

/// The process of a role in `status --json`.
fn process(bench: &Bench, role: &str) -> Option<Value> {
    let status = bench.json(&["status", "--json"]);
    status["processes"].as_array().unwrap().iter().find(|process| process["role"] == role).cloned()
}

#[test]
fn status_shows_a_ring_while_it_answers_and_nothing_afterwards() {
    let bench = Bench::new();
    assert_eq!(bench.json(&["status", "--json"])["processes"], serde_json::json!([]));
    let model = demo_model().unwrap();
    let (mut worker, address) = bench.worker("there", &model);
    assert!(process(&bench, "worker").unwrap()["stage"].is_null());
    let path = model.to_str().unwrap();
    let args = [
        "run",
        "--peer",
        &address,
        "--layers",
        "0..15,15..30",
        "--max-tokens",
        "4000",
        "--model",
        path,
        "Hi",
    ];
    let mut run = bench.start(&args);
    wait_for(SOON, "a speed", || process(&bench, "coordinator").is_some_and(|it| it["tok_per_s"].is_f64()))
        .unwrap();
    let it = process(&bench, "coordinator").unwrap();
    assert_eq!(it["sessions"], 1, "{it}");
    let nodes = it["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 2);
    assert_eq!((&nodes[1]["layers"][0], &nodes[1]["state"]), (&Value::from(15), &Value::from("up")));
    for number in ["compute_ms_p50", "hop_ms_p50", "round_trip_ms", "memory_bytes"] {
        assert!(nodes[1][number].as_f64().unwrap() > 0.0, "{number}: {it}");
    }
    let stage = &process(&bench, "worker").unwrap()["stage"];
    assert!(stage["tokens"].as_u64().unwrap() > 0 && stage["sessions"] == 1, "{stage}");
    let words = bench.run(&["status"]).stdout;
    assert!(words.contains("tok/s") && words.contains("there-") && words.contains("15..30"), "{words}");
    run.signal("INT").unwrap();
    run.wait(SOON).unwrap();
    worker.expect(SOON, "\"left\"").unwrap();
    assert!(process(&bench, "coordinator").is_none());
    worker.kill();
    assert!(process(&bench, "worker").is_none(), "a killed worker leaves a socket, and nothing behind it");
}

#[test]
fn top_without_a_terminal_says_what_to_do() {
    Bench::new().refused(&["top"], 2, &["needs a terminal", "swarm-os status"]);
}

#[test]
fn a_trace_holds_every_lap_of_every_node() {
    let bench = Bench::new();
    let toy = bench.toy();
    let file = bench.path("trace.json");
    let (toy, path) = (toy.to_str().unwrap(), file.to_str().unwrap());
    let report = bench.json(&[
        "run",
        "--json",
        "--raw",
        "--nodes",
        "3",
        "--max-tokens",
        "20",
        "--trace",
        path,
        "--model",
        toy,
        "the hen",
    ]);
    let trace: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let laps = report["completion_tokens"].as_u64().unwrap();
    for node in 0..3 {
        let computes =
            events.iter().filter(|event| event["name"] == "compute" && event["pid"] == node).count() as u64;
        // One lap for the prompt at least, and one for each token but the first.
        assert!(computes >= laps, "node {node}: {computes} of {laps}");
    }
    let named = |event: &&Value| event["ph"] == "M" && event["name"] == "process_name";
    assert_eq!(events.iter().filter(named).count(), 3);
    assert!(
        events.iter().filter(|event| event["ph"] == "X").all(|event| event["dur"].as_i64().unwrap() >= 0)
    );
}
