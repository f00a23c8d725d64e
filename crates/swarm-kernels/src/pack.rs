//! Quantized weights laid out for SIMD: rows side by side, one row per 32-bit lane.
//!
//! A *group* is 8 rows, or 16 with AVX-512. It is one stream, so that memory is
//! read from its beginning to its end and the CPU looks ahead by itself: superblocks of 256 columns (the last one may be
//! shorter) one after the other, each of them
//!
//! ```text
//! supers  once             d of the rows (f16 each), then dmin of the rows, or nothing     (K formats only)
//! scales  per 32 columns:  Scale      d (f16)                                     of each row
//!                          ScaleMin   d of the rows, then m of the rows (f16)
//!                          SuperMin   (s, t) (bytes)        Super16  (s0, s1) (bytes)
//!                          Super16Min (s0 | t0 << 4, s1 | t1 << 4)
//! planes  per 32 columns:  4 * bits bytes of each row, see below
//! ```
//!
//! The 32 codes of a row are 8 quads; vector `V_g` is quad `g` of all rows: byte `4 * row + j` is code
//! `4 * g + j`. 8-bit codes are the eight vectors themselves. Narrower codes are cut into planes:
//!
//! ```text
//! low nibbles   (4, 5, 6 bits)         4 vectors: quad g in vector g % 4, shifted by 4 * (g / 4)
//! bit pairs     (2, 3: low; 6: high)   2 vectors: quad g in vector g % 2, shifted by 2 * (g / 2)
//! single bits   (3, 5: top)            1 vector:  quad g shifted by g
//! ```

use std::ops::Range;

use crate::block::{Codes, Format, Scheme, decode_scales};
use crate::buffer::Buffer;
use crate::dtype::DType;

/// Rows in a group of every path but AVX-512.
pub(crate) const LANES: usize = 8;
/// Rows in a group of AVX-512.
pub(crate) const WIDE_LANES: usize = 2 * LANES;

/// Quantized weights `[rows, blocks * 32]` in the layout above; the last group is filled up with zero rows.
pub(crate) struct Packed {
    pub format: Format,
    pub shape: GroupShape,
    buffer: Buffer,
}

/// The size of a group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupShape {
    pub lanes: usize,
    pub blocks: usize,
    pub bytes: usize,
}

impl GroupShape {
    /// `None` when the size overflows.
    pub fn new(format: Format, lanes: usize, blocks: usize) -> Option<Self> {
        let layout = Layout::new(format.scheme, format.bits, lanes);
        let whole = (blocks / 8).checked_mul(layout.superblock(8))?;
        let bytes = whole.checked_add(layout.superblock(blocks % 8))?.checked_next_multiple_of(64)?;
        Some(Self { lanes, blocks, bytes })
    }
}

/// Bytes of the parts of a superblock; scales and planes of one block.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub supers: usize,
    pub scales: usize,
    pub planes: usize,
}

/// Where in its group a block is. In bytes.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub supers: usize,
    pub scales: usize,
    pub planes: usize,
}

impl Layout {
    pub const fn new(scheme: Scheme, bits: usize, lanes: usize) -> Self {
        let (supers, scales) = match scheme {
            Scheme::Scale => (0, 2 * lanes),
            Scheme::ScaleMin => (0, 4 * lanes),
            // Super16 has no dmin, but planes stay aligned to vectors.
            Scheme::SuperMin | Scheme::Super16Min | Scheme::Super16 => (4 * lanes, 2 * lanes),
        };
        Self { supers, scales, planes: 4 * lanes * bits }
    }

    /// Bytes of a superblock of `blocks` blocks.
    const fn superblock(self, blocks: usize) -> usize {
        if blocks == 0 { 0 } else { self.supers + blocks * (self.scales + self.planes) }
    }

    /// Block `block` of a group of `blocks`.
    #[inline(always)]
    pub const fn place(self, blocks: usize, block: usize) -> Place {
        let (superblock, within) = (block / 8, block % 8);
        let supers = superblock * self.superblock(8);
        let left = blocks - 8 * superblock;
        let here = if left < 8 { left } else { 8 };
        let scales = supers + self.supers;
        Place {
            supers,
            scales: scales + within * self.scales,
            planes: scales + here * self.scales + within * self.planes,
        }
    }

    /// Bytes of a block with its part of the superblock's, about: what memory is asked for while a block is computed.
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    pub const fn block(self) -> usize {
        self.superblock(8) / 8
    }
}

/// The places of a group's blocks, from the first to the last: additions, where [`Layout::place`] multiplies and divides.
#[cfg(any(test, target_arch = "x86_64"))]
pub(crate) struct Places {
    layout: Layout,
    next: Place,
    /// Blocks that are left of the superblock, and of those behind it.
    here: usize,
    behind: usize,
}

#[cfg(any(test, target_arch = "x86_64"))]
impl Places {
    pub const fn new(layout: Layout, blocks: usize) -> Self {
        Self { layout, next: Place { supers: 0, scales: 0, planes: 0 }, here: 0, behind: blocks }
    }
}

#[cfg(any(test, target_arch = "x86_64"))]
impl Iterator for Places {
    type Item = Place;

    #[inline(always)]
    fn next(&mut self) -> Option<Place> {
        if self.here == 0 {
            if self.behind == 0 {
                return None;
            }
            self.here = self.behind.min(8);
            self.behind -= self.here;
            // Planes are last in a superblock, so they ended where this one begins.
            let supers = self.next.planes;
            let scales = supers + self.layout.supers;
            self.next = Place { supers, scales, planes: scales + self.here * self.layout.scales };
        }
        let place = self.next;
        self.here -= 1;
        self.next.scales += self.layout.scales;
        self.next.planes += self.layout.planes;
        Some(place)
    }
}

/// The first vector of the nibble, pair and single-bit planes inside a block's planes; `None` where there is none.
const fn plane_vectors(bits: usize) -> (Option<usize>, Option<usize>, Option<usize>) {
    match bits {
        2 => (None, Some(0), None),
        3 => (None, Some(0), Some(2)),
        4 => (Some(0), None, None),
        5 => (Some(0), None, Some(4)),
        _ => (Some(0), Some(4), None),
    }
}

impl Packed {
    /// Room for `[rows, cols]`, whose size as stored was checked; every group is to be filled by [`pack_groups`].
    /// `None` when the size overflows. `place` gives zeroed memory.
    pub fn zeroed(
        dtype: DType,
        lanes: usize,
        rows: usize,
        cols: usize,
        place: impl FnOnce(usize) -> Buffer,
    ) -> Option<Self> {
        let format = Format::of(dtype).expect("quantized");
        let shape = GroupShape::new(format, lanes, cols / 32)?;
        let bytes = rows.div_ceil(lanes).checked_mul(shape.bytes)?;
        Some(Self { format, shape, buffer: place(bytes) })
    }

    /// All groups, one after the other, `shape.bytes` each.
    #[cfg(test)]
    pub fn all(&self) -> &[u8] {
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
        self.groups(group..group + 1)
    }

    /// Some groups, one after the other.
    pub fn groups(&self, groups: Range<usize>) -> &[u8] {
        &self.buffer.bytes()[groups.start * self.shape.bytes..groups.end * self.shape.bytes]
    }

    /// Block `block` of row `row`, taken out again.
    pub fn codes(&self, row: usize, block: usize) -> Codes {
        let lanes = self.shape.lanes;
        take(self.format, self.shape, self.group(row / lanes), block, row % lanes)
    }
}

fn take_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Lays out whole groups: `rows` is stored rows of `row_bytes` each, from the first row of the first group in `out` on.
///
/// The last group may have fewer rows than lanes; the lanes of the others stay zero.
pub(crate) fn pack_groups(dtype: DType, shape: GroupShape, row_bytes: usize, rows: &[u8], out: &mut [u8]) {
    if row_bytes == 0 {
        return;
    }
    let groups = rows.chunks(shape.lanes * row_bytes).zip(out.chunks_exact_mut(shape.bytes));
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

/// One body per format and number of lanes, so that each compiles to straight code.
#[inline(always)]
fn pack_group(dtype: DType, shape: GroupShape, row_bytes: usize, rows: &[u8], out: &mut [u8]) {
    if shape.lanes == WIDE_LANES {
        pack_lanes::<WIDE_LANES>(dtype, row_bytes, rows, out);
    } else {
        pack_lanes::<LANES>(dtype, row_bytes, rows, out);
    }
}

#[inline(always)]
fn pack_lanes<const L: usize>(dtype: DType, row_bytes: usize, rows: &[u8], out: &mut [u8]) {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats are not packed"),
        DType::Q4_0 => pack_group_of::<L>(DType::Q4_0, row_bytes, rows, out),
        DType::Q4_1 => pack_group_of::<L>(DType::Q4_1, row_bytes, rows, out),
        DType::Q5_0 => pack_group_of::<L>(DType::Q5_0, row_bytes, rows, out),
        DType::Q5_1 => pack_group_of::<L>(DType::Q5_1, row_bytes, rows, out),
        DType::Q8_0 => pack_group_of::<L>(DType::Q8_0, row_bytes, rows, out),
        DType::Q2_K => pack_group_of::<L>(DType::Q2_K, row_bytes, rows, out),
        DType::Q3_K => pack_group_of::<L>(DType::Q3_K, row_bytes, rows, out),
        DType::Q4_K => pack_group_of::<L>(DType::Q4_K, row_bytes, rows, out),
        DType::Q5_K => pack_group_of::<L>(DType::Q5_K, row_bytes, rows, out),
        DType::Q6_K => pack_group_of::<L>(DType::Q6_K, row_bytes, rows, out),
    }
}

#[inline(always)]
fn pack_group_of<const L: usize>(dtype: DType, row_bytes: usize, rows: &[u8], out: &mut [u8]) {
    let format = Format::of(dtype).expect("quantized");
    let (block_bytes, parts) = (dtype.block_bytes(), dtype.block_len() / 32);
    let layout = Layout::new(format.scheme, format.bits, L);
    for (lane, row) in rows.chunks_exact(row_bytes).take(L).enumerate() {
        // One superblock after the other, each with its own part of the row.
        let stored = row.chunks(block_bytes * 8 / parts);
        for (stored, out) in stored.zip(out.chunks_mut(layout.superblock(8))) {
            let here = stored.len() / block_bytes * parts;
            let (supers, rest) = out.split_at_mut(layout.supers);
            let (scales, planes) = rest.split_at_mut(here * layout.scales);
            if layout.supers > 0 {
                let Codes { d, m, .. } = decode_scales(dtype, stored, 0);
                put_u16(supers, 2 * lane, d);
                if format.scheme != Scheme::Super16 {
                    put_u16(supers, 2 * (L + lane), m);
                }
            }
            let mut entries =
                scales.chunks_exact_mut(layout.scales).zip(planes.chunks_exact_mut(layout.planes));
            for stored in stored.chunks_exact(block_bytes) {
                for (part, (scales, planes)) in (0..parts).zip(&mut entries) {
                    put_scales::<L>(format.scheme, &decode_scales(dtype, stored, part), scales, lane);
                    put_codes::<L>(format, &quads(dtype, stored, part), planes, lane);
                }
            }
        }
    }
}

#[inline(always)]
fn put_u16(out: &mut [u8], at: usize, value: u16) {
    out[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Writes one row's numbers into a block's scales.
#[inline(always)]
fn put_scales<const L: usize>(scheme: Scheme, codes: &Codes, out: &mut [u8], lane: usize) {
    let Codes { d, m, s, t, .. } = *codes;
    let pair = match scheme {
        Scheme::Scale | Scheme::ScaleMin => d,
        Scheme::SuperMin => u16::from_le_bytes([s[0] as u8, t[0]]),
        Scheme::Super16 => u16::from_le_bytes([s[0] as u8, s[1] as u8]),
        Scheme::Super16Min => u16::from_le_bytes([s[0] as u8 | (t[0] << 4), s[1] as u8 | (t[1] << 4)]),
    };
    put_u16(out, 2 * lane, pair);
    if scheme == Scheme::ScaleMin {
        put_u16(out, 2 * (L + lane), m);
    }
}

/// Writes one row's codes into a block's planes: a 32-bit word of each vector.
///
/// The codes of a byte stay below the next one's, so whole words can be shifted and joined.
#[inline(always)]
fn put_codes<const L: usize>(format: Format, q: &[u32; 8], planes: &mut [u8], lane: usize) {
    let mut write = |vector: usize, word: u32| {
        let at = 4 * (L * vector + lane);
        planes[at..at + 4].copy_from_slice(&word.to_le_bytes());
    };
    if format.bits == 8 {
        for (g, &word) in q.iter().enumerate() {
            write(g, word);
        }
        return;
    }
    let (nibbles, pairs, singles) = plane_vectors(format.bits);
    if let Some(at) = nibbles {
        for p in 0..4 {
            write(at + p, (q[p] & each(15)) | ((q[p + 4] & each(15)) << 4));
        }
    }
    if let Some(at) = pairs {
        let low = if nibbles.is_some() { 4 } else { 0 };
        let two = shifted(*q, low, 3);
        for p in 0..2 {
            write(at + p, two[p] | (two[p + 2] << 2) | (two[p + 4] << 4) | (two[p + 6] << 6));
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
    let lanes = shape.lanes;
    let layout = Layout::new(format.scheme, format.bits, lanes);
    let place = layout.place(shape.blocks, block);
    let scale_at = place.scales + 2 * lane;
    let pair = take_u16(group, scale_at);
    let [lo, hi] = pair.to_le_bytes();
    let mut codes = match format.scheme {
        Scheme::Scale => Codes { d: pair, s: [1; 2], ..Codes::ZERO },
        Scheme::ScaleMin => {
            Codes { d: pair, m: take_u16(group, scale_at + 2 * lanes), s: [1; 2], ..Codes::ZERO }
        }
        Scheme::SuperMin => Codes { s: [lo as i8; 2], t: [hi; 2], ..Codes::ZERO },
        Scheme::Super16 => Codes { s: [lo as i8, hi as i8], ..Codes::ZERO },
        Scheme::Super16Min => {
            Codes { s: [(lo & 15) as i8, (hi & 15) as i8], t: [lo >> 4, hi >> 4], ..Codes::ZERO }
        }
    };
    if layout.supers > 0 {
        let super_at = place.supers + 2 * lane;
        codes.d = take_u16(group, super_at);
        // Zero for Super16.
        codes.m = take_u16(group, super_at + 2 * lanes);
    }
    let planes = &group[place.planes..][..layout.planes];
    codes.q = std::array::from_fn(|k| {
        let (g, byte) = (k / 4, 4 * lane + k % 4);
        let at = |vector: usize| planes[4 * lanes * vector + byte];
        if format.bits == 8 {
            return at(g) as i8;
        }
        let (nibbles, pairs, singles) = plane_vectors(format.bits);
        let mut code = 0;
        if let Some(first) = nibbles {
            code |= (at(first + g % 4) >> (4 * (g / 4))) & 15;
        }
        if let Some(first) = pairs {
            let two = (at(first + g % 2) >> (2 * (g / 2))) & 3;
            code |= if nibbles.is_some() { two << 4 } else { two };
        }
        if let Some(first) = singles {
            code |= ((at(first) >> g) & 1) << (format.bits - 1);
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
        fn places_follow_each_other(blocks in 0usize..40) {
            for dtype in DType::ALL.into_iter().filter(|d| d.is_quantized()) {
                let format = Format::of(dtype).unwrap();
                let layout = Layout::new(format.scheme, format.bits, LANES);
                let parts = |place: Place| [place.supers, place.scales, place.planes];
                let places: Vec<_> = Places::new(layout, blocks).map(parts).collect();
                let want: Vec<_> = (0..blocks).map(|block| parts(layout.place(blocks, block))).collect();
                prop_assert_eq!(places, want, "{:?}", dtype);
            }
        }

        #[test]
        fn packing_loses_nothing(seed: u64, rows in 1usize..40, blocks in 1usize..20, wide: bool) {
            for dtype in DType::ALL.into_iter().filter(|d| d.is_quantized()) {
                let cols = (blocks * 32).next_multiple_of(dtype.block_len());
                let lanes = if wide { WIDE_LANES } else { LANES };
                let row_bytes = dtype.row_bytes(cols).unwrap();
                let bytes = crate::matrix::tests::noise(seed, rows * row_bytes);
                let mut packed = Packed::zeroed(dtype, lanes, rows, cols, Buffer::zeroed).unwrap();
                let shape = packed.shape;
                pack_groups(dtype, shape, row_bytes, &bytes, packed.groups_mut());
                let mut plain = vec![0; packed.bytes()];
                for (rows, out) in bytes.chunks(lanes * row_bytes).zip(plain.chunks_exact_mut(shape.bytes)) {
                    pack_group(dtype, shape, row_bytes, rows, out);
                }
                prop_assert!(packed.all() == plain, "{:?}", dtype);
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
