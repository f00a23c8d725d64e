//! Weights that arrive piece by piece: a matrix is laid out while it is read, so that no second copy of it exists.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Matrix, Store};
use crate::KernelPath;
use crate::buffer::{Arena, Buffer};
use crate::dtype::{DType, ShapeError};
use crate::interleave::{FloatShape, GROUP, Interleaved, interleave};
use crate::pack::{GroupShape, Packed, WIDE_LANES, pack_groups};

/// A [`Matrix`] whose rows are not there yet.
///
/// [`MatrixBuilder::parts`] cuts it into ranges of rows that any threads fill in any order;
/// [`MatrixBuilder::finish`] gives the matrix. Memory is asked for at once but touched part by part.
pub struct MatrixBuilder {
    matrix: Matrix,
    row_bytes: usize,
    filled: AtomicUsize,
}

/// Consecutive rows of a matrix that is being filled.
pub struct MatrixPart<'a> {
    dtype: DType,
    rows: Range<usize>,
    row_bytes: usize,
    layout: Layout,
    /// The part's own place.
    out: &'a mut [u8],
    filled: &'a AtomicUsize,
}

#[derive(Clone, Copy)]
enum Layout {
    Packed(GroupShape),
    Interleaved(FloatShape),
    Rows { stride: usize },
}

impl MatrixBuilder {
    /// Parts are whole multiples of so many rows, but for the last one.
    pub const ROWS: usize = WIDE_LANES;

    /// Room for `[rows, cols]` of `dtype`, in the layout this CPU multiplies fastest, in memory of `arena`.
    ///
    /// # Errors
    /// [`ShapeError`] when `cols` is not a whole number of blocks or the size overflows.
    pub fn new(arena: &mut Arena, dtype: DType, rows: usize, cols: usize) -> Result<Self, ShapeError> {
        Self::with_path(KernelPath::current(), dtype, rows, cols, |len| arena.zeroed(len))
    }

    /// As [`MatrixBuilder::new`] with the kernels named, and memory from `place`.
    pub(super) fn with_path(
        path: KernelPath,
        dtype: DType,
        rows: usize,
        cols: usize,
        place: impl FnOnce(usize) -> Buffer,
    ) -> Result<Self, ShapeError> {
        // The proof that every `unsafe` call of a path leans on.
        assert!(path.is_available(), "kernels of another CPU: {}", path.name());
        let too_large = || ShapeError::TooLarge { rows, cols };
        let row_bytes = dtype.row_bytes(cols).ok_or(if cols.is_multiple_of(dtype.block_len()) {
            too_large()
        } else {
            ShapeError::Columns { dtype: dtype.name(), cols, block: dtype.block_len() }
        })?;
        row_bytes.checked_mul(rows).ok_or_else(too_large)?;
        let store = if path != KernelPath::Scalar && dtype.is_quantized() {
            Store::Packed(Packed::zeroed(dtype, path.lanes(), rows, cols, place).ok_or_else(too_large)?)
        } else if path != KernelPath::Scalar {
            Store::Interleaved(Interleaved::zeroed(dtype, rows, cols, place).ok_or_else(too_large)?)
        } else {
            let unit = if dtype.is_quantized() { 1 } else { 16 * dtype.block_bytes() };
            let stride = row_bytes.checked_next_multiple_of(unit).ok_or_else(too_large)?;
            Store::Rows { stride, buffer: place(stride.checked_mul(rows).ok_or_else(too_large)?) }
        };
        let matrix = Matrix { dtype, rows, cols, path, store };
        Ok(Self { matrix, row_bytes, filled: AtomicUsize::new(0) })
    }

    /// Cuts all rows into parts of about `rows` each: rounded up to [`MatrixBuilder::ROWS`], the last one shorter.
    pub fn parts(&mut self, rows: usize) -> Vec<MatrixPart<'_>> {
        let total = self.matrix.rows;
        let step = rows.clamp(1, total.max(1)).next_multiple_of(Self::ROWS);
        let (layout, step_bytes, buffer) = match &mut self.matrix.store {
            Store::Packed(packed) => {
                let shape = packed.shape;
                (Layout::Packed(shape), step / shape.lanes * shape.bytes, packed.groups_mut())
            }
            Store::Interleaved(floats) => {
                let shape = floats.shape;
                (Layout::Interleaved(shape), step / GROUP * shape.bytes, floats.bytes_mut())
            }
            Store::Rows { stride, buffer } => {
                (Layout::Rows { stride: *stride }, step * *stride, buffer.bytes_mut())
            }
        };
        let places = buffer.chunks_mut(step_bytes.max(1));
        let starts = (0..total).step_by(step);
        let part = |(start, out)| MatrixPart {
            dtype: self.matrix.dtype,
            rows: start..total.min(start + step),
            row_bytes: self.row_bytes,
            layout,
            out,
            filled: &self.filled,
        };
        starts.zip(places).map(part).collect()
    }

    /// The matrix, once all its parts are filled.
    ///
    /// # Errors
    /// [`ShapeError::Unfilled`] when a part was not.
    pub fn finish(self) -> Result<Matrix, ShapeError> {
        let (filled, rows) = (self.filled.into_inner(), self.matrix.rows);
        if filled == rows || self.row_bytes == 0 {
            Ok(self.matrix)
        } else {
            Err(ShapeError::Unfilled { rows, filled })
        }
    }
}

impl MatrixPart<'_> {
    /// Which rows these are.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Bytes of these rows as stored.
    pub fn bytes(&self) -> usize {
        self.rows.len() * self.row_bytes
    }

    /// Has `read` fetch the part's stored bytes, row after row, and lays them out.
    ///
    /// `window` is a buffer that one thread reuses from part to part; bytes whose layout stays that of the file do
    /// not pass through it. A part whose `read` failed stays unfilled.
    ///
    /// # Errors
    /// What `read` returned.
    pub fn fill<E>(
        self,
        window: &mut Vec<u8>,
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        match self.layout {
            Layout::Rows { stride } if stride == self.row_bytes => {
                read(self.out)?;
                self.filled.fetch_add(self.rows.len(), Ordering::Relaxed);
            }
            _ => {
                let bytes = self.bytes();
                if window.len() < bytes {
                    window.resize(bytes, 0);
                }
                read(&mut window[..bytes])?;
                self.lay_out(&window[..bytes]);
            }
        }
        Ok(())
    }

    /// Lays out the part from the stored bytes of its rows.
    ///
    /// # Errors
    /// [`ShapeError::Bytes`] when these are not as many bytes as the rows have.
    pub fn pack(self, bytes: &[u8]) -> Result<(), ShapeError> {
        if bytes.len() != self.bytes() {
            let cols = self.row_bytes / self.dtype.block_bytes() * self.dtype.block_len();
            let (dtype, rows) = (self.dtype.name(), self.rows.len());
            return Err(ShapeError::Bytes { dtype, rows, cols, want: self.bytes(), got: bytes.len() });
        }
        self.lay_out(bytes);
        Ok(())
    }

    fn lay_out(self, bytes: &[u8]) {
        match self.layout {
            Layout::Packed(shape) => pack_groups(self.dtype, shape, self.row_bytes, bytes, self.out),
            Layout::Interleaved(shape) => interleave(shape, self.row_bytes, bytes, self.out),
            Layout::Rows { stride } if stride == self.row_bytes => self.out.copy_from_slice(bytes),
            Layout::Rows { stride } => {
                let rows = bytes.chunks_exact(self.row_bytes).zip(self.out.chunks_exact_mut(stride));
                rows.for_each(|(from, to)| to[..from.len()].copy_from_slice(from));
            }
        }
        self.filled.fetch_add(self.rows.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stored(matrix: &Matrix) -> &[u8] {
        match &matrix.store {
            Store::Packed(packed) => packed.all(),
            Store::Interleaved(floats) => floats.bytes(),
            Store::Rows { buffer, .. } => buffer.bytes(),
        }
    }

    proptest! {
        /// However the rows are cut, and in whatever order they come, the matrix is the one made at once.
        #[test]
        fn parts_make_the_same_matrix(seed: u64, rows in 1usize..70, step in 1usize..80, backwards: bool) {
            for dtype in DType::ALL {
                let cols = if dtype.is_quantized() { 256 } else { 1 + (seed % 40) as usize };
                let row_bytes = dtype.row_bytes(cols).unwrap();
                let bytes = crate::matrix::tests::noise(seed, rows * row_bytes);
                for path in [KernelPath::Scalar, KernelPath::best()] {
                    let whole = Matrix::with_path(path, dtype, rows, cols, &bytes).unwrap();
                    let mut builder = MatrixBuilder::with_path(path, dtype, rows, cols, Buffer::zeroed).unwrap();
                    let mut parts = builder.parts(step);
                    if backwards {
                        parts.reverse();
                    }
                    let mut window = vec![0xa5; 7];
                    for part in parts {
                        let range = part.rows().start * row_bytes..part.rows().end * row_bytes;
                        let read = |out: &mut [u8]| -> Result<(), ()> {
                            out.copy_from_slice(&bytes[range]);
                            Ok(())
                        };
                        part.fill(&mut window, read).unwrap();
                    }
                    prop_assert!(stored(&builder.finish().unwrap()) == stored(&whole), "{:?} {:?}", dtype, path);
                }
            }
        }
    }

    #[test]
    fn a_part_that_is_missing_is_noticed() {
        let mut builder = MatrixBuilder::new(&mut Arena::default(), DType::Q8_0, 20, 32).unwrap();
        let mut parts = builder.parts(16);
        let last = parts.pop().unwrap();
        for part in parts {
            let bytes = vec![1; part.bytes()];
            part.pack(&bytes).unwrap();
        }
        assert!(matches!(last.pack(&[1; 5]), Err(ShapeError::Bytes { want: 136, got: 5, .. })));
        assert!(matches!(builder.finish(), Err(ShapeError::Unfilled { rows: 20, filled: 16 })));
        let mut builder = MatrixBuilder::new(&mut Arena::default(), DType::F32, 9, 5).unwrap();
        let refused =
            builder.parts(64).into_iter().try_for_each(|part| part.fill(&mut Vec::new(), |_| Err("gone")));
        assert_eq!(refused, Err("gone"));
        assert!(builder.finish().is_err());
        assert!(MatrixBuilder::new(&mut Arena::default(), DType::Q4_K, 1, 255).is_err());
        assert!(MatrixBuilder::new(&mut Arena::default(), DType::F32, usize::MAX, 16).is_err());
        assert!(MatrixBuilder::new(&mut Arena::default(), DType::F32, 0, 16).unwrap().finish().is_ok());
    }
}
