//! The quantized matmul for many tokens with 128-bit vectors. Equal to `quant.rs` bit for bit.
//!
//! With many tokens unpacking is done once: the blocks of one segment (one partial sum) of eight rows become plain bytes
//! and f32 scales, and meet all tokens from the L1 cache, four at a time. The partial sums of every token wait in memory
//! for the tree. Plain bytes lie in the order the multiplication reads:
//!
//! ```text
//! Quads    quad g of rows 0..4, then of rows 4..8                          (dot16: one token at a time)
//! Pairs    columns 8 c .. 8 c + 8 of rows 0 and 1, of 2 and 3, ...         (matrix8: two tokens at a time)
//! ```

use crate::activation::QuantRow;
use crate::neon::tile::{
    Columns, Kind, Scales, Sums, Weights, add_block, codes, products, start, stored, sum_up,
};
use crate::neon::vectors::{MatrixVectors, Vectors};
use crate::pack::{GroupShape, LANES};
use crate::quant::segment;

/// Tokens a panel meets.
pub(crate) const TOKENS: usize = 64;

/// The codes of 8 rows x 32 columns, one a byte.
type Plain = [[u8; 16]; 16];

/// An order of plain codes, and how tokens meet them.
pub(crate) trait Order<V: Vectors> {
    fn arrange<F: Kind>(planes: &[[u8; 16]], to: &mut Plain);
    fn products<F: Kind, const N: usize>(codes: &Plain, x: &[Columns<'_>; N]) -> Sums<V, N>;
}

pub(crate) struct Quads;

impl<V: Vectors> Weights<V> for Plain {
    #[inline(always)]
    fn quad(&self, quad: usize, side: usize) -> V::Bytes {
        V::bytes(&self[2 * quad + side])
    }
}

impl<V: Vectors> Order<V> for Quads {
    #[inline(always)]
    fn arrange<F: Kind>(planes: &[[u8; 16]], to: &mut Plain) {
        /// Two quads of both sides.
        #[inline(always)]
        fn two<V: Vectors, F: Kind, const FIRST: usize>(planes: &[[u8; 16]], to: &mut Plain) {
            V::store_bytes(codes::<V, F>(planes, FIRST, 0), &mut to[2 * FIRST]);
            V::store_bytes(codes::<V, F>(planes, FIRST, 1), &mut to[2 * FIRST + 1]);
            V::store_bytes(codes::<V, F>(planes, FIRST + 1, 0), &mut to[2 * FIRST + 2]);
            V::store_bytes(codes::<V, F>(planes, FIRST + 1, 1), &mut to[2 * FIRST + 3]);
        }
        two::<V, F, 0>(planes, to);
        two::<V, F, 2>(planes, to);
        two::<V, F, 4>(planes, to);
        two::<V, F, 6>(planes, to);
    }

    #[inline(always)]
    fn products<F: Kind, const N: usize>(codes: &Plain, x: &[Columns<'_>; N]) -> Sums<V, N> {
        products::<V, F, N>(codes, x)
    }
}

pub(crate) struct Pairs;

impl<V: MatrixVectors> Order<V> for Pairs {
    #[inline(always)]
    fn arrange<F: Kind>(planes: &[[u8; 16]], to: &mut Plain) {
        /// Eight columns of one side.
        #[inline(always)]
        fn eight<V: Vectors, F: Kind, const C: usize, const SIDE: usize>(
            planes: &[[u8; 16]],
            to: &mut Plain,
        ) {
            let (quad, next) = (codes::<V, F>(planes, 2 * C, SIDE), codes::<V, F>(planes, 2 * C + 1, SIDE));
            let [first, second] = V::zip(quad, next);
            V::store_bytes(first, &mut to[4 * C + 2 * SIDE]);
            V::store_bytes(second, &mut to[4 * C + 2 * SIDE + 1]);
        }
        eight::<V, F, 0, 0>(planes, to);
        eight::<V, F, 0, 1>(planes, to);
        eight::<V, F, 1, 0>(planes, to);
        eight::<V, F, 1, 1>(planes, to);
        eight::<V, F, 2, 0>(planes, to);
        eight::<V, F, 2, 1>(planes, to);
        eight::<V, F, 3, 0>(planes, to);
        eight::<V, F, 3, 1>(planes, to);
    }

    #[inline(always)]
    fn products<F: Kind, const N: usize>(codes: &Plain, x: &[Columns<'_>; N]) -> Sums<V, N> {
        let mut sums = [[[V::ints([0; 4]); 2]; N]; 2];
        two_tokens::<V, F, N, 0>(codes, x, &mut sums);
        if N > 2 {
            two_tokens::<V, F, N, 2>(codes, x, &mut sums);
        }
        sums
    }
}

/// The integer products of tokens `FIRST` and `FIRST + 1`; an odd last one meets the rows beside itself.
#[inline(always)]
fn two_tokens<V: MatrixVectors, F: Kind, const N: usize, const FIRST: usize>(
    codes: &Plain,
    x: &[Columns<'_>; N],
    sums: &mut Sums<V, N>,
) {
    /// Eight columns.
    #[inline(always)]
    fn eight<V: MatrixVectors, const C: usize>(
        codes: &Plain,
        x: [&[[u8; 8]; 4]; 2],
        sums: &mut [V::Ints; 4],
    ) {
        let x = V::both(&x[0][C], &x[1][C]);
        sums[0] = V::matrix8(sums[0], V::bytes(&codes[4 * C]), x);
        sums[1] = V::matrix8(sums[1], V::bytes(&codes[4 * C + 1]), x);
        sums[2] = V::matrix8(sums[2], V::bytes(&codes[4 * C + 2]), x);
        sums[3] = V::matrix8(sums[3], V::bytes(&codes[4 * C + 3]), x);
    }
    let two = [x[FIRST], x[(FIRST + 1).min(N - 1)]];
    let [a, b] = two.map(|x| start::<F>(&x));
    let columns = two.map(|x| bytemuck::cast_ref::<[i8; 32], [[u8; 8]; 4]>(x.0));
    // By half, then by pair of rows.
    let mut pairs = [0, 1].map(|half| [V::ints([a[half], b[half], a[half], b[half]]); 4]);
    let last = usize::from(F::TWO_SCALES);
    eight::<V, 0>(codes, columns, &mut pairs[0]);
    eight::<V, 1>(codes, columns, &mut pairs[0]);
    eight::<V, 2>(codes, columns, &mut pairs[last]);
    eight::<V, 3>(codes, columns, &mut pairs[last]);
    for half in 0..=last {
        for side in 0..2 {
            let [first, second] = V::unzip(pairs[half][2 * side], pairs[half][2 * side + 1]);
            sums[half][FIRST][side] = first;
            if FIRST + 1 < N {
                sums[half][FIRST + 1][side] = second;
            }
        }
    }
}

/// One unpacked block of eight rows.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct PlainBlock {
    codes: Plain,
    d: [[f32; 4]; 2],
    m: [[f32; 4]; 2],
    s: [[[i32; 4]; 2]; 2],
    t: [[[i32; 4]; 2]; 2],
}

impl PlainBlock {
    #[inline(always)]
    fn scales<V: Vectors>(&self) -> Scales<V> {
        let floats = |v: &[[f32; 4]; 2]| [V::floats(&v[0]), V::floats(&v[1])];
        let ints = |v: &[[[i32; 4]; 2]; 2]| v.map(|half| half.map(|side| V::ints(side)));
        Scales { d: floats(&self.d), m: floats(&self.m), s: ints(&self.s), t: ints(&self.t) }
    }

    #[inline(always)]
    fn set_scales<V: Vectors>(&mut self, scales: &Scales<V>) {
        for side in 0..2 {
            V::store(scales.d[side], &mut self.d[side]);
            V::store(scales.m[side], &mut self.m[side]);
            for half in 0..2 {
                V::store_ints(scales.s[half][side], &mut self.s[half][side]);
                V::store_ints(scales.t[half][side], &mut self.t[half][side]);
            }
        }
    }
}

/// `[segment][token][row]`, the rows by side.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Partial([[[[f32; 4]; 2]; TOKENS]; 16]);

/// What a thread needs to multiply groups by up to 64 tokens. Large: made once per thread.
pub(crate) struct QuantPanel {
    blocks: Vec<PlainBlock>,
    partial: Box<Partial>,
}

impl QuantPanel {
    pub fn new() -> Self {
        Self { blocks: Vec::new(), partial: Box::new(bytemuck::Zeroable::zeroed()) }
    }
}

/// Eight rows of a packed group times `out.len()` tokens (at most 64), plain codes in the order of `O`; `out[n][row]`.
#[inline(always)]
pub(crate) fn multiply<V: Vectors, O: Order<V>, F: Kind>(
    panel: &mut QuantPanel,
    group: &[u8],
    shape: GroupShape,
    x: &[QuantRow<'_>],
    out: &mut [[f32; LANES]],
) {
    assert!(x.len() == out.len() && x.len() <= TOKENS, "a panel of {} tokens", x.len());
    panel.blocks.resize(shape.blocks.div_ceil(16), bytemuck::Zeroable::zeroed());
    for s in 0..16 {
        let segment = segment(s, shape.blocks);
        for (plain, block) in panel.blocks.iter_mut().zip(segment.clone()) {
            let (planes, scales) = stored::<V, F>(group, shape, block);
            O::arrange::<F>(planes, &mut plain.codes);
            plain.set_scales::<V>(&scales);
        }
        let blocks = &panel.blocks[..segment.len()];
        for (x, partial) in x.chunks(4).zip(panel.partial.0[s].chunks_mut(4)) {
            match *x {
                [a] => meet::<V, O, F, 1>(blocks, s, &[a], partial),
                [a, b] => meet::<V, O, F, 2>(blocks, s, &[a, b], partial),
                [a, b, c] => meet::<V, O, F, 3>(blocks, s, &[a, b, c], partial),
                [a, b, c, d, ..] => meet::<V, O, F, 4>(blocks, s, &[a, b, c, d], partial),
                [] => {}
            }
        }
    }
    for (n, out) in out.iter_mut().enumerate() {
        sum_up::<V>(|s| [0, 1].map(|side| V::floats(&panel.partial.0[s][n][side])), out);
    }
}

/// Segment `s` of eight rows meets `N` tokens.
#[inline(always)]
fn meet<V: Vectors, O: Order<V>, F: Kind, const N: usize>(
    blocks: &[PlainBlock],
    s: usize,
    x: &[QuantRow<'_>; N],
    partial: &mut [[[f32; 4]; 2]],
) {
    let mut acc = [[V::splat(0.0); 2]; N];
    for (i, plain) in blocks.iter().enumerate() {
        let x = std::array::from_fn(|n| x[n].block(s, i));
        let sums = O::products::<F, N>(&plain.codes, &x);
        add_block::<V, F, N>(&plain.scales(), sums, &x, &mut acc);
    }
    for (acc, partial) in acc.into_iter().zip(partial) {
        V::store(acc[0], &mut partial[0]);
        V::store(acc[1], &mut partial[1]);
    }
}
