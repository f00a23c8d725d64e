//! `--quant`: smaller weights, the same bits for every ring, and what is said when a model does not lend itself to it.

use std::path::Path;

use serde_json::Value;
use swarm_testkit::toy::{GgufType, spec};

use crate::common::Bench;
#[cfg(target_os = "linux")]
use crate::common::SmallDisk;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn bytes_loaded(report: &Value) -> u64 {
    report["nodes"].as_array().unwrap().iter().map(|node| node["bytes_loaded"].as_u64().unwrap()).sum()
}

#[test]
fn a_ring_of_quantized_stages_is_equal_to_one_node() {
    let bench = Bench::new();
    // Its head is its embedding: one stage looks up in it, another multiplies by it.
    let model = bench.write(&spec("qwen2"), "tied");
    for quant in ["q8_0", "Q4_0"] {
        let args = ["verify", "--json", "--model", text(&model), "--quant", quant, "--nodes", "3"];
        let receipt = bench.json(&[&args[..], &["--max-tokens", "12", "--raw"]].concat());
        assert_eq!(receipt["equal"], true, "{receipt}");
        assert_eq!(receipt["quant"], quant.to_lowercase(), "{receipt}");
        assert_eq!(receipt["numerics"], format!("{}+{}", swarm_kernels::NUMERICS, quant.to_lowercase()));
    }
}

#[test]
fn the_plan_and_the_answer_count_what_is_held() {
    let bench = Bench::new();
    let model = bench.write(&spec("llama_k"), "model");
    let run = |more: &[&str]| {
        let args = ["run", "hello", "--raw", "--json", "--max-tokens", "4", "--model", text(&model)];
        bench.json(&[&args[..], more].concat())
    };
    let plain = run(&[]);
    let mut last = bytes_loaded(&plain);
    for quant in ["q8_0", "q4_k"] {
        let report = run(&["--quant", quant]);
        assert_ne!(report["fingerprint"], plain["fingerprint"]);
        assert_ne!(report["logits_hash"], plain["logits_hash"]);
        let loaded = bytes_loaded(&report);
        assert!(loaded < last * 2 / 3, "{quant}: {loaded} after {last}");
        last = loaded;
        let plan = bench.json(&["plan", "--json", "--alone", "--model", text(&model), "--quant", quant]);
        assert_eq!(plan["stages"][0]["weight_bytes"], loaded, "{plan}");
        assert_eq!(plan["quant"], quant);
    }
}

#[test]
fn what_cannot_become_smaller_is_told() {
    let bench = Bench::new();
    let model = bench.write(&spec("llama"), "model");
    let args = ["run", "hello", "--raw", "--max-tokens", "2", "--quant", "q4_k", "--model"];
    let finished = bench.run(&[&args[..], &[text(&model)]].concat());
    assert!(finished.status.success());
    assert!(finished.stderr.contains("rows of 64 values, no whole Q4_K blocks of 256, and become Q5_0"));
    let stored = bench.path("stored.gguf");
    spec("llama").write_gguf(&stored, GgufType::Q8_0).unwrap();
    let told = ["would change nothing of stored", "are Q8_0 in the file and stay so", "leave it out"];
    bench.refused(&[&args[..], &[text(&stored)]].concat(), 2, &told);
    bench.refused(&["pull", text(&stored), "--quant", "q4_0"], 2, &told);
}

#[test]
fn perplexity_says_what_the_weights_are() {
    let bench = Bench::new();
    let model = bench.write(&spec("llama_k"), "model");
    let args = ["perplexity", "--json", "--compare", "--context", "64", "--model", text(&model)];
    let compared = bench.json(&[&args[..], &["--quant", "q4_k"]].concat());
    assert_eq!((&compared["equal"], &compared["close"]), (&true.into(), &true.into()), "{compared}");
    assert_eq!(compared["fast"]["weights"], "q4_k");
    assert_eq!(compared["f32"]["weights"], "f32");
    // Only the weights differ from those of the plain model; a toy knows little that could be lost.
    let plain = bench.json(&["perplexity", "--json", "--context", "64", "--model", text(&model)]);
    let of = |report: &Value| report["perplexity"].as_f64().unwrap();
    assert!((of(&compared["fast"]) / of(&plain) - 1.0).abs() < 0.05, "{compared} {plain}");
}

#[test]
fn the_quantized_form_is_kept_on_request_used_listed_and_removed() {
    let bench = Bench::new();
    let model = bench.write(&spec("llama"), "model");
    let forms = || bench.json(&["models", "--json"])["quantized"].clone();
    let answer = |more: &[&str]| {
        let args = ["run", "hello", "--raw", "--json", "--max-tokens", "4", "--quant", "q4_0", "--model"];
        let report = bench.json(&[&args[..], &[text(&model)], more].concat());
        report["logits_hash"].clone()
    };
    let want = answer(&[]);
    assert_eq!(forms(), serde_json::json!([]), "nobody asked for it");
    // Each node of a ring keeps its own.
    assert_eq!(answer(&["--keep-quantized", "--nodes", "2"]), want);
    let kept = forms();
    assert_eq!((&kept[0]["name"], &kept[0]["quant"]), (&"model".into(), &"q4_0".into()));
    let folder = Path::new(kept[0]["path"].as_str().unwrap()).to_owned();
    let files = || std::fs::read_dir(&folder).unwrap().count();
    assert_eq!(files(), 4 * 7 + 1 + 1);
    assert_eq!(answer(&[]), want);
    // What is missing comes with a pull; what is there stays.
    std::fs::remove_file(folder.join("lm_head.weight.blocks")).unwrap();
    let pulled = bench.json(&["pull", text(&model), "--quant", "q4_0", "--json"]);
    assert_eq!(pulled["quantized"], kept[0]["path"]);
    assert_eq!(files(), 4 * 7 + 1 + 1);
    assert_eq!(answer(&["--nodes", "2"]), want);
    let pruned = bench.json(&["prune", "--keep", "0", "--json"]);
    assert_eq!(pruned["removed_quantized"][0]["quant"], "q4_0", "{pruned}");
    assert!(!folder.exists());
    bench.refused(&["run", "hello", "--keep-quantized", "--model", text(&model)], 2, &["required arguments"]);
}

/// The whole form of the model is told as needed, not one tensor's; what came is used, and the answer does not change.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_full_of_the_form_says_how_much_it_needs() {
    let bench = Bench::new();
    let model = bench.write(&spec("llama").with_layers(16), "model");
    let answer = |more: &[&str]| {
        let args = ["run", "hello", "--raw", "--json", "--max-tokens", "4", "--quant", "q8_0", "--model"];
        let finished = bench.run(&[&args[..], &[text(&model)], more].concat());
        assert!(finished.status.success(), "{finished:?}");
        (serde_json::from_str::<Value>(&finished.stdout).unwrap()["logits_hash"].clone(), finished.stderr)
    };
    let (want, _) = answer(&[]);
    let Some(disk) = SmallDisk::mount(bench.path("store"), "size=256k") else { return };
    let number = |said: &str, before: &str| -> u64 {
        said.split(before).nth(1).and_then(|rest| rest.split(' ').next()).unwrap().parse().unwrap()
    };
    let (got, said) = answer(&["--keep-quantized"]);
    assert_eq!(got, want);
    assert!(said.contains("quantized weights are not kept on the disk: the disk is full"), "{said}");
    let (need, there) = (number(&said, "these layers take "), number(&said, "of which "));
    assert!(need > 256 << 10 && there > 0 && there <= 256 << 10, "{need} {there}: {said}");
    let folder = bench.path("store").join("quantized");
    assert!(said.contains(folder.to_str().unwrap()), "{said}");
    // The same from pull, which is an error there, because nothing else was asked of it.
    let pull = ["pull", text(&model), "--quant", "q8_0"];
    let refused = bench.refused(&pull, 1, &["quantized weights are not kept", "the disk is full"]);
    assert_eq!(number(&refused, "these layers take "), need, "{refused}");
    assert!(number(&refused, "of which ") >= there, "{refused}");
    assert_eq!(answer(&[]).0, want, "what is there is used");
    // With so much room it is whole.
    disk.grow(&format!("size={}k", need.div_ceil(1024) + 512));
    let pulled = bench.json(&["pull", text(&model), "--quant", "q8_0", "--json"]);
    let kept: u64 = std::fs::read_dir(pulled["quantized"].as_str().unwrap())
        .unwrap()
        .map(|file| file.unwrap())
        .filter(|file| file.path().extension().is_some_and(|extension| extension == "blocks"))
        .map(|file| file.metadata().unwrap().len())
        .sum();
    assert_eq!(kept, need);
    assert_eq!(answer(&[]).0, want);
}
