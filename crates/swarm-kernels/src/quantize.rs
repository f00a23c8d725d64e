//! Float weights to blocks: what `--quant` does while a model is loaded.
//!
//! Every step is an f32 addition, multiplication, division or comparison, each rounded once as IEEE 754 says, in an order
//! that is written down here: all CPUs make the same blocks. Blocks do not know of each other, so neither threads nor the
//! way rows are cut show. One body is compiled as it is with one block at a time (the scalar twin), and for wider
//! registers with sixteen blocks side by side.

use half::f16;

use crate::dtype::{DType, ShapeError};
use crate::{KernelPath, NUMERICS};

mod super_min;
#[cfg(test)]
mod tests;

/// What float matrices become while they are loaded.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Quant {
    Q8_0,
    Q4_0,
    Q4_K,
}

impl Quant {
    /// All of them, the largest first.
    pub const ALL: [Self; 3] = [Self::Q8_0, Self::Q4_0, Self::Q4_K];

    /// As it is typed, and as nodes tell each other.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_K => "q4_k",
        }
    }

    /// The one with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|quant| quant.name() == name)
    }

    /// The format of its blocks.
    pub const fn dtype(self) -> DType {
        match self {
            Self::Q8_0 => DType::Q8_0,
            Self::Q4_0 => DType::Q4_0,
            Self::Q4_K => DType::Q4_K,
        }
    }

    /// What a matrix of `from` with rows of `cols` becomes: floats these blocks where rows are whole blocks, else
    /// Q5_0 in place of Q4_K, which is nearest in size and quality, else what they are. What is quantized stays.
    pub fn applied(self, from: DType, cols: usize) -> DType {
        let fits = |dtype: &DType| !from.is_quantized() && cols > 0 && cols.is_multiple_of(dtype.block_len());
        let smaller = (self == Self::Q4_K).then_some(DType::Q5_0);
        [Some(self.dtype()), smaller].into_iter().flatten().find(fits).unwrap_or(from)
    }
}

/// What two nodes must agree on to compute the same: the contract, and what the weights are turned into while they are
/// loaded. A build that knows nothing of the latter does not take it for its own.
pub fn numerics(quant: Option<Quant>) -> String {
    quant.map_or_else(|| NUMERICS.to_owned(), |quant| format!("{NUMERICS}+{}", quant.name()))
}

/// Values that are quantized at once: sixteen blocks of 32, two of 256.
const STEP: usize = 512;

/// Turns float weights into blocks of `to`, which [`Quant::applied`] names. `stored` is any number of whole rows.
///
/// A block with a weight that is not finite, or too large for its f16 scale, has the scale NaN, so that it shows in every
/// result.
///
/// # Errors
/// [`ShapeError`] when the lengths do not belong together or `to` has no encoder.
pub fn quantize(from: DType, stored: &[u8], to: DType, out: &mut [u8]) -> Result<(), ShapeError> {
    quantize_with(KernelPath::current(), from, stored, to, out)
}

/// As [`quantize`] with the kernels named, which this CPU must have.
fn quantize_with(
    path: KernelPath,
    from: DType,
    stored: &[u8],
    to: DType,
    out: &mut [u8],
) -> Result<(), ShapeError> {
    assert!(path.is_available(), "kernels of another CPU: {}", path.name());
    let known = matches!(to, DType::Q8_0 | DType::Q4_0 | DType::Q5_0 | DType::Q4_K);
    if from.is_quantized() || !known {
        return Err(ShapeError::NoEncoder { from: from.name(), to: to.name() });
    }
    let values = stored.len() / from.block_bytes();
    from.check(1, values, stored.len())?;
    to.check(1, values, out.len())?;
    match path {
        KernelPath::Scalar => encode::<1>(from, stored, to, out),
        // SAFETY: the path is available, by the assert, and has these instructions.
        #[cfg(target_arch = "x86_64")]
        KernelPath::Avx512 => unsafe { avx512(from, stored, to, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        path if path.has_avx2() => unsafe { avx2(from, stored, to, out) },
        _ => encode::<16>(from, stored, to, out),
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2(from: DType, stored: &[u8], to: DType, out: &mut [u8]) {
    encode::<16>(from, stored, to, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn avx512(from: DType, stored: &[u8], to: DType, out: &mut [u8]) {
    encode::<16>(from, stored, to, out);
}

/// All blocks, `L` at a time where sums are taken.
#[inline(always)]
fn encode<const L: usize>(from: DType, stored: &[u8], to: DType, out: &mut [u8]) {
    let mut values = [0.0; STEP];
    let stored = stored.chunks(STEP * from.block_bytes());
    let out = out.chunks_mut(STEP / to.block_len() * to.block_bytes());
    for (stored, out) in stored.zip(out) {
        let values = &mut values[..stored.len() / from.block_bytes()];
        widen(from, stored, values);
        match to {
            DType::Q8_0 => q8_0(values, out),
            DType::Q5_0 => q5_0::<L>(values, out),
            DType::Q4_K => super_min::q4_k::<L>(values, out),
            _ => q4_0::<L>(values, out),
        }
    }
}

/// Floats as f32: [`dequantize`](crate::dequantize) in a form that compilers turn into vectors. Exact, but for the payload of NaN.
#[inline(always)]
fn widen(from: DType, stored: &[u8], out: &mut [f32]) {
    match from {
        DType::BF16 => {
            for (value, bytes) in out.iter_mut().zip(stored.as_chunks::<2>().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        DType::F16 => {
            for (value, bytes) in out.iter_mut().zip(stored.as_chunks::<2>().0) {
                *value = wide(u16::from_le_bytes(*bytes));
            }
        }
        _ => {
            for (value, bytes) in out.iter_mut().zip(stored.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
    }
}

/// The f32 of f16 bits, without a branch and without denormal numbers on the way.
#[inline(always)]
fn wide(half: u16) -> f32 {
    const BIAS: u32 = (127 - 15) << 23;
    const ONE: u32 = 1 << 23;
    let magnitude = u32::from(half & 0x7fff) << 13;
    let moved = magnitude + BIAS;
    // Below the smallest normal f16: with the leading one that it lacks, less that one.
    let small = f32::from_bits(moved + ONE) - f32::from_bits(BIAS + ONE);
    let value = if magnitude < ONE { small } else { f32::from_bits(moved) };
    let special = if magnitude >= 31 << 23 { 0x7f80_0000 } else { 0 };
    f32::from_bits(value.to_bits() | special | (u32::from(half & 0x8000) << 16))
}

/// `1.5 * 2^23`: added to a number below 2^22, it leaves the nearest whole one, ties to even, in the lowest bits.
const WHOLE: f32 = 12_582_912.0;

/// `x` held between two bounds; NaN stays.
#[inline(always)]
fn within(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// The nearest whole number between two bounds.
#[inline(always)]
fn nearest(x: f32, low: f32, high: f32) -> f32 {
    (within(x, low, high) + WHOLE) - WHOLE
}

/// The same as a byte, with two's complement below zero.
#[inline(always)]
fn nearest_byte(x: f32, low: f32, high: f32) -> u8 {
    (within(x, low, high) + WHOLE).to_bits() as u8
}

/// `1 / x`; 0 where `x` is so small that the scale made of it is 0.
#[inline(always)]
fn inverse(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 } else { 1.0 / x }
}

/// The largest magnitude, compared as integers, so that infinities and NaN are largest.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    // Side by side, so that compilers use vectors.
    let mut most = [0; 16];
    for x in x.chunks(16) {
        for (most, x) in most.iter_mut().zip(x) {
            *most = (x.to_bits() & 0x7fff_ffff).max(*most);
        }
    }
    let mut bits = 0;
    for most in most {
        bits = most.max(bits);
    }
    f32::from_bits(bits)
}

/// A scale as it is stored, and what it means. NaN when it or the weights that it is for are not finite.
#[inline(always)]
fn stored_scale(scale: f32, largest: f32) -> (u16, f32) {
    let half = f16::from_f32(scale);
    if half.is_finite() && largest.is_finite() {
        (half.to_bits(), half.to_f32())
    } else {
        (f16::NAN.to_bits(), 0.0)
    }
}

/// Blocks of 32 side by side: value `k` of block `l` is `[k][l]`.
type Lanes<const L: usize> = [[f32; L]; 32];

/// Lays the blocks of `x`, at most `L`, side by side. Those that are missing stay what they were: they are not asked for.
#[inline(always)]
fn side_by_side<const L: usize>(x: &[f32], lanes: &mut Lanes<L>) {
    for (l, block) in x.as_chunks::<32>().0.iter().enumerate().take(L) {
        for (lane, value) in lanes.iter_mut().zip(block) {
            lane[l] = *value;
        }
    }
}

/// Q8_0: the largest magnitude is 127.
#[inline(always)]
fn q8_0(values: &[f32], out: &mut [u8]) {
    for (x, out) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<34>().0) {
        let largest = largest(x);
        let (bits, d) = stored_scale(largest * (1.0 / 127.0), largest);
        let unit = inverse(d);
        out[..2].copy_from_slice(&bits.to_le_bytes());
        for (code, x) in out[2..].iter_mut().zip(x) {
            *code = nearest_byte(x * unit, -127.0, 127.0);
        }
    }
}

/// Q4_0: 16 levels around 0.
#[inline(always)]
fn q4_0<const L: usize>(values: &[f32], out: &mut [u8]) {
    let mut lanes = [[0.0; L]; 32];
    for (values, out) in values.chunks(32 * L).zip(out.chunks_mut(18 * L)) {
        side_by_side(values, &mut lanes);
        let scales = scales::<L>(&lanes, 8.0);
        let blocks = values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<18>().0);
        for ((x, out), scale) in blocks.zip(scales) {
            let (bits, codes) = codes(x, scale, 8.0);
            out[..2].copy_from_slice(&bits.to_le_bytes());
            put_nibbles(&codes, &mut out[2..]);
        }
    }
}

/// Q5_0: 32 levels around 0.
#[inline(always)]
fn q5_0<const L: usize>(values: &[f32], out: &mut [u8]) {
    let mut lanes = [[0.0; L]; 32];
    for (values, out) in values.chunks(32 * L).zip(out.chunks_mut(22 * L)) {
        side_by_side(values, &mut lanes);
        let scales = scales::<L>(&lanes, 16.0);
        let blocks = values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<22>().0);
        for ((x, out), scale) in blocks.zip(scales) {
            let (bits, codes) = codes(x, scale, 16.0);
            let mut fifth = 0u32;
            for (i, code) in codes.iter().enumerate() {
                fifth |= u32::from(code >> 4) << i;
            }
            out[..2].copy_from_slice(&bits.to_le_bytes());
            out[2..6].copy_from_slice(&fifth.to_le_bytes());
            put_nibbles(&codes, &mut out[6..]);
        }
    }
}

/// Low nibbles: code `i` and code `i + 16` share a byte.
#[inline(always)]
fn put_nibbles(codes: &[u8; 32], out: &mut [u8]) {
    let (low, high) = codes.split_at(16);
    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
        *out = (low & 15) | ((high & 15) << 4);
    }
}

/// The stored scale of a block and its codes, with `levels` added.
#[inline(always)]
fn codes(x: &[f32; 32], scale: f32, levels: f32) -> (u16, [u8; 32]) {
    let (bits, d) = stored_scale(scale, largest(x));
    let (unit, offset) = (inverse(d), levels as u8);
    let mut codes = [0; 32];
    for (code, x) in codes.iter_mut().zip(x) {
        *code = nearest_byte(x * unit, -levels, levels - 1.0).wrapping_add(offset);
    }
    (bits, codes)
}

/// How far from `levels` the extreme value of a block is tried.
const TRIED: [f32; 8] = [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75];

/// The scale of each block for codes from `-levels` to `levels - 1`: `x ~ scale * q`.
///
/// The value of largest magnitude is mapped to the neighbourhood of `-levels`, which has one level more than the other
/// side, in several ways. Each way gives codes `q`; for given codes the least sum of `(x - scale q)^2` is at
/// `scale = sum(x q) / sum(q^2)`, and it is least for the way whose `sum(x q)^2 / sum(q^2)` is largest (the projection of
/// `x` on `q`). Sums are in order of `k`. Weighing large values more (by `x^2`, by `|x|`) cost perplexity.
#[inline(always)]
fn scales<const L: usize>(x: &Lanes<L>, levels: f32) -> [f32; L] {
    let (mut largest, mut extreme) = ([0.0; L], [0.0; L]);
    for x in x {
        for l in 0..L {
            let more = x[l].abs() > largest[l];
            extreme[l] = if more { x[l] } else { extreme[l] };
            largest[l] = if more { x[l].abs() } else { largest[l] };
        }
    }
    // Relative to the extreme value, so that no sum leaves the range of f32.
    let (mut y, mut unit) = ([[0.0; L]; 32], [0.0; L]);
    for l in 0..L {
        unit[l] = inverse(extreme[l]);
    }
    for (y, x) in y.iter_mut().zip(x) {
        for l in 0..L {
            y[l] = x[l] * unit[l];
        }
    }
    let (mut best, mut scale) = ([0.0; L], [0.0; L]);
    for tried in TRIED {
        let to_levels = -(levels + tried);
        let (mut xq, mut qq) = ([0.0; L], [0.0; L]);
        for y in &y {
            for l in 0..L {
                let q = nearest(y[l] * to_levels, -levels, levels - 1.0);
                xq[l] += y[l] * q;
                qq[l] += q * q;
            }
        }
        for l in 0..L {
            let fit = xq[l] / qq[l];
            let gain = fit * xq[l];
            // Not so for a block of zeros, where both are NaN.
            let better = gain > best[l];
            best[l] = if better { gain } else { best[l] };
            scale[l] = if better { fit } else { scale[l] };
        }
    }
    for l in 0..L {
        scale[l] *= extreme[l];
    }
    scale
}
