//! The random stream of the sampler: counter-based, so that any node can resume it.

/// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC '11).
///
/// A pure function of `counter` and `key`: ten rounds of two 32 x 32 bit products. Nothing is
/// carried from draw to draw, so token 1000 of a session costs the same on a node that never saw
/// tokens 0 to 999.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let (high0, low0) = wide_product(MULTIPLIERS[0], counter[0]);
        let (high1, low1) = wide_product(MULTIPLIERS[1], counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
    }
    counter
}

/// 64 uniform bits for the token at `position` of a session seeded with `seed`.
///
/// `draw` numbers the independent draws one position may need (0 is the sampled token). The two
/// unused counter words keep later streams apart from this one.
pub fn uniform_bits(seed: u64, position: u64, draw: u32) -> u64 {
    let [position_low, position_high] = halves(position);
    let [a, b, _, _] = philox4x32([position_low, position_high, draw, 0], halves(seed));
    u64::from(a) | (u64::from(b) << 32)
}

fn wide_product(a: u32, b: u32) -> (u32, u32) {
    let [low, high] = halves(u64::from(a) * u64::from(b));
    (high, low)
}

/// `[low, high]` 32 bits.
fn halves(value: u64) -> [u32; 2] {
    [(value & 0xFFFF_FFFF) as u32, (value >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers shipped with Random123 (`kat_vectors`, philox4x32 10).
    #[test]
    fn philox_gives_the_published_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox4x32(counter, key), want);
        }
    }

    #[test]
    fn seed_position_and_draw_each_change_the_bits() {
        let base = uniform_bits(7, 11, 0);
        assert_eq!(base, uniform_bits(7, 11, 0));
        let others = [
            uniform_bits(8, 11, 0),
            uniform_bits(7, 12, 0),
            uniform_bits(7, 11, 1),
            uniform_bits(7 << 32, 11, 0),
        ];
        for other in others {
            assert_ne!(base, other);
        }
    }
}
