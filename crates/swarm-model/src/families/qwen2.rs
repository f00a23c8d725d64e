//! Qwen2 and Qwen2.5: the Llama layer, with biases on the query, key and value projections.
//!
//! Qwen2, arXiv:2407.10671 section 2.2; Qwen2.5, arXiv:2412.15115 section 2. A model may attend through
//! a sliding window from some layer on (`use_sliding_window`, `max_window_layers`).

use super::{Part, Parts};

pub(super) const PARTS: Parts = Parts {
    qkv_bias: Part::Always,
    o_proj_bias: Part::Never,
    mlp_bias: Part::Never,
    qk_norm: Part::Never,
    sliding_window: Part::Maybe,
};
