//! Element types of stored weights and the sizes of their blocks.

/// How a tensor's numbers are stored. Block layouts are those of GGUF.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// Bytes or lengths that do not fit the shape they are said to have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    #[error("{cols} columns are not a whole number of {dtype} blocks ({block} values each)")]
    Columns { dtype: &'static str, cols: usize, block: usize },
    #[error("{dtype} [{rows}, {cols}] needs {want} bytes, got {got}")]
    Bytes { dtype: &'static str, rows: usize, cols: usize, want: usize, got: usize },
    #[error("[{rows}, {cols}] overflows this computer's address space")]
    TooLarge { rows: usize, cols: usize },
    #[error("row {row} of {rows}")]
    Row { row: usize, rows: usize },
    #[error("room for {got} values where {want} are needed")]
    Values { want: usize, got: usize },
    #[error("only {filled} of {rows} rows were filled")]
    Unfilled { rows: usize, filled: usize },
    #[error("{from} cannot be turned into {to}")]
    NoEncoder { from: &'static str, to: &'static str },
}

impl DType {
    /// Every storage type, in the order GGUF numbers them within their groups.
    pub const ALL: [DType; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// Values in one block: 1 for floats, 32 or 256 for quantized formats.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Bytes of a row of `cols` values; `None` when `cols` is not a whole number of blocks or the size overflows.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// True for block-quantized formats, false for plain floats.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// The name GGUF files and people use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2_K => "Q2_K",
            Self::Q3_K => "Q3_K",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
        }
    }

    /// Checks that `bytes` is exactly `[rows, cols]` of this type, and returns the bytes of one row.
    pub fn check(self, rows: usize, cols: usize, bytes: usize) -> Result<usize, ShapeError> {
        if !cols.is_multiple_of(self.block_len()) {
            return Err(ShapeError::Columns { dtype: self.name(), cols, block: self.block_len() });
        }
        let row = self.row_bytes(cols).ok_or(ShapeError::TooLarge { rows, cols })?;
        let want = row.checked_mul(rows).ok_or(ShapeError::TooLarge { rows, cols })?;
        if want != bytes {
            return Err(ShapeError::Bytes { dtype: self.name(), rows, cols, want, got: bytes });
        }
        Ok(row)
    }
}
