//! One node and several give the same, and say so in the fields that scripts rely on.

use serde_json::Value;
use swarm_testkit::toy::{GgufType, spec};

use crate::common::Bench;

const PROMPT: &str = "the tin hen in the inn";

fn same_answer(one: &Value, other: &Value) {
    assert_eq!(one["token_ids"], other["token_ids"]);
    assert_eq!(one["logits_hash"], other["logits_hash"]);
    assert_eq!(one["text"], other["text"]);
    assert!(one["logits_hash"].as_str().is_some_and(|hash| hash.len() == 64), "{one}");
}

#[test]
fn two_and_three_nodes_and_uneven_cuts_answer_as_one() {
    let bench = Bench::new();
    let toy = bench.toy();
    let run = |more: &[&str]| {
        let args = ["run", "--json", "--raw", "--max-tokens", "24", "--model", toy.to_str().unwrap(), PROMPT];
        bench.json(&[&args[..], more].concat())
    };
    let alone = run(&[]);
    assert_eq!(alone["nodes"].as_array().unwrap().len(), 1);
    assert_eq!(alone["hops"], serde_json::json!([]));
    let three = run(&["--nodes", "3"]);
    same_answer(&alone, &three);
    assert_eq!(three["hops"].as_array().unwrap().len(), 3);
    same_answer(&alone, &run(&["--nodes", "2", "--kv", "f16", "--threads", "1"]));
    for cut in ["0..1,1..4", "0..3,3..4", "0..1,1..2,2..4"] {
        let answer = run(&["--layers", cut]);
        same_answer(&alone, &answer);
        let layers: Vec<String> = answer["nodes"].as_array().unwrap().iter().map(range).collect();
        assert_eq!(layers.join(","), cut);
    }
}

fn range(node: &Value) -> String {
    format!("{}..{}", node["layers"][0], node["layers"][1])
}

#[test]
fn sampling_is_the_same_on_every_ring() {
    let bench = Bench::new();
    let path = bench.path("toy.gguf");
    spec("qwen2").write_gguf(&path, GgufType::Q8_0).unwrap();
    let run = |seed: &str, more: &[&str]| {
        let model = path.to_str().unwrap();
        let args = ["run", "--json", "--raw", "--max-tokens", "24", "--model", model, "--seed", seed, PROMPT];
        let sampling =
            ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--repetition-penalty", "1.1"];
        bench.json(&[&args[..], &sampling, more].concat())
    };
    let alone = run("7", &[]);
    same_answer(&alone, &run("7", &["--nodes", "2"]));
    assert_ne!(alone["token_ids"], run("8", &[])["token_ids"]);
}

#[test]
fn run_json_keeps_its_contract() {
    let bench = Bench::new();
    // Rows of 8 kB, which take more than the microsecond that times are counted in.
    let toy = bench.write(&spec("llama").with_config("hidden_size", 2048.into()), "toy");
    let args =
        ["run", "--json", "--max-tokens", "8", "--nodes", "2", "--model", toy.to_str().unwrap(), "hen"];
    let report = bench.json(&args);
    let tokens = report["token_ids"].as_array().unwrap().len();
    assert_eq!(report["model"], "toy");
    assert_eq!(report["completion_tokens"], tokens);
    assert!(report["prompt_tokens"].as_u64().unwrap() > 10, "the chat template was used: {report}");
    assert!(["stop", "length"].contains(&report["finish_reason"].as_str().unwrap()));
    assert!(report["numerics"].as_str().unwrap().starts_with("swarm-numerics-"));
    for number in ["ttft_ms", "prefill_tok_per_s", "decode_tok_per_s", "lap_ms_p50"] {
        assert!(report[number].as_f64().unwrap() > 0.0, "{number}: {report}");
    }
    let nodes = report["nodes"].as_array().unwrap();
    assert_eq!(nodes[0]["layers"][0], 0);
    assert_eq!(nodes[0]["layers"][1], nodes[1]["layers"][0]);
    assert_eq!(nodes[1]["layers"][1], 4);
    for node in nodes {
        assert!(node["name"].as_str().unwrap().starts_with("node-"));
        assert!(node["bytes_loaded"].as_u64().unwrap() > 0);
        assert!(node["compute_ms_p50"].as_f64().unwrap() >= 0.0);
    }
    let waterfall = &report["waterfall"];
    let parts = waterfall["nodes"].as_array().unwrap();
    assert_eq!(parts.len(), 2);
    let ms = |value: &serde_json::Value| value.as_f64().unwrap();
    let names = ["wire_ms", "receive_ms", "queue_ms", "compute_ms", "serialize_ms"];
    let of_nodes: f64 = parts.iter().flat_map(|node| names.map(|name| ms(&node[name]))).sum();
    assert!((of_nodes + ms(&waterfall["return_ms"]) - ms(&waterfall["sum_ms"])).abs() < 1e-6, "{waterfall}");
    let hops = report["hops"].as_array().unwrap();
    assert_eq!(hops[1]["to"], nodes[0]["name"]);
    assert_eq!(hops[0]["from"], nodes[0]["name"]);
    for hop in hops {
        assert!(hop["bytes_per_token"].as_f64().unwrap() > 32.0);
        assert!(hop["ms_p50"].as_f64().unwrap() <= hop["ms_p99"].as_f64().unwrap());
    }
    // A frame is not here before its first byte. What comes back to the first node is a token, received within a microsecond.
    assert!(ms(&parts[1]["receive_ms"]) > 0.0, "{waterfall}");
    // A row of 2,048 numbers, and heads and times around it.
    assert!(hops[0]["bytes_per_token"].as_f64().unwrap() > 8192.0);
}

#[test]
fn the_parts_of_a_token_sum_to_its_wall_time() {
    let bench = Bench::new();
    let toy = bench.toy();
    let args = ["run", "--json", "--raw", "--max-tokens", "200", "--model", toy.to_str().unwrap(), PROMPT];
    for nodes in ["1", "3"] {
        let report = bench.json(&[&args[..], &["--nodes", nodes]].concat());
        let waterfall = &report["waterfall"];
        let (sum, wall) = (waterfall["sum_ms"].as_f64().unwrap(), waterfall["wall_ms"].as_f64().unwrap());
        // A toy's lap is a fraction of a millisecond, of which rounding to microseconds is a part.
        assert!((sum - wall).abs() < 0.05 * wall + 0.05, "{nodes} nodes: {sum} of {wall} ms");
    }
}

#[test]
fn the_parts_of_a_real_models_token_sum_to_its_wall_time_within_five_percent() {
    let bench = Bench::new();
    let model = swarm_testkit::demo_model().unwrap();
    let args =
        ["run", "--json", "--raw", "--max-tokens", "12", "--model", model.to_str().unwrap(), "the hen"];
    for nodes in [1, 3] {
        let report = bench.json(&[&args[..], &["--nodes", &nodes.to_string()]].concat());
        let waterfall = &report["waterfall"];
        let (sum, wall) = (waterfall["sum_ms"].as_f64().unwrap(), waterfall["wall_ms"].as_f64().unwrap());
        assert!((sum - wall).abs() < 0.05 * wall, "{nodes} nodes: {sum} of {wall} ms");
        for node in waterfall["nodes"].as_array().unwrap() {
            let received = node["receive_ms"].as_f64().unwrap();
            assert!(node["compute_ms"].as_f64().unwrap() > 0.0, "{waterfall}");
            assert!(if nodes == 1 { received == 0.0 } else { received > 0.0 }, "{waterfall}");
        }
    }
}

#[test]
fn what_was_not_measured_is_null() {
    let bench = Bench::new();
    let toy = bench.toy();
    let report = bench.json(&[
        "run",
        "--json",
        "--max-tokens",
        "1",
        "--nodes",
        "2",
        "--model",
        toy.to_str().unwrap(),
        "hen",
    ]);
    assert_eq!(report["completion_tokens"], 1);
    assert!(report["decode_tok_per_s"].is_null());
    assert!(report["nodes"][0]["compute_ms_p50"].is_null());
    assert!(report["hops"][0]["ms_p50"].is_null());
    assert!(report["waterfall"].is_null());
    assert!(report["hops"][0]["bytes_per_token"].is_null());
    assert!(report["ttft_ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn verify_gives_a_receipt() {
    let bench = Bench::new();
    let toy = bench.toy();
    let model = toy.to_str().unwrap();
    let receipt = bench.json(&["verify", "--json", "--nodes", "3", "--max-tokens", "16", "--model", model]);
    assert_eq!(receipt["equal"], true);
    assert!(receipt["tokens"].as_u64().unwrap() > 0);
    for hash in ["token_hash", "logits_hash"] {
        let (single, ring) = (&receipt[format!("{hash}_single")], &receipt[format!("{hash}_ring")]);
        assert_eq!(single, ring);
        assert_eq!(single.as_str().unwrap().len(), 64);
    }
    let stages = receipt["placement"]["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 3);
    assert_eq!(stages[2]["layers"]["end"], 4);
    let (worker, address) = bench.worker("there", &toy);
    let finished = bench.run(&["verify", "--peer", &address, "--max-tokens", "8", "--model", model, "hen"]);
    assert!(finished.stdout.contains("equal to one node: yes"), "{finished:?}");
    drop(worker);
}

#[test]
fn demo_shows_placement_telemetry_and_proof() {
    let bench = Bench::new();
    let toy = bench.toy();
    let finished = bench.run(&["demo", "--model", toy.to_str().unwrap(), "--max-tokens", "8"]);
    assert!(finished.status.success(), "{finished:?}");
    assert_eq!(finished.stdout.lines().last(), Some("equal to one node: yes"));
    for text in ["over 3 nodes", "node-2-", "frames x", "tok/s", "hop p50"] {
        assert!(finished.stdout.contains(text), "{text}: {}", finished.stdout);
    }
}

#[test]
fn bench_measures_its_contract() {
    let bench = Bench::new();
    let toy = bench.toy();
    let args =
        ["bench", "--json", "--model", toy.to_str().unwrap(), "--prompt-tokens", "40", "--gen-tokens", "20"];
    let report = bench.json(&[&args[..], &["--rounds", "1", "--nodes", "2", "--threads", "1"]].concat());
    for number in [
        "prefill_tok_per_s",
        "decode_tok_per_s",
        "weight_bytes_per_token",
        "read_bandwidth_gb_s",
        "decode_bandwidth_fraction",
        "peak_rss_bytes",
    ] {
        assert!(report[number].as_f64().unwrap() > 0.0, "{number}: {report}");
    }
    assert!(report["hop_overhead_us_p50"].is_f64(), "{report}");
    assert_eq!(report["nodes"].as_array().unwrap().len(), 2);
    let several = bench.json(&[&args[..], &["--rounds", "1", "--sessions", "3"]].concat());
    assert!(several["hop_overhead_us_p50"].is_null(), "{several}");
    assert_eq!(several["sessions"], 3);
}

#[test]
fn the_prompt_may_come_from_standard_input() {
    let bench = Bench::new();
    let toy = bench.toy();
    let args = ["run", "--raw", "--max-tokens", "8", "--model", toy.to_str().unwrap()];
    let typed = bench.run(&[&args[..], &["the hen"]].concat());
    let mut piped = bench.start(&[&args[..], &["-"]].concat());
    piped.say("the hen").unwrap();
    assert_eq!(piped.finish(crate::common::SOON).unwrap().stdout, typed.stdout);
}

#[test]
fn models_lists_what_is_here() {
    let bench = Bench::new();
    bench.write(&spec("llama"), "models/my-toy");
    let list = bench.json(&["models", "--json"]);
    assert_eq!(list["models"][0]["name"], "my-toy");
    assert_eq!(list["presets"].as_array().unwrap().len(), 3);
    assert!(bench.run(&["models"]).stdout.contains("my-toy"));
    // The name that is listed is the name that works.
    let answer =
        bench.json(&["run", "--json", "--max-tokens", "2", "--nodes", "2", "--model", "my-toy", "hen"]);
    assert_eq!(answer["model"], "my-toy");
}
