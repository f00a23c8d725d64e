//! Q4_K: 256 values in eight parts of 32, each with a scale and a minimum of six bits in units that all eight share.

use super::{Lanes, inverse, largest, nearest, nearest_byte, side_by_side, stored_scale};

/// The largest code, and the largest six-bit scale or minimum.
const TOP: f32 = 15.0;
const SIX_BITS: f32 = 63.0;

/// `[blocks * 256]` values to blocks of 144 bytes: d, dmin, 12 bytes of scales and minima, codes.
#[inline(always)]
pub(super) fn q4_k<const L: usize>(values: &[f32], out: &mut [u8]) {
    let (mut scales, mut mins) = ([0.0; 16], [0.0; 16]);
    let parts = values.chunks(32 * L).zip(scales.chunks_mut(L).zip(mins.chunks_mut(L)));
    let mut lanes = [[0.0; L]; 32];
    for (values, (scales, mins)) in parts {
        side_by_side(values, &mut lanes);
        let (scale, min) = fit::<L>(&lanes);
        scales.copy_from_slice(&scale[..scales.len()]);
        mins.copy_from_slice(&min[..mins.len()]);
    }
    let fits = scales.as_chunks::<8>().0.iter().zip(mins.as_chunks::<8>().0);
    let blocks = values.as_chunks::<256>().0.iter().zip(out.as_chunks_mut::<144>().0);
    for ((x, out), (scales, mins)) in blocks.zip(fits) {
        block(x, scales, mins, out);
    }
}

/// Rounds the scales and minima of a block's parts to six bits, and the values to what these make of their codes.
#[inline(always)]
fn block(x: &[f32; 256], scales: &[f32; 8], mins: &[f32; 8], out: &mut [u8; 144]) {
    let size = largest(x);
    let (d_bits, d) = stored_scale(largest(scales) * (1.0 / SIX_BITS), size);
    let (dmin_bits, dmin) = stored_scale(largest(mins) * (1.0 / SIX_BITS), size);
    out[..2].copy_from_slice(&d_bits.to_le_bytes());
    out[2..4].copy_from_slice(&dmin_bits.to_le_bytes());
    let (d_unit, dmin_unit) = (inverse(d), inverse(dmin));
    let (mut s, mut t) = ([0; 8], [0; 8]);
    let (six, codes) = out[4..].split_at_mut(12);
    for (pair, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let mut halves = [[0u8; 32]; 2];
        for (half, levels) in halves.iter_mut().enumerate() {
            let part = 2 * pair + half;
            let scale = nearest(scales[part] * d_unit, 0.0, SIX_BITS);
            let min = nearest(mins[part] * dmin_unit, 0.0, SIX_BITS);
            (s[part], t[part]) = (scale as u8, min as u8);
            let (unit, low) = (inverse(d * scale), dmin * min);
            for (level, x) in levels.iter_mut().zip(&x[32 * part..][..32]) {
                *level = nearest_byte((x + low) * unit, 0.0, TOP);
            }
        }
        let [low, high] = halves;
        for ((code, low), high) in codes.iter_mut().zip(low).zip(high) {
            *code = low | (high << 4);
        }
    }
    for j in 0..4 {
        six[j] = s[j] | ((s[j + 4] >> 4) << 6);
        six[j + 4] = t[j] | ((t[j + 4] >> 4) << 6);
        six[j + 8] = (s[j + 4] & 15) | ((t[j + 4] & 15) << 4);
    }
}

/// How far from `TOP` the largest value is tried.
const TRIED: [f32; 8] = [-1.25, -0.95, -0.65, -0.35, -0.05, 0.25, 0.55, 0.85];

/// Scale and minimum of each part: `x ~ scale * q - min` with codes from 0 to 15, both at least 0.
///
/// The range from the least value, or 0, to the largest is mapped to the codes in several ways. For given codes `q`, the
/// least sum of `w (x - scale q + min)^2` is where weighted linear regression of `x` on `q` puts it (the normal equations
/// of two unknowns, by Cramer's rule), or where regression through 0 does when `min` would be below 0. The way that
/// explains most of `sum(w x^2)` is taken. The weight of a value is `w = |x| + mean |x|`: between one that sees large
/// values only and one that sees all alike. Sums are in order of `k`.
#[inline(always)]
fn fit<const L: usize>(x: &Lanes<L>) -> ([f32; L], [f32; L]) {
    let (mut size, mut low, mut high) = ([0.0; L], [0.0; L], [f32::MIN; L]);
    for x in x {
        for l in 0..L {
            size[l] = if x[l].abs() > size[l] { x[l].abs() } else { size[l] };
            low[l] = if x[l] < low[l] { x[l] } else { low[l] };
            high[l] = if x[l] > high[l] { x[l] } else { high[l] };
        }
    }
    // Relative to the largest magnitude, so that no sum leaves the range of f32.
    let (mut y, mut w, mut mean, mut range) = ([[0.0; L]; 32], [[0.0; L]; 32], [0.0; L], [0.0; L]);
    for l in 0..L {
        let unit = inverse(size[l]);
        low[l] *= unit;
        range[l] = inverse(high[l] * unit - low[l]);
        for (y, x) in y.iter_mut().zip(x) {
            y[l] = x[l] * unit;
        }
    }
    for y in &y {
        for l in 0..L {
            mean[l] += y[l].abs() * (1.0 / 32.0);
        }
    }
    let (mut sum_w, mut sum_x) = ([0.0; L], [0.0; L]);
    for (y, w) in y.iter().zip(&mut w) {
        for l in 0..L {
            w[l] = y[l].abs() + mean[l];
            sum_w[l] += w[l];
            sum_x[l] += w[l] * y[l];
        }
    }
    let (mut best, mut scale, mut min) = ([0.0; L], [0.0; L], [0.0; L]);
    for tried in TRIED {
        let mut to_codes = [0.0; L];
        for l in 0..L {
            to_codes[l] = (TOP + tried) * range[l];
        }
        let (mut sum_q, mut sum_qq, mut sum_xq) = ([0.0; L], [0.0; L], [0.0; L]);
        for (y, w) in y.iter().zip(&w) {
            for l in 0..L {
                let q = nearest((y[l] - low[l]) * to_codes[l], 0.0, TOP);
                let wq = w[l] * q;
                sum_q[l] += wq;
                sum_qq[l] += wq * q;
                sum_xq[l] += wq * y[l];
            }
        }
        for l in 0..L {
            let (a, b) = regression(sum_w[l], sum_q[l], sum_qq[l], sum_x[l], sum_xq[l]);
            let gain = a * sum_xq[l] - b * sum_x[l];
            // Not so for a part of zeros, where it is NaN.
            let better = gain > best[l];
            best[l] = if better { gain } else { best[l] };
            scale[l] = if better { a } else { scale[l] };
            min[l] = if better { b } else { min[l] };
        }
    }
    for l in 0..L {
        scale[l] *= size[l];
        min[l] *= size[l];
    }
    (scale, min)
}

/// Scale and minimum for given codes, from the weighted sums of 1, q, q^2, x and x q.
#[inline(always)]
fn regression(w: f32, q: f32, qq: f32, x: f32, xq: f32) -> (f32, f32) {
    let determinant = w * qq - q * q;
    // Of codes that are all equal it is 0, and what is left of it rounding.
    let is_line = determinant > 1e-5 * (w * qq);
    let (a, b) = ((w * xq - q * x) / determinant, (q * xq - qq * x) / determinant);
    let is_line = is_line && b >= 0.0;
    let through_zero = if qq > 0.0 { xq / qq } else { 0.0 };
    let flat = if qq > 0.0 { 0.0 } else { -x / w };
    let (a, b) = (if is_line { a } else { through_zero }, if is_line { b } else { flat });
    (if a > 0.0 { a } else { 0.0 }, if b > 0.0 { b } else { 0.0 })
}
