//! What a checkpoint says about its tokenizer, unparsed: `swarm-text` reads it.

pub use crate::gguf::GgufVocab;

/// The tokenizer's raw material.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenizerFiles {
    /// The files of a Hugging Face folder, as they are.
    Hf {
        tokenizer_json: Vec<u8>,
        tokenizer_config: Option<Vec<u8>>,
        /// From `chat_template.jinja` or `chat_template.json`. `None` when the template, if any, is in
        /// `tokenizer_config`.
        chat_template: Option<String>,
        special_tokens_map: Option<Vec<u8>>,
        generation_config: Option<Vec<u8>>,
    },
    Gguf(Box<GgufVocab>),
    /// There is none. `why` says what was looked for, and where.
    Missing {
        why: String,
    },
}
