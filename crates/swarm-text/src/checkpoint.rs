//! From an opened model to its tokenizer and chat template.

use swarm_weights::{Checkpoint, GgufVocab, TokenizerFiles};

use crate::{ChatTemplate, GgufParts, HfParts, TextError, Tokenizer};

impl Tokenizer {
    /// The tokenizer of an opened model, from whichever files it has.
    ///
    /// # Errors
    /// [`TextError::Missing`] when the model has none; else as [`Tokenizer::from_hf`] and [`Tokenizer::from_gguf`].
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Tokenizer, TextError> {
        match checkpoint.tokenizer() {
            TokenizerFiles::Hf { tokenizer_json, tokenizer_config, special_tokens_map, .. } => {
                Tokenizer::from_hf(HfParts {
                    tokenizer_json: tokenizer_json.clone(),
                    tokenizer_config: tokenizer_config.clone(),
                    special_tokens_map: special_tokens_map.clone(),
                    eos_ids: checkpoint.eos_token_ids(),
                })
            }
            TokenizerFiles::Gguf(vocab) => {
                let mut parts = GgufParts::from(&**vocab);
                parts.end_ids.extend(checkpoint.eos_token_ids());
                Tokenizer::from_gguf(parts)
            }
            TokenizerFiles::Missing { why } => Err(TextError::Missing { why: why.clone() }),
        }
    }
}

impl ChatTemplate {
    /// The chat template of an opened model; `None` when it has none (a base model). A template in a file of its own
    /// counts before one in `tokenizer_config.json`.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`] and [`ChatTemplate::from_config`].
    pub fn from_checkpoint(
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
    ) -> Result<Option<ChatTemplate>, TextError> {
        let special = tokenizer.special_tokens();
        match checkpoint.tokenizer() {
            TokenizerFiles::Hf { chat_template: Some(source), .. } => {
                ChatTemplate::new(source, special).map(Some)
            }
            TokenizerFiles::Hf { tokenizer_config: Some(config), .. } => {
                ChatTemplate::from_config(config, special)
            }
            TokenizerFiles::Gguf(vocab) => {
                vocab.chat_template.as_deref().map(|source| ChatTemplate::new(source, special)).transpose()
            }
            TokenizerFiles::Hf { .. } | TokenizerFiles::Missing { .. } => Ok(None),
        }
    }
}

impl From<&GgufVocab> for GgufParts {
    fn from(vocab: &GgufVocab) -> GgufParts {
        GgufParts {
            model: vocab.model.clone(),
            pre: vocab.pre.clone(),
            tokens: vocab.tokens.clone(),
            scores: vocab.scores.clone(),
            token_types: vocab.token_types.clone(),
            merges: vocab.merges.clone(),
            bos: vocab.bos,
            eos: vocab.eos,
            unk: vocab.unk,
            pad: vocab.pad,
            end_ids: [vocab.eot, vocab.eom].into_iter().flatten().collect(),
            add_bos: vocab.add_bos,
            add_eos: vocab.add_eos,
            add_space_prefix: vocab.add_space_prefix,
        }
    }
}
