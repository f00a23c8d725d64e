//! The inner loops of attention for AVX2, FMA and F16C.
//!
//! Queries of a group share what is read of the keys and values: tiles of three queries by four keys, or by 32
//! dimensions of a value, whose sums are twelve registers.

// Tiles are indexed by query and key in several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use half::f16;

use super::{KvPage, Scores};
use crate::float::dot_f32;

/// f16 bits to f32, eight at a time. Meanwhile as much of the page that comes next is asked for: all of it at once would make
/// loads wait until memory has room for so many questions.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen(from: &[u16], to: &mut [f32], next: KvPage<'_>) {
    let next = match next {
        KvPage::F16(next) => next.as_ptr().cast::<i8>(),
        KvPage::F32(next) => next.as_ptr().cast::<i8>(),
    };
    let (from8, from_rest) = from.as_chunks::<8>();
    let (to8, to_rest) = to.as_chunks_mut::<8>();
    for (i, (to, from)) in to8.iter_mut().zip(from8).enumerate() {
        if i % 4 == 0 {
            // Never faults, also beyond the end.
            _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(16 * i));
        }
        // SAFETY: both are arrays of eight values; loads and stores have no alignment demand.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()))) };
    }
    for (to, from) in to_rest.iter_mut().zip(from_rest) {
        *to = f16::from_bits(*from).to_f32();
    }
}

/// The dots of the queries of a group with the keys of a tile.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn score_group(q: &[f32], keys: &[f32], scale: f32, scores: Scores<&mut [f32]>) {
    let Scores { values: scores, stride, count } = scores;
    let dim = keys.len() / count;
    if dim.is_multiple_of(16) {
        let (mut h, group) = (0, q.len() / dim);
        while h < group {
            let (q, scores) = (&q[h * dim..], &mut scores[h * stride..]);
            h += match group - h {
                1 => score_tiles::<1>(q, keys, dim, scale, scores, stride),
                2 => score_tiles::<2>(q, keys, dim, scale, scores, stride),
                _ => score_tiles::<3>(q, keys, dim, scale, scores, stride),
            };
        }
    }
    // What the tiles leave: other dimensions, and the last keys.
    let done = if dim.is_multiple_of(16) { count / 4 * 4 } else { 0 };
    for (h, q) in q.chunks_exact(dim).enumerate() {
        for (score, key) in
            scores[h * stride..][done..count].iter_mut().zip(keys.chunks_exact(dim).skip(done))
        {
            *score = dot_f32(q, key) * scale;
        }
    }
}

/// `H` queries by four keys at a time; returns `H`. `dim` is a multiple of 16.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn score_tiles<const H: usize>(
    q: &[f32],
    keys: &[f32],
    dim: usize,
    scale: f32,
    scores: &mut [f32],
    stride: usize,
) -> usize {
    assert!(q.len() >= H * dim);
    // No closures here or below: they would not have these CPU features, and be called.
    for (at, keys) in keys.chunks_exact(4 * dim).enumerate() {
        let mut dots = [_mm_setzero_ps(); H];
        for half in [0, 8] {
            let mut acc = [[_mm256_setzero_ps(); 4]; H];
            for d in (half..dim).step_by(16) {
                // SAFETY: `d + 8` values are inside each of `H` queries and four keys, which are `dim` long, a multiple
                // of 16.
                unsafe {
                    let mut eights = [_mm256_setzero_ps(); H];
                    for h in 0..H {
                        eights[h] = _mm256_loadu_ps(q.as_ptr().add(h * dim + d));
                    }
                    for j in 0..4 {
                        let key = _mm256_loadu_ps(keys.as_ptr().add(j * dim + d));
                        for h in 0..H {
                            acc[h][j] = _mm256_fmadd_ps(eights[h], key, acc[h][j]);
                        }
                    }
                }
            }
            for h in 0..H {
                // The tree over eight partial sums of four keys: pairs, fours, then the two halves of the register.
                let fours = _mm256_hadd_ps(
                    _mm256_hadd_ps(acc[h][0], acc[h][1]),
                    _mm256_hadd_ps(acc[h][2], acc[h][3]),
                );
                let sums = _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps::<1>(fours));
                dots[h] = if half == 0 { sums } else { _mm_add_ps(dots[h], sums) };
            }
        }
        for h in 0..H {
            let scores = &mut scores[h * stride + 4 * at..][..4];
            // SAFETY: four f32.
            unsafe { _mm_storeu_ps(scores.as_mut_ptr(), _mm_mul_ps(dots[h], _mm_set1_ps(scale))) };
        }
    }
    H
}

/// The weighted sums of a tile's values for all queries of a group, added to `out`, `[group, dim]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn weigh_group(p: Scores<&[f32]>, values: &[f32], dim: usize, out: &mut [f32]) {
    let (group, whole) = (out.len() / dim, dim / 8 * 8);
    assert!(values.len() >= p.count * dim && p.values.len() >= (group - 1) * p.stride + p.count);
    let mut h = 0;
    while h < group {
        let (from, out) = (&p.values[h * p.stride..], &mut out[h * dim..]);
        let (stride, count) = (p.stride, p.count);
        // SAFETY: lengths as asserted; there are at least as many queries as named.
        h += unsafe {
            match group - h {
                1 => weigh_tiles::<1>(from, stride, count, values, dim, out),
                2 => weigh_tiles::<2>(from, stride, count, values, dim, out),
                _ => weigh_tiles::<3>(from, stride, count, values, dim, out),
            }
        };
    }
    for (h, out) in out.chunks_exact_mut(dim).enumerate() {
        let p = &p.values[h * p.stride..][..p.count];
        for (i, o) in out.iter_mut().enumerate().skip(whole) {
            *o += p.iter().zip(values.chunks_exact(dim)).fold(0.0, |s, (p, row)| p.mul_add(row[i], s));
        }
    }
}

/// `H` queries by 32 dimensions at a time, then by 8; returns `H`.
///
/// # Safety
/// `p` has `count` weights from each `h * stride` on, `values` `count` rows of `dim`, `out` `H` rows.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn weigh_tiles<const H: usize>(
    p: &[f32],
    stride: usize,
    count: usize,
    values: &[f32],
    dim: usize,
    out: &mut [f32],
) -> usize {
    let mut d = 0;
    // SAFETY: `d + width <= dim`, and the caller's promise.
    unsafe {
        while d + 32 <= dim {
            weigh_tile::<H, 4>(p, stride, count, &values[d..], dim, &mut out[d..]);
            d += 32;
        }
        while d + 8 <= dim {
            weigh_tile::<H, 1>(p, stride, count, &values[d..], dim, &mut out[d..]);
            d += 8;
        }
    }
    H
}

/// `8 * W` dimensions of `H` queries.
///
/// # Safety
/// As [`weigh_tiles`]; `8 * W` dimensions are left.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn weigh_tile<const H: usize, const W: usize>(
    p: &[f32],
    stride: usize,
    count: usize,
    values: &[f32],
    dim: usize,
    out: &mut [f32],
) {
    let mut sums = [[_mm256_setzero_ps(); W]; H];
    // SAFETY: inside what the caller promises.
    unsafe {
        for j in 0..count {
            // Twelve sums, three weights and one register for the values: all there are.
            let mut weights = [_mm256_setzero_ps(); H];
            for h in 0..H {
                weights[h] = _mm256_set1_ps(*p.get_unchecked(h * stride + j));
            }
            for w in 0..W {
                let row = _mm256_loadu_ps(values.as_ptr().add(j * dim + 8 * w));
                for h in 0..H {
                    sums[h][w] = _mm256_fmadd_ps(weights[h], row, sums[h][w]);
                }
            }
        }
        for h in 0..H {
            for w in 0..W {
                let out = out.as_mut_ptr().add(h * dim + 8 * w);
                _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sums[h][w]));
            }
        }
    }
}
