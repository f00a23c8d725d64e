//! Weights ready to be multiplied, and the one matmul every projection goes through.

use std::ops::Range;

use crate::KernelPath;
use crate::activation::{FLOAT_TOKENS, FloatRows, QuantRows};
use crate::block::{Format, dequantize};
use crate::buffer::Buffer;
use crate::dtype::{DType, ShapeError};
use crate::interleave::{FloatShape, Interleaved};
use crate::pack::{GroupShape, LANES, Packed};
use crate::pool::{Pool, SharedRows};
use crate::{float, quant};

#[cfg(target_arch = "x86_64")]
use crate::{avx2_matmul, float_few, float_panel, vnni};

/// Tokens that share one pass over a task's weights before the next pass begins, so that their activations stay in the
/// L2 cache; a multiple of the four that a tile takes.
const QUANT_TOKENS: usize = 64;

/// A weight matrix `[rows, cols]` in the layout this CPU multiplies fastest.
///
/// The bits of every product are those of the scalar twin, whatever the layout.
pub struct Matrix {
    dtype: DType,
    rows: usize,
    cols: usize,
    path: KernelPath,
    store: Store,
}

mod builder;
pub use builder::{MatrixBuilder, MatrixPart};

enum Store {
    /// Quantized, rows in lanes.
    Packed(Packed),
    /// Floats, four rows side by side.
    Interleaved(Interleaved),
    /// For the scalar twins: row after row as stored, float rows padded with zeros to 16 columns; `stride` in bytes.
    Rows { stride: usize, buffer: Buffer },
}

impl Matrix {
    /// Copies `bytes` (GGUF block layout, little endian, row after row) into this CPU's layout.
    ///
    /// # Errors
    /// [`ShapeError`] when `bytes` is not exactly `[rows, cols]` of `dtype`.
    pub fn new(dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Result<Self, ShapeError> {
        Self::with_path(KernelPath::current(), dtype, rows, cols, bytes)
    }

    /// As [`Matrix::new`] with the kernels named; for tests that compare paths.
    ///
    /// # Panics
    /// When this CPU cannot run `path`.
    pub fn with_path(
        path: KernelPath,
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Self, ShapeError> {
        dtype.check(rows, cols, bytes.len())?;
        let mut builder = MatrixBuilder::with_path(path, dtype, rows, cols, Buffer::zeroed)?;
        builder.parts(rows).into_iter().try_for_each(|part| part.pack(bytes))?;
        builder.finish()
    }

    /// What [`Matrix::bytes`] of `[rows, cols]` of `dtype` will be here; `None` for a shape that cannot be.
    pub fn bytes_needed(dtype: DType, rows: usize, cols: usize) -> Option<usize> {
        let (path, row_bytes) = (KernelPath::current(), dtype.row_bytes(cols)?);
        match Format::of(dtype) {
            _ if path == KernelPath::Scalar => {
                let unit = if dtype.is_quantized() { 1 } else { 16 * dtype.block_bytes() };
                row_bytes.checked_next_multiple_of(unit)?.checked_mul(rows)
            }
            Some(format) => {
                let shape = GroupShape::new(format, path.lanes(), cols / 32)?;
                rows.div_ceil(shape.lanes).checked_mul(shape.bytes)
            }
            None => FloatShape::new(dtype, cols)?.rows(rows),
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of memory held, which is what one product reads.
    pub fn bytes(&self) -> usize {
        match &self.store {
            Store::Packed(packed) => packed.bytes(),
            Store::Interleaved(floats) => floats.bytes().len(),
            Store::Rows { buffer, .. } => buffer.bytes().len(),
        }
    }

    /// Writes row `row` as f32 (an embedding lookup). `out` has `cols` places.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<(), ShapeError> {
        if row >= self.rows {
            return Err(ShapeError::Row { row, rows: self.rows });
        }
        if out.len() != self.cols {
            return Err(ShapeError::Values { want: self.cols, got: out.len() });
        }
        match &self.store {
            Store::Packed(packed) => {
                for (block, values) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    *values = packed.codes(row, block).values(packed.format.scheme);
                }
                Ok(())
            }
            Store::Interleaved(floats) => {
                let mut values = [0.0; 16];
                for (stored, out) in floats.row(row).zip(out.chunks_mut(16)) {
                    dequantize(self.dtype, stored, &mut values)?;
                    out.copy_from_slice(&values[..out.len()]);
                }
                Ok(())
            }
            Store::Rows { stride, buffer } => {
                let row_bytes = self.dtype.row_bytes(self.cols).unwrap_or(0);
                dequantize(self.dtype, &buffer.bytes()[row * stride..][..row_bytes], out)
            }
        }
    }
}

/// One product of a matmul: `out[t, r] = sum over k of matrix[r, k] * x[t, k]`.
pub struct Job<'a> {
    pub matrix: &'a Matrix,
    /// `[tokens, matrix.rows()]`.
    pub out: &'a mut [f32],
}

/// Buffers a matmul reuses from call to call.
#[derive(Default)]
pub struct MatmulScratch {
    quantized: QuantRows,
    floats: FloatRows,
}

/// Multiplies the same activations by several matrices (q, k and v; gate and up) in one parallel part.
///
/// `x` is `[tokens, cols]`, row-major; every matrix has `cols` columns. A row's result is the same alone and among
/// others. Reads every weight once for up to 64 tokens (264 of float weights); allocates only while `scratch` grows.
///
/// # Panics
/// When the shapes disagree: they come from a checked configuration, so that is our bug.
pub fn matmul(pool: &Pool, scratch: &mut MatmulScratch, x: &[f32], tokens: usize, jobs: &mut [Job<'_>]) {
    let Some(first) = jobs.first() else { return };
    let (cols, path) = (first.matrix.cols, first.matrix.path);
    assert_eq!(x.len(), tokens * cols, "matmul: activations are not [tokens, cols]");
    for job in jobs.iter() {
        assert_eq!(job.matrix.cols, cols, "matmul: matrices of different width");
        // What the writes of `multiply_rows` lean on: another path cuts its rows into other units.
        assert_eq!(job.matrix.path, path, "matmul: matrices of different kernels");
        assert_eq!(job.out.len(), tokens * job.matrix.rows, "matmul: output is not [tokens, rows]");
    }
    if tokens == 0 || cols == 0 {
        jobs.iter_mut().for_each(|job| job.out.fill(0.0));
        return;
    }
    if jobs.iter().any(|job| job.matrix.dtype.is_quantized()) {
        scratch.quantized.fill(path, x, cols);
    }
    if jobs.iter().any(|job| !job.matrix.dtype.is_quantized()) {
        scratch.floats.fill(pool, x, cols, path.takes_columns(tokens));
    }
    let input = Input { quantized: &scratch.quantized, floats: &scratch.floats };
    for jobs in jobs.chunks_mut(JOBS) {
        multiply_jobs(pool, &input, tokens, jobs);
    }
}

/// Matrices that share one parallel part.
const JOBS: usize = 4;

/// Up to [`JOBS`] products in one parallel part. Their rows count on from job to job in units of what a tile takes; a task is
/// some units.
fn multiply_jobs(pool: &Pool, input: &Input<'_>, tokens: usize, jobs: &mut [Job<'_>]) {
    let mut outputs: [Option<(&Matrix, SharedRows)>; JOBS] = [const { None }; JOBS];
    let (mut units, mut unit) = (0, LANES);
    for (output, job) in outputs.iter_mut().zip(jobs) {
        unit = job.matrix.path.rows_at_once();
        units += job.matrix.rows.div_ceil(unit);
        *output = Some((job.matrix, SharedRows::new(job.out)));
    }
    // Several tasks per thread, so that a slow core does not hold the others.
    let per_task = units.div_ceil(pool.threads() * 8).clamp(1, 512 / unit);
    pool.run(units.div_ceil(per_task), |task| {
        let wanted = task * per_task..((task + 1) * per_task).min(units);
        let mut first = 0;
        for (matrix, out) in outputs.iter().flatten() {
            let count = matrix.rows.div_ceil(unit);
            let inside = wanted.start.max(first)..wanted.end.min(first + count);
            if !inside.is_empty() {
                let rows = (inside.start - first) * unit..((inside.end - first) * unit).min(matrix.rows);
                multiply_rows(matrix, rows, input, tokens, out);
            }
            first += count;
        }
    });
}

/// The activations of one matmul, in the forms that its matrices read.
struct Input<'a> {
    quantized: &'a QuantRows,
    floats: &'a FloatRows,
}

/// Some rows, from a whole unit on, times all tokens, a block of tokens after the other.
fn multiply_rows(matrix: &Matrix, rows: Range<usize>, input: &Input<'_>, tokens: usize, out: &SharedRows) {
    let at_once = if matrix.dtype.is_quantized() { QUANT_TOKENS } else { FLOAT_TOKENS };
    let mut few = [[0.0f32; LANES]; 8];
    // Large: begun only where it is needed, so that one token does not clear it for every group.
    let mut many;
    let values = if tokens <= few.len() {
        &mut few[..]
    } else {
        many = [[0.0f32; LANES]; FLOAT_TOKENS];
        &mut many[..]
    };
    for start in (0..tokens).step_by(at_once) {
        let block = start..(start + at_once).min(tokens);
        #[cfg(target_arch = "x86_64")]
        if let Store::Packed(packed) = &matrix.store
            && (matrix.path.has_vnni() || matrix.path.has_avx2())
        {
            let lanes = packed.shape.lanes;
            let groups = rows.start / lanes..rows.end.div_ceil(lanes);
            let put = |group: usize, token: usize, values: &[f32]| {
                let first = group * lanes;
                let rows = (matrix.rows - first).min(values.len());
                // SAFETY: this task alone owns `rows`, and `matmul` keeps the output borrowed until all
                // tasks are done.
                unsafe { out.write(token * matrix.rows + first, &values[..rows]) };
            };
            let (path, dtype, x) = (matrix.path, matrix.dtype, input.quantized);
            if path.has_vnni() {
                vnni::multiply_groups(path, dtype, packed, groups, x, block, put);
            } else {
                // SAFETY: a matrix of this path is only made where the CPU has its features (`Matrix::with_path`).
                unsafe { avx2_matmul::quant_groups(dtype, packed, groups, x, block, put) };
            }
            continue;
        }
        #[cfg(target_arch = "x86_64")]
        if let Store::Interleaved(floats) = &matrix.store
            && matrix.path.has_avx2()
        {
            float_rows(matrix, floats, rows.clone(), input, block, out);
            continue;
        }
        for first in rows.clone().step_by(LANES) {
            let here = (rows.end - first).min(LANES);
            let values = &mut values[..block.len()];
            multiply_eight(matrix, first..first + here, input, block.clone(), values);
            for (token, values) in block.clone().zip(values) {
                // SAFETY: this task alone owns these rows of every token, and `matmul` keeps the output borrowed until
                // all tasks are done.
                unsafe { out.write(token * matrix.rows + first, &values[..here]) };
            }
        }
    }
}

/// Some float rows, from a whole unit on, times the tokens of `block`.
#[cfg(target_arch = "x86_64")]
fn float_rows(
    matrix: &Matrix,
    floats: &Interleaved,
    rows: Range<usize>,
    input: &Input<'_>,
    block: Range<usize>,
    out: &SharedRows,
) {
    let (path, dtype, x) = (matrix.path, matrix.dtype, input.floats);
    let at_once = if x.by_columns() { path.rows_at_once() } else { crate::interleave::GROUP };
    for first in rows.clone().step_by(at_once) {
        let here = (rows.end - first).min(at_once);
        let groups = floats.groups(first, here);
        // SAFETY: a matrix of this path is only made where the CPU has its features (`Matrix::with_path`). This task alone
        // owns `rows`, and `matmul` keeps the output borrowed until all tasks are done.
        unsafe {
            let put = |token: usize, values: &[f32]| out.write(token * matrix.rows + first, &values[..here]);
            if x.by_columns() {
                float_panel::float_panel(path, dtype, groups, x, block.clone(), put);
            } else {
                float_few::float_few(path, dtype, groups, x, block.clone(), put);
            }
        }
    }
}

/// Up to eight rows, from a multiple of eight on, times the tokens of `block`: `values[n][r]`.
fn multiply_eight(
    matrix: &Matrix,
    rows: Range<usize>,
    input: &Input<'_>,
    block: Range<usize>,
    values: &mut [[f32; LANES]],
) {
    match &matrix.store {
        #[cfg(target_arch = "aarch64")]
        Store::Packed(packed) => {
            let (path, dtype, group) = (matrix.path, matrix.dtype, rows.start / LANES);
            crate::neon::quant_group(path, dtype, packed, group, input.quantized, block, values);
        }
        #[cfg(not(target_arch = "aarch64"))]
        Store::Packed(_) => unreachable!("packed groups have kernels of their own"),
        #[cfg(target_arch = "aarch64")]
        Store::Interleaved(floats) => {
            let group = floats.groups(rows.start, rows.len());
            crate::neon::float_rows(
                matrix.dtype,
                group,
                rows.start % crate::interleave::GROUP,
                input.floats,
                block,
                values,
            );
        }
        #[cfg(not(target_arch = "aarch64"))]
        Store::Interleaved(_) => unreachable!("float rows have kernels of their own"),
        Store::Rows { stride, buffer } => {
            let bytes = &buffer.bytes()[rows.start * stride..rows.end * stride];
            scalar_rows(matrix.dtype, bytes.chunks_exact(*stride), input, block, values);
        }
    }
}

/// Rows as stored, the scalar twins' way.
fn scalar_rows<'a>(
    dtype: DType,
    rows: impl Iterator<Item = &'a [u8]> + Clone,
    input: &Input<'_>,
    block: Range<usize>,
    values: &mut [[f32; LANES]],
) {
    for (token, values) in block.zip(values) {
        for (value, row) in values.iter_mut().zip(rows.clone()) {
            *value = if dtype.is_quantized() {
                quant::dot_row(dtype, row, input.quantized.row(token))
            } else {
                float::dot_row(dtype, row, input.floats.row(token))
            };
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
