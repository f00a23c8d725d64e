//! Plain quantizers: rows of f32 to blocks of each GGUF format. Round to nearest with the
//! extreme value of the block as the scale; no search. Good enough to make lively models, and
//! every block is one that a real file could hold.

use half::f16;

/// Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 blocks hold 32 values; K-quant blocks hold 256.
pub(super) const BLOCK: usize = 32;
pub(super) const BLOCK_K: usize = 256;

/// The value of largest magnitude, with its sign.
fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |best, &v| if v.abs() > best.abs() { v } else { best })
}

/// Smallest (never above zero) and largest value.
fn range(x: &[f32]) -> (f32, f32) {
    x.iter().fold((0.0f32, f32::MIN), |(low, high), &v| (low.min(v), high.max(v)))
}

/// `x / unit` to the nearest integer in `low..=high`; 0 when the unit is 0.
fn level(x: f32, unit: f32, low: i32, high: i32) -> i32 {
    if unit == 0.0 { 0.clamp(low, high) } else { ((x / unit).round() as i32).clamp(low, high) }
}

/// The f16 a block stores, and the f32 it means.
fn stored(scale: f32) -> ([u8; 2], f32) {
    let half = f16::from_f32(scale);
    (half.to_le_bytes(), half.to_f32())
}

pub(super) fn q8_0(x: &[f32], out: &mut Vec<u8>) {
    let (bytes, d) = stored(extreme(x).abs() / 127.0);
    out.extend(bytes);
    out.extend(x.iter().map(|&v| level(v, d, -127, 127) as i8 as u8));
}

/// Q4_0 and Q5_0: a signed scale that maps the extreme value to the lowest level.
fn symmetric(x: &[f32], half_levels: i32, out: &mut Vec<u8>) -> Vec<u8> {
    let (bytes, d) = stored(extreme(x) / -half_levels as f32);
    out.extend(bytes);
    x.iter().map(|&v| (level(v, d, -half_levels, half_levels - 1) + half_levels) as u8).collect()
}

/// Q4_1 and Q5_1: a scale and the minimum.
fn affine(x: &[f32], top: i32, out: &mut Vec<u8>) -> Vec<u8> {
    let low = x.iter().copied().fold(f32::MAX, f32::min);
    let high = x.iter().copied().fold(f32::MIN, f32::max);
    let (d_bytes, d) = stored((high - low) / top as f32);
    let (m_bytes, m) = stored(low);
    out.extend(d_bytes);
    out.extend(m_bytes);
    x.iter().map(|&v| level(v - m, d, 0, top) as u8).collect()
}

/// Fifth bits of 32 levels as one little-endian word.
fn push_fifth_bits(levels: &[u8], out: &mut Vec<u8>) {
    let word = levels.iter().enumerate().fold(0u32, |word, (i, q)| word | (u32::from(q >> 4) << i));
    out.extend(word.to_le_bytes());
}

/// Low nibbles: value `i` and value `i + 16` share a byte.
fn push_nibbles(levels: &[u8], out: &mut Vec<u8>) {
    let (low, high) = levels.split_at(levels.len() / 2);
    out.extend(low.iter().zip(high).map(|(l, h)| (l & 15) | ((h & 15) << 4)));
}

pub(super) fn q4_0(x: &[f32], out: &mut Vec<u8>) {
    let levels = symmetric(x, 8, out);
    push_nibbles(&levels, out);
}

pub(super) fn q4_1(x: &[f32], out: &mut Vec<u8>) {
    let levels = affine(x, 15, out);
    push_nibbles(&levels, out);
}

pub(super) fn q5_0(x: &[f32], out: &mut Vec<u8>) {
    let levels = symmetric(x, 16, out);
    push_fifth_bits(&levels, out);
    push_nibbles(&levels, out);
}

pub(super) fn q5_1(x: &[f32], out: &mut Vec<u8>) {
    let levels = affine(x, 31, out);
    push_fifth_bits(&levels, out);
    push_nibbles(&levels, out);
}

/// A K-quant block with minima (Q2_K, Q4_K, Q5_K) before packing: `x = d * scale * level - dmin * min`.
struct Affine {
    d: [u8; 2],
    dmin: [u8; 2],
    scales: Vec<u8>,
    mins: Vec<u8>,
    levels: Vec<u8>,
}

fn affine_groups(x: &[f32], group: usize, top: i32, scale_top: i32) -> Affine {
    let ranges: Vec<(f32, f32)> = x.chunks(group).map(range).collect();
    let units = ranges.iter().map(|(low, high)| (high - low).max(0.0) / top as f32);
    let largest = units.clone().fold(0.0f32, f32::max);
    let deepest = ranges.iter().map(|(low, _)| -low).fold(0.0f32, f32::max);
    let (d_bytes, d) = stored(largest / scale_top as f32);
    let (dmin_bytes, dmin) = stored(deepest / scale_top as f32);
    let scales: Vec<u8> = units.map(|unit| level(unit, d, 0, scale_top) as u8).collect();
    let mins: Vec<u8> = ranges.iter().map(|(low, _)| level(-low, dmin, 0, scale_top) as u8).collect();
    let levels = x
        .iter()
        .enumerate()
        .map(|(i, &v)| {
            let (scale, min) = (f32::from(scales[i / group]), f32::from(mins[i / group]));
            level(v + dmin * min, d * scale, 0, top) as u8
        })
        .collect();
    Affine { d: d_bytes, dmin: dmin_bytes, scales, mins, levels }
}

/// A K-quant block without minima (Q3_K, Q6_K): signed scales, `x = d * scale * level`.
fn signed_groups(x: &[f32], half_levels: i32, scale_top: i32) -> ([u8; 2], Vec<i32>, Vec<u8>) {
    let units: Vec<f32> = x.chunks(16).map(|group| extreme(group) / -half_levels as f32).collect();
    let (bytes, d) = stored(extreme(&units).abs() / scale_top as f32);
    let scales: Vec<i32> = units.iter().map(|&unit| level(unit, d, -scale_top, scale_top)).collect();
    let levels = x
        .iter()
        .enumerate()
        .map(|(i, &v)| {
            (level(v, d * scales[i / 16] as f32, -half_levels, half_levels - 1) + half_levels) as u8
        })
        .collect();
    (bytes, scales, levels)
}

/// Two bits of each of 256 levels: within each half of 128, byte `l` holds values `l`, `l + 32`,
/// `l + 64`, `l + 96`.
fn push_pairs(levels: impl Fn(usize) -> u8, out: &mut Vec<u8>) {
    for half in 0..2 {
        for l in 0..32 {
            out.push((0..4).fold(0, |byte, k| byte | ((levels(half * 128 + k * 32 + l) & 3) << (2 * k))));
        }
    }
}

/// One bit of each of 256 values: byte `l` holds values `l`, `l + 32`, and so on.
fn push_bits(bit: impl Fn(usize) -> bool, out: &mut Vec<u8>) {
    for l in 0..32 {
        out.push((0..8).fold(0, |byte, k| byte | (u8::from(bit(k * 32 + l)) << k)));
    }
}

/// The 12 bytes that hold eight 6-bit scales and eight 6-bit minima in Q4_K and Q5_K.
fn push_six_bit(scales: &[u8], mins: &[u8], out: &mut Vec<u8>) {
    out.extend((0..4).map(|j| scales[j] | ((scales[j + 4] >> 4) << 6)));
    out.extend((0..4).map(|j| mins[j] | ((mins[j + 4] >> 4) << 6)));
    out.extend((0..4).map(|j| (scales[j + 4] & 15) | ((mins[j + 4] & 15) << 4)));
}

pub(super) fn q2_k(x: &[f32], out: &mut Vec<u8>) {
    let block = affine_groups(x, 16, 3, 15);
    out.extend(block.scales.iter().zip(&block.mins).map(|(scale, min)| scale | (min << 4)));
    push_pairs(|i| block.levels[i], out);
    out.extend(block.d);
    out.extend(block.dmin);
}

pub(super) fn q3_k(x: &[f32], out: &mut Vec<u8>) {
    let (d, scales, levels) = signed_groups(x, 4, 31);
    push_bits(|i| levels[i] & 4 != 0, out);
    push_pairs(|i| levels[i], out);
    let six: Vec<u8> = scales.iter().map(|scale| (scale + 32) as u8).collect();
    out.extend((0..8).map(|j| (six[j] & 15) | ((six[j + 8] & 15) << 4)));
    out.extend((0..4).map(|j| (0..4).fold(0, |byte, k| byte | ((six[4 * k + j] >> 4) << (2 * k)))));
    out.extend(d);
}

pub(super) fn q4_k(x: &[f32], out: &mut Vec<u8>) {
    let block = affine_groups(x, 32, 15, 63);
    out.extend(block.d);
    out.extend(block.dmin);
    push_six_bit(&block.scales, &block.mins, out);
    block.levels.chunks(64).for_each(|chunk| push_nibbles(chunk, out));
}

pub(super) fn q5_k(x: &[f32], out: &mut Vec<u8>) {
    let block = affine_groups(x, 32, 31, 63);
    out.extend(block.d);
    out.extend(block.dmin);
    push_six_bit(&block.scales, &block.mins, out);
    push_bits(|i| block.levels[i] & 16 != 0, out);
    block.levels.chunks(64).for_each(|chunk| push_nibbles(chunk, out));
}

pub(super) fn q6_k(x: &[f32], out: &mut Vec<u8>) {
    let (d, scales, levels) = signed_groups(x, 32, 127);
    levels.chunks(128).for_each(|half| push_nibbles(half, out));
    push_pairs(|i| levels[i] >> 4, out);
    out.extend(scales.iter().map(|&scale| scale as i8 as u8));
    out.extend(d);
}

#[cfg(test)]
mod tests {
    use crate::toy::{GgufType, spec};

    /// Blocks were compared with the `gguf` Python package when these sums were taken: root mean
    /// square errors from 0.3 % (Q8_0) to 28 % (Q2_K) of the values'.
    #[test]
    fn blocks_are_those_that_were_checked_against_gguf() {
        let tensor = spec("llama_k").tensor("model.layers.0.mlp.down_proj.weight").unwrap();
        let sums: Vec<(GgufType, u64)> = GgufType::ALL
            .into_iter()
            .map(|kind| {
                let bytes = kind.encode(&tensor.values);
                (
                    kind,
                    bytes
                        .iter()
                        .fold(7, |sum: u64, &byte| sum.wrapping_mul(0x0100_0000_01B3) ^ u64::from(byte)),
                )
            })
            .collect();
        let want = [
            (GgufType::F32, 0xa038215b2495ec44),
            (GgufType::F16, 0x4bd96c4781a149fc),
            (GgufType::BF16, 0x0ad2ab36f68e67c4),
            (GgufType::Q4_0, 0x0297721ef8f4d684),
            (GgufType::Q4_1, 0xccaa7bd6434369eb),
            (GgufType::Q5_0, 0xf2c5d67dee27c83b),
            (GgufType::Q5_1, 0x44244084825db66a),
            (GgufType::Q8_0, 0xaf6071e1abd5b33d),
            (GgufType::Q2_K, 0xc13362a48803da2d),
            (GgufType::Q3_K, 0x7481b330511f7afe),
            (GgufType::Q4_K, 0xdd4c2fe3f8acbb36),
            (GgufType::Q5_K, 0xebae11d64e6f9a8c),
            (GgufType::Q6_K, 0xa0be76a9474e3da3),
        ];
        assert_eq!(sums, want);
    }
}
