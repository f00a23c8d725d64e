//! A bounded run of every fuzz target, the same each time; long runs are `cargo xtask fuzz`.

use swarm_fuzz::{Budget, Shape, TARGETS, Target, check, fuzz, target};

/// Runs a target from its seeds; several seeds of chance, so that one unlucky choice does not decide.
fn bounded(name: &str) {
    let target = target(name).unwrap_or_else(|| panic!("no target {name}"));
    let began = std::time::Instant::now();
    let stats = fuzz(target, 1, Budget::Runs(target.runs), |_| {}).unwrap_or_else(|crash| panic!("{crash}"));
    println!("{name}: {stats:?} in {} ms", began.elapsed().as_millis());
    // A target that always says the same is not looked into.
    assert!(stats.outcomes > 20, "{stats:?}");
}

#[test]
fn frames() {
    bounded("frames");
}

#[test]
fn sequences_of_frames() {
    bounded("sequences");
}

#[test]
fn control_messages() {
    bounded("control");
}

#[test]
fn gguf_headers() {
    bounded("gguf");
}

#[test]
fn safetensors_headers() {
    bounded("safetensors");
}

#[test]
fn tokenizers() {
    bounded("tokenizer");
}

#[test]
fn chat_templates() {
    bounded("template");
}

#[test]
fn no_target_is_left_out() {
    let tests = include_str!("bounded.rs");
    let left_out = TARGETS.iter().filter(|target| !tests.contains(&format!("bounded({:?});", target.name)));
    assert_eq!(left_out.map(|target| target.name).collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn a_panic_is_found_and_cut_down() {
    let broken = Target {
        name: "broken",
        shape: Shape::Binary,
        words: &["magic"],
        seeds: || vec![vec![b'.'; 200]],
        run: |bytes| {
            assert!(!bytes.windows(5).any(|word| word == b"magic"), "the word was said");
            bytes.len() as u64
        },
        runs: 0,
    };
    let crash = fuzz(&broken, 1, Budget::Runs(100_000), |_| {}).unwrap_err();
    assert!(crash.why.contains("the word was said"), "{crash}");
    assert_eq!(crash.input, b"magic");
    assert!(check(&broken, b"tragic").is_ok());
}

#[test]
fn equal_seeds_are_equal_runs() {
    let target = target("control").unwrap();
    let run = || {
        let mut inputs = Vec::new();
        let stats = fuzz(target, 7, Budget::Runs(300), |input| inputs.push(input.to_vec())).unwrap();
        (stats, inputs)
    };
    assert_eq!(run(), run());
}
