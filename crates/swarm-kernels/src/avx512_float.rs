//! The float matmul for AVX-512. Equal to `float.rs` bit for bit.
//!
//! Few tokens: the 16 partial sums of one row and one token are the lanes of one register, and weights are widened as they
//! are read. Many: one half of 8 rows x 1,024 columns is widened once and meets all tokens, then the next 8 rows meet them, while
//! the tokens' columns are in the L2 cache; the partial sums wait in memory ([`Panel`]), as in `avx2_float.rs`. There a
//! register holds one half of two rows:
//!
//! ```text
//!                lanes 0..8        lanes 8..16
//! weights      [ row 2p, half h  | row 2p + 1, half h ]     4 pairs of rows
//! activations  [ token n, half h | token n, half h    ]     6 tokens: 4 + 6 loads feed 24 FMAs
//! ```

// Tiles are indexed by row and token in several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use crate::activation::{CHUNK, Eight, FLOAT_TOKENS, FloatRows, TRIPLE, TRIPLE_CHUNK};
use crate::avx2::tree;
use crate::avx2_float::{ask_ahead, load_weights as load_half};
use crate::dtype::DType;
use crate::interleave::{STRIPE, Stripes};
use crate::pack::LANES;

/// Tokens of a panel's tile.
const WIDE: usize = 2 * TRIPLE;
/// Pairs of rows.
const PAIRS: usize = LANES / 2;
/// Columns of a panel; a part of [`TRIPLE_CHUNK`].
const COLUMNS: usize = 1024;

/// One register.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Sixteen([f32; 16]);

/// Groups of 8 rows that meet the same columns of all tokens.
const GROUPS: usize = 4;
/// Rows of a panel.
pub(crate) const PANEL_ROWS: usize = GROUPS * LANES;

/// One half of the partial sums of [`PANEL_ROWS`] rows. Large: made once per thread.
#[repr(C, align(64))]
struct Panel {
    /// `[column / 16][pair]` of one group, a third of an L1 cache. One stream for a tile, as the activations are two.
    weights: [[Sixteen; PAIRS]; COLUMNS / 16],
    /// `[group][token][pair]`: a register is two rows.
    partial: [[Partial; FLOAT_TOKENS]; GROUPS],
    /// `[token][row]`: the first half's part of each tree.
    first: [[f32; PANEL_ROWS]; FLOAT_TOKENS],
}

/// The sums of one token.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Partial([Sixteen; PAIRS]);

thread_local! {
    /// Each compute thread's own panel, so that a step allocates nothing.
    static PANEL: RefCell<Box<Panel>> = RefCell::new(Panel::new());
}

/// Up to [`PANEL_ROWS`] float rows times the tokens of `block`, which are in triples, [`FLOAT_TOKENS`] at most: `put(token, its
/// values)`, of which those of missing rows mean nothing.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL, AVX2, FMA and F16C.
pub(crate) unsafe fn float_panel(
    dtype: DType,
    rows: Stripes<'_>,
    x: &FloatRows,
    block: Range<usize>,
    put: impl Fn(usize, &[f32; PANEL_ROWS]),
) {
    assert!(rows.rows() <= PANEL_ROWS && block.len() <= FLOAT_TOKENS && x.in_triples());
    assert!(rows.shape.bytes == STRIPE * x.cols() * dtype.block_bytes());
    PANEL.with_borrow_mut(|panel| {
        for half in 0..2 {
            // SAFETY: features promised by the caller, lengths asserted.
            unsafe {
                match dtype {
                    DType::F32 => panel.run::<0>(rows, x, half, block.clone()),
                    DType::F16 => panel.run::<1>(rows, x, half, block.clone()),
                    DType::BF16 => panel.run::<2>(rows, x, half, block.clone()),
                    _ => unreachable!("not a float"),
                }
            }
        }
        block.enumerate().for_each(|(n, token)| put(token, &panel.first[n]));
    });
}

/// Up to eight float rows times the few tokens of `block`, which are not in triples; `values[n][r]`.
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
    assert!(rows.rows() <= LANES && block.len() <= values.len() && !x.in_triples());
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

impl Panel {
    fn new() -> Box<Self> {
        const PARTIAL: Partial = Partial([Sixteen([0.0; 16]); PAIRS]);
        Box::new(Self {
            weights: [[Sixteen([0.0; 16]); PAIRS]; COLUMNS / 16],
            partial: [[PARTIAL; FLOAT_TOKENS]; GROUPS],
            first: [[0.0; PANEL_ROWS]; FLOAT_TOKENS],
        })
    }

    /// One half of the partial sums of all tokens.
    ///
    /// # Safety
    /// As [`float_panel`], after its checks.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    unsafe fn run<const KIND: u8>(
        &mut self,
        rows: Stripes<'_>,
        x: &FloatRows,
        half: usize,
        block: Range<usize>,
    ) {
        for start in (0..x.cols()).step_by(COLUMNS) {
            let columns = |n: usize| {
                let chunk = x.triple(block.start + n, start / TRIPLE_CHUNK * TRIPLE_CHUNK, half);
                let from = start % TRIPLE_CHUNK / 16;
                &chunk[from..chunk.len().min(from + COLUMNS / 16)]
            };
            let (begins, ends) = (start == 0, start + COLUMNS >= x.cols());
            let group_bytes = LANES / STRIPE * rows.shape.bytes;
            for (group, bytes) in rows.bytes.chunks(group_bytes).enumerate() {
                // SAFETY: the rows are as long as the tokens.
                unsafe {
                    let rows = Stripes { bytes, ..rows };
                    self.widen::<KIND>(rows, start, half, COLUMNS.min(x.cols() - start) / 16);
                }
                // The panel that is widened next: of the next group, of the next columns, or of the rows behind these.
                let next = match ((group + 1) * group_bytes < rows.bytes.len(), ends, half) {
                    (true, ..) => (group + 1) * group_bytes + rows.at(0, start / 16),
                    (_, false, _) => rows.at(0, (start + COLUMNS) / 16),
                    (_, _, 0) => 0,
                    _ => rows.bytes.len(),
                };
                let bytes = rows.at(0, COLUMNS / 16).min(rows.shape.bytes);
                let part = bytes.div_ceil(block.len().div_ceil(WIDE)).next_multiple_of(64);
                let mut at = 0;
                for n in (0..block.len()).step_by(WIDE) {
                    for line in (at..bytes.min(at + part)).step_by(64) {
                        for stripe in 0..LANES / STRIPE {
                            // Never faults, also beyond the end of the weights.
                            let line =
                                rows.bytes.as_ptr().wrapping_add(next + stripe * rows.shape.bytes + line);
                            _mm_prefetch::<_MM_HINT_T1>(line.cast());
                        }
                    }
                    at += part;
                    let left = block.len() - n;
                    let x = [columns(n), columns(if left > TRIPLE { n + TRIPLE } else { n })];
                    match left {
                        1 => self.tile::<1>(group, x, n, begins),
                        2 => self.tile::<2>(group, x, n, begins),
                        3 => self.tile::<3>(group, x, n, begins),
                        4 => self.tile::<4>(group, x, n, begins),
                        5 => self.tile::<5>(group, x, n, begins),
                        _ => self.tile::<WIDE>(group, x, n, begins),
                    }
                    if ends {
                        let tokens = n..n + left.min(WIDE);
                        tokens.for_each(|n| self.trees(group, n, half));
                    }
                }
            }
        }
    }

    /// Half 0 writes its part of the trees of token `n` and a group, half 1 adds its own.
    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma")]
    fn trees(&mut self, group: usize, n: usize, half: usize) {
        let (partial, first) = (&self.partial[group][n].0, &mut self.first[n]);
        // SAFETY: each pair of rows is sixteen aligned f32; the group's places in `first` are eight.
        unsafe {
            let rows = |pair: usize| _mm512_load_ps(partial[pair].0.as_ptr());
            // Sums of lanes 0..4 of rows 0 2 4 6, of their lanes 4..8, then the same of rows 1 3 5 7.
            let fours = even_plus_odd(even_plus_odd(rows(0), rows(1)), even_plus_odd(rows(2), rows(3)));
            let order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
            let ordered = _mm512_permutexvar_ps(order, fours);
            let sum = _mm256_add_ps(_mm512_castps512_ps256(ordered), upper(ordered));
            let to = first[group * LANES..][..LANES].as_mut_ptr();
            let sum = if half == 0 { sum } else { _mm256_add_ps(_mm256_loadu_ps(to), sum) };
            _mm256_storeu_ps(to, sum);
        }
    }

    /// Widens one half of `len` times 16 columns from `start` on into the panel. Rows that are not there stay old values,
    /// whose sums nobody reads.
    ///
    /// # Safety
    /// `start + 16 * len` values are inside each row, and `len` is at most a panel.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    unsafe fn widen<const KIND: u8>(&mut self, rows: Stripes<'_>, start: usize, half: usize, len: usize) {
        let sixteen = if KIND == 0 { 64 } else { 32 };
        for pair in 0..rows.rows() / 2 {
            for (i, to) in self.weights.iter_mut().take(len).enumerate() {
                // SAFETY: the caller's promise; the second row's values follow the first one's. Sixteen f32 are stored.
                unsafe {
                    let from =
                        rows.bytes.as_ptr().add(rows.at(2 * pair, start / 16 + i) + half * sixteen / 2);
                    let both = join(load_half::<KIND>(from), load_half::<KIND>(from.add(sixteen)));
                    _mm512_store_ps(to[pair].0.as_mut_ptr(), both);
                }
            }
        }
    }

    /// All rows of a group times `N` tokens over the panel.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    fn tile<const N: usize>(&mut self, group: usize, x: [&[[Eight; TRIPLE]]; 2], n: usize, begins: bool) {
        let weights = &self.weights[..x[0].len()];
        let partial = &mut self.partial[group][n..n + N];
        // SAFETY: every access is inside its array, aligned where it must be.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); PAIRS]; N];
            if !begins {
                for k in 0..N {
                    for p in 0..PAIRS {
                        acc[k][p] = _mm512_load_ps(partial[k].0[p].0.as_ptr());
                    }
                }
            }
            // The next tile's sums and the beginnings of its tokens' columns. Never faults, also beyond the end.
            for k in 0..WIDE {
                for p in 0..PAIRS {
                    let next = partial.as_ptr().wrapping_add(WIDE + k).cast::<u8>().wrapping_add(64 * p);
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                }
            }
            for ((w, one), two) in weights.iter().zip(x[0]).zip(x[1]) {
                let mut rows = [_mm512_setzero_ps(); PAIRS];
                for p in 0..PAIRS {
                    rows[p] = _mm512_load_ps(w[p].0.as_ptr());
                }
                for k in 0..N {
                    let eight = if k < TRIPLE { &one[k] } else { &two[k - TRIPLE] };
                    let eight = _mm256_load_ps(eight.0.as_ptr());
                    let twice = _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(eight)));
                    for p in 0..PAIRS {
                        acc[k][p] = _mm512_fmadd_ps(rows[p], twice, acc[k][p]);
                    }
                }
            }
            for k in 0..N {
                for p in 0..PAIRS {
                    _mm512_store_ps(partial[k].0[p].0.as_mut_ptr(), acc[k][p]);
                }
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
