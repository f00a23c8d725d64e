//! Mistral: the Llama layer, with a sliding window in every layer of the first release.
//!
//! Mistral 7B, arXiv:2310.06825 section 2: position `i` attends to `i - window + 1 ..= i`. Later
//! releases set no window. There are no biases.

use super::{Part, Parts};

pub(super) const PARTS: Parts = Parts {
    qkv_bias: Part::Never,
    o_proj_bias: Part::Never,
    mlp_bias: Part::Never,
    qk_norm: Part::Never,
    sliding_window: Part::Maybe,
};
