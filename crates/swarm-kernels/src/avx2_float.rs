//! The float matmul for AVX2, FMA and F16C. Equal to `float.rs` bit for bit.
//!
//! The 16 partial sums of one row and one token are the lanes of two registers. Few tokens: weights are widened as they
//! are read ([`float_tile`]). Many: a panel of 8 rows x 512 columns is widened once and meets all tokens, the partial sums
//! waiting in memory between panels ([`FloatPanel`]); carrying them on is the same as never having stopped.

// Tiles are indexed by row and token in several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use crate::avx2::{load_halves, tree};
use crate::dtype::DType;
use crate::pack::LANES;

/// Columns of a panel: 8 rows of them are half of an L1 cache.
const PANEL: usize = 512;
/// Tokens a panel meets.
pub(crate) const TOKENS: usize = 64;

/// A group of 8 float rows times up to 64 tokens. Large: make one per task, not one per call.
#[repr(C, align(64))]
pub(crate) struct FloatPanel {
    weights: [[f32; PANEL]; LANES],
    partial: [[[f32; 16]; LANES]; TOKENS],
}

impl FloatPanel {
    pub fn new() -> Box<Self> {
        Box::new(Self { weights: [[0.0; PANEL]; LANES], partial: [[[0.0; 16]; LANES]; TOKENS] })
    }

    /// `out[n][r]` for `rows.len()` rows (at most 8) and `x.len()` tokens (at most 64), all padded to the same multiple of
    /// 16 columns.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C.
    pub unsafe fn multiply(&mut self, dtype: DType, rows: &[&[u8]], x: &[&[f32]], out: &mut [[f32; LANES]]) {
        let cols = x.first().map_or(0, |x| x.len());
        assert!(rows.len() <= LANES && x.len() <= TOKENS && out.len() >= x.len());
        assert!(cols.is_multiple_of(16) && x.iter().all(|x| x.len() == cols));
        assert!(rows.iter().all(|r| r.len() == cols * dtype.block_bytes()));
        // SAFETY: features promised by the caller, lengths asserted.
        unsafe { self.run(dtype, rows, x, cols, out) };
    }

    /// # Safety
    /// As [`FloatPanel::multiply`], after its checks.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run(
        &mut self,
        dtype: DType,
        rows: &[&[u8]],
        x: &[&[f32]],
        cols: usize,
        out: &mut [[f32; LANES]],
    ) {
        self.partial[..x.len()].fill([[0.0; 16]; LANES]);
        for start in (0..cols).step_by(PANEL) {
            let len = PANEL.min(cols - start);
            for (panel, row) in self.weights.iter_mut().zip(rows) {
                for k in (0..len).step_by(8) {
                    // SAFETY: `start + k + 8` values are inside the row, `k + 8` inside the panel.
                    unsafe {
                        let values = match dtype {
                            DType::F32 => load_weights::<0>(row, start + k),
                            DType::F16 => load_weights::<1>(row, start + k),
                            _ => load_weights::<2>(row, start + k),
                        };
                        _mm256_storeu_ps(panel.as_mut_ptr().add(k), values);
                    }
                }
            }
            let mut n = 0;
            while n < x.len() {
                let left = x.len() - n;
                // SAFETY: `n` and the next two are tokens, `start + len` is inside each of them.
                unsafe {
                    match left {
                        1 => self.tokens::<1>(rows.len(), &[x[n]], start, len, n),
                        2 => self.tokens::<2>(rows.len(), &[x[n], x[n + 1]], start, len, n),
                        _ => self.tokens::<3>(rows.len(), &[x[n], x[n + 1], x[n + 2]], start, len, n),
                    }
                }
                n += left.min(3);
            }
        }
        for (out, partial) in out.iter_mut().zip(&self.partial[..x.len()]) {
            for (out, p) in out.iter_mut().zip(partial) {
                // SAFETY: 16 partial sums.
                *out = unsafe { tree([_mm256_loadu_ps(p.as_ptr()), _mm256_loadu_ps(p.as_ptr().add(8))]) };
            }
        }
    }

    /// Two rows at a time times `N` tokens over the panel: twelve sums in registers when `N` is 3.
    ///
    /// # Safety
    /// `start + len` is inside each token, `len` is a multiple of 16 and at most a panel, `n + N` tokens are there.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tokens<const N: usize>(
        &mut self,
        rows: usize,
        x: &[&[f32]; N],
        start: usize,
        len: usize,
        n: usize,
    ) {
        for pair in (0..rows).step_by(2) {
            // The row beyond an odd last one is a panel row of old values, whose sums nobody reads.
            let w = [&self.weights[pair], &self.weights[pair + 1]];
            let mut acc = [[[_mm256_setzero_ps(); 2]; 2]; N];
            for i in 0..N {
                for r in 0..2 {
                    let p = &self.partial[n + i][pair + r];
                    // SAFETY: 16 partial sums.
                    acc[i][r] = unsafe { [_mm256_loadu_ps(p.as_ptr()), _mm256_loadu_ps(p.as_ptr().add(8))] };
                }
            }
            for k in (0..len).step_by(16) {
                for half in 0..2 {
                    let at = k + 8 * half;
                    // SAFETY: `at + 8` is inside the panel.
                    let w = unsafe { w.map(|w| _mm256_loadu_ps(w.as_ptr().add(at))) };
                    for i in 0..N {
                        // SAFETY: `start + at + 8` is inside the token.
                        let x = unsafe { _mm256_loadu_ps(x[i].as_ptr().add(start + at)) };
                        for r in 0..2 {
                            acc[i][r][half] = _mm256_fmadd_ps(w[r], x, acc[i][r][half]);
                        }
                    }
                }
            }
            for i in 0..N {
                for r in 0..2 {
                    let p = &mut self.partial[n + i][pair + r];
                    // SAFETY: 16 partial sums.
                    unsafe {
                        _mm256_storeu_ps(p.as_mut_ptr(), acc[i][r][0]);
                        _mm256_storeu_ps(p.as_mut_ptr().add(8), acc[i][r][1]);
                    }
                }
            }
        }
    }
}

/// `R` rows of float weights times `N` tokens; `out[n][r]`.
///
/// `rows[r]` are the row's bytes, `x[n]` its f32, both padded with zeros to the same multiple of 16.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C.
pub(crate) unsafe fn float_tile<const R: usize, const N: usize>(
    dtype: DType,
    rows: &[&[u8]; R],
    x: &[&[f32]; N],
    out: &mut [[f32; R]; N],
) {
    let cols = x[0].len();
    assert!(cols.is_multiple_of(16) && x.iter().all(|x| x.len() == cols));
    assert!(rows.iter().all(|r| r.len() == cols * dtype.block_bytes()));
    // SAFETY: features promised by the caller, lengths asserted.
    unsafe {
        match dtype {
            DType::F32 => floats::<R, N, 0>(rows, x, out),
            DType::F16 => floats::<R, N, 1>(rows, x, out),
            DType::BF16 => floats::<R, N, 2>(rows, x, out),
            _ => unreachable!("not a float"),
        }
    }
}

/// # Safety
/// All rows and tokens hold the same number of values, a multiple of 16. `KIND` is 0 for f32, 1 for f16, 2 for bf16.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn floats<const R: usize, const N: usize, const KIND: u8>(
    rows: &[&[u8]; R],
    x: &[&[f32]; N],
    out: &mut [[f32; R]; N],
) {
    let mut acc = [[[_mm256_setzero_ps(); 2]; R]; N];
    for k in (0..x[0].len()).step_by(16) {
        let mut w = [[_mm256_setzero_ps(); 2]; R];
        for r in 0..R {
            // SAFETY: `k + 16` values are inside the row.
            w[r] = unsafe { [load_weights::<KIND>(rows[r], k), load_weights::<KIND>(rows[r], k + 8)] };
        }
        for n in 0..N {
            // SAFETY: `k + 16` values are inside the token's row.
            let x =
                unsafe { [_mm256_loadu_ps(x[n].as_ptr().add(k)), _mm256_loadu_ps(x[n].as_ptr().add(k + 8))] };
            for r in 0..R {
                acc[n][r][0] = _mm256_fmadd_ps(w[r][0], x[0], acc[n][r][0]);
                acc[n][r][1] = _mm256_fmadd_ps(w[r][1], x[1], acc[n][r][1]);
            }
        }
    }
    for n in 0..N {
        for r in 0..R {
            out[n][r] = tree(acc[n][r]);
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
