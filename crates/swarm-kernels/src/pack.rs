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
    /// Room for `[rows, cols]`, whose size as stored was checked; every group is to be filled by [`pack_groups`].
    /// `None` when the size overflows. `place` gives zeroed memory.
    pub fn zeroed(
        dtype: DType,
        rows: usize,
        cols: usize,
        place: impl FnOnce(usize) -> Buffer,
    ) -> Option<Self> {
        let format = Format::of(dtype).expect("quantized");
        let shape = GroupShape::new(format, cols / 32);
        let bytes = rows.div_ceil(LANES).checked_mul(shape.bytes)?;
        Some(Self { format, shape, buffer: place(bytes) })
    }

    /// All groups, one after the other, `shape.bytes` each.
    #[cfg(test)]
    pub fn groups(&self) -> &[u8] {
        self.buffer.bytes()
    }

    /// All groups, to be filled: one after the other, `shape.bytes` each.
    pub fn groups_mut(&mut self) -> &mut [u8] {
        self.buffer.bytes_mut()
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

fn take_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Lays out whole groups: `rows` is stored rows of `row_bytes` each, from the first row of the first group in `out` on.
///
/// The last group may have fewer than eight rows; the lanes of the others stay zero. Costs some two cycles per byte.
pub(crate) fn pack_groups(dtype: DType, shape: GroupShape, row_bytes: usize, rows: &[u8], out: &mut [u8]) {
    if row_bytes == 0 {
        return;
    }
    let groups = rows.chunks(LANES * row_bytes).zip(out.chunks_exact_mut(shape.bytes));
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        for (rows, out) in groups {
            // SAFETY: AVX2 was detected on the line above.
            unsafe { pack_group_avx2(dtype, shape, row_bytes, rows, out) };
        }
        return;
    }
    groups.for_each(|(rows, out)| pack_group(dtype, shape, row_bytes, rows, out));
}

/// [`pack_group`] compiled for AVX2; it only moves bits, so there is nothing that could differ.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn pack_group_avx2(dtype: DType, shape: GroupShape, row_bytes: usize, rows: &[u8], out: &mut [u8]) {
    pack_group(dtype, shape, row_bytes, rows, out);
}

/// One body per format, so that each compiles to straight code.
#[inline(always)]
fn pack_group(dtype: DType, shape: GroupShape, row_bytes: usize, rows: &[u8], out: &mut [u8]) {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats are not packed"),
        DType::Q4_0 => pack_group_of(DType::Q4_0, shape, row_bytes, rows, out),
        DType::Q4_1 => pack_group_of(DType::Q4_1, shape, row_bytes, rows, out),
        DType::Q5_0 => pack_group_of(DType::Q5_0, shape, row_bytes, rows, out),
        DType::Q5_1 => pack_group_of(DType::Q5_1, shape, row_bytes, rows, out),
        DType::Q8_0 => pack_group_of(DType::Q8_0, shape, row_bytes, rows, out),
        DType::Q2_K => pack_group_of(DType::Q2_K, shape, row_bytes, rows, out),
        DType::Q3_K => pack_group_of(DType::Q3_K, shape, row_bytes, rows, out),
        DType::Q4_K => pack_group_of(DType::Q4_K, shape, row_bytes, rows, out),
        DType::Q5_K => pack_group_of(DType::Q5_K, shape, row_bytes, rows, out),
        DType::Q6_K => pack_group_of(DType::Q6_K, shape, row_bytes, rows, out),
    }
}

#[inline(always)]
fn pack_group_of(dtype: DType, shape: GroupShape, row_bytes: usize, rows: &[u8], out: &mut [u8]) {
    let format = Format::of(dtype).expect("quantized");
    let (block_bytes, parts) = (dtype.block_bytes(), dtype.block_len() / 32);
    // A lane without a row holds zero bits everywhere.
    let absent = Codes { q: [-format.offset as i8; 32], ..Codes::ZERO };
    let mut codes = [absent; LANES];
    for stored in 0..shape.blocks / parts {
        for part in 0..parts {
            for (row, codes) in rows.chunks_exact(row_bytes).zip(&mut codes) {
                *codes = decode(dtype, &row[stored * block_bytes..][..block_bytes], part);
            }
            put(format, shape, out, stored * parts + part, &codes);
        }
    }
}

/// Writes one number of each row as eight f16 or byte pairs.
#[inline(always)]
fn put_lanes(out: &mut [u8], at: usize, value: impl Fn(usize) -> u16) {
    for (lane, place) in out[at..at + 2 * LANES].as_chunks_mut::<2>().0.iter_mut().enumerate() {
        *place = value(lane).to_le_bytes();
    }
}

/// Writes block `block` of all eight rows of a group.
#[inline(always)]
fn put(format: Format, shape: GroupShape, out: &mut [u8], block: usize, codes: &[Codes; LANES]) {
    let (super_bytes, scale_bytes) = entry_bytes(format.scheme);
    let (super_at, scale_at) = (block / 8 * super_bytes, shape.scales + block * scale_bytes);
    put_lanes(out, scale_at, |lane| {
        let Codes { d, s, t, .. } = codes[lane];
        match format.scheme {
            Scheme::Scale | Scheme::ScaleMin => d,
            Scheme::SuperMin => u16::from_le_bytes([s[0] as u8, t[0]]),
            Scheme::Super16 => u16::from_le_bytes([s[0] as u8, s[1] as u8]),
            Scheme::Super16Min => u16::from_le_bytes([s[0] as u8 | (t[0] << 4), s[1] as u8 | (t[1] << 4)]),
        }
    });
    if format.scheme == Scheme::ScaleMin {
        put_lanes(out, scale_at + 2 * LANES, |lane| codes[lane].m);
    }
    if super_bytes > 0 {
        put_lanes(out, super_at, |lane| codes[lane].d);
    }
    if super_bytes == 32 {
        put_lanes(out, super_at + 2 * LANES, |lane| codes[lane].m);
    }
    let planes = &mut out[shape.planes + block * 32 * format.bits..][..32 * format.bits];
    put_planes(format, &quads(format, codes), planes);
}

/// The vectors `V_g`: quad `g` of row `lane` is number `lane` of vector `g`, offset added again.
#[inline(always)]
fn quads(format: Format, codes: &[Codes; LANES]) -> [[u32; LANES]; 8] {
    let mut quads = [[0; LANES]; 8];
    for (lane, codes) in codes.iter().enumerate() {
        let stored = codes.q.map(|q| (q as u8).wrapping_add(format.offset as u8));
        for (quad, bytes) in quads.iter_mut().zip(stored.as_chunks::<4>().0) {
            quad[lane] = u32::from_le_bytes(*bytes);
        }
    }
    quads
}

/// The codes of a byte stay below the next one's, so whole vectors can be shifted and joined.
#[inline(always)]
fn put_planes(format: Format, quads: &[[u32; LANES]; 8], planes: &mut [u8]) {
    let mut write = |at: usize, vector: [u32; LANES]| {
        for (place, value) in planes[at..at + 4 * LANES].as_chunks_mut::<4>().0.iter_mut().zip(vector) {
            *place = value.to_le_bytes();
        }
    };
    if format.bits == 8 {
        quads.iter().enumerate().for_each(|(g, quad)| write(32 * g, *quad));
        return;
    }
    // Number `lane` of the vector that holds bits `low ..` of the quads `first, first + step, ...`, `width` bits each.
    let join = |first: usize, step: usize, low: usize, width: usize, lane: usize| {
        let mask = 0x0101_0101 * ((1 << width) - 1);
        let quads = quads[first..].iter().step_by(step).enumerate();
        quads.fold(0, |joined, (i, quad)| joined | (((quad[lane] >> low) & mask) << (width * i)))
    };
    let (nibbles, pairs, singles) = plane_offsets(format.bits);
    if let Some(at) = nibbles {
        (0..4).for_each(|p| write(at + 32 * p, std::array::from_fn(|lane| join(p, 4, 0, 4, lane))));
    }
    if let Some(at) = pairs {
        let low = if nibbles.is_some() { 4 } else { 0 };
        (0..2).for_each(|p| write(at + 32 * p, std::array::from_fn(|lane| join(p, 2, low, 2, lane))));
    }
    if let Some(at) = singles {
        write(at, std::array::from_fn(|lane| join(0, 1, format.bits - 1, 1, lane)));
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
                let mut packed = Packed::zeroed(dtype, rows, cols, Buffer::zeroed).unwrap();
                let shape = packed.shape;
                pack_groups(dtype, shape, row_bytes, &bytes, packed.groups_mut());
                let mut plain = vec![0; packed.bytes()];
                for (rows, out) in bytes.chunks(LANES * row_bytes).zip(plain.chunks_exact_mut(shape.bytes)) {
                    pack_group(dtype, shape, row_bytes, rows, out);
                }
                prop_assert!(packed.groups() == plain, "{:?}", dtype);
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
