//! Speed of the matmul per format: decode (one token) in GB/s of weights, prefill (128 tokens) in GOP/s.
//!
//! `cargo run --release -p swarm-kernels --example matmul_speed [threads] [megabytes] [formats] [columns]`; medians of 9, beside the memory's
//! own read bandwidth in the same run. With several times the last cache (480 MB, the default) memory is the limit, with 0.5 MB arithmetic is.

use std::time::Instant;

use swarm_kernels::{DType, Job, KernelPath, MatmulScratch, Matrix, Pool, ReadProbe, matmul};

fn median(mut run: impl FnMut() -> f64) -> f64 {
    let mut times: Vec<f64> = (0..9).map(|_| run()).collect();
    times.sort_by(f64::total_cmp);
    times[4]
}

fn main() {
    let argument = |i: usize| std::env::args().nth(i).and_then(|text| text.parse::<f64>().ok());
    let threads = argument(1).unwrap_or(1.0) as usize;
    let cols = argument(4).unwrap_or(2048.0) as usize;
    let weights = (argument(2).unwrap_or(480.0) * 1e6) as usize;
    let pool = Pool::new(threads);
    let probe = ReadProbe::new(32 << 20);
    let limit = median(|| {
        let start = Instant::now();
        std::hint::black_box(probe.read(&pool));
        (256 << 20) as f64 / start.elapsed().as_secs_f64() / 1e9
    });
    println!("{}, {threads} threads, memory reads at {limit:.1} GB/s", KernelPath::current().name());
    println!("format    decode GB/s  of memory   prefill GOP/s");
    let formats = std::env::args().nth(3);
    for dtype in DType::ALL {
        if formats.as_ref().is_some_and(|list| !list.split(',').any(|name| name == dtype.name())) {
            continue;
        }
        let row_bytes = dtype.row_bytes(cols).unwrap_or(0);
        let rows = (weights / row_bytes).next_multiple_of(64);
        let bytes: Vec<u8> =
            (0..rows * row_bytes).map(|i| ((i * 2_654_435_761) >> 13) as u8 & 0x3b).collect();
        let Ok(matrix) = Matrix::new(dtype, rows, cols, &bytes) else { continue };
        drop(bytes);
        let mut scratch = MatmulScratch::default();
        let mut time = |tokens: usize| {
            let x: Vec<f32> = (0..tokens * cols).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut out = vec![0.0; tokens * rows];
            let mut again = || {
                matmul(&pool, &mut scratch, &x, tokens, &mut [Job { matrix: &matrix, out: &mut out }]);
            };
            let times = ((1 << 30) / (rows * cols * tokens)).max(1);
            median(|| {
                let start = Instant::now();
                (0..times).for_each(|_| again());
                start.elapsed().as_secs_f64() / times as f64
            })
        };
        let decode = matrix.bytes() as f64 / time(1) / 1e9;
        let prefill = (2 * 128 * rows * cols) as f64 / time(128) / 1e9;
        println!("{:8} {decode:10.1} {:10.0} % {prefill:14.0}", dtype.name(), 100.0 * decode / limit);
    }
}
