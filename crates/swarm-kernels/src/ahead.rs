//! How far before they are read memory is asked for weights.

use std::sync::LazyLock;

/// What memory has on its way to one core, in bytes.
pub(crate) const AHEAD: usize = 8192;

/// The CPU reads a stream at memory's speed by itself.
static FAR_SIGHTED: LazyLock<bool> = LazyLock::new(|| {
    // Every AMD core has this, and no other.
    #[cfg(target_arch = "x86_64")]
    let amd = std::is_x86_feature_detected!("sse4a");
    #[cfg(not(target_arch = "x86_64"))]
    let amd = false;
    amd
});

/// In bytes, for weights that so many tokens meet; nothing where the CPU looks ahead better by itself.
///
/// Weights are one stream, which any CPU follows. Where it does that far enough, lines that are asked for take the places of
/// those: on Zen 4 one token is 1.1 to 1.4 times as fast without. With more tokens arithmetic takes as long as memory, the
/// CPU looks ahead less far, and asking pays. A core of a Xeon (Sapphire Rapids) reads 1.4 to 1.7 times as fast with it.
pub(crate) fn ahead(tokens: usize) -> Option<usize> {
    (tokens > 2 || !*FAR_SIGHTED).then_some(AHEAD)
}
