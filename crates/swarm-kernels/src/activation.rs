//! Activations as the matmul reads them: int8 in blocks of 32 for quantized weights, padded f32 for float weights.

use std::ops::Range;

use crate::KernelPath;
use crate::pool::{Pool, SharedRows};
use crate::quant::segment;

/// Tokens side by side, where there are several.
pub(crate) const SIDE: usize = 4;

/// 32 columns of one token.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct QuantBlock {
    pub q: [i8; 32],
    pub d: f32,
    /// Sums of the first and the last 16 codes.
    pub sums: [i16; 2],
}

/// Rows of activations quantized to int8: `[16 segments, tokens / 4, blocks of the segment, 4 tokens]`, so that
/// what meets one segment of the weights lies together. A token that is not there is never read; one token alone leaves no
/// places for others, for beside the weights' stream only what is short stays in the L1 cache.
#[derive(Default)]
pub(crate) struct QuantRows {
    blocks: Vec<QuantBlock>,
    per_row: usize,
    panels: usize,
    /// Places for tokens beside each other: one or [`SIDE`].
    side: usize,
}

/// One quantized row.
#[derive(Clone, Copy)]
pub(crate) struct QuantRow<'a> {
    rows: &'a QuantRows,
    token: usize,
}

impl<'a> QuantRow<'a> {
    /// Blocks of 32 columns.
    pub fn len(self) -> usize {
        self.rows.per_row
    }

    /// Codes, scale and half sums of block `i` of segment `s`.
    pub fn block(self, s: usize, i: usize) -> (&'a [i8; 32], f32, [i16; 2]) {
        let (panel, lane) = (self.token / SIDE, self.token % SIDE);
        let block = &self.rows.segment(s, panel..panel + 1)[i * self.rows.side + lane];
        (&block.q, block.d, block.sums)
    }
}

/// Blocks whose largest magnitude lies outside these bounds are zero (below) or not a number (above, infinities and
/// NaN included): the scale's reciprocal would not be a normal number.
pub(crate) const SMALLEST: u32 = (127 - 100) << 23;
pub(crate) const LARGEST: u32 = (127 + 100) << 23;

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

impl QuantRows {
    /// Quantizes `x`, `[tokens, cols]`; `cols` is a multiple of 32.
    pub fn fill(&mut self, path: KernelPath, x: &[f32], cols: usize) {
        assert!(cols.is_multiple_of(32) && cols > 0, "quantized rows of {cols} columns");
        let tokens = x.len() / cols;
        (self.per_row, self.panels) = (cols / 32, tokens.div_ceil(SIDE));
        self.side = if tokens == 1 { 1 } else { SIDE };
        self.blocks.resize(self.panels * self.per_row * self.side, bytemuck::Zeroable::zeroed());
        for (token, row) in x.chunks_exact(cols).enumerate() {
            let row = row.as_chunks::<32>().0;
            for s in 0..16 {
                let (from, to) = (segment(s, self.per_row), self.place(s, token / SIDE..token / SIDE + 1));
                let (x, side, lane) = (&row[from], self.side, token % SIDE);
                let blocks = &mut self.blocks[to];
                match path {
                    // SAFETY: this path is only chosen where AVX2 and FMA were detected.
                    #[cfg(target_arch = "x86_64")]
                    path if path.has_avx2() => unsafe {
                        crate::avx2_quantize::quantize(x, blocks, side, lane);
                    },
                    _ => quantize(x, blocks, side, lane),
                }
            }
        }
    }

    /// Where the blocks of segment `s` of some panels (each four tokens) lie.
    fn place(&self, s: usize, panels: Range<usize>) -> Range<usize> {
        let segment = segment(s, self.per_row);
        let first = self.panels * segment.start;
        let panel = |panel: usize| (first + panel * segment.len()) * self.side;
        panel(panels.start)..panel(panels.end)
    }

    /// The blocks of segment `s` of some panels, one panel after the other.
    pub fn segment(&self, s: usize, panels: Range<usize>) -> &[QuantBlock] {
        &self.blocks[self.place(s, panels)]
    }

    /// The same where tokens are side by side.
    #[cfg(any(test, target_arch = "x86_64"))]
    pub fn side_by_side(&self, s: usize, panels: Range<usize>) -> &[[QuantBlock; SIDE]] {
        assert!(self.side == SIDE, "one token has no others beside it");
        self.segment(s, panels).as_chunks().0
    }

    /// The first `N` tokens of a panel, block by block of segment `s`.
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    pub fn blocks<const N: usize>(&self, s: usize, panel: usize) -> impl Iterator<Item = &[QuantBlock; N]> {
        // Not exact chunks: those would divide to know their number.
        let segment = self.segment(s, panel..panel + 1);
        segment.chunks(self.side.max(1)).filter_map(|tokens| tokens.first_chunk())
    }

    pub fn row(&self, token: usize) -> QuantRow<'_> {
        QuantRow { rows: self, token }
    }

    /// Blocks of 32 columns in a row.
    #[cfg(any(test, target_arch = "x86_64"))]
    pub fn per_row(&self) -> usize {
        self.per_row
    }
}

/// Quantizes blocks of one token to its lane of `blocks`, which have `side` each.
fn quantize(x: &[[f32; 32]], blocks: &mut [QuantBlock], side: usize, lane: usize) {
    for (x, block) in x.iter().zip(blocks.iter_mut().skip(lane).step_by(side)) {
        (block.d, block.sums) = quantize_block(x, &mut block.q);
    }
}

/// Tokens that float weights meet at once: a multiple of twice [`SIX`], and no fewer than a prompt chunk has.
pub(crate) const FLOAT_TOKENS: usize = 264;

/// The most columns of float activations that lie together in a token's row.
const CHUNK: usize = 512;

/// Tokens side by side where there are many.
pub(crate) const SIX: usize = 6;

/// Eight columns of one row. Aligned, so that no vector load straddles two cache lines.
#[repr(C, align(32))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Eight(pub [f32; 8]);

/// Sixteen columns of one row, one for each partial sum. Aligned likewise.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Sixteen(pub [Eight; 2]);

impl Sixteen {
    pub const ZERO: Self = Self([Eight([0.0; 8]); 2]);
}

/// f32 rows padded with zeros to a whole number of 16 columns, in one of two layouts.
///
/// A token's columns together: `[chunks of up to 512 columns, tokens, columns / 16 and one place more]`; tokens a power of two apart would
/// be in each other's way in the L1 cache. By columns, for many tokens: `[16 partial sums, tokens / 6, columns / 16, 6 tokens]`,
/// one stream through memory for all tokens that meet a partial sum's weights.
#[derive(Default)]
pub(crate) struct FloatRows {
    values: Vec<Sixteen>,
    tokens: usize,
    /// Columns, padded.
    cols: usize,
    /// Columns of a chunk; the last one may have fewer.
    chunk: usize,
    by_columns: bool,
}

/// The first 16 values, filled up with zeros.
#[inline(always)]
fn sixteen(values: &[f32]) -> [f32; 16] {
    values.first_chunk().copied().unwrap_or_else(|| {
        let mut padded = [0.0; 16];
        padded[..values.len()].copy_from_slice(values);
        padded
    })
}

impl FloatRows {
    /// Columns of a row of `cols` that lie together; those of the last chunk may be fewer. A multiple of 16.
    pub fn together(cols: usize) -> usize {
        cols.div_ceil(cols.div_ceil(CHUNK).max(1)).next_multiple_of(16).max(16)
    }

    /// Copies `x`, `[tokens, cols]`.
    pub fn fill(&mut self, pool: &Pool, x: &[f32], cols: usize, by_columns: bool) {
        (self.tokens, self.cols, self.by_columns) = (x.len() / cols, cols.next_multiple_of(16), by_columns);
        self.chunk = Self::together(cols);
        if by_columns {
            self.values.resize(self.tokens.next_multiple_of(SIX) * self.cols / 16, Sixteen::ZERO);
            self.fill_by_columns(pool, x, cols);
        } else {
            self.values.resize(self.tokens * (self.cols / 16 + cols.div_ceil(self.chunk)), Sixteen::ZERO);
            self.fill_by_tokens(x, cols);
        }
    }

    fn fill_by_tokens(&mut self, x: &[f32], cols: usize) {
        let (mut rest, chunk) = (&mut self.values[..], self.chunk);
        for start in (0..cols).step_by(chunk) {
            let sixteens = chunk.min(cols - start).div_ceil(16);
            for row in x.chunks_exact(cols) {
                let (places, after) = rest.split_at_mut(sixteens + 1);
                rest = after;
                let values = row[start..cols.min(start + chunk)].chunks(16);
                for (values, place) in values.zip(places) {
                    *place = bytemuck::cast(sixteen(values));
                }
            }
        }
    }

    /// A task is six tokens: for a prompt this is a part of the work that one thread alone would let the others wait for.
    fn fill_by_columns(&mut self, pool: &Pool, x: &[f32], cols: usize) {
        /// Places of a partial sum that are written at once.
        const RUN: usize = 8;
        let (sixteens, sixes) = (self.cols / 16, self.tokens.div_ceil(SIX));
        let out = SharedRows::new(bytemuck::cast_slice_mut(&mut self.values));
        pool.run(sixes, |six| {
            let tokens = &x[six * SIX * cols..];
            let rows: [&[f32]; SIX] =
                std::array::from_fn(|n| tokens.get(n * cols..(n + 1) * cols).unwrap_or(&[]));
            for start in (0..sixteens).step_by(RUN) {
                let mut turned = [[[0.0f32; SIX]; RUN]; 16];
                let run = RUN.min(sixteens - start);
                for (n, row) in rows.iter().enumerate() {
                    for i in 0..run {
                        let values = sixteen(row.get(16 * (start + i)..).unwrap_or(&[]));
                        for (turned, value) in turned.iter_mut().zip(values) {
                            turned[i][n] = value;
                        }
                    }
                }
                for (j, turned) in turned.iter().enumerate() {
                    let at = ((j * sixes + six) * sixteens + start) * SIX;
                    // SAFETY: `out` is borrowed until all tasks are done, and these six tokens are this task's alone.
                    unsafe { out.write(at, turned[..run].as_flattened()) };
                }
            }
        });
    }

    /// Six tokens, the `six`th such, of every 16th column from `j` on: `[column / 16, token]`, of the sixteens asked for. A
    /// token that is not there is zeros.
    #[cfg(target_arch = "x86_64")]
    pub fn columns(&self, j: usize, six: usize, sixteens: Range<usize>) -> &[[f32; SIX]] {
        assert!(self.by_columns, "float rows are not by columns");
        let at = (j * self.tokens.div_ceil(SIX) + six) * (self.cols / 16);
        let values: &[f32] = bytemuck::cast_slice(&self.values);
        &values.as_chunks().0[at + sixteens.start..at + sixteens.end]
    }

    #[cfg(target_arch = "x86_64")]
    pub fn by_columns(&self) -> bool {
        self.by_columns
    }

    /// Columns, padded to a multiple of 16.
    #[cfg(target_arch = "x86_64")]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The columns at which chunks begin.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = usize> + use<> {
        (0..self.cols).step_by(self.chunk.max(16))
    }

    /// The chunk of `token` that begins at column `start`: `[columns / 16]`.
    pub fn chunk(&self, token: usize, start: usize) -> &[Sixteen] {
        assert!(!self.by_columns, "float rows are by columns");
        let sixteens = self.chunk.min(self.cols - start) / 16;
        let at = self.tokens * (start / 16 + start / self.chunk) + token * (sixteens + 1);
        &self.values[at..at + sixteens]
    }

    /// One row again, 16 columns at a time.
    pub fn row(&self, token: usize) -> impl Iterator<Item = [f32; 16]> {
        let chunks = self.chunks().map(move |start| self.chunk(token, start));
        chunks.flatten().map(|sixteen| bytemuck::cast(*sixteen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rows(path: KernelPath, x: &[f32]) -> (Vec<i8>, Vec<u32>, Vec<[i16; 2]>) {
        let mut rows = QuantRows::default();
        rows.fill(path, x, x.len());
        let blocks = || (0..16).flat_map(|s| rows.segment(s, 0..1)).map(|b| (&b.q, b.d, b.sums));
        (
            blocks().flat_map(|(q, ..)| *q).collect(),
            blocks().map(|(_, d, _)| d.to_bits()).collect(),
            blocks().map(|(.., sums)| sums).collect(),
        )
    }

    proptest! {
        #[test]
        fn fast_equals_scalar(bits in proptest::collection::vec(
            prop_oneof![20 => 0x3a00_0000u32..0x4300_0000, 1 => any::<u32>()], 32 * 9,
        )) {
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
