//! The quantized matmul for many tokens. Equal to `quant.rs` bit for bit.
//!
//! Unpacking planes costs about as much as multiplying them once, so with many tokens it is done once: the blocks of one
//! segment (one partial sum) of eight rows become plain bytes and f32 scales, and meet all tokens from the L1 cache. The 16
//! partial sums of every token wait in memory for the tree.

use std::arch::x86_64::*;

use crate::activation::{QuantBlock, QuantRows, SIDE};
use crate::avx2::*;
use crate::dtype::DType;
use crate::pack::{GroupShape, LANES};
use crate::quant::segment;

/// Tokens a panel meets.
pub(crate) const TOKENS: usize = 64;

/// One unpacked block of eight rows.
#[repr(C, align(32))]
#[derive(Clone, Copy)]
struct PlainBlock {
    codes: [[u8; 32]; 8],
    d: [f32; LANES],
    m: [f32; LANES],
    s: [[i16; 2]; LANES],
    t: [[i16; 2]; LANES],
}

impl PlainBlock {
    const ZERO: Self = Self {
        codes: [[0; 32]; 8],
        d: [0.0; LANES],
        m: [0.0; LANES],
        s: [[0; 2]; LANES],
        t: [[0; 2]; LANES],
    };

    #[inline]
    #[target_feature(enable = "avx2")]
    fn scales(&self) -> Scales {
        // SAFETY: each array is 32 aligned bytes.
        unsafe {
            Scales {
                d: _mm256_load_ps(self.d.as_ptr()),
                m: _mm256_load_ps(self.m.as_ptr()),
                s: _mm256_load_si256(self.s.as_ptr().cast()),
                t: _mm256_load_si256(self.t.as_ptr().cast()),
            }
        }
    }
}

/// What a thread needs to multiply groups by up to 64 tokens. Large: made once per thread.
pub(crate) struct QuantPanel {
    blocks: Vec<PlainBlock>,
    partial: Box<Partial>,
}

/// `[segment][token][row]`.
#[repr(C, align(32))]
struct Partial([[[f32; LANES]; TOKENS]; 16]);

impl QuantPanel {
    pub fn new() -> Self {
        Self { blocks: Vec::new(), partial: Box::new(Partial([[[0.0; LANES]; TOKENS]; 16])) }
    }

    /// Eight rows times `out.len()` tokens (at most 64) from panel `first` of `x` on; `out[n][lane]`.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C.
    pub unsafe fn multiply(
        &mut self,
        dtype: DType,
        group: &[u8],
        shape: GroupShape,
        x: &QuantRows,
        first: usize,
        out: &mut [[f32; LANES]],
    ) {
        assert!(group.len() >= shape.bytes && out.len() <= TOKENS);
        assert!(x.per_row() == shape.blocks);
        // SAFETY: features promised by the caller, lengths asserted.
        unsafe {
            match dtype {
                DType::Q4_0 => self.run::<Q40>(group, shape, x, first, out),
                DType::Q4_1 => self.run::<Q41>(group, shape, x, first, out),
                DType::Q5_0 => self.run::<Q50>(group, shape, x, first, out),
                DType::Q5_1 => self.run::<Q51>(group, shape, x, first, out),
                DType::Q8_0 => self.run::<Q80>(group, shape, x, first, out),
                DType::Q2_K => self.run::<Q2K>(group, shape, x, first, out),
                DType::Q3_K => self.run::<Q3K>(group, shape, x, first, out),
                DType::Q4_K => self.run::<Q4K>(group, shape, x, first, out),
                DType::Q5_K => self.run::<Q5K>(group, shape, x, first, out),
                DType::Q6_K => self.run::<Q6K>(group, shape, x, first, out),
                DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats are not packed in lanes"),
            }
        }
    }

    /// # Safety
    /// As [`QuantPanel::multiply`], after its checks.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run<F: Tile>(
        &mut self,
        group: &[u8],
        shape: GroupShape,
        x: &QuantRows,
        first: usize,
        out: &mut [[f32; LANES]],
    ) {
        self.blocks.resize(shape.blocks.div_ceil(16), PlainBlock::ZERO);
        for s in 0..16 {
            let segment = segment(s, shape.blocks);
            for (plain, block) in self.blocks.iter_mut().zip(segment.clone()) {
                // SAFETY: the block is inside the group.
                unsafe { unpack::<F>(group, shape, block, plain) };
            }
            let blocks = &self.blocks[..segment.len()];
            let partial = &mut self.partial.0[s];
            if blocks.is_empty() {
                partial[..out.len()].fill([0.0; LANES]);
                continue;
            }
            let x = x.segment(s, first..first + out.len().div_ceil(SIDE));
            for (x, (partial, out)) in
                x.chunks_exact(blocks.len()).zip(partial.chunks_mut(SIDE).zip(out.chunks(SIDE)))
            {
                match out.len() {
                    1 => meet::<F, 1>(blocks, x, partial),
                    2 => meet::<F, 2>(blocks, x, partial),
                    3 => meet::<F, 3>(blocks, x, partial),
                    _ => meet::<F, 4>(blocks, x, partial),
                }
            }
        }
        for (n, out) in out.iter_mut().enumerate() {
            // SAFETY: eight f32 each.
            unsafe {
                let sum = tree_of(|i| _mm256_load_ps(self.partial.0[i][n].as_ptr()));
                _mm256_storeu_ps(out.as_mut_ptr(), sum);
            }
        }
    }
}

/// # Safety
/// `group` holds `shape.bytes` bytes and `block < shape.blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack<F: Tile>(group: &[u8], shape: GroupShape, block: usize, plain: &mut PlainBlock) {
    // SAFETY: the caller's promise; every array of `plain` is 32 aligned bytes.
    unsafe {
        let (planes, scales) = stored::<F>(group, shape, block);
        for (g, to) in plain.codes.iter_mut().enumerate() {
            _mm256_store_si256(to.as_mut_ptr().cast(), codes::<F>(planes, g));
        }
        _mm256_store_ps(plain.d.as_mut_ptr(), scales.d);
        _mm256_store_ps(plain.m.as_mut_ptr(), scales.m);
        _mm256_store_si256(plain.s.as_mut_ptr().cast(), scales.s);
        _mm256_store_si256(plain.t.as_mut_ptr().cast(), scales.t);
    }
}

/// One segment of eight rows meets `N` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
fn meet<F: Tile, const N: usize>(blocks: &[PlainBlock], x: &[QuantBlock], partial: &mut [[f32; LANES]]) {
    let mut acc = [_mm256_setzero_ps(); N];
    for (plain, x) in blocks.iter().zip(x) {
        // SAFETY: plain codes are 256 aligned bytes.
        unsafe { add_block::<F, N, true>(plain.codes.as_ptr().cast(), &plain.scales(), x, &mut acc) };
    }
    for (acc, partial) in acc.into_iter().zip(partial) {
        // SAFETY: eight f32, 32-aligned.
        unsafe { _mm256_store_ps(partial.as_mut_ptr(), acc) };
    }
}
