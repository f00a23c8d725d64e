//! The pre-tokenizers that GGUF files name in `tokenizer.ggml.pre`.
//!
//! A GGUF file names its pre-tokenizer instead of carrying it, so its rules are written here. They are those of the
//! models' own `tokenizer.json` files, so that both sources give equal ids; where llama.cpp differs from them
//! (it leaves out Qwen's NFC normalization), the model's own file counts, because the model was trained with it.

use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::TextError;
use crate::error::quoted;

/// What a name in `tokenizer.ggml.pre` stands for.
pub(crate) struct Pre {
    pub normalizer: Option<NormalizerWrapper>,
    pub pre_tokenizer: PreTokenizerWrapper,
    /// A word that is a token as a whole is not split into merges first.
    pub ignore_merges: bool,
    /// Whether a beginning-of-sequence token is added when the metadata do not say.
    pub add_bos: bool,
}

enum Rule {
    /// GPT-2's own expression.
    Gpt2,
    /// Each digit alone, then GPT-2's expression.
    DigitsGpt2,
    /// One expression.
    One(&'static str),
    /// Several, each applied to the pieces of the one before.
    Several(&'static [&'static str]),
    /// Several, then each digit alone.
    SeveralDigits(&'static [&'static str]),
}

struct Known {
    names: &'static [&'static str],
    rule: Rule,
    nfc: bool,
    ignore_merges: bool,
    add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const KNOWN: &[Known] = &[
    Known {
        names: &["default"],
        rule: Rule::Several(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]),
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Known { names: &["gpt-2"], rule: Rule::Gpt2, nfc: false, ignore_merges: false, add_bos: false },
    Known {
        names: &["smollm", "starcoder", "refact", "codeshell"],
        rule: Rule::DigitsGpt2,
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Known {
        names: &["llama-bpe", "llama3", "llama-v3"],
        rule: Rule::One(LLAMA3),
        nfc: false,
        ignore_merges: true,
        add_bos: true,
    },
    Known {
        names: &["qwen2", "deepseek-r1-qwen"],
        rule: Rule::One(QWEN2),
        nfc: true,
        ignore_merges: false,
        add_bos: false,
    },
    Known { names: &["tekken"], rule: Rule::One(TEKKEN), nfc: false, ignore_merges: true, add_bos: true },
    Known {
        names: &["deepseek-coder"],
        rule: Rule::SeveralDigits(&[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+",
        ]),
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
];

/// The rules that `name` stands for. A file without a name is refused as well: such files are known to have been
/// converted with the wrong rules.
pub(crate) fn by_name(name: Option<&str>) -> Result<Pre, TextError> {
    let Some(known) = name.and_then(|name| KNOWN.iter().find(|known| known.names.contains(&name))) else {
        let known: Vec<&str> = KNOWN.iter().flat_map(|known| known.names).copied().collect();
        let name = name.map_or_else(|| "(none given)".to_owned(), quoted);
        return Err(TextError::UnknownPreTokenizer { name, known: known.join(", ") });
    };
    let byte_level = |use_regex| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, use_regex));
    let digits = || PreTokenizerWrapper::Digits(Digits::new(true));
    let steps = match known.rule {
        Rule::Gpt2 => vec![byte_level(true)],
        Rule::DigitsGpt2 => vec![digits(), byte_level(true)],
        Rule::One(regex) => vec![split(regex)?, byte_level(false)],
        Rule::Several(regexes) => {
            let splits: Result<Vec<_>, _> = regexes.iter().copied().map(split).collect();
            splits?.into_iter().chain([byte_level(false)]).collect()
        }
        Rule::SeveralDigits(regexes) => {
            let splits: Result<Vec<_>, _> = regexes.iter().copied().map(split).collect();
            splits?.into_iter().chain([digits(), byte_level(false)]).collect()
        }
    };
    Ok(Pre {
        normalizer: known.nfc.then_some(NormalizerWrapper::NFC(NFC)),
        pre_tokenizer: PreTokenizerWrapper::Sequence(Sequence::new(steps)),
        ignore_merges: known.ignore_merges,
        add_bos: known.add_bos,
    })
}

fn split(regex: &str) -> Result<PreTokenizerWrapper, TextError> {
    Split::new(SplitPattern::Regex(regex.to_owned()), SplitDelimiterBehavior::Isolated, false)
        .map(PreTokenizerWrapper::Split)
        .map_err(|error| TextError::Library { what: "compile its own pre-tokenizer", why: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_name_compiles_and_a_strange_one_is_named() {
        for name in KNOWN.iter().flat_map(|known| known.names) {
            by_name(Some(name)).expect("the table is sound");
        }
        let error = by_name(Some("martian-\u{1b}")).err().expect("refused").to_string();
        assert!(error.contains("martian-\\u{1b}") && error.contains("qwen2"), "{error}");
        assert!(by_name(None).is_err());
    }
}
