//! `perplexity`: the scalar path gives the same bits, f32 weights nearly the same.

use serde_json::Value;
use swarm_testkit::toy::{GgufType, spec};

use crate::common::Bench;

#[test]
fn perplexity_is_the_same_by_every_path_and_nearly_that_of_f32_weights() {
    let bench = Bench::new();
    for format in [GgufType::Q4_0, GgufType::Q8_0] {
        let model = bench.path(&format!("{format:?}.gguf"));
        spec("llama").write_gguf(&model, format).unwrap();
        let args = ["perplexity", "--json", "--model", model.to_str().unwrap(), "--context", "96"];
        let compared = bench.json(&[&args[..], &["--compare"]].concat());
        assert_eq!(compared["equal"], true, "{compared}");
        assert_eq!(compared["close"], true, "{compared}");
        assert!(compared["difference"].as_f64().unwrap().abs() < 0.005, "{compared}");
        let bits = |report: &Value| report["log_probability_sum_bits"].as_str().unwrap().to_owned();
        assert_eq!(bits(&compared["fast"]), bits(&compared["scalar"]));
        assert_ne!(
            bits(&compared["fast"]),
            bits(&compared["f32"]),
            "f32 weights must be another computation"
        );
        assert_eq!(compared["scalar"]["kernels"], "scalar");
        assert_eq!(compared["f32"]["weights"], "f32");
        // The text has more than one window, and threads do not show.
        let tokens = compared["fast"]["tokens"].as_u64().unwrap();
        assert!(tokens > 500, "{compared}");
        let threads = bench.json(&[&args[..], &["--threads", "3"]].concat());
        assert_eq!(bits(&threads), bits(&compared["fast"]));
        let perplexity = threads["perplexity"].as_f64().unwrap();
        let mean = threads["log_probability_sum"].as_f64().unwrap() / tokens as f64;
        assert!((perplexity / (-mean).exp() - 1.0).abs() < 1e-12, "{threads}");
    }
}

#[test]
fn a_text_of_ones_own_is_scored_from_a_file_or_standard_input() {
    let bench = Bench::new();
    let toy = bench.toy();
    let file = bench.path("text.txt");
    std::fs::write(&file, "the hen and the egg\n").unwrap();
    let args = ["perplexity", "--json", "--model", toy.to_str().unwrap(), "--text"];
    let from_file = bench.json(&[&args[..], &[file.to_str().unwrap()]].concat());
    let mut piped = bench.start(&[&args[..], &["-"]].concat());
    piped.say("the hen and the egg").unwrap();
    piped.close_stdin();
    let finished = piped.finish(crate::common::SOON).unwrap();
    let from_input: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(from_file["log_probability_sum_bits"], from_input["log_probability_sum_bits"]);
    std::fs::write(&file, "").unwrap();
    bench.refused(&[&args[..], &[file.to_str().unwrap()]].concat(), 2, &["less than two tokens"]);
    bench.refused(&[&args[..], &["/no/such/file"]].concat(), 2, &["--text", "cannot be read"]);
}
