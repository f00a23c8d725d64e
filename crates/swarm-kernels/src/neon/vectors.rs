//! The vector steps that the NEON tiles are made of, in one trait.

use crate::block::Format;

/// What a tile asks of a CPU: vectors of 16 bytes, of 4 integers and of 4 numbers.
///
/// Tiles are written once over this trait. Its model in plain Rust (`model.rs`) lets their arithmetic be tested on every
/// computer; on AArch64 each step is held against the model.
pub(crate) trait Vectors {
    type Bytes: Copy;
    type Ints: Copy;
    type Floats: Copy;

    fn bytes(from: &[u8; 16]) -> Self::Bytes;
    fn store_bytes(v: Self::Bytes, to: &mut [u8; 16]);
    /// `v & mask`, byte by byte.
    fn mask(v: Self::Bytes, mask: u8) -> Self::Bytes;
    /// `v >> bits`, byte by byte; `bits` below 8.
    fn shift(v: Self::Bytes, bits: usize) -> Self::Bytes;
    /// `low | high << bits`, byte by byte; `bits` below 8.
    fn join(low: Self::Bytes, high: Self::Bytes, bits: usize) -> Self::Bytes;
    /// The 32-bit lanes 0 and 1 of both, alternating; then lanes 2 and 3.
    fn zip(a: Self::Bytes, b: Self::Bytes) -> [Self::Bytes; 2];

    fn ints(from: [i32; 4]) -> Self::Ints;
    fn store_ints(v: Self::Ints, to: &mut [i32; 4]);
    fn times(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// `sum + a * b`.
    fn plus_times(sum: Self::Ints, a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// The even bytes as eight integers, and the odd ones; as i8 if `signed`.
    fn pairs(v: Self::Bytes, signed: bool) -> [[Self::Ints; 2]; 2];
    /// Adds the products of four rows with the same 16 columns: lane `r` gets the sum over `i` and `j` of byte `4 r + j` of
    /// `w[i]`, a code of `format` before its offset, times byte `4 i + j` of `x`, an i8 that is not -128.
    fn dot16(sum: Self::Ints, w: [Self::Bytes; 4], x: Self::Bytes, format: Format) -> Self::Ints;

    fn floats(from: &[f32; 4]) -> Self::Floats;
    fn store(v: Self::Floats, to: &mut [f32; 4]);
    fn splat(value: f32) -> Self::Floats;
    /// Four f32 from their bytes.
    fn words(v: Self::Bytes) -> Self::Floats;
    /// To nearest, ties to even.
    fn from_ints(v: Self::Ints) -> Self::Floats;
    /// Eight f16.
    fn halves(v: Self::Bytes) -> [Self::Floats; 2];
    /// Eight bf16.
    fn upper_halves(v: Self::Bytes) -> [Self::Floats; 2];
    fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `fma(a, b, sum)`.
    fn fma(sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `fma(-a, b, sum)`.
    fn fma_minus(sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The contract's tree over 16 partial sums.
    fn tree(p: [Self::Floats; 4]) -> f32;
}

/// A CPU that multiplies small matrices.
pub(crate) trait MatrixVectors: Vectors {
    fn both(a: &[u8; 8], b: &[u8; 8]) -> Self::Bytes;
    /// Lanes 0 and 2 of both; then lanes 1 and 3.
    fn unzip(a: Self::Ints, b: Self::Ints) -> [Self::Ints; 2];
    /// Adds the products of two rows with two rows, 8 columns each, as i8: lane `2 i + j` gets the sum over `k` of byte
    /// `8 i + k` of `w` times byte `8 j + k` of `x`.
    fn matrix8(sum: Self::Ints, w: Self::Bytes, x: Self::Bytes) -> Self::Ints;
}
