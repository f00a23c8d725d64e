//! SmolLM2-135M-Instruct over TCP between processes: the same 64 tokens on one, two and three nodes.

use swarm_testkit::demo_model;

use crate::common::Bench;

#[test]
fn a_real_model_answers_alike_on_one_two_and_three_nodes() {
    let model = demo_model().unwrap();
    let bench = Bench::new();
    let question = "Why is the sky blue?";
    let args = ["--max-tokens", "64", "--model", model.to_str().unwrap(), question];
    let run = |more: &[&str]| bench.json(&[&["run", "--json"], &args[..], more].concat());
    let alone = run(&[]);
    let text = alone["text"].as_str().unwrap();
    assert!(text.contains("scatter") && text.contains("light"), "{text}");
    assert_eq!(alone["prompt_tokens"], 36);
    assert_eq!(alone["completion_tokens"], 64);
    for more in [&["--nodes", "2"][..], &["--nodes", "3"], &["--layers", "0..1,1..30"]] {
        let ring = run(more);
        for field in ["token_ids", "logits_hash", "text", "finish_reason", "fingerprint"] {
            assert_eq!(alone[field], ring[field], "{field} with {more:?}");
        }
    }
    // What streams is what the object holds.
    let streamed = bench.run(&[&["run"], &args[..]].concat());
    assert_eq!(streamed.stdout, format!("{text}\n"));
}
