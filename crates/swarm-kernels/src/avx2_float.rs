//! The float matmul for AVX2, FMA and F16C. Equal to `float.rs` bit for bit.
//!
//! One token or a few: the 16 partial sums of a row and a token are the lanes of two registers (`float_few.rs`). Many: the tile of
//! `float_panel.rs`.

// Tiles are indexed by row and token in several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use crate::activation::{Eight, SIX, Sixteen};
use crate::avx2::load_halves;
use crate::float_few::{Ask, FewTile, Sums};
use crate::float_panel::Tile;
use crate::interleave::STRIPE;

/// Two registers of rows, six tokens: twelve sums.
pub(crate) struct Avx2Tile;

impl Tile<2> for Avx2Tile {
    const TOKENS: usize = SIX;

    // SAFETY: the trait's promise, passed on.
    unsafe fn tile(w: &[[Eight; 2]], x: [&[[f32; SIX]]; 2], partial: &mut [[Eight; 2]], begins: bool) {
        // SAFETY: as above.
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

/// # Safety
/// The CPU has AVX2, FMA and F16C; the stripe is as long as the token.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn one<const KIND: u8>(w: &[u8], x: &[Sixteen], sums: &mut Sums, begins: bool, ask: Option<Ask>) {
    let sixteen = if KIND == 0 { 64 } else { 32 };
    // SAFETY: every access is eight values inside its array, or inside the stripe, by the caller's promise.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); 2]; STRIPE];
        if !begins {
            for r in 0..STRIPE {
                for half in 0..2 {
                    acc[r][half] = _mm256_load_ps(sums[r].0[half].0.as_ptr());
                }
            }
        }
        for (i, x) in x.iter().enumerate() {
            let at = w.as_ptr().add(i * STRIPE * sixteen);
            for half in 0..2 {
                let x = _mm256_load_ps(x.0[half].0.as_ptr());
                for r in 0..STRIPE {
                    let w = load_weights::<KIND>(at.add(r * sixteen + half * sixteen / 2));
                    acc[r][half] = _mm256_fmadd_ps(w, x, acc[r][half]);
                }
            }
            if let Some(ask) = ask {
                ask.ask(i);
            }
        }
        for r in 0..STRIPE {
            for half in 0..2 {
                _mm256_store_ps(sums[r].0[half].0.as_mut_ptr(), acc[r][half]);
            }
        }
    }
}

/// Four rows, three tokens, one half of the partial sums at a time: twelve registers, beside a row and two tokens. The third token
/// is read again for each row.
pub(crate) struct Avx2Few;

impl FewTile for Avx2Few {
    const TOKENS: usize = 3;

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
                [a] => one::<KIND>(w, a, &mut sums[0], begins, ask),
                [a, b] => few::<2, KIND>(w, [a, b], sums, begins, ask),
                [a, b, c, ..] => few::<3, KIND>(w, [a, b, c], sums, begins, ask),
            }
        }
    }
}

/// # Safety
/// The CPU has AVX2, FMA and F16C; the stripe is as long as each token.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn few<const N: usize, const KIND: u8>(
    stripe: &[u8],
    x: [&[Sixteen]; N],
    sums: &mut [Sums],
    begins: bool,
    ask: Option<Ask>,
) {
    let sixteen = if KIND == 0 { 64 } else { 32 };
    let sums = &mut sums[..N];
    for half in 0..2 {
        let ask = ask.map(|ask| ask.part(half, 2, x[0].len()));
        // SAFETY: every access is eight values inside its array, or inside the stripe, by the caller's promise.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); STRIPE]; N];
            if !begins {
                for n in 0..N {
                    for r in 0..STRIPE {
                        acc[n][r] = _mm256_load_ps(sums[n][r].0[half].0.as_ptr());
                    }
                }
            }
            for i in 0..x[0].len() {
                if let Some(ask) = ask {
                    ask.ask(i);
                }
                let at = stripe.as_ptr().add(i * STRIPE * sixteen);
                let mut eights = [_mm256_setzero_ps(); N];
                for n in 0..N.min(2) {
                    eights[n] = _mm256_load_ps(x[n].get_unchecked(i).0[half].0.as_ptr());
                }
                for r in 0..STRIPE {
                    let w = load_weights::<KIND>(at.add(r * sixteen + half * sixteen / 2));
                    for n in 0..N {
                        if n == 2 {
                            eights[2] = _mm256_load_ps(x[2].get_unchecked(i).0[half].0.as_ptr());
                        }
                        acc[n][r] = _mm256_fmadd_ps(w, eights[n], acc[n][r]);
                    }
                    loads_stay();
                }
            }
            for n in 0..N {
                for r in 0..STRIPE {
                    _mm256_store_ps(sums[n][r].0[half].0.as_mut_ptr(), acc[n][r]);
                }
            }
        }
    }
}

/// No instruction, but a place that the compiler moves no load across.
#[inline(always)]
fn loads_stay() {
    // SAFETY: an empty text.
    unsafe { std::arch::asm!("", options(nostack, preserves_flags)) };
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
