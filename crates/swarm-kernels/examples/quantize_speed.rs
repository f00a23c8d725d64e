//! How fast float weights become blocks, one thread: what `--quant` adds to loading. Values per second and bytes read.

use std::time::Instant;

use swarm_kernels::{DType, quantize};

fn main() {
    let values = 4 << 20;
    for from in [DType::F32, DType::F16, DType::BF16] {
        // Ordinary numbers: 0.5 to 1 in magnitude, with both signs.
        let stored: Vec<u8> = (0..values * from.block_bytes())
            .map(|at| {
                let noise = (at.wrapping_mul(2_654_435_761) >> 11) as u8;
                match (at + 1) % from.block_bytes() {
                    0 if from == DType::F16 => (noise & 0x83) | 0x38,
                    0 => (noise & 0x80) | 0x3f,
                    _ => noise,
                }
            })
            .collect();
        for to in [DType::Q8_0, DType::Q4_0, DType::Q5_0, DType::Q4_K] {
            let mut out = vec![0; to.row_bytes(values).unwrap_or(0)];
            let mut best = f64::MAX;
            for _ in 0..5 {
                let started = Instant::now();
                if let Err(error) = quantize(from, &stored, to, &mut out) {
                    return eprintln!("{error}");
                }
                best = best.min(started.elapsed().as_secs_f64());
            }
            println!(
                "{:>4} -> {}: {:6.0} M values/s, {:5.2} GB/s read",
                from.name(),
                to.name(),
                values as f64 / best / 1e6,
                stored.len() as f64 / best / 1e9,
            );
        }
    }
}
