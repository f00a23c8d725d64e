//! The scalar twin of the float matmul: element `k` belongs to partial sum `k mod 16`.

use crate::block::dequantize;
use crate::dtype::DType;
use crate::math::tree16;

/// The product of two f32 rows of equal length, a multiple of 16 (both padded with zeros).
#[inline(always)]
pub(crate) fn dot(w: impl Iterator<Item = [f32; 16]>, x: impl Iterator<Item = [f32; 16]>) -> f32 {
    let mut partial = [0.0f32; 16];
    for (w, x) in w.zip(x) {
        for ((acc, w), x) in partial.iter_mut().zip(w).zip(x) {
            *acc = w.mul_add(x, *acc);
        }
    }
    tree16(&partial)
}

/// The product of a stored row of floats, padded to 16 columns, with a padded token.
pub(crate) fn dot_row(dtype: DType, row: &[u8], x: impl Iterator<Item = [f32; 16]>) -> f32 {
    let w = row.chunks_exact(16 * dtype.block_bytes()).map(|chunk| {
        let mut values = [0.0; 16];
        // The chunk is 16 whole values, so this cannot fail.
        let _ = dequantize(dtype, chunk, &mut values);
        values
    });
    dot(w, x)
}

/// As [`dot`] for two plain f32 rows of any length: the missing places of the last 16 count as zeros.
#[inline(always)]
pub(crate) fn dot_f32(w: &[f32], x: &[f32]) -> f32 {
    let mut partial = [0.0f32; 16];
    let (w16, w_rest) = w.as_chunks::<16>();
    let (x16, x_rest) = x.as_chunks::<16>();
    for (w, x) in w16.iter().zip(x16) {
        for ((acc, w), x) in partial.iter_mut().zip(w).zip(x) {
            *acc = w.mul_add(*x, *acc);
        }
    }
    if !w_rest.is_empty() {
        let (mut w, mut x) = ([0.0; 16], [0.0; 16]);
        w[..w_rest.len()].copy_from_slice(w_rest);
        x[..x_rest.len()].copy_from_slice(x_rest);
        for ((acc, w), x) in partial.iter_mut().zip(w).zip(x) {
            *acc = w.mul_add(x, *acc);
        }
    }
    tree16(&partial)
}
