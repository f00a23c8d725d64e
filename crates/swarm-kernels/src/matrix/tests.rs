//! Fast equals scalar, to the bit, for every format; batches and threads never show.

use proptest::prelude::*;

use super::*;

/// Deterministic bytes for tests (splitmix64).
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..len.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(len).collect()
}

/// Random rows whose scales are ordinary numbers (random f16 bits are infinite too often to test much).
pub(crate) fn weights(dtype: DType, seed: u64, rows: usize, cols: usize) -> Vec<u8> {
    let mut bytes = noise(seed, rows * dtype.row_bytes(cols).unwrap());
    let sane = |at: &mut [u8]| at[1] = (at[1] & 0x83) | 0x20;
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        match dtype {
            DType::F32 => block[3] = (block[3] & 0x80) | 0x3e,
            DType::F16 => sane(block),
            DType::BF16 => block[1] = (block[1] & 0x80) | 0x3e,
            DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => sane(&mut block[0..2]),
            DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => {
                sane(&mut block[0..2]);
                sane(&mut block[2..4]);
            }
            DType::Q2_K => {
                sane(&mut block[80..82]);
                sane(&mut block[82..84]);
            }
            DType::Q3_K => sane(&mut block[108..110]),
            DType::Q6_K => sane(&mut block[208..210]),
        }
    }
    bytes
}

pub(crate) fn activations(seed: u64, len: usize, extreme: bool) -> Vec<f32> {
    let bytes = noise(seed ^ 0x5eed, 4 * len);
    let ordinary = |b: &[u8; 4]| f32::from(i16::from_le_bytes([b[0], b[1]])) / 4096.0;
    let any = |b: &[u8; 4]| f32::from_le_bytes(*b);
    bytes.as_chunks::<4>().0.iter().map(|b| if extreme { any(b) } else { ordinary(b) }).collect()
}

fn product(
    path: KernelPath,
    threads: usize,
    dtype: DType,
    shape: (usize, usize, usize),
    w: &[u8],
    x: &[f32],
) -> Vec<u32> {
    let (rows, cols, tokens) = shape;
    let matrix = Matrix::with_path(path, dtype, rows, cols, w).unwrap();
    let mut out = vec![0.0; tokens * rows];
    let mut jobs = [Job { matrix: &matrix, out: &mut out }];
    matmul(&Pool::new(threads), &mut MatmulScratch::default(), x, tokens, &mut jobs);
    // NaN payloads are not part of the contract; that it is NaN is.
    out.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn fast_equals_scalar_for_every_format(
        seed: u64, rows in 1usize..30, blocks in 1usize..5, odd in prop_oneof![4 => 1usize..700, 1 => 2030usize..2070], tokens in prop_oneof![4 => 1usize..20, 1 => 60usize..70, 1 => 261usize..270], threads in 1usize..4,
        extreme in proptest::bool::weighted(0.2),
    ) {
        for dtype in DType::ALL {
            let cols = if dtype.is_quantized() { blocks * dtype.block_len() } else { odd };
            let (w, x) = (weights(dtype, seed, rows, cols), activations(seed, tokens * cols, extreme));
            let want = product(KernelPath::Scalar, 1, dtype, (rows, cols, tokens), &w, &x);
            for path in KernelPath::available() {
                let got = product(path, threads, dtype, (rows, cols, tokens), &w, &x);
                prop_assert_eq!(&got, &want, "{:?} {:?} [{}, {}] x {}", path, dtype, rows, cols, tokens);
                // Batch invariance: each token alone.
                for t in 0..tokens {
                    let alone = product(path, 1, dtype, (rows, cols, 1), &w, &x[t * cols..(t + 1) * cols]);
                    prop_assert_eq!(&alone[..], &want[t * rows..(t + 1) * rows], "{:?} {:?}", path, dtype);
                }
            }
        }
    }

    #[test]
    fn close_to_f64_on_dequantized_weights(seed: u64, rows in 1usize..9, blocks in 1usize..3) {
        for dtype in DType::ALL {
            let cols = blocks * 256;
            let (w, x) = (weights(dtype, seed, rows, cols), activations(seed, cols, false));
            let mut values = vec![0.0; rows * cols];
            dequantize(dtype, &w, &mut values).unwrap();
            let got = product(KernelPath::best(), 1, dtype, (rows, cols, 1), &w, &x);
            for r in 0..rows {
                let (mut want, mut bound) = (0.0f64, 0.0f64);
                for (k, (w, x)) in values[r * cols..(r + 1) * cols].iter().zip(&x).enumerate() {
                    want += f64::from(*w) * f64::from(*x);
                    // int8 activations are off by at most half a step of their block, floats not at all.
                    let amax = x_max(&activations(seed, cols, false), k);
                    let step = if dtype.is_quantized() { amax / 127.0 * 0.5001 } else { 0.0 };
                    bound += f64::from(w.abs()) * (step + 1e-5 * f64::from(x.abs()));
                }
                // K formats subtract large mins: allow rounding relative to the parts as well.
                let slack = 1e-4 * (1.0 + values.iter().map(|v| f64::from(v.abs())).fold(0.0, f64::max) * 8.0 * 32.0);
                let got = f64::from(f32::from_bits(got[r]));
                prop_assert!((got - want).abs() <= bound + slack, "{dtype:?}: {got} for {want} +- {bound}");
            }
        }
    }
}

fn x_max(x: &[f32], k: usize) -> f64 {
    f64::from(x[k / 32 * 32..][..32].iter().fold(0.0f32, |m, v| m.max(v.abs())))
}

#[test]
fn rows_come_back_from_every_layout() {
    for dtype in DType::ALL {
        let (rows, cols) = (11, 512);
        let w = weights(dtype, 7, rows, cols);
        let mut want = vec![0.0; rows * cols];
        dequantize(dtype, &w, &mut want).unwrap();
        for path in KernelPath::available() {
            let matrix = Matrix::with_path(path, dtype, rows, cols, &w).unwrap();
            let mut row = vec![0.0; cols];
            for r in 0..rows {
                matrix.dequantize_row(r, &mut row).unwrap();
                assert_eq!(row, want[r * cols..(r + 1) * cols], "{dtype:?}");
            }
            assert!(matrix.dequantize_row(rows, &mut row).is_err());
            assert!(matrix.dequantize_row(0, &mut row[1..]).is_err());
        }
    }
}

#[test]
fn wrong_sizes_are_refused() {
    assert!(matches!(Matrix::new(DType::Q4_0, 2, 33, &[0; 36]), Err(ShapeError::Columns { .. })));
    assert!(matches!(Matrix::new(DType::Q4_0, 2, 32, &[0; 35]), Err(ShapeError::Bytes { want: 36, .. })));
    assert!(matches!(Matrix::new(DType::F32, usize::MAX, 1 << 40, &[]), Err(ShapeError::TooLarge { .. })));
}

#[test]
fn the_bytes_a_matrix_takes_are_known_before() {
    for dtype in DType::ALL {
        for (rows, blocks) in [(1, 1), (8, 3), (21, 2)] {
            let cols = blocks * dtype.block_len().max(7);
            let bytes = noise(1, rows * dtype.row_bytes(cols).unwrap());
            let matrix = Matrix::new(dtype, rows, cols, &bytes).unwrap();
            assert_eq!(
                Matrix::bytes_needed(dtype, rows, cols),
                Some(matrix.bytes()),
                "{dtype:?} [{rows}, {cols}]"
            );
        }
    }
    assert_eq!(Matrix::bytes_needed(DType::Q8_0, 1, 33), None);
    assert_eq!(Matrix::bytes_needed(DType::F32, usize::MAX, 64), None);
}
