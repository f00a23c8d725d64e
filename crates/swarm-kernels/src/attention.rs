//! Attention of one position over the pages of a KV cache.
//!
//! The order of every sum is fixed by absolute positions, so neither the chunking of the prompt nor the batch shows:
//!
//! 1. `s_j = dot(q, k_j) * scale`, the dot in 16 partial sums.
//! 2. `m = max s_j` (exact), `p_j = exp(s_j - m)`.
//! 3. Tiles of 64 positions aligned to absolute position. Inside a tile, `o_t[d]` is the sum of `p_j * v_j[d]` by
//!    FMA in order of `j`, and `l_t` the sum of `p_j` in 16 partial sums by `j mod 16`. Both start from 0.0.
//! 4. Tiles are added in order: `o[d] = sum o_t[d]`, `l = sum l_t`; the result is `o[d] * recip(l)`.
//!
//! Tiles are independent until step 4, so that a GPU can give each to a workgroup.

use std::ops::Range;

use half::f16;

use crate::KernelPath;
use crate::float::dot_f32;
use crate::math::{exp, recip, tree16};

/// Positions in a KV page, and in a tile of the reduction.
pub const TILE: usize = 64;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    F16,
    F32,
}

impl KvType {
    /// Bytes of one value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Keys or values of one kv head for the 64 positions of a tile: `[TILE, head_dim]`.
#[derive(Clone, Copy)]
pub enum KvPage<'a> {
    /// f16 bits.
    F16(&'a [u16]),
    F32(&'a [f32]),
}

/// Buffers attention reuses from call to call; one per thread.
#[derive(Default)]
pub struct AttentionScratch {
    /// Scores of the attended positions, `[group, positions]`.
    scores: Vec<f32>,
    /// One tile's page as f32, and one tile's sums.
    page: Vec<f32>,
    tile: Vec<f32>,
}

/// Attention of the query heads that share one kv head, for one position.
///
/// `q` and `out` are `[group, head_dim]`. `positions` are the absolute positions attended (all up to and including
/// the query's own, or the last `window` of them); never empty. `page(t)` gives the keys and the values of
/// positions `64 t .. 64 t + 64`, of which only the attended ones are read.
///
/// # Panics
/// When a length does not fit: the shapes come from a checked configuration.
pub fn attention<'a>(
    q: &[f32],
    head_dim: usize,
    scale: f32,
    positions: Range<usize>,
    page: &dyn Fn(usize) -> (KvPage<'a>, KvPage<'a>),
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    assert!(
        !positions.is_empty() && q.len() == out.len() && q.len().is_multiple_of(head_dim),
        "attention: shapes"
    );
    attention_on(KernelPath::current(), q, head_dim, scale, positions, page, scratch, out);
}

/// [`attention`] with the kernels named; `path` is available.
#[allow(clippy::too_many_arguments)]
fn attention_on<'a>(
    path: KernelPath,
    q: &[f32],
    head_dim: usize,
    scale: f32,
    positions: Range<usize>,
    page: &dyn Fn(usize) -> (KvPage<'a>, KvPage<'a>),
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    match path {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a path is available only where its instructions were detected.
        KernelPath::Avx512 => unsafe {
            attention_avx512(q, head_dim, scale, positions, page, scratch, out);
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; here AVX2, FMA and F16C.
        path if path.has_avx2() => unsafe {
            attention_avx2(q, head_dim, scale, positions, page, scratch, out);
        },
        #[cfg(target_arch = "aarch64")]
        path if path != KernelPath::Scalar => {
            attention_body::<Neon>(q, head_dim, scale, positions, page, scratch, out);
        }
        _ => attention_body::<Scalar>(q, head_dim, scale, positions, page, scratch, out),
    }
}

/// The inner loops. Here is their definition; each path has its own.
trait Inner {
    /// f16 bits to f32.
    #[inline(always)]
    fn widen(from: &[u16], to: &mut [f32]) {
        f16_to_f32(from, to);
    }

    /// `scores[j] = dot(q, keys[j]) * scale`; `keys` is `[scores.len(), q.len()]`.
    #[inline(always)]
    fn score(q: &[f32], keys: &[f32], scale: f32, scores: &mut [f32]) {
        for (s, k) in scores.iter_mut().zip(keys.chunks_exact(q.len())) {
            *s = dot_f32(q, k) * scale;
        }
    }

    /// `tile[d] = sum over j of p[j] * values[j, d]`, by FMA in order of `j`, from 0.0.
    #[inline(always)]
    fn weigh(p: &[f32], values: &[f32], tile: &mut [f32]) {
        let head_dim = tile.len();
        tile.fill(0.0);
        for (p, row) in p.iter().zip(values.chunks_exact(head_dim)) {
            for (t, v) in tile.iter_mut().zip(row) {
                *t = p.mul_add(*v, *t);
            }
        }
    }

    /// [`Inner::score`] for the queries of a group, `head_dim` values each; those of query `h` go to
    /// `scores[h * stride..]`, `count` of them.
    #[inline(always)]
    fn score_group(q: &[f32], keys: &[f32], scale: f32, scores: Scores<&mut [f32]>) {
        let Scores { values: scores, stride, count } = scores;
        for (h, q) in q.chunks_exact(keys.len() / count).enumerate() {
            Self::score(q, keys, scale, &mut scores[h * stride..][..count]);
        }
    }

    /// [`Inner::weigh`] for the queries of a group, added to `out`, `[group, head_dim]`. `tile` has `head_dim` places.
    #[inline(always)]
    fn weigh_group(p: Scores<&[f32]>, values: &[f32], tile: &mut [f32], out: &mut [f32]) {
        for (h, out) in out.chunks_exact_mut(tile.len()).enumerate() {
            Self::weigh(&p.values[h * p.stride..][..p.count], values, tile);
            for (o, t) in out.iter_mut().zip(tile.iter()) {
                *o += t;
            }
        }
    }

    /// [`Inner::score_group`] with the keys as they are stored, `[count, head_dim]`, while the page behind them comes from
    /// memory; `store` is for them as f32.
    #[inline(always)]
    fn score_stored(
        q: &[f32],
        keys: [KvPage<'_>; 2],
        scale: f32,
        scores: Scores<&mut [f32]>,
        store: &mut [f32],
    ) {
        Self::score_group(q, Self::wide(keys, store), scale, scores);
    }

    /// [`Inner::weigh_group`] with the values as they are stored, as [`Inner::score_stored`].
    #[inline(always)]
    fn weigh_stored(
        p: Scores<&[f32]>,
        values: [KvPage<'_>; 2],
        tile: &mut [f32],
        out: &mut [f32],
        store: &mut [f32],
    ) {
        Self::weigh_group(p, Self::wide(values, store), tile, out);
    }

    /// A page as f32: borrowed, or widened into `store`. The second one comes next.
    #[inline(always)]
    fn wide<'a>([page, _]: [KvPage<'a>; 2], store: &'a mut [f32]) -> &'a [f32] {
        wide(page, store, Self::widen)
    }
}

/// Scores of the `count` attended positions of one tile; those of the next query of the group begin `stride` further on.
struct Scores<T> {
    values: T,
    stride: usize,
    count: usize,
}

/// The definition, as it stands.
struct Scalar;

impl Inner for Scalar {}

/// AVX2, FMA and F16C; only used where they were detected.
#[cfg(target_arch = "x86_64")]
struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Inner for Avx2 {
    #[inline(always)]
    fn wide<'a>([page, next]: [KvPage<'a>; 2], store: &'a mut [f32]) -> &'a [f32] {
        wide(page, store, |from, to| {
            // SAFETY: this type is only used where AVX2, FMA and F16C were detected.
            unsafe { avx2::widen(from, to, next) }
        })
    }

    #[inline(always)]
    fn score_group(q: &[f32], keys: &[f32], scale: f32, scores: Scores<&mut [f32]>) {
        // SAFETY: as above.
        unsafe { avx2::score_group(q, keys, scale, scores) }
    }

    #[inline(always)]
    fn weigh_group(p: Scores<&[f32]>, values: &[f32], tile: &mut [f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { avx2::weigh_group(p, values, tile.len(), out) }
    }
}

/// AVX-512 F with BW and VL, AVX2, FMA and F16C; only used where they were detected.
#[cfg(target_arch = "x86_64")]
struct Avx512;

#[cfg(target_arch = "x86_64")]
impl Inner for Avx512 {
    #[inline(always)]
    fn score_stored(
        q: &[f32],
        keys: [KvPage<'_>; 2],
        scale: f32,
        scores: Scores<&mut [f32]>,
        store: &mut [f32],
    ) {
        // SAFETY: this type is only used where these instructions were detected.
        unsafe { avx512::score(q, keys, scale, scores, store) }
    }

    #[inline(always)]
    fn weigh_stored(
        p: Scores<&[f32]>,
        values: [KvPage<'_>; 2],
        tile: &mut [f32],
        out: &mut [f32],
        store: &mut [f32],
    ) {
        // SAFETY: as above.
        unsafe { avx512::weigh(p, values, tile.len(), out, store) }
    }
}

/// NEON, which every AArch64 CPU has.
#[cfg(target_arch = "aarch64")]
struct Neon;

#[cfg(target_arch = "aarch64")]
impl Inner for Neon {
    #[inline(always)]
    fn widen(from: &[u16], to: &mut [f32]) {
        crate::neon::attention::widen::<crate::neon::Baseline>(from, to);
    }

    #[inline(always)]
    fn score(q: &[f32], keys: &[f32], scale: f32, scores: &mut [f32]) {
        crate::neon::attention::score::<crate::neon::Baseline>(q, keys, scale, scores);
    }

    #[inline(always)]
    fn weigh(p: &[f32], values: &[f32], tile: &mut [f32]) {
        crate::neon::attention::weigh::<crate::neon::Baseline>(p, values, tile);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn attention_avx2<'a>(
    q: &[f32],
    head_dim: usize,
    scale: f32,
    positions: Range<usize>,
    page: &dyn Fn(usize) -> (KvPage<'a>, KvPage<'a>),
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    attention_body::<Avx2>(q, head_dim, scale, positions, page, scratch, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn attention_avx512<'a>(
    q: &[f32],
    head_dim: usize,
    scale: f32,
    positions: Range<usize>,
    page: &dyn Fn(usize) -> (KvPage<'a>, KvPage<'a>),
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    attention_body::<Avx512>(q, head_dim, scale, positions, page, scratch, out);
}

#[inline(always)]
fn attention_body<'a, I: Inner>(
    q: &[f32],
    head_dim: usize,
    scale: f32,
    positions: Range<usize>,
    page: &dyn Fn(usize) -> (KvPage<'a>, KvPage<'a>),
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let (count, group) = (positions.len(), q.len() / head_dim);
    scratch.scores.resize(group * count, 0.0);
    scratch.page.resize(TILE * head_dim, 0.0);
    scratch.tile.resize(head_dim, 0.0);
    let AttentionScratch { scores, page: page_f32, tile } = scratch;
    let tiles =
        || (positions.start / TILE..=(positions.end - 1) / TILE).map(|t| (t, attended(t, &positions)));

    // The page behind a tile; behind the last one itself again, which is there.
    let next = |t: usize, range: &Range<usize>| page(if range.end < positions.end { t + 1 } else { t });
    for (t, range) in tiles() {
        let keys = [rows_of(page(t).0, t, &range, head_dim), next(t, &range).0];
        let scores = &mut scores[range.start - positions.start..];
        let scores = Scores { values: scores, stride: count, count: range.len() };
        I::score_stored(q, keys, scale, scores, page_f32);
    }
    let mut totals = [0.0f32; MAX_GROUP];
    assert!(group <= MAX_GROUP, "attention: {group} query heads on one kv head");
    for (scores, total) in scores[..group * count].chunks_exact_mut(count).zip(&mut totals) {
        let max = largest(scores);
        scores.iter_mut().for_each(|s| *s = exp(*s - max));
        *total = tiles().fold(0.0, |sum, (_, range)| {
            sum + tile_sum(&scores[range.start - positions.start..][..range.len()], range.start)
        });
    }
    out.fill(0.0);
    for (t, range) in tiles() {
        let values = [rows_of(page(t).1, t, &range, head_dim), next(t, &range).1];
        let scores = &scores[range.start - positions.start..];
        let scores = Scores { values: scores, stride: count, count: range.len() };
        I::weigh_stored(scores, values, tile, out, page_f32);
    }
    for (out, total) in out.chunks_exact_mut(head_dim).zip(totals) {
        let inverse = recip(total);
        out.iter_mut().for_each(|o| *o *= inverse);
    }
}

/// Query heads that may share one kv head.
pub const MAX_GROUP: usize = 64;

/// Attended positions of tile `t`.
#[inline(always)]
fn attended(t: usize, positions: &Range<usize>) -> Range<usize> {
    positions.start.max(t * TILE)..positions.end.min((t + 1) * TILE)
}

/// Rows `range` of tile `t`.
#[inline(always)]
fn rows_of<'a>(page: KvPage<'a>, t: usize, range: &Range<usize>, head_dim: usize) -> KvPage<'a> {
    let rows = (range.start - t * TILE) * head_dim..(range.end - t * TILE) * head_dim;
    match page {
        KvPage::F32(page) => KvPage::F32(&page[rows]),
        KvPage::F16(page) => KvPage::F16(&page[rows]),
    }
}

/// Rows as f32: borrowed, or widened into `store`.
#[inline(always)]
fn wide<'a>(rows: KvPage<'a>, store: &'a mut [f32], widen: impl Fn(&[u16], &mut [f32])) -> &'a [f32] {
    match rows {
        KvPage::F32(rows) => rows,
        KvPage::F16(rows) => {
            let store = &mut store[..rows.len()];
            widen(rows, store);
            store
        }
    }
}

/// Sum of the weights of one tile: partial sum `j mod 16` by absolute position `j`.
#[inline(always)]
fn tile_sum(p: &[f32], first: usize) -> f32 {
    let mut partial = [0.0f32; 16];
    // Up to the first position that belongs to partial sum 0, then sixteen at a time, in lanes.
    let (begin, p) = p.split_at((first.wrapping_neg() % 16).min(p.len()));
    for (i, p) in begin.iter().enumerate() {
        partial[(first + i) % 16] += p;
    }
    let (sixteens, rest) = p.as_chunks::<16>();
    for p in sixteens {
        for (partial, p) in partial.iter_mut().zip(p) {
            *partial += p;
        }
    }
    for (partial, p) in partial.iter_mut().zip(rest) {
        *partial += p;
    }
    tree16(&partial)
}

/// The largest score; NaN is passed over. In 16 lanes, which does not matter: a maximum does not round.
#[inline(always)]
fn largest(scores: &[f32]) -> f32 {
    let larger = |m: f32, s: f32| if s > m { s } else { m };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (whole, rest) = scores.as_chunks::<16>();
    for scores in whole {
        for (m, s) in lanes.iter_mut().zip(scores) {
            *m = larger(*m, *s);
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &s| larger(m, s))
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

/// f32 to f16 bits, to nearest, ties to even; too large becomes infinite. Lengths are equal.
pub fn f32_to_f16(x: &[f32], out: &mut [u16]) {
    assert_eq!(x.len(), out.len(), "f32_to_f16: lengths differ");
    for (out, x) in out.iter_mut().zip(x) {
        *out = f16::from_f32(*x).to_bits();
    }
}

/// f16 bits to f32, exact. Lengths are equal.
pub fn f16_to_f32(x: &[u16], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "f16_to_f32: lengths differ");
    for (out, x) in out.iter_mut().zip(x) {
        *out = f16::from_bits(*x).to_f32();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn numbers(seed: u64, len: usize) -> Vec<f32> {
        let bytes = crate::matrix::tests::noise(seed, 2 * len);
        bytes.as_chunks::<2>().0.iter().map(|b| f32::from(i16::from_le_bytes(*b)) / 8192.0).collect()
    }

    struct Case {
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
        head_dim: usize,
        positions: Range<usize>,
    }

    fn case(seed: u64, head_dim: usize, group: usize, positions: Range<usize>) -> Case {
        let len = positions.end.next_multiple_of(TILE) * head_dim;
        let half = |v: Vec<f32>| v.into_iter().map(|x| f16::from_f32(x).to_f32()).collect::<Vec<_>>();
        Case {
            q: numbers(seed, group * head_dim),
            k: half(numbers(seed + 1, len)),
            v: half(numbers(seed + 2, len)),
            head_dim,
            positions,
        }
    }

    fn run(case: &Case, path: KernelPath, kv: KvType) -> Vec<u32> {
        let bits = |v: &[f32]| v.iter().map(|x| f16::from_f32(*x).to_bits()).collect::<Vec<_>>();
        let (k16, v16, span) = (bits(&case.k), bits(&case.v), TILE * case.head_dim);
        let page = |t: usize| {
            let at = t * span..(t + 1) * span;
            match kv {
                KvType::F16 => (KvPage::F16(&k16[at.clone()]), KvPage::F16(&v16[at])),
                KvType::F32 => (KvPage::F32(&case.k[at.clone()]), KvPage::F32(&case.v[at])),
            }
        };
        let mut out = vec![0.0; case.q.len()];
        let (scratch, scale) = (&mut AttentionScratch::default(), 0.25);
        let positions = case.positions.clone();
        attention_on(path, &case.q, case.head_dim, scale, positions, &page, scratch, &mut out);
        out.iter().map(|v| v.to_bits()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn fast_equals_scalar(seed in 0u64..1 << 40, dim in 1usize..70, group in 1usize..9, start in 0usize..90, count in 1usize..200) {
            let case = case(seed, 2 * dim, group, start..start + count);
            let want = run(&case, KernelPath::Scalar, KvType::F32);
            for path in KernelPath::available() {
                prop_assert_eq!(&run(&case, path, KvType::F32), &want, "{:?}", path);
                // These keys and values are f16 numbers, so storing them as f16 changes nothing.
                prop_assert_eq!(&run(&case, path, KvType::F16), &want, "{:?}", path);
            }
        }

        #[test]
        fn close_to_f64(seed in 0u64..1 << 40, start in 0usize..90, count in 1usize..200) {
            let case = case(seed, 32, 1, start..start + count);
            let got = run(&case, KernelPath::current(), KvType::F32);
            let row = |m: &[f32], j: usize| m[j * 32..(j + 1) * 32].iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            let score = |j: usize| case.q.iter().zip(row(&case.k, j)).map(|(q, k)| f64::from(*q) * k).sum::<f64>() * 0.25;
            let max = case.positions.clone().map(score).fold(f64::MIN, f64::max);
            let weights: Vec<f64> = case.positions.clone().map(|j| (score(j) - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (d, got) in got.iter().enumerate() {
                let want: f64 = case.positions.clone().zip(&weights).map(|(j, w)| w * row(&case.v, j)[d]).sum::<f64>() / total;
                prop_assert!((f64::from(f32::from_bits(*got)) - want).abs() < 2e-5);
            }
        }
    }
}
