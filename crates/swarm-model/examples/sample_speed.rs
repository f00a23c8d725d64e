//! What picking a token costs: `cargo run --release -p swarm-model --example sample_speed`; medians of 101, in us.
//!
//! The logits are of the kind that models give: most within some 20 below the largest, a few near it.

use std::time::Instant;

use swarm_model::{SampleScratch, Sampling, sample};

fn main() {
    let ways = [
        ("greedy", Sampling::default()),
        ("temperature 0.7", Sampling { temperature: 0.7, ..Sampling::default() }),
        ("temperature 1", Sampling { temperature: 1.0, ..Sampling::default() }),
        ("1, top-k 40", Sampling { temperature: 1.0, top_k: 40, ..Sampling::default() }),
        ("1, top-p 0.95", Sampling { temperature: 1.0, top_p: 0.95, ..Sampling::default() }),
        (
            "0.8, top-p 0.9, penalty",
            Sampling { temperature: 0.8, top_p: 0.9, repetition_penalty: 1.1, ..Sampling::default() },
        ),
    ];
    println!("{:24} {:>8} {:>8}", "vocabulary", 49_152, 151_936);
    for (name, sampling) in ways {
        let times = [49_152, 151_936].map(|vocab| median(vocab, &sampling));
        println!("{name:24} {:8.1} {:8.1}", times[0], times[1]);
    }
}

fn median(vocab: u64, sampling: &Sampling) -> f64 {
    // Sums of four uniform numbers, from Knuth's MMIX generator.
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let logits: Vec<f32> = (0..vocab).map(|_| 10.0 * (next() + next() + next() + next()) - 20.0).collect();
    let history: Vec<u32> = (0..500).collect();
    let mut scratch = SampleScratch::default();
    let mut times: Vec<f64> = (0..101)
        .map(|position| {
            let start = Instant::now();
            let token = sample(&logits, sampling, &history, position, &mut scratch);
            let seconds = start.elapsed().as_secs_f64();
            assert!(token.is_ok());
            1e6 * seconds
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[50]
}
