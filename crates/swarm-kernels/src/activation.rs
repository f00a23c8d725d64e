//! Activations as the matmul reads them: int8 in blocks of 32 for quantized weights, padded f32 for float weights.

use crate::KernelPath;

/// Tokens side by side in a [`QuantBlock`].
pub(crate) const SIDE: usize = 4;

/// 32 columns of four tokens: what a tile reads of them lies together. A token that is not there is never read.
#[repr(C, align(32))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct QuantBlock {
    pub q: [[i8; 32]; SIDE],
    pub d: [f32; SIDE],
    /// Sums of the first and the last 16 codes.
    pub sums: [[i16; 2]; SIDE],
}

/// Rows of activations quantized to int8: `[tokens / 4, blocks]` of [`QuantBlock`].
#[derive(Default)]
pub(crate) struct QuantRows {
    blocks: Vec<QuantBlock>,
    per_row: usize,
}

/// One quantized row.
#[derive(Clone, Copy)]
pub(crate) struct QuantRow<'a> {
    blocks: &'a [QuantBlock],
    side: usize,
}

impl<'a> QuantRow<'a> {
    /// Blocks of 32 columns.
    pub fn len(self) -> usize {
        self.blocks.len()
    }

    /// Codes, scale and half sums of block `b`.
    pub fn block(self, b: usize) -> (&'a [i8; 32], f32, [i16; 2]) {
        let block = &self.blocks[b];
        (&block.q[self.side], block.d[self.side], block.sums[self.side])
    }
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

/// Quantizes rows of `32 * per_row` values into `blocks`.
#[inline(always)]
fn quantize_rows_body(x: &[f32], per_row: usize, blocks: &mut [QuantBlock]) {
    for (token, row) in x.chunks_exact(32 * per_row).enumerate() {
        let side = token % SIDE;
        let blocks = &mut blocks[token / SIDE * per_row..][..per_row];
        for (x, block) in row.as_chunks::<32>().0.iter().zip(blocks) {
            (block.d[side], block.sums[side]) = quantize_block(x, &mut block.q[side]);
        }
    }
}

/// The same function compiled for AVX2: Rust's float semantics allow the compiler to vectorise it, not to change it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantize_rows_avx2(x: &[f32], per_row: usize, blocks: &mut [QuantBlock]) {
    quantize_rows_body(x, per_row, blocks);
}

impl QuantRows {
    /// Quantizes `x`, `[tokens, cols]`; `cols` is a multiple of 32.
    pub fn fill(&mut self, path: KernelPath, x: &[f32], cols: usize) {
        assert!(cols.is_multiple_of(32) && cols > 0, "quantized rows of {cols} columns");
        self.per_row = cols / 32;
        let len = (x.len() / cols).div_ceil(SIDE) * self.per_row;
        self.blocks.resize(len, bytemuck::Zeroable::zeroed());
        match path {
            // SAFETY: this path is only chosen where AVX2 and FMA were detected.
            #[cfg(target_arch = "x86_64")]
            path if path.has_avx2() => unsafe { quantize_rows_avx2(x, self.per_row, &mut self.blocks) },
            _ => quantize_rows_body(x, self.per_row, &mut self.blocks),
        }
    }

    pub fn row(&self, token: usize) -> QuantRow<'_> {
        QuantRow { blocks: self.panel(token / SIDE), side: token % SIDE }
    }

    /// Tokens `4 * panel ..`, one [`QuantBlock`] per 32 columns.
    pub fn panel(&self, panel: usize) -> &[QuantBlock] {
        self.panels(panel..panel + 1)
    }

    /// Several panels, one after the other.
    pub fn panels(&self, panels: std::ops::Range<usize>) -> &[QuantBlock] {
        &self.blocks[panels.start * self.per_row..panels.end * self.per_row]
    }
}

/// Columns of float activations that lie together; a float panel has as many.
pub(crate) const CHUNK: usize = 512;

/// Eight columns of one row. Aligned, so that no vector load straddles two cache lines.
#[repr(C, align(32))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Eight(pub [f32; 8]);

/// f32 rows padded with zeros to a whole number of 16 columns, `[chunks of 512 columns, tokens, halves, 256 columns]`.
///
/// Half 0 has the columns of partial sums 0 to 7, half 1 the others: a tile works on one half at a time, and its tokens
/// follow each other in memory.
#[derive(Default)]
pub(crate) struct FloatRows {
    eights: Vec<Eight>,
    tokens: usize,
    /// Columns, padded.
    cols: usize,
}

impl FloatRows {
    /// Copies `x`, `[tokens, cols]`.
    pub fn fill(&mut self, x: &[f32], cols: usize) {
        (self.tokens, self.cols) = (x.len() / cols, cols.next_multiple_of(16));
        self.eights.resize(self.tokens * self.cols / 8, Eight([0.0; 8]));
        let mut rest = &mut self.eights[..];
        for start in (0..cols).step_by(CHUNK) {
            for row in x.chunks_exact(cols) {
                let row = &row[start..cols.min(start + CHUNK)];
                let sixteens = row.len().div_ceil(16);
                let (halves, after) = rest.split_at_mut(2 * sixteens);
                rest = after;
                let (low, high) = halves.split_at_mut(sixteens);
                for (values, (low, high)) in row.chunks(16).zip(low.iter_mut().zip(high)) {
                    let mut padded = [0.0; 16];
                    padded[..values.len()].copy_from_slice(values);
                    low.0.copy_from_slice(&padded[..8]);
                    high.0.copy_from_slice(&padded[8..]);
                }
            }
        }
    }

    /// Columns, padded to a multiple of 16.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The two halves of the chunk of `token` that begins at column `start`: equally long.
    pub fn chunk(&self, token: usize, start: usize) -> [&[Eight]; 2] {
        let sixteens = CHUNK.min(self.cols - start) / 16;
        let at = self.tokens * start / 8 + token * 2 * sixteens;
        let (low, high) = self.eights[at..at + 2 * sixteens].split_at(sixteens);
        [low, high]
    }

    /// One row again, 16 columns at a time.
    pub fn row(&self, token: usize) -> impl Iterator<Item = [f32; 16]> {
        (0..self.cols).step_by(CHUNK).flat_map(move |start| {
            let [low, high] = self.chunk(token, start);
            low.iter().zip(high).map(|(low, high)| {
                let mut both = [0.0; 16];
                both[..8].copy_from_slice(&low.0);
                both[8..].copy_from_slice(&high.0);
                both
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rows(path: KernelPath, x: &[f32]) -> (Vec<i8>, Vec<u32>, Vec<[i16; 2]>) {
        let mut rows = QuantRows::default();
        rows.fill(path, x, x.len());
        let blocks = || (0..x.len() / 32).map(|b| rows.row(0).block(b));
        (
            blocks().flat_map(|(q, ..)| *q).collect(),
            blocks().map(|(_, d, _)| d.to_bits()).collect(),
            blocks().map(|(.., sums)| sums).collect(),
        )
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
