//! The matmul tiles for AVX2, FMA and F16C. Each equals its scalar twin bit for bit.
//!
//! Quantized: eight rows in the eight 32-bit lanes, `N` tokens at once (layout: `pack.rs`).
//!
//! ```text
//!              lane 0      lane 1           lane 7
//! V_g        [ row 0 | row 1 | ... | row 7 ]     4 codes each (bytes)
//! x          [ x0..3 | x0..3 | ... | x0..3 ]     quad g of one token, the same in every lane
//! maddubs, madd -> i32 per lane; after 8 quads the lane holds its row's integer product of the block
//! ```

// Tiles are indexed by token in several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use crate::activation::{QuantBlock, QuantRows, SIDE};
use crate::ahead::Asking;
use crate::block::Scheme;
use crate::dtype::DType;
use crate::pack::{GroupShape, LANES, Layout, Place, Places};

/// The facts of one packed format that a tile is compiled for.
pub(crate) trait Tile {
    const SCHEME: Scheme;
    const BITS: usize;
    const OFFSET: i32;
    /// Quads whose products fit one 16-bit sum: `quads * 2 * 127 * largest code <= 32767`.
    const QUADS: usize;
    const LAYOUT: Layout = Layout::new(Self::SCHEME, Self::BITS, LANES);
    /// Groups that meet many tokens together. Two share what is read of the tokens, which pays where the 16-bit sums need
    /// no registers of their own.
    const GROUPS: usize = if Self::QUADS == 1 { 2 } else { 1 };
}

macro_rules! formats {
    ($($name:ident: $scheme:ident, $bits:literal, $offset:literal, $quads:literal;)*) => {$(
        pub(crate) struct $name;
        impl Tile for $name {
            const SCHEME: Scheme = Scheme::$scheme;
            const BITS: usize = $bits;
            const OFFSET: i32 = $offset;
            const QUADS: usize = $quads;
        }
    )*};
}

formats! {
    Q40: Scale, 4, 8, 8;
    Q41: ScaleMin, 4, 0, 8;
    Q50: Scale, 5, 16, 4;
    Q51: ScaleMin, 5, 0, 4;
    Q80: Scale, 8, 0, 1;
    Q2K: Super16Min, 2, 0, 4;
    Q3K: Super16, 3, 4, 4;
    Q4K: SuperMin, 4, 0, 8;
    Q5K: SuperMin, 5, 0, 4;
    Q6K: Super16, 6, 32, 2;
}

/// Eight rows times the first `N` tokens of a panel of `x`; `out[n][lane]`.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C.
pub(crate) unsafe fn quant_tile<const N: usize>(
    dtype: DType,
    group: &[u8],
    shape: GroupShape,
    x: &QuantRows,
    panel: usize,
    out: &mut [[f32; LANES]; SIDE],
) {
    assert!(group.len() >= shape.bytes && x.per_row() == shape.blocks && N <= SIDE);
    // SAFETY: the caller promises the CPU features, the assert gives the lengths that the tile reads by.
    unsafe {
        match dtype {
            DType::Q4_0 => tile::<Q40, N>(group, shape, x, panel, out),
            DType::Q4_1 => tile::<Q41, N>(group, shape, x, panel, out),
            DType::Q5_0 => tile::<Q50, N>(group, shape, x, panel, out),
            DType::Q5_1 => tile::<Q51, N>(group, shape, x, panel, out),
            DType::Q8_0 => tile::<Q80, N>(group, shape, x, panel, out),
            DType::Q2_K => tile::<Q2K, N>(group, shape, x, panel, out),
            DType::Q3_K => tile::<Q3K, N>(group, shape, x, panel, out),
            DType::Q4_K => tile::<Q4K, N>(group, shape, x, panel, out),
            DType::Q5_K => tile::<Q5K, N>(group, shape, x, panel, out),
            DType::Q6_K => tile::<Q6K, N>(group, shape, x, panel, out),
            DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats are not packed in lanes"),
        }
    }
}

/// # Safety
/// `group` holds `shape.bytes` bytes, rows of `x` have `shape.blocks` blocks.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<F: Tile, const N: usize>(
    group: &[u8],
    shape: GroupShape,
    x: &QuantRows,
    panel: usize,
    out: &mut [[f32; LANES]; SIDE],
) {
    let mut asking = Asking::new(group.as_ptr(), F::LAYOUT.block(), N);
    let mut places = Places::new(F::LAYOUT, shape.blocks);
    let mut partial = [[_mm256_setzero_ps(); N]; 16];
    for (s, partial) in partial.iter_mut().enumerate() {
        let mut acc = [[_mm256_setzero_ps(); N]];
        // As many as the segment has; a loop of one iterator, for two of them side by side would be counted first.
        for x in x.blocks(s, panel) {
            let Some(place) = places.next() else { break };
            asking.block();
            // SAFETY: the place is one of the group's, and the lengths are the caller's promise.
            unsafe {
                let (planes, scales) = stored::<F>(group, place);
                add_block::<F, 1, N, false>([planes], [&scales], x, &mut acc);
            }
        }
        *partial = acc[0];
    }
    for (n, out) in out.iter_mut().take(N).enumerate() {
        // SAFETY: `out` is eight f32.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), tree_of(|i| partial[i][n])) };
    }
}

/// The contract's tree over 16 partial sums, lane by lane.
#[inline]
#[target_feature(enable = "avx2")]
fn tree_of(p: impl Fn(usize) -> __m256) -> __m256 {
    tree_of_pairs(|i| _mm256_add_ps(p(2 * i), p(2 * i + 1)))
}

/// The rest of the tree, over the 8 sums of two partial sums.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn tree_of_pairs(p: impl Fn(usize) -> __m256) -> __m256 {
    let half = |i: usize| _mm256_add_ps(_mm256_add_ps(p(i), p(i + 1)), _mm256_add_ps(p(i + 2), p(i + 3)));
    _mm256_add_ps(half(0), half(4))
}

/// The multipliers of one block of eight rows, as the block step reads them; zero where the format has none.
#[derive(Clone, Copy)]
pub(crate) struct Scales {
    pub d: __m256,
    pub m: __m256,
    /// Integer multipliers of the two halves and of their two sums: pairs of i16, one pair per lane.
    pub s: __m256i,
    pub t: __m256i,
}

/// Planes and multipliers of one stored block.
///
/// # Safety
/// The place is one of the group's.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn stored<F: Tile>(group: &[u8], place: Place) -> (*const u8, Scales) {
    let start = group.as_ptr();
    // SAFETY: the place is inside the group (`GroupShape::new`), by the caller's promise: supers are 8 f16 twice where the
    // scheme has them, scales 8 f16 or pairs of bytes, and 8 more f16 where the scheme has m.
    unsafe {
        let (supers, scales) = (start.add(place.supers), start.add(place.scales));
        let planes = start.add(place.planes);
        let pairs = _mm_loadu_si128(scales.cast());
        let (zero, one) = (_mm256_setzero_si256(), _mm256_set1_epi16(1));
        let scales = match F::SCHEME {
            Scheme::Scale => Scales { d: load_halves(scales), m: _mm256_setzero_ps(), s: one, t: zero },
            Scheme::ScaleMin => {
                Scales { d: load_halves(scales), m: load_halves(scales.add(16)), s: one, t: zero }
            }
            Scheme::Super16 => {
                let s = _mm256_cvtepi8_epi16(pairs);
                Scales { d: load_halves(supers), m: _mm256_setzero_ps(), s, t: zero }
            }
            Scheme::SuperMin => {
                let both = _mm256_cvtepu8_epi16(pairs);
                let (d, m) = (load_halves(supers), load_halves(supers.add(16)));
                Scales { d, m, s: first_of_pair(both), t: second_of_pair(both) }
            }
            Scheme::Super16Min => {
                let both = _mm256_cvtepu8_epi16(pairs);
                let (s, t) = (_mm256_and_si256(both, _mm256_set1_epi16(15)), _mm256_srli_epi16::<4>(both));
                Scales { d: load_halves(supers), m: load_halves(supers.add(16)), s, t }
            }
        };
        (planes, scales)
    }
}

/// Adds one block of 32 columns of `G` groups to the running sums. `PLAIN`: one code a byte, eight vectors; else planes as
/// stored. Two groups share what is read of the tokens.
///
/// # Safety
/// Each of `planes` has `32 * BITS` (256 if `PLAIN`) readable bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn add_block<F: Tile, const G: usize, const N: usize, const PLAIN: bool>(
    planes: [*const u8; G],
    scales: [&Scales; G],
    x: &[QuantBlock; N],
    acc: &mut [[__m256; N]; G],
) {
    // Constants, for the compiler: what the schemes with f16 scales alone multiply by.
    let s = |i: usize| match F::SCHEME {
        Scheme::Scale | Scheme::ScaleMin => _mm256_set1_epi16(1),
        _ => scales[i].s,
    };
    // SAFETY: the caller's promise.
    let sums = unsafe { products::<F, G, N, PLAIN>(planes, std::array::from_fn(s), x) };
    for n in 0..N {
        let dx = _mm256_set1_ps(x[n].d);
        // SAFETY: two i16 are as long as one i32, with no alignment demand.
        let both = _mm256_set1_epi32(unsafe { x[n].sums.as_ptr().cast::<i32>().read_unaligned() });
        for i in 0..G {
            let mut scaled = sums[i][n];
            if F::OFFSET != 0 {
                let shift = _mm_cvtsi32_si128(F::OFFSET.ilog2() as i32);
                scaled = _mm256_sub_epi32(scaled, _mm256_sll_epi32(_mm256_madd_epi16(s(i), both), shift));
            }
            let mut sum = acc[i][n];
            sum = _mm256_fmadd_ps(_mm256_mul_ps(scales[i].d, dx), _mm256_cvtepi32_ps(scaled), sum);
            match F::SCHEME {
                Scheme::Scale | Scheme::Super16 => {}
                Scheme::ScaleMin => {
                    let mins = _mm256_cvtepi32_ps(_mm256_madd_epi16(s(i), both));
                    sum = _mm256_fmadd_ps(_mm256_mul_ps(scales[i].m, dx), mins, sum);
                }
                Scheme::SuperMin | Scheme::Super16Min => {
                    let mins = _mm256_cvtepi32_ps(_mm256_madd_epi16(scales[i].t, both));
                    sum = _mm256_fnmadd_ps(_mm256_mul_ps(scales[i].m, dx), mins, sum);
                }
            }
            acc[i][n] = sum;
        }
    }
}

/// The integer products of one block, codes before their offset, each half times its `s`.
///
/// # Safety
/// As [`add_block`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn products<F: Tile, const G: usize, const N: usize, const PLAIN: bool>(
    planes: [*const u8; G],
    s: [__m256i; G],
    x: &[QuantBlock; N],
) -> [[__m256i; N]; G] {
    let half = |i: usize, g: usize| match F::SCHEME {
        Scheme::Super16 | Scheme::Super16Min if g < 4 => first_of_pair(s[i]),
        Scheme::Super16 | Scheme::Super16Min => second_of_pair(s[i]),
        _ => s[i],
    };
    let mut sums = [[_mm256_setzero_si256(); N]; G];
    for first in (0..8).step_by(F::QUADS) {
        let mut quads = [[_mm256_setzero_si256(); N]; G];
        for g in first..first + F::QUADS {
            // No closure: it would not have these CPU features.
            let mut code = [_mm256_setzero_si256(); G];
            for i in 0..G {
                // SAFETY: as the caller promises.
                code[i] = unsafe {
                    if PLAIN {
                        _mm256_load_si256(planes[i].add(32 * g).cast())
                    } else {
                        codes::<F>(planes[i], g)
                    }
                };
            }
            for n in 0..N {
                // SAFETY: quad g (0..8) of 32 bytes.
                let quad = unsafe { x[n].q.as_ptr().add(4 * g).cast::<i32>().read_unaligned() };
                let quad = _mm256_set1_epi32(quad);
                for i in 0..G {
                    let product = if F::BITS == 8 {
                        // |w| * (x with w's sign): 128 * 127 * 2 fits, also for w = -128.
                        _mm256_maddubs_epi16(_mm256_abs_epi8(code[i]), _mm256_sign_epi8(quad, code[i]))
                    } else {
                        _mm256_maddubs_epi16(code[i], quad)
                    };
                    quads[i][n] = _mm256_add_epi16(quads[i][n], product);
                }
            }
            if F::QUADS > 1 {
                in_order(&mut quads);
            }
        }
        for i in 0..G {
            for n in 0..N {
                sums[i][n] = _mm256_add_epi32(sums[i][n], _mm256_madd_epi16(quads[i][n], half(i, first)));
            }
        }
        in_order(&mut sums);
    }
    sums
}

/// No instruction, but a place that the compiler does not move these sums across. Without it, it works token by token and
/// keeps the weights of a block on the stack, where they have no room in registers.
#[inline]
#[target_feature(enable = "avx2")]
fn in_order<const G: usize, const N: usize>(sums: &mut [[__m256i; N]; G]) {
    for sum in sums.as_flattened_mut() {
        // SAFETY: an empty text; the operand stays as it is.
        unsafe {
            std::arch::asm!("/* {0} */", inout(ymm_reg) * sum, options(nomem, nostack, preserves_flags))
        };
    }
}

/// `V_g`: quad `g` of the eight rows, as stored codes (before the offset).
///
/// # Safety
/// `planes` has `32 * BITS` readable bytes and `g < 8`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn codes<F: Tile>(planes: *const u8, g: usize) -> __m256i {
    // SAFETY: every offset used below is inside the block's planes (`pack.rs`).
    let load = |at: usize| unsafe { _mm256_loadu_si256(planes.add(at).cast()) };
    // Shifts cross byte borders; the masks take the strays off again.
    let shift = |v: __m256i, bits: usize| _mm256_srl_epi16(v, _mm_cvtsi32_si128(bits as i32));
    let nibble = || _mm256_and_si256(shift(load(32 * (g % 4)), 4 * (g / 4)), _mm256_set1_epi8(15));
    let pair = |at: usize| _mm256_and_si256(shift(load(at + 32 * (g % 2)), 2 * (g / 2)), _mm256_set1_epi8(3));
    let single = |at: usize| _mm256_and_si256(shift(load(at), g), _mm256_set1_epi8(1));
    match F::BITS {
        2 => pair(0),
        3 => _mm256_or_si256(pair(0), _mm256_slli_epi16::<2>(single(64))),
        4 => nibble(),
        5 => _mm256_or_si256(nibble(), _mm256_slli_epi16::<4>(single(128))),
        6 => _mm256_or_si256(nibble(), _mm256_slli_epi16::<4>(pair(128))),
        _ => load(32 * g),
    }
}

/// Each lane's first i16, twice.
#[inline]
#[target_feature(enable = "avx2")]
fn first_of_pair(v: __m256i) -> __m256i {
    _mm256_blend_epi16::<0b1010_1010>(v, _mm256_slli_epi32::<16>(v))
}

/// Each lane's second i16, twice.
#[inline]
#[target_feature(enable = "avx2")]
fn second_of_pair(v: __m256i) -> __m256i {
    _mm256_blend_epi16::<0b0101_0101>(v, _mm256_srli_epi32::<16>(v))
}

/// Eight f16 as f32.
///
/// # Safety
/// 16 bytes are readable at `at`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(crate) unsafe fn load_halves(at: *const u8) -> __m256 {
    // SAFETY: promised by the caller; the load has no alignment demand.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
}

/// The contract's tree over 16 lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn tree(p: [__m256; 2]) -> f32 {
    let pairs = _mm256_hadd_ps(p[0], p[1]); // 01 23 89 ab | 45 67 cd ef
    let quads = _mm256_hadd_ps(pairs, pairs); // 0..3 8..b . . | 4..7 c..f . .
    let eights = _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps::<1>(quads)); // 0..7 8..f
    _mm_cvtss_f32(_mm_add_ss(eights, _mm_movehdup_ps(eights)))
}
