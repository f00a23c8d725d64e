//! Some rows of one tensor on their way from the file to their place: read, quantized or widened where that is asked for,
//! and laid out.

use std::ops::Range;
use std::sync::Arc;

use swarm_kernels::{DType, MatrixBuilder, MatrixPart, ShapeError, dequantize, quantize};
use swarm_weights::quantized::{QuantizedRows, QuantizedWriter};
use swarm_weights::{Checkpoint, QuantizedStore, TensorInfo};

use crate::LoadError;

/// Stored bytes that a thread reads at once: they stay in its core's cache until they are packed.
const SLICE_BYTES: usize = 512 << 10;

/// Rows that are not to be torn apart: the matrix is laid out in groups, and a file may have them in another order.
fn row_unit(checkpoint: &Checkpoint, info: &TensorInfo) -> usize {
    match checkpoint.row_unit(info) {
        unit if unit.is_multiple_of(MatrixBuilder::ROWS) => unit,
        unit => unit.saturating_mul(MatrixBuilder::ROWS),
    }
}

/// Rows of a tensor that are read at once.
pub(crate) fn slice_rows(checkpoint: &Checkpoint, info: &TensorInfo) -> usize {
    let row_bytes = info.bytes.checked_div(info.rows as u64).unwrap_or(0).max(1);
    let rows = (SLICE_BYTES as u64 / row_bytes).max(1) as usize;
    rows.next_multiple_of(row_unit(checkpoint, info))
}

/// The quantized form of a tensor on this computer's disk.
pub(crate) enum OnDisk {
    /// It is read in place of the original.
    Found(QuantizedRows),
    /// It is to come there.
    Wanted(QuantizedWriter),
    No,
}

impl OnDisk {
    pub fn of(checkpoint: &Checkpoint, info: &TensorInfo, store: Option<&Arc<QuantizedStore>>) -> Self {
        let Some(store) = store.filter(|_| info.held != info.dtype) else { return Self::No };
        // Pieces of another program version may not be cut where rows can be; then it is made anew.
        let fits = |found: &QuantizedRows| found.piece_rows().is_multiple_of(row_unit(checkpoint, info));
        match store.find(info).filter(fits) {
            Some(found) => {
                store.note_found(&found);
                Self::Found(found)
            }
            None => store.begin(info, slice_rows(checkpoint, info)).map_or(Self::No, Self::Wanted),
        }
    }

    /// Rows of a piece, where they are read from here.
    pub fn piece_rows(&self) -> Option<usize> {
        match self {
            Self::Found(found) => Some(found.piece_rows()),
            _ => None,
        }
    }
}

/// Consecutive rows of one tensor, read by one thread at once.
pub(crate) struct Slice<'a> {
    pub info: &'a TensorInfo,
    /// What it is turned into.
    pub dtype: DType,
    pub on_disk: &'a OnDisk,
    pub place: Place<'a>,
}

pub(crate) enum Place<'a> {
    Rows(MatrixPart<'a>),
    Vector(&'a mut Vec<f32>),
    /// Only the disk wants these rows.
    Nowhere(Range<usize>),
}

/// A thread's buffers, reused from slice to slice.
#[derive(Default)]
pub(crate) struct Window {
    stored: Vec<u8>,
    blocks: Vec<u8>,
    laid_out: Vec<u8>,
    floats: Vec<f32>,
}

impl Slice<'_> {
    /// Reads the slice and puts it in its place. Returns its bytes in the file.
    pub fn fill(self, checkpoint: &Checkpoint, window: &mut Window) -> Result<u64, LoadError> {
        let Self { info, dtype, on_disk, place } = self;
        let unread = |source| LoadError::Read { name: info.name.clone(), source: Box::new(source) };
        let unpacked = |source| LoadError::Pack { name: info.name.clone(), source };
        let rows = match &place {
            Place::Rows(part) => part.rows(),
            Place::Vector(_) => 0..info.rows,
            Place::Nowhere(rows) => rows.clone(),
        };
        // Of a tensor whose size was checked.
        let bytes = info.dtype.row_bytes(info.cols).unwrap_or(0) * rows.len();
        if let Place::Rows(part) = place {
            if dtype == info.dtype {
                part.fill(&mut window.stored, |out| checkpoint.read_rows(info, rows, out)).map_err(unread)?;
                return Ok(bytes as u64);
            }
            let held = window.held(checkpoint, info, on_disk, rows)?;
            let held = if dtype == info.held { held } else { window.widened(info).map_err(unpacked)? };
            part.pack(held).map_err(unpacked)?;
        } else {
            window.held(checkpoint, info, on_disk, rows)?;
            if let Place::Vector(out) = place {
                dequantize(info.held, &window.blocks, out).map_err(unpacked)?;
            }
        }
        Ok(bytes as u64)
    }
}

impl Window {
    /// Rows as they are held: from the disk where they are in that form, else as they are stored, or quantized. They stay in
    /// `self.blocks`.
    fn held(
        &mut self,
        checkpoint: &Checkpoint,
        info: &TensorInfo,
        on_disk: &OnDisk,
        rows: Range<usize>,
    ) -> Result<&[u8], LoadError> {
        let Self { stored, blocks, .. } = self;
        let unread = |source| LoadError::Read { name: info.name.clone(), source: Box::new(source) };
        let bytes = |dtype: DType| dtype.row_bytes(info.cols).unwrap_or(0) * rows.len();
        blocks.resize(bytes(info.held), 0);
        if info.held == info.dtype {
            checkpoint.read_rows(info, rows, blocks).map_err(unread)?;
            return Ok(blocks);
        }
        if let OnDisk::Found(found) = on_disk
            && found.read(rows.clone(), blocks)
        {
            return Ok(blocks);
        }
        stored.resize(bytes(info.dtype), 0);
        checkpoint.read_rows(info, rows.clone(), stored).map_err(unread)?;
        quantize(info.dtype, stored, info.held, blocks)
            .map_err(|source| LoadError::Pack { name: info.name.clone(), source })?;
        if let OnDisk::Wanted(writer) = on_disk {
            writer.write(rows, blocks);
        }
        Ok(blocks)
    }

    /// `self.blocks` as bytes of f32.
    fn widened(&mut self, info: &TensorInfo) -> Result<&[u8], ShapeError> {
        let Self { blocks, laid_out, floats, .. } = self;
        let values = blocks.len() / info.held.block_bytes() * info.held.block_len();
        floats.resize(values, 0.0);
        dequantize(info.held, blocks, floats)?;
        laid_out.resize(4 * values, 0);
        for (place, value) in laid_out.as_chunks_mut::<4>().0.iter_mut().zip(floats) {
            *place = value.to_le_bytes();
        }
        Ok(laid_out)
    }
}
