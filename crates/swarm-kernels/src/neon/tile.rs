//! The quantized matmul tile for 128-bit vectors. Equal to `quant.rs` bit for bit.
//!
//! Eight rows lie in two vectors of four 32-bit lanes, the two *sides* (layout: `pack.rs`); 16 columns at a time meet `N`
//! tokens:
//!
//! ```text
//!                    lane 0      lane 1      lane 2      lane 3
//! w[0], side 0     [ row 0     | row 1     | row 2     | row 3     ]   columns 0..4 (bytes)
//! ...
//! w[3], side 0     [ row 0     | row 1     | row 2     | row 3     ]   columns 12..16
//! x                [ cols 0..4 | 4..8      | 8..12     | 12..16    ]   one token
//! dot16 -> i32     [ row 0     | row 1     | row 2     | row 3     ]   w[0] meets lane 0 of x, w[1] lane 1, ...
//! ```
//!
//! Two such steps are a block. Sums of codes begin at `-offset * (sum of x)`, so the offset costs nothing.

use std::marker::PhantomData;

use crate::activation::QuantRow;
use crate::block::{Format, Scheme};
use crate::dtype::DType;
use crate::neon::vectors::Vectors;
use crate::pack::{GroupShape, LANES, Layout};
use crate::quant::segment;

/// A quantized format that a tile is compiled for.
pub(crate) trait Kind {
    const FORMAT: Format;
    /// Whether the two halves of a block have multipliers of their own.
    const TWO_SCALES: bool = matches!(Self::FORMAT.scheme, Scheme::Super16 | Scheme::Super16Min);
}

macro_rules! kinds {
    ($($name:ident: $dtype:ident;)*) => {$(
        pub(crate) struct $name;
        impl Kind for $name {
            const FORMAT: Format = match Format::of(DType::$dtype) {
                Some(format) => format,
                None => unreachable!(),
            };
        }
    )*};
}

kinds! { Q40: Q4_0; Q41: Q4_1; Q50: Q5_0; Q51: Q5_1; Q80: Q8_0; Q2K: Q2_K; Q3K: Q3_K; Q4K: Q4_K; Q5K: Q5_K; Q6K: Q6_K; }

/// The 32 columns of one token: codes, scale, sums of the first and the last 16 codes.
pub(crate) type Columns<'a> = (&'a [i8; 32], f32, [i16; 2]);

/// Integer products by half of the block (only the first is used where they share a scale), token and side.
pub(crate) type Sums<V, const N: usize> = [[[<V as Vectors>::Ints; 2]; N]; 2];

/// The multipliers of one block of eight rows by side, the integer ones by half first; zero where the format has none.
pub(crate) struct Scales<V: Vectors> {
    pub d: [V::Floats; 2],
    pub m: [V::Floats; 2],
    pub s: [[V::Ints; 2]; 2],
    pub t: [[V::Ints; 2]; 2],
}

/// Eight rows of a packed group times `N` tokens; `out[n][row]`, `N` long.
#[inline(always)]
pub(crate) fn tile<V: Vectors, F: Kind, const N: usize>(
    group: &[u8],
    shape: GroupShape,
    x: [QuantRow<'_>; N],
    out: &mut [[f32; LANES]],
) {
    let mut partial = [[[V::splat(0.0); 2]; N]; 16];
    for (s, partial) in partial.iter_mut().enumerate() {
        let mut acc = [[V::splat(0.0); 2]; N];
        for (i, block) in segment(s, shape.blocks).enumerate() {
            let (planes, scales) = stored::<V, F>(group, shape, block);
            let x = std::array::from_fn(|n| x[n].block(s, i));
            let sums = products::<V, F, N>(&Planes(planes, PhantomData::<F>), &x);
            add_block::<V, F, N>(&scales, sums, &x, &mut acc);
        }
        *partial = acc;
    }
    for (n, out) in out.iter_mut().enumerate() {
        sum_up::<V>(|s| partial[s][n], out);
    }
}

/// The contract's tree over 16 partial sums, lane by lane.
#[inline(always)]
pub(crate) fn sum_up<V: Vectors>(partial: impl Fn(usize) -> [V::Floats; 2], out: &mut [f32; LANES]) {
    for (side, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let p = |s: usize| partial(s)[side];
        let q = |s: usize| V::add(V::add(p(s), p(s + 1)), V::add(p(s + 2), p(s + 3)));
        V::store(V::add(V::add(q(0), q(4)), V::add(q(8), q(12))), out);
    }
}

/// Planes and multipliers of one stored block.
#[inline(always)]
pub(crate) fn stored<V: Vectors, F: Kind>(
    group: &[u8],
    shape: GroupShape,
    block: usize,
) -> (&[[u8; 16]], Scales<V>) {
    let layout = Layout::new(F::FORMAT.scheme, F::FORMAT.bits, LANES);
    let place = layout.place(shape.blocks, block);
    let part = |at: usize, bytes: usize| group[at..at + bytes].as_chunks::<16>().0;
    let supers = part(place.supers, layout.supers);
    let scales = part(place.scales, layout.scales);
    let planes = part(place.planes, layout.planes);
    let floats = |of: &[u8; 16]| V::halves(V::bytes(of));
    let (none, no_ints) = ([V::splat(0.0); 2], [[V::ints([0; 4]); 2]; 2]);
    let pairs = V::bytes(&scales[0]);
    let scales = match F::FORMAT.scheme {
        Scheme::Scale => Scales { d: floats(&scales[0]), m: none, s: no_ints, t: no_ints },
        Scheme::ScaleMin => Scales { d: floats(&scales[0]), m: floats(&scales[1]), s: no_ints, t: no_ints },
        Scheme::Super16 => Scales { d: floats(&supers[0]), m: none, s: V::pairs(pairs, true), t: no_ints },
        Scheme::SuperMin => {
            let [s, t] = V::pairs(pairs, false);
            Scales { d: floats(&supers[0]), m: floats(&supers[1]), s: [s; 2], t: [t; 2] }
        }
        Scheme::Super16Min => Scales {
            d: floats(&supers[0]),
            m: floats(&supers[1]),
            s: V::pairs(V::mask(pairs, 15), false),
            t: V::pairs(V::shift(pairs, 4), false),
        },
    };
    (planes, scales)
}

/// Quad `quad` of the four rows of a side, as stored codes before their offset.
#[inline(always)]
pub(crate) fn codes<V: Vectors, F: Kind>(planes: &[[u8; 16]], quad: usize, side: usize) -> V::Bytes {
    let load = |first: usize, vector: usize| V::bytes(&planes[first / 16 + 2 * vector + side]);
    let nibble = || {
        let both = load(0, quad % 4);
        if quad < 4 { V::mask(both, 15) } else { V::shift(both, 4) }
    };
    let pair = |first: usize| V::mask(V::shift(load(first, quad % 2), 2 * (quad / 2)), 3);
    let single = |first: usize| V::mask(V::shift(load(first, 0), quad), 1);
    match F::FORMAT.bits {
        2 => pair(0),
        3 => V::join(pair(0), single(64), 2),
        4 => nibble(),
        5 => V::join(nibble(), single(128), 4),
        6 => V::join(nibble(), pair(128), 4),
        _ => load(0, quad),
    }
}

/// What the integer products of `x` begin with: the offset's share, by half.
#[inline(always)]
pub(crate) fn start<F: Kind>(x: &Columns<'_>) -> [i32; 2] {
    let [first, last] = x.2.map(|sum| -F::FORMAT.offset * i32::from(sum));
    if F::TWO_SCALES { [first, last] } else { [first + last, 0] }
}

/// Eight rows x 32 columns of codes, however they lie.
pub(crate) trait Weights<V: Vectors> {
    /// Quad `quad` of the four rows of a side.
    fn quad(&self, quad: usize, side: usize) -> V::Bytes;
}

/// Codes as stored.
pub(crate) struct Planes<'a, F>(pub &'a [[u8; 16]], pub PhantomData<F>);

impl<V: Vectors, F: Kind> Weights<V> for Planes<'_, F> {
    #[inline(always)]
    fn quad(&self, quad: usize, side: usize) -> V::Bytes {
        codes::<V, F>(self.0, quad, side)
    }
}

/// The integer products of one block.
#[inline(always)]
pub(crate) fn products<V: Vectors, F: Kind, const N: usize>(
    weights: &impl Weights<V>,
    x: &[Columns<'_>; N],
) -> Sums<V, N> {
    let mut sums = [[[V::ints([0; 4]); 2]; N]; 2];
    for n in 0..N {
        let [first, last] = start::<F>(&x[n]);
        sums[0][n] = [V::ints([first; 4]); 2];
        sums[1][n] = [V::ints([last; 4]); 2];
    }
    quarter::<V, F, N, 0, 0>(weights, x, &mut sums);
    quarter::<V, F, N, 0, 1>(weights, x, &mut sums);
    quarter::<V, F, N, 1, 0>(weights, x, &mut sums);
    quarter::<V, F, N, 1, 1>(weights, x, &mut sums);
    sums
}

/// One half of the columns of one side. Half and side are known to the compiler, as every shift depends on them.
#[inline(always)]
fn quarter<V: Vectors, F: Kind, const N: usize, const HALF: usize, const SIDE: usize>(
    weights: &impl Weights<V>,
    x: &[Columns<'_>; N],
    sums: &mut Sums<V, N>,
) {
    let w = [
        weights.quad(4 * HALF, SIDE),
        weights.quad(4 * HALF + 1, SIDE),
        weights.quad(4 * HALF + 2, SIDE),
        weights.quad(4 * HALF + 3, SIDE),
    ];
    for n in 0..N {
        let sum = &mut sums[if F::TWO_SCALES { HALF } else { 0 }][n][SIDE];
        let x = V::bytes(&bytemuck::cast_ref::<[i8; 32], [[u8; 16]; 2]>(x[n].0)[HALF]);
        *sum = V::dot16(*sum, w, x, F::FORMAT);
    }
}

/// Scales the integer products of one block and adds them to the running sums.
#[inline(always)]
pub(crate) fn add_block<V: Vectors, F: Kind, const N: usize>(
    scales: &Scales<V>,
    sums: Sums<V, N>,
    x: &[Columns<'_>; N],
    acc: &mut [[V::Floats; 2]; N],
) {
    for n in 0..N {
        add_side::<V, F, 0>(scales, [sums[0][n][0], sums[1][n][0]], &x[n], &mut acc[n][0]);
        add_side::<V, F, 1>(scales, [sums[0][n][1], sums[1][n][1]], &x[n], &mut acc[n][1]);
    }
}

/// As [`add_block`] for one token and one side.
#[inline(always)]
fn add_side<V: Vectors, F: Kind, const SIDE: usize>(
    scales: &Scales<V>,
    sums: [V::Ints; 2],
    x: &Columns<'_>,
    acc: &mut V::Floats,
) {
    let (dx, [x0, x1]) = (V::splat(x.1), x.2.map(i32::from));
    let (s, t) = ([scales.s[0][SIDE], scales.s[1][SIDE]], [scales.t[0][SIDE], scales.t[1][SIDE]]);
    let scaled = match F::FORMAT.scheme {
        Scheme::Scale | Scheme::ScaleMin => sums[0],
        Scheme::SuperMin => V::times(s[0], sums[0]),
        Scheme::Super16 | Scheme::Super16Min => V::plus_times(V::times(s[0], sums[0]), s[1], sums[1]),
    };
    let sum = V::fma(*acc, V::mul(scales.d[SIDE], dx), V::from_ints(scaled));
    *acc = match F::FORMAT.scheme {
        Scheme::Scale | Scheme::Super16 => sum,
        Scheme::ScaleMin => V::fma(sum, V::mul(scales.m[SIDE], dx), V::splat((x0 + x1) as f32)),
        Scheme::SuperMin => {
            let mins = V::times(t[0], V::ints([x0 + x1; 4]));
            V::fma_minus(sum, V::mul(scales.m[SIDE], dx), V::from_ints(mins))
        }
        Scheme::Super16Min => {
            let mins = V::plus_times(V::times(t[0], V::ints([x0; 4])), t[1], V::ints([x1; 4]));
            V::fma_minus(sum, V::mul(scales.m[SIDE], dx), V::from_ints(mins))
        }
    };
}
