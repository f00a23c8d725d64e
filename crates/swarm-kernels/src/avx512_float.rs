//! The float matmul for AVX-512. Equal to `float.rs` bit for bit.
//!
//! Few tokens: the 16 partial sums of one row and one token are the lanes of one register, and weights are widened as they
//! are read. Many: the tile of `float_panel.rs`.

// Tiles are indexed by row and token in several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::ops::Range;

use crate::activation::{CHUNK, Eight, FloatRows, SIX};
use crate::avx2::tree;
use crate::avx2_float::ask_ahead;
use crate::dtype::DType;
use crate::float_panel::Tile;
use crate::interleave::{STRIPE, Stripes};
use crate::pack::LANES;

/// Two registers of rows, twelve tokens: 24 sums.
pub(crate) struct Avx512Tile;

/// Tokens of a whole tile.
const WIDE: usize = 2 * SIX;

impl Tile<4> for Avx512Tile {
    const TOKENS: usize = WIDE;

    unsafe fn tile(w: &[[Eight; 4]], x: [&[[f32; SIX]]; 2], partial: &mut [[Eight; 4]], begins: bool) {
        // SAFETY: promised by the caller.
        unsafe {
            match partial.len() {
                WIDE => tile::<WIDE>(w, x, partial, begins),
                count => {
                    let (one, two) = partial.split_at_mut(count.min(SIX));
                    for (x, partial) in x.into_iter().zip([one, two]) {
                        match partial.len() {
                            0 => {}
                            1 => tile::<1>(w, [x; 2], partial, begins),
                            2 => tile::<2>(w, [x; 2], partial, begins),
                            3 => tile::<3>(w, [x; 2], partial, begins),
                            4 => tile::<4>(w, [x; 2], partial, begins),
                            5 => tile::<5>(w, [x; 2], partial, begins),
                            _ => tile::<SIX>(w, [x; 2], partial, begins),
                        }
                    }
                }
            }
        }
    }
}

/// # Safety
/// The CPU has AVX-512 F.
#[target_feature(enable = "avx512f")]
unsafe fn tile<const N: usize>(
    w: &[[Eight; 4]],
    x: [&[[f32; SIX]]; 2],
    partial: &mut [[Eight; 4]],
    begins: bool,
) {
    let partial = &mut partial[..N];
    let mut acc = [[_mm512_setzero_ps(); 2]; N];
    // SAFETY: every access is 16 f32, or one f32, inside its array.
    unsafe {
        if !begins {
            for n in 0..N {
                for pair in 0..2 {
                    acc[n][pair] = _mm512_loadu_ps(partial[n][2 * pair..].as_ptr().cast());
                }
            }
        }
        for ((w, one), two) in w.iter().zip(x[0]).zip(x[1]) {
            let w = [_mm512_loadu_ps(w.as_ptr().cast()), _mm512_loadu_ps(w[2..].as_ptr().cast())];
            for n in 0..N {
                let x = _mm512_set1_ps(if n < SIX { one[n] } else { two[n - SIX] });
                for pair in 0..2 {
                    acc[n][pair] = _mm512_fmadd_ps(w[pair], x, acc[n][pair]);
                }
            }
        }
        for n in 0..N {
            for pair in 0..2 {
                _mm512_storeu_ps(partial[n][2 * pair..].as_mut_ptr().cast(), acc[n][pair]);
            }
        }
    }
}

/// Up to eight float rows times the few tokens of `block`, which are not by columns; `values[n][r]`.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL, AVX2, FMA and F16C.
pub(crate) unsafe fn float_group(
    dtype: DType,
    rows: Stripes<'_>,
    x: &FloatRows,
    block: Range<usize>,
    values: &mut [[f32; LANES]],
) {
    assert!(rows.rows() <= LANES && block.len() <= values.len() && !x.by_columns());
    assert!(rows.shape.bytes == STRIPE * x.cols() * dtype.block_bytes());
    // The stripe stays in the L1 cache from four tokens to the next.
    for (first, stripe) in rows.bytes.chunks_exact(rows.shape.bytes).enumerate() {
        for (four, values) in values[..block.len()].chunks_mut(4).enumerate() {
            let (first, token) = (STRIPE * first, block.start + 4 * four);
            // SAFETY: features promised by the caller, lengths asserted.
            unsafe {
                match dtype {
                    DType::F32 => few_of::<0>(stripe, x, token, first, values),
                    DType::F16 => few_of::<1>(stripe, x, token, first, values),
                    DType::BF16 => few_of::<2>(stripe, x, token, first, values),
                    _ => unreachable!("not a float"),
                }
            }
        }
    }
}

/// `KIND` is 0 for f32, 1 for f16, 2 for bf16.
///
/// # Safety
/// As [`few`].
unsafe fn few_of<const KIND: u8>(
    stripe: &[u8],
    x: &FloatRows,
    token: usize,
    first: usize,
    values: &mut [[f32; LANES]],
) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match values.len() {
            1 => few::<1, KIND>(stripe, x, token, first, values),
            2 => few::<2, KIND>(stripe, x, token, first, values),
            3 => few::<3, KIND>(stripe, x, token, first, values),
            _ => few::<4, KIND>(stripe, x, token, first, values),
        }
    }
}

/// A stripe times `N` tokens from `token` on; the values of its rows go to places `first ..`.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL, AVX2, FMA and F16C; the stripe has as many columns as the tokens; there are `N` values.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn few<const N: usize, const KIND: u8>(
    stripe: &[u8],
    x: &FloatRows,
    token: usize,
    first: usize,
    values: &mut [[f32; LANES]],
) {
    let sixteen = if KIND == 0 { 64 } else { 32 };
    let mut acc = [[_mm512_setzero_ps(); STRIPE]; N];
    for start in (0..x.cols()).step_by(CHUNK) {
        let x: [[&[Eight]; 2]; N] = std::array::from_fn(|n| x.chunk(token + n, start));
        for i in 0..x[0][0].len() {
            let at = (start / 16 + i) * STRIPE * sixteen;
            let mut w = [_mm512_setzero_ps(); STRIPE];
            for (r, w) in w.iter_mut().enumerate() {
                // SAFETY: 16 values of each row, inside the stripe.
                *w = unsafe { load_weights::<KIND>(stripe.as_ptr().add(at + r * sixteen)) };
            }
            ask_ahead::<KIND>(stripe, at);
            for n in 0..N {
                // SAFETY: the halves of all tokens are equally long.
                let [low, high] = unsafe { x[n].map(|half| half.get_unchecked(i)) };
                // SAFETY: eight f32 each.
                let both = unsafe { join(_mm256_loadu_ps(low.0.as_ptr()), _mm256_loadu_ps(high.0.as_ptr())) };
                for r in 0..STRIPE {
                    acc[n][r] = _mm512_fmadd_ps(w[r], both, acc[n][r]);
                }
            }
        }
    }
    for n in 0..N {
        for r in 0..STRIPE {
            values[n][first + r] = tree([_mm512_castps512_ps256(acc[n][r]), upper(acc[n][r])]);
        }
    }
}

/// Of each 128 bits: `a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn even_plus_odd(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(a, b), _mm512_shuffle_ps::<0b11_01_11_01>(a, b))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn join(low: __m256, high: __m256) -> __m512 {
    let low = _mm512_castpd256_pd512(_mm256_castps_pd(low));
    _mm512_castpd_ps(_mm512_insertf64x4::<1>(low, _mm256_castps_pd(high)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn upper(v: __m512) -> __m256 {
    _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)))
}

/// Sixteen weights as f32.
///
/// # Safety
/// They are readable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_weights<const KIND: u8>(at: *const u8) -> __m512 {
    // SAFETY: promised by the caller; loads have no alignment demand.
    unsafe {
        match KIND {
            0 => _mm512_loadu_ps(at.cast()),
            1 => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
            _ => {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }
    }
}
