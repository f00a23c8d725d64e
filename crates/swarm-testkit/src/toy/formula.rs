//! The weight formula: a counter-based hash of `(model seed, tensor name, element index)`.
//! Its twin is in `make_goldens.py`; `goldens/index.json` holds a digest of every model's
//! weights, and a test compares.
//!
//! Every value is an 8-bit integer times a power of two, so it is exact in f32, f16 and bf16
//! and the storage type cannot change a logit.

const GOLDEN_RATIO: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

pub(super) fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xCBF2_9CE4_8422_2325, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

/// `count` integers in `-128..=127` that depend on nothing but seed, name and index.
pub(super) fn stream(seed: u64, name: &str, count: usize) -> impl Iterator<Item = i32> {
    let base = mix(fnv1a(name) ^ seed.wrapping_mul(GOLDEN_RATIO));
    (1..=count as u64).map(move |step| {
        let hash = mix(base.wrapping_add(step.wrapping_mul(GOLDEN_RATIO)));
        (hash >> 56) as i32 - 128
    })
}

/// Binary places of a matrix or bias: values are `k * 2^-shift`.
fn shift(name: &str, cols: usize) -> i32 {
    if name.contains("embed_tokens") {
        return 7;
    }
    let places = if name.contains("lm_head") { 8 } else { 9 };
    if name.ends_with("bias") {
        return places;
    }
    // Wider rows get smaller values, so that sums over them stay about as large.
    places + i32::from(cols >= 256) + 2 * i32::from(cols >= 1024)
}

/// The values of the tensor `name` with `count` elements in rows of `cols`.
pub(super) fn weights(seed: u64, name: &str, count: usize, cols: usize) -> Vec<f32> {
    if name.contains("norm") {
        return stream(seed, name, count).map(|k| 1.0 + (k >> 1) as f32 / 128.0).collect();
    }
    let unit = 0.5f32.powi(shift(name, cols));
    stream(seed, name, count).map(|k| k as f32 * unit).collect()
}

/// One tensor's share of a model digest: f32 bit patterns, each times its odd place, summed,
/// times the hash of the name.
#[cfg(test)]
pub(super) fn digest(name: &str, values: &[f32]) -> u64 {
    let sum = values.iter().zip(0u64..).fold(0u64, |sum, (value, place)| {
        sum.wrapping_add(u64::from(value.to_bits()).wrapping_mul(2 * place + 1))
    });
    sum.wrapping_mul(fnv1a(name) | 1)
}
