//! Quantized weights laid out for SIMD: eight rows side by side, one row per 32-bit lane.
//!
//! A *group* is 8 rows. For each block of 32 columns it holds, in three streams one after the other:
//!
//! ```text
//! supers  per 256 columns: d of the 8 rows (f16 x 8), then dmin of the 8 rows      (K formats only)
//! scales  per 32 columns:  Scale      d x 8 (f16)
//!                          ScaleMin   d x 8, m x 8 (f16)
//!                          SuperMin   (s, t) x 8 (bytes)        Super16  (s0, s1) x 8 (bytes)
//!                          Super16Min (s0 | t0 << 4, s1 | t1 << 4) x 8
//! planes  per 32 columns:  32 * bits bytes, see below
//! ```
//!
//! The 32 codes of a row are 8 quads; vector `V_g` is quad `g` of all 8 rows: byte `4 * row + j` is code
//! `4 * g + j`. 8-bit codes are the eight vectors themselves. Narrower codes are cut into planes:
//!
//! ```text
//! low nibbles   (4, 5, 6 bits)         4 vectors: quad g in vector g % 4, shifted by 4 * (g / 4)
//! bit pairs     (2, 3: low; 6: high)   2 vectors: quad g in vector g % 2, shifted by 2 * (g / 2)
//! single bits   (3, 5: top)            1 vector:  quad g shifted by g
//! ```

use crate::block::{Codes, Format, Scheme, decode};
use crate::buffer::Buffer;
use crate::dtype::DType;

/// Rows in a group.
pub(crate) const LANES: usize = 8;

/// Quantized weights `[rows, blocks * 32]` in the layout above; the last group is filled up with zero rows.
pub(crate) struct Packed {
    pub format: Format,
    pub shape: GroupShape,
    buffer: Buffer,
}

/// Where the streams of a group begin. All in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupShape {
    pub blocks: usize,
    pub scales: usize,
    pub planes: usize,
    pub bytes: usize,
}

/// Bytes of one entry of the supers and of the scales stream.
pub(crate) const fn entry_bytes(scheme: Scheme) -> (usize, usize) {
    match scheme {
        Scheme::Scale => (0, 16),
        Scheme::ScaleMin => (0, 32),
        Scheme::SuperMin | Scheme::Super16Min => (32, 16),
        Scheme::Super16 => (16, 16),
    }
}

impl GroupShape {
    pub fn new(format: Format, blocks: usize) -> Self {
        let (super_bytes, scale_bytes) = entry_bytes(format.scheme);
        let scales = (blocks.div_ceil(8) * super_bytes).next_multiple_of(64);
        let planes = scales + (blocks * scale_bytes).next_multiple_of(64);
        let bytes = (planes + blocks * 32 * format.bits).next_multiple_of(64);
        Self { blocks, scales, planes, bytes }
    }
}

/// Byte offsets of the nibble, pair and single-bit planes inside a block's planes; `None` where there is none.
const fn plane_offsets(bits: usize) -> (Option<usize>, Option<usize>, Option<usize>) {
    match bits {
        2 => (None, Some(0), None),
        3 => (None, Some(0), Some(64)),
        4 => (Some(0), None, None),
        5 => (Some(0), None, Some(128)),
        _ => (Some(0), Some(128), None),
    }
}

impl Packed {
    /// Packs checked bytes of `[rows, cols]`.
    pub fn new(dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Self {
        let format = Format::of(dtype).expect("quantized");
        let shape = GroupShape::new(format, cols / 32);
        let (row_bytes, parts) = (bytes.len() / rows.max(1), dtype.block_len() / 32);
        let mut buffer = Buffer::zeroed(rows.div_ceil(LANES) * shape.bytes);
        for (group, out) in buffer.bytes_mut().chunks_exact_mut(shape.bytes).enumerate() {
            let lanes = (rows - group * LANES).min(LANES);
            for lane in 0..lanes {
                let row = &bytes[(group * LANES + lane) * row_bytes..][..row_bytes];
                for block in 0..shape.blocks {
                    let at = block / parts * dtype.block_bytes();
                    let codes = decode(dtype, &row[at..at + dtype.block_bytes()], block % parts);
                    put(format, shape, out, block, lane, &codes);
                }
            }
        }
        Self { format, shape, buffer }
    }

    pub fn bytes(&self) -> usize {
        self.buffer.bytes().len()
    }

    pub fn group(&self, group: usize) -> &[u8] {
        &self.buffer.bytes()[group * self.shape.bytes..][..self.shape.bytes]
    }

    /// Block `block` of row `row`, taken out again.
    pub fn codes(&self, row: usize, block: usize) -> Codes {
        take(self.format, self.shape, self.group(row / LANES), block, row % LANES)
    }
}

fn put_u16(out: &mut [u8], at: usize, value: u16) {
    out[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn take_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn put(format: Format, shape: GroupShape, out: &mut [u8], block: usize, lane: usize, codes: &Codes) {
    let (super_bytes, scale_bytes) = entry_bytes(format.scheme);
    let (super_at, scale_at) =
        (block / 8 * super_bytes + 2 * lane, shape.scales + block * scale_bytes + 2 * lane);
    let pair = match format.scheme {
        Scheme::Scale => codes.d,
        Scheme::ScaleMin => {
            put_u16(out, scale_at + 16, codes.m);
            codes.d
        }
        Scheme::SuperMin => u16::from_le_bytes([codes.s[0] as u8, codes.t[0]]),
        Scheme::Super16 => u16::from_le_bytes([codes.s[0] as u8, codes.s[1] as u8]),
        Scheme::Super16Min => {
            u16::from_le_bytes([codes.s[0] as u8 | (codes.t[0] << 4), codes.s[1] as u8 | (codes.t[1] << 4)])
        }
    };
    put_u16(out, scale_at, pair);
    if super_bytes > 0 {
        put_u16(out, super_at, codes.d);
    }
    if super_bytes == 32 {
        put_u16(out, super_at + 16, codes.m);
    }
    let planes = &mut out[shape.planes + block * 32 * format.bits..][..32 * format.bits];
    for (k, &q) in codes.q.iter().enumerate() {
        let (g, byte) = (k / 4, 4 * lane + k % 4);
        if format.bits == 8 {
            planes[32 * g + byte] = q as u8;
            continue;
        }
        let code = (i32::from(q) + format.offset) as u8;
        let (nibbles, pairs, singles) = plane_offsets(format.bits);
        if let Some(at) = nibbles {
            planes[at + 32 * (g % 4) + byte] |= (code & 15) << (4 * (g / 4));
        }
        if let Some(at) = pairs {
            let two = if nibbles.is_some() { code >> 4 } else { code & 3 };
            planes[at + 32 * (g % 2) + byte] |= two << (2 * (g / 2));
        }
        if let Some(at) = singles {
            planes[at + byte] |= (code >> (format.bits - 1)) << g;
        }
    }
}

fn take(format: Format, shape: GroupShape, group: &[u8], block: usize, lane: usize) -> Codes {
    let (super_bytes, scale_bytes) = entry_bytes(format.scheme);
    let (super_at, scale_at) =
        (block / 8 * super_bytes + 2 * lane, shape.scales + block * scale_bytes + 2 * lane);
    let pair = take_u16(group, scale_at);
    let [lo, hi] = pair.to_le_bytes();
    let mut codes = match format.scheme {
        Scheme::Scale => Codes { d: pair, s: [1; 2], ..Codes::ZERO },
        Scheme::ScaleMin => Codes { d: pair, m: take_u16(group, scale_at + 16), s: [1; 2], ..Codes::ZERO },
        Scheme::SuperMin => Codes { s: [lo as i8; 2], t: [hi; 2], ..Codes::ZERO },
        Scheme::Super16 => Codes { s: [lo as i8, hi as i8], ..Codes::ZERO },
        Scheme::Super16Min => {
            Codes { s: [(lo & 15) as i8, (hi & 15) as i8], t: [lo >> 4, hi >> 4], ..Codes::ZERO }
        }
    };
    if super_bytes > 0 {
        codes.d = take_u16(group, super_at);
    }
    if super_bytes == 32 {
        codes.m = take_u16(group, super_at + 16);
    }
    let planes = &group[shape.planes + block * 32 * format.bits..][..32 * format.bits];
    codes.q = std::array::from_fn(|k| {
        let (g, byte) = (k / 4, 4 * lane + k % 4);
        if format.bits == 8 {
            return planes[32 * g + byte] as i8;
        }
        let (nibbles, pairs, singles) = plane_offsets(format.bits);
        let mut code = 0;
        if let Some(at) = nibbles {
            code |= (planes[at + 32 * (g % 4) + byte] >> (4 * (g / 4))) & 15;
        }
        if let Some(at) = pairs {
            let two = (planes[at + 32 * (g % 2) + byte] >> (2 * (g / 2))) & 3;
            code |= if nibbles.is_some() { two << 4 } else { two };
        }
        if let Some(at) = singles {
            code |= ((planes[at + byte] >> g) & 1) << (format.bits - 1);
        }
        (i32::from(code) - format.offset) as i8
    });
    codes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packing_loses_nothing(seed: u64, rows in 1usize..20, supers in 1usize..3) {
            for dtype in DType::ALL.into_iter().filter(|d| d.is_quantized()) {
                let cols = supers * 256;
                let row_bytes = dtype.row_bytes(cols).unwrap();
                let bytes = crate::matrix::tests::noise(seed, rows * row_bytes);
                let packed = Packed::new(dtype, rows, cols, &bytes);
                let parts = dtype.block_len() / 32;
                for row in 0..rows {
                    for block in 0..cols / 32 {
                        let at = row * row_bytes + block / parts * dtype.block_bytes();
                        let want = decode(dtype, &bytes[at..at + dtype.block_bytes()], block % parts);
                        prop_assert_eq!(packed.codes(row, block), want, "{:?}", dtype);
                    }
                }
            }
        }
    }
}
