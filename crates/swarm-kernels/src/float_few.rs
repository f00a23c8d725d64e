//! One token or a few (verified drafts, several sessions) times float rows, for x86. Equal to `float.rs` bit for bit.
//!
//! The 16 partial sums of a row and a token are lanes, and weights are widened as they are read. The 16 rows of a group meet
//! some columns of all tokens, a piece of the group, before the next columns, and the partial sums wait in memory meanwhile: so
//! weights are one stream, and what is read again of the tokens stays in the L1 cache.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::KernelPath;
use crate::activation::{FloatRows, Sixteen};
use crate::ahead::ahead;
use crate::avx2_float::Avx2Few;
use crate::avx512_float::Avx512Few;
use crate::dtype::DType;
use crate::interleave::{GROUP, Groups, STRIPE, STRIPES};
use crate::path::PANEL_TOKENS;

/// The partial sums of one token and the rows of a stripe.
pub(crate) type Sums = [Sixteen; STRIPE];

/// A stripe and a few tokens, in registers.
pub(crate) trait FewTile {
    /// The most tokens of a tile.
    const TOKENS: usize;

    /// Adds the products of some columns of a stripe, `[column / 16][row]` as stored, and of each token, `[column / 16]`, to the
    /// token's sums, or puts them there when this is where the sums begin. There are [`FewTile::TOKENS`] tokens at most. `KIND`
    /// is 0 for f32, 1 for f16, 2 for bf16.
    ///
    /// # Safety
    /// The CPU has what the tile is for, and `w` is as long as each token.
    unsafe fn tile<const KIND: u8>(
        w: &[u8],
        x: &[&[Sixteen]],
        sums: &mut [Sums],
        begins: bool,
        ask: Option<Ask>,
    );
}

/// What a tile asks memory for while it computes: `step` bytes in each of its steps of 16 columns, from `start` on.
#[derive(Clone, Copy)]
pub(crate) struct Ask {
    start: *const u8,
    step: usize,
}

impl Ask {
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

/// A group of float rows times the tokens of `block`, which are not by columns, fewer than [`PANEL_TOKENS`]: `put(token, its values)`,
/// of which those of missing rows mean nothing.
///
/// # Safety
/// The CPU has what `path` says, AVX2 at least.
pub(crate) unsafe fn float_few(
    path: KernelPath,
    dtype: DType,
    group: Groups<'_>,
    x: &FloatRows,
    block: Range<usize>,
    put: impl Fn(usize, &[f32]),
) {
    assert!(group.rows() == GROUP && block.len() < PANEL_TOKENS);
    assert!(16 * group.shape.sixteens == x.cols() && group.shape.sixteen == 16 * dtype.block_bytes());
    // SAFETY: promised by the caller.
    unsafe {
        match (path == KernelPath::Avx512, dtype) {
            (true, DType::F32) => run::<Avx512Few, 0>(group, x, block, put),
            (true, DType::F16) => run::<Avx512Few, 1>(group, x, block, put),
            (true, DType::BF16) => run::<Avx512Few, 2>(group, x, block, put),
            (false, DType::F32) => run::<Avx2Few, 0>(group, x, block, put),
            (false, DType::F16) => run::<Avx2Few, 1>(group, x, block, put),
            (false, DType::BF16) => run::<Avx2Few, 2>(group, x, block, put),
            _ => unreachable!("not a float"),
        }
    }
}

/// # Safety
/// As [`float_few`], after its checks.
unsafe fn run<T: FewTile, const KIND: u8>(
    group: Groups<'_>,
    x: &FloatRows,
    block: Range<usize>,
    put: impl Fn(usize, &[f32]),
) {
    // SAFETY: promised by the caller.
    unsafe {
        if block.len() == 1 {
            multiply::<T, KIND, 1>(group, x, block, put);
        } else {
            multiply::<T, KIND, PANEL_TOKENS>(group, x, block, put);
        }
    }
}

/// Up to `N` tokens: all columns, a piece after the other, then the trees.
///
/// # Safety
/// As [`float_few`], after its checks.
unsafe fn multiply<T: FewTile, const KIND: u8, const N: usize>(
    group: Groups<'_>,
    x: &FloatRows,
    block: Range<usize>,
    put: impl Fn(usize, &[f32]),
) {
    let distance = ahead(block.len());
    let mut sums = [[[Sixteen::ZERO; STRIPE]; N]; STRIPES];
    for start in x.chunks() {
        let mut tokens = [&[][..]; N];
        for (token, n) in tokens.iter_mut().zip(block.clone()) {
            *token = x.chunk(n, start);
        }
        for (w, sums) in group.stripes(start / 16).into_iter().zip(&mut sums) {
            // SAFETY: promised by the caller; the columns are those of the chunk.
            unsafe { meet::<T, KIND>(w, &tokens[..block.len()], sums, start == 0, distance) };
        }
    }
    let mut values = [0.0; GROUP];
    for (n, token) in block.enumerate() {
        for (value, sums) in values.iter_mut().zip(sums.iter().flat_map(|stripe| &stripe[n])) {
            // SAFETY: promised by the caller.
            *value = unsafe { tree(sums) };
        }
        put(token, &values);
    }
}

/// A stripe of a piece meets all tokens, in tiles of equal size as far as it goes.
///
/// # Safety
/// As [`FewTile::tile`].
unsafe fn meet<T: FewTile, const KIND: u8>(
    w: &[u8],
    x: &[&[Sixteen]],
    sums: &mut [Sums],
    begins: bool,
    distance: Option<usize>,
) {
    let steps = x[0].len();
    let step = STRIPE * if KIND == 0 { 64 } else { 32 };
    assert!(w.len() == step * steps, "weights and tokens of different width");
    let ask = distance.map(|distance| Ask { start: w.as_ptr().wrapping_add(distance), step });
    // SAFETY: promised by the caller.
    unsafe {
        // Each tile asks for its part of as many bytes as the stripe has.
        let tiles = x.len().div_ceil(T::TOKENS);
        let tile = x.len().div_ceil(tiles);
        for (i, (x, sums)) in x.chunks(tile).zip(sums.chunks_mut(tile)).enumerate() {
            T::tile::<KIND>(w, x, sums, begins, ask.map(|ask| ask.part(i, tiles, steps)));
        }
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
