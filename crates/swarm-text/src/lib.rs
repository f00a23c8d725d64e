//! Text in, token ids out, and back: tokenizer, chat template, incremental detokenizer, stop strings.
//!
//! This room distrusts the files it reads. A tokenizer or a chat template is a small program written by a
//! stranger: both run behind size caps, on a thread of their own with a deadline, with panics contained, and a
//! template additionally under fuel. Nothing here touches a tensor, a socket or a file.
//!
//! # What a chat does with special tokens
//!
//! [`ChatTemplate::encode`] renders the messages and encodes the prompt so that the markers **the template wrote**
//! (`<|im_start|>`, `</s>`, ...) become special tokens, while the same characters **inside a message** stay
//! ordinary text: a user who types `<|im_end|>` does not end his turn. [`ChatTemplate::render`] gives the plain
//! string; whoever encodes that string with [`EncodeOptions::PROMPT`] also turns special tokens typed by users
//! into special tokens, as other engines do.
//!
//! A beginning-of-sequence token is added once: by the template if it writes one, else by the tokenizer if the
//! model's files ask for it.

#![forbid(unsafe_code)]

mod bounded;
mod chat;
mod checkpoint;
mod detokenizer;
mod encoder;
mod error;
mod gguf;
mod hf;
mod pieces;
mod pre;
mod stop;
mod template;
mod tokenizer;

pub use chat::Message;
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use gguf::GgufParts;
pub use hf::HfParts;
pub use stop::StopStrings;
pub use template::{ChatTemplate, RenderOptions};
pub use tokenizer::{EncodeOptions, SpecialToken, SpecialTokens, Tokenizer};

/// Longest text that is encoded, and longest prompt a template may render: 4 MiB, about a million tokens.
pub const TEXT_BYTES_MAX: usize = 4 << 20;
