//! The scalar twin of the float matmul: element `k` belongs to partial sum `k mod 16`.

use crate::math::tree16;

/// The product of two f32 rows of equal length, a multiple of 16 (both padded with zeros).
#[inline(always)]
pub(crate) fn dot(w: impl Iterator<Item = [f32; 16]>, x: &[f32]) -> f32 {
    let mut partial = [0.0f32; 16];
    for (w, x) in w.zip(x.as_chunks::<16>().0) {
        for ((acc, w), x) in partial.iter_mut().zip(w).zip(x) {
            *acc = w.mul_add(*x, *acc);
        }
    }
    tree16(&partial)
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
