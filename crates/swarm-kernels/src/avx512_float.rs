//! The float matmul for AVX-512. Equal to `float.rs` bit for bit.
//!
//! Few tokens: the 16 partial sums of one row and one token are the lanes of one register, and weights are widened as they
//! are read. Many: a panel of 8 rows x 512 columns is widened once and meets all tokens, the partial sums waiting in memory
//! between panels. Activations lie in halves of 8 partial sums (`activation.rs`), so there a register holds one half of two rows:
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

use crate::activation::{CHUNK, Eight, FLOAT_TOKENS, FloatRows};
use crate::avx2::tree;
use crate::avx2_float::ask_ahead;
use crate::dtype::DType;
use crate::pack::LANES;

/// Tokens of a panel's tile.
const WIDE: usize = 6;
/// Pairs of rows.
const PAIRS: usize = LANES / 2;

/// One register.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Sixteen([f32; 16]);

const ZERO: Sixteen = Sixteen([0.0; 16]);

/// A group of 8 float rows times up to [`FLOAT_TOKENS`] tokens. Large: made once per thread.
#[repr(C, align(64))]
struct Panel {
    /// `[half][pair][column / 16]`, a half L1 cache.
    weights: [[[Sixteen; CHUNK / 16]; PAIRS]; 2],
    /// `[token][half][pair]`.
    partial: [[[Sixteen; PAIRS]; 2]; FLOAT_TOKENS],
}

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
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match values.len() {
            1 => few::<8, 1, KIND>(rows, x, first, values),
            2 => few::<8, 2, KIND>(rows, x, first, values),
            3 => few::<8, 3, KIND>(rows, x, first, values),
            4 => few::<4, 4, KIND>(rows, x, first, values),
            5 => few::<4, 5, KIND>(rows, x, first, values),
            6 => few::<4, 6, KIND>(rows, x, first, values),
            _ => PANEL.with_borrow_mut(|panel| panel.run::<KIND>(rows, x, first, values)),
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
                ask_ahead::<R, KIND>(&rows, k);
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
            weights: [[[ZERO; CHUNK / 16]; PAIRS]; 2],
            partial: [[[ZERO; PAIRS]; 2]; FLOAT_TOKENS],
        })
    }

    /// # Safety
    /// As [`float_group`], after its checks.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    unsafe fn run<const KIND: u8>(
        &mut self,
        rows: &[&[u8]; LANES],
        x: &FloatRows,
        first: usize,
        values: &mut [[f32; LANES]],
    ) {
        self.partial[..values.len()].fill([[ZERO; PAIRS]; 2]);
        for start in (0..x.cols()).step_by(CHUNK) {
            // SAFETY: the rows are as long as the tokens.
            unsafe { self.widen::<KIND>(rows, start, CHUNK.min(x.cols() - start) / 16) };
            let mut n = 0;
            while n < values.len() {
                let left = (values.len() - n).min(WIDE);
                let x: [[&[Eight]; 2]; WIDE] =
                    std::array::from_fn(|i| x.chunk(first + n + i.min(left - 1), start));
                for half in 0..2 {
                    let x = x.map(|x| x[half]);
                    match left {
                        1 => self.tile::<1>(half, &x, n),
                        2 => self.tile::<2>(half, &x, n),
                        3 => self.tile::<3>(half, &x, n),
                        4 => self.tile::<4>(half, &x, n),
                        5 => self.tile::<5>(half, &x, n),
                        _ => self.tile::<WIDE>(half, &x, n),
                    }
                }
                n += left;
            }
        }
        for (values, [low, high]) in values.iter_mut().zip(&self.partial) {
            for (r, value) in values.iter_mut().enumerate() {
                let half = |half: &[Sixteen; PAIRS]| {
                    // SAFETY: eight of sixteen f32, the first or the last.
                    unsafe { _mm256_loadu_ps(half[r / 2].0.as_ptr().add(r % 2 * 8)) }
                };
                *value = tree([half(low), half(high)]);
            }
        }
    }

    /// Widens `len` times 16 columns from `start` on into the panel.
    ///
    /// # Safety
    /// `start + 16 * len` values are inside each row, and `len` is at most a panel.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    unsafe fn widen<const KIND: u8>(&mut self, rows: &[&[u8]; LANES], start: usize, len: usize) {
        let [low, high] = &mut self.weights;
        for (pair, (low, high)) in low.iter_mut().zip(high).enumerate() {
            for (i, (low, high)) in low.iter_mut().zip(high).take(len).enumerate() {
                // SAFETY: the caller's promise; sixteen f32 are stored into each.
                unsafe {
                    let a = load_weights::<KIND>(rows[2 * pair], start + 16 * i);
                    let b = load_weights::<KIND>(rows[2 * pair + 1], start + 16 * i);
                    _mm512_store_ps(low.0.as_mut_ptr(), _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b));
                    _mm512_store_ps(high.0.as_mut_ptr(), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b));
                }
            }
        }
    }

    /// All rows times `N` tokens over one half of the panel.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    fn tile<const N: usize>(&mut self, half: usize, x: &[&[Eight]; WIDE], n: usize) {
        let len = x[0].len();
        let weights = &self.weights[half];
        let partial = &mut self.partial[n..n + N];
        assert!(len <= CHUNK / 16 && x.iter().all(|x| x.len() == len));
        // SAFETY: every access is inside its array, aligned where it must be: `i < len`, asserted above.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); PAIRS]; N];
            for k in 0..N {
                for p in 0..PAIRS {
                    acc[k][p] = _mm512_load_ps(partial[k][half][p].0.as_ptr());
                }
            }
            for i in 0..len {
                let w: [__m512; PAIRS] =
                    std::array::from_fn(|p| _mm512_load_ps(weights[p].get_unchecked(i).0.as_ptr()));
                for k in 0..N {
                    let eight = _mm256_loadu_ps(x[k].get_unchecked(i).0.as_ptr());
                    let twice = _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(eight)));
                    for p in 0..PAIRS {
                        acc[k][p] = _mm512_fmadd_ps(w[p], twice, acc[k][p]);
                    }
                }
            }
            for k in 0..N {
                for p in 0..PAIRS {
                    _mm512_store_ps(partial[k][half][p].0.as_mut_ptr(), acc[k][p]);
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
