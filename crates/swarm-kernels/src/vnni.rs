//! The quantized matmul by the int8 dot product of AVX-512 VNNI and AVX-VNNI. Equal to `quant.rs` bit for bit.
//!
//! `vpdpbusd` adds four products of an unsigned and a signed byte to each 32-bit lane. The stored codes are the unsigned side
//! and the activations the signed one, so nothing saturates and no sign is moved; a format's offset (8 bits: the 128 that makes
//! a signed code unsigned) is taken off before the first product, by starting the sum at `-offset * sum x`.
//!
//! ```text
//!              lane 0      lane 1           lane 7  | lane 8            lane 15
//! codes      [ row 0 | row 1 | ... | row 7          | row 8 | ... | row 15 ]     quad g of a group (`pack.rs`)
//! x          [ x0..3 | x0..3 | ... | x0..3          | x0..3 | ... | x0..3  ]     quad g of one token, in every lane
//! dot        [ sum 0 | sum 1 | ...                                  sum 15 ]     8 quads: one block's product, exact
//! ```
//!
//! The integer scales of K formats are applied in f32: the block's scaled product stays below 2^24 (at most
//! 16 * 32 * 127 * 128 * 2, in Q6_K), so every number on the way is exact and the result is the twin's integer.
//!
//! The tile is written once over [`Lanes`], the vector of one instruction set. A third set, plain Rust, is a model of these
//! instructions: with it the tests run this file on every machine.

#[cfg(target_arch = "x86_64")]
use {
    crate::{KernelPath, pack::Packed},
    std::ops::Range,
};

use crate::activation::{QuantBlock, QuantRows, SIDE};
use crate::ahead::Asking;
use crate::block::{Format, Scheme};
use crate::dtype::DType;
use crate::pack::{GroupShape, Layout, Place, Places, WIDE_LANES};
use crate::quant::segment;

#[cfg(test)]
mod model;
#[cfg(target_arch = "x86_64")]
mod ymm;
#[cfg(target_arch = "x86_64")]
mod zmm;

#[cfg(target_arch = "x86_64")]
pub(crate) use {ymm::Ymm, zmm::Zmm};

/// Rows in the widest vector.
pub(crate) const ROWS: usize = WIDE_LANES;
/// Up to so many tokens meet the weights as stored, four at a time: unpacking them for all costs more than doing it for each
/// four, while the groups are in the L1 cache.
const FEW: usize = 4 * SIDE;
/// The values of one token, of one or two groups.
pub(crate) type Values = [f32; 2 * ROWS];
/// Tokens a panel meets.
pub(crate) const TOKENS: usize = 64;

/// The vectors of one instruction set: `LANES` lanes of 32 bits, one for each row of a group.
///
/// # Safety
/// Every function wants the set's instructions and, behind its pointers, as many bytes as its line says.
pub(crate) trait Lanes: Sized {
    /// Integers: bytes, i16 or i32, as the function has it.
    type I: Copy;
    /// One f32 per lane.
    type F: Copy;
    const LANES: usize;
    /// Whether there are registers for two groups: then they share what is read of the tokens.
    const TWO: bool;

    /// [`tile`], compiled for this set.
    // SAFETY: instructions, as the trait says.
    unsafe fn tile<F: Stored, const N: usize>(
        group: &[u8],
        shape: GroupShape,
        x: Tokens<'_>,
        place: usize,
        out: &mut [Values],
    );
    /// [`DotPanel::run`], compiled for this set.
    // SAFETY: instructions, as the trait says.
    unsafe fn panel<F: Stored, const G: usize>(
        panel: &mut DotPanel,
        groups: &[u8],
        shape: GroupShape,
        x: Tokens<'_>,
        place: usize,
        out: &mut [Values],
    );

    /// Asks for a cache line that is wanted later, not in the L1 cache yet; any address.
    fn ask_later(at: *const u8);
    /// Four bytes of each row.
    // SAFETY: instructions and memory, as the trait says.
    unsafe fn load(at: *const u8) -> Self::I;
    // SAFETY: instructions and memory, as the trait says.
    unsafe fn store(v: Self::I, at: *mut u8);
    /// i16 moved right, zeros from the left; `bits < 8` and known when compiled.
    // SAFETY: instructions, as the trait says.
    unsafe fn right(v: Self::I, bits: usize) -> Self::I;
    /// i16 moved left.
    // SAFETY: instructions, as the trait says.
    unsafe fn left(v: Self::I, bits: usize) -> Self::I;
    /// Every byte & `mask`.
    // SAFETY: instructions, as the trait says.
    unsafe fn and(v: Self::I, mask: u8) -> Self::I;
    /// `a | (b & mask)`, byte by byte.
    // SAFETY: instructions, as the trait says.
    unsafe fn or_and(a: Self::I, b: Self::I, mask: u8) -> Self::I;
    /// Every byte with its top bit turned over: a signed byte plus 128.
    // SAFETY: instructions, as the trait says.
    unsafe fn flip(v: Self::I) -> Self::I;
    /// Four bytes in every lane.
    // SAFETY: instructions and memory, as the trait says.
    unsafe fn quad(at: *const i8) -> Self::I;
    /// `sum` plus four products per lane: unsigned bytes of `codes` times signed bytes of `quad`.
    // SAFETY: instructions, as the trait says.
    unsafe fn dot(sum: Self::I, codes: Self::I, quad: Self::I) -> Self::I;
    /// `pair.0 * by.0 + pair.1 * by.1` in every lane.
    // SAFETY: instructions, as the trait says.
    unsafe fn pair_product(pair: [i16; 2], by: [i16; 2]) -> Self::I;
    /// Two bytes of each row, unsigned, as two i16.
    // SAFETY: instructions and memory, as the trait says.
    unsafe fn byte_pairs(at: *const u8) -> Self::I;
    /// As [`Lanes::byte_pairs`], signed.
    // SAFETY: instructions and memory, as the trait says.
    unsafe fn signed_byte_pairs(at: *const u8) -> Self::I;
    /// The first i16 of each lane.
    // SAFETY: instructions, as the trait says.
    unsafe fn first(pairs: Self::I) -> Self::F;
    /// The second i16 of each lane.
    // SAFETY: instructions, as the trait says.
    unsafe fn second(pairs: Self::I) -> Self::F;
    /// An f16 of each row.
    // SAFETY: instructions and memory, as the trait says.
    unsafe fn halves(at: *const u8) -> Self::F;
    /// i32 to f32, to nearest.
    // SAFETY: instructions, as the trait says.
    unsafe fn to_f32(v: Self::I) -> Self::F;
    // SAFETY: instructions, as the trait says.
    unsafe fn splat(v: f32) -> Self::F;
    /// An f32 of each row.
    // SAFETY: instructions and memory, as the trait says.
    unsafe fn load_f32(at: *const f32) -> Self::F;
    // SAFETY: instructions and memory, as the trait says.
    unsafe fn store_f32(v: Self::F, at: *mut f32);
    // SAFETY: instructions, as the trait says.
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    // SAFETY: instructions, as the trait says.
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    // SAFETY: instructions, as the trait says.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `-(a * b) + c`, rounded once.
    // SAFETY: instructions, as the trait says.
    unsafe fn fnma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
}

/// Quantized tokens from the first of a panel on.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a> {
    rows: &'a QuantRows,
    panel: usize,
}

impl<'a> Tokens<'a> {
    /// `first` is a multiple of [`SIDE`].
    pub fn new(rows: &'a QuantRows, first: usize) -> Self {
        assert!(first.is_multiple_of(SIDE), "tokens in the middle of a panel");
        Self { rows, panel: first / SIDE }
    }

    /// The blocks of segment `s` of tokens `4 * panel ..`, counted from the first.
    fn side_by_side(self, s: usize, panel: usize) -> &'a [[QuantBlock; SIDE]] {
        self.rows.side_by_side(s, self.panel + panel..self.panel + panel + 1)
    }

    /// The blocks of segment `s` of the first `N` tokens.
    #[inline(always)]
    fn blocks<const N: usize>(self, s: usize) -> impl Iterator<Item = &'a [QuantBlock; N]> {
        self.rows.blocks(s, self.panel)
    }
}

/// A packed format that the tile is compiled for.
pub(crate) trait Stored {
    const DTYPE: DType;
    const FORMAT: Format = match Format::of(Self::DTYPE) {
        Some(format) => format,
        None => panic!("floats are not packed"),
    };
    const SCHEME: Scheme = Self::FORMAT.scheme;
    const BITS: usize = Self::FORMAT.bits;
    /// What an unsigned code is above the format's own.
    const OFFSET: i16 = if Self::BITS == 8 { 128 } else { Self::FORMAT.offset as i16 };
    /// The parts of a superblock of `lanes` rows.
    fn layout(lanes: usize) -> Layout {
        Layout::new(Self::SCHEME, Self::BITS, lanes)
    }
    /// Whether the two halves of a block have scales of their own.
    const HALVES: bool = matches!(Self::SCHEME, Scheme::Super16 | Scheme::Super16Min);
}

macro_rules! stored {
    ($($name:ident $dtype:ident),*) => {
        $(pub(crate) struct $name;
        impl Stored for $name {
            const DTYPE: DType = DType::$dtype;
        })*
    };
}

stored!(Q40 Q4_0, Q41 Q4_1, Q50 Q5_0, Q51 Q5_1, Q80 Q8_0, Q2K Q2_K, Q3K Q3_K, Q4K Q4_K, Q5K Q5_K, Q6K Q6_K);

/// The multipliers of one block: `d`, `m`, and the integer scales and mins of its two halves, all as f32.
///
/// Where a format has one scale per block it is the first; what a format has not is zero and never read.
#[derive(Clone, Copy)]
struct Scales<L: Lanes> {
    d: L::F,
    m: L::F,
    s: [L::F; 2],
    t: [L::F; 2],
}

/// One unpacked block: codes as [`Lanes::dot`] reads them, multipliers as f32.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct PlainBlock {
    codes: [[u8; 4 * ROWS]; 8],
    d: [f32; ROWS],
    m: [f32; ROWS],
    s: [[f32; ROWS]; 2],
    t: [[f32; ROWS]; 2],
}

/// What a thread needs to multiply groups by up to 64 tokens. Large: made once per thread.
///
/// Unpacking planes costs about as much as multiplying them once, so with more than [`FEW`] tokens it is done once: the blocks
/// of one segment (one partial sum) become plain bytes and f32 scales and meet all tokens from the L1 cache. The 16 partial
/// sums of every token wait in memory for the tree.
pub(crate) struct DotPanel {
    /// Of one segment of one or two groups.
    blocks: Vec<[PlainBlock; 2]>,
    partial: Box<Partial>,
}

#[cfg(target_arch = "x86_64")]
thread_local! {
    /// Each compute thread's own panel, so that a step allocates nothing.
    static PANEL: std::cell::RefCell<DotPanel> = std::cell::RefCell::new(DotPanel::new());
}

/// Some groups times the tokens of `block`, whose first token begins a panel of `x`. Gives the rows from group `group` on,
/// of one or two groups, to `put(group, token, values)`.
///
/// `path` is one of this file's, and available.
#[cfg(target_arch = "x86_64")]
pub(crate) fn multiply_groups(
    path: KernelPath,
    dtype: DType,
    packed: &Packed,
    groups: Range<usize>,
    x: &QuantRows,
    block: Range<usize>,
    put: impl Fn(usize, usize, &[f32]),
) {
    let (x, shape) = (Tokens::new(x, block.start), packed.shape);
    let (mut few, mut many);
    let (values, step) = if block.len() <= SIDE {
        few = [[0.0; 2 * ROWS]; SIDE];
        (&mut few[..block.len()], 1)
    } else {
        many = [[0.0; 2 * ROWS]; TOKENS];
        (&mut many[..block.len()], 2)
    };
    PANEL.with_borrow_mut(|panel| {
        for group in groups.clone().step_by(step) {
            let here = group..groups.end.min(group + step);
            let stored = packed.groups(here.clone());
            // SAFETY: a path is available only where its instructions were detected.
            unsafe {
                match path {
                    KernelPath::Avx512 => panel.multiply::<Zmm>(dtype, stored, shape, x, values),
                    _ => panel.multiply::<Ymm>(dtype, stored, shape, x, values),
                }
            }
            for (token, values) in block.clone().zip(values.iter()) {
                put(group, token, &values[..here.len() * shape.lanes]);
            }
        }
    });
}

/// `[segment][token]`.
#[repr(C, align(64))]
struct Partial([[Values; TOKENS]; 16]);

impl DotPanel {
    pub fn new() -> Self {
        Self { blocks: Vec::new(), partial: Box::new(Partial([[[0.0; 2 * ROWS]; TOKENS]; 16])) }
    }

    /// One or two groups times `out.len()` tokens (at most 64); `out[n][row]`.
    ///
    /// # Safety
    /// The CPU has the instructions of `L`.
    pub unsafe fn multiply<L: Lanes>(
        &mut self,
        dtype: DType,
        groups: &[u8],
        shape: GroupShape,
        x: Tokens<'_>,
        out: &mut [Values],
    ) {
        assert!(groups.len() == shape.bytes || groups.len() == 2 * shape.bytes, "not one or two groups");
        assert!(shape.lanes == L::LANES && (1..=TOKENS).contains(&out.len()));
        assert!(x.rows.per_row() == shape.blocks, "tokens and weights of different width");
        // SAFETY: features promised by the caller, lengths asserted.
        unsafe {
            match dtype {
                DType::Q4_0 => self.choose::<L, Q40>(groups, shape, x, out),
                DType::Q4_1 => self.choose::<L, Q41>(groups, shape, x, out),
                DType::Q5_0 => self.choose::<L, Q50>(groups, shape, x, out),
                DType::Q5_1 => self.choose::<L, Q51>(groups, shape, x, out),
                DType::Q8_0 => self.choose::<L, Q80>(groups, shape, x, out),
                DType::Q2_K => self.choose::<L, Q2K>(groups, shape, x, out),
                DType::Q3_K => self.choose::<L, Q3K>(groups, shape, x, out),
                DType::Q4_K => self.choose::<L, Q4K>(groups, shape, x, out),
                DType::Q5_K => self.choose::<L, Q5K>(groups, shape, x, out),
                DType::Q6_K => self.choose::<L, Q6K>(groups, shape, x, out),
                DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats are not packed in lanes"),
            }
        }
    }

    /// # Safety
    /// As [`DotPanel::multiply`], after its checks.
    unsafe fn choose<L: Lanes, F: Stored>(
        &mut self,
        groups: &[u8],
        shape: GroupShape,
        x: Tokens<'_>,
        out: &mut [Values],
    ) {
        if out.len() > FEW && L::TWO && groups.len() > shape.bytes {
            // SAFETY: the caller's promise, passed on.
            return unsafe { L::panel::<F, 2>(self, groups, shape, x, 0, out) };
        }
        for (index, group) in groups.chunks_exact(shape.bytes.max(1)).enumerate() {
            let place = index * L::LANES;
            if out.len() > FEW {
                // SAFETY: the caller's promise, passed on.
                unsafe { L::panel::<F, 1>(self, group, shape, x, place, out) };
                continue;
            }
            for (panel, out) in out.chunks_mut(SIDE).enumerate() {
                let x = Tokens { panel: x.panel + panel, ..x };
                // SAFETY: the caller's promise, passed on.
                unsafe {
                    match out.len() {
                        1 => L::tile::<F, 1>(group, shape, x, place, out),
                        2 => L::tile::<F, 2>(group, shape, x, place, out),
                        3 => L::tile::<F, 3>(group, shape, x, place, out),
                        _ => L::tile::<F, 4>(group, shape, x, place, out),
                    }
                }
            }
        }
    }

    /// `G` groups and more than a few tokens; `out[n][place ..]`.
    ///
    /// # Safety
    /// As [`DotPanel::multiply`], after its checks.
    #[inline(always)]
    unsafe fn run<L: Lanes, F: Stored, const G: usize>(
        &mut self,
        groups: &[u8],
        shape: GroupShape,
        x: Tokens<'_>,
        place: usize,
        out: &mut [Values],
    ) {
        self.blocks.resize(shape.blocks.div_ceil(16), [PlainBlock::ZERO; 2]);
        let mut places = Places::new(F::layout(L::LANES), shape.blocks);
        for s in 0..16 {
            let segment = segment(s, shape.blocks);
            for (plain, place) in self.blocks[..segment.len()].iter_mut().zip(&mut places) {
                for (plain, group) in plain.iter_mut().zip(groups.chunks_exact(shape.bytes)) {
                    // SAFETY: the place is one of the group's.
                    unsafe { plain.unpack::<L, F>(group.as_ptr(), place) };
                }
            }
            // While this segment is multiplied, a part of what comes next is on its way from memory.
            let part = groups.len() / 16;
            for line in (0..part).step_by(64) {
                L::ask_later(groups.as_ptr().wrapping_add(groups.len() + s * part + line));
            }
            let blocks = &self.blocks[..segment.len()];
            let partial = &mut self.partial.0[s];
            for first in (0..out.len()).step_by(SIDE) {
                let (x, partial) = (x.side_by_side(s, first / SIDE), &mut partial[first..]);
                // SAFETY: the instructions are the caller's promise.
                unsafe {
                    match out.len() - first {
                        1 => meet::<L, F, G, 1>(blocks, x, partial),
                        2 => meet::<L, F, G, 2>(blocks, x, partial),
                        3 => meet::<L, F, G, 3>(blocks, x, partial),
                        _ => meet::<L, F, G, 4>(blocks, x, partial),
                    }
                }
            }
        }
        for (n, out) in out.iter_mut().enumerate() {
            for g in 0..G {
                // SAFETY: a vector of each group has its place in `Values`.
                unsafe {
                    let mut sums = [L::splat(0.0); 16];
                    for (sum, partial) in sums.iter_mut().zip(&self.partial.0) {
                        *sum = L::load_f32(partial[n][g * L::LANES..].as_ptr());
                    }
                    L::store_f32(tree::<L>(&sums), out[place + g * L::LANES..].as_mut_ptr());
                }
            }
        }
    }
}

/// One segment of `G` groups meets `N` tokens.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
unsafe fn meet<L: Lanes, F: Stored, const G: usize, const N: usize>(
    blocks: &[[PlainBlock; 2]],
    x: &[[QuantBlock; SIDE]],
    partial: &mut [Values],
) {
    // SAFETY: the caller's promise; a plain block has eight vectors of codes, and each group its vector of `Values`.
    unsafe {
        let mut acc = [[L::splat(0.0); N]; G];
        for (plain, x) in blocks.iter().zip(x.iter().filter_map(|x| x.first_chunk())) {
            let code = |group: usize, g: usize| L::load(plain[group].codes[g].as_ptr());
            let scales = |group: usize| plain[group].scales::<L>();
            add_block::<L, F, G, N>(code, scales, x, &mut acc);
        }
        for n in 0..N {
            for g in 0..G {
                L::store_f32(acc[g][n], partial[n][g * L::LANES..].as_mut_ptr());
            }
        }
    }
}

/// A few tokens: codes are unpacked in registers.
///
/// # Safety
/// The CPU has the instructions of `L`; the group is whole.
#[inline(always)]
unsafe fn tile<L: Lanes, F: Stored, const N: usize>(
    group: &[u8],
    shape: GroupShape,
    x: Tokens<'_>,
    place: usize,
    out: &mut [Values],
) {
    let start = group.as_ptr();
    let layout = F::layout(L::LANES);
    let mut asking = Asking::new(start, layout.block(), N);
    let mut places = Places::new(layout, shape.blocks);
    // SAFETY: every place is one of the group's; the rest is the caller's promise.
    unsafe {
        let mut partial = [[L::splat(0.0); 16]; N];
        for s in 0..16 {
            let mut acc = [[L::splat(0.0); N]];
            // As many as the segment has; a loop of one iterator, for two of them side by side would be counted first.
            for x in x.blocks(s) {
                let Some(place) = places.next() else { break };
                asking.block();
                let scales = |_: usize| stored_scales::<L, F>(start, place);
                let code = |_: usize, g: usize| stored_code::<L, F>(start.add(place.planes), g);
                add_block::<L, F, 1, N>(code, scales, x, &mut acc);
            }
            for (partial, acc) in partial.iter_mut().zip(acc[0]) {
                partial[s] = acc;
            }
        }
        for (n, out) in out.iter_mut().enumerate() {
            L::store_f32(tree::<L>(&partial[n]), out[place..].as_mut_ptr());
        }
    }
}

/// The contract's tree over 16 partial sums, lane by lane.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
unsafe fn tree<L: Lanes>(p: &[L::F; 16]) -> L::F {
    // SAFETY: the caller's promise.
    unsafe {
        let mut fours = [p[0]; 4];
        for (sum, p) in fours.iter_mut().zip(p.as_chunks::<4>().0) {
            *sum = L::add(L::add(p[0], p[1]), L::add(p[2], p[3]));
        }
        L::add(L::add(fours[0], fours[1]), L::add(fours[2], fours[3]))
    }
}

/// Adds one block of 32 columns of `G` groups and `N` tokens to the running sums: the twin's `accumulate`. Code and scales
/// are of a group.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
unsafe fn add_block<L: Lanes, F: Stored, const G: usize, const N: usize>(
    code: impl Fn(usize, usize) -> L::I,
    scales: impl Fn(usize) -> Scales<L>,
    x: &[QuantBlock; N],
    acc: &mut [[L::F; N]; G],
) {
    // SAFETY: the instructions are the caller's promise; quad `g < 8` is inside a token's 32 bytes.
    unsafe {
        // The offset's share of each half, or of both together, taken off before the first product.
        let (first, second) = ([-F::OFFSET, if F::HALVES { 0 } else { -F::OFFSET }], [0, -F::OFFSET]);
        let mut dots = [[[L::pair_product(x[0].sums, first); 2]; N]; G];
        for n in 0..N {
            let start = [L::pair_product(x[n].sums, first), L::pair_product(x[n].sums, second)];
            dots.iter_mut().for_each(|dots| dots[n] = start);
        }
        for g in 0..8 {
            let half = if F::HALVES { g / 4 } else { 0 };
            let mut codes = [code(0, g); G];
            for (codes, group) in codes[1..].iter_mut().zip(1..) {
                *codes = code(group, g);
            }
            for n in 0..N {
                let quad = L::quad(x[n].q.as_ptr().add(4 * g));
                for (dots, codes) in dots.iter_mut().zip(codes) {
                    dots[n][half] = L::dot(dots[n][half], codes, quad);
                }
            }
        }
        for group in 0..G {
            let scales = scales(group);
            for n in 0..N {
                let [first, second] = dots[group][n];
                acc[group][n] = scale::<L, F>(&scales, [first, second], x[n].d, x[n].sums, acc[group][n]);
            }
        }
    }
}

/// Scales the integer products of one block and token and adds them to its running sum.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
unsafe fn scale<L: Lanes, F: Stored>(
    scales: &Scales<L>,
    dots: [L::I; 2],
    d: f32,
    sums: [i16; 2],
    acc: L::F,
) -> L::F {
    // SAFETY: the caller's promise.
    unsafe {
        let dx = L::splat(d);
        let [x0, x1] = sums.map(i32::from);
        let dot = L::to_f32(dots[0]);
        // Integers below 2^24 in f32: exact, also through a product and a sum.
        let scaled = match F::SCHEME {
            Scheme::Scale | Scheme::ScaleMin => dot,
            Scheme::SuperMin => L::mul(dot, scales.s[0]),
            Scheme::Super16 | Scheme::Super16Min => {
                L::fma(L::to_f32(dots[1]), scales.s[1], L::mul(dot, scales.s[0]))
            }
        };
        let acc = L::fma(L::mul(scales.d, dx), scaled, acc);
        let both = || L::splat((x0 + x1) as f32);
        match F::SCHEME {
            Scheme::Scale | Scheme::Super16 => acc,
            Scheme::ScaleMin => L::fma(L::mul(scales.m, dx), both(), acc),
            Scheme::SuperMin => L::fnma(L::mul(scales.m, dx), L::mul(scales.t[0], both()), acc),
            Scheme::Super16Min => {
                let first = L::mul(scales.t[0], L::splat(x0 as f32));
                let mins = L::fma(scales.t[1], L::splat(x1 as f32), first);
                L::fnma(L::mul(scales.m, dx), mins, acc)
            }
        }
    }
}

/// The multipliers of the stored block at `place`.
///
/// # Safety
/// The CPU has the instructions of `L`; the place is one of a whole group that begins at `start`.
#[inline(always)]
unsafe fn stored_scales<L: Lanes, F: Stored>(start: *const u8, place: Place) -> Scales<L> {
    // SAFETY: supers are two vectors of f16 where the scheme has them, scales one, or two where the second one is read.
    unsafe {
        let (supers, entry) = (start.add(place.supers), start.add(place.scales));
        let next = 2 * L::LANES;
        let zero = L::splat(0.0);
        let halves = |pairs| [L::first(pairs), L::second(pairs)];
        let none = Scales { d: zero, m: zero, s: [zero; 2], t: [zero; 2] };
        match F::SCHEME {
            Scheme::Scale => Scales { d: L::halves(entry), ..none },
            Scheme::ScaleMin => Scales { d: L::halves(entry), m: L::halves(entry.add(next)), ..none },
            Scheme::Super16 => {
                Scales { d: L::halves(supers), s: halves(L::signed_byte_pairs(entry)), ..none }
            }
            Scheme::SuperMin | Scheme::Super16Min => {
                let (d, m) = (L::halves(supers), L::halves(supers.add(next)));
                let pairs = L::byte_pairs(entry);
                if F::HALVES {
                    let (s, t) = (L::and(pairs, 15), L::right(pairs, 4));
                    Scales { d, m, s: halves(s), t: halves(t) }
                } else {
                    let [s, t] = halves(pairs);
                    Scales { d, m, s: [s, zero], t: [t, zero] }
                }
            }
        }
    }
}

/// Quad `g` of the rows, as unsigned codes.
///
/// # Safety
/// The CPU has the instructions of `L`; a block's planes are readable at `planes`; `g < 8`.
#[inline(always)]
unsafe fn stored_code<L: Lanes, F: Stored>(planes: *const u8, g: usize) -> L::I {
    // SAFETY: every vector used below is one of the block's (`pack.rs`).
    unsafe {
        // Shifts cross byte borders; the masks take the strays off again.
        let load = |vector: usize| L::load(planes.add(4 * L::LANES * vector));
        let moved = |v: L::I, from: usize, to: usize| {
            if to > from { L::left(v, to - from) } else { L::right(v, from - to) }
        };
        let nibble = || L::and(L::right(load(g % 4), 4 * (g / 4)), 15);
        let pair = || L::and(L::right(load(g % 2), 2 * (g / 2)), 3);
        match F::BITS {
            2 => pair(),
            3 => L::or_and(pair(), moved(load(2), g, 2), 1 << 2),
            4 => nibble(),
            5 => L::or_and(nibble(), moved(load(4), g, 4), 1 << 4),
            6 => L::or_and(nibble(), moved(load(4 + g % 2), 2 * (g / 2), 4), 3 << 4),
            _ => L::flip(load(g)),
        }
    }
}

impl PlainBlock {
    const ZERO: Self = Self {
        codes: [[0; 4 * ROWS]; 8],
        d: [0.0; ROWS],
        m: [0.0; ROWS],
        s: [[0.0; ROWS]; 2],
        t: [[0.0; ROWS]; 2],
    };

    /// # Safety
    /// The CPU has the instructions of `L`; the group at `start` is whole and the place one of its own.
    #[inline(always)]
    unsafe fn unpack<L: Lanes, F: Stored>(&mut self, start: *const u8, place: Place) {
        // SAFETY: the place is inside the group; every array of `self` has room for the widest vector.
        unsafe {
            for (g, to) in self.codes.iter_mut().enumerate() {
                L::store(stored_code::<L, F>(start.add(place.planes), g), to.as_mut_ptr());
            }
            let scales = stored_scales::<L, F>(start, place);
            L::store_f32(scales.d, self.d.as_mut_ptr());
            L::store_f32(scales.m, self.m.as_mut_ptr());
            for half in 0..2 {
                L::store_f32(scales.s[half], self.s[half].as_mut_ptr());
                L::store_f32(scales.t[half], self.t[half].as_mut_ptr());
            }
        }
    }

    /// # Safety
    /// The CPU has the instructions of `L`.
    #[inline(always)]
    unsafe fn scales<L: Lanes>(&self) -> Scales<L> {
        // SAFETY: each array holds the widest vector.
        unsafe {
            let two = |v: &[[f32; ROWS]; 2]| [L::load_f32(v[0].as_ptr()), L::load_f32(v[1].as_ptr())];
            Scales {
                d: L::load_f32(self.d.as_ptr()),
                m: L::load_f32(self.m.as_ptr()),
                s: two(&self.s),
                t: two(&self.t),
            }
        }
    }
}
