//! Speed of laying out weights per format, in GB/s of stored bytes: what loading costs beyond reading the file.
//!
//! `cargo run --release -p swarm-kernels --example pack_speed`; medians of 9 passes over a buffer that stays in the cache.

use std::time::Instant;

use swarm_kernels::{Arena, DType, MatrixBuilder};

const COLS: usize = 2048;

fn main() {
    println!("format     GB/s");
    for dtype in DType::ALL {
        let row_bytes = dtype.row_bytes(COLS).unwrap_or(0);
        let rows = ((512 << 10) / row_bytes).next_multiple_of(MatrixBuilder::ROWS);
        let bytes: Vec<u8> = (0..rows * row_bytes).map(|i| ((i * 2_654_435_761) >> 13) as u8).collect();
        let mut times = Vec::new();
        for _ in 0..9 {
            let start = Instant::now();
            for _ in 0..16 {
                let Ok(mut builder) = MatrixBuilder::new(&mut Arena::default(), dtype, rows, COLS) else {
                    return;
                };
                for part in builder.parts(rows) {
                    if part.pack(&bytes).is_err() {
                        return;
                    }
                }
                std::hint::black_box(builder.finish().is_ok());
            }
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        println!("{:8} {:6.2}", dtype.name(), (16 * bytes.len()) as f64 / times[4] / 1e9);
    }
}
