//! Eight rows in the 256-bit vectors of AVX2 with AVX-VNNI.

use std::arch::x86_64::*;

use super::{DotPanel, Lanes, Stored, Tokens, Values};
use crate::pack::{GroupShape, LANES};

/// AVX-VNNI with AVX2, FMA and F16C; only used where it was detected.
pub(crate) struct Ymm;

/// A shift count that the compiler knows, which makes the shift one instruction.
#[inline]
#[target_feature(enable = "sse2")]
fn count(bits: usize) -> __m128i {
    _mm_cvtsi32_si128(bits as i32)
}

impl Lanes for Ymm {
    type I = __m256i;
    type F = __m256;
    const LANES: usize = LANES;
    const TWO: bool = false;

    // SAFETY: the instructions are the caller's promise.
    #[target_feature(enable = "avxvnni,avx2,fma,f16c")]
    unsafe fn tile<F: Stored, const N: usize>(
        group: &[u8],
        shape: GroupShape,
        x: Tokens<'_>,
        place: usize,
        out: &mut [Values],
    ) {
        // SAFETY: the caller's promise, passed on.
        unsafe { super::tile::<Self, F, N>(group, shape, x, place, out) }
    }

    // SAFETY: the instructions are the caller's promise.
    #[target_feature(enable = "avxvnni,avx2,fma,f16c")]
    unsafe fn panel<F: Stored, const G: usize>(
        panel: &mut DotPanel,
        groups: &[u8],
        shape: GroupShape,
        x: Tokens<'_>,
        place: usize,
        out: &mut [Values],
    ) {
        // SAFETY: the caller's promise, passed on.
        unsafe { panel.run::<Self, F, G>(groups, shape, x, place, out) }
    }

    #[inline]
    fn ask_later(at: *const u8) {
        // SAFETY: a prefetch never faults, and every x86-64 CPU has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quad(at: *const i8) -> __m256i {
        // SAFETY: four bytes, by the caller's promise.
        _mm256_set1_epi32(unsafe { at.cast::<i32>().read_unaligned() })
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(at: *const u8) -> __m256i {
        // SAFETY: 32 bytes, by the caller's promise.
        unsafe { _mm256_loadu_si256(at.cast()) }
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store(v: __m256i, at: *mut u8) {
        // SAFETY: 32 bytes, by the caller's promise.
        unsafe { _mm256_storeu_si256(at.cast(), v) }
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn right(v: __m256i, bits: usize) -> __m256i {
        _mm256_srl_epi16(v, count(bits))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn left(v: __m256i, bits: usize) -> __m256i {
        _mm256_sll_epi16(v, count(bits))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn and(v: __m256i, mask: u8) -> __m256i {
        _mm256_and_si256(v, _mm256_set1_epi8(mask as i8))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn or_and(a: __m256i, b: __m256i, mask: u8) -> __m256i {
        _mm256_or_si256(a, _mm256_and_si256(b, _mm256_set1_epi8(mask as i8)))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn flip(v: __m256i) -> __m256i {
        _mm256_xor_si256(v, _mm256_set1_epi8(-128))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avxvnni")]
    unsafe fn dot(sum: __m256i, codes: __m256i, quad: __m256i) -> __m256i {
        _mm256_dpbusd_avx_epi32(sum, codes, quad)
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn pair_product(pair: [i16; 2], by: [i16; 2]) -> __m256i {
        let word = |[a, b]: [i16; 2]| i32::from(a as u16) | (i32::from(b) << 16);
        _mm256_madd_epi16(_mm256_set1_epi32(word(pair)), _mm256_set1_epi32(word(by)))
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn byte_pairs(at: *const u8) -> __m256i {
        // SAFETY: the caller's promise.
        _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(at.cast()) })
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn signed_byte_pairs(at: *const u8) -> __m256i {
        // SAFETY: the caller's promise.
        _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(at.cast()) })
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn first(pairs: __m256i) -> __m256 {
        _mm256_cvtepi32_ps(_mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(pairs)))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn second(pairs: __m256i) -> __m256 {
        _mm256_cvtepi32_ps(_mm256_srai_epi32::<16>(pairs))
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn halves(at: *const u8) -> __m256 {
        // SAFETY: the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn to_f32(v: __m256i) -> __m256 {
        _mm256_cvtepi32_ps(v)
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn splat(v: f32) -> __m256 {
        _mm256_set1_ps(v)
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_f32(at: *const f32) -> __m256 {
        // SAFETY: 8 values, by the caller's promise.
        unsafe { _mm256_loadu_ps(at) }
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store_f32(v: __m256, at: *mut f32) {
        // SAFETY: 8 places, by the caller's promise.
        unsafe { _mm256_storeu_ps(at, v) }
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn fnma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fnmadd_ps(a, b, c)
    }
}
