//! The float matmul for AVX-512. Equal to `float.rs` bit for bit.
//!
//! Few tokens: the 16 partial sums of one row and one token are the lanes of one register, and weights are widened as they
//! are read. Many: one half of the partial sums of 8 rows x 1,024 columns is widened once and meets all tokens, the partial
//! sums waiting in memory between panels ([`Panel`]), as in `avx2_float.rs`. There a register holds one half of two rows:
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
use crate::avx2_float::{ask_ahead, ask_for_next, half_trees, load_weights as load_half};
use crate::dtype::DType;
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

/// One half of the partial sums of a group of 8 rows. Large: made once per thread.
#[repr(C, align(64))]
struct Panel {
    /// `[column / 16][pair]`, a third of an L1 cache. One stream for a tile, as the activations are two.
    weights: [[Sixteen; PAIRS]; COLUMNS / 16],
    /// `[token][row]`: a pair of rows is one register.
    partial: [Partial; FLOAT_TOKENS],
}

/// The sums of one token.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Partial([Eight; LANES]);

thread_local! {
    /// Each compute thread's own panel, so that a step allocates nothing.
    static PANEL: RefCell<Box<Panel>> = RefCell::new(Panel::new());
}

/// Up to eight float rows times the tokens of `block`, [`FLOAT_TOKENS`] at most; `values[n][r]`.
///
/// `rows[r]` are the row's bytes, padded with zeros as the tokens are.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL, AVX2, FMA and F16C.
pub(crate) unsafe fn float_group(
    dtype: DType,
    rows: &[&[u8]],
    x: &FloatRows,
    block: Range<usize>,
    values: &mut [[f32; LANES]],
) {
    let Some(last) = rows.last() else { return };
    assert!(rows.len() <= LANES && block.len() <= FLOAT_TOKENS && block.len() <= values.len());
    assert!(rows.iter().all(|r| r.len() == x.cols() * dtype.block_bytes()));
    // Rows that are not there are the last one again; nobody reads their sums.
    let rows: [&[u8]; LANES] = std::array::from_fn(|r| *rows.get(r).unwrap_or(last));
    let values = &mut values[..block.len()];
    // SAFETY: features promised by the caller, lengths asserted.
    unsafe {
        match dtype {
            DType::F32 => run::<0>(&rows, x, block.start, values),
            DType::F16 => run::<1>(&rows, x, block.start, values),
            DType::BF16 => run::<2>(&rows, x, block.start, values),
            _ => unreachable!("not a float"),
        }
    }
}

/// `KIND` is 0 for f32, 1 for f16, 2 for bf16.
///
/// # Safety
/// As [`float_group`], after its checks.
unsafe fn run<const KIND: u8>(
    rows: &[&[u8]; LANES],
    x: &FloatRows,
    first: usize,
    values: &mut [[f32; LANES]],
) {
    if x.in_triples() {
        // SAFETY: the caller's promise, passed on.
        return PANEL.with_borrow_mut(|panel| unsafe {
            panel.run::<KIND>(rows, x, 0, first, values);
            panel.run::<KIND>(rows, x, 1, first, values);
        });
    }
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match values.len() {
            1 => few::<1, 1, KIND>(rows, x, first, values),
            2 => few::<1, 2, KIND>(rows, x, first, values),
            3 => few::<8, 3, KIND>(rows, x, first, values),
            4 => few::<4, 4, KIND>(rows, x, first, values),
            5 => few::<4, 5, KIND>(rows, x, first, values),
            tokens => unreachable!("{tokens} tokens are in triples"),
        }
    }
}

/// `N` tokens, `R` rows at a time.
///
/// # Safety
/// As [`float_group`], after its checks; `R` divides 8 and there are `N` values.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn few<const R: usize, const N: usize, const KIND: u8>(
    rows: &[&[u8]; LANES],
    x: &FloatRows,
    first: usize,
    values: &mut [[f32; LANES]],
) {
    for r in (0..LANES).step_by(R) {
        let rows: [&[u8]; R] = std::array::from_fn(|i| rows[r + i]);
        let mut acc = [[_mm512_setzero_ps(); R]; N];
        for start in (0..x.cols()).step_by(CHUNK) {
            let x: [[&[Eight]; 2]; N] = std::array::from_fn(|n| x.chunk(first + n, start));
            for i in 0..x[0][0].len() {
                let k = start + 16 * i;
                let mut w = [_mm512_setzero_ps(); R];
                for (w, row) in w.iter_mut().zip(rows) {
                    // SAFETY: `k + 16` values are inside the row.
                    *w = unsafe { load_weights::<KIND>(row, k) };
                }
                for n in 0..N {
                    // SAFETY: the halves of all tokens are equally long.
                    let [low, high] = unsafe { x[n].map(|half| half.get_unchecked(i)) };
                    // SAFETY: eight f32 each.
                    let both =
                        unsafe { join(_mm256_loadu_ps(low.0.as_ptr()), _mm256_loadu_ps(high.0.as_ptr())) };
                    for r in 0..R {
                        acc[n][r] = _mm512_fmadd_ps(w[r], both, acc[n][r]);
                    }
                }
                ask_ahead::<R, KIND>(&rows, k, 8192);
            }
        }
        for n in 0..N {
            for i in 0..R {
                values[n][r + i] = tree([_mm512_castps512_ps256(acc[n][i]), upper(acc[n][i])]);
            }
        }
    }
}

impl Panel {
    fn new() -> Box<Self> {
        Box::new(Self {
            weights: [[Sixteen([0.0; 16]); PAIRS]; COLUMNS / 16],
            partial: [Partial([Eight([0.0; 8]); LANES]); FLOAT_TOKENS],
        })
    }

    /// One half of the partial sums: half 0 writes its tree's sum, half 1 adds its own.
    ///
    /// # Safety
    /// As [`float_group`], after its checks.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    unsafe fn run<const KIND: u8>(
        &mut self,
        rows: &[&[u8]; LANES],
        x: &FloatRows,
        half: usize,
        first: usize,
        values: &mut [[f32; LANES]],
    ) {
        self.partial[..values.len()].fill(Partial([Eight([0.0; 8]); LANES]));
        let parts = values.len().div_ceil(WIDE);
        for start in (0..x.cols()).step_by(COLUMNS) {
            // SAFETY: the rows are as long as the tokens.
            unsafe { self.widen::<KIND>(rows, start, half, COLUMNS.min(x.cols() - start) / 16) };
            for (part, n) in (0..values.len()).step_by(WIDE).enumerate() {
                if half == 1 {
                    ask_for_next(rows, start, COLUMNS, part, parts, KIND);
                }
                let left = values.len() - n;
                let columns = |n: usize| {
                    let chunk = x.triple(first + n, start / TRIPLE_CHUNK * TRIPLE_CHUNK, half);
                    let from = start % TRIPLE_CHUNK / 16;
                    &chunk[from..chunk.len().min(from + COLUMNS / 16)]
                };
                let one = columns(n);
                match left {
                    1 => self.tile::<1>([one, one], n),
                    2 => self.tile::<2>([one, one], n),
                    3 => self.tile::<3>([one, one], n),
                    4 => self.tile::<4>([one, columns(n + TRIPLE)], n),
                    5 => self.tile::<5>([one, columns(n + TRIPLE)], n),
                    _ => self.tile::<WIDE>([one, columns(n + TRIPLE)], n),
                }
            }
        }
        for (values, partial) in values.iter_mut().zip(&self.partial) {
            let sum = half_trees(&partial.0);
            // SAFETY: eight f32.
            unsafe {
                let sum = if half == 0 { sum } else { _mm256_add_ps(_mm256_loadu_ps(values.as_ptr()), sum) };
                _mm256_storeu_ps(values.as_mut_ptr(), sum);
            }
        }
    }

    /// Widens one half of `len` times 16 columns from `start` on into the panel.
    ///
    /// # Safety
    /// `start + 16 * len` values are inside each row, and `len` is at most a panel.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    unsafe fn widen<const KIND: u8>(
        &mut self,
        rows: &[&[u8]; LANES],
        start: usize,
        half: usize,
        len: usize,
    ) {
        for pair in 0..PAIRS {
            for (i, to) in self.weights.iter_mut().take(len).enumerate() {
                let k = start + 16 * i + 8 * half;
                // SAFETY: the caller's promise; sixteen f32 are stored.
                unsafe {
                    let a = load_half::<KIND>(rows[2 * pair], k);
                    let b = load_half::<KIND>(rows[2 * pair + 1], k);
                    _mm512_store_ps(to[pair].0.as_mut_ptr(), join(a, b));
                }
            }
        }
    }

    /// All rows times `N` tokens over the panel.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    fn tile<const N: usize>(&mut self, x: [&[[Eight; TRIPLE]]; 2], n: usize) {
        let weights = &self.weights[..x[0].len()];
        let partial = &mut self.partial[n..n + N];
        // SAFETY: every access is inside its array, aligned where it must be.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); PAIRS]; N];
            for k in 0..N {
                for p in 0..PAIRS {
                    acc[k][p] = _mm512_load_ps(partial[k].0[2 * p].0.as_ptr());
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
                    _mm512_store_ps(partial[k].0[2 * p].0.as_mut_ptr(), acc[k][p]);
                }
            }
        }
    }
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

/// Sixteen weights from value `k` on, as f32.
///
/// # Safety
/// `k + 16` values are inside `row`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_weights<const KIND: u8>(row: &[u8], k: usize) -> __m512 {
    // SAFETY: promised by the caller; loads have no alignment demand.
    unsafe {
        match KIND {
            0 => _mm512_loadu_ps(row.as_ptr().add(4 * k).cast()),
            1 => _mm512_cvtph_ps(_mm256_loadu_si256(row.as_ptr().add(2 * k).cast())),
            _ => {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(row.as_ptr().add(2 * k).cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }
    }
}
