//! The bits of a row do not depend on cut, chunking, batch or threads.

mod common;

use std::sync::OnceLock;

use common::{Chain, bits, cuts, open_gguf, open_hf};
use proptest::prelude::*;
use swarm_kernels::Pool;
use swarm_model::{KvType, SampleScratch, Sampling, Scratch, sample};
use swarm_testkit::golden;
use swarm_testkit::toy::{self, GgufType, Storage};

/// Ten tokens of prompt and as many sampled: ids, and the logits bits of every step.
fn generate(chain: &Chain, pool: &Pool, prompt: &[u32], sampling: &Sampling) -> (Vec<u32>, Vec<u32>) {
    let mut session = chain.open();
    let mut history = prompt.to_vec();
    let mut next = prompt.to_vec();
    let mut seen = Vec::new();
    let mut scratch = SampleScratch::default();
    for _ in 0..10 {
        let logits = chain.step(pool, &mut session, &next);
        seen.extend(bits(&logits));
        let last = &logits[logits.len() - toy::VOCAB_SIZE..];
        let token = sample(last, sampling, &history, history.len() as u64, &mut scratch).unwrap();
        history.push(token);
        next = vec![token];
    }
    (history, seen)
}

#[test]
fn every_cut_gives_equal_tokens_and_equal_logits_bits() {
    let pool = Pool::new(1);
    let sampled = Sampling { temperature: 0.9, top_k: 40, top_p: 0.95, seed: 5, ..Sampling::default() };
    for (name, sampling) in [("llama", Sampling::default()), ("qwen2_window", sampled)] {
        let prompt = &golden(name).ids[..10];
        for layers in 1..=6 {
            let opened = open_hf(&toy::spec(name).with_layers(layers), Storage::BF16);
            let single = Chain::single(&opened.checkpoint, KvType::F16);
            let want = generate(&single, &pool, prompt, &sampling);
            for stages in 1..=4.min(layers) {
                for cut in cuts(layers, stages) {
                    let chain = Chain::new(&opened.checkpoint, &cut, KvType::F16);
                    assert!(want == generate(&chain, &pool, prompt, &sampling), "{name} cut {cut:?}");
                }
            }
        }
    }
}

#[test]
fn quantized_tied_and_cut_gives_equal_bits() {
    let pool = Pool::new(1);
    let model = toy::spec("llama3"); // tied: the tail of a cut loads the embedding as its head
    let prompt = &golden("llama3").ids[..10];
    for format in [GgufType::Q8_0, GgufType::Q4_0, GgufType::Q5_1] {
        let opened = open_gguf(&model, format);
        let single = Chain::single(&opened.checkpoint, KvType::F16);
        let want = generate(&single, &pool, prompt, &Sampling::default());
        for cut in [&[1, 3][..], &[2, 1, 1], &[1, 1, 1, 1]] {
            let chain = Chain::new(&opened.checkpoint, cut, KvType::F16);
            assert!(want == generate(&chain, &pool, prompt, &Sampling::default()), "{format:?} cut {cut:?}");
        }
    }
}

#[test]
fn any_number_of_threads_gives_equal_bits() {
    for (format, kv_type) in [(GgufType::Q4_K, KvType::F16), (GgufType::F32, KvType::F32)] {
        let opened = open_gguf(&toy::spec("llama_k"), format);
        let chain = Chain::single(&opened.checkpoint, kv_type);
        let ids = &golden("llama_k").ids;
        let want = bits(&chain.logits(&Pool::new(1), ids, &[23, 1]));
        for threads in 2..=4 {
            assert!(want == bits(&chain.logits(&Pool::new(threads), ids, &[23, 1])), "{threads} threads");
        }
    }
}

/// A model, a prompt that crosses a page and a window, and its logits bits in one step.
struct Reference {
    chain: Chain,
    pool: Pool,
    ids: Vec<u32>,
    want: Vec<u32>,
}

fn references() -> &'static [Reference] {
    static REFERENCES: OnceLock<Vec<Reference>> = OnceLock::new();
    REFERENCES.get_or_init(|| {
        let models: [(_, _, &[usize]); 3] = [
            ("llama", GgufType::Q8_0, &[3, 1]),
            ("mistral", GgufType::F16, &[1, 3]),
            ("qwen3", GgufType::Q4_1, &[4]),
        ];
        models
            .map(|(name, format, cut)| {
                let opened = open_gguf(&toy::spec(name), format);
                let chain = Chain::new(&opened.checkpoint, cut, KvType::F16);
                let pool = Pool::new(2);
                let ids = golden(name).ids;
                let ids = [&ids[..], &ids[..]].concat();
                let want = bits(&chain.logits(&pool, &ids, &[ids.len()]));
                Reference { chain, pool, ids, want }
            })
            .into()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_chunking_gives_equal_bits(
        which in 0usize..3,
        steps in prop::collection::vec(prop_oneof![1usize..4, 1usize..90], 1..12),
    ) {
        let Reference { chain, pool, ids, want } = &references()[which];
        prop_assert!(*want == bits(&chain.logits(pool, ids, &steps)));
    }

    /// Several sessions at different positions in one batch, each step of another size and with the logits of other rows.
    #[test]
    fn any_batch_gives_equal_bits(
        which in 0usize..3,
        rounds in prop::collection::vec(prop::collection::vec((0usize..20, 0usize..20), 3), 1..8),
    ) {
        let Reference { chain, pool, ids, want } = &references()[which];
        let mut sessions = [chain.open(), chain.open(), chain.open()];
        let mut scratch = Scratch::default();
        for sizes in rounds {
            let mut expected = Vec::new();
            let mut batch = Vec::new();
            for (session, (size, logits)) in sessions.iter_mut().zip(sizes) {
                let start = session.len();
                let end = (start + size).min(ids.len());
                if start < end {
                    let logits = logits.min(end - start);
                    expected
                        .extend_from_slice(&want[(end - logits) * toy::VOCAB_SIZE..end * toy::VOCAB_SIZE]);
                    batch.push((session, &ids[start..end], logits));
                }
            }
            let logits = chain.try_batch(pool, &mut batch, &mut scratch).unwrap();
            prop_assert!(expected == bits(&logits));
        }
    }

    /// Positions that were rejected and forgotten leave no trace.
    #[test]
    fn any_truncation_gives_equal_bits(
        which in 0usize..3,
        wrong in prop::collection::vec(0u32..toy::VOCAB_SIZE as u32, 1..90),
        to in 0usize..80,
    ) {
        let Reference { chain, pool, ids, want } = &references()[which];
        let mut session = chain.open();
        if to > 0 {
            chain.step(pool, &mut session, &ids[..to]);
        }
        chain.step(pool, &mut session, &wrong);
        session.truncate(to);
        let logits = chain.step(pool, &mut session, &ids[to..]);
        prop_assert!(want[to * toy::VOCAB_SIZE..] == bits(&logits));
    }
}
