//! Quantizing activations with AVX2. Equal to `activation.rs` bit for bit.

use std::arch::x86_64::*;

use crate::activation::{LARGEST, QuantBlock, SMALLEST};
use crate::math::recip;

/// Blocks whose scales are computed together, one in each lane.
const TOGETHER: usize = 8;

/// Quantizes blocks of one token to its lane of `blocks`, which have `side` each.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn quantize(x: &[[f32; 32]], blocks: &mut [QuantBlock], side: usize, lane: usize) {
    for (x, blocks) in x.chunks(TOGETHER).zip(blocks.chunks_mut(TOGETHER * side)) {
        quantize_together(x, blocks, side, lane);
    }
}

/// Up to eight blocks of one token.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn quantize_together(x: &[[f32; 32]], blocks: &mut [QuantBlock], side: usize, lane: usize) {
    let mut amax = [0u32; TOGETHER];
    for (amax, x) in amax.iter_mut().zip(x) {
        *amax = largest(x);
    }
    // Eight chains of Newton steps at once: one alone would take longer than the rest of its block.
    let inverse = amax.map(|amax| 127.0 * recip(f32::from_bits(amax)));
    let blocks = blocks.iter_mut().skip(lane).step_by(side);
    for (((x, block), amax), inverse) in x.iter().zip(blocks).zip(amax).zip(inverse) {
        if (SMALLEST..=LARGEST).contains(&amax) {
            block.d = f32::from_bits(amax) * (1.0 / 127.0);
            block.sums = round_block(x, inverse, &mut block.q);
        } else {
            block.d = if amax < SMALLEST { 0.0 } else { f32::NAN };
            (block.sums, block.q) = ([0; 2], [0; 32]);
        }
    }
}

/// The bits of the largest magnitude, compared as integers.
#[inline]
#[target_feature(enable = "avx2")]
fn largest(x: &[f32; 32]) -> u32 {
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    // SAFETY: 32 floats are four times eight.
    let v =
        |i: usize| unsafe { _mm256_and_si256(_mm256_loadu_si256(x.as_ptr().add(8 * i).cast()), magnitude) };
    // Magnitudes are not negative, so signed comparison is right.
    let m = _mm256_max_epi32(_mm256_max_epi32(v(0), v(1)), _mm256_max_epi32(v(2), v(3)));
    let m = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256::<1>(m));
    let m = _mm_max_epi32(m, _mm_shuffle_epi32::<0b01_00_11_10>(m));
    let m = _mm_max_epi32(m, _mm_shuffle_epi32::<0b10_11_00_01>(m));
    _mm_cvtsi128_si32(m) as u32
}

/// `q = rint(x * inverse)`, all of it inside -127..=127; returns the sums of the two halves.
#[inline]
#[target_feature(enable = "avx2")]
fn round_block(x: &[f32; 32], inverse: f32, q: &mut [i8; 32]) -> [i16; 2] {
    let inverse = _mm256_set1_ps(inverse);
    // SAFETY: 32 floats are four times eight. The conversion rounds to nearest even, as Rust leaves the CPU set.
    let v = |i: usize| unsafe {
        _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x.as_ptr().add(8 * i)), inverse))
    };
    // Packing works inside 128-bit halves: quads come out as 0 2 4 6 1 3 5 7.
    let bytes = _mm256_packs_epi16(_mm256_packs_epi32(v(0), v(1)), _mm256_packs_epi32(v(2), v(3)));
    let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    // SAFETY: 32 bytes.
    unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), bytes) };
    let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
    let quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    let sum = |half: __m128i| {
        let half = _mm_add_epi32(half, _mm_shuffle_epi32::<0b01_00_11_10>(half));
        _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32::<0b10_11_00_01>(half))) as i16
    };
    [sum(_mm256_castsi256_si128(quads)), sum(_mm256_extracti128_si256::<1>(quads))]
}
