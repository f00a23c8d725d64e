//! Speed of attention of one token: `cargo run --release -p swarm-kernels --example attention_speed [positions]`; eight queries of 64
//! dimensions on each of 64 kv heads, whose pages lie in memory, not in a cache. Medians of 9.

use std::time::Instant;

use swarm_kernels::{AttentionScratch, KernelPath, KvPage, TILE, attention};

const DIM: usize = 64;
const HEADS: usize = 64;

fn main() {
    let positions = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(4096usize);
    let tiles = positions.div_ceil(TILE);
    let page: Vec<u16> =
        (0..2 * HEADS * tiles * TILE * DIM).map(|i| 0x3000 + (i * 7919 % 1024) as u16).collect();
    let q: Vec<f32> = (0..8 * DIM).map(|i| (i as f32 * 0.37).sin()).collect();
    let (mut out, mut scratch) = (vec![0.0; q.len()], AttentionScratch::default());
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            let start = Instant::now();
            for head in 0..HEADS {
                let tile = |t: usize| {
                    let at = |kv: usize| &page[(((2 * head + kv) * tiles) + t) * TILE * DIM..][..TILE * DIM];
                    (KvPage::F16(at(0)), KvPage::F16(at(1)))
                };
                attention(&q, DIM, 0.125, 0..positions, &tile, &mut scratch, &mut out);
            }
            start.elapsed().as_secs_f64() / HEADS as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let ns = times[4] * 1e9 / positions as f64;
    println!(
        "{}, {positions} positions: {:.1} us a head of the KV cache, {ns:.1} ns a position",
        KernelPath::current().name(),
        times[4] * 1e6
    );
}
