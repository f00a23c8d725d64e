//! The element-wise operations of a layer: norm, rope, gated activation, sums.
//!
//! Each is one plain Rust body, compiled as it is (the scalar twin), for AVX2 + FMA, and for AVX-512. Rust gives float
//! expressions one meaning, so the compiler may put elements side by side but cannot change a bit of them.

use crate::KernelPath;
use crate::math::{rsqrt, sigmoid, tree16};

/// Defines a function that runs its body compiled for the best instruction set this process uses.
macro_rules! dispatched {
    ($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $ty:ty),*) $body:block) => {
        $(#[$doc])*
        pub fn $name($($arg: $ty),*) {
            #[inline(always)]
            fn body($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) {
                body($($arg),*);
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) {
                body($($arg),*);
            }

            match KernelPath::current() {
                // SAFETY: a path is chosen only where its instructions were detected.
                #[cfg(target_arch = "x86_64")]
                KernelPath::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                path if path.has_avx2() => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}

dispatched! {
    /// Root mean square norm of each row: `out = (x * rsqrt(mean(x^2) + eps)) * weight`.
    ///
    /// `x` and `out` are `[rows, weight.len()]`. The mean is the 16-partial-sum total times `1 / width` (a host
    /// constant), added to `eps` by one FMA. Zhang and Sennrich, arXiv:1910.07467.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let width = weight.len();
        assert_eq!(x.len(), out.len(), "rms_norm: lengths differ");
        assert!(width > 0 && x.len().is_multiple_of(width), "rms_norm: not whole rows");
        let inverse_width = 1.0 / width as f32;
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let scale = rsqrt(sum_of_squares(x).mul_add(inverse_width, eps));
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = (x * scale) * w;
            }
        }
    }
}

dispatched! {
    /// `x[i] = e^x[i]`, as [`exp`](crate::math::exp) has it.
    pub fn exp_in_place(x: &mut [f32]) {
        for x in x {
            *x = crate::math::exp(*x);
        }
    }
}

#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut partial = [0.0f32; 16];
    let (whole, rest) = x.as_chunks::<16>();
    for x in whole {
        for (acc, x) in partial.iter_mut().zip(x) {
            *acc = x.mul_add(*x, *acc);
        }
    }
    for (acc, x) in partial.iter_mut().zip(rest) {
        *acc = x.mul_add(*x, *acc);
    }
    tree16(&partial)
}

dispatched! {
    /// `x += y`, element by element (the residual).
    pub fn add(x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "add: lengths differ");
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

dispatched! {
    /// Adds `bias` to every row of `x`, `[rows, bias.len()]`.
    pub fn add_bias(x: &mut [f32], bias: &[f32]) {
        assert!(!bias.is_empty() && x.len().is_multiple_of(bias.len()), "add_bias: not whole rows");
        for row in x.chunks_exact_mut(bias.len()) {
            for (x, b) in row.iter_mut().zip(bias) {
                *x += b;
            }
        }
    }
}

dispatched! {
    /// `gate = silu(gate) * up` with `silu(x) = x * sigmoid(x)`. Shazeer, arXiv:2002.05202 (SwiGLU).
    pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "silu_mul: lengths differ");
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = (*gate * sigmoid(*gate)) * up;
        }
    }
}

dispatched! {
    /// Rotary position embedding of the heads of one position, in place, in Hugging Face's half-split layout.
    ///
    /// `x` is `[heads, head_dim]`; `cos` and `sin` are `[rotary_dim / 2]`, `rotary_dim <= head_dim`. Element `i` is
    /// rotated with element `i + rotary_dim / 2`: `a * cos - b * sin`, `b * cos + a * sin`, each one product and
    /// one FMA. Su et al., arXiv:2104.09864.
    pub fn rope(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        assert!(sin.len() == half && 2 * half <= head_dim, "rope: table of {half} for heads of {head_dim}");
        for head in x.chunks_exact_mut(head_dim) {
            let (first, second) = head.split_at_mut(half);
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let (x, y) = (*a, *b);
                *a = (-y).mul_add(*sin, x * cos);
                *b = x.mul_add(*sin, y * cos);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rms_norm_is_close_to_f64() {
        let x: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let weight: Vec<f32> = (0..50).map(|i| 1.0 + i as f32 * 0.01).collect();
        let mut out = vec![0.0; 100];
        rms_norm(&x, &weight, 1e-5, &mut out);
        for (row, out) in x.chunks(50).zip(out.chunks(50)) {
            let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 50.0;
            for ((x, w), got) in row.iter().zip(&weight).zip(out) {
                let want = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*w);
                assert!((f64::from(*got) - want).abs() < 1e-6 * want.abs().max(1.0));
            }
        }
    }

    #[test]
    fn rope_rotates_pairs_and_leaves_the_rest() {
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0];
        rope(&mut x, 5, &[0.0, 1.0], &[1.0, 0.0]);
        assert_eq!(x, [-3.0, 2.0, 1.0, 4.0, 5.0]);
    }

    #[test]
    fn silu_mul_is_close() {
        let mut gate = [-3.0f32, -0.5, 0.0, 2.0, 20.0];
        let want: Vec<f64> =
            gate.iter().map(|&g| f64::from(g) / (1.0 + (-f64::from(g)).exp()) * 2.0).collect();
        silu_mul(&mut gate, &[2.0; 5]);
        for (got, want) in gate.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-6 * want.abs().max(1e-3));
        }
    }
}
