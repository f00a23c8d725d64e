//! The tiles on the portable model equal the scalar twins, to the bit; on AArch64 every step equals its model.

use proptest::prelude::*;

use super::model::Model;
use super::panel::{Pairs, Quads};
use super::tile::{Q2K, Q3K, Q4K, Q5K, Q6K, Q40, Q41, Q50, Q51, Q80};
use super::*;
use crate::KernelPath;
use crate::activation::{FloatRows, QuantRows};
use crate::block::dequantize;
use crate::buffer::Buffer;
use crate::dtype::DType;
use crate::interleave::{Interleaved, interleave};
use crate::matrix::tests::{activations, weights};
use crate::pack::{Packed, pack_groups};
use crate::quant;

type Kernel = fn(Work<'_>);

/// Each quantized format with its kernel in both orders.
fn kernels() -> Vec<(DType, [Kernel; 2])> {
    fn of<F: Kind>() -> [Kernel; 2] {
        [multiply::<Model, Quads, F>, multiply::<Model, Pairs, F>]
    }
    vec![
        (DType::Q4_0, of::<Q40>()),
        (DType::Q4_1, of::<Q41>()),
        (DType::Q5_0, of::<Q50>()),
        (DType::Q5_1, of::<Q51>()),
        (DType::Q8_0, of::<Q80>()),
        (DType::Q2_K, of::<Q2K>()),
        (DType::Q3_K, of::<Q3K>()),
        (DType::Q4_K, of::<Q4K>()),
        (DType::Q5_K, of::<Q5K>()),
        (DType::Q6_K, of::<Q6K>()),
    ]
}

/// NaN payloads are not part of the contract; that it is NaN is.
fn bits(v: f32) -> u32 {
    if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }
}

/// One packed group of `w` times `x`, `[tokens, cols]`, on both kernels of `dtype`; compared with the scalar twin.
fn check(dtype: DType, kernels: [Kernel; 2], rows: usize, cols: usize, w: &[u8], x: &[f32]) {
    let mut quantized = QuantRows::default();
    quantized.fill(KernelPath::Scalar, x, cols);
    let tokens: Vec<_> = (0..x.len() / cols).map(|t| quantized.row(t)).collect();
    let mut packed = Packed::zeroed(dtype, LANES, rows, cols, Buffer::zeroed).unwrap();
    pack_groups(dtype, packed.shape, w.len() / rows, w, packed.groups_mut());
    let stored = w.chunks_exact(w.len() / rows);
    let want: Vec<Vec<u32>> = tokens
        .iter()
        .map(|x| stored.clone().map(|row| bits(quant::dot_row(dtype, row, *x))).collect())
        .collect();
    for (order, kernel) in kernels.into_iter().enumerate() {
        let (mut out, mut panel) = (vec![[9.0; LANES]; tokens.len()], QuantPanel::new());
        kernel(Work {
            group: packed.group(0),
            shape: packed.shape,
            x: &tokens,
            out: &mut out,
            panel: &mut panel,
        });
        let got: Vec<Vec<u32>> =
            out.iter().map(|row| row[..rows].iter().map(|v| bits(*v)).collect()).collect();
        assert_eq!(got, want, "{dtype:?} [{rows}, {cols}] x {} in order {order}", tokens.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn quantized_tiles_equal_the_scalar_twin(
        seed: u64, rows in 1usize..9, blocks in 1usize..20, tokens in 1usize..14, extreme in proptest::bool::weighted(0.2),
    ) {
        for (dtype, kernels) in kernels() {
            let cols = blocks.div_ceil(dtype.block_len() / 32) * dtype.block_len();
            let (w, x) = (weights(dtype, seed, rows, cols), activations(seed, tokens * cols, extreme));
            check(dtype, kernels, rows, cols, &w, &x);
        }
    }

    #[test]
    fn float_tiles_equal_the_scalar_twin(
        seed: u64, rows in 1usize..17, cols in prop_oneof![3 => 1usize..150, 1 => 500usize..1100], tokens in 1usize..8, extreme in proptest::bool::weighted(0.2),
    ) {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let padded = cols.next_multiple_of(16);
            let w = weights(dtype, seed, rows, padded);
            let x = activations(seed, tokens * cols, extreme);
            let mut lines = FloatRows::default();
            lines.fill(&crate::Pool::new(1), &x, cols, false);
            let row_bytes = padded * dtype.block_bytes();
            let mut floats = Interleaved::zeroed(dtype, rows, padded, Buffer::zeroed).unwrap();
            interleave(floats.shape, row_bytes, &w, floats.bytes_mut());
            for row in (0..rows).step_by(LANES) {
                let mut out = vec![[9.0; LANES]; tokens];
                float::floats::<Model>(dtype, floats.groups(0, rows), row, &lines, 0, &mut out);
                for (x, out) in x.chunks_exact(cols).zip(&out) {
                    for (w, got) in w.chunks_exact(row_bytes).skip(row).zip(out) {
                        let mut values = vec![0.0; padded];
                        dequantize(dtype, w, &mut values).unwrap();
                        let want = crate::float::dot_f32(&values[..cols], x);
                        prop_assert_eq!(bits(*got), bits(want), "{:?} [{}, {}] x {}", dtype, rows, cols, tokens);
                    }
                }
            }
        }
    }

    #[test]
    fn attention_loops_equal_the_scalar_ones(seed: u64, dim in 1usize..100, whole: bool, count in 0usize..65) {
        let dim = if whole { dim.next_multiple_of(16) } else { dim };
        let stored: Vec<u16> = activations(seed, count * dim, true).iter().map(|v| v.to_bits() as u16).collect();
        let mut rows = vec![0.0; stored.len()];
        attention::widen::<Model>(&stored, &mut rows);
        for (bits, got) in stored.iter().zip(&rows) {
            prop_assert_eq!(got.to_bits(), half::f16::from_bits(*bits).to_f32().to_bits());
        }
        let rows = activations(seed, count * dim, false);
        let (q, p) = (activations(seed ^ 1, dim, false), activations(seed ^ 2, count, false));
        let mut scores = vec![9.0; count];
        attention::score::<Model>(&q, &rows, 0.3, &mut scores);
        for (row, got) in rows.chunks_exact(dim).zip(&scores) {
            prop_assert_eq!(got.to_bits(), (crate::float::dot_f32(&q, row) * 0.3).to_bits());
        }
        let mut sums = vec![9.0; dim];
        attention::weigh::<Model>(&p, &rows, &mut sums);
        for (d, got) in sums.iter().enumerate() {
            let want = p.iter().zip(rows.chunks_exact(dim)).fold(0.0f32, |sum, (p, row)| p.mul_add(row[d], sum));
            prop_assert_eq!(got.to_bits(), want.to_bits());
        }
    }
}

/// The largest codes of both signs everywhere: sums that a narrower integer would not hold.
#[test]
fn extreme_codes_do_not_overflow() {
    for (dtype, kernels) in kernels() {
        for byte in [0x00, 0x7f, 0x80, 0xff] {
            let (cols, rows) = (512, 8);
            let mut w = weights(dtype, 5, rows, cols);
            let sane = w.clone();
            let (len, last) = (dtype.block_bytes(), dtype.block_bytes() - 4);
            for (block, sane) in w.chunks_exact_mut(len).zip(sane.chunks_exact(len)) {
                block.fill(byte);
                // The f16 scales stay ordinary numbers.
                match dtype {
                    DType::Q2_K => block[last..].copy_from_slice(&sane[last..]),
                    DType::Q3_K | DType::Q6_K => block[last + 2..].copy_from_slice(&sane[last + 2..]),
                    DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => block[..2].copy_from_slice(&sane[..2]),
                    _ => block[..4].copy_from_slice(&sane[..4]),
                }
            }
            for sign in [1.0, -1.0] {
                let x: Vec<f32> = (0..5 * cols).map(|i| if i / cols == 4 { sign } else { -sign }).collect();
                check(dtype, kernels, rows, cols, &w, &x);
                check(dtype, kernels, rows, cols, &w, &x[..cols]);
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod on_arm {
    use super::super::arm::{Dot, I8mm, Neon, Products, Widening};
    use super::super::vectors::{MatrixVectors, Vectors};
    use super::*;
    use crate::block::Format;
    use crate::matrix::tests::noise;

    fn ints<V: Vectors>(v: V::Ints) -> [i32; 4] {
        let mut out = [0; 4];
        V::store_ints(v, &mut out);
        out
    }

    fn bytes<V: Vectors>(v: V::Bytes) -> [u8; 16] {
        let mut out = [0; 16];
        V::store_bytes(v, &mut out);
        out
    }

    fn floats<V: Vectors>(v: V::Floats) -> [u32; 4] {
        let mut out = [0.0; 4];
        V::store(v, &mut out);
        out.map(bits)
    }

    /// What steps gave, by the kind of their vectors.
    #[derive(Debug, Default, PartialEq)]
    struct Given {
        bytes: Vec<[u8; 16]>,
        ints: Vec<[i32; 4]>,
        floats: Vec<[u32; 4]>,
    }

    /// The results of every step that all CPUs have, on `b` (64 bytes of noise) read in every way.
    fn steps<V: Vectors>(b: &[u8; 64]) -> Given {
        let raw: [[u8; 16]; 4] = bytemuck::cast(*b);
        let v = raw.map(|raw| V::bytes(&raw));
        let i = raw.map(|raw| V::ints(bytemuck::cast(raw)));
        let f = raw.map(|raw| V::words(V::bytes(&raw)));
        let mut all = Given::default();
        for n in 0..8 {
            all.bytes.extend([bytes::<V>(V::shift(v[0], n)), bytes::<V>(V::join(v[0], v[1], n))]);
        }
        all.bytes.push(bytes::<V>(V::mask(v[2], b[3])));
        all.bytes.extend(V::zip(v[0], v[1]).map(bytes::<V>));
        all.ints.extend([ints::<V>(V::times(i[0], i[1])), ints::<V>(V::plus_times(i[0], i[1], i[2]))]);
        for signed in [false, true] {
            all.ints.extend(V::pairs(v[3], signed).as_flattened().iter().map(|v| ints::<V>(*v)));
        }
        all.floats.extend(V::halves(v[0]).map(floats::<V>));
        all.floats.extend(V::upper_halves(v[1]).map(floats::<V>));
        let read = bytemuck::cast::<[u8; 16], [f32; 4]>(raw[1]);
        all.floats.extend([V::floats(&read), V::splat(read[0]), V::from_ints(i[3])].map(floats::<V>));
        all.floats.extend([V::add(f[0], f[1]), V::mul(f[0], f[1])].map(floats::<V>));
        all.floats.extend([V::fma(f[0], f[1], f[2]), V::fma_minus(f[0], f[1], f[2])].map(floats::<V>));
        all.floats.push([bits(V::tree(f)); 4]);
        all
    }

    /// Codes as `format` stores them, and activations that are never -128.
    fn dot<V: Vectors>(b: &[u8; 96], format: Format) -> [i32; 4] {
        let raw: [[u8; 16]; 6] = bytemuck::cast(*b);
        let code = |w: [u8; 16]| if format.bits == 8 { w } else { w.map(|w| w & ((1 << format.bits) - 1)) };
        let w = std::array::from_fn(|i| V::bytes(&code(raw[i])));
        let x = raw[4].map(|x| if x == 128 { 129 } else { x });
        ints::<V>(V::dot16(V::ints(bytemuck::cast(raw[5])), w, V::bytes(&x), format))
    }

    fn matrix<V: MatrixVectors>(b: &[u8; 96]) -> Vec<[i32; 4]> {
        let raw: [[u8; 8]; 12] = bytemuck::cast(*b);
        let i: [[i32; 4]; 6] = bytemuck::cast(*b);
        let (w, x) = (V::both(&raw[0], &raw[1]), V::both(&raw[2], &raw[3]));
        let mut all = vec![ints::<V>(V::matrix8(V::ints(i[4]), w, x))];
        all.extend(V::unzip(V::ints(i[2]), V::ints(i[3])).map(ints::<V>));
        all
    }

    fn products_equal_the_model<P: Products>(b: &[u8; 96]) {
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
            let format = Format::of(dtype).unwrap();
            assert_eq!(dot::<Neon<P>>(b, format), dot::<Model>(b, format), "{dtype:?}");
        }
    }

    #[test]
    fn every_step_equals_its_model() {
        for seed in 0..2000 {
            let mut b: [u8; 96] = noise(seed, 96).try_into().unwrap();
            if seed % 8 == 0 {
                // Extremes only.
                b = b.map(|b| [0, 0x7f, 0x80, 0xff][usize::from(b % 4)]);
            }
            let first: &[u8; 64] = b[..64].try_into().unwrap();
            assert_eq!(steps::<Neon<Widening>>(first), steps::<Model>(first));
            products_equal_the_model::<Widening>(&b);
            if KernelPath::NeonDot.is_available() {
                products_equal_the_model::<Dot>(&b);
            }
            if KernelPath::NeonI8mm.is_available() {
                assert_eq!(matrix::<Neon<I8mm>>(&b), matrix::<Model>(&b));
            }
        }
    }
}
