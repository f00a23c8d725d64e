//! The files of a Hugging Face folder other than the weights: `config.json`, the index of a sharded
//! checkpoint, the tokenizer's files.

mod config;
mod files;
mod json;
mod rope;
#[cfg(test)]
mod tests;

pub(crate) use config::{config_from, token_ids};
pub(crate) use files::{read_index, read_optional, read_tokenizer};
pub(crate) use json::Object;

/// `config.json` is kilobytes. Parsed JSON can take some 30 times its text, hence the tighter limit.
pub(crate) const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Files that are kept as they are: the largest published `tokenizer_config.json` has 1.2 MB.
const SMALL_BYTES_MAX: u64 = 8 << 20;
