//! What more rows in one batch cost: the time of a matmul over 1, 2, 4, 8 and 16 tokens, as multiples of that over one.
//!
//! `cargo run --release -p swarm-kernels --example batch_cost [threads] [megabytes] [formats]`; medians of 9. Verification of
//! drafts and decode of several sessions are such batches: 1.0 for 8 rows would be seven tokens for nothing.

use std::time::Instant;

use swarm_kernels::{DType, Job, MatmulScratch, Matrix, Pool, matmul};

const COLS: usize = 2048;
const BATCHES: [usize; 5] = [1, 2, 4, 8, 16];

fn main() {
    let argument = |i: usize| std::env::args().nth(i).and_then(|text| text.parse::<f64>().ok());
    let pool = Pool::new(argument(1).unwrap_or(1.0) as usize);
    let weights = (argument(2).unwrap_or(64.0) * 1e6) as usize;
    println!("{} threads, {:.0} MB of weights", pool.threads(), weights as f64 / 1e6);
    println!("format     1 row, ms {}", BATCHES.map(|tokens| format!("{tokens:>6}")).concat());
    let formats = std::env::args().nth(3);
    for dtype in DType::ALL {
        if formats.as_ref().is_some_and(|list| !list.split(',').any(|name| name == dtype.name())) {
            continue;
        }
        let row_bytes = dtype.row_bytes(COLS).unwrap_or(0);
        let rows = (weights / row_bytes).next_multiple_of(64);
        let bytes: Vec<u8> =
            (0..rows * row_bytes).map(|i| ((i * 2_654_435_761) >> 13) as u8 & 0x3b).collect();
        let Ok(matrix) = Matrix::new(dtype, rows, COLS, &bytes) else { continue };
        drop(bytes);
        let mut scratch = MatmulScratch::default();
        let mut time = |tokens: usize| {
            let x: Vec<f32> = (0..tokens * COLS).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut out = vec![0.0; tokens * rows];
            let mut times: Vec<f64> = (0..9)
                .map(|_| {
                    let start = Instant::now();
                    matmul(&pool, &mut scratch, &x, tokens, &mut [Job { matrix: &matrix, out: &mut out }]);
                    start.elapsed().as_secs_f64()
                })
                .collect();
            times.sort_by(f64::total_cmp);
            times[4]
        };
        let times = BATCHES.map(&mut time);
        let relative = times.map(|seconds| format!("{:6.2}", seconds / times[0])).concat();
        println!("{:8} {:11.2} {relative}", dtype.name(), times[0] * 1e3);
    }
}
