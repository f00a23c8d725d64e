//! The float matmul for AVX2, FMA and F16C. Equal to `float.rs` bit for bit.
//!
//! The 16 partial sums of one row and one token are the lanes of two registers, a *half* each. Few tokens: weights are
//! widened as they are read ([`float_tile`]). Many: a panel of 8 rows x 512 columns is widened once and meets all tokens, the
//! partial sums waiting in memory between panels ([`FloatPanel`]); carrying them on is the same as never having stopped.
//!
//! ```text
//! tile of a panel, one half:    x of 3 tokens        4 + 3 loads feed 12 FMAs, one for each pair
//!   w of 4 rows  [ row ]   x   [ token ]  ->  12 registers of 8 partial sums
//! ```

// Tiles are indexed by row and token in several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use crate::activation::{CHUNK, Eight, FloatRows};
use crate::avx2::{PREFETCH, load_halves, tree};
use crate::dtype::DType;
use crate::pack::LANES;

/// Tokens a panel meets: a multiple of the tile's three.
pub(crate) const TOKENS: usize = 96;

/// A group of 8 float rows times up to [`TOKENS`] tokens. Large: made once per thread.
#[repr(C, align(64))]
pub(crate) struct FloatPanel {
    /// `[half][row][column / 16]`, a half L1 cache.
    weights: [[[Eight; CHUNK / 16]; LANES]; 2],
    /// `[token][half][row]`.
    partial: [[[Eight; LANES]; 2]; TOKENS],
}

impl FloatPanel {
    pub fn new() -> Box<Self> {
        const ZERO: Eight = Eight([0.0; 8]);
        Box::new(Self { weights: [[[ZERO; CHUNK / 16]; LANES]; 2], partial: [[[ZERO; LANES]; 2]; TOKENS] })
    }

    /// `out[n][r]` for `rows.len()` rows (at most 8) and the tokens from `first` on, `out.len()` of them (at most
    /// [`TOKENS`]).
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C.
    pub unsafe fn multiply(
        &mut self,
        dtype: DType,
        rows: &[&[u8]],
        x: &FloatRows,
        first: usize,
        out: &mut [[f32; LANES]],
    ) {
        assert!(rows.len() <= LANES && out.len() <= TOKENS);
        assert!(rows.iter().all(|r| r.len() == x.cols() * dtype.block_bytes()));
        // SAFETY: features promised by the caller, lengths asserted.
        unsafe {
            match dtype {
                DType::F32 => self.run::<0>(rows, x, first, out),
                DType::F16 => self.run::<1>(rows, x, first, out),
                DType::BF16 => self.run::<2>(rows, x, first, out),
                _ => unreachable!("not a float"),
            }
        }
    }

    /// # Safety
    /// As [`FloatPanel::multiply`], after its checks.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run<const KIND: u8>(
        &mut self,
        rows: &[&[u8]],
        x: &FloatRows,
        first: usize,
        out: &mut [[f32; LANES]],
    ) {
        self.partial[..out.len()].fill([[Eight([0.0; 8]); LANES]; 2]);
        for start in (0..x.cols()).step_by(CHUNK) {
            let len = CHUNK.min(x.cols() - start) / 16;
            for (r, row) in rows.iter().enumerate() {
                for i in 0..len {
                    for half in 0..2 {
                        // SAFETY: `start + 16 * i + 16` values are inside the row.
                        let values = unsafe { load_weights::<KIND>(row, start + 16 * i + 8 * half) };
                        // SAFETY: eight f32.
                        unsafe { _mm256_store_ps(self.weights[half][r][i].0.as_mut_ptr(), values) };
                    }
                }
            }
            let mut n = 0;
            while n < out.len() {
                let left = (out.len() - n).min(3);
                let x: [[&[Eight]; 2]; 3] =
                    std::array::from_fn(|i| x.chunk(first + n + i.min(left - 1), start));
                for half in 0..2 {
                    for r in (0..rows.len()).step_by(4) {
                        match left {
                            1 => self.tile::<1>(half, r, [x[0][half]], n),
                            2 => self.tile::<2>(half, r, [x[0][half], x[1][half]], n),
                            _ => self.tile::<3>(half, r, [x[0][half], x[1][half], x[2][half]], n),
                        }
                    }
                }
                n += left;
            }
        }
        for (out, [low, high]) in out.iter_mut().zip(&self.partial) {
            for (out, (low, high)) in out.iter_mut().zip(low.iter().zip(high)) {
                // SAFETY: eight f32 each.
                *out = unsafe { tree([_mm256_load_ps(low.0.as_ptr()), _mm256_load_ps(high.0.as_ptr())]) };
            }
        }
    }

    /// Four rows from `r` on times `N` tokens over one half of the panel. Rows that are not there are old values, whose
    /// sums nobody reads.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn tile<const N: usize>(&mut self, half: usize, r: usize, x: [&[Eight]; N], n: usize) {
        let len = x[0].len();
        let weights = &self.weights[half][r..r + 4];
        let partial = &mut self.partial[n..n + N];
        assert!(len <= CHUNK / 16 && x.iter().all(|x| x.len() == len));
        // SAFETY: every access is eight aligned f32 inside its array: `i < len`, asserted above.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 4]; N];
            for k in 0..N {
                for j in 0..4 {
                    acc[k][j] = _mm256_load_ps(partial[k][half][r + j].0.as_ptr());
                }
            }
            for i in 0..len {
                // Three tokens, one row at a time and twelve sums: just the 16 registers there are.
                let x: [__m256; N] =
                    std::array::from_fn(|k| _mm256_load_ps(x[k].get_unchecked(i).0.as_ptr()));
                for j in 0..4 {
                    let w = _mm256_load_ps(weights.get_unchecked(j).get_unchecked(i).0.as_ptr());
                    for k in 0..N {
                        acc[k][j] = _mm256_fmadd_ps(w, x[k], acc[k][j]);
                    }
                }
            }
            for k in 0..N {
                for j in 0..4 {
                    _mm256_store_ps(partial[k][half][r + j].0.as_mut_ptr(), acc[k][j]);
                }
            }
        }
    }
}

/// `R` rows of float weights times `N` tokens from `first` on; `out[n][r]`.
///
/// `rows[r]` are the row's bytes, padded with zeros as the tokens are.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C.
pub(crate) unsafe fn float_tile<const R: usize, const N: usize>(
    dtype: DType,
    rows: &[&[u8]; R],
    x: &FloatRows,
    first: usize,
    out: &mut [[f32; R]; N],
) {
    assert!(rows.iter().all(|r| r.len() == x.cols() * dtype.block_bytes()));
    // SAFETY: features promised by the caller, lengths asserted.
    unsafe {
        match dtype {
            DType::F32 => floats::<R, N, 0>(rows, x, first, out),
            DType::F16 => floats::<R, N, 1>(rows, x, first, out),
            DType::BF16 => floats::<R, N, 2>(rows, x, first, out),
            _ => unreachable!("not a float"),
        }
    }
}

/// # Safety
/// All rows hold `x.cols()` values. `KIND` is 0 for f32, 1 for f16, 2 for bf16.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn floats<const R: usize, const N: usize, const KIND: u8>(
    rows: &[&[u8]; R],
    x: &FloatRows,
    first: usize,
    out: &mut [[f32; R]; N],
) {
    let mut acc = [[[_mm256_setzero_ps(); 2]; R]; N];
    for start in (0..x.cols()).step_by(CHUNK) {
        let x: [[&[Eight]; 2]; N] = std::array::from_fn(|n| x.chunk(first + n, start));
        for i in 0..x[0][0].len() {
            let k = start + 16 * i;
            for half in 0..2 {
                let mut w = [_mm256_setzero_ps(); R];
                for r in 0..R {
                    // SAFETY: `k + 16` values are inside the row; a prefetch never faults.
                    w[r] = unsafe { load_weights::<KIND>(rows[r], k + 8 * half) };
                }
                for n in 0..N {
                    // SAFETY: the halves of all tokens are equally long; eight f32.
                    let x = unsafe { _mm256_load_ps(x[n][half].get_unchecked(i).0.as_ptr()) };
                    for r in 0..R {
                        acc[n][r][half] = _mm256_fmadd_ps(w[r], x, acc[n][r][half]);
                    }
                }
            }
            ask_ahead::<R, KIND>(rows, k);
        }
    }
    for n in 0..N {
        for r in 0..R {
            out[n][r] = tree(acc[n][r]);
        }
    }
}

/// Asks for the weights that come [`PREFETCH`] bytes after column `k` of each row, once per cache line.
#[inline]
#[target_feature(enable = "avx2")]
fn ask_ahead<const R: usize, const KIND: u8>(rows: &[&[u8]; R], k: usize) {
    let bytes = if KIND == 0 { 4 } else { 2 };
    if (k * bytes).is_multiple_of(64) {
        for row in rows {
            // Never faults, also beyond the end of the weights.
            _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(k * bytes + PREFETCH / R).cast());
        }
    }
}

/// Eight weights from value `k` on, as f32.
///
/// # Safety
/// `k + 8` values are inside `row`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load_weights<const KIND: u8>(row: &[u8], k: usize) -> __m256 {
    // SAFETY: promised by the caller; loads have no alignment demand.
    unsafe {
        match KIND {
            0 => _mm256_loadu_ps(row.as_ptr().add(4 * k).cast()),
            1 => load_halves(row.as_ptr().add(2 * k)),
            _ => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(row.as_ptr().add(2 * k).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }
}
