//! How likely a text is, whole and in windows, and by weights as stored and as f32.

mod common;

use common::{open_gguf, open_hf};
use swarm_kernels::Pool;
use swarm_model::{KvPool, KvType, LoadOptions, Score, Stage, log_probability, score};
use swarm_testkit::golden;
use swarm_testkit::toy::{self, GgufType, Storage};
use swarm_weights::Checkpoint;

fn scored(checkpoint: &Checkpoint, context: usize, dequantized: bool, threads: usize, ids: &[u32]) -> Score {
    let options = LoadOptions { context: Some(context), dequantized, threads, ..Default::default() };
    let layers = 0..checkpoint.config().num_hidden_layers;
    let stage = Stage::load(checkpoint, layers, &options, &mut |_| {}).unwrap();
    let kv = KvPool::new(stage.kv_layout(KvType::F16), 1 << 28);
    let mut done = 0;
    let score = score(&stage, &Pool::new(threads), &kv, ids, &mut |tokens| {
        assert!(tokens > done);
        done = tokens;
    });
    let score = score.unwrap();
    assert_eq!(done, score.tokens);
    score
}

/// The golden logits are those of another implementation, in f32; the text is the golden's own.
#[test]
fn the_score_is_that_of_the_golden_logits() {
    for name in ["llama", "qwen3"] {
        let golden = golden(name);
        let opened = open_hf(&toy::spec(name), Storage::F32);
        let got = scored(&opened.checkpoint, golden.ids.len(), false, 1, &golden.ids);
        assert_eq!(got.tokens, golden.ids.len() - 1);
        let chain = common::Chain::single(&opened.checkpoint, KvType::F16);
        let logits = chain.logits(&Pool::new(1), &golden.ids, &[7]);
        let mut buffer = Vec::new();
        let rows = logits.chunks_exact(toy::VOCAB_SIZE).zip(&golden.ids[1..]);
        let want: f64 = rows.map(|(row, &next)| log_probability(row, next, &mut buffer)).sum();
        assert_eq!(got.log_probability.to_bits(), want.to_bits(), "{name}");
    }
}

/// Windows score every token but the first once; threads and chunks do not show.
#[test]
fn windows_cover_the_text() {
    let opened = open_hf(&toy::spec("llama"), Storage::F32);
    let ids: Vec<u32> = (0..150).map(|i| (i * 37 + i * i) % 256).collect();
    for context in [2, 3, 50, 75, 76] {
        let whole = scored(&opened.checkpoint, context, false, 1, &ids);
        assert_eq!(whole.tokens, 149, "{context}");
        assert_eq!(whole, scored(&opened.checkpoint, context, false, 3, &ids));
        let windows = (0..).map(|window| window * (context - 1)).take_while(|&start| start + 1 < ids.len());
        let parts = windows.map(|start| {
            let window = &ids[start..ids.len().min(start + context)];
            scored(&opened.checkpoint, context, false, 1, window)
        });
        let sum: f64 = parts.map(|part| part.log_probability).sum();
        assert!((sum - whole.log_probability).abs() < 1e-9, "{context}");
    }
    assert_eq!(scored(&opened.checkpoint, 50, false, 1, &ids[..1]), Score::default());
}

/// Activations in int8 cost less than half a percent of perplexity, in every format.
#[test]
fn quantized_arithmetic_is_close_to_f32() {
    let formats = [GgufType::F16, GgufType::Q4_0, GgufType::Q8_0];
    let ids: Vec<u32> = (0..400u32).map(|i| (i * 37 + i * i) % 256).collect();
    for format in formats {
        let opened = open_gguf(&toy::spec("llama"), format);
        let [stored, floats] =
            [false, true].map(|f32| scored(&opened.checkpoint, 96, f32, 2, &ids).perplexity().unwrap());
        assert!((stored / floats - 1.0).abs() < 0.005, "{format:?}: {stored} {floats}");
        assert!(stored > 1.0 && (format == GgufType::F16) == (stored == floats), "{format:?}");
    }
}
