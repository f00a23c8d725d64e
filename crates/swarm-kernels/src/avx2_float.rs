//! The float matmul for AVX2, FMA and F16C. Equal to `float.rs` bit for bit.
//!
//! The 16 partial sums of one row and one token are the lanes of two registers, a *half* each. Few tokens: weights are
//! widened as they are read ([`float_tile`]). Many: one half of 8 rows x 2,048 columns is widened once and meets all tokens,
//! the partial sums waiting in memory between panels ([`FloatPanel`]); carrying them on is the same as never having stopped.
//!
//! ```text
//! tile of a panel, one half:    x of 3 tokens        4 + 3 loads feed 12 FMAs, one for each pair
//!   w of 4 rows  [ row ]   x   [ token ]  ->  12 registers of 8 partial sums
//! ```

// Tiles are indexed by row and token in several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use crate::activation::{CHUNK, Eight, FLOAT_TOKENS, FloatRows, TRIPLE, TRIPLE_CHUNK};
use crate::avx2::{PREFETCH, load_halves, tree};
use crate::dtype::DType;
use crate::interleave::{STRIPE, Stripes};
use crate::pack::LANES;

/// A group of 8 float rows times up to [`FLOAT_TOKENS`] tokens. Large: made once per thread.
#[repr(C, align(64))]
pub(crate) struct FloatPanel {
    /// One half of some columns, `[row / 4][column / 16][row % 4]`: an L1 cache. One stream for a tile of four rows; rows
    /// apart, a power of two from each other, would be in each other's way there.
    weights: [[[Eight; 4]; TRIPLE_CHUNK / 16]; LANES / 4],
    /// `[token][row]`, of the same half.
    partial: [[Eight; LANES]; FLOAT_TOKENS],
}

impl FloatPanel {
    pub fn new() -> Box<Self> {
        const ZERO: Eight = Eight([0.0; 8]);
        Box::new(Self {
            weights: [[[ZERO; 4]; TRIPLE_CHUNK / 16]; LANES / 4],
            partial: [[ZERO; LANES]; FLOAT_TOKENS],
        })
    }

    /// `out[n][r]` for some rows (at most 8) and the tokens from `first` on, `out.len()` of them (at most
    /// [`FLOAT_TOKENS`]).
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C.
    pub unsafe fn multiply(
        &mut self,
        dtype: DType,
        rows: Stripes<'_>,
        x: &FloatRows,
        first: usize,
        out: &mut [[f32; LANES]],
    ) {
        assert!(rows.rows() <= LANES && out.len() <= FLOAT_TOKENS);
        assert!(rows.shape.bytes == STRIPE * x.cols() * dtype.block_bytes());
        for half in 0..2 {
            // SAFETY: features promised by the caller, lengths asserted.
            unsafe {
                match dtype {
                    DType::F32 => self.run::<0>(rows, x, half, first, out),
                    DType::F16 => self.run::<1>(rows, x, half, first, out),
                    DType::BF16 => self.run::<2>(rows, x, half, first, out),
                    _ => unreachable!("not a float"),
                }
            }
        }
    }

    /// One half of the partial sums: half 0 writes its tree's sum, half 1 adds its own.
    ///
    /// # Safety
    /// As [`FloatPanel::multiply`], after its checks.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run<const KIND: u8>(
        &mut self,
        rows: Stripes<'_>,
        x: &FloatRows,
        half: usize,
        first: usize,
        out: &mut [[f32; LANES]],
    ) {
        self.partial[..out.len()].fill([Eight([0.0; 8]); LANES]);
        for start in (0..x.cols()).step_by(TRIPLE_CHUNK) {
            let len = (x.cols() - start) / 16;
            for (weights, bytes) in self.weights.iter_mut().zip(rows.bytes.chunks_exact(rows.shape.bytes)) {
                let stripe = Stripes { bytes, ..rows };
                for (i, to) in weights.iter_mut().take(len).enumerate() {
                    for (r, to) in to.iter_mut().enumerate() {
                        let at = stripe.at(r, start / 16 + i) + half * rows.shape.sixteen / 2;
                        // SAFETY: eight values of the row are there, by the assert; eight f32 are written.
                        unsafe {
                            _mm256_store_ps(to.0.as_mut_ptr(), load_weights::<KIND>(bytes.as_ptr().add(at)))
                        };
                    }
                }
            }
            let tiles = out.len().div_ceil(TRIPLE) * rows.rows() / 4;
            let mut tile = half * tiles;
            for n in (0..out.len()).step_by(TRIPLE) {
                let x = x.triple(first + n, start, half);
                for r in (0..rows.rows()).step_by(4) {
                    ask_for_next(rows, start, tile, 2 * tiles);
                    tile += 1;
                    match out.len() - n {
                        1 => self.tile::<1>(r, x, n),
                        2 => self.tile::<2>(r, x, n),
                        _ => self.tile::<3>(r, x, n),
                    }
                }
            }
        }
        for (out, partial) in out.iter_mut().zip(&self.partial) {
            let sum = half_trees(partial);
            // SAFETY: eight f32.
            unsafe {
                let sum = if half == 0 { sum } else { _mm256_add_ps(_mm256_loadu_ps(out.as_ptr()), sum) };
                _mm256_storeu_ps(out.as_mut_ptr(), sum);
            }
        }
    }

    /// Four rows from `r` on times `N` tokens over the panel. Rows that are not there are old values, whose sums nobody
    /// reads.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn tile<const N: usize>(&mut self, r: usize, x: &[[Eight; TRIPLE]], n: usize) {
        let weights = &self.weights[r / 4][..x.len()];
        let partial = &mut self.partial[n..n + N];
        // SAFETY: every access is eight aligned f32 inside its array.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 4]; N];
            for k in 0..N {
                for j in 0..4 {
                    acc[k][j] = _mm256_load_ps(partial[k][r + j].0.as_ptr());
                }
            }
            let ((weights, last_weights), (x, last_x)) = (weights.as_chunks::<4>(), x.as_chunks::<4>());
            for (w, x) in weights.iter().zip(x) {
                for i in 0..4 {
                    step(&w[i], &x[i], &mut acc);
                }
            }
            for (w, x) in last_weights.iter().zip(last_x) {
                step(w, x, &mut acc);
            }
            for k in 0..N {
                for j in 0..4 {
                    _mm256_store_ps(partial[k][r + j].0.as_mut_ptr(), acc[k][j]);
                }
            }
        }
    }
}

/// Eight columns of four rows meet `N` tokens. Three tokens, one row at a time and twelve sums are just the 16 registers
/// there are.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn step<const N: usize>(w: &[Eight; 4], x: &[Eight; TRIPLE], acc: &mut [[__m256; 4]; N]) {
    // SAFETY: eight aligned f32 each.
    unsafe {
        // No closure: it would not have these CPU features.
        let mut eights = [_mm256_setzero_ps(); N];
        for k in 0..N {
            eights[k] = _mm256_load_ps(x[k].0.as_ptr());
        }
        for j in 0..4 {
            let w = _mm256_load_ps(w[j].0.as_ptr());
            for k in 0..N {
                acc[k][j] = _mm256_fmadd_ps(w, eights[k], acc[k][j]);
            }
        }
    }
}

/// Asks for the rows that follow these in memory: part `part` of `parts` of what the panel of the columns from `start` on will
/// read of them.
#[inline]
#[target_feature(enable = "avx2")]
fn ask_for_next(rows: Stripes<'_>, start: usize, part: usize, parts: usize) {
    let from = rows.at(0, start / 16);
    let panel = (rows.shape.bytes - from).min(rows.at(0, TRIPLE_CHUNK / 16));
    for stripe in rows.bytes.chunks_exact(rows.shape.bytes) {
        for line in (panel * part / parts..panel * (part + 1) / parts).step_by(64) {
            // Never faults, also beyond the end of the weights.
            let next = stripe.as_ptr().wrapping_add(rows.bytes.len() + from + line);
            _mm_prefetch::<_MM_HINT_T1>(next.cast());
        }
    }
}

/// The contract's tree over the eight lanes of each of eight rows.
#[inline]
#[target_feature(enable = "avx2")]
fn half_trees(rows: &[Eight; LANES]) -> __m256 {
    // SAFETY: eight aligned f32.
    let row = |r: usize| unsafe { _mm256_load_ps(rows[r].0.as_ptr()) };
    let pairs = |r: usize| _mm256_hadd_ps(row(r), row(r + 1)); // 01 23 of r, of r + 1 | 45 67 of r, of r + 1
    let fours = |r: usize| _mm256_hadd_ps(pairs(r), pairs(r + 2)); // 0..3 of four rows | 4..7 of them
    let (a, b) = (fours(0), fours(4));
    _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
}

/// Rows `row .. row + R` of a stripe times `N` tokens from `first` on; `out[n][r]`.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C.
pub(crate) unsafe fn float_tile<const R: usize, const N: usize>(
    dtype: DType,
    stripe: &[u8],
    row: usize,
    x: &FloatRows,
    first: usize,
    out: &mut [[f32; R]; N],
) {
    assert!(stripe.len() == STRIPE * x.cols() * dtype.block_bytes() && row + R <= STRIPE);
    // SAFETY: features promised by the caller, lengths asserted.
    unsafe {
        match dtype {
            DType::F32 => floats::<R, N, 0>(stripe, row, x, first, out),
            DType::F16 => floats::<R, N, 1>(stripe, row, x, first, out),
            DType::BF16 => floats::<R, N, 2>(stripe, row, x, first, out),
            _ => unreachable!("not a float"),
        }
    }
}

/// # Safety
/// As [`float_tile`], after its check. `KIND` is 0 for f32, 1 for f16, 2 for bf16.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn floats<const R: usize, const N: usize, const KIND: u8>(
    stripe: &[u8],
    row: usize,
    x: &FloatRows,
    first: usize,
    out: &mut [[f32; R]; N],
) {
    let sixteen = if KIND == 0 { 64 } else { 32 };
    let mut acc = [[[_mm256_setzero_ps(); 2]; R]; N];
    for start in (0..x.cols()).step_by(CHUNK) {
        let x: [[&[Eight]; 2]; N] = std::array::from_fn(|n| x.chunk(first + n, start));
        for i in 0..x[0][0].len() {
            let at = (start / 16 + i) * STRIPE * sixteen;
            for half in 0..2 {
                let mut w = [_mm256_setzero_ps(); R];
                for r in 0..R {
                    let at = at + (row + r) * sixteen + half * sixteen / 2;
                    // SAFETY: eight values of the row are there.
                    w[r] = unsafe { load_weights::<KIND>(stripe.as_ptr().add(at)) };
                }
                for n in 0..N {
                    // SAFETY: the halves of all tokens are equally long; eight f32.
                    let x = unsafe { _mm256_load_ps(x[n][half].get_unchecked(i).0.as_ptr()) };
                    for r in 0..R {
                        acc[n][r][half] = _mm256_fmadd_ps(w[r], x, acc[n][r][half]);
                    }
                }
            }
            if row == 0 {
                ask_ahead::<KIND>(stripe, at);
            }
        }
    }
    for n in 0..N {
        for r in 0..R {
            out[n][r] = tree(acc[n][r]);
        }
    }
}

/// Asks for what comes [`PREFETCH`] bytes after the 16 columns at `at`: in this stripe, or in those behind it.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn ask_ahead<const KIND: u8>(stripe: &[u8], at: usize) {
    for line in 0..if KIND == 0 { 4 } else { 2 } {
        // Never faults, also beyond the end of the weights.
        _mm_prefetch::<_MM_HINT_T0>(stripe.as_ptr().wrapping_add(at + PREFETCH + 64 * line).cast());
    }
}

/// Eight weights as f32.
///
/// # Safety
/// They are readable.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(crate) unsafe fn load_weights<const KIND: u8>(at: *const u8) -> __m256 {
    // SAFETY: promised by the caller; loads have no alignment demand.
    unsafe {
        match KIND {
            0 => _mm256_loadu_ps(at.cast()),
            1 => load_halves(at),
            _ => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }
}
