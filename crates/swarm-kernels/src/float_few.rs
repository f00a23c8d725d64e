//! One token or a few (verified drafts, several sessions) times float rows, for x86. Equal to `float.rs` bit for bit.
//!
//! The 16 partial sums of a row and a token are lanes, and weights are widened as they are read. One token meets a row from the
//! first column to the last. With all columns at once, eight tokens' activations would not stay in the L1 cache, and each four
//! rows would fetch them anew: so 16 rows meet 512 columns of all tokens before the next columns, and the partial sums wait in
//! memory meanwhile.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::KernelPath;
use crate::activation::{FloatRows, Sixteen};
use crate::ahead::ahead;
use crate::avx2_float::Avx2Few;
use crate::avx512_float::Avx512Few;
use crate::dtype::DType;
use crate::interleave::{STRIPE, Stripes};
use crate::path::PANEL_TOKENS;

/// Stripes that meet the same columns.
const STRIPES: usize = 4;
/// Rows of them.
pub(crate) const FEW_ROWS: usize = STRIPES * STRIPE;
/// How many pieces, a chunk of a stripe each, before it is read memory is asked for a piece.
const AHEAD: usize = 2;

/// The partial sums of one token and the rows of a stripe.
pub(crate) type Sums = [Sixteen; STRIPE];

/// A stripe and a few tokens, in registers.
pub(crate) trait FewTile {
    /// The most tokens of a tile.
    const TOKENS: usize;

    /// The rows of a stripe times one token. `KIND` is 0 for f32, 1 for f16, 2 for bf16.
    ///
    /// # Safety
    /// The CPU has what the tile is for, and the stripe is as long as the token.
    unsafe fn one<const KIND: u8>(stripe: &[u8], x: &FloatRows, token: usize) -> [f32; STRIPE];

    /// Adds the products of some columns of a stripe, `[column / 16][row]` as stored, and
    /// of each token, `[column / 16]`, to the token's sums. There are [`FewTile::TOKENS`] tokens at most.
    ///
    /// # Safety
    /// The CPU has what the tile is for, and `w` is as long as each token.
    unsafe fn tile<const KIND: u8>(w: &[u8], x: &[&[Sixteen]], sums: &mut [Sums], ask: Ask);
}

/// What a tile asks memory for while it computes: `step` bytes in each of its steps of 16 columns, from `start` on. A piece's
/// bytes are spread over all tiles of the piece before it, so that memory is never idle.
#[derive(Clone, Copy)]
pub(crate) struct Ask {
    start: *const u8,
    step: usize,
}

impl Ask {
    /// What lies so far behind the step's own columns of a stripe, or in the stripes behind it; nothing where memory is not asked.
    #[inline(always)]
    pub fn ahead(stripe: &[u8], step: usize) -> Option<Self> {
        Some(Self { start: stripe.as_ptr().wrapping_add(ahead(1)?), step })
    }

    /// Part `part` of `parts` of this, for a loop of `steps` steps.
    pub fn part(self, part: usize, parts: usize, steps: usize) -> Self {
        let step = self.step.div_ceil(parts);
        Self { start: self.start.wrapping_add(part * step * steps), step }
    }

    /// What is asked for in step `i`. No loop: it would be half of a tile's instructions.
    #[inline(always)]
    pub fn ask(self, i: usize) {
        let at = self.start.wrapping_add(i * self.step);
        // SAFETY: every CPU of this target has the instruction; it never faults, also beyond the end of the weights.
        let line = |line: usize| unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(64 * line).cast()) };
        line(0);
        if self.step > 64 {
            line(1);
        }
        if self.step > 128 {
            line(2);
            line(3);
        }
    }
}

/// Float rows, at most [`FEW_ROWS`], times the tokens of `block`, which are not by columns, fewer than [`PANEL_TOKENS`]:
/// `put(token, its values)`, of which those of missing rows mean nothing.
///
/// # Safety
/// The CPU has what `path` says, AVX2 at least.
pub(crate) unsafe fn float_few(
    path: KernelPath,
    dtype: DType,
    rows: Stripes<'_>,
    x: &FloatRows,
    block: Range<usize>,
    put: impl Fn(usize, &[f32]),
) {
    assert!(rows.rows() <= FEW_ROWS && block.len() < PANEL_TOKENS);
    assert!(rows.shape.bytes == STRIPE * x.cols() * dtype.block_bytes());
    // SAFETY: promised by the caller.
    unsafe {
        match (path == KernelPath::Avx512, dtype) {
            (true, DType::F32) => run::<Avx512Few, 0>(rows, x, block, put),
            (true, DType::F16) => run::<Avx512Few, 1>(rows, x, block, put),
            (true, DType::BF16) => run::<Avx512Few, 2>(rows, x, block, put),
            (false, DType::F32) => run::<Avx2Few, 0>(rows, x, block, put),
            (false, DType::F16) => run::<Avx2Few, 1>(rows, x, block, put),
            (false, DType::BF16) => run::<Avx2Few, 2>(rows, x, block, put),
            _ => unreachable!("not a float"),
        }
    }
}

/// # Safety
/// As [`float_few`], after its checks.
unsafe fn run<T: FewTile, const KIND: u8>(
    rows: Stripes<'_>,
    x: &FloatRows,
    block: Range<usize>,
    put: impl Fn(usize, &[f32]),
) {
    let mut values = [0.0; FEW_ROWS];
    if block.len() == 1 {
        let stripes = rows.bytes.chunks_exact(rows.shape.bytes);
        for (values, stripe) in values.as_chunks_mut().0.iter_mut().zip(stripes) {
            // SAFETY: promised by the caller.
            *values = unsafe { T::one::<KIND>(stripe, x, block.start) };
        }
        return put(block.start, &values);
    }
    let mut sums = [[[Sixteen::ZERO; STRIPE]; PANEL_TOKENS]; STRIPES];
    // SAFETY: promised by the caller.
    unsafe { add_up::<T, KIND>(rows, x, block.clone(), &mut sums) };
    for (n, token) in block.enumerate() {
        for (value, sums) in values.iter_mut().zip(sums.iter().flat_map(|stripe| &stripe[n])) {
            // SAFETY: promised by the caller.
            *value = unsafe { tree(sums) };
        }
        put(token, &values);
    }
}

/// # Safety
/// The CPU has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn tree(sums: &Sixteen) -> f32 {
    // SAFETY: eight f32 each.
    crate::avx2::tree([0, 1].map(|half| unsafe { _mm256_load_ps(sums.0[half].0.as_ptr()) }))
}

/// All columns of all tokens, a chunk after the other.
///
/// # Safety
/// As [`float_few`], after its checks.
unsafe fn add_up<T: FewTile, const KIND: u8>(
    rows: Stripes<'_>,
    x: &FloatRows,
    block: Range<usize>,
    sums: &mut [[Sums; PANEL_TOKENS]; STRIPES],
) {
    // Of equal size as far as it goes.
    let tile = block.len().div_ceil(block.len().div_ceil(T::TOKENS).max(1)).max(1);
    let stripes = rows.bytes.len() / rows.shape.bytes;
    let place = |piece: usize| {
        let (start, stripe) = (x.chunks().nth(piece / stripes)?, piece % stripes);
        Some(stripe * rows.shape.bytes + rows.at(0, start / 16))
    };
    for (i, start) in x.chunks().enumerate() {
        let mut tokens = [&[][..]; PANEL_TOKENS];
        for (token, n) in tokens.iter_mut().zip(block.clone()) {
            *token = x.chunk(n, start);
        }
        let bytes = tokens[0].len() * rows.at(0, 1);
        for (stripe, sums) in sums[..stripes].iter_mut().enumerate() {
            let at = stripe * rows.shape.bytes + rows.at(0, start / 16);
            let w = &rows.bytes[at..at + bytes];
            let piece = i * stripes + stripe + AHEAD;
            // Behind the last columns are the first ones of the next rows.
            let next =
                place(piece).or_else(|| Some(rows.bytes.len() + place(piece - x.chunks().len() * stripes)?));
            let start = rows.bytes.as_ptr().wrapping_add(next.unwrap_or(at));
            let (ask, tiles) = (Ask { start, step: rows.at(0, 1) }, block.len().div_ceil(tile));
            let here = tokens[..block.len()].chunks(tile).zip(sums.chunks_mut(tile)).enumerate();
            for (i, (x, sums)) in here {
                // SAFETY: promised by the caller; the columns are those of the chunk.
                unsafe { T::tile::<KIND>(w, x, sums, ask.part(i, tiles, tokens[0].len())) };
            }
        }
    }
}
