//! The files of a Hugging Face folder other than the weights: `config.json`, the index of a sharded
//! checkpoint, the tokenizer's files.

mod config;
mod files;
mod json;
mod rope;

pub(crate) use config::{config_from, token_ids};
pub(crate) use files::{read_index, read_optional, read_tokenizer};
pub(crate) use json::Object;

/// `config.json` and its like are kilobytes.
pub(crate) const CONFIG_BYTES_MAX: u64 = 4 << 20;
