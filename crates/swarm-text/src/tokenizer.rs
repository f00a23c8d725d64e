//! The tokenizer: text to ids and back.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::bounded::{STACK_BYTES, bounded};
use crate::detokenizer::decode_all;
use crate::encoder::{Encoder, Literal};
use crate::pieces::Pieces;
use crate::{GgufParts, HfParts, TEXT_BYTES_MAX, TextError, gguf, hf};

/// The largest vocabularies load in about a second; a slow, busy computer gets thirty times that.
const LOAD_LIMIT: Duration = Duration::from_secs(30);
/// The longest text takes a few seconds at the library's usual 3 MB/s.
const ENCODE_LIMIT: Duration = Duration::from_secs(30);

/// Tokens that end an answer whatever the configuration says, if they are special tokens of the vocabulary.
const END_OF_TURN: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<end_of_turn>",
];

/// How to encode one text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Add what the model's files ask for around a text: usually a beginning-of-sequence token, or nothing.
    pub add_special: bool,
    /// Recognise special tokens written in the text (`<|im_end|>`, `</s>`). Off for text that a stranger wrote: then
    /// it stays ordinary characters. Added tokens that are not special are recognised in any case.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// A whole prompt, written by someone who means its special tokens.
    pub const PROMPT: EncodeOptions = EncodeOptions { add_special: true, parse_special: true };
    /// A piece of text and nothing else.
    pub const TEXT: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };
}

/// A special token by id and text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    pub id: u32,
    pub text: String,
}

/// The special tokens that files name by role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    pub bos: Option<SpecialToken>,
    pub eos: Option<SpecialToken>,
    pub unk: Option<SpecialToken>,
    pub pad: Option<SpecialToken>,
}

/// What a file format's loader hands over.
pub(crate) struct Parts {
    pub library: tokenizers::Tokenizer,
    pub pieces: Pieces,
    pub special: SpecialTokens,
    /// Ids added before and after a text on request.
    pub prefix: Vec<u32>,
    pub suffix: Vec<u32>,
    pub end_ids: Vec<u32>,
}

/// A model's tokenizer. Cloning is cheap; all methods may be called from any thread.
///
/// Decoding never fails and never panics. Encoding runs the model's own rules (regexes from its files), so it does
/// so on a thread of its own with a deadline of 30 s; a tokenizer that misses it once refuses all further texts.
#[derive(Clone)]
pub struct Tokenizer {
    core: Arc<Core>,
}

struct Core {
    encoder: Encoder,
    pieces: Arc<Pieces>,
    special: SpecialTokens,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    end_of_turn: BTreeSet<u32>,
    stuck: AtomicBool,
}

impl Tokenizer {
    /// From the files of a Hugging Face folder. Costs about a second for the largest vocabularies.
    ///
    /// # Errors
    /// A file that is too large, is not JSON, uses a part this build does not know, contradicts itself, crashes the
    /// library, or does not load within 30 s.
    pub fn from_hf(parts: HfParts) -> Result<Tokenizer, TextError> {
        Self::load(move || hf::build(&parts))
    }

    /// From the bytes of `tokenizer.json` and, for the names of special tokens, `tokenizer_config.json`.
    ///
    /// # Errors
    /// As [`Tokenizer::from_hf`].
    pub fn from_hf_json(
        tokenizer_json: &[u8],
        tokenizer_config: Option<&[u8]>,
    ) -> Result<Tokenizer, TextError> {
        Self::from_hf(HfParts {
            tokenizer_json: tokenizer_json.to_vec(),
            tokenizer_config: tokenizer_config.map(<[u8]>::to_vec),
            ..HfParts::default()
        })
    }

    /// From GGUF metadata. Costs about as much as the same model's `tokenizer.json`.
    ///
    /// # Errors
    /// An unknown vocabulary kind or pre-tokenizer (named), a vocabulary that contradicts itself, or one that does
    /// not load within 30 s.
    pub fn from_gguf(parts: GgufParts) -> Result<Tokenizer, TextError> {
        Self::load(move || gguf::build(&parts))
    }

    fn load(
        build: impl FnOnce() -> Result<Parts, TextError> + Send + 'static,
    ) -> Result<Tokenizer, TextError> {
        let core =
            bounded("load the tokenizer", STACK_BYTES, LOAD_LIMIT, move || build().and_then(Core::new))??;
        Ok(Tokenizer { core: Arc::new(core) })
    }

    /// Ids of `text`.
    ///
    /// # Errors
    /// [`TextError::TextTooLong`] beyond 4 MiB; otherwise the fault of the model's files: their rules crashed, hung,
    /// or met a character they have no token for and no unknown token to stand in.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TextError> {
        let literal = if options.parse_special { Literal::Nowhere } else { Literal::Everywhere };
        let ids = self.encode_literal(text, literal)?;
        if !options.add_special {
            return Ok(ids);
        }
        Ok([self.core.prefix.as_slice(), &ids, &self.core.suffix].concat())
    }

    /// As [`encode`](Self::encode) without adding anything, and with control over where special tokens count.
    pub(crate) fn encode_literal(&self, text: &str, literal: Literal) -> Result<Vec<u32>, TextError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(TextError::TextTooLong { bytes: text.len(), max: TEXT_BYTES_MAX });
        }
        if self.core.stuck.load(Ordering::Relaxed) {
            return Err(TextError::Stuck);
        }
        let (core, text) = (Arc::clone(&self.core), text.to_owned());
        let encoded =
            bounded("encode a text", STACK_BYTES, ENCODE_LIMIT, move || core.encoder.encode(&text, &literal));
        if matches!(encoded, Err(TextError::TimedOut { .. })) {
            self.core.stuck.store(true, Ordering::Relaxed);
        }
        encoded?
    }

    /// Text of `ids`. With `skip_special`, special tokens leave none; ids outside the vocabulary never do. Bytes that
    /// are not UTF-8 become U+FFFD, as in [`String::from_utf8_lossy`].
    ///
    /// The space that encoding puts in front of a text (`llama` vocabularies) is taken away again. Nothing else is
    /// cleaned up: `clean_up_tokenization_spaces` in a model's files is not followed.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        decode_all(&self.core.pieces, ids, skip_special)
    }

    /// The bytes that a token stands for inside a text; `None` for an id outside the vocabulary. They need not be
    /// whole characters.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.core.pieces.bytes_of(id)
    }

    /// Whether `id` is a special token: it stands for no text of its own.
    pub fn is_special(&self, id: u32) -> bool {
        self.core.pieces.is_special(id)
    }

    /// One more than the largest id. The model's own `vocab_size` may be larger: embeddings are often padded.
    pub fn vocab_size(&self) -> usize {
        self.core.pieces.len()
    }

    /// The beginning-of-sequence token, if the model has one (whether or not it is added by default).
    pub fn bos(&self) -> Option<u32> {
        self.core.special.bos.as_ref().map(|token| token.id)
    }

    /// The special tokens that the model's files name.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.core.special
    }

    /// Every id that ends an answer: those the model's files name, and the well-known ones (`<|im_end|>`,
    /// `<|eot_id|>`, `</s>`, ...) that are special tokens of this vocabulary.
    pub fn end_of_turn(&self) -> &BTreeSet<u32> {
        &self.core.end_of_turn
    }

    /// What [`EncodeOptions::add_special`] puts before a text.
    pub(crate) fn prefix(&self) -> &[u32] {
        &self.core.prefix
    }

    pub(crate) fn special_texts(&self) -> impl Iterator<Item = &str> {
        self.core.encoder.special_texts()
    }

    pub(crate) fn pieces(&self) -> Arc<Pieces> {
        Arc::clone(&self.core.pieces)
    }
}

impl Core {
    fn new(parts: Parts) -> Result<Core, TextError> {
        let Parts { library, pieces, special, prefix, suffix, end_ids } = parts;
        let known = END_OF_TURN
            .iter()
            .filter_map(|text| library.token_to_id(text))
            .filter(|&id| pieces.is_special(id));
        let end_of_turn =
            end_ids.into_iter().chain(special.eos.as_ref().map(|token| token.id)).chain(known).collect();
        let encoder = Encoder::new(library)?;
        let (pieces, stuck) = (Arc::new(pieces), AtomicBool::new(false));
        Ok(Core { encoder, pieces, special, prefix, suffix, end_of_turn, stuck })
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("special", &self.core.special)
            .field("end_of_turn", &self.core.end_of_turn)
            .finish_non_exhaustive()
    }
}
