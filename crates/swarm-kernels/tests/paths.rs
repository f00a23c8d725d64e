//! Every operation on every path of this CPU, forced: one process each, one digest.

use swarm_kernels::{
    AttentionScratch, DType, Job, KernelPath, KvPage, MatmulScratch, Matrix, Pool, TILE, attention,
    exp_in_place, matmul, rms_norm, rope, silu_mul,
};

/// Deterministic numbers in -4..4 (an LCG is enough here).
fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 21) as f32 - 4.0
    };
    (0..len).map(|_| next()).collect()
}

/// FNV-1a over the bits of everything the operations gave.
fn digest() -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |values: &[f32]| {
        for byte in values.iter().flat_map(|v| v.to_bits().to_le_bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    };
    for width in [1, 7, 16, 33, 96, 257] {
        let (x, y) = (numbers(width as u64, 3 * width), numbers(99 + width as u64, 3 * width));
        let mut out = vec![0.0; 3 * width];
        rms_norm(&x, &y[..width], 1e-5, &mut out);
        add(&out);
        let mut gate = x.clone();
        silu_mul(&mut gate, &y);
        add(&gate);
        let mut powers = x.clone();
        exp_in_place(&mut powers);
        add(&powers);
        let half = width / 2;
        let mut heads = x;
        rope(&mut heads, width, &y[..half], &y[width..width + half]);
        add(&heads);
    }
    for (head_dim, count) in [(16, 5), (64, 200), (40, 130)] {
        let len = 4 * TILE * head_dim;
        let (q, k, v) = (numbers(1, 2 * head_dim), numbers(2, len), numbers(3, len));
        let mut halves = vec![0u16; len];
        swarm_kernels::f32_to_f16(&v, &mut halves);
        let page = |t: usize| {
            let at = t * TILE * head_dim..(t + 1) * TILE * head_dim;
            (KvPage::F32(&k[at.clone()]), KvPage::F16(&halves[at]))
        };
        let mut out = vec![0.0; 2 * head_dim];
        attention(&q, head_dim, 0.3, 3..3 + count, &page, &mut AttentionScratch::default(), &mut out);
        add(&out);
    }
    let pool = Pool::new(2);
    for dtype in DType::ALL {
        let cols = dtype.block_len().max(48) * 2;
        let bytes: Vec<u8> = numbers(7, 10 * dtype.row_bytes(cols).unwrap())
            .iter()
            .map(|v| (v * 4.0) as i8 as u8 & 0x3b)
            .collect();
        let cols = if dtype.is_quantized() { dtype.block_len() * 2 } else { cols };
        let bytes = &bytes[..10 * dtype.row_bytes(cols).unwrap()];
        let matrix = Matrix::new(dtype, 10, cols, bytes).unwrap();
        let (x, mut out) = (numbers(8, 5 * cols), vec![0.0; 50]);
        matmul(&pool, &mut MatmulScratch::default(), &x, 5, &mut [Job { matrix: &matrix, out: &mut out }]);
        assert!(out.iter().any(|v| *v != 0.0), "{dtype:?}");
        add(&out);
    }
    hash
}

/// Tells a copy of this test that it is to print its digest.
const CHILD: &str = "SWARM_OS_TEST_DIGEST";

#[test]
fn every_path_gives_the_same_bits() {
    let here = digest();
    if std::env::var_os(CHILD).is_some() {
        println!("digest of {} {here:016x}", KernelPath::current().name());
        return;
    }
    for path in KernelPath::available() {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "every_path_gives_the_same_bits", "--nocapture"])
            .env("SWARM_OS_KERNELS", path.name())
            .env(CHILD, "1")
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&child.stdout);
        let want = format!("digest of {} {here:016x}", path.name());
        assert!(child.status.success() && output.contains(&want), "{want}: {output}");
    }
}
