//! The project's own transcendental functions and the fixed summation tree.
//!
//! Only add, multiply, FMA, integer operations, comparisons and conversions are used, so that CPUs and GPUs agree to
//! the bit. Each function is a few units in the last place from the true value; the tests state how far.

/// Sums 16 partial sums by the contract's fixed binary tree: `((0+1)+(2+3))+((4+5)+(6+7))` and so on.
#[inline(always)]
pub fn tree16(p: &[f32; 16]) -> f32 {
    let q = |i: usize| (p[i] + p[i + 1]) + (p[i + 2] + p[i + 3]);
    (q(0) + q(4)) + (q(8) + q(12))
}

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// `ln 2` cut in two: the high part has few bits, so `n * LN2_HI` is exact for the `n` that occur.
const LN2_HI: f32 = 0.693_359_4;
const LN2_LO: f32 = -2.121_944_4e-4;

/// e^x. Exactly 0 below -87, e^87 above 87 (results are never denormal or infinite), NaN for NaN.
///
/// Range reduction by powers of two and a polynomial of degree 6 on [-ln2/2, ln2/2]; relative error below 2.4e-7.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let clamped = if x > 87.0 { 87.0 } else { x };
    let clamped = if clamped < -87.0 { -87.0 } else { clamped };
    let n = (clamped * LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_HI, clamped);
    let r = n.mul_add(-LN2_LO, r);
    let mut p = 1.0 / 720.0;
    p = r.mul_add(p, 1.0 / 120.0);
    p = r.mul_add(p, 1.0 / 24.0);
    p = r.mul_add(p, 1.0 / 6.0);
    p = r.mul_add(p, 0.5);
    p = r.mul_add(p, 1.0);
    p = r.mul_add(p, 1.0);
    // n is in -126..=126 here (or NaN, where p is NaN and the scale does not matter), so the exponent is normal. Added to
    // 1.5 * 2^23, a whole number stands in the lowest bits; a conversion would keep compilers from using vectors.
    let scale = f32::from_bits(((n + 12_582_912.0).to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { p * scale }
}

/// 1 / x for `2^-126 <= |x| <= 2^126`, by Newton's iteration from an integer guess. Within 1.5 ulp.
#[inline(always)]
pub fn recip(x: f32) -> f32 {
    let sign = x.to_bits() & 0x8000_0000;
    let a = f32::from_bits(x.to_bits() & 0x7fff_ffff);
    let mut y = f32::from_bits(0x7ef3_11c7_u32.wrapping_sub(a.to_bits()));
    for _ in 0..4 {
        let e = (-a).mul_add(y, 1.0);
        y = y.mul_add(e, y);
    }
    f32::from_bits(y.to_bits() ^ sign)
}

/// 1 / sqrt(x) for normal positive `x`, by Newton's iteration from an integer guess. Within 2 ulp.
#[inline(always)]
pub fn rsqrt(x: f32) -> f32 {
    let half = 0.5 * x;
    let mut y = f32::from_bits(0x5f37_59df_u32.wrapping_sub(x.to_bits() >> 1));
    for _ in 0..3 {
        y *= (-(half * y)).mul_add(y, 1.5);
    }
    y
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    recip(1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn relative(got: f32, want: f64) -> f64 {
        ((f64::from(got) - want) / want).abs()
    }

    proptest! {
        #[test]
        fn exp_is_close(x in -87.0f32..87.0) {
            prop_assert!(relative(exp(x), f64::from(x).exp()) < 2.4e-7, "{x}");
        }

        #[test]
        fn recip_is_close(bits in 0x0080_0000u32..0x7e80_0000, negative: bool) {
            let x = f32::from_bits(bits | (u32::from(negative) << 31));
            prop_assert!(relative(recip(x), 1.0 / f64::from(x)) < 1.8e-7, "{x:e}");
        }

        #[test]
        fn rsqrt_is_close(bits in 0x0080_0000u32..0x7f80_0000) {
            let x = f32::from_bits(bits);
            prop_assert!(relative(rsqrt(x), 1.0 / f64::from(x).sqrt()) < 2.4e-7, "{x:e}");
        }

        #[test]
        fn sigmoid_is_close(x in -86.0f32..86.0) {
            prop_assert!(relative(sigmoid(x), 1.0 / (1.0 + (-f64::from(x)).exp())) < 5e-7, "{x}");
        }
    }

    #[test]
    fn edges() {
        assert_eq!(exp(0.0).to_bits(), 1.0f32.to_bits());
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!(exp(-88.0).to_bits(), 0);
        assert_eq!(exp(f32::INFINITY).to_bits(), exp(87.0).to_bits());
        assert!(exp(f32::NAN).is_nan());
        assert!(sigmoid(f32::NAN).is_nan());
        assert!(sigmoid(-1e30) > 0.0 && sigmoid(1e30) == 1.0);
    }
}
