//! The inner loops of attention for AVX2, FMA and F16C.

use std::arch::x86_64::*;

use half::f16;

use crate::avx2::tree;
use crate::float::dot_f32;

/// f16 bits to f32, eight at a time.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen(from: &[u16], to: &mut [f32]) {
    let (from8, from_rest) = from.as_chunks::<8>();
    let (to8, to_rest) = to.as_chunks_mut::<8>();
    for (to, from) in to8.iter_mut().zip(from8) {
        // SAFETY: both are arrays of eight values; loads and stores have no alignment demand.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()))) };
    }
    for (to, from) in to_rest.iter_mut().zip(from_rest) {
        *to = f16::from_bits(*from).to_f32();
    }
}

/// The dots of one query with the keys of a tile, four keys at a time: the 16 partial sums of each in two registers.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn score(q: &[f32], keys: &[f32], scale: f32, scores: &mut [f32]) {
    let dim = q.len();
    if !dim.is_multiple_of(16) {
        for (s, k) in scores.iter_mut().zip(keys.chunks_exact(dim)) {
            *s = dot_f32(q, k) * scale;
        }
        return;
    }
    assert_eq!(keys.len(), scores.len() * dim);
    let (fours, rest) = scores.as_chunks_mut::<4>();
    let done = fours.len() * 4;
    for (at, four) in fours.iter_mut().enumerate() {
        let keys: [&[f32]; 4] = std::array::from_fn(|i| &keys[(4 * at + i) * dim..][..dim]);
        // SAFETY: four rows of `dim` values each.
        let sums = unsafe { partial_sums(q, keys) };
        // Two trees at once: pairs within a key, then pairs of keys side by side.
        let pair = |a: [__m256; 2], b: [__m256; 2]| {
            let quads = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(b[0], b[1]));
            _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps::<1>(quads))
        };
        let dots = _mm_hadd_ps(pair(sums[0], sums[1]), pair(sums[2], sums[3]));
        // SAFETY: `four` is four f32.
        unsafe { _mm_storeu_ps(four.as_mut_ptr(), _mm_mul_ps(dots, _mm_set1_ps(scale))) };
    }
    for (i, s) in rest.iter_mut().enumerate() {
        // SAFETY: one row of `dim` values.
        let [sums] = unsafe { partial_sums(q, [&keys[(done + i) * dim..][..dim]]) };
        *s = tree(sums) * scale;
    }
}

/// The 16 partial sums of `K` dots with one query.
///
/// # Safety
/// Every key is as long as `q`, a multiple of 16.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn partial_sums<const K: usize>(q: &[f32], keys: [&[f32]; K]) -> [[__m256; 2]; K] {
    let mut sums = [[_mm256_setzero_ps(); 2]; K];
    for d in (0..q.len()).step_by(16) {
        // SAFETY: `d + 16` values are inside `q` and each key.
        unsafe {
            let (q0, q1) = (_mm256_loadu_ps(q.as_ptr().add(d)), _mm256_loadu_ps(q.as_ptr().add(d + 8)));
            for (sums, key) in sums.iter_mut().zip(&keys) {
                sums[0] = _mm256_fmadd_ps(q0, _mm256_loadu_ps(key.as_ptr().add(d)), sums[0]);
                sums[1] = _mm256_fmadd_ps(q1, _mm256_loadu_ps(key.as_ptr().add(d + 8)), sums[1]);
            }
        }
    }
    sums
}

/// The weighted sum of a tile's values; 64, 32 or 8 dimensions at a time stay in registers.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn weigh(p: &[f32], values: &[f32], tile: &mut [f32]) {
    let dim = tile.len();
    assert!(values.len() >= p.len() * dim);
    let mut d = 0;
    // SAFETY: `d + width` stays within `dim`, and there is a row of `dim` values for each weight.
    unsafe {
        while d + 64 <= dim {
            columns::<8>(p, values, tile, d);
            d += 64;
        }
        while d + 32 <= dim {
            columns::<4>(p, values, tile, d);
            d += 32;
        }
        while d + 8 <= dim {
            columns::<1>(p, values, tile, d);
            d += 8;
        }
    }
    for (i, t) in tile.iter_mut().enumerate().skip(d) {
        *t = p.iter().zip(values.chunks_exact(dim)).fold(0.0, |s, (p, row)| p.mul_add(row[i], s));
    }
}

/// Dimensions `d .. d + 8 * W` of the weighted sum.
///
/// # Safety
/// `d + 8 * W <= tile.len()`, and `values` has a row of `tile.len()` values for each weight.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn columns<const W: usize>(p: &[f32], values: &[f32], tile: &mut [f32], d: usize) {
    let dim = tile.len();
    let mut sums = [_mm256_setzero_ps(); W];
    for (j, p) in p.iter().enumerate() {
        let p = _mm256_set1_ps(*p);
        for (w, sum) in sums.iter_mut().enumerate() {
            // SAFETY: inside row `j`, as the caller promises.
            *sum = unsafe {
                _mm256_fmadd_ps(p, _mm256_loadu_ps(values.as_ptr().add(j * dim + d + 8 * w)), *sum)
            };
        }
    }
    for (w, sum) in sums.iter().enumerate() {
        // SAFETY: inside `tile`, as the caller promises.
        unsafe { _mm256_storeu_ps(tile.as_mut_ptr().add(d + 8 * w), *sum) };
    }
}
