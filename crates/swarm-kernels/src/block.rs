//! One block of 32 weights, decoded from any quantized format.
//!
//! All quantized formats are read through [`Codes`]: 32 small integers and the few scales that turn them into
//! numbers. The dequantizer, the scalar twin and the packer share this one reading of the bytes, so they cannot
//! disagree about a format.

use half::{bf16, f16};

use crate::dtype::{DType, ShapeError};

/// How a format's integers become numbers. `q` is a code after its offset was taken off, `s` a 6- or 8-bit scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// `d * q`: Q4_0, Q5_0, Q8_0.
    Scale,
    /// `d * q + m`: Q4_1, Q5_1.
    ScaleMin,
    /// `d * s * q - dmin * t`, one `s` and `t` per 32: Q4_K, Q5_K.
    SuperMin,
    /// `d * s * q`, one `s` per 16: Q3_K, Q6_K.
    Super16,
    /// `d * s * q - dmin * t`, one `s` and `t` per 16: Q2_K.
    Super16Min,
}

/// Layout facts of a quantized format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    pub scheme: Scheme,
    /// Bits of a stored code (8 means a signed byte without offset).
    pub bits: usize,
    /// What is subtracted from the stored code.
    pub offset: i32,
}

impl Format {
    /// `None` for plain floats.
    pub const fn of(dtype: DType) -> Option<Self> {
        let (scheme, bits, offset) = match dtype {
            DType::F32 | DType::F16 | DType::BF16 => return None,
            DType::Q4_0 => (Scheme::Scale, 4, 8),
            DType::Q4_1 => (Scheme::ScaleMin, 4, 0),
            DType::Q5_0 => (Scheme::Scale, 5, 16),
            DType::Q5_1 => (Scheme::ScaleMin, 5, 0),
            DType::Q8_0 => (Scheme::Scale, 8, 0),
            DType::Q2_K => (Scheme::Super16Min, 2, 0),
            DType::Q3_K => (Scheme::Super16, 3, 4),
            DType::Q4_K => (Scheme::SuperMin, 4, 0),
            DType::Q5_K => (Scheme::SuperMin, 5, 0),
            DType::Q6_K => (Scheme::Super16, 6, 32),
        };
        Some(Self { scheme, bits, offset })
    }
}

/// 32 weights of any quantized format: codes with the offset taken off, and their scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Codes {
    pub q: [i8; 32],
    /// `d`, f16 bits.
    pub d: u16,
    /// `m` or `dmin`, f16 bits; 0 where the format has none.
    pub m: u16,
    /// Scales of the two halves (equal where the format has one per 32, 1 where it has none).
    pub s: [i8; 2],
    /// Mins of the two halves, likewise.
    pub t: [u8; 2],
}

impl Codes {
    pub const ZERO: Self = Self { q: [0; 32], d: 0, m: 0, s: [0; 2], t: [0; 2] };

    /// Weight `i` as the `gguf` package dequantizes it: same operations, same order.
    fn value(&self, scheme: Scheme, i: usize) -> f32 {
        let (d, m, q, half) = (half(self.d), half(self.m), f32::from(self.q[i]), i / 16);
        let (s, t) = (f32::from(self.s[half]), f32::from(self.t[half]));
        match scheme {
            Scheme::Scale => d * q,
            Scheme::ScaleMin => d * q + m,
            Scheme::SuperMin | Scheme::Super16Min => (d * s) * q - m * t,
            Scheme::Super16 => (d * s) * q,
        }
    }

    /// The 32 weights as f32.
    pub fn values(&self, scheme: Scheme) -> [f32; 32] {
        std::array::from_fn(|i| self.value(scheme, i))
    }
}

/// The f32 value of f16 bits. Exact.
#[inline(always)]
pub(crate) fn half(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

#[inline(always)]
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Reads the 32 weights number `part` (0 for 32-blocks, 0..8 for 256-blocks) of the block in `bytes`.
///
/// `bytes` is exactly one block of `dtype`; layouts are those of GGUF (`gguf-py/gguf/quants.py` states them).
pub(crate) fn decode(dtype: DType, bytes: &[u8], part: usize) -> Codes {
    debug_assert_eq!(bytes.len(), dtype.block_bytes());
    let q = match dtype {
        DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats have no codes"),
        DType::Q4_0 => nibbles(&bytes[2..18], -8),
        DType::Q4_1 => nibbles(&bytes[4..20], 0),
        DType::Q5_0 => fifth_bit(nibbles(&bytes[6..22], 0), &bytes[2..6], -16),
        DType::Q5_1 => fifth_bit(nibbles(&bytes[8..24], 0), &bytes[4..8], 0),
        DType::Q8_0 => std::array::from_fn(|i| bytes[2 + i] as i8),
        DType::Q2_K => q2_k(bytes, part),
        DType::Q3_K => q3_k(bytes, part),
        DType::Q4_K => nibble_half(&bytes[16 + 32 * (part / 2)..][..32], part % 2),
        DType::Q5_K => {
            let low = nibble_half(&bytes[48 + 32 * (part / 2)..][..32], part % 2);
            std::array::from_fn(|i| low[i] | ((((bytes[16 + i] >> part) & 1) << 4) as i8))
        }
        DType::Q6_K => q6_k(bytes, part),
    };
    Codes { q, ..decode_scales(dtype, bytes, part) }
}

/// As [`decode`], with all codes 0.
#[inline(always)]
pub(crate) fn decode_scales(dtype: DType, bytes: &[u8], part: usize) -> Codes {
    let one = Codes { d: u16_at(bytes, 0), s: [1; 2], ..Codes::ZERO };
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats have no codes"),
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => one,
        DType::Q4_1 | DType::Q5_1 => Codes { m: u16_at(bytes, 2), ..one },
        // 16 bytes of scale and min nibbles, 64 bytes of 2-bit codes, d, dmin
        DType::Q2_K => {
            let (lo, hi) = (bytes[2 * part], bytes[2 * part + 1]);
            let (s, t) = ([(lo & 15) as i8, (hi & 15) as i8], [lo >> 4, hi >> 4]);
            Codes { d: u16_at(bytes, 80), m: u16_at(bytes, 82), s, t, ..Codes::ZERO }
        }
        // 32 bytes of third bits, 64 bytes of low bits, 12 bytes of 6-bit scales, d
        DType::Q3_K => {
            let mut s = [0; 2];
            for (j, s) in (2 * part..).zip(&mut s) {
                let low = (bytes[96 + j % 8] >> (4 * (j / 8))) & 15;
                let high = (bytes[104 + j % 4] >> (2 * (j / 4))) & 3;
                *s = (low | (high << 4)) as i8 - 32;
            }
            Codes { d: u16_at(bytes, 108), s, ..Codes::ZERO }
        }
        // d, dmin, 12 bytes of 6-bit scales and mins, codes
        DType::Q4_K | DType::Q5_K => {
            let (s, t) = six_bit_scales(&bytes[4..16], part);
            Codes { m: u16_at(bytes, 2), s: [s as i8; 2], t: [t; 2], ..one }
        }
        // 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, d
        DType::Q6_K => {
            let s = [bytes[192 + 2 * part] as i8, bytes[193 + 2 * part] as i8];
            Codes { d: u16_at(bytes, 208), s, ..Codes::ZERO }
        }
    }
}

/// 16 bytes to 32 codes: low nibbles first, then high nibbles.
fn nibbles(bytes: &[u8], offset: i8) -> [i8; 32] {
    std::array::from_fn(|i| {
        let byte = bytes[i % 16];
        (if i < 16 { byte & 15 } else { byte >> 4 }) as i8 + offset
    })
}

/// Adds bit `i` of the 32-bit word in `high` as bit 4 of code `i`.
fn fifth_bit(low: [i8; 32], high: &[u8], offset: i8) -> [i8; 32] {
    std::array::from_fn(|i| (low[i] | ((((high[i / 8] >> (i % 8)) & 1) << 4) as i8)) + offset)
}

/// 32 bytes to 32 codes: the low or the high nibble of each.
fn nibble_half(bytes: &[u8], high: usize) -> [i8; 32] {
    std::array::from_fn(|i| ((bytes[i] >> (4 * high)) & 15) as i8)
}

/// The 6-bit scale and min number `part` of the 12 bytes that Q4_K and Q5_K hold them in.
#[inline(always)]
fn six_bit_scales(bytes: &[u8], part: usize) -> (u8, u8) {
    if part < 4 {
        (bytes[part] & 63, bytes[part + 4] & 63)
    } else {
        let low = bytes[part + 4];
        ((low & 15) | ((bytes[part - 4] >> 6) << 4), (low >> 4) | ((bytes[part] >> 6) << 4))
    }
}

/// The codes of Q2_K.
fn q2_k(bytes: &[u8], part: usize) -> [i8; 32] {
    let codes = &bytes[16 + 32 * (part / 4)..][..32];
    std::array::from_fn(|i| ((codes[i] >> (2 * (part % 4))) & 3) as i8)
}

/// The codes of Q3_K.
fn q3_k(bytes: &[u8], part: usize) -> [i8; 32] {
    let (third, low) = (&bytes[..32], &bytes[32 + 32 * (part / 4)..][..32]);
    std::array::from_fn(|i| {
        let bits = ((low[i] >> (2 * (part % 4))) & 3) | (((third[i] >> part) & 1) << 2);
        bits as i8 - 4
    })
}

/// The codes of Q6_K.
fn q6_k(bytes: &[u8], part: usize) -> [i8; 32] {
    let (half, quarter) = (part / 4, part % 4);
    let low = &bytes[64 * half + 32 * (quarter % 2)..][..32];
    let high = &bytes[128 + 32 * half..][..32];
    std::array::from_fn(|i| {
        let bits = ((low[i] >> (4 * (quarter / 2))) & 15) | (((high[i] >> (2 * quarter)) & 3) << 4);
        bits as i8 - 32
    })
}

/// Turns stored weights into f32. `bytes` is any whole number of blocks; `out` has one place per value.
///
/// # Errors
/// [`ShapeError`] when the two lengths do not belong together.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<(), ShapeError> {
    dtype.check(1, out.len(), bytes.len())?;
    match dtype {
        DType::F32 => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *v = f32::from_le_bytes(*b);
            }
        }
        DType::F16 => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *v = f16::from_le_bytes(*b).to_f32();
            }
        }
        DType::BF16 => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *v = bf16::from_le_bytes(*b).to_f32();
            }
        }
        quantized => {
            let format = Format::of(quantized).expect("every type that is not a float has a format");
            let blocks = bytes.chunks_exact(quantized.block_bytes());
            for (block, values) in blocks.zip(out.chunks_exact_mut(quantized.block_len())) {
                for (part, values) in values.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    *values = decode(quantized, block, part).values(format.scheme);
                }
            }
        }
    }
    Ok(())
}
