//! The logits of every family against Hugging Face transformers, and of every format against a slow
//! f64 twin.

mod common;

use common::{Chain, argmax_rows, naive, open_gguf, open_hf, relative_error};
use swarm_kernels::Pool;
use swarm_model::KvType;
use swarm_testkit::golden;
use swarm_testkit::toy::{self, GgufType, Storage};
use swarm_weights::Checkpoint;

/// Prefill in one step, in chunks, and token by token: all within 1e-5 of the largest logit (2e-6 is
/// measured), the same most likely token at every position.
fn meets_golden(name: &str, checkpoint: &Checkpoint) {
    let golden = golden(name);
    let chain = Chain::single(checkpoint, KvType::F32);
    let pool = Pool::new(1);
    for steps in [&[golden.ids.len()][..], &[7], &[1]] {
        let logits = chain.logits(&pool, &golden.ids, steps);
        let error = relative_error(&logits, &golden.logits);
        assert!(error <= 1e-5, "{name}, steps {steps:?}: relative error {error:e}");
        assert_eq!(argmax_rows(&logits, golden.vocab), argmax_rows(&golden.logits, golden.vocab), "{name}");
    }
}

#[test]
fn every_family_meets_transformers_from_a_folder() {
    for model in toy::all() {
        meets_golden(model.name(), &open_hf(&model, Storage::F32).checkpoint);
    }
}

#[test]
fn every_family_meets_transformers_from_gguf() {
    // GGUF has no way to say that only some layers have a window.
    for model in toy::all().iter().filter(|model| model.name() != "qwen2_window") {
        meets_golden(model.name(), &open_gguf(model, GgufType::F32).checkpoint);
    }
}

/// The toy weights are exact in f16 and bf16, so the goldens hold for those files too.
#[test]
fn half_precision_files_meet_the_same_goldens() {
    for name in ["llama3", "qwen3"] {
        let model = toy::spec(name);
        meets_golden(name, &open_hf(&model, Storage::F16).checkpoint);
        meets_golden(name, &open_hf(&model, Storage::BF16.sharded(3)).checkpoint);
        meets_golden(name, &open_gguf(&model, GgufType::BF16).checkpoint);
    }
}

/// Keys and values in f16 lose 11 bits of 24; the logits move by 2e-3 at most where measured.
#[test]
fn f16_kv_stays_near_the_goldens() {
    for model in toy::all() {
        let golden = golden(model.name());
        let opened = open_hf(&model, Storage::F32);
        let chain = Chain::single(&opened.checkpoint, KvType::F16);
        let logits = chain.logits(&Pool::new(1), &golden.ids, &[16]);
        let error = relative_error(&logits, &golden.logits);
        assert!(error <= 5e-3, "{}: relative error {error:e}", model.name());
    }
}

/// Against the f64 twin on the dequantized weights, what remains is the int8 rounding of activations:
/// at most 1 / 254 of a block's largest value per element, which two layers amplify to 3e-2 here.
#[test]
fn quantized_models_stay_near_their_dequantized_twins() {
    let model = toy::spec("llama_k");
    let ids = &golden("llama_k").ids[..24];
    for format in GgufType::ALL {
        let opened = open_gguf(&model, format);
        let want = naive::logits(&opened.checkpoint, ids);
        let got = Chain::single(&opened.checkpoint, KvType::F32).logits(&Pool::new(1), ids, &[ids.len()]);
        let error = relative_error(&got, &want);
        let float = matches!(format, GgufType::F32 | GgufType::F16 | GgufType::BF16);
        let bound = if float { 1e-5 } else { 5e-2 };
        assert!(error <= bound, "{format:?}: relative error {error:e}");
    }
}

/// The slow twin is itself held against transformers, so that both are believed for the right reason.
#[test]
fn the_slow_twin_meets_the_goldens() {
    for name in ["llama", "llama_bias", "mistral", "qwen2_window", "qwen3"] {
        let golden = golden(name);
        let opened = open_hf(&toy::spec(name), Storage::F32);
        let error = relative_error(&naive::logits(&opened.checkpoint, &golden.ids), &golden.logits);
        assert!(error <= 1e-5, "{name}: relative error {error:e}");
    }
}
