//! Float weights laid out for SIMD: 16 rows side by side, some columns at a time.
//!
//! A *group* is 16 rows. It is one stream, so that memory is read from its beginning to its end and the CPU looks ahead by
//! itself: *pieces* of up to 512 columns, those that lie together in a row of activations, one after the other, each of them
//! four *stripes* of 4 rows. So one token's activations, or those of a few, stay in the L1 cache while 16 rows meet them.
//!
//! ```text
//! stripe   for each 16 columns, one for each partial sum of the contract:
//!          16 values of row 0, then of rows 1, 2 and 3, as stored
//! ```
//!
//! Columns are filled up with zeros to 16, rows to a group.

use crate::activation::FloatRows;
use crate::buffer::Buffer;
use crate::dtype::DType;

/// Rows in a stripe.
pub(crate) const STRIPE: usize = 4;
/// Stripes in a group.
pub(crate) const STRIPES: usize = 4;
/// Rows in a group.
pub(crate) const GROUP: usize = STRIPES * STRIPE;

/// Float weights `[rows, cols]` in the layout above.
pub(crate) struct Interleaved {
    pub shape: FloatShape,
    buffer: Buffer,
}

/// How long things are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FloatShape {
    /// Bytes of 16 values of one row.
    pub sixteen: usize,
    /// How many times 16 columns a row has, and how many a piece.
    pub sixteens: usize,
    pub piece: usize,
    /// Bytes of a group.
    pub bytes: usize,
}

/// Where 16 columns are: in bytes, from the beginning of a group.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// In the first stripe.
    pub first: usize,
    /// From a stripe to the next.
    pub stripe: usize,
}

impl FloatShape {
    /// `None` when the size overflows.
    pub fn new(dtype: DType, cols: usize) -> Option<Self> {
        let (sixteen, sixteens) = (16 * dtype.block_bytes(), cols.div_ceil(16));
        let bytes = sixteens.checked_mul(GROUP * sixteen)?;
        Some(Self { sixteen, sixteens, piece: FloatRows::together(cols) / 16, bytes })
    }

    /// Bytes of `rows` rows.
    pub fn rows(self, rows: usize) -> Option<usize> {
        rows.div_ceil(GROUP).checked_mul(self.bytes)
    }

    /// Where columns `16 * sixteen` and the 15 behind it are.
    #[inline(always)]
    pub fn place(self, sixteen: usize) -> Place {
        let within = sixteen % self.piece;
        let before = sixteen - within;
        let stripe = STRIPE * self.sixteen * self.piece.min(self.sixteens - before);
        Place { first: (GROUP * before + STRIPE * within) * self.sixteen, stripe }
    }
}

/// Some groups, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Groups<'a> {
    pub bytes: &'a [u8],
    pub shape: FloatShape,
}

impl<'a> Groups<'a> {
    #[cfg(target_arch = "x86_64")]
    pub fn rows(self) -> usize {
        self.bytes.len() / self.shape.bytes.max(1) * GROUP
    }

    /// Of the first group, the stripes of the piece that begins at column `16 * sixteen`.
    #[inline(always)]
    pub fn stripes(self, sixteen: usize) -> [&'a [u8]; STRIPES] {
        let place = self.shape.place(sixteen);
        let piece = &self.bytes[place.first..];
        std::array::from_fn(|stripe| &piece[stripe * place.stripe..][..place.stripe])
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
        let shape = FloatShape::new(dtype, cols)?;
        Some(Self { shape, buffer: place(shape.rows(rows)?) })
    }

    pub fn bytes(&self) -> &[u8] {
        self.buffer.bytes()
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.bytes_mut()
    }

    /// The groups of `rows` rows from `first` on; both are filled up to whole groups.
    pub fn groups(&self, first: usize, rows: usize) -> Groups<'_> {
        let (start, end) = (first / GROUP, (first + rows).div_ceil(GROUP));
        let bytes = &self.buffer.bytes()[start * self.shape.bytes..end * self.shape.bytes];
        Groups { bytes, shape: self.shape }
    }

    /// The stored values of row `row`, 16 at a time, the last ones filled up with zeros.
    pub fn row(&self, row: usize) -> impl Iterator<Item = &[u8]> {
        let (group, shape) = (self.groups(row, 1).bytes, self.shape);
        (0..shape.sixteens).map(move |sixteen| {
            let place = shape.place(sixteen);
            let at = place.first + row % GROUP / STRIPE * place.stripe + row % STRIPE * shape.sixteen;
            &group[at..at + shape.sixteen]
        })
    }
}

/// Lays out whole groups: `rows` is stored rows of `row_bytes` each, from the first row of the first group in `out` on. Rows
/// that are missing in the last group stay zero.
pub(crate) fn interleave(shape: FloatShape, row_bytes: usize, rows: &[u8], out: &mut [u8]) {
    if row_bytes == 0 {
        return;
    }
    for (rows, out) in rows.chunks(GROUP * row_bytes).zip(out.chunks_exact_mut(shape.bytes)) {
        for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
            match shape.sixteen {
                64 => put_row::<64>(shape, row, lane, out),
                _ => put_row::<32>(shape, row, lane, out),
            }
        }
    }
}

/// `B` bytes are 16 values.
fn put_row<const B: usize>(shape: FloatShape, row: &[u8], lane: usize, group: &mut [u8]) {
    let pieces = group.chunks_mut(GROUP * shape.piece * B);
    for (row, piece) in row.chunks(shape.piece * B).zip(pieces) {
        let stripe = piece.len() / STRIPES;
        let stripe = &mut piece[lane / STRIPE * stripe..][..stripe];
        let mut places = stripe.as_chunks_mut::<B>().0.iter_mut().skip(lane % STRIPE).step_by(STRIPE);
        let (whole, rest) = row.as_chunks::<B>();
        for (from, to) in whole.iter().zip(&mut places) {
            *to = *from;
        }
        if let Some(to) = places.next() {
            to[..rest.len()].copy_from_slice(rest);
        }
    }
}
