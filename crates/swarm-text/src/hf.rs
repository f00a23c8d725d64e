//! A tokenizer from Hugging Face's `tokenizer.json`.
//!
//! The file is a small program: regexes, replacements, merge tables. Before the library sees it, its parts are held
//! against a list of those that the supported families use; a part that is not on the list is an error that names
//! it. That keeps out what could explode (a replacement of one character by a megabyte), what would make ids random
//! (BPE dropout), and what [`crate::Detokenizer`] could not undo exactly.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use crate::TextError;
use crate::error::{quoted, sentence};
use crate::pieces::{Entry, Lead, Pieces, SPACE_MARK, Spelling};
use crate::tokenizer::{Parts, SpecialToken, SpecialTokens};

/// The files of a Hugging Face folder that concern the tokenizer, as bytes.
#[derive(Debug, Clone, Default)]
pub struct HfParts {
    /// `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// `tokenizer_config.json`: names the special tokens.
    pub tokenizer_config: Option<Vec<u8>>,
    /// `special_tokens_map.json`: names those that `tokenizer_config.json` does not.
    pub special_tokens_map: Option<Vec<u8>>,
    /// End-of-sequence ids from `generation_config.json` and `config.json`.
    pub eos_ids: Vec<u32>,
}

/// The largest in use have about 35 MB.
const TOKENIZER_JSON_BYTES_MAX: usize = 64 << 20;
pub(crate) const CONFIG_BYTES_MAX: usize = 4 << 20;
const ADDED_TOKENS_MAX: usize = 1 << 16;
/// Parts of one kind, nested ones counted.
const STEPS_MAX: usize = 32;
const REGEX_BYTES_MAX: usize = 8 << 10;
/// Longest text that a normalizer may put in the place of another, in bytes.
const REPLACEMENT_BYTES_MAX: usize = 16;
/// How many times longer all normalizers together may make a text.
const GROWTH_MAX: usize = 32;
/// Tokens that may be added around a text.
const AROUND_MAX: usize = 8;

const NORMALIZERS: &[&str] =
    &["Sequence", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents"];
const PRE_TOKENIZERS: &[&str] = &[
    "Sequence",
    "Split",
    "ByteLevel",
    "Digits",
    "Metaspace",
    "Punctuation",
    "Whitespace",
    "WhitespaceSplit",
];
const POST_PROCESSORS: &[&str] = &["Sequence", "ByteLevel", "TemplateProcessing"];

#[derive(Deserialize)]
struct Header {
    #[serde(default)]
    added_tokens: Vec<AddedHeader>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: ModelHeader,
}

#[derive(Deserialize)]
struct AddedHeader {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct ModelHeader {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    merges: Option<IgnoredAny>,
}

/// Checks and loads. Runs foreign rules: call it inside [`crate::bounded::bounded`].
pub(crate) fn build(parts: &HfParts) -> Result<Parts, TextError> {
    let json = parts.tokenizer_json.as_slice();
    cap("tokenizer.json", json, TOKENIZER_JSON_BYTES_MAX)?;
    let header: Header =
        serde_json::from_slice(json).map_err(|source| TextError::Json { what: "tokenizer.json", source })?;
    let (spelling, lead) = check(&header)?;
    let mut library = tokenizers::Tokenizer::from_bytes(json).map_err(|error| library("load", &error))?;
    library.with_truncation(None).map_err(|error| self::library("load", &error))?;
    library.with_padding(None);
    for added in &header.added_tokens {
        // The library numbers added tokens itself and only warns when the file says otherwise.
        let got = library.token_to_id(&added.content);
        if got != Some(added.id) && !added.content.is_empty() {
            let why = format!(
                "added token {} has id {} in the file, {got:?} in effect",
                quoted(&added.content),
                added.id
            );
            return Err(TextError::Vocabulary { why });
        }
    }
    let pieces = pieces(&library, spelling, lead)?;
    let (prefix, suffix) = added_around(&library)?;
    let special = special_tokens(parts, &library, &prefix)?;
    Ok(Parts { library, pieces, special, prefix, suffix, end_ids: parts.eos_ids.clone() })
}

pub(crate) fn cap(what: &'static str, bytes: &[u8], max: usize) -> Result<(), TextError> {
    if bytes.len() > max {
        return Err(TextError::FileTooLarge { what, bytes: bytes.len(), max });
    }
    Ok(())
}

fn library(what: &'static str, error: &tokenizers::Error) -> TextError {
    TextError::Library { what, why: sentence(&error.to_string()) }
}

fn unsupported<T>(part: &'static str, name: &str) -> Result<T, TextError> {
    Err(TextError::Unsupported { part, name: quoted(name) })
}

fn check(header: &Header) -> Result<(Spelling, Lead), TextError> {
    // Old files leave the type out; only BPE has merges.
    let model = &header.model;
    match model.kind.as_deref() {
        Some("BPE") => {}
        None if model.merges.is_some() => {}
        other => return unsupported("model", other.unwrap_or("(no type)")),
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return unsupported("model option", "dropout");
    }
    for affix in [&model.continuing_subword_prefix, &model.end_of_word_suffix] {
        if let Some(affix) = affix.as_deref().filter(|affix| !affix.is_empty()) {
            return unsupported("subword affix", affix);
        }
    }
    if header.added_tokens.len() > ADDED_TOKENS_MAX {
        let why =
            format!("{} added tokens, at most {ADDED_TOKENS_MAX} are accepted", header.added_tokens.len());
        return Err(TextError::Vocabulary { why });
    }
    check_growth(&steps("normalizer", &header.normalizer, "normalizers", NORMALIZERS)?)?;
    for step in steps("pre-tokenizer", &header.pre_tokenizer, "pretokenizers", PRE_TOKENIZERS)? {
        check_regex("pre-tokenizer", step)?;
    }
    steps("post-processor", &header.post_processor, "processors", POST_PROCESSORS)?;
    decoding(&header.decoder)
}

type Step<'a> = &'a Map<String, Value>;

/// The leaves of a part that may be a `Sequence` of others, each held against the list of known types.
fn steps<'a>(
    part: &'static str,
    root: &'a Value,
    children: &str,
    known: &[&str],
) -> Result<Vec<Step<'a>>, TextError> {
    let mut leaves = Vec::new();
    let mut open: Vec<&Value> = if root.is_null() { Vec::new() } else { vec![root] };
    while let Some(value) = open.pop() {
        let kind = kind_of(value);
        let Some(step) = value.as_object().filter(|_| known.contains(&kind)) else {
            return unsupported(part, kind);
        };
        if kind == "Sequence" {
            let Some(inner) = step.get(children).and_then(Value::as_array) else {
                return unsupported(part, "Sequence without parts");
            };
            open.extend(inner.iter().rev()); // so that leaves come in order
        } else {
            leaves.push(step);
        }
        if leaves.len() + open.len() > STEPS_MAX {
            return unsupported(part, "Sequence of too many parts");
        }
    }
    Ok(leaves)
}

fn kind_of(value: &Value) -> &str {
    value.get("type").and_then(Value::as_str).unwrap_or("(no type)")
}

fn text_of<'a>(step: Step<'a>, key: &str) -> &'a str {
    step.get(key).and_then(Value::as_str).unwrap_or("")
}

/// Bounds how much longer normalizing can make a text.
fn check_growth(steps: &[Step<'_>]) -> Result<(), TextError> {
    let mut growth = 1usize;
    for &step in steps {
        check_regex("normalizer", step)?;
        let added = text_of(step, "content").len().max(text_of(step, "prepend").len());
        if added > REPLACEMENT_BYTES_MAX {
            return unsupported("normalizer", &format!("replacement of {added} bytes"));
        }
        if text_of(step, "type") == "Replace" {
            let replaced =
                step.get("pattern").and_then(|pattern| pattern.get("String")).and_then(Value::as_str);
            growth = growth.saturating_mul(match replaced.map(str::len) {
                Some(0) => return unsupported("normalizer", "Replace of nothing"),
                Some(len) => added.div_ceil(len).max(1),
                None => added + 1, // a regex may match between any two characters
            });
        }
    }
    if growth > GROWTH_MAX {
        return unsupported("normalizer", &format!("sequence that lengthens text {growth} times"));
    }
    Ok(())
}

fn check_regex(part: &'static str, step: Step<'_>) -> Result<(), TextError> {
    let regex =
        step.get("pattern").and_then(|pattern| pattern.get("Regex")).and_then(Value::as_str).unwrap_or("");
    if regex.len() > REGEX_BYTES_MAX {
        return unsupported(part, &format!("regex of {} bytes", regex.len()));
    }
    Ok(())
}

/// How ids become text again. Only decoders that [`Pieces`] can express token by token are accepted.
fn decoding(decoder: &Value) -> Result<(Spelling, Lead), TextError> {
    const KNOWN: &[&str] =
        &["Sequence", "ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"];
    let steps = steps("decoder", decoder, "decoders", KNOWN)?;
    if let [only] = steps.as_slice() {
        match text_of(only, "type") {
            "ByteLevel" => return Ok((Spelling::ByteLevel, Lead::Keep)),
            "Metaspace" => return metaspace(only),
            _ => {}
        }
    }
    let (mut space_mark, mut byte_fallback, mut fused, mut lead) = (false, false, false, Lead::Keep);
    for step in steps {
        match text_of(step, "type") {
            "Replace" => {
                let replaced = step.get("pattern").and_then(|p| p.get("String")).and_then(Value::as_str);
                if replaced != Some(SPACE_MARK) || text_of(step, "content") != " " {
                    return unsupported("decoder", "Replace other than of the space mark");
                }
                space_mark = true;
            }
            "ByteFallback" => byte_fallback = true,
            "Fuse" => fused = true,
            "Strip" => {
                let count = |key: &str| step.get(key).and_then(Value::as_u64);
                let one_space = text_of(step, "content") == " " && count("stop") == Some(0);
                match count("start") {
                    Some(0) if one_space => {}
                    Some(1) if one_space && fused => lead = Lead::DropSpace,
                    _ => return unsupported("decoder", "Strip other than of one leading space"),
                }
            }
            other => return unsupported("decoder", &format!("{other} in a sequence")),
        }
    }
    if !fused {
        return unsupported("decoder", if decoder.is_null() { "(none)" } else { "Sequence without Fuse" });
    }
    Ok((Spelling::Marked { space_mark, byte_fallback }, lead))
}

fn metaspace(step: Step<'_>) -> Result<(Spelling, Lead), TextError> {
    if text_of(step, "replacement") != SPACE_MARK {
        return unsupported("decoder", "Metaspace with another mark");
    }
    // Old files say add_prefix_space, new ones prepend_scheme; both default to "there is one".
    let never = text_of(step, "prepend_scheme") == "never";
    let none = step.get("add_prefix_space").and_then(Value::as_bool) == Some(false);
    let lead = if never || none { Lead::Keep } else { Lead::DropFirstTokenSpaces };
    Ok((Spelling::Marked { space_mark: true, byte_fallback: false }, lead))
}

fn pieces(library: &tokenizers::Tokenizer, spelling: Spelling, lead: Lead) -> Result<Pieces, TextError> {
    let vocabulary = library.get_vocab(true);
    let added = library.get_added_tokens_decoder();
    let entries = vocabulary.iter().map(|(text, &id)| {
        let token = added.get(&id).filter(|token| token.content == *text);
        Entry { id, text, added: token.is_some(), special: token.is_some_and(|token| token.special) }
    });
    Pieces::build(entries.collect(), spelling, lead)
}

/// The ids that the post-processor puts before and after a text, found by trying it.
fn added_around(library: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), TextError> {
    let encode = |text: &str, add_special: bool| {
        let encoding = library
            .encode_fast(text, add_special)
            .map_err(|error| self::library("encode a probe", &error))?;
        Ok::<_, TextError>(encoding.get_ids().to_vec())
    };
    for probe in ["a", "0", "e", " ", "\u{4E00}"] {
        let plain = encode(probe, false)?;
        let full = encode(probe, true)?;
        if plain.is_empty() {
            continue; // says nothing about what comes before and what after
        }
        let around = full.len().saturating_sub(plain.len());
        // From the back: a prefix may end with the probe's own first id, a suffix hardly begins so.
        let start =
            (0..=around).rev().find(|&start| full.get(start..start + plain.len()) == Some(&plain[..]));
        return match start {
            Some(start) if around <= AROUND_MAX => {
                let (before, rest) = full.split_at(start);
                Ok((before.to_vec(), rest.get(plain.len()..).unwrap_or(&[]).to_vec()))
            }
            _ => unsupported("post-processor", "one that changes the text's own ids"),
        };
    }
    if encode("a", true)?.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    unsupported("post-processor", "one whose effect cannot be told")
}

fn special_tokens(
    parts: &HfParts,
    library: &tokenizers::Tokenizer,
    prefix: &[u32],
) -> Result<SpecialTokens, TextError> {
    let config = object("tokenizer_config.json", parts.tokenizer_config.as_deref())?;
    let map = object("special_tokens_map.json", parts.special_tokens_map.as_deref())?;
    let named = |key: &str| {
        let text = [&config, &map].into_iter().find_map(|file| {
            let value = file.get(key)?;
            value.as_str().or_else(|| value.get("content").and_then(Value::as_str)).map(str::to_owned)
        })?;
        let id = library.token_to_id(&text)?;
        Some(SpecialToken { id, text })
    };
    let first_added = || match prefix {
        &[id] => Some(SpecialToken { id, text: library.id_to_token(id)? }),
        _ => None,
    };
    Ok(SpecialTokens {
        bos: named("bos_token").or_else(first_added),
        eos: named("eos_token"),
        unk: named("unk_token"),
        pad: named("pad_token"),
    })
}

/// A small JSON file that must be an object; nothing when it is absent.
pub(crate) fn object(what: &'static str, bytes: Option<&[u8]>) -> Result<Map<String, Value>, TextError> {
    let Some(bytes) = bytes else { return Ok(Map::new()) };
    cap(what, bytes, CONFIG_BYTES_MAX)?;
    serde_json::from_slice(bytes).map_err(|source| TextError::Json { what, source })
}
