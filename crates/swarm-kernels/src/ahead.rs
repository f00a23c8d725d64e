//! How far before they are read memory is asked for weights.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// What memory has on its way to one core, in bytes.
const AHEAD: usize = 8192;

/// In bytes, for weights that so many tokens meet; nothing where the CPU looks ahead better by itself.
///
/// Weights are one stream, which any CPU follows. Where it does that far enough, lines that are asked for take the places of
/// those: on Zen 4 one token is 1.1 to 1.4 times as fast without. With more tokens arithmetic takes as long as memory, the
/// CPU looks ahead less far, and asking pays. One token is 1.1 to 1.4 times as fast with it on Zen 3, and on a core of a Xeon
/// (Sapphire Rapids) 1.4 to 2 times.
pub(crate) fn ahead(tokens: usize) -> Option<usize> {
    // Every AMD core has the first, and no other; the second came with Zen 4.
    #[cfg(target_arch = "x86_64")]
    let looks_far = std::is_x86_feature_detected!("sse4a") && std::is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    let looks_far = true;
    (tokens > 2 || !looks_far).then_some(AHEAD)
}

/// Asks memory for weights, block by block, while those before them are computed.
#[cfg(any(test, target_arch = "x86_64"))]
pub(crate) struct Asking {
    next: Option<*const u8>,
    block: usize,
}

#[cfg(any(test, target_arch = "x86_64"))]
impl Asking {
    /// For the blocks of `block` bytes from `start` on, which so many tokens meet.
    pub fn new(start: *const u8, block: usize, tokens: usize) -> Self {
        Self { next: ahead(tokens).map(|distance| start.wrapping_add(distance)), block }
    }

    /// Asks for the lines of one more block. Weights follow each other, so that may be one of other rows.
    #[inline(always)]
    pub fn block(&mut self) {
        let Some(next) = &mut self.next else { return };
        #[cfg(target_arch = "x86_64")]
        for line in (0..self.block).step_by(64) {
            // SAFETY: every CPU of this target has the instruction; it never faults, also beyond the end of the weights.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(line).cast()) };
        }
        *next = next.wrapping_add(self.block);
    }
}
