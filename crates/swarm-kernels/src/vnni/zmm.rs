//! Sixteen rows in the 512-bit vectors of AVX-512 F, BW, VL and VNNI.

use std::arch::x86_64::*;

use super::{DotPanel, Lanes, ROWS, Stored, Tokens, Values};
use crate::pack::GroupShape;

/// AVX-512; only used where it was detected.
pub(crate) struct Zmm;

/// A shift count that the compiler knows, which makes the shift one instruction.
#[inline]
#[target_feature(enable = "sse2")]
fn count(bits: usize) -> __m128i {
    _mm_cvtsi32_si128(bits as i32)
}

impl Lanes for Zmm {
    type I = __m512i;
    type F = __m512;
    const LANES: usize = ROWS;
    const TWO: bool = true;

    // SAFETY: the instructions are the caller's promise.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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
    #[target_feature(enable = "avx512f")]
    unsafe fn quad(at: *const i8) -> __m512i {
        // SAFETY: four bytes, by the caller's promise.
        _mm512_set1_epi32(unsafe { at.cast::<i32>().read_unaligned() })
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(at: *const u8) -> __m512i {
        // SAFETY: 64 bytes, by the caller's promise.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(v: __m512i, at: *mut u8) {
        // SAFETY: 64 bytes, by the caller's promise.
        unsafe { _mm512_storeu_si512(at.cast(), v) }
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512bw")]
    unsafe fn right(v: __m512i, bits: usize) -> __m512i {
        _mm512_srl_epi16(v, count(bits))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512bw")]
    unsafe fn left(v: __m512i, bits: usize) -> __m512i {
        _mm512_sll_epi16(v, count(bits))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn and(v: __m512i, mask: u8) -> __m512i {
        _mm512_and_si512(v, _mm512_set1_epi8(mask as i8))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn or_and(a: __m512i, b: __m512i, mask: u8) -> __m512i {
        // Bit 4a + 2b + c of the table: a | (b & c).
        _mm512_ternarylogic_epi32::<0b1111_1000>(a, b, _mm512_set1_epi8(mask as i8))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn flip(v: __m512i) -> __m512i {
        _mm512_xor_si512(v, _mm512_set1_epi8(-128))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512vnni")]
    unsafe fn dot(sum: __m512i, codes: __m512i, quad: __m512i) -> __m512i {
        _mm512_dpbusd_epi32(sum, codes, quad)
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512bw")]
    unsafe fn pair_product(pair: [i16; 2], by: [i16; 2]) -> __m512i {
        let word = |[a, b]: [i16; 2]| i32::from(a as u16) | (i32::from(b) << 16);
        _mm512_madd_epi16(_mm512_set1_epi32(word(pair)), _mm512_set1_epi32(word(by)))
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512bw,avx2")]
    unsafe fn byte_pairs(at: *const u8) -> __m512i {
        // SAFETY: 32 bytes, by the caller's promise.
        _mm512_cvtepu8_epi16(unsafe { _mm256_loadu_si256(at.cast()) })
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512bw,avx2")]
    unsafe fn signed_byte_pairs(at: *const u8) -> __m512i {
        // SAFETY: 32 bytes, by the caller's promise.
        _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(at.cast()) })
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn first(pairs: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(_mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(pairs)))
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn second(pairs: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(_mm512_srai_epi32::<16>(pairs))
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f,avx2")]
    unsafe fn halves(at: *const u8) -> __m512 {
        // SAFETY: 32 bytes, by the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn to_f32(v: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(v)
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn splat(v: f32) -> __m512 {
        _mm512_set1_ps(v)
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_f32(at: *const f32) -> __m512 {
        // SAFETY: 16 values, by the caller's promise.
        unsafe { _mm512_loadu_ps(at) }
    }

    // SAFETY: instructions and memory are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_f32(v: __m512, at: *mut f32) {
        // SAFETY: 16 places, by the caller's promise.
        unsafe { _mm512_storeu_ps(at, v) }
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }

    // SAFETY: the instructions are the caller's promise.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn fnma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fnmadd_ps(a, b, c)
    }
}
