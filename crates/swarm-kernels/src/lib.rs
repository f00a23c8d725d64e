//! Block formats and the arithmetic of a transformer layer.
//!
//! Every operation has a *scalar twin*, a plain Rust function that says what the result is, and fast versions that
//! equal it bit for bit. The whole contract is written down in `docs/numerics.md`. Three rules carry it:
//!
//! 1. A reduction over an input dimension is 16 partial sums, each taken in order from `0.0` with f32 FMA, then one
//!    fixed binary tree ([`math::tree16`]). Which element belongs to which partial sum depends on the format only.
//! 2. Quantized weights meet activations quantized to int8 in blocks of 32; the integer part of a block is exact.
//! 3. No libm and no hardware division or square root: [`math`] has the project's own sequences.
//!
//! The room does no IO, knows no model, and allocates nothing in a step once its scratch buffers have grown.
//! It is the one room (with one mmap file in `swarm-weights`) where `unsafe` may live.

#![allow(unsafe_code)]
#![deny(unsafe_op_in_unsafe_fn)]

mod activation;
#[cfg(any(test, target_arch = "x86_64"))]
mod ahead;
mod attention;
mod block;
mod buffer;
mod dtype;
mod float;
mod interleave;
pub mod math;
mod matrix;
mod ops;
mod pack;
mod path;
mod pool;
mod probe;
mod quant;
mod quantize;
#[cfg(any(test, target_arch = "x86_64"))]
mod vnni;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_float;
#[cfg(target_arch = "x86_64")]
mod avx2_matmul;
#[cfg(target_arch = "x86_64")]
mod avx2_panel;
#[cfg(target_arch = "x86_64")]
mod avx2_quantize;
#[cfg(target_arch = "x86_64")]
mod avx512_float;
#[cfg(target_arch = "x86_64")]
mod float_few;
#[cfg(target_arch = "x86_64")]
mod float_panel;

#[cfg(any(target_arch = "aarch64", test))]
mod neon;

pub use attention::{AttentionScratch, KvPage, KvType, MAX_GROUP, TILE, attention, f16_to_f32, f32_to_f16};
pub use block::dequantize;
pub use buffer::Arena;
pub use dtype::{DType, ShapeError};
pub use matrix::{Job, MatmulScratch, Matrix, MatrixBuilder, MatrixPart, matmul};
pub use ops::{add, add_bias, exp_in_place, rms_norm, rope, silu_mul};
pub use path::{KernelPath, KernelPathError};
pub use pool::Pool;
pub use probe::ReadProbe;
pub use quantize::{Quant, numerics, quantize};

/// The version of the numeric contract. Two nodes share an exact ring only if these are equal.
pub const NUMERICS: &str = "swarm-numerics-1";
