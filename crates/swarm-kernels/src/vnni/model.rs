//! The instructions in plain Rust, one lane after the other: what the tile computes, on machines that have none of them.

use proptest::prelude::*;

use super::*;
use crate::buffer::Buffer;
use crate::math::tree16;
use crate::matrix::tests::{activations, noise, weights};
use crate::pack::{Packed, pack_groups};
use crate::{KernelPath, quant};

/// `L` lanes; with eight, the upper half stays zero.
struct Model<const L: usize>;

type Bytes = [u8; 4 * ROWS];

/// `vpdpbusd`: to each lane, four products of an unsigned and a signed byte, without saturation.
fn vpdpbusd(sum: Bytes, unsigned: Bytes, signed: Bytes) -> Bytes {
    each_i32(|lane| {
        let product = |j: usize| i32::from(unsigned[4 * lane + j]) * i32::from(signed[4 * lane + j] as i8);
        i32_at(&sum, lane).wrapping_add((0..4).map(product).sum())
    })
}

fn i32_at(v: &Bytes, lane: usize) -> i32 {
    i32::from_le_bytes(std::array::from_fn(|j| v[4 * lane + j]))
}

fn each_i32(value: impl Fn(usize) -> i32) -> Bytes {
    std::array::from_fn(|i| value(i / 4).to_le_bytes()[i % 4])
}

fn each_u16(v: Bytes, value: impl Fn(u16) -> u16) -> Bytes {
    std::array::from_fn(|i| value(u16::from_le_bytes([v[i & !1], v[i | 1]])).to_le_bytes()[i % 2])
}

impl<const L: usize> Lanes for Model<L> {
    type I = Bytes;
    type F = [f32; ROWS];
    const LANES: usize = L;
    const TWO: bool = L == ROWS;

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn tile<F: Stored, const N: usize>(
        group: &[u8],
        shape: GroupShape,
        x: Tokens<'_>,
        place: usize,
        out: &mut [Values],
    ) {
        // SAFETY: the caller's promise, passed on.
        unsafe { tile::<Self, F, N>(group, shape, x, place, out) }
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn panel<F: Stored, const G: usize>(
        panel: &mut DotPanel,
        groups: &[u8],
        shape: GroupShape,
        x: Tokens<'_>,
        place: usize,
        out: &mut [Values],
    ) {
        // SAFETY: the caller's promise, passed on.
        unsafe { panel.run::<Self, F, G>(groups, shape, x, place, out) }
    }

    fn ask_later(_at: *const u8) {}

    // SAFETY: the memory behind the pointers is the caller's promise.
    unsafe fn quad(at: *const i8) -> Bytes {
        // SAFETY: four bytes, by the caller's promise.
        let quad = unsafe { at.cast::<i32>().read_unaligned() };
        each_i32(|_| quad)
    }

    // SAFETY: the memory behind the pointers is the caller's promise.
    unsafe fn load(at: *const u8) -> Bytes {
        let mut v = [0; 4 * ROWS];
        // SAFETY: four bytes of each lane, by the caller's promise.
        unsafe { v.as_mut_ptr().copy_from_nonoverlapping(at, 4 * L) };
        v
    }

    // SAFETY: the memory behind the pointers is the caller's promise.
    unsafe fn store(v: Bytes, at: *mut u8) {
        // SAFETY: four bytes of each lane, by the caller's promise.
        unsafe { at.copy_from_nonoverlapping(v.as_ptr(), 4 * L) };
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn right(v: Bytes, bits: usize) -> Bytes {
        each_u16(v, |word| word >> bits)
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn left(v: Bytes, bits: usize) -> Bytes {
        each_u16(v, |word| word << bits)
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn and(v: Bytes, mask: u8) -> Bytes {
        v.map(|byte| byte & mask)
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn or_and(a: Bytes, b: Bytes, mask: u8) -> Bytes {
        std::array::from_fn(|i| a[i] | (b[i] & mask))
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn flip(v: Bytes) -> Bytes {
        v.map(|byte| byte ^ 0x80)
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn dot(sum: Bytes, codes: Bytes, quad: Bytes) -> Bytes {
        vpdpbusd(sum, codes, quad)
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn pair_product(pair: [i16; 2], by: [i16; 2]) -> Bytes {
        each_i32(|_| i32::from(pair[0]) * i32::from(by[0]) + i32::from(pair[1]) * i32::from(by[1]))
    }

    // SAFETY: the memory behind the pointers is the caller's promise.
    unsafe fn byte_pairs(at: *const u8) -> Bytes {
        // SAFETY: two bytes of each lane, by the caller's promise.
        let pair = |lane: usize| unsafe { at.add(2 * lane).cast::<[u8; 2]>().read() };
        each_i32(|lane| if lane < L { i32::from(pair(lane)[0]) | i32::from(pair(lane)[1]) << 16 } else { 0 })
    }

    // SAFETY: the memory behind the pointers is the caller's promise.
    unsafe fn signed_byte_pairs(at: *const u8) -> Bytes {
        // SAFETY: the caller's promise.
        let pairs = unsafe { Self::byte_pairs(at) };
        each_u16(pairs, |word| i16::from(word as u8 as i8) as u16)
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn first(pairs: Bytes) -> [f32; ROWS] {
        std::array::from_fn(|lane| f32::from(i32_at(&pairs, lane) as i16))
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn second(pairs: Bytes) -> [f32; ROWS] {
        std::array::from_fn(|lane| f32::from((i32_at(&pairs, lane) >> 16) as i16))
    }

    // SAFETY: the memory behind the pointers is the caller's promise.
    unsafe fn halves(at: *const u8) -> [f32; ROWS] {
        std::array::from_fn(|lane| {
            if lane >= L {
                return 0.0;
            }
            // SAFETY: two bytes of each lane, by the caller's promise.
            let bits = unsafe { at.add(2 * lane).cast::<[u8; 2]>().read() };
            crate::block::half(u16::from_le_bytes(bits))
        })
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn to_f32(v: Bytes) -> [f32; ROWS] {
        std::array::from_fn(|lane| i32_at(&v, lane) as f32)
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn splat(v: f32) -> [f32; ROWS] {
        [v; ROWS]
    }

    // SAFETY: the memory behind the pointers is the caller's promise.
    unsafe fn load_f32(at: *const f32) -> [f32; ROWS] {
        // SAFETY: a value of each lane, by the caller's promise.
        std::array::from_fn(|lane| if lane < L { unsafe { *at.add(lane) } } else { 0.0 })
    }

    // SAFETY: the memory behind the pointers is the caller's promise.
    unsafe fn store_f32(v: [f32; ROWS], at: *mut f32) {
        // SAFETY: a place of each lane, by the caller's promise.
        unsafe { at.copy_from_nonoverlapping(v.as_ptr(), L) };
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn add(a: [f32; ROWS], b: [f32; ROWS]) -> [f32; ROWS] {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn mul(a: [f32; ROWS], b: [f32; ROWS]) -> [f32; ROWS] {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn fma(a: [f32; ROWS], b: [f32; ROWS], c: [f32; ROWS]) -> [f32; ROWS] {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    // SAFETY: plain Rust, nothing to ask for.
    unsafe fn fnma(a: [f32; ROWS], b: [f32; ROWS], c: [f32; ROWS]) -> [f32; ROWS] {
        std::array::from_fn(|lane| (-a[lane]).mul_add(b[lane], c[lane]))
    }
}

/// All bits that are part of the contract.
fn bits(v: f32) -> u32 {
    if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }
}

/// The products of all rows and tokens by the tile on `V`, and by the twin.
fn both<V: Lanes>(
    dtype: DType,
    rows: usize,
    cols: usize,
    w: &[u8],
    x: &QuantRows,
    tokens: usize,
) -> [Vec<u32>; 2] {
    let mut packed = Packed::zeroed(dtype, V::LANES, rows, cols, Buffer::zeroed).unwrap();
    pack_groups(dtype, packed.shape, w.len() / rows, w, packed.groups_mut());
    let (mut panel, mut got) = (DotPanel::new(), vec![0; rows * tokens]);
    for first in (0..rows).step_by(2 * V::LANES) {
        let here = (rows - first).min(2 * V::LANES);
        let groups = packed.groups(first / V::LANES..(first + here).div_ceil(V::LANES));
        let mut out = vec![[f32::NAN; 2 * ROWS]; tokens];
        // SAFETY: plain Rust needs no instructions of the CPU's.
        unsafe { panel.multiply::<V>(dtype, groups, packed.shape, Tokens::new(x, 0), &mut out) };
        for (token, out) in out.iter().enumerate() {
            let values = out[..here].iter().map(|v| bits(*v));
            got[token * rows + first..][..here].iter_mut().zip(values).for_each(|(to, v)| *to = v);
        }
    }
    let row_bytes = dtype.row_bytes(cols).unwrap();
    let twin =
        |token: usize, row: usize| quant::dot_row(dtype, &w[row * row_bytes..][..row_bytes], x.row(token));
    let want = (0..tokens).flat_map(|t| (0..rows).map(move |r| bits(twin(t, r)))).collect();
    [got, want]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn the_tile_on_modelled_instructions_equals_the_twin(
        seed: u64, rows in 1usize..50, blocks in 1usize..5, tokens in prop_oneof![1usize..11, 17usize..23],
        extreme in proptest::bool::weighted(0.2),
    ) {
        for dtype in DType::ALL.into_iter().filter(|d| d.is_quantized()) {
            let cols = blocks * dtype.block_len();
            let (w, numbers) = (weights(dtype, seed, rows, cols), activations(seed, tokens * cols, extreme));
            let mut x = QuantRows::default();
            x.fill(KernelPath::Scalar, &numbers, cols);
            let [got, want] = both::<Model<16>>(dtype, rows, cols, &w, &x, tokens);
            prop_assert_eq!(got, want, "16 rows, {:?} [{}, {}] x {}", dtype, rows, cols, tokens);
            let [got, want] = both::<Model<8>>(dtype, rows, cols, &w, &x, tokens);
            prop_assert_eq!(got, want, "8 rows, {:?} [{}, {}] x {}", dtype, rows, cols, tokens);
        }
    }

    #[test]
    fn the_modelled_instruction_adds_four_products(seed: u64) {
        let v: [Bytes; 3] = std::array::from_fn(|i| noise(seed.wrapping_add(i as u64), 64).try_into().unwrap());
        let got = vpdpbusd(v[0], v[1], v[2]);
        for lane in 0..ROWS {
            let mut want = i64::from(i32_at(&v[0], lane));
            for (a, b) in v[1].iter().zip(&v[2]).skip(4 * lane).take(4) {
                want += i64::from(*a) * i64::from(*b as i8);
            }
            prop_assert_eq!(i32_at(&got, lane), want as i32);
        }
        #[cfg(target_arch = "x86_64")]
        {
            let quad = i32_at(&v[2], 0);
            let want = vpdpbusd(v[0], v[1], each_i32(|_| quad));
            // SAFETY: each set is only used where the path that needs it is available; all arrays are 64 bytes.
            unsafe {
                let mut got = want;
                if KernelPath::Avx512.is_available() {
                    let dot = Zmm::dot(Zmm::load(v[0].as_ptr()), Zmm::load(v[1].as_ptr()), Zmm::quad(v[2].as_ptr().cast()));
                    Zmm::store(dot, got.as_mut_ptr());
                    prop_assert_eq!(got, want);
                }
                if KernelPath::AvxVnni.is_available() {
                    let dot = Ymm::dot(Ymm::load(v[0].as_ptr()), Ymm::load(v[1].as_ptr()), Ymm::quad(v[2].as_ptr().cast()));
                    Ymm::store(dot, got.as_mut_ptr());
                    prop_assert_eq!(got, want);
                }
            }
        }
    }
}

/// The largest integers there are: every step of the scaled product stays exact.
#[test]
fn the_largest_scaled_product_is_exact_in_f32() {
    let (q, s, x) = (-32.0f32, -128.0f32, 127.0f32);
    let half = 16.0 * q * x;
    let first = half * s;
    let both = half.mul_add(s, first);
    assert_eq!(f64::from(both), 2.0 * 16.0 * 32.0 * 127.0 * 128.0);
    assert!(both < 16_777_216.0);
}

#[test]
fn trees_agree() {
    let p: [f32; 16] = std::array::from_fn(|i| (i as f32 * 1.7).sin());
    // SAFETY: plain Rust.
    let got = unsafe { tree::<Model<8>>(&p.map(|p| [p; ROWS])) };
    assert_eq!(got[0].to_bits(), tree16(&p).to_bits());
}
