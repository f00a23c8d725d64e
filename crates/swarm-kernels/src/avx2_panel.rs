//! The quantized matmul for many tokens. Equal to `quant.rs` bit for bit.
//!
//! Unpacking planes costs about as much as multiplying them once, so with many tokens it is done once: the blocks of one
//! segment (one partial sum) of eight rows become plain bytes and f32 scales, and meet all tokens from the L1 cache. The 16
//! partial sums of every token wait in memory for the tree.

use std::arch::x86_64::*;

use crate::activation::{QuantBlock, QuantRows, SIDE};
use crate::avx2::*;
use crate::dtype::DType;
use crate::pack::{GroupShape, LANES, Place, Places};
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

/// What a thread needs to multiply two groups by up to 64 tokens. Large: made once per thread.
pub(crate) struct QuantPanel {
    /// Blocks of one segment of both groups.
    blocks: Vec<[PlainBlock; 2]>,
    partial: Box<[Partial; 2]>,
}

/// `[segment / 2][token][row]`, of one group: the contract's tree begins with sums of two segments.
#[repr(C, align(32))]
struct Partial([[[f32; LANES]; TOKENS]; 8]);

impl QuantPanel {
    pub fn new() -> Self {
        const ZERO: Partial = Partial([[[0.0; LANES]; TOKENS]; 8]);
        Self { blocks: Vec::new(), partial: Box::new([ZERO; 2]) }
    }

    /// One or two groups of eight rows times `out.len()` tokens (at most 64) from panel `first` of `x` on;
    /// `out[n][group][lane]`.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C.
    pub unsafe fn multiply(
        &mut self,
        dtype: DType,
        groups: [Option<&[u8]>; 2],
        shape: GroupShape,
        x: &QuantRows,
        first: usize,
        out: &mut [[[f32; LANES]; 2]],
    ) {
        assert!(groups.iter().flatten().all(|group| group.len() >= shape.bytes) && out.len() <= TOKENS);
        assert!(x.per_row() == shape.blocks);
        // SAFETY: features promised by the caller, lengths asserted.
        unsafe {
            match dtype {
                DType::Q4_0 => self.pair::<Q40>(groups, shape, x, first, out),
                DType::Q4_1 => self.pair::<Q41>(groups, shape, x, first, out),
                DType::Q5_0 => self.pair::<Q50>(groups, shape, x, first, out),
                DType::Q5_1 => self.pair::<Q51>(groups, shape, x, first, out),
                DType::Q8_0 => self.pair::<Q80>(groups, shape, x, first, out),
                DType::Q2_K => self.pair::<Q2K>(groups, shape, x, first, out),
                DType::Q3_K => self.pair::<Q3K>(groups, shape, x, first, out),
                DType::Q4_K => self.pair::<Q4K>(groups, shape, x, first, out),
                DType::Q5_K => self.pair::<Q5K>(groups, shape, x, first, out),
                DType::Q6_K => self.pair::<Q6K>(groups, shape, x, first, out),
                DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats are not packed in lanes"),
            }
        }
    }

    /// # Safety
    /// As [`QuantPanel::multiply`], after its checks.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn pair<F: Tile>(
        &mut self,
        groups: [Option<&[u8]>; 2],
        shape: GroupShape,
        x: &QuantRows,
        first: usize,
        out: &mut [[[f32; LANES]; 2]],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            match (groups, F::GROUPS) {
                ([Some(a), Some(b)], 2) => self.run::<F, 2>(0, [a, b], shape, x, first, out),
                (groups, _) => {
                    for (at, group) in groups.into_iter().flatten().enumerate() {
                        self.run::<F, 1>(at, [group], shape, x, first, out);
                    }
                }
            }
        }
    }

    /// `G` groups; `out[n][at..at + G][lane]`.
    ///
    /// # Safety
    /// As [`QuantPanel::multiply`], after its checks.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run<F: Tile, const G: usize>(
        &mut self,
        at: usize,
        groups: [&[u8]; G],
        shape: GroupShape,
        x: &QuantRows,
        first: usize,
        out: &mut [[[f32; LANES]; 2]],
    ) {
        self.blocks.resize(shape.blocks.div_ceil(16), [PlainBlock::ZERO; 2]);
        let mut places = Places::new(F::LAYOUT, shape.blocks);
        for s in 0..16 {
            let segment = segment(s, shape.blocks);
            for (plain, place) in self.blocks[..segment.len()].iter_mut().zip(&mut places) {
                for (plain, group) in plain.iter_mut().zip(groups) {
                    // SAFETY: the place is one of the group's.
                    unsafe { unpack::<F>(group, place, plain) };
                }
            }
            // While this segment is multiplied, the same part of the groups that come next is on its way from memory.
            for group in groups {
                let part = group.len() / 16;
                for line in (0..part).step_by(64) {
                    // Never faults, also beyond the end of the weights.
                    let next = group.as_ptr().wrapping_add(groups.len() * group.len() + s * part + line);
                    _mm_prefetch::<_MM_HINT_T1>(next.cast());
                }
            }
            let blocks = &self.blocks[..segment.len()];
            let panels = x.side_by_side(s, first..first + out.len().div_ceil(SIDE));
            for (p, n) in (0..out.len()).step_by(SIDE).enumerate() {
                let x = &panels[p * blocks.len()..][..blocks.len()];
                match out.len() - n {
                    1 => meet::<F, G, 1>(blocks, x, &mut self.partial, s, n),
                    2 => meet::<F, G, 2>(blocks, x, &mut self.partial, s, n),
                    3 => meet::<F, G, 3>(blocks, x, &mut self.partial, s, n),
                    _ => meet::<F, G, 4>(blocks, x, &mut self.partial, s, n),
                }
            }
        }
        for (n, out) in out.iter_mut().enumerate() {
            for (out, partial) in out[at..].iter_mut().zip(self.partial.iter().take(G)) {
                // SAFETY: eight f32 each.
                unsafe {
                    let sum = tree_of_pairs(|i| _mm256_load_ps(partial.0[i][n].as_ptr()));
                    _mm256_storeu_ps(out.as_mut_ptr(), sum);
                }
            }
        }
    }
}

/// # Safety
/// The place is one of the group's.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack<F: Tile>(group: &[u8], place: Place, plain: &mut PlainBlock) {
    // SAFETY: the caller's promise; every array of `plain` is 32 aligned bytes.
    unsafe {
        let (planes, scales) = stored::<F>(group, place);
        for (g, to) in plain.codes.iter_mut().enumerate() {
            _mm256_store_si256(to.as_mut_ptr().cast(), codes::<F>(planes, g));
        }
        _mm256_store_ps(plain.d.as_mut_ptr(), scales.d);
        _mm256_store_ps(plain.m.as_mut_ptr(), scales.m);
        _mm256_store_si256(plain.s.as_mut_ptr().cast(), scales.s);
        _mm256_store_si256(plain.t.as_mut_ptr().cast(), scales.t);
    }
}

/// Segment `s` of `G` groups meets `N` tokens from token `first` of the panel on.
#[target_feature(enable = "avx2,fma,f16c")]
fn meet<F: Tile, const G: usize, const N: usize>(
    blocks: &[[PlainBlock; 2]],
    x: &[[QuantBlock; SIDE]],
    partial: &mut [Partial; 2],
    s: usize,
    first: usize,
) {
    let mut acc = [[_mm256_setzero_ps(); N]; G];
    for (plain, x) in blocks.iter().zip(x.iter().filter_map(|x| x.first_chunk())) {
        let plain: [&PlainBlock; G] = std::array::from_fn(|i| &plain[i]);
        let scales = plain.map(|plain| plain.scales());
        // SAFETY: plain codes are 256 aligned bytes.
        unsafe {
            let codes = plain.map(|plain| plain.codes.as_ptr().cast());
            add_block::<F, G, N, true>(codes, std::array::from_fn(|i| &scales[i]), x, &mut acc);
        }
    }
    for (acc, partial) in acc.iter().zip(partial) {
        for (acc, partial) in acc.iter().zip(&mut partial.0[s / 2][first..first + N]) {
            // SAFETY: eight f32, 32-aligned.
            unsafe {
                let sum = match s % 2 {
                    0 => *acc,
                    _ => _mm256_add_ps(_mm256_load_ps(partial.as_ptr()), *acc),
                };
                _mm256_store_ps(partial.as_mut_ptr(), sum);
            }
        }
    }
}
