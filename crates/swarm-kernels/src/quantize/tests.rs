//! The encoders: equal on every path, close to what they were given, and what odd weights become.

use proptest::prelude::*;

use super::*;
use crate::dequantize;

const TARGETS: [DType; 4] = [DType::Q8_0, DType::Q4_0, DType::Q5_0, DType::Q4_K];

fn encoded(path: KernelPath, from: DType, stored: &[u8], to: DType) -> Vec<u8> {
    let values = stored.len() / from.block_bytes();
    let mut out = vec![0xa5; to.row_bytes(values).unwrap()];
    quantize_with(path, from, stored, to, &mut out).unwrap();
    out
}

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// What is left of `x` after a stay in blocks of `to`.
fn there_and_back(x: &[f32], to: DType) -> Vec<f32> {
    let mut back = vec![0.0; x.len()];
    dequantize(to, &encoded(KernelPath::best(), DType::F32, &bytes(x), to), &mut back).unwrap();
    back
}

/// Numbers with a normal distribution, nearly: the sum of four uniform ones.
fn bell(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 0.02).collect()
}

/// The root of the mean square of what is lost, as part of the same of `x`.
fn loss(x: &[f32], back: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let lost: f64 = x.iter().zip(back).map(|(x, y)| square(x - y)).sum();
    (lost / x.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

proptest! {
    #[test]
    fn fast_equals_scalar(
        seed: u64, blocks in 1usize..7, scale in -30i32..30,
        odd in proptest::collection::vec((0usize..7 * 256, any::<u32>()), 0..6),
    ) {
        let mut x: Vec<f32> = bell(seed, blocks * 256).iter().map(|x| x * 2f32.powi(scale)).collect();
        for (at, bits) in odd {
            if let Some(x) = x.get_mut(at) {
                *x = f32::from_bits(bits);
            }
        }
        let top = |x: &f32, shift: u32| (x.to_bits() >> shift) as u16;
        let f16: Vec<u8> = x.iter().flat_map(|x| top(x, 12).to_le_bytes()).collect();
        let bf16: Vec<u8> = x.iter().flat_map(|x| top(x, 16).to_le_bytes()).collect();
        for (from, stored) in [(DType::F32, bytes(&x)), (DType::F16, f16), (DType::BF16, bf16)] {
            for to in TARGETS {
                let want = encoded(KernelPath::Scalar, from, &stored, to);
                for path in KernelPath::available() {
                    prop_assert!(encoded(path, from, &stored, to) == want, "{:?} {:?} {:?}", path, from, to);
                }
            }
        }
    }

    #[test]
    fn cuts_between_blocks_do_not_show(seed: u64, blocks in 1usize..9, cut in 0usize..9) {
        let x = bytes(&bell(seed, blocks * 256));
        for to in TARGETS {
            let (first, second) = x.split_at(cut.min(blocks) * 1024);
            let parts = [first, second].map(|part| encoded(KernelPath::best(), DType::F32, part, to));
            prop_assert!(parts.concat() == encoded(KernelPath::best(), DType::F32, &x, to), "{:?}", to);
        }
    }

    #[test]
    fn no_value_goes_far(x in proptest::collection::vec(-1f32..1.0, 256)) {
        // In the largest magnitude of the block: half a step, and what a scale that is not for the extreme value cuts off.
        for (to, far) in [(DType::Q8_0, 0.0045), (DType::Q4_0, 0.2), (DType::Q5_0, 0.1)] {
            let back = there_and_back(&x, to);
            for (x, back) in x.chunks(32).zip(back.chunks(32)) {
                let size = largest(x);
                for (x, back) in x.iter().zip(back) {
                    prop_assert!((x - back).abs() <= far * size, "{:?}: {} became {}, of {}", to, x, back, size);
                }
            }
        }
        for (x, back) in x.iter().zip(there_and_back(&x, DType::Q4_K)) {
            prop_assert!((x - back).abs() <= 0.2, "{} became {}", x, back);
        }
    }
}

#[test]
fn what_is_lost_is_little() {
    let x = bell(7, 64 * 256);
    let found = TARGETS.map(|to| loss(&x, &there_and_back(&x, to)));
    // Measured here on this distribution, and a little more.
    for ((to, lost), most) in TARGETS.into_iter().zip(found).zip([0.0060, 0.090, 0.045, 0.075]) {
        assert!(lost < most, "{to:?} loses {lost}");
    }
}

#[test]
fn the_search_beats_the_plain_scale() {
    let x = bell(11, 64 * 256);
    for (to, levels) in [(DType::Q4_0, 8.0), (DType::Q5_0, 16.0)] {
        let plain: Vec<f32> = (x.chunks(32))
            .flat_map(|x| {
                let size = largest(x);
                let extreme = x.iter().copied().find(|x| x.abs() == size).unwrap();
                let d = f16::from_f32(extreme / -levels).to_f32();
                x.iter().map(move |x| d * nearest(x / d, -levels, levels - 1.0))
            })
            .collect();
        let (ours, theirs) = (loss(&x, &there_and_back(&x, to)), loss(&x, &plain));
        assert!(ours < theirs * 0.95, "{to:?}: {ours} against {theirs}");
    }
}

#[test]
fn odd_blocks() {
    for to in TARGETS {
        assert!(there_and_back(&[0.0; 256], to).iter().all(|x| *x == 0.0), "{to:?}");
        // Below every scale that f16 has.
        assert!(there_and_back(&[1e-12; 256], to).iter().all(|x| *x == 0.0), "{to:?}");
        assert!(there_and_back(&[f32::from_bits(3); 256], to).iter().all(|x| *x == 0.0), "{to:?}");
        for constant in [0.75, -0.75, 100.0, -1e-3] {
            let back = there_and_back(&[constant; 256], to);
            let close = |x: &f32| (x / constant - 1.0).abs() < 0.02;
            assert!(back.iter().all(close), "{to:?}: {constant} became {}", back[0]);
        }
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
            let mut x = vec![0.01; 512];
            x[300] = wrong;
            let back = there_and_back(&x, to);
            let block = 300 / to.block_len() * to.block_len()..;
            assert!(back[block][..to.block_len()].iter().all(|x| x.is_nan()), "{to:?}: {wrong}");
            assert!(back[..256].iter().all(|x| x.is_finite()), "{to:?}: {wrong}");
        }
    }
}

#[test]
fn halves_are_what_they_are() {
    for bits in 0..=u16::MAX {
        let (want, got) = (f16::from_bits(bits).to_f32(), wide(bits));
        assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{bits:#06x}");
    }
}

#[test]
fn what_a_matrix_becomes() {
    assert_eq!(Quant::Q4_K.applied(DType::F16, 512), DType::Q4_K);
    assert_eq!(Quant::Q4_K.applied(DType::BF16, 576), DType::Q5_0);
    assert_eq!(Quant::Q4_K.applied(DType::F32, 100), DType::F32);
    assert_eq!(Quant::Q8_0.applied(DType::F32, 33), DType::F32);
    assert_eq!(Quant::Q4_0.applied(DType::F32, 0), DType::F32);
    for quant in Quant::ALL {
        assert_eq!(quant.applied(DType::Q6_K, 512), DType::Q6_K);
        assert_eq!(quant.applied(DType::F32, 512).name().to_lowercase(), quant.name());
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let mut out = [0; 34];
    let wrong = |from, stored: &[u8], to, out: &mut [u8]| quantize(from, stored, to, out).unwrap_err();
    assert!(matches!(wrong(DType::F32, &[0; 128], DType::Q6_K, &mut out), ShapeError::NoEncoder { .. }));
    assert!(matches!(wrong(DType::Q8_0, &[0; 34], DType::Q8_0, &mut out), ShapeError::NoEncoder { .. }));
    assert!(matches!(wrong(DType::F32, &[0; 127], DType::Q8_0, &mut out), ShapeError::Bytes { .. }));
    assert!(matches!(wrong(DType::F32, &[0; 132], DType::Q8_0, &mut out), ShapeError::Columns { .. }));
    assert!(matches!(wrong(DType::F32, &[0; 256], DType::Q8_0, &mut out), ShapeError::Bytes { .. }));
}

/// The blocks of every format, as one number: it may change only together with [`crate::NUMERICS`].
#[test]
fn blocks_are_the_same_everywhere_and_for_ever() {
    let x = bytes(&bell(42, 4096));
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    for to in TARGETS {
        for byte in encoded(KernelPath::best(), DType::F32, &x, to) {
            digest = (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    assert_eq!(digest, 0x9a45_7a75_8ac0_4783, "{digest:#018x}");
}
