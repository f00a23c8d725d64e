//! The vector steps of AArch64. NEON and the conversion of f16 are part of every such CPU, the int8 products are not.

use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

use crate::block::Format;
use crate::neon::vectors::{MatrixVectors, Vectors};

/// NEON with the int8 products of `P`.
pub(crate) struct Neon<P>(PhantomData<P>);

/// How a CPU multiplies int8; see [`Vectors::dot16`].
pub(crate) trait Products {
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn dot16(sum: int32x4_t, w: [uint8x16_t; 4], x: uint8x16_t, format: Format) -> int32x4_t;
}

/// Widening multiplications: every AArch64 CPU.
pub(crate) struct Widening;

/// The dot product of four (`sdot`).
pub(crate) struct Dot;

/// `sdot`, and the product of 2x8 by 8x2 (`smmla`).
pub(crate) struct I8mm;

impl Products for Widening {
    // SAFETY: none to ask for.
    #[inline(always)]
    unsafe fn dot16(sum: int32x4_t, w: [uint8x16_t; 4], x: uint8x16_t, format: Format) -> int32x4_t {
        // SAFETY: NEON is part of AArch64.
        unsafe {
            let w = w.map(|w| vreinterpretq_s8_u8(w));
            let x = vreinterpretq_s32_u8(x);
            let x = [
                vreinterpretq_s8_s32(vdupq_laneq_s32::<0>(x)),
                vreinterpretq_s8_s32(vdupq_laneq_s32::<1>(x)),
                vreinterpretq_s8_s32(vdupq_laneq_s32::<2>(x)),
                vreinterpretq_s8_s32(vdupq_laneq_s32::<3>(x)),
            ];
            // Products of two quads fit a 16-bit sum for every format (128 * 127 * 2), of four unless codes have 8 bits.
            let two = |i: usize| {
                [
                    vmlal_s8(
                        vmull_s8(vget_low_s8(w[i]), vget_low_s8(x[i])),
                        vget_low_s8(w[i + 1]),
                        vget_low_s8(x[i + 1]),
                    ),
                    vmlal_high_s8(vmull_high_s8(w[i], x[i]), w[i + 1], x[i + 1]),
                ]
            };
            let (first, last) = (two(0), two(2));
            let pairs = if format.bits == 8 {
                let pairs = |side: usize| vpadalq_s16(vpaddlq_s16(first[side]), last[side]);
                [pairs(0), pairs(1)]
            } else {
                [0, 1].map(|side| vpaddlq_s16(vaddq_s16(first[side], last[side])))
            };
            vaddq_s32(sum, vpaddq_s32(pairs[0], pairs[1]))
        }
    }
}

impl Products for Dot {
    // SAFETY: the CPU has `sdot`.
    #[inline(always)]
    unsafe fn dot16(sum: int32x4_t, w: [uint8x16_t; 4], x: uint8x16_t, _: Format) -> int32x4_t {
        // SAFETY: the caller's promise.
        unsafe {
            let sum = sdot::<0>(sum, w[0], x);
            let sum = sdot::<1>(sum, w[1], x);
            let sum = sdot::<2>(sum, w[2], x);
            sdot::<3>(sum, w[3], x)
        }
    }
}

impl Products for I8mm {
    // SAFETY: the CPU has `sdot`.
    #[inline(always)]
    unsafe fn dot16(sum: int32x4_t, w: [uint8x16_t; 4], x: uint8x16_t, format: Format) -> int32x4_t {
        // SAFETY: the caller's promise; a CPU with `smmla` has `sdot`.
        unsafe { Dot::dot16(sum, w, x, format) }
    }
}

/// Each lane of `sum` plus the products of its four bytes of `w` with the four bytes of lane `LANE` of `x`.
#[inline]
#[target_feature(enable = "dotprod")]
fn sdot<const LANE: i32>(mut sum: int32x4_t, w: uint8x16_t, x: uint8x16_t) -> int32x4_t {
    // SAFETY: reads and writes these registers only. (The intrinsic is not stable yet.)
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]", inout(vreg) sum, in(vreg) w, in(vreg) x, const LANE,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// As [`MatrixVectors::matrix8`].
#[inline]
#[target_feature(enable = "i8mm")]
fn smmla(mut sum: int32x4_t, w: uint8x16_t, x: uint8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) w, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

impl MatrixVectors for Neon<I8mm> {
    #[inline(always)]
    fn both(a: &[u8; 8], b: &[u8; 8]) -> uint8x16_t {
        // SAFETY: eight bytes each.
        unsafe { vcombine_u8(vld1_u8(a.as_ptr()), vld1_u8(b.as_ptr())) }
    }

    #[inline(always)]
    fn unzip(a: int32x4_t, b: int32x4_t) -> [int32x4_t; 2] {
        // SAFETY: NEON is part of AArch64.
        unsafe { [vuzp1q_s32(a, b), vuzp2q_s32(a, b)] }
    }

    #[inline(always)]
    fn matrix8(sum: int32x4_t, w: uint8x16_t, x: uint8x16_t) -> int32x4_t {
        // SAFETY: this type is only used where the instruction was detected.
        unsafe { smmla(sum, w, x) }
    }
}

/// Four f16 as f32. (The types of the intrinsic are not stable yet.)
#[inline(always)]
fn fcvtl<const HIGH: bool>(v: uint8x16_t) -> float32x4_t {
    let out: float32x4_t;
    // SAFETY: reads and writes these registers only; the conversion is part of AArch64.
    unsafe {
        if HIGH {
            asm!("fcvtl2 {0:v}.4s, {1:v}.8h", out(vreg) out, in(vreg) v, options(pure, nomem, nostack, preserves_flags));
        } else {
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) out, in(vreg) v, options(pure, nomem, nostack, preserves_flags));
        }
    }
    out
}

// Loads and stores are of arrays as long as the vector and have no alignment demand; all else is NEON, which every AArch64
// CPU has. That is the proof of each block below.
impl<P: Products> Vectors for Neon<P> {
    type Bytes = uint8x16_t;
    type Ints = int32x4_t;
    type Floats = float32x4_t;

    #[inline(always)]
    fn bytes(from: &[u8; 16]) -> uint8x16_t {
        // SAFETY: 16 bytes.
        unsafe { vld1q_u8(from.as_ptr()) }
    }

    #[inline(always)]
    fn store_bytes(v: uint8x16_t, to: &mut [u8; 16]) {
        // SAFETY: 16 bytes.
        unsafe { vst1q_u8(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn mask(v: uint8x16_t, mask: u8) -> uint8x16_t {
        // SAFETY: NEON.
        unsafe { vandq_u8(v, vdupq_n_u8(mask)) }
    }

    #[inline(always)]
    fn shift(v: uint8x16_t, bits: usize) -> uint8x16_t {
        // A shift by a vector, because an immediate cannot be 0; with a constant it becomes one.
        // SAFETY: NEON.
        unsafe { vshlq_u8(v, vdupq_n_s8(-(bits as i8))) }
    }

    #[inline(always)]
    fn join(low: uint8x16_t, high: uint8x16_t, bits: usize) -> uint8x16_t {
        // SAFETY: NEON.
        unsafe { vorrq_u8(low, vshlq_u8(high, vdupq_n_s8(bits as i8))) }
    }

    #[inline(always)]
    fn zip(a: uint8x16_t, b: uint8x16_t) -> [uint8x16_t; 2] {
        // SAFETY: NEON.
        unsafe {
            let (a, b) = (vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b));
            [vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b))]
        }
    }

    #[inline(always)]
    fn ints(from: [i32; 4]) -> int32x4_t {
        // SAFETY: four i32.
        unsafe { vld1q_s32(from.as_ptr()) }
    }

    #[inline(always)]
    fn store_ints(v: int32x4_t, to: &mut [i32; 4]) {
        // SAFETY: four i32.
        unsafe { vst1q_s32(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn times(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        // SAFETY: NEON.
        unsafe { vmulq_s32(a, b) }
    }

    #[inline(always)]
    fn plus_times(sum: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        // SAFETY: NEON.
        unsafe { vmlaq_s32(sum, a, b) }
    }

    #[inline(always)]
    fn pairs(v: uint8x16_t, signed: bool) -> [[int32x4_t; 2]; 2] {
        // SAFETY: NEON.
        unsafe {
            let both = vreinterpretq_s16_u8(v);
            let [even, odd] = if signed {
                [vshrq_n_s16::<8>(vshlq_n_s16::<8>(both)), vshrq_n_s16::<8>(both)]
            } else {
                let both = vreinterpretq_u16_u8(v);
                [
                    vreinterpretq_s16_u16(vandq_u16(both, vdupq_n_u16(255))),
                    vreinterpretq_s16_u16(vshrq_n_u16::<8>(both)),
                ]
            };
            [even, odd].map(|v| [vmovl_s16(vget_low_s16(v)), vmovl_high_s16(v)])
        }
    }

    #[inline(always)]
    fn dot16(sum: int32x4_t, w: [uint8x16_t; 4], x: uint8x16_t, format: Format) -> int32x4_t {
        // SAFETY: this type is only used where the instructions of `P` were detected.
        unsafe { P::dot16(sum, w, x, format) }
    }

    #[inline(always)]
    fn floats(from: &[f32; 4]) -> float32x4_t {
        // SAFETY: four f32.
        unsafe { vld1q_f32(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(v: float32x4_t, to: &mut [f32; 4]) {
        // SAFETY: four f32.
        unsafe { vst1q_f32(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn splat(value: f32) -> float32x4_t {
        // SAFETY: NEON.
        unsafe { vdupq_n_f32(value) }
    }

    #[inline(always)]
    fn words(v: uint8x16_t) -> float32x4_t {
        // SAFETY: NEON.
        unsafe { vreinterpretq_f32_u8(v) }
    }

    #[inline(always)]
    fn from_ints(v: int32x4_t) -> float32x4_t {
        // SAFETY: NEON.
        unsafe { vcvtq_f32_s32(v) }
    }

    #[inline(always)]
    fn halves(v: uint8x16_t) -> [float32x4_t; 2] {
        [fcvtl::<false>(v), fcvtl::<true>(v)]
    }

    #[inline(always)]
    fn upper_halves(v: uint8x16_t) -> [float32x4_t; 2] {
        // SAFETY: NEON.
        unsafe {
            let v = vreinterpretq_u16_u8(v);
            let low = vshlq_n_u32::<16>(vmovl_u16(vget_low_u16(v)));
            let high = vshlq_n_u32::<16>(vmovl_high_u16(v));
            [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
        }
    }

    #[inline(always)]
    fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: NEON.
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: NEON.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn fma(sum: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: NEON.
        unsafe { vfmaq_f32(sum, a, b) }
    }

    #[inline(always)]
    fn fma_minus(sum: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: NEON.
        unsafe { vfmsq_f32(sum, a, b) }
    }

    #[inline(always)]
    fn tree(p: [float32x4_t; 4]) -> f32 {
        // SAFETY: NEON.
        unsafe {
            let pairs = [vpaddq_f32(p[0], p[1]), vpaddq_f32(p[2], p[3])]; // 01 23 45 67 | 89 ab cd ef
            let quads = vpaddq_f32(pairs[0], pairs[1]); // 0..3 4..7 8..b c..f
            let eights = vpaddq_f32(quads, quads);
            vgetq_lane_f32::<0>(vpaddq_f32(eights, eights))
        }
    }
}
