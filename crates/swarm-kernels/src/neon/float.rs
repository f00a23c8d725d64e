//! The float matmul for 128-bit vectors. Equal to `float.rs` bit for bit.
//!
//! The 16 partial sums of one row and one token are the lanes of four vectors; a tile of 2 rows and 3 tokens, or of 4 rows
//! and 1, keeps them in registers from the first column to the last. Weights are widened as they are read.

use crate::activation::{FloatRows, Sixteen};
use crate::dtype::DType;
use crate::interleave::{Groups, STRIPE};
use crate::neon::vectors::Vectors;
use crate::pack::LANES;

/// How a float weight is stored.
trait Stored {
    const BYTES: usize;
    /// Eight weights; `at` is `BYTES / 2` vectors.
    fn eight<V: Vectors>(at: &[[u8; 16]]) -> [V::Floats; 2];
}

struct F32;
struct F16;
struct BF16;

impl Stored for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn eight<V: Vectors>(at: &[[u8; 16]]) -> [V::Floats; 2] {
        [V::words(V::bytes(&at[0])), V::words(V::bytes(&at[1]))]
    }
}

impl Stored for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn eight<V: Vectors>(at: &[[u8; 16]]) -> [V::Floats; 2] {
        V::halves(V::bytes(&at[0]))
    }
}

impl Stored for BF16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn eight<V: Vectors>(at: &[[u8; 16]]) -> [V::Floats; 2] {
        V::upper_halves(V::bytes(&at[0]))
    }
}

/// Eight float rows of a group, from row `row` of it on, times `out.len()` tokens of `x` from `first` on; `out[n][row]`.
#[inline(always)]
pub(crate) fn floats<V: Vectors>(
    dtype: DType,
    group: Groups<'_>,
    row: usize,
    x: &FloatRows,
    first: usize,
    out: &mut [[f32; LANES]],
) {
    match dtype {
        DType::F32 => tiles::<V, F32>(group, row, x, first, out),
        DType::F16 => tiles::<V, F16>(group, row, x, first, out),
        DType::BF16 => tiles::<V, BF16>(group, row, x, first, out),
        _ => unreachable!("not a float"),
    }
}

#[inline(always)]
fn tiles<V: Vectors, S: Stored>(
    group: Groups<'_>,
    row: usize,
    x: &FloatRows,
    first: usize,
    out: &mut [[f32; LANES]],
) {
    for place in [0, STRIPE] {
        let stripe = |sixteen: usize| group.stripes(sixteen)[(row + place) / STRIPE].as_chunks::<16>().0;
        for (n, out) in out.chunks_mut(3).enumerate() {
            let token = first + 3 * n;
            match out.len() {
                1 => tile::<V, S, 4, 1>(&stripe, x, token, place, out),
                2 => {
                    tile::<V, S, 2, 2>(&stripe, x, token, place, out);
                    tile::<V, S, 2, 2>(&stripe, x, token, place + 2, out);
                }
                _ => {
                    tile::<V, S, 2, 3>(&stripe, x, token, place, out);
                    tile::<V, S, 2, 3>(&stripe, x, token, place + 2, out);
                }
            }
        }
    }
}

/// `R` rows of a stripe times `N` tokens from `token` on; the results of row `r` go to `out[n][place + r]`, and `place % 4` is
/// the first row. `stripe` gives the piece that begins at 16 times a column.
#[inline(always)]
fn tile<'a, V: Vectors, S: Stored, const R: usize, const N: usize>(
    stripe: &impl Fn(usize) -> &'a [[u8; 16]],
    x: &FloatRows,
    token: usize,
    place: usize,
    out: &mut [[f32; LANES]],
) {
    let mut acc = [[[V::splat(0.0); 4]; R]; N];
    for start in x.chunks() {
        let stripe = stripe(start / 16);
        let x: [&[Sixteen]; N] = std::array::from_fn(|n| x.chunk(token + n, start));
        for i in 0..x[0].len() {
            for half in 0..2 {
                let vectors = S::BYTES / 2;
                let first = STRIPE * i + place % STRIPE;
                let mut w = [[V::splat(0.0); 2]; R];
                for (r, w) in w.iter_mut().enumerate() {
                    *w = S::eight::<V>(&stripe[(2 * (first + r) + half) * vectors..][..vectors]);
                }
                for n in 0..N {
                    let x = x[n][i].0[half].0.as_chunks::<4>().0;
                    for quarter in 0..2 {
                        let x = V::floats(&x[quarter]);
                        for r in 0..R {
                            let acc = &mut acc[n][r][2 * half + quarter];
                            *acc = V::fma(*acc, w[r][quarter], x);
                        }
                    }
                }
            }
        }
    }
    for (acc, out) in acc.iter().zip(out) {
        for (r, acc) in acc.iter().enumerate() {
            out[place + r] = V::tree(*acc);
        }
    }
}
