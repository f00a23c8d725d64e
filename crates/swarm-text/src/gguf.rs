//! A tokenizer built from GGUF metadata.
//!
//! Two kinds of vocabulary exist in the supported families: `gpt2`, byte-level BPE with its merges in the file and
//! its pre-tokenizer by name, and `llama`, SentencePiece-style BPE with a score per token, from which the merges
//! follow. The result has the same ids as the `tokenizer.json` of the same model.

use std::collections::BTreeSet;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Prepend, Replace, Sequence};
use tokenizers::{AddedToken, NormalizerWrapper};

use crate::TextError;
use crate::error::{quoted, sentence};
use crate::pieces::{Entry, Lead, Pieces, SPACE_MARK, Spelling};
use crate::pre;
use crate::tokenizer::{Parts, SpecialToken, SpecialTokens};

/// What GGUF metadata say about the vocabulary, under the names of the `tokenizer.ggml.*` keys.
#[derive(Debug, Clone, Default)]
pub struct GgufParts {
    /// `tokenizer.ggml.model`: `gpt2` or `llama`.
    pub model: String,
    /// `tokenizer.ggml.pre`: name of the pre-tokenizer; for `gpt2` only.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`: one text per id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`: one per id, or empty; for `llama` only.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`: one per id, or empty. 1 normal, 2 unknown, 3 control, 4 user defined,
    /// 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: `"left right"`, best first; for `gpt2` only.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`. Default for `llama`: 1.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`. Default for `llama`: 2.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`. Default for `llama`: 0.
    pub unk: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`, `eom_token_id` and others that end an answer.
    pub end_ids: Vec<u32>,
    /// `tokenizer.ggml.add_bos_token`. Default: true for `llama`; for `gpt2` true with the pre-tokenizers of Llama 3
    /// and Tekken, else false. These are llama.cpp's defaults.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`. Default: false.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`. Default for `llama`: true; not used for `gpt2`.
    pub add_space_prefix: Option<bool>,
}

const TOKENS_MAX: usize = 1 << 20;
const MERGES_MAX: usize = 1 << 22;
const BYTES_MAX: usize = 64 << 20;
/// Longest token of a `llama` vocabulary: every cut of every token is looked up, which is quadratic.
const SCORED_TOKEN_BYTES_MAX: usize = 512;

mod token_type {
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

/// Builds the tokenizer. Costs one pass over the vocabulary for `gpt2`, one over all cuts of all tokens for `llama`.
pub(crate) fn build(parts: &GgufParts) -> Result<Parts, TextError> {
    check_sizes(parts)?;
    match parts.model.as_str() {
        "gpt2" => build_byte_level(parts),
        "llama" => build_scored(parts),
        other => {
            Err(TextError::Unsupported { part: "vocabulary (tokenizer.ggml.model)", name: quoted(other) })
        }
    }
}

fn check_sizes(parts: &GgufParts) -> Result<(), TextError> {
    let broken = |why: String| Err(TextError::Vocabulary { why });
    let tokens = parts.tokens.len();
    if tokens == 0 || tokens > TOKENS_MAX {
        return broken(format!("{tokens} tokens, expected 1 to {TOKENS_MAX}"));
    }
    if parts.merges.len() > MERGES_MAX {
        return broken(format!("{} merges, at most {MERGES_MAX} are accepted", parts.merges.len()));
    }
    let bytes: usize = parts.tokens.iter().chain(&parts.merges).map(String::len).sum();
    if bytes > BYTES_MAX {
        return Err(TextError::FileTooLarge { what: "the vocabulary", bytes, max: BYTES_MAX });
    }
    if !parts.token_types.is_empty() && parts.token_types.len() != tokens {
        return broken(format!("{} token types for {tokens} tokens", parts.token_types.len()));
    }
    Ok(())
}

fn build_byte_level(parts: &GgufParts) -> Result<Parts, TextError> {
    let pre = pre::by_name(parts.pre.as_deref())?;
    let vocabulary = vocabulary(parts, |_| true);
    let mut merges = Vec::with_capacity(parts.merges.len());
    for merge in &parts.merges {
        // The left side may itself begin with a space in old files, never be empty.
        let cut = merge.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
        let sides = cut.and_then(|at| Some((merge.get(..at)?, merge.get(at + 1..)?)));
        let sides = sides.filter(|(left, right)| !left.is_empty() && !right.is_empty());
        let Some((left, right)) = sides else {
            return Err(TextError::Vocabulary { why: format!("merge {} is not two tokens", quoted(merge)) });
        };
        let known = vocabulary.contains_key(left)
            && vocabulary.contains_key(right)
            && vocabulary.contains_key(format!("{left}{right}").as_str());
        if !known {
            return Err(TextError::Vocabulary {
                why: format!("merge {} is not made of tokens", quoted(merge)),
            });
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    let vocabulary = vocabulary.into_iter().map(|(text, id)| (text.to_owned(), id));
    let model = BPE::builder()
        .vocab_and_merges(vocabulary.collect::<tokenizers::models::bpe::Vocab>(), merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(library)?;
    let mut library_tokenizer = tokenizers::Tokenizer::new(model);
    library_tokenizer.with_normalizer(pre.normalizer).map_err(library)?;
    library_tokenizer.with_pre_tokenizer(Some(pre.pre_tokenizer));
    finish(parts, library_tokenizer, Spelling::ByteLevel, Lead::Keep, pre.add_bos)
}

fn build_scored(parts: &GgufParts) -> Result<Parts, TextError> {
    if parts.scores.len() != parts.tokens.len() {
        let why = format!("{} scores for {} tokens", parts.scores.len(), parts.tokens.len());
        return Err(TextError::Vocabulary { why });
    }
    let merges = merges_from_scores(parts)?;
    let vocabulary = vocabulary(parts, |_| true).into_iter().map(|(text, id)| (text.to_owned(), id));
    let mut model = BPE::builder()
        .vocab_and_merges(vocabulary.collect::<tokenizers::models::bpe::Vocab>(), merges)
        .fuse_unk(true)
        .byte_fallback(true);
    if let Some(unk) = token_text(parts, parts.unk.or(Some(0))) {
        model = model.unk_token(unk.to_owned());
    }
    let mut library_tokenizer = tokenizers::Tokenizer::new(model.build().map_err(library)?);
    let add_space_prefix = parts.add_space_prefix.unwrap_or(true);
    let mark = NormalizerWrapper::Replace(Replace::new(" ", SPACE_MARK).map_err(library)?);
    let normalizer = if add_space_prefix {
        let prepend = NormalizerWrapper::Prepend(Prepend::new(SPACE_MARK.to_owned()));
        NormalizerWrapper::Sequence(Sequence::new(vec![prepend, mark]))
    } else {
        mark
    };
    library_tokenizer.with_normalizer(Some(normalizer)).map_err(library)?;
    let spelling = Spelling::Marked { space_mark: true, byte_fallback: true };
    let lead = if add_space_prefix { Lead::DropSpace } else { Lead::Keep };
    finish(parts, library_tokenizer, spelling, lead, true)
}

type Vocabulary<'a> = std::collections::HashMap<&'a str, u32>;

/// Texts to ids. Of equal texts the last one counts, as it does for both libraries that write such files.
fn vocabulary(parts: &GgufParts, keep: impl Fn(usize) -> bool) -> Vocabulary<'_> {
    let entries = parts.tokens.iter().enumerate().filter(|(id, _)| keep(*id));
    entries.filter_map(|(id, text)| Some((text.as_str(), u32::try_from(id).ok()?))).collect()
}

/// Every way to make a token out of two others, best first.
///
/// SentencePiece merges the pair whose result has the best score. As a merge list that is: all cuts of all tokens,
/// ordered by score, then by the length of the left side, then of the right (both in characters, longest first),
/// then by the order of the vocabulary; the order Hugging Face's converter writes into `tokenizer.json`. Tokens that
/// are never meant to come out of text (control, unknown, unused, byte) are neither results nor sides.
fn merges_from_scores(parts: &GgufParts) -> Result<Vec<(String, String)>, TextError> {
    let mergeable = |id: usize| {
        use token_type::{BYTE, CONTROL, UNKNOWN, UNUSED};
        !parts.token_types.get(id).is_some_and(|kind| [UNKNOWN, CONTROL, UNUSED, BYTE].contains(kind))
    };
    let vocabulary = vocabulary(parts, mergeable);
    struct Merge<'a> {
        left: &'a str,
        right: &'a str,
        score: f32,
        left_chars: usize,
        right_chars: usize,
    }
    let mut merges: Vec<Merge<'_>> = Vec::new();
    for (id, (text, &score)) in parts.tokens.iter().zip(&parts.scores).enumerate() {
        // Of equal texts only the last is in the vocabulary.
        if vocabulary.get(text.as_str()).map(|&last| last as usize) != Some(id) {
            continue;
        }
        if !score.is_finite() {
            return Err(TextError::Vocabulary { why: format!("token {} has score {score}", quoted(text)) });
        }
        if text.len() > SCORED_TOKEN_BYTES_MAX {
            let why =
                format!("token {} has {} bytes, at most {SCORED_TOKEN_BYTES_MAX}", quoted(text), text.len());
            return Err(TextError::Vocabulary { why });
        }
        let chars = text.chars().count();
        let mut cuts = Vec::new();
        for (left_chars, (at, _)) in text.char_indices().enumerate().skip(1) {
            let (Some(left), Some(right)) = (text.get(..at), text.get(at..)) else { continue };
            if let (Some(left_id), Some(right_id)) = (vocabulary.get(left), vocabulary.get(right)) {
                let merge = Merge { left, right, score, left_chars, right_chars: chars - left_chars };
                cuts.push(((*left_id, *right_id), merge));
            }
        }
        cuts.sort_by_key(|(ids, _)| *ids);
        merges.extend(cuts.into_iter().map(|(_, merge)| merge));
        if merges.len() > MERGES_MAX {
            return Err(TextError::Vocabulary {
                why: format!("its tokens allow more than {MERGES_MAX} merges"),
            });
        }
    }
    merges.sort_by(|a, b| {
        let by_score = b.score.total_cmp(&a.score);
        // -0.0 and 0.0 are one score.
        let by_score = if a.score == b.score { std::cmp::Ordering::Equal } else { by_score };
        by_score.then(b.left_chars.cmp(&a.left_chars)).then(b.right_chars.cmp(&a.right_chars))
    });
    Ok(merges.into_iter().map(|merge| (merge.left.to_owned(), merge.right.to_owned())).collect())
}

fn finish(
    parts: &GgufParts,
    mut library_tokenizer: tokenizers::Tokenizer,
    spelling: Spelling,
    lead: Lead,
    add_bos: bool,
) -> Result<Parts, TextError> {
    let special = special_tokens(parts)?;
    let named: BTreeSet<u32> =
        [&special.bos, &special.eos, &special.unk].into_iter().flatten().map(|token| token.id).collect();
    let mut added = Vec::new();
    let mut entries = Vec::with_capacity(parts.tokens.len());
    for (id, text) in (0u32..).zip(&parts.tokens) {
        let kind = parts.token_types.get(id as usize).copied();
        let is_special = match kind {
            Some(kind) => kind == token_type::CONTROL || kind == token_type::UNKNOWN,
            None => named.contains(&id), // a file without types
        };
        let is_added = is_special || kind == Some(token_type::USER_DEFINED);
        if is_added && !text.is_empty() {
            added.push(AddedToken::from(text.as_str(), is_special).normalized(false));
        }
        entries.push(Entry { id, text, added: is_added, special: is_special });
    }
    library_tokenizer.add_tokens(added).map_err(library)?;
    let pieces = Pieces::build(entries, spelling, lead)?;
    let ends = |wanted: bool, token: &Option<SpecialToken>, name: &str| match (wanted, token) {
        (false, _) => Ok(Vec::new()),
        (true, Some(token)) => Ok(vec![token.id]),
        (true, None) => {
            Err(TextError::Vocabulary { why: format!("it wants a {name} token added and names none") })
        }
    };
    let prefix = ends(parts.add_bos.unwrap_or(add_bos), &special.bos, "bos")?;
    let suffix = ends(parts.add_eos.unwrap_or(false), &special.eos, "eos")?;
    let end_ids = parts.end_ids.clone();
    Ok(Parts { library: library_tokenizer, pieces, special, prefix, suffix, end_ids })
}

fn special_tokens(parts: &GgufParts) -> Result<SpecialTokens, TextError> {
    let scored = parts.model == "llama";
    let token = |id: Option<u32>, default: u32| -> Result<Option<SpecialToken>, TextError> {
        let known = |id| token_text(parts, Some(id)).map(|text| SpecialToken { id, text: text.to_owned() });
        match id {
            Some(id) => known(id).map(Some).ok_or_else(|| TextError::Vocabulary {
                why: format!("it names special token {id} among {} tokens", parts.tokens.len()),
            }),
            None => Ok(scored.then(|| known(default)).flatten()),
        }
    };
    Ok(SpecialTokens {
        bos: token(parts.bos, 1)?,
        eos: token(parts.eos, 2)?,
        unk: token(parts.unk, 0)?,
        // Some files name a padding id that is not there; nothing here pads.
        pad: token(parts.pad.filter(|&id| token_text(parts, Some(id)).is_some()), u32::MAX)?,
    })
}

fn token_text(parts: &GgufParts, id: Option<u32>) -> Option<&str> {
    parts.tokens.get(id? as usize).map(String::as_str)
}

fn library(error: tokenizers::Error) -> TextError {
    TextError::Library { what: "build from the vocabulary", why: sentence(&error.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_are_those_of_hugging_faces_converter() {
        let fixture: serde_json::Value =
            serde_json::from_str(include_str!("../tests/fixtures/llama.json")).expect("the fixture is JSON");
        let list = |key: &str| fixture["gguf"][key].as_array().expect("a list").clone();
        let parts = GgufParts {
            model: "llama".to_owned(),
            tokens: list("tokens").iter().map(|v| v.as_str().expect("text").to_owned()).collect(),
            scores: list("scores").iter().map(|v| v.as_f64().expect("a number") as f32).collect(),
            token_types: list("token_types").iter().map(|v| v.as_i64().expect("a number") as i32).collect(),
            ..GgufParts::default()
        };
        let want: Vec<(String, String)> = serde_json::from_value(fixture["merges"].clone()).expect("pairs");
        assert!(want.len() > 100);
        assert_eq!(merges_from_scores(&parts).expect("sound"), want);
    }
}
