//! Weights that are quantized while they are loaded: the same bits wherever layers are cut, as large as was said, and
//! close to what they were.

mod common;

use common::{Chain, Opened, bits, cuts, open_gguf, open_hf, relative_error};
use proptest::prelude::*;
use swarm_kernels::{DType, Pool, Quant};
use swarm_model::{KvType, LoadOptions, Stage, stage_size, weight_sizes};
use swarm_testkit::golden;
use swarm_testkit::toy::{self, GgufType, Storage};
use swarm_weights::{Checkpoint, EMBED, HEAD};

fn quantized(opened: Opened, quant: Quant) -> Opened {
    let Opened { checkpoint, dir } = opened;
    Opened { checkpoint: checkpoint.quantized(Some(quant)), dir }
}

fn logits(checkpoint: &Checkpoint, lengths: &[usize], ids: &[u32]) -> Vec<f32> {
    Chain::new(checkpoint, lengths, KvType::F16).logits(&Pool::new(2), ids, &[7, 1, 3])
}

/// Tied heads among them: an embedded row is not to depend on whether its stage has the head as well.
#[test]
fn cuts_do_not_show() {
    for (name, quant) in
        [("llama3", Quant::Q4_0), ("qwen2", Quant::Q8_0), ("llama_k", Quant::Q4_K), ("qwen3", Quant::Q4_K)]
    {
        let opened = quantized(open_hf(&toy::spec(name), Storage::F16), quant);
        let layers = opened.checkpoint.config().num_hidden_layers;
        let ids = &golden(name).ids[..20];
        let whole = logits(&opened.checkpoint, &[layers], ids);
        for cut in (2..=layers.min(3)).flat_map(|stages| cuts(layers, stages)) {
            assert!(bits(&logits(&opened.checkpoint, &cut, ids)) == bits(&whole), "{name} {cut:?}");
        }
    }
}

/// GGUF stores the rows of some matrices in another order; their blocks must not know.
#[test]
fn both_formats_become_the_same_blocks() {
    for name in ["llama_k", "qwen2", "llama"] {
        for quant in Quant::ALL {
            let hf = quantized(open_hf(&toy::spec(name), Storage::F16), quant);
            let gguf = quantized(open_gguf(&toy::spec(name), GgufType::F16), quant);
            let ids = &golden(name).ids[..12];
            let of = |opened: &Opened| {
                let layers = opened.checkpoint.config().num_hidden_layers;
                bits(&logits(&opened.checkpoint, &[layers], ids))
            };
            assert!(of(&hf) == of(&gguf), "{name} {quant:?}");
        }
    }
}

#[test]
fn little_is_lost() {
    for (name, most) in [("llama_k", [0.06, 0.4, 0.3]), ("qwen3", [0.06, 0.4, 0.3])] {
        let plain = open_hf(&toy::spec(name), Storage::F32);
        let layers = plain.checkpoint.config().num_hidden_layers;
        let ids = &golden(name).ids[..24];
        let want = logits(&plain.checkpoint, &[layers], ids);
        let mut lost = Vec::new();
        let mut checkpoint = plain.checkpoint;
        for quant in Quant::ALL {
            checkpoint = checkpoint.quantized(Some(quant));
            lost.push(relative_error(&logits(&checkpoint, &[layers], ids), &want));
        }
        assert!(lost.iter().zip(most).all(|(lost, most)| *lost < most), "{name}: {lost:?}");
        checkpoint = checkpoint.quantized(None);
        assert!(bits(&logits(&checkpoint, &[layers], ids)) == bits(&want), "it was only a view");
    }
}

/// Weights of a quantized stage as f32: the reference for the arithmetic, so with the same rounded weights.
#[test]
fn dequantized_means_after_quantizing() {
    let opened = quantized(open_hf(&toy::spec("llama_k"), Storage::F16), Quant::Q4_0);
    let ids = &golden("llama_k").ids[..24];
    let layers = opened.checkpoint.config().num_hidden_layers;
    let options = LoadOptions { dequantized: true, threads: 2, ..LoadOptions::default() };
    let wide = Stage::load(&opened.checkpoint, 0..layers, &options, &mut |_| {}).unwrap();
    let narrow = logits(&opened.checkpoint, &[layers], ids);
    let wide = Chain::of(vec![wide], KvType::F16).logits(&Pool::new(2), ids, &[7, 1, 3]);
    let plain = open_hf(&toy::spec("llama_k"), Storage::F16);
    let plain = logits(&plain.checkpoint, &[layers], ids);
    let (arithmetic, weights) = (relative_error(&narrow, &wide), relative_error(&narrow, &plain));
    assert!(arithmetic < 0.05 && arithmetic < weights / 2.0, "{arithmetic} {weights}");
}

#[test]
fn what_becomes_of_which_tensor() {
    let opened = quantized(open_hf(&toy::spec("llama_k"), Storage::F16), Quant::Q4_K);
    let held = |name: &str| opened.checkpoint.tensor(name).unwrap().held;
    assert_eq!(held(EMBED), DType::F16);
    assert_eq!(held(HEAD), DType::Q4_K);
    assert_eq!(held("model.layers.0.mlp.down_proj.weight"), DType::Q4_K);
    assert_eq!(held("model.layers.0.input_layernorm.weight"), DType::F16);
    // A tied head is quantized where it multiplies; rows of 64 are no blocks of 256.
    let tied = quantized(open_hf(&toy::spec("qwen2"), Storage::F16), Quant::Q4_K);
    let held = |name: &str| tied.checkpoint.tensor(name).unwrap().held;
    assert_eq!(held(EMBED), DType::Q5_0);
    assert_eq!(held("model.layers.0.self_attn.q_proj.bias"), DType::F16);
    // What is quantized stays.
    let stored = quantized(open_gguf(&toy::spec("llama_k"), GgufType::Q6_K), Quant::Q4_0);
    assert!(stored.checkpoint.quant_groups().iter().all(|group| group.from == group.to));
}

#[test]
fn the_identity_knows_what_weights_become() {
    let checkpoint = open_hf(&toy::spec("llama"), Storage::F16).checkpoint;
    let plain = checkpoint.held_fingerprint().unwrap();
    assert_eq!(plain, checkpoint.fingerprint().unwrap());
    let mut seen = vec![plain];
    let mut checkpoint = checkpoint;
    for quant in Quant::ALL {
        checkpoint = checkpoint.quantized(Some(quant));
        assert_eq!(checkpoint.fingerprint().unwrap(), plain, "the files are the same");
        let held = checkpoint.held_fingerprint().unwrap();
        assert!(!seen.contains(&held));
        seen.push(held);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn a_stage_is_as_large_as_was_said(
        name in proptest::sample::select(toy::NAMES.to_vec()), quant in 0usize..4, start in 0usize..4, len in 1usize..5,
        threads in 1usize..4,
    ) {
        let quant = Quant::ALL.get(quant).copied();
        let checkpoint = open_hf(&toy::spec(name), Storage::BF16).checkpoint.quantized(quant);
        let layers = checkpoint.config().num_hidden_layers;
        let start = start.min(layers - 1);
        let range = start..layers.min(start + len);
        let options = LoadOptions { threads, ..LoadOptions::default() };
        let stage = Stage::load(&checkpoint, range.clone(), &options, &mut |_| {}).unwrap();
        let size = stage_size(&checkpoint, range.clone(), KvType::F16).unwrap();
        prop_assert_eq!(size.weight_bytes, stage.weight_bytes() as u64);
        // What the planner adds up is the same.
        let sizes = weight_sizes(&checkpoint);
        let tail = if range.end == layers { sizes.norm + sizes.head } else { 0 };
        prop_assert_eq!(sizes.layers[range].iter().sum::<u64>() + tail, size.weight_bytes);
    }
}
