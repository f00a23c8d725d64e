//! Placement: what `plan` says, what the others do about it, and what they say when the layers do not fit.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{Bench, SOON};

fn layers(placement: &Value) -> Vec<String> {
    let stages = placement["stages"].as_array().unwrap();
    stages.iter().map(|stage| format!("{}..{}", stage["layers"]["start"], stage["layers"]["end"])).collect()
}

fn number(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap_or_else(|| panic!("{name} is no number: {value}"))
}

#[test]
fn a_small_model_is_not_split_and_the_plan_says_why() {
    let bench = Bench::new();
    let toy = bench.toy();
    let model = toy.to_str().unwrap();
    let plan = bench.json(&["plan", "--json", "--nodes", "2", "--model", model]);
    assert_eq!(layers(&plan), ["0..4"]);
    assert_eq!(plan["left_out"], serde_json::json!(["node-2"]));
    assert_eq!(plan["alternatives"].as_array().unwrap().len(), 1);
    let other = &plan["alternatives"][0];
    assert_eq!(other["label"], "with node-2");
    let ring = &other["placement"];
    assert!(number(ring, "hops_ms") > 0.0 && number(ring, "lap_ms") > number(&plan, "lap_ms"), "{plan}");
    let parts = number(ring, "compute_ms") + number(ring, "hops_ms");
    assert!((parts - number(ring, "lap_ms")).abs() < 1e-6, "{plan}");
    assert_eq!(number(&plan, "alone_lap_ms"), number(&plan, "lap_ms"));
    let sentence = plan["sentence"].as_str().unwrap();
    let (alone, split) = (number(&plan, "tok_per_s"), number(ring, "tok_per_s"));
    assert_eq!(sentence, format!("not splitting: alone {alone:.1} tok/s, with node-2 {split:.1} tok/s"));
    // Memory is what the loader asks for, part by part.
    let stage = &plan["stages"][0];
    let parts: f64 =
        ["weight_bytes", "kv_bytes", "buffer_bytes"].iter().map(|part| number(stage, part)).sum();
    assert_eq!(parts, number(stage, "memory_bytes"));
    assert!(number(stage, "memory_bytes") <= number(stage, "offered_bytes"));
    let words = bench.run(&["plan", "--nodes", "2", "--model", model]).stdout;
    for text in ["not splitting: alone", "with node-2", "KV", "ms of compute", "ms of hops", "probed"] {
        assert!(words.contains(text), "{text}: {words}");
    }
    let words = bench.run(&["plan", "--alone", "--model", model]).stdout;
    assert!(words.contains("nobody to share with: alone"), "{words}");
}

#[test]
fn others_follow_the_plan_and_can_be_overruled() {
    let bench = Bench::new();
    let toy = bench.toy();
    let (_worker, address) = bench.worker("there", &toy);
    let start = ["--json", "--raw", "--max-tokens", "4", "--peer", &address];
    let run = |more: &[&str]| {
        let model = ["--model", toy.to_str().unwrap(), "the hen"];
        let finished = bench.run(&[&["run"], &start[..], more, &model].concat());
        assert!(finished.status.success(), "{finished:?}");
        let answer: Value = serde_json::from_str(&finished.stdout).unwrap();
        let nodes = answer["nodes"].as_array().unwrap();
        let layers = nodes.iter().map(|node| format!("{}..{}", node["layers"][0], node["layers"][1]));
        assert!(number(&answer, "predicted_tok_per_s") > 0.0);
        (layers.collect::<Vec<_>>(), answer["token_ids"].clone(), finished.stderr)
    };
    let (alone, ids, said) = run(&[]);
    assert_eq!(alone, ["0..4"]);
    assert!(said.contains("not splitting: alone") && said.contains("with there"), "{said}");
    let (split, same, _) = run(&["--split", "always"]);
    assert_eq!((split.len(), &same), (2, &ids));
    let (split, same, _) = run(&["--layers", "there=1..4,here=0..1"]);
    assert_eq!((split, &same), (vec!["0..1".to_owned(), "1..4".to_owned()], &ids));
    let (many, ..) = run(&["--objective", "throughput"]);
    assert_eq!(many.len(), 2, "two equal computers serve many users better than one");
    let (never, same, said) = run(&["--split", "never"]);
    assert_eq!((never, &same, said.as_str()), (alone, &ids, ""));
    let model = toy.to_str().unwrap();
    let refused = |more: &[&str], texts: &[&str]| {
        bench.refused(&[&["run", "--peer", &address, "--model", model], more, &["hi"]].concat(), 2, texts);
    };
    refused(&["--layers", "here=0..1,nobody=1..4"], &["no node is called \"nobody\"", "there-"]);
    refused(&["--layers", "there=0..1,here=1..4"], &["given cut", "there", "stay on this node"]);
    refused(&["--layers", "here=0..1,1..4"], &["--layers", "here=0..11,den=11..22"]);
}

#[test]
fn memory_decides_and_errors_say_who_lacks_how_much() {
    let bench = Bench::new();
    let toy = bench.toy();
    let model = toy.to_str().unwrap();
    let alone = bench.json(&["plan", "--json", "--alone", "--model", model]);
    let need = number(&alone["stages"][0], "memory_bytes") as u64;
    let less = (need - 1).to_string();
    // The loader refuses by the same number, to the byte.
    let run = |memory: &str, more: &[&str]| {
        bench.run(
            &[&["run", "--max-tokens", "1", "--model", model, "--memory", memory], more, &["hi"]].concat(),
        )
    };
    assert!(run(&need.to_string(), &[]).status.success());
    let texts = ["layers 3..4 have no home", "more memory is needed", "offers", "--context 256 would fit"];
    bench.refused(&["run", "--model", model, "--memory", &less, "hi"], 2, &texts);
    assert!(run(&less, &["--context", "256"]).status.success());
    let (_worker, address) = bench.worker("there", &toy);
    let finished = run(&less, &["--peer", &address, "--stats"]);
    assert!(finished.status.success() && finished.stderr.contains("there-"), "{finished:?}");
    let plan = bench.json(&[
        "plan",
        "--json",
        "--no-discovery",
        "--model",
        model,
        "--memory",
        &less,
        "--peer",
        &address,
    ]);
    assert_eq!(plan["stages"].as_array().unwrap().len(), 2);
    let sentence = plan["sentence"].as_str().unwrap();
    assert!(
        sentence.starts_with("splitting: with there ") && sentence.contains("alone it does not fit"),
        "{sentence}"
    );
    assert!(plan["alone_lap_ms"].is_null());
    let error = bench.refused(&["run", "--model", model, "--memory", "300kB", "hi"], 2, &["offers 300.0 kB"]);
    assert!(error.contains("free memory"), "{error}");
}

/// The profiles under a folder.
fn profiles(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let here = files.into_iter().filter(|path| path.parent().unwrap().ends_with("profiles"));
    here.chain(folders.iter().flat_map(|folder| profiles(folder))).collect()
}

#[test]
fn what_real_layers_take_is_learned_and_told() {
    let bench = Bench::new();
    let toy = bench.toy();
    let model = toy.to_str().unwrap();
    let plan = || bench.json(&["plan", "--json", "--alone", "--model", model]);
    let first = plan();
    assert_eq!(first["stages"][0]["source"], "probe");
    assert_eq!(profiles(bench.home.path()).len(), 1);
    // What was probed once is not probed again.
    assert_eq!(plan()["lap_ms"], first["lap_ms"]);
    let args = ["run", "--stats", "--raw", "--max-tokens", "40", "--model", model, "the tin hen"];
    let finished = bench.run(&args);
    let line = finished.stderr.lines().find(|line| line.starts_with("predicted "));
    let line = line.unwrap_or_else(|| panic!("{finished:?}"));
    assert!(line.contains(" tok/s (from a probe), measured ") && line.ends_with(" %"), "{line}");
    assert_eq!(plan()["stages"][0]["source"], "layers");
    assert!(bench.run(&args).stderr.contains("tok/s (from earlier answers), measured"));
    assert_eq!(profiles(bench.home.path()).len(), 1);
    let mut chat = bench.start(&["chat", "--alone", "--max-tokens", "12", "--model", model]);
    chat.say("the hen").unwrap();
    chat.expect(SOON, "tok/s, first token after").unwrap();
    chat.expect(SOON, "(from earlier answers), measured").unwrap();
    chat.say("exit").unwrap();
    assert!(chat.wait(SOON).unwrap().success());
}
