//! The float matmul for AVX-512. Equal to `float.rs` bit for bit.
//!
//! One token or a few: the 16 partial sums of a row and a token are the lanes of one register (`float_few.rs`). Many: the tile of
//! `float_panel.rs`.

// Tiles are indexed by row and token in several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use crate::activation::{Eight, SIX, Sixteen};
use crate::float_few::{Ask, FewTile, Sums};
use crate::float_panel::Tile;
use crate::interleave::STRIPE;

/// Two registers of rows, twelve tokens: 24 sums.
pub(crate) struct Avx512Tile;

/// Tokens of a whole tile.
const WIDE: usize = 2 * SIX;

impl Tile<4> for Avx512Tile {
    const TOKENS: usize = WIDE;

    // SAFETY: the trait's promise, passed on.
    unsafe fn tile(w: &[[Eight; 4]], x: [&[[f32; SIX]]; 2], partial: &mut [[Eight; 4]], begins: bool) {
        // SAFETY: as above.
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

/// Four rows, six tokens: 24 registers.
pub(crate) struct Avx512Few;

impl FewTile for Avx512Few {
    const TOKENS: usize = SIX;

    // SAFETY: the trait's promise, passed on.
    unsafe fn tile<const KIND: u8>(
        w: &[u8],
        x: &[&[Sixteen]],
        sums: &mut [Sums],
        begins: bool,
        ask: Option<Ask>,
    ) {
        // SAFETY: as above.
        unsafe {
            match *x {
                [] => {}
                [a] => few::<1, KIND>(w, [a], sums, begins, ask),
                [a, b] => few::<2, KIND>(w, [a, b], sums, begins, ask),
                [a, b, c] => few::<3, KIND>(w, [a, b, c], sums, begins, ask),
                [a, b, c, d] => few::<4, KIND>(w, [a, b, c, d], sums, begins, ask),
                [a, b, c, d, e] => few::<5, KIND>(w, [a, b, c, d, e], sums, begins, ask),
                [a, b, c, d, e, f, ..] => few::<6, KIND>(w, [a, b, c, d, e, f], sums, begins, ask),
            }
        }
    }
}

/// # Safety
/// The CPU has AVX-512 F, BW and VL, AVX2, FMA and F16C; the stripe is as long as each token.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn few<const N: usize, const KIND: u8>(
    w: &[u8],
    x: [&[Sixteen]; N],
    sums: &mut [Sums],
    begins: bool,
    ask: Option<Ask>,
) {
    let sixteen = if KIND == 0 { 64 } else { 32 };
    let sums = &mut sums[..N];
    // SAFETY: every access is 16 values inside its array, or inside the stripe, by the caller's promise.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); STRIPE]; N];
        if !begins {
            for n in 0..N {
                for r in 0..STRIPE {
                    acc[n][r] = _mm512_load_ps(sums[n][r].0[0].0.as_ptr());
                }
            }
        }
        for i in 0..x[0].len() {
            let at = w.as_ptr().add(i * STRIPE * sixteen);
            let mut rows = [_mm512_setzero_ps(); STRIPE];
            for r in 0..STRIPE {
                rows[r] = load_weights::<KIND>(at.add(r * sixteen));
            }
            for n in 0..N {
                let x = _mm512_load_ps(x[n].get_unchecked(i).0[0].0.as_ptr());
                for r in 0..STRIPE {
                    acc[n][r] = _mm512_fmadd_ps(rows[r], x, acc[n][r]);
                }
            }
            if let Some(ask) = ask {
                ask.ask(i);
            }
        }
        for n in 0..N {
            for r in 0..STRIPE {
                _mm512_store_ps(sums[n][r].0[0].0.as_mut_ptr(), acc[n][r]);
            }
        }
    }
}

/// Of each 128 bits: `a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn even_plus_odd(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(a, b), _mm512_shuffle_ps::<0b11_01_11_01>(a, b))
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
