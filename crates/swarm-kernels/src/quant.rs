//! The scalar twin of the quantized matmul: what a row's product *is*.

use crate::activation::QuantRow;
use crate::block::{Codes, Format, Scheme, decode, half};
use crate::dtype::DType;
use crate::math::tree16;

/// Blocks of partial sum `s` of `blocks`: 16 contiguous segments, some empty when there are fewer than 16 blocks.
#[inline(always)]
pub(crate) fn segment(s: usize, blocks: usize) -> std::ops::Range<usize> {
    s * blocks / 16..(s + 1) * blocks / 16
}

/// `acc` plus the product of one block of weights with one block of activations.
///
/// Integers are exact; then one FMA for the scaled codes and one for the format's min term, in that order.
pub(crate) fn accumulate(scheme: Scheme, w: &Codes, x: &[i8; 32], dx: f32, sums: [i16; 2], acc: f32) -> f32 {
    let product = |range: std::ops::Range<usize>| -> i32 {
        w.q[range.clone()].iter().zip(&x[range]).map(|(&w, &x)| i32::from(w) * i32::from(x)).sum()
    };
    let scaled = i32::from(w.s[0]) * product(0..16) + i32::from(w.s[1]) * product(16..32);
    let [x0, x1] = sums.map(i32::from);
    let acc = (half(w.d) * dx).mul_add(scaled as f32, acc);
    match scheme {
        Scheme::Scale | Scheme::Super16 => acc,
        Scheme::ScaleMin => (half(w.m) * dx).mul_add((x0 + x1) as f32, acc),
        Scheme::SuperMin | Scheme::Super16Min => {
            let mins = i32::from(w.t[0]) * x0 + i32::from(w.t[1]) * x1;
            (-(half(w.m) * dx)).mul_add(mins as f32, acc)
        }
    }
}

/// The product of one row of stored blocks with one quantized row of activations.
pub(crate) fn dot_row(dtype: DType, row: &[u8], x: QuantRow<'_>) -> f32 {
    let format = Format::of(dtype).expect("quantized");
    let parts = dtype.block_len() / 32;
    dot_codes(format.scheme, x, |b| {
        let at = b / parts * dtype.block_bytes();
        decode(dtype, &row[at..at + dtype.block_bytes()], b % parts)
    })
}

/// As [`dot_row`], with the blocks delivered by `codes`.
pub(crate) fn dot_codes(scheme: Scheme, x: QuantRow<'_>, codes: impl Fn(usize) -> Codes) -> f32 {
    let partial = std::array::from_fn(|s| {
        segment(s, x.len()).enumerate().fold(0.0, |acc, (i, b)| {
            let (q, d, sums) = x.block(s, i);
            accumulate(scheme, &codes(b), q, d, sums, acc)
        })
    });
    tree16(&partial)
}
