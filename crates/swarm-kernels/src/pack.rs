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

use crate::block::{Codes, Format, Scheme, decode_scales};
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

    /// What to ask memory for while block `block` of `groups` groups is computed: `distance` bytes of planes further on, and
    /// the scales that belong there, as offsets of the planes and (once per cache line) the scales. Where these groups
    /// end, in the groups behind them: each stream is too short for the CPU to look ahead by itself.
    #[inline(always)]
    pub fn ahead(
        self,
        scheme: Scheme,
        bits: usize,
        groups: usize,
        block: usize,
        distance: usize,
    ) -> (usize, Option<usize>) {
        let next = block + (distance / (32 * bits)).min(self.blocks);
        let (start, block) = match next.checked_sub(self.blocks) {
            Some(block) => (groups * self.bytes, block),
            None => (0, next),
        };
        let scales = block * entry_bytes(scheme).1;
        let scales = scales.is_multiple_of(64).then_some(start + self.scales + scales);
        (start + self.planes + block * 32 * bits, scales)
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

    /// Group `group` and the one behind it, if there is one.
    pub fn two_groups(&self, group: usize) -> &[u8] {
        let from = &self.buffer.bytes()[group * self.shape.bytes..];
        &from[..from.len().min(2 * self.shape.bytes)]
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
/// The last group may have fewer than eight rows; the lanes of the others stay zero.
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
    let (supers, rest) = out.split_at_mut(shape.scales);
    let (scales, planes) = rest.split_at_mut(shape.planes - shape.scales);
    let (super_bytes, scale_bytes) = entry_bytes(format.scheme);
    for (lane, row) in rows.chunks_exact(row_bytes).take(LANES).enumerate() {
        let scales = scales.chunks_exact_mut(scale_bytes);
        let mut entries = scales.zip(planes.chunks_exact_mut(32 * format.bits));
        for (index, stored) in row.chunks_exact(block_bytes).enumerate() {
            for (part, (scales, planes)) in (0..parts).zip(&mut entries) {
                put_scales(format.scheme, &decode_scales(dtype, stored, part), scales, lane);
                put_codes(format, &quads(dtype, stored, part), planes, lane);
            }
            if super_bytes > 0 {
                // 256-blocks, one entry each.
                let entry = &mut supers[index * super_bytes..][..super_bytes];
                let Codes { d, m, .. } = decode_scales(dtype, stored, 0);
                put_u16(entry, 2 * lane, d);
                if super_bytes == 32 {
                    put_u16(entry, 16 + 2 * lane, m);
                }
            }
        }
    }
}

#[inline(always)]
fn put_u16(out: &mut [u8], at: usize, value: u16) {
    out[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Writes one row's numbers into a block's entry of the scales.
#[inline(always)]
fn put_scales(scheme: Scheme, codes: &Codes, out: &mut [u8], lane: usize) {
    let Codes { d, m, s, t, .. } = *codes;
    let pair = match scheme {
        Scheme::Scale | Scheme::ScaleMin => d,
        Scheme::SuperMin => u16::from_le_bytes([s[0] as u8, t[0]]),
        Scheme::Super16 => u16::from_le_bytes([s[0] as u8, s[1] as u8]),
        Scheme::Super16Min => u16::from_le_bytes([s[0] as u8 | (t[0] << 4), s[1] as u8 | (t[1] << 4)]),
    };
    put_u16(out, 2 * lane, pair);
    if scheme == Scheme::ScaleMin {
        put_u16(out, 16 + 2 * lane, m);
    }
}

/// Writes one row's codes into a block's planes: a 32-bit word of each vector.
///
/// The codes of a byte stay below the next one's, so whole words can be shifted and joined.
#[inline(always)]
fn put_codes(format: Format, q: &[u32; 8], planes: &mut [u8], lane: usize) {
    let mut write = |at: usize, word: u32| {
        planes[at + 4 * lane..at + 4 * lane + 4].copy_from_slice(&word.to_le_bytes());
    };
    if format.bits == 8 {
        for (g, &word) in q.iter().enumerate() {
            write(32 * g, word);
        }
        return;
    }
    let (nibbles, pairs, singles) = plane_offsets(format.bits);
    if let Some(at) = nibbles {
        for p in 0..4 {
            write(at + 32 * p, (q[p] & each(15)) | ((q[p + 4] & each(15)) << 4));
        }
    }
    if let Some(at) = pairs {
        let low = if nibbles.is_some() { 4 } else { 0 };
        let two = shifted(*q, low, 3);
        for p in 0..2 {
            write(at + 32 * p, two[p] | (two[p + 2] << 2) | (two[p + 4] << 4) | (two[p + 6] << 6));
        }
    }
    if let Some(at) = singles {
        let top = shifted(*q, format.bits - 1, 1);
        let mut joined = 0;
        for (g, bits) in top.into_iter().enumerate() {
            joined |= bits << g;
        }
        write(at, joined);
    }
}

/// `byte` in each of the four bytes of a word.
#[inline(always)]
const fn each(byte: u32) -> u32 {
    byte * 0x0101_0101
}

// Plain loops from here on: closures given to `array::from_fn` and the like stayed calls, which cost five times the work.

/// Eight words from `at` on.
#[inline(always)]
fn words(bytes: &[u8], at: usize) -> [u32; 8] {
    let mut out = [0; 8];
    for (word, bytes) in out.iter_mut().zip(bytes[at..at + 32].as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    out
}

/// `byte` of each byte, after a shift.
#[inline(always)]
fn shifted(mut words: [u32; 8], shift: usize, byte: u32) -> [u32; 8] {
    for word in &mut words {
        *word = (*word >> shift) & each(byte);
    }
    words
}

/// 16 bytes from `at` on: four words of low nibbles, then four of high ones.
#[inline(always)]
fn nibbles(bytes: &[u8], at: usize) -> [u32; 8] {
    let mut out = [0; 8];
    for (g, bytes) in bytes[at..at + 16].as_chunks::<4>().0.iter().enumerate() {
        let word = u32::from_le_bytes(*bytes);
        out[g] = word & each(15);
        out[g + 4] = (word >> 4) & each(15);
    }
    out
}

/// Puts the bits of `high << shift` above those of `low`.
#[inline(always)]
fn join(mut low: [u32; 8], high: [u32; 8], shift: usize) -> [u32; 8] {
    for (low, high) in low.iter_mut().zip(high) {
        *low |= high << shift;
    }
    low
}

/// The 32 bits from `at` on, one to a byte.
#[inline(always)]
fn spread(bytes: &[u8], at: usize) -> [u32; 8] {
    let bits = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let mut out = [0; 8];
    for (g, word) in out.iter_mut().enumerate() {
        // The factor puts bit `j` of four at `8 j`.
        *word = (((bits >> (4 * g)) & 15) * 0x0020_4081) & each(1);
    }
    out
}

/// The 32 codes of a row as stored, with their offset: code `4 g + j` is byte `j` of word `g`. Layouts are those that
/// [`decode`](crate::block::decode) reads; here four codes move at a time.
#[inline(always)]
fn quads(dtype: DType, bytes: &[u8], part: usize) -> [u32; 8] {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats have no codes"),
        DType::Q4_0 => nibbles(bytes, 2),
        DType::Q4_1 => nibbles(bytes, 4),
        DType::Q5_0 => join(nibbles(bytes, 6), spread(bytes, 2), 4),
        DType::Q5_1 => join(nibbles(bytes, 8), spread(bytes, 4), 4),
        DType::Q8_0 => words(bytes, 2),
        DType::Q2_K => shifted(words(bytes, 16 + 32 * (part / 4)), 2 * (part % 4), 3),
        DType::Q3_K => {
            let low = shifted(words(bytes, 32 + 32 * (part / 4)), 2 * (part % 4), 3);
            join(low, shifted(words(bytes, 0), part, 1), 2)
        }
        DType::Q4_K => shifted(words(bytes, 16 + 32 * (part / 2)), 4 * (part % 2), 15),
        DType::Q5_K => {
            let low = shifted(words(bytes, 48 + 32 * (part / 2)), 4 * (part % 2), 15);
            join(low, shifted(words(bytes, 16), part, 1), 4)
        }
        DType::Q6_K => {
            let (half, quarter) = (part / 4, part % 4);
            let low = shifted(words(bytes, 64 * half + 32 * (quarter % 2)), 4 * (quarter / 2), 15);
            join(low, shifted(words(bytes, 128 + 32 * half), 2 * quarter, 3), 4)
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
    use crate::block::decode;
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
