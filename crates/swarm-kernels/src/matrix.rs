//! Weights ready to be multiplied, and the one matmul every projection goes through.

use crate::KernelPath;
use crate::activation::{FloatRows, QuantRows};
use crate::block::{Format, dequantize};
use crate::buffer::Buffer;
use crate::dtype::{DType, ShapeError};
use crate::pack::{GroupShape, LANES, Packed};
use crate::pool::{Pool, SharedRows};
use crate::{float, quant};

#[cfg(target_arch = "x86_64")]
use crate::avx2_float::FloatPanel;

/// Tokens that share one pass over a task's weights before the next pass begins: their activations fit the L2 cache.
const TOKEN_BLOCK: usize = 64;

#[cfg(target_arch = "x86_64")]
const _: () = assert!(TOKEN_BLOCK <= crate::avx2_float::TOKENS);

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
    /// Quantized, eight rows in lanes.
    Packed(Packed),
    /// Row after row as stored, float rows padded with zeros to 16 columns; `stride` in bytes.
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
        let row_bytes = dtype.row_bytes(cols)?;
        match Format::of(dtype).filter(|_| KernelPath::current() != KernelPath::Scalar) {
            Some(format) => rows.div_ceil(LANES).checked_mul(GroupShape::new(format, cols / 32).bytes),
            None if dtype.is_quantized() => row_bytes.checked_mul(rows),
            None => row_bytes.checked_next_multiple_of(16 * dtype.block_bytes())?.checked_mul(rows),
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
/// others. Reads every weight once for up to 64 tokens; allocates only while `scratch` grows.
///
/// # Panics
/// When the shapes disagree: they come from a checked configuration, so that is our bug.
pub fn matmul(pool: &Pool, scratch: &mut MatmulScratch, x: &[f32], tokens: usize, jobs: &mut [Job<'_>]) {
    let Some(first) = jobs.first() else { return };
    let (cols, path) = (first.matrix.cols, first.matrix.path);
    assert_eq!(x.len(), tokens * cols, "matmul: activations are not [tokens, cols]");
    for job in jobs.iter() {
        assert_eq!(job.matrix.cols, cols, "matmul: matrices of different width");
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
        scratch.floats.fill(x, cols);
    }
    let input = Input { quantized: &scratch.quantized, floats: &scratch.floats };
    let groups: usize = jobs.iter().map(|job| job.matrix.rows.div_ceil(LANES)).sum();
    // Several tasks per thread, so that a slow core does not hold the others; tasks of a few groups at least.
    let per_task = groups.div_ceil(pool.threads() * 8).clamp(1, 64);
    let mut tasks = Vec::with_capacity(groups.div_ceil(per_task) + jobs.len());
    let outputs: Vec<(&Matrix, SharedRows)> =
        jobs.iter_mut().map(|job| (job.matrix, SharedRows::new(job.out))).collect();
    for (job, (matrix, _)) in outputs.iter().enumerate() {
        let groups = matrix.rows.div_ceil(LANES);
        tasks.extend((0..groups).step_by(per_task).map(|at| (job, at..(at + per_task).min(groups))));
    }
    pool.run(tasks.len(), |task| {
        let (job, groups) = &tasks[task];
        let (matrix, out) = &outputs[*job];
        for start in (0..tokens).step_by(TOKEN_BLOCK) {
            let block = start..(start + TOKEN_BLOCK).min(tokens);
            for group in groups.clone() {
                multiply_group(matrix, group, &input, block.clone(), out);
            }
        }
    });
}

/// The activations of one matmul, in the forms that its matrices read.
struct Input<'a> {
    quantized: &'a QuantRows,
    floats: &'a FloatRows,
}

/// Rows `8 * group ..` of one matrix times the tokens of `block`.
fn multiply_group(
    matrix: &Matrix,
    group: usize,
    input: &Input<'_>,
    block: std::ops::Range<usize>,
    out: &SharedRows,
) {
    let first = group * LANES;
    let rows = (matrix.rows - first).min(LANES);
    let put = |token: usize, values: &[f32]| {
        // SAFETY: this task alone owns rows `first..first + rows` of every token, and `matmul` keeps the output
        // borrowed until all tasks are done.
        unsafe { out.write(token * matrix.rows + first, values) };
    };
    match &matrix.store {
        #[cfg(target_arch = "x86_64")]
        Store::Packed(packed) => {
            let mut token = block.start;
            while token < block.end {
                token += match block.end - token {
                    1 => quant_tokens::<1>(matrix.dtype, packed, group, input, token, rows, put),
                    2 => quant_tokens::<2>(matrix.dtype, packed, group, input, token, rows, put),
                    3 => quant_tokens::<3>(matrix.dtype, packed, group, input, token, rows, put),
                    _ => quant_tokens::<4>(matrix.dtype, packed, group, input, token, rows, put),
                };
            }
        }
        #[cfg(target_arch = "aarch64")]
        Store::Packed(packed) => {
            let mut values = [[0.0f32; LANES]; TOKEN_BLOCK];
            let mut x = [input.quantized.row(block.start); TOKEN_BLOCK];
            x.iter_mut().zip(block.clone()).for_each(|(x, token)| *x = input.quantized.row(token));
            let len = block.len();
            crate::neon::quant_group(matrix.path, matrix.dtype, packed, group, &x[..len], &mut values[..len]);
            block.enumerate().for_each(|(n, token)| put(token, &values[n][..rows]));
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        Store::Packed(packed) => {
            for token in block {
                for row in 0..rows {
                    let x = input.quantized.row(token);
                    put(
                        token,
                        &[quant::dot_codes(packed.format.scheme, x, |b| packed.codes(first + row, b))],
                    );
                }
            }
        }
        Store::Rows { stride, buffer } => {
            let row = |r: usize| &buffer.bytes()[(first + r) * stride..][..*stride];
            if matrix.dtype.is_quantized() {
                for token in block {
                    let x = input.quantized.row(token);
                    let values: [f32; LANES] = std::array::from_fn(|r| {
                        if r < rows { quant::dot_row(matrix.dtype, row(r), x) } else { 0.0 }
                    });
                    put(token, &values[..rows]);
                }
            } else {
                float_rows(matrix, row, rows, input, block, put);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn quant_tokens<const N: usize>(
    dtype: DType,
    packed: &Packed,
    group: usize,
    input: &Input<'_>,
    token: usize,
    rows: usize,
    put: impl Fn(usize, &[f32]),
) -> usize {
    let x: [_; N] = std::array::from_fn(|n| input.quantized.row(token + n));
    let mut out = [[0.0; LANES]; N];
    // SAFETY: weights are packed only where AVX2, FMA and F16C were detected.
    unsafe { crate::avx2::quant_tile(dtype, packed.group(group), packed.shape, &x, &mut out) };
    for (n, out) in out.iter().enumerate() {
        put(token + n, &out[..rows]);
    }
    N
}

/// Up to 8 float rows times a block of tokens.
fn float_rows<'a>(
    matrix: &Matrix,
    row: impl Fn(usize) -> &'a [u8],
    rows: usize,
    input: &Input<'_>,
    block: std::ops::Range<usize>,
    put: impl Fn(usize, &[f32]),
) {
    let mut values = [[0.0f32; LANES]; TOKEN_BLOCK];
    #[cfg(target_arch = "x86_64")]
    if matrix.path.has_avx2() {
        float_rows_avx2(matrix.dtype, &row, rows, input, block.clone(), &mut values);
        block.enumerate().for_each(|(n, token)| put(token, &values[n][..rows]));
        return;
    }
    #[cfg(target_arch = "aarch64")]
    if matrix.path != KernelPath::Scalar {
        let (mut w, mut x): ([&[u8]; LANES], [&[f32]; TOKEN_BLOCK]) = ([&[]; LANES], [&[]; TOKEN_BLOCK]);
        w.iter_mut().take(rows).enumerate().for_each(|(r, w)| *w = row(r));
        x.iter_mut().zip(block.clone()).for_each(|(x, token)| *x = input.floats.row(token));
        let len = block.len();
        crate::neon::float_rows(matrix.dtype, &w[..rows], &x[..len], &mut values[..len]);
        block.enumerate().for_each(|(n, token)| put(token, &values[n][..rows]));
        return;
    }
    for (n, token) in block.enumerate() {
        for (r, value) in values[n][..rows].iter_mut().enumerate() {
            let bytes = matrix.dtype.block_bytes();
            let w = row(r).chunks_exact(16 * bytes).map(|chunk| {
                let mut values = [0.0; 16];
                // The chunk is 16 whole values, so this cannot fail.
                let _ = dequantize(matrix.dtype, chunk, &mut values);
                values
            });
            *value = float::dot(w, input.floats.row(token));
        }
        put(token, &values[n][..rows]);
    }
}

/// From this many tokens on, widening a panel of float weights once pays.
#[cfg(target_arch = "x86_64")]
const PANEL_TOKENS: usize = 6;

#[cfg(target_arch = "x86_64")]
thread_local! {
    /// Each compute thread's own panel, so that a step allocates nothing.
    static PANEL: std::cell::RefCell<Box<FloatPanel>> = std::cell::RefCell::new(FloatPanel::new());
}

#[cfg(target_arch = "x86_64")]
fn float_rows_avx2<'a>(
    dtype: DType,
    row: &impl Fn(usize) -> &'a [u8],
    rows: usize,
    input: &Input<'_>,
    block: std::ops::Range<usize>,
    values: &mut [[f32; LANES]; TOKEN_BLOCK],
) {
    /// A tile of `R` rows and `N` tokens, copied to its place.
    fn tile<'a, const R: usize, const N: usize>(
        dtype: DType,
        row: &impl Fn(usize) -> &'a [u8],
        r: usize,
        input: &Input<'_>,
        token: usize,
        values: &mut [[f32; LANES]],
    ) {
        let w: [_; R] = std::array::from_fn(|i| row(r + i));
        let x: [_; N] = std::array::from_fn(|n| input.floats.row(token + n));
        let mut out = [[0.0; R]; N];
        // SAFETY: the path says that AVX2, FMA and F16C were detected.
        unsafe { crate::avx2_float::float_tile(dtype, &w, &x, &mut out) };
        for (values, out) in values.iter_mut().zip(&out) {
            values[r..r + R].copy_from_slice(out);
        }
    }
    if block.len() >= PANEL_TOKENS {
        let (mut w, mut x): ([&[u8]; LANES], [&[f32]; TOKEN_BLOCK]) = ([&[]; LANES], [&[]; TOKEN_BLOCK]);
        w.iter_mut().take(rows).enumerate().for_each(|(r, w)| *w = row(r));
        x.iter_mut().zip(block.clone()).for_each(|(x, token)| *x = input.floats.row(token));
        PANEL.with_borrow_mut(|panel| {
            // SAFETY: the path says that AVX2, FMA and F16C were detected.
            unsafe { panel.multiply(dtype, &w[..rows], &x[..block.len()], values) };
        });
        return;
    }
    let mut at = 0;
    while at < block.len() {
        let (token, left) = (block.start + at, block.len() - at);
        let values = &mut values[at..];
        let mut r = 0;
        // Twelve accumulators keep both FMA units busy: 4 rows x 1 token alone, 2 x 3 or 2 x 2 among others.
        while r < rows {
            let (n, two) = (left.min(3), rows - r >= 2);
            match (n, two) {
                (1, _) if rows - r >= 4 => {
                    tile::<4, 1>(dtype, row, r, input, token, values);
                    r += 4;
                    continue;
                }
                (1, true) => tile::<2, 1>(dtype, row, r, input, token, values),
                (2, true) => tile::<2, 2>(dtype, row, r, input, token, values),
                (_, true) => tile::<2, 3>(dtype, row, r, input, token, values),
                (1, false) => tile::<1, 1>(dtype, row, r, input, token, values),
                (2, false) => tile::<1, 2>(dtype, row, r, input, token, values),
                (_, false) => tile::<1, 3>(dtype, row, r, input, token, values),
            }
            r += if two { 2 } else { 1 };
        }
        at += left.min(3);
    }
}

#[cfg(test)]
pub(crate) mod tests;
