//! The inner loops of attention for AVX-512.
//!
//! Keys and values are widened as they are read: keys for up to four queries of a group, values for up to eight. Sixteen registers are the sums of a
//! tile: of `H` queries by `16 / H` keys, each register the 16 partial sums of a dot; or of `H` queries by `16 / H` times
//! 16 dimensions of a value, 4 at most.

// Tiles are indexed by query and key in several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{KvPage, Scores, f16_to_f32, wide};
use crate::avx512_float::even_plus_odd;
use crate::float::dot_f32;

/// Sums of a tile.
const SUMS: usize = 16;

/// What of keys or values is read: the address of the first one.
#[derive(Clone, Copy)]
struct Rows(*const u8);

impl Rows {
    /// Values `at .. at + 16` as f32.
    ///
    /// # Safety
    /// They are there, and stored as f16 if `HALF`, else as f32.
    #[inline]
    #[target_feature(enable = "avx512f,avx2")]
    unsafe fn load<const HALF: bool>(self, at: usize) -> __m512 {
        // SAFETY: the caller's promise; loads have no alignment demand.
        unsafe {
            if HALF {
                _mm512_cvtph_ps(_mm256_loadu_si256(self.0.add(2 * at).cast()))
            } else {
                _mm512_loadu_ps(self.0.add(4 * at).cast())
            }
        }
    }
}

/// Asks for the lines of `bytes` bytes from byte `at` on of the page that comes next.
#[inline]
#[target_feature(enable = "avx512f")]
fn ask_ahead(next: Rows, at: usize, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        // Never faults, also beyond the end.
        _mm_prefetch::<_MM_HINT_T1>(next.0.wrapping_add(at + line).cast());
    }
}

/// Whether the rows are f16, where they begin, and how many values they are.
fn parts(page: KvPage<'_>) -> (bool, Rows, usize) {
    match page {
        KvPage::F16(rows) => (true, Rows(rows.as_ptr().cast()), rows.len()),
        KvPage::F32(rows) => (false, Rows(rows.as_ptr().cast()), rows.len()),
    }
}

/// From row `row` on.
fn from_row(page: KvPage<'_>, row: usize, dim: usize) -> KvPage<'_> {
    match page {
        KvPage::F16(rows) => KvPage::F16(&rows[row * dim..]),
        KvPage::F32(rows) => KvPage::F32(&rows[row * dim..]),
    }
}

/// The dots of the queries of a group with the keys of a tile.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
pub(super) fn score(
    q: &[f32],
    [page, next]: [KvPage<'_>; 2],
    scale: f32,
    scores: Scores<&mut [f32]>,
    store: &mut [f32],
) {
    let Scores { values: scores, stride, count } = scores;
    let ((half, keys, len), (_, next, _)) = (parts(page), parts(next));
    let dim = len / count;
    let group = q.len() / dim;
    assert!(scores.len() >= (group - 1) * stride + count);
    let mut h = 0;
    while h < group {
        let keys = [keys, if h == 0 { next } else { keys }];
        let (q, scores) = (&q[h * dim..], &mut scores[h * stride..]);
        let (queries, done) = if dim.is_multiple_of(16) {
            // SAFETY: `count` keys of `dim` values, stored as `half` says; there are as many queries as named.
            unsafe {
                match (group - h, half) {
                    (4.., true) => score_tiles::<4, true>(q, keys, dim, scale, scores, stride, count),
                    (4.., false) => score_tiles::<4, false>(q, keys, dim, scale, scores, stride, count),
                    (2.., true) => score_tiles::<2, true>(q, keys, dim, scale, scores, stride, count),
                    (2.., false) => score_tiles::<2, false>(q, keys, dim, scale, scores, stride, count),
                    (_, true) => score_tiles::<1, true>(q, keys, dim, scale, scores, stride, count),
                    (_, false) => score_tiles::<1, false>(q, keys, dim, scale, scores, stride, count),
                }
            }
        } else {
            (1, 0)
        };
        // What the tiles leave: other dimensions, and the last keys.
        let keys = wide(from_row(page, done, dim), store, f16_to_f32);
        for (h, q) in q.chunks_exact(dim).enumerate().take(queries) {
            for (score, key) in scores[h * stride..][done..count].iter_mut().zip(keys.chunks_exact(dim)) {
                *score = dot_f32(q, key) * scale;
            }
        }
        h += queries;
    }
}

/// `H` queries by `16 / H` keys at a time; returns `H` and how many keys these were. `dim` is a multiple of 16.
///
/// # Safety
/// `count` keys of `dim` values, f16 if `HALF`; `H` queries.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn score_tiles<const H: usize, const HALF: bool>(
    q: &[f32],
    [keys, next]: [Rows; 2],
    dim: usize,
    scale: f32,
    scores: &mut [f32],
    stride: usize,
    count: usize,
) -> (usize, usize) {
    assert!(q.len() >= H * dim);
    let wide = SUMS / H;
    for first in (0..count / wide * wide).step_by(wide) {
        let row = dim * if HALF { 2 } else { 4 };
        ask_ahead(next, first * row, wide * row);
        // By query, then by key.
        let mut acc = [_mm512_setzero_ps(); SUMS];
        for d in (0..dim).step_by(16) {
            // No closures here or below: they would not have these CPU features, and be called.
            // SAFETY: `d + 16` values are inside each of the queries and keys.
            unsafe {
                let mut queries = [_mm512_setzero_ps(); H];
                for h in 0..H {
                    queries[h] = _mm512_loadu_ps(q.as_ptr().add(h * dim + d));
                }
                for j in 0..wide {
                    let key = keys.load::<HALF>((first + j) * dim + d);
                    for h in 0..H {
                        acc[h * wide + j] = _mm512_fmadd_ps(queries[h], key, acc[h * wide + j]);
                    }
                }
            }
        }
        let mut values = [0.0f32; SUMS];
        // SAFETY: sixteen f32.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), _mm512_mul_ps(trees(&acc), _mm512_set1_ps(scale))) };
        for h in 0..H {
            for j in 0..wide {
                scores[h * stride + first + j] = values[h * wide + j];
            }
        }
    }
    (H, count / wide * wide)
}

/// The contract's tree over the 16 partial sums of 16 dots.
#[inline]
#[target_feature(enable = "avx512f")]
fn trees(acc: &[__m512; SUMS]) -> __m512 {
    // Sums of four partial sums of four dots, four times.
    let mut fours = [_mm512_setzero_ps(); 4];
    for (four, [a, b, c, d]) in fours.iter_mut().zip(acc.as_chunks::<4>().0) {
        *four = even_plus_odd(even_plus_odd(*a, *b), even_plus_odd(*c, *d));
    }
    let eights = [first_plus_second(fours[0], fours[1]), first_plus_second(fours[2], fours[3])];
    first_plus_second(eights[0], eights[1])
}

/// Of 128-bit parts: `a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]`.
#[inline]
#[target_feature(enable = "avx512f")]
fn first_plus_second(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
}

/// The weighted sums of a tile's values for all queries of a group, added to `out`, `[group, dim]`.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
pub(super) fn weigh(
    p: Scores<&[f32]>,
    [page, next]: [KvPage<'_>; 2],
    dim: usize,
    out: &mut [f32],
    store: &mut [f32],
) {
    let ((half, values, len), (_, next, _)) = (parts(page), parts(next));
    let (group, whole) = (out.len() / dim, dim / 16 * 16);
    assert!(len >= p.count * dim && p.values.len() >= (group - 1) * p.stride + p.count);
    let mut h = 0;
    while h < group {
        let values = [values, if h == 0 { next } else { values }];
        let (from, out) = (&p.values[h * p.stride..], &mut out[h * dim..]);
        let (stride, count) = (p.stride, p.count);
        // SAFETY: lengths as asserted; there are at least as many queries as named.
        h += unsafe {
            match (group - h, half) {
                (8.., true) => weigh_tiles::<8, 2, true>(from, stride, count, values, dim, out),
                (8.., false) => weigh_tiles::<8, 2, false>(from, stride, count, values, dim, out),
                (4.., true) => weigh_tiles::<4, 4, true>(from, stride, count, values, dim, out),
                (4.., false) => weigh_tiles::<4, 4, false>(from, stride, count, values, dim, out),
                (2.., true) => weigh_tiles::<2, 4, true>(from, stride, count, values, dim, out),
                (2.., false) => weigh_tiles::<2, 4, false>(from, stride, count, values, dim, out),
                (_, true) => weigh_tiles::<1, 4, true>(from, stride, count, values, dim, out),
                (_, false) => weigh_tiles::<1, 4, false>(from, stride, count, values, dim, out),
            }
        };
    }
    if whole == dim {
        return;
    }
    let values = wide(page, store, f16_to_f32);
    for (h, out) in out.chunks_exact_mut(dim).enumerate() {
        let p = &p.values[h * p.stride..][..p.count];
        for (i, o) in out.iter_mut().enumerate().skip(whole) {
            *o += p.iter().zip(values.chunks_exact(dim)).fold(0.0, |s, (p, row)| p.mul_add(row[i], s));
        }
    }
}

/// `H` queries by `16 * W` dimensions at a time, then by 16; returns `H`.
///
/// # Safety
/// `p` has `count` weights from each `h * stride` on, `values` `count` rows of `dim`, f16 if `HALF`, `out` `H` rows.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn weigh_tiles<const H: usize, const W: usize, const HALF: bool>(
    p: &[f32],
    stride: usize,
    count: usize,
    values: [Rows; 2],
    dim: usize,
    out: &mut [f32],
) -> usize {
    let mut d = 0;
    // SAFETY: `d + width <= dim`, and the caller's promise.
    unsafe {
        while d + 16 * W <= dim {
            weigh_tile::<H, W, HALF>(p, stride, count, values, dim, d, out);
            d += 16 * W;
        }
        while d + 16 <= dim {
            weigh_tile::<H, 1, HALF>(p, stride, count, values, dim, d, out);
            d += 16;
        }
    }
    H
}

/// `16 * W` dimensions from `d` on of `H` queries.
///
/// # Safety
/// As [`weigh_tiles`]; `16 * W` dimensions are left.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn weigh_tile<const H: usize, const W: usize, const HALF: bool>(
    p: &[f32],
    stride: usize,
    count: usize,
    [values, next]: [Rows; 2],
    dim: usize,
    d: usize,
    out: &mut [f32],
) {
    let mut sums = [[_mm512_setzero_ps(); W]; H];
    // SAFETY: inside what the caller promises.
    unsafe {
        for j in 0..count {
            let size = if HALF { 2 } else { 4 };
            ask_ahead(next, (j * dim + d) * size, 16 * W * size);
            let mut row = [_mm512_setzero_ps(); W];
            for w in 0..W {
                row[w] = values.load::<HALF>(j * dim + d + 16 * w);
            }
            for h in 0..H {
                let weight = _mm512_set1_ps(*p.get_unchecked(h * stride + j));
                for w in 0..W {
                    sums[h][w] = _mm512_fmadd_ps(weight, row[w], sums[h][w]);
                }
            }
        }
        for h in 0..H {
            for w in 0..W {
                let out = out.as_mut_ptr().add(h * dim + d + 16 * w);
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sums[h][w]));
            }
        }
    }
}
