//! The portable model of the vector steps: what each means, in plain Rust.

use crate::block::{Format, half};
use crate::math::tree16;
use crate::neon::vectors::{MatrixVectors, Vectors};

/// The meaning of every step.
pub(crate) struct Model;

fn lanes<T, const N: usize>(f: impl FnMut(usize) -> T) -> [T; N] {
    std::array::from_fn(f)
}

impl Vectors for Model {
    type Bytes = [u8; 16];
    type Ints = [i32; 4];
    type Floats = [f32; 4];

    fn bytes(from: &[u8; 16]) -> [u8; 16] {
        *from
    }

    fn store_bytes(v: [u8; 16], to: &mut [u8; 16]) {
        *to = v;
    }

    fn mask(v: [u8; 16], mask: u8) -> [u8; 16] {
        v.map(|b| b & mask)
    }

    fn shift(v: [u8; 16], bits: usize) -> [u8; 16] {
        v.map(|b| b >> bits)
    }

    fn join(low: [u8; 16], high: [u8; 16], bits: usize) -> [u8; 16] {
        lanes(|i| low[i] | (high[i] << bits))
    }

    fn zip(a: [u8; 16], b: [u8; 16]) -> [[u8; 16]; 2] {
        lanes(|n| {
            lanes(|i| {
                let (from, lane) = (if i / 4 % 2 == 0 { a } else { b }, 2 * n + i / 8);
                from[4 * lane + i % 4]
            })
        })
    }

    fn ints(from: [i32; 4]) -> [i32; 4] {
        from
    }

    fn store_ints(v: [i32; 4], to: &mut [i32; 4]) {
        *to = v;
    }

    fn times(a: [i32; 4], b: [i32; 4]) -> [i32; 4] {
        lanes(|i| a[i].wrapping_mul(b[i]))
    }

    fn plus_times(sum: [i32; 4], a: [i32; 4], b: [i32; 4]) -> [i32; 4] {
        lanes(|i| sum[i].wrapping_add(a[i].wrapping_mul(b[i])))
    }

    fn pairs(v: [u8; 16], signed: bool) -> [[[i32; 4]; 2]; 2] {
        let int = |b: u8| if signed { i32::from(b as i8) } else { i32::from(b) };
        lanes(|which| lanes(|side| lanes(|lane| int(v[8 * side + 2 * lane + which]))))
    }

    fn dot16(sum: [i32; 4], w: [[u8; 16]; 4], x: [u8; 16], _: Format) -> [i32; 4] {
        lanes(|r| {
            let product = |k: usize| i32::from(w[k / 4][4 * r + k % 4] as i8) * i32::from(x[k] as i8);
            sum[r].wrapping_add((0..16).map(product).sum())
        })
    }

    fn floats(from: &[f32; 4]) -> [f32; 4] {
        *from
    }

    fn store(v: [f32; 4], to: &mut [f32; 4]) {
        *to = v;
    }

    fn splat(value: f32) -> [f32; 4] {
        [value; 4]
    }

    fn words(v: [u8; 16]) -> [f32; 4] {
        lanes(|i| f32::from_le_bytes([v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]]))
    }

    fn from_ints(v: [i32; 4]) -> [f32; 4] {
        v.map(|v| v as f32)
    }

    fn halves(v: [u8; 16]) -> [[f32; 4]; 2] {
        lanes(|side| {
            lanes(|lane| half(u16::from_le_bytes([v[8 * side + 2 * lane], v[8 * side + 2 * lane + 1]])))
        })
    }

    fn upper_halves(v: [u8; 16]) -> [[f32; 4]; 2] {
        lanes(|side| {
            lanes(|lane| f32::from_le_bytes([0, 0, v[8 * side + 2 * lane], v[8 * side + 2 * lane + 1]]))
        })
    }

    fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes(|i| a[i] + b[i])
    }

    fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes(|i| a[i] * b[i])
    }

    fn fma(sum: [f32; 4], a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes(|i| a[i].mul_add(b[i], sum[i]))
    }

    fn fma_minus(sum: [f32; 4], a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes(|i| (-a[i]).mul_add(b[i], sum[i]))
    }

    fn tree(p: [[f32; 4]; 4]) -> f32 {
        tree16(&lanes(|i| p[i / 4][i % 4]))
    }
}

impl MatrixVectors for Model {
    fn both(a: &[u8; 8], b: &[u8; 8]) -> [u8; 16] {
        lanes(|i| if i < 8 { a[i] } else { b[i - 8] })
    }

    fn unzip(a: [i32; 4], b: [i32; 4]) -> [[i32; 4]; 2] {
        [[a[0], a[2], b[0], b[2]], [a[1], a[3], b[1], b[3]]]
    }

    fn matrix8(sum: [i32; 4], w: [u8; 16], x: [u8; 16]) -> [i32; 4] {
        lanes(|lane| {
            let product =
                |k: usize| i32::from(w[8 * (lane / 2) + k] as i8) * i32::from(x[8 * (lane % 2) + k] as i8);
            sum[lane].wrapping_add((0..8).map(product).sum())
        })
    }
}
