//! The float matmul for AVX2, FMA and F16C. Equal to `float.rs` bit for bit.
//!
//! Few tokens: the 16 partial sums of one row and one token are the lanes of two registers, and weights are widened as they are
//! read ([`float_tile`]). Many: the tile of `float_panel.rs`.

// Tiles are indexed by row and token in several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use crate::activation::{CHUNK, Eight, FloatRows, SIX};
use crate::avx2::{PREFETCH, load_halves, tree};
use crate::dtype::DType;
use crate::float_panel::Tile;
use crate::interleave::STRIPE;

/// Two registers of rows, six tokens: twelve sums.
pub(crate) struct Avx2Tile;

impl Tile<2> for Avx2Tile {
    const TOKENS: usize = SIX;

    unsafe fn tile(w: &[[Eight; 2]], x: [&[[f32; SIX]]; 2], partial: &mut [[Eight; 2]], begins: bool) {
        // SAFETY: promised by the caller.
        unsafe {
            match partial.len() {
                1 => tile::<1>(w, x[0], partial, begins),
                2 => tile::<2>(w, x[0], partial, begins),
                3 => tile::<3>(w, x[0], partial, begins),
                4 => tile::<4>(w, x[0], partial, begins),
                5 => tile::<5>(w, x[0], partial, begins),
                _ => tile::<SIX>(w, x[0], partial, begins),
            }
        }
    }
}

/// # Safety
/// The CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const N: usize>(w: &[[Eight; 2]], x: &[[f32; SIX]], partial: &mut [[Eight; 2]], begins: bool) {
    let partial = &mut partial[..N];
    let mut acc = [[_mm256_setzero_ps(); 2]; N];
    // SAFETY: every access is eight aligned f32, or one f32, inside its array.
    unsafe {
        if !begins {
            for n in 0..N {
                for e in 0..2 {
                    acc[n][e] = _mm256_load_ps(partial[n][e].0.as_ptr());
                }
            }
        }
        for (w, x) in w.iter().zip(x) {
            let w = [_mm256_load_ps(w[0].0.as_ptr()), _mm256_load_ps(w[1].0.as_ptr())];
            for n in 0..N {
                let x = _mm256_broadcast_ss(&x[n]);
                for e in 0..2 {
                    acc[n][e] = _mm256_fmadd_ps(w[e], x, acc[n][e]);
                }
            }
        }
        for n in 0..N {
            for e in 0..2 {
                _mm256_store_ps(partial[n][e].0.as_mut_ptr(), acc[n][e]);
            }
        }
    }
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
