//! Activations as the matmul reads them: int8 in blocks of 32 for quantized weights, padded f32 for float weights.

use crate::KernelPath;

/// Rows of activations quantized to int8, `[tokens, blocks * 32]`, with one scale and two sums per block.
#[derive(Default)]
pub(crate) struct QuantRows {
    q: Vec<i8>,
    d: Vec<f32>,
    /// Sums of the first and the last 16 codes of each block.
    sums: Vec<[i16; 2]>,
    blocks: usize,
}

/// One quantized row.
#[derive(Clone, Copy)]
pub(crate) struct QuantRow<'a> {
    pub q: &'a [[i8; 32]],
    pub d: &'a [f32],
    pub sums: &'a [[i16; 2]],
}

impl<'a> QuantRow<'a> {
    /// Codes, scale and half sums of block `b`.
    pub fn block(self, b: usize) -> (&'a [i8; 32], f32, [i16; 2]) {
        (&self.q[b], self.d[b], self.sums[b])
    }
}

/// Blocks whose largest magnitude lies outside these bounds are zero (below) or not a number (above, infinities and
/// NaN included): the scale's reciprocal would not be a normal number.
const SMALLEST: u32 = (127 - 100) << 23;
const LARGEST: u32 = (127 + 100) << 23;

/// Quantizes 32 values: the contract's definition. Returns the scale and the sums of the two halves.
///
/// `d = amax * (1/127)`, `q = round_ties_even(x * (127 * recip(amax)))`.
#[inline(always)]
fn quantize_block(x: &[f32; 32], q: &mut [i8; 32]) -> (f32, [i16; 2]) {
    // As integers, magnitudes compare like the numbers they stand for, and infinities and NaN are the largest.
    let amax = x.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    if !(SMALLEST..=LARGEST).contains(&amax) {
        *q = [0; 32];
        return (if amax < SMALLEST { 0.0 } else { f32::NAN }, [0; 2]);
    }
    let amax = f32::from_bits(amax);
    let inverse = 127.0 * crate::math::recip(amax);
    for (q, v) in q.iter_mut().zip(x) {
        *q = (v * inverse).round_ties_even() as i32 as i8;
    }
    let sum = |half: &[i8]| half.iter().fold(0i16, |s, &v| s + i16::from(v));
    (amax * (1.0 / 127.0), [sum(&q[..16]), sum(&q[16..])])
}

#[inline(always)]
fn quantize_row_body(x: &[f32], q: &mut [i8], d: &mut [f32], sums: &mut [[i16; 2]]) {
    let blocks = x.as_chunks::<32>().0.iter().zip(q.as_chunks_mut::<32>().0);
    for ((x, q), (d, sums)) in blocks.zip(d.iter_mut().zip(sums)) {
        (*d, *sums) = quantize_block(x, q);
    }
}

/// The same function compiled for AVX2: Rust's float semantics allow the compiler to vectorise it, not to change it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantize_row_avx2(x: &[f32], q: &mut [i8], d: &mut [f32], sums: &mut [[i16; 2]]) {
    quantize_row_body(x, q, d, sums);
}

impl QuantRows {
    /// Quantizes `x`, `[tokens, cols]`; `cols` is a multiple of 32.
    pub fn fill(&mut self, path: KernelPath, x: &[f32], cols: usize) {
        assert!(cols.is_multiple_of(32) && cols > 0, "quantized rows of {cols} columns");
        let (tokens, blocks) = (x.len() / cols, cols / 32);
        self.blocks = blocks;
        self.q.resize(tokens * cols, 0);
        self.d.resize(tokens * blocks, 0.0);
        self.sums.resize(tokens * blocks, [0; 2]);
        match path {
            // SAFETY: this path is only chosen where AVX2 and FMA were detected.
            #[cfg(target_arch = "x86_64")]
            path if path.has_avx2() => unsafe {
                quantize_row_avx2(x, &mut self.q, &mut self.d, &mut self.sums)
            },
            _ => quantize_row_body(x, &mut self.q, &mut self.d, &mut self.sums),
        }
    }

    pub fn row(&self, token: usize) -> QuantRow<'_> {
        let blocks = token * self.blocks..(token + 1) * self.blocks;
        QuantRow {
            q: &self.q.as_chunks::<32>().0[blocks.clone()],
            d: &self.d[blocks.clone()],
            sums: &self.sums[blocks],
        }
    }
}

/// 16 columns of one row: a cache line, so that no vector load straddles two.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Line([f32; 16]);

/// f32 rows padded with zeros to a whole number of 16 columns, each beginning on a cache line.
#[derive(Default)]
pub(crate) struct FloatRows {
    lines: Vec<Line>,
    per_row: usize,
}

impl FloatRows {
    /// Copies `x`, `[tokens, cols]`.
    pub fn fill(&mut self, x: &[f32], cols: usize) {
        self.per_row = cols.div_ceil(16);
        self.lines.clear();
        for row in x.chunks_exact(cols) {
            let (whole, rest) = row.as_chunks::<16>();
            self.lines.extend(whole.iter().map(|values| Line(*values)));
            if !rest.is_empty() {
                let mut last = [0.0; 16];
                last[..rest.len()].copy_from_slice(rest);
                self.lines.push(Line(last));
            }
        }
    }

    /// One row, `cols` rounded up to 16 long.
    pub fn row(&self, token: usize) -> &[f32] {
        bytemuck::cast_slice(&self.lines[token * self.per_row..(token + 1) * self.per_row])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rows(path: KernelPath, x: &[f32]) -> (Vec<i8>, Vec<u32>, Vec<[i16; 2]>) {
        let mut rows = QuantRows::default();
        rows.fill(path, x, x.len());
        (rows.q, rows.d.iter().map(|d| d.to_bits()).collect(), rows.sums)
    }

    proptest! {
        #[test]
        fn fast_equals_scalar(bits in proptest::collection::vec(any::<u32>(), 64)) {
            let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            let want = rows(KernelPath::Scalar, &x);
            for path in KernelPath::available() {
                prop_assert_eq!(&rows(path, &x), &want, "{:?}", path);
            }
        }

        #[test]
        fn codes_are_close(x in proptest::collection::vec(-10f32..10.0, 32)) {
            let (q, d, _) = rows(KernelPath::best(), &x);
            let d = f32::from_bits(d[0]);
            for (q, x) in q.iter().zip(&x) {
                prop_assert!((f32::from(*q) * d - x).abs() <= d * 0.5001);
            }
        }
    }

    #[test]
    fn not_finite_blocks_are_not_a_number() {
        let mut x = [1.0f32; 32];
        x[7] = f32::INFINITY;
        assert!(f32::from_bits(rows(KernelPath::best(), &x).1[0]).is_nan());
        assert_eq!(rows(KernelPath::best(), &[0.0; 32]).1[0], 0);
    }
}
