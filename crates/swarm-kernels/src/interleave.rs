//! Float weights laid out for SIMD: four rows side by side.
//!
//! A *stripe* is 4 rows. For each 16 columns, one value for each partial sum of the contract, it holds the 16 values of row 0,
//! then of rows 1, 2 and 3, as stored; columns are filled up with zeros to 16, rows to 4. So one token, four sums at a time,
//! reads memory from its beginning to its end, and the CPU looks ahead by itself; four rows apart would be four streams.

use crate::buffer::Buffer;
use crate::dtype::DType;

/// Rows in a stripe.
pub(crate) const STRIPE: usize = 4;

/// Float weights `[rows, cols]` in the layout above.
pub(crate) struct Interleaved {
    pub shape: StripeShape,
    buffer: Buffer,
}

/// How long things are, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StripeShape {
    /// 16 values of one row.
    pub sixteen: usize,
    /// All columns of four rows.
    pub bytes: usize,
}

impl StripeShape {
    /// `None` when the size overflows.
    pub fn new(dtype: DType, cols: usize) -> Option<Self> {
        let sixteen = 16 * dtype.block_bytes();
        let bytes = cols.div_ceil(16).checked_mul(STRIPE * sixteen)?;
        Some(Self { sixteen, bytes })
    }

    /// Bytes of `rows` rows.
    pub fn rows(self, rows: usize) -> Option<usize> {
        rows.div_ceil(STRIPE).checked_mul(self.bytes)
    }
}

/// Some stripes, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Stripes<'a> {
    pub bytes: &'a [u8],
    pub shape: StripeShape,
}

#[cfg(target_arch = "x86_64")]
impl Stripes<'_> {
    pub fn rows(self) -> usize {
        self.bytes.len() / self.shape.bytes.max(1) * STRIPE
    }

    /// Where the 16 values of row `row` from column `16 * sixteen` on begin.
    #[inline(always)]
    pub fn at(self, row: usize, sixteen: usize) -> usize {
        row / STRIPE * self.shape.bytes + (STRIPE * sixteen + row % STRIPE) * self.shape.sixteen
    }
}

impl Interleaved {
    /// Room for `[rows, cols]`, to be filled by [`interleave`]. `None` when the size overflows. `place` gives zeroed memory.
    pub fn zeroed(
        dtype: DType,
        rows: usize,
        cols: usize,
        place: impl FnOnce(usize) -> Buffer,
    ) -> Option<Self> {
        let shape = StripeShape::new(dtype, cols)?;
        Some(Self { shape, buffer: place(shape.rows(rows)?) })
    }

    pub fn bytes(&self) -> &[u8] {
        self.buffer.bytes()
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.bytes_mut()
    }

    /// The stripes of up to `rows` rows from `first` on, a multiple of [`STRIPE`].
    pub fn stripes(&self, first: usize, rows: usize) -> Stripes<'_> {
        let start = first / STRIPE * self.shape.bytes;
        let left = &self.buffer.bytes()[start..];
        let bytes = rows.div_ceil(STRIPE).saturating_mul(self.shape.bytes);
        Stripes { bytes: &left[..bytes.min(left.len())], shape: self.shape }
    }

    /// The stored values of row `row`, 16 at a time, the last ones filled up with zeros.
    pub fn row(&self, row: usize) -> impl Iterator<Item = &[u8]> {
        let (stripes, sixteen) = (self.stripes(row, 1), self.shape.sixteen);
        let chunks = stripes.bytes.chunks_exact(STRIPE * sixteen);
        chunks.map(move |chunk| &chunk[row % STRIPE * sixteen..][..sixteen])
    }
}

/// Lays out whole stripes: `rows` is stored rows of `row_bytes` each, from the first row of the first stripe in `out` on. Rows
/// that are missing in the last stripe stay zero.
pub(crate) fn interleave(shape: StripeShape, row_bytes: usize, rows: &[u8], out: &mut [u8]) {
    if row_bytes == 0 {
        return;
    }
    for (rows, out) in rows.chunks(STRIPE * row_bytes).zip(out.chunks_exact_mut(shape.bytes)) {
        for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
            match shape.sixteen {
                64 => put_row::<64>(row, lane, out),
                _ => put_row::<32>(row, lane, out),
            }
        }
    }
}

/// `B` bytes are 16 values.
fn put_row<const B: usize>(row: &[u8], lane: usize, out: &mut [u8]) {
    let (whole, rest) = row.as_chunks::<B>();
    let mut places = out.as_chunks_mut::<B>().0.iter_mut().skip(lane).step_by(STRIPE);
    for (from, to) in whole.iter().zip(&mut places) {
        *to = *from;
    }
    if let Some(to) = places.next() {
        to[..rest.len()].copy_from_slice(rest);
    }
}
