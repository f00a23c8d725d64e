//! Many tokens times float rows, for x86. Equal to `float.rs` bit for bit.
//!
//! Element `k` belongs to partial sum `k mod 16`, so a partial sum is the product of every 16th column alone: rows in lanes,
//! one partial sum after the other, each an ordinary matmul of 1/16 of the columns. A value that a tile loads then meets 6 or 16
//! others, where with partial sums in lanes it met 3 or 4, and the L2 cache was what the tile waited for.
//!
//! ```text
//! for each partial sum j, over the columns j, j + 16, j + 32, ...:
//!   weights [16 rows: 2 registers]  x  activations [6 tokens, each in all lanes]  ->  12 registers    AVX2
//!   weights [32 rows: 2 registers]  x  activations [12 tokens, each in all lanes] ->  24 registers    AVX-512
//! then the contract's tree over the 16 sums of each row and token
//! ```

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use crate::KernelPath;
use crate::activation::{Eight, FLOAT_TOKENS, FloatRows, SIX};
use crate::avx2_float::Avx2Tile;
use crate::avx512_float::Avx512Tile;
use crate::dtype::DType;
use crate::interleave::{GROUP, Groups, STRIPE};

/// Columns of a panel. The weights of one partial sum, 8 or 16 KiB, stay in the L1 cache while all tokens meet them.
const COLUMNS: usize = 2048;

/// `8 * E` float rows times up to [`FLOAT_TOKENS`] tokens. Large: made once per thread.
#[repr(C, align(64))]
struct FloatPanel<const E: usize> {
    /// `[partial sum][column / 16][row]`. One place more than there are columns: partial sums a power of two apart would be in each
    /// other's way in the L1 cache while the panel is made.
    weights: [[[Eight; E]; COLUMNS / 16 + 1]; 16],
    /// `[partial sum][token][row]`.
    partial: [[[Eight; E]; FLOAT_TOKENS]; 16],
}

/// One partial sum of `8 * E` rows and a few tokens, in registers.
pub(crate) trait Tile<const E: usize> {
    /// Tokens of a whole tile: [`SIX`] or twice that.
    const TOKENS: usize;

    /// Adds the products of some columns of `partial.len()` tokens, [`Tile::TOKENS`] at most, to `partial`, or puts them
    /// there when this is where the sums begin. `w` is `[column / 16][row]`, `x` `[column / 16][token]` of the first and of the second
    /// six tokens, all equally long.
    ///
    /// # Safety
    /// The CPU has what the tile is for.
    unsafe fn tile(w: &[[Eight; E]], x: [&[[f32; SIX]]; 2], partial: &mut [[Eight; E]], begins: bool);
}

thread_local! {
    /// Each compute thread's own panels, so that a step allocates nothing.
    static NARROW: RefCell<Box<FloatPanel<2>>> = RefCell::new(FloatPanel::new());
    static WIDE: RefCell<Box<FloatPanel<4>>> = RefCell::new(FloatPanel::new());
}

/// Float rows, at most [`KernelPath::rows_at_once`], times the tokens of `block`, which are by columns: the first begins a block
/// of six, and there are [`FLOAT_TOKENS`] at most. `put(token, its values)`, of which those of missing rows mean nothing.
///
/// # Safety
/// The CPU has what `path` says, AVX2 at least.
pub(crate) unsafe fn float_panel(
    path: KernelPath,
    dtype: DType,
    rows: Groups<'_>,
    x: &FloatRows,
    block: Range<usize>,
    put: impl Fn(usize, &[f32]),
) {
    // SAFETY: promised by the caller.
    unsafe {
        if path == KernelPath::Avx512 {
            WIDE.with_borrow_mut(|panel| panel.multiply::<Avx512Tile>(dtype, rows, x, block, put));
        } else {
            NARROW.with_borrow_mut(|panel| panel.multiply::<Avx2Tile>(dtype, rows, x, block, put));
        }
    }
}

impl<const E: usize> FloatPanel<E> {
    fn new() -> Box<Self> {
        const ZERO: Eight = Eight([0.0; 8]);
        Box::new(Self {
            weights: [[[ZERO; E]; COLUMNS / 16 + 1]; 16],
            partial: [[[ZERO; E]; FLOAT_TOKENS]; 16],
        })
    }

    /// As [`float_panel`].
    ///
    /// # Safety
    /// The CPU has AVX2, FMA, F16C, and what `T` is for.
    unsafe fn multiply<T: Tile<E>>(
        &mut self,
        dtype: DType,
        rows: Groups<'_>,
        x: &FloatRows,
        block: Range<usize>,
        put: impl Fn(usize, &[f32]),
    ) {
        assert!(rows.rows() <= 8 * E && block.len() <= FLOAT_TOKENS && block.start.is_multiple_of(SIX));
        assert!(16 * rows.shape.sixteens == x.cols() && rows.shape.sixteen == 16 * dtype.block_bytes());
        let step = whole_pieces(rows);
        for start in (0..x.cols()).step_by(step) {
            let end = x.cols().min(start + step);
            // SAFETY: features promised by the caller, lengths asserted.
            unsafe {
                match dtype {
                    DType::F32 => self.widen::<0>(rows, start..end),
                    DType::F16 => self.widen::<1>(rows, start..end),
                    DType::BF16 => self.widen::<2>(rows, start..end),
                    _ => unreachable!("not a float"),
                }
                self.sums::<T>(rows, x, block.clone(), start..end);
            }
        }
        for (n, token) in block.enumerate() {
            // SAFETY: promised by the caller.
            put(token, bytemuck::cast_slice(&unsafe { self.trees(n) }));
        }
    }

    /// The 16 partial sums of all tokens over the panel's columns.
    ///
    /// # Safety
    /// As [`FloatPanel::multiply`].
    unsafe fn sums<T: Tile<E>>(
        &mut self,
        rows: Groups<'_>,
        x: &FloatRows,
        block: Range<usize>,
        columns: Range<usize>,
    ) {
        let sixteens = columns.start / 16..columns.end / 16;
        let tiles = 16 * block.len().div_ceil(T::TOKENS);
        let mut ahead = Ahead::new(rows, x.cols(), columns.clone(), tiles);
        for (j, (weights, partial)) in self.weights.iter().zip(&mut self.partial).enumerate() {
            for first in block.clone().step_by(T::TOKENS) {
                ahead.ask();
                let here = first - block.start..(first + T::TOKENS).min(block.end) - block.start;
                let one = x.columns(j, first / SIX, sixteens.clone());
                let two =
                    if here.len() > SIX { x.columns(j, first / SIX + 1, sixteens.clone()) } else { one };
                // SAFETY: promised by the caller.
                unsafe {
                    T::tile(&weights[..sixteens.len()], [one, two], &mut partial[here], columns.start == 0)
                };
            }
        }
    }

    /// Widens these columns, whole sixteens, into the panel. Of groups that are not there nobody reads the sums.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C; the columns are inside each row, and no more than a panel has.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen<const KIND: u8>(&mut self, rows: Groups<'_>, columns: Range<usize>) {
        let sixteen = if KIND == 0 { 64 } else { 32 };
        // A line of the panel is written whole before the next one: it is not in the L1 cache for long.
        for (at, i) in (columns.start / 16..columns.end / 16).enumerate() {
            let place = rows.shape.place(i);
            for half in 0..2 {
                for eight in 0..rows.rows() / 8 {
                    let stripe = eight % (GROUP / 8) * (8 / STRIPE);
                    let from = eight / (GROUP / 8) * rows.shape.bytes + place.first + stripe * place.stripe;
                    // SAFETY: eight values of each row are inside the group, by the caller's promise.
                    let lanes = unsafe {
                        let from = rows.bytes.as_ptr().add(from + half * sixteen / 2);
                        turned::<KIND>([from, from.add(place.stripe)])
                    };
                    for (weights, lanes) in self.weights[8 * half..].iter_mut().zip(lanes) {
                        // SAFETY: eight f32.
                        unsafe { _mm256_store_ps(weights[at][eight].0.as_mut_ptr(), lanes) };
                    }
                }
            }
        }
    }

    /// The contract's tree ([`crate::math::tree16`]) over the partial sums of token `n`.
    ///
    /// # Safety
    /// The CPU has AVX2.
    #[target_feature(enable = "avx2")]
    unsafe fn trees(&self, n: usize) -> [Eight; E] {
        let mut sums = [Eight([0.0; 8]); E];
        for (e, sum) in sums.iter_mut().enumerate() {
            // SAFETY: eight f32 each.
            let p = |j: usize| unsafe { _mm256_load_ps(self.partial[j][n][e].0.as_ptr()) };
            let q =
                |j: usize| _mm256_add_ps(_mm256_add_ps(p(j), p(j + 1)), _mm256_add_ps(p(j + 2), p(j + 3)));
            let tree = _mm256_add_ps(_mm256_add_ps(q(0), q(4)), _mm256_add_ps(q(8), q(12)));
            // SAFETY: as above.
            unsafe { _mm256_store_ps(sum.0.as_mut_ptr(), tree) };
        }
        sums
    }
}

/// Columns of a panel of `rows`: whole pieces, so that what a panel reads of a group lies together.
fn whole_pieces(rows: Groups<'_>) -> usize {
    let piece = 16 * rows.shape.piece;
    COLUMNS / piece * piece
}

/// Asks, a little before each tile, for what the panel will be made of next: the next columns of the same rows, or the first ones
/// of the rows behind them.
struct Ahead<'a> {
    rows: Groups<'a>,
    /// Where the next panel's part of a group begins, from the beginning of the present one.
    from: usize,
    /// Bytes of it, of each group, and how many are asked for before each tile.
    bytes: usize,
    part: usize,
    at: usize,
}

impl<'a> Ahead<'a> {
    fn new(rows: Groups<'a>, cols: usize, columns: Range<usize>, tiles: usize) -> Self {
        let column = rows.shape.sixteen / 16 * GROUP;
        let (from, start) =
            if columns.end == cols { (rows.bytes.len(), 0) } else { (column * columns.end, columns.end) };
        let bytes = column * whole_pieces(rows).min(cols - start);
        Self { rows, from, bytes, part: bytes.div_ceil(tiles).next_multiple_of(64), at: 0 }
    }

    fn ask(&mut self) {
        for line in (self.at..self.bytes.min(self.at + self.part)).step_by(64) {
            for group in self.rows.bytes.chunks_exact(self.rows.shape.bytes) {
                // SAFETY: every CPU of this target has the instruction; it never faults, also beyond the end of the weights.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(group.as_ptr().wrapping_add(self.from + line).cast()) };
            }
        }
        self.at += self.part;
    }
}

/// Eight columns of eight rows, four of each of two stripes, widened: a vector is one column.
///
/// # Safety
/// The CPU has AVX2 and F16C; eight values of four rows, 16 values apart, are readable at both places.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn turned<const KIND: u8>(stripes: [*const u8; 2]) -> [__m256; 8] {
    let sixteen = if KIND == 0 { 64 } else { 32 };
    // SAFETY: promised by the caller.
    unsafe {
        let row = |r: usize| stripes[r / STRIPE].add(r % STRIPE * sixteen);
        if KIND == 0 {
            return turned_floats([0, 1, 2, 3, 4, 5, 6, 7].map(row));
        }
        let turned = turned_halves([0, 1, 2, 3, 4, 5, 6, 7].map(row));
        let mut columns = [_mm256_setzero_ps(); 8];
        for (column, stored) in columns.iter_mut().zip(turned) {
            *column = if KIND == 1 {
                _mm256_cvtph_ps(stored)
            } else {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(stored)))
            };
        }
        columns
    }
}

/// Eight 16-bit values of each of eight rows; a vector is one column.
///
/// # Safety
/// They are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn turned_halves(rows: [*const u8; 8]) -> [__m128i; 8] {
    // SAFETY: promised by the caller; loads have no alignment demand.
    let row = |r: usize| unsafe { _mm_loadu_si128(rows[r].cast()) };
    let low = |r: usize| _mm_unpacklo_epi16(row(r), row(r + 1)); // columns 0..4 of two rows
    let high = |r: usize| _mm_unpackhi_epi16(row(r), row(r + 1)); // columns 4..8
    // Columns 2i and 2i + 1 of four rows.
    let four = |r: usize| {
        let (a, b, c, d) = (low(r), low(r + 2), high(r), high(r + 2));
        [
            _mm_unpacklo_epi32(a, b),
            _mm_unpackhi_epi32(a, b),
            _mm_unpacklo_epi32(c, d),
            _mm_unpackhi_epi32(c, d),
        ]
    };
    let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (four(0), four(4));
    [
        _mm_unpacklo_epi64(a0, b0),
        _mm_unpackhi_epi64(a0, b0),
        _mm_unpacklo_epi64(a1, b1),
        _mm_unpackhi_epi64(a1, b1),
        _mm_unpacklo_epi64(a2, b2),
        _mm_unpackhi_epi64(a2, b2),
        _mm_unpacklo_epi64(a3, b3),
        _mm_unpackhi_epi64(a3, b3),
    ]
}

/// Eight f32 of each of eight rows; a vector is one column.
///
/// # Safety
/// They are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn turned_floats(rows: [*const u8; 8]) -> [__m256; 8] {
    // Columns 0..4 of row r in the lower half, of row r + 4 in the upper one; then columns 4..8.
    // SAFETY: promised by the caller; loads have no alignment demand.
    let pair = |r: usize, half: usize| unsafe {
        let (low, high) =
            (_mm_loadu_ps(rows[r].add(16 * half).cast()), _mm_loadu_ps(rows[r + 4].add(16 * half).cast()));
        _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), high)
    };
    let four = |half: usize| {
        let (a, b, c, d) = (pair(0, half), pair(1, half), pair(2, half), pair(3, half));
        let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d)); // columns 0 and 1
        let (ab2, cd2) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d)); // columns 2 and 3
        [
            _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd),
            _mm256_shuffle_ps::<0b01_00_01_00>(ab2, cd2),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab2, cd2),
        ]
    };
    let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (four(0), four(1));
    [a0, a1, a2, a3, b0, b1, b2, b3]
}
