//! The vocabulary a GGUF file carries. Only read out here; `swarm-text` builds a tokenizer of it.

use super::{GgufError, GgufHeader};

/// Four times the largest published vocabulary.
const TOKENS_MAX: u64 = 1 << 20;
const MERGES_MAX: u64 = 1 << 21;

/// Tokens and their rules as GGUF stores them under `tokenizer.ggml.`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocab {
    /// Kind of tokenizer: `gpt2` is byte-level BPE, `llama` is SentencePiece.
    pub model: String,
    /// Name of the pre-tokenizer's regular expressions, for byte-level BPE.
    pub pre: Option<String>,
    pub tokens: Vec<String>,
    /// One per token, or empty.
    pub scores: Vec<f32>,
    /// One per token, or empty. 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// `left right`, in order of rank.
    pub merges: Vec<String>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub eot: Option<u32>,
    pub eom: Option<u32>,
    pub unk: Option<u32>,
    pub pad: Option<u32>,
    pub sep: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    pub remove_extra_whitespaces: Option<bool>,
    pub chat_template: Option<String>,
    /// `tokenizer.huggingface.json`: a whole `tokenizer.json`, in few files.
    pub huggingface_json: Option<String>,
}

impl GgufVocab {
    /// `None` when the file has no token list.
    ///
    /// # Errors
    /// [`GgufError`] when a part has the wrong type or length, or a token is not UTF-8.
    pub(crate) fn read(header: &GgufHeader) -> Result<Option<Self>, GgufError> {
        let Some(tokens) = header.strings("tokenizer.ggml.tokens", TOKENS_MAX)? else {
            return Ok(None);
        };
        let owned = |key: &str| header.string(key).map(|text| text.map(str::to_owned));
        let vocab = Self {
            model: owned("tokenizer.ggml.model")?.unwrap_or_default(),
            pre: owned("tokenizer.ggml.pre")?,
            scores: header.f32s("tokenizer.ggml.scores")?.unwrap_or_default(),
            token_types: header.i32s("tokenizer.ggml.token_type")?.unwrap_or_default(),
            merges: header.strings("tokenizer.ggml.merges", MERGES_MAX)?.unwrap_or_default(),
            bos: token_id(header, "bos_token_id")?,
            eos: token_id(header, "eos_token_id")?,
            eot: token_id(header, "eot_token_id")?,
            eom: token_id(header, "eom_token_id")?,
            unk: token_id(header, "unknown_token_id")?,
            pad: token_id(header, "padding_token_id")?,
            sep: token_id(header, "seperator_token_id")?, // the format's own spelling
            add_bos: header.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: header.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: header.bool("tokenizer.ggml.add_space_prefix")?,
            remove_extra_whitespaces: header.bool("tokenizer.ggml.remove_extra_whitespaces")?,
            chat_template: owned("tokenizer.chat_template")?,
            huggingface_json: owned("tokenizer.huggingface.json")?,
            tokens,
        };
        for (key, len) in [
            ("tokenizer.ggml.scores", vocab.scores.len()),
            ("tokenizer.ggml.token_type", vocab.token_types.len()),
        ] {
            if len != 0 && len != vocab.tokens.len() {
                let max = vocab.tokens.len() as u64;
                return Err(GgufError::ArrayLen { key: key.into(), count: len as u64, max });
            }
        }
        Ok(Some(vocab))
    }
}

/// A token id under `tokenizer.ggml.`. All ones is some writers' "none".
pub(super) fn token_id(header: &GgufHeader, key: &str) -> Result<Option<u32>, GgufError> {
    let key = format!("tokenizer.ggml.{key}");
    match header.unsigned(&key)? {
        None => Ok(None),
        Some(id) => match u32::try_from(id) {
            Ok(u32::MAX) => Ok(None),
            Ok(id) => Ok(Some(id)),
            Err(_) => Err(GgufError::Type { key, want: "a token id", got: "beyond 32 bits" }),
        },
    }
}
