//! Every kernel by itself: `cargo bench -p swarm-kernels [-- FILTER]`.
//!
//! `gemv` is one token and counts bytes of weights; `gemm` is 64 tokens and counts operations (two per weight and
//! token). Weights are 4096 x 2048, beyond the second-level cache; one thread.

use std::hint::black_box;
use std::time::Duration;

use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use swarm_kernels::{
    Arena, AttentionScratch, DType, Job, KvPage, MatmulScratch, Matrix, MatrixBuilder, Pool, TILE, attention,
    exp_in_place, f32_to_f16, matmul, rms_norm, rope, silu_mul,
};

const ROWS: usize = 4096;
const COLS: usize = 2048;
const TOKENS: usize = 64;

/// Bytes that are ordinary numbers in every format.
fn stored(dtype: DType, rows: usize) -> Vec<u8> {
    let bytes = rows * dtype.row_bytes(COLS).unwrap_or(0);
    (0..bytes).map(|i| ((i * 2_654_435_761) >> 13) as u8 & 0x3b).collect()
}

fn wave(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(20).warm_up_time(Duration::from_millis(200));
    group.measurement_time(Duration::from_millis(800));
    group
}

fn products(
    criterion: &mut Criterion,
    name: &str,
    rows: usize,
    tokens: usize,
    throughput: fn(&Matrix) -> Throughput,
) {
    let (pool, mut scratch, x) = (Pool::new(1), MatmulScratch::default(), wave(tokens * COLS));
    let mut out = vec![0.0; tokens * rows];
    let mut group = group(criterion, name);
    for dtype in DType::ALL {
        let matrix = Matrix::new(dtype, rows, COLS, &stored(dtype, rows)).expect("whole rows");
        group.throughput(throughput(&matrix));
        group.bench_function(dtype.name(), |bencher| {
            bencher.iter(|| {
                matmul(
                    &pool,
                    &mut scratch,
                    black_box(&x),
                    tokens,
                    &mut [Job { matrix: &matrix, out: &mut out }],
                );
            });
        });
    }
}

fn gemv(criterion: &mut Criterion) {
    products(criterion, "gemv", ROWS, 1, |matrix| Throughput::Bytes(matrix.bytes() as u64));
}

fn gemm(criterion: &mut Criterion) {
    let operations =
        |matrix: &Matrix| Throughput::Elements((2 * matrix.rows() * matrix.cols() * TOKENS) as u64);
    products(criterion, "gemm", ROWS / 8, TOKENS, operations);
}

/// Laying out stored weights, per stored byte: what loading does beyond reading.
fn pack(criterion: &mut Criterion) {
    let rows = 256;
    let mut group = group(criterion, "pack");
    for dtype in DType::ALL {
        let bytes = stored(dtype, rows);
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(dtype.name(), |bencher| {
            bencher.iter(|| {
                let mut builder =
                    MatrixBuilder::new(&mut Arena::default(), dtype, rows, COLS).expect("whole rows");
                builder
                    .parts(rows)
                    .into_iter()
                    .try_for_each(|part| part.pack(&bytes))
                    .expect("as many bytes");
                builder.finish().expect("all filled")
            });
        });
    }
}

/// Cutting activations into int8 blocks: a product with one row of weights is little else.
fn quantize(criterion: &mut Criterion) {
    let (pool, mut scratch, x) = (Pool::new(1), MatmulScratch::default(), wave(TOKENS * COLS));
    let matrix = Matrix::new(DType::Q8_0, 1, COLS, &stored(DType::Q8_0, 1)).expect("whole rows");
    let mut out = vec![0.0; TOKENS];
    let mut group = group(criterion, "quantize");
    group.throughput(Throughput::Bytes(4 * x.len() as u64));
    group.bench_function("f32 to int8, and one row", |bencher| {
        bencher.iter(|| {
            matmul(&pool, &mut scratch, black_box(&x), TOKENS, &mut [Job { matrix: &matrix, out: &mut out }]);
        });
    });
}

/// Eight query heads on one kv head of 64, f16 pages; counts bytes of keys and values.
fn attend(criterion: &mut Criterion) {
    let (heads, head_dim) = (8, 64);
    let (q, mut out) = (wave(heads * head_dim), vec![0.0; heads * head_dim]);
    let mut page = vec![0u16; TILE * head_dim];
    f32_to_f16(&wave(TILE * head_dim), &mut page);
    let mut group = group(criterion, "attention");
    for positions in [128, 1024, 4096] {
        let tiles: Vec<Vec<u16>> = vec![page.clone(); positions / TILE];
        let mut scratch = AttentionScratch::default();
        group.throughput(Throughput::Bytes((2 * 2 * positions * head_dim) as u64));
        group.bench_function(format!("{positions} positions"), |bencher| {
            let tile = |tile: usize| (KvPage::F16(&tiles[tile]), KvPage::F16(&tiles[tile]));
            bencher.iter(|| {
                attention(black_box(&q), head_dim, 0.125, 0..positions, &tile, &mut scratch, &mut out);
            });
        });
    }
}

fn element_wise(criterion: &mut Criterion) {
    let (width, rows) = (COLS, TOKENS);
    let (x, weight) = (wave(rows * width), wave(width));
    let mut out = x.clone();
    let mut group = group(criterion, "ops");
    group.throughput(Throughput::Elements((rows * width) as u64));
    group.bench_function("rms_norm", |bencher| {
        bencher.iter(|| rms_norm(black_box(&x), &weight, 1e-5, &mut out))
    });
    group.bench_function("silu_mul", |bencher| {
        bencher.iter(|| {
            out.copy_from_slice(&x);
            silu_mul(black_box(&mut out), &x);
        });
    });
    group.bench_function("exp", |bencher| {
        bencher.iter(|| {
            out.copy_from_slice(&x);
            exp_in_place(black_box(&mut out));
        });
    });
    group.bench_function("rope", |bencher| {
        bencher.iter(|| rope(black_box(&mut out), 64, &weight[..32], &weight[32..64]));
    });
}

criterion_group!(kernels, gemv, gemm, pack, quantize, attend, element_wise);
criterion_main!(kernels);
