//! Text to ids through the tokenizer library, with control over which special tokens may be recognised.

use std::collections::BTreeSet;
use std::ops::Range;

use tokenizers::normalizer::Range as LibraryRange;
use tokenizers::{
    Model, NormalizedString, Normalizer, OffsetType, PreTokenizedString, PreTokenizer, Split, Token,
};

use crate::TextError;
use crate::error::sentence;

/// Where special tokens must stay ordinary text.
#[derive(Debug, Clone)]
pub(crate) enum Literal {
    /// Nowhere: every special token in the text counts.
    Nowhere,
    /// Everywhere.
    Everywhere,
    /// Wherever a match would begin at, or run across, one of these byte positions.
    At(BTreeSet<usize>),
}

impl Literal {
    fn forbids(&self, range: &Range<usize>) -> bool {
        match self {
            Literal::Nowhere => false,
            Literal::Everywhere => true,
            Literal::At(positions) => positions.range(range.clone()).next().is_some(),
        }
    }
}

/// The library's tokenizer and the tokens that are matched in text before its model sees it.
pub(crate) struct Encoder {
    library: tokenizers::Tokenizer,
    /// Matched in the text as it is.
    raw: Vec<Added>,
    /// Matched in the normalized text.
    normalized: Vec<Added>,
}

/// A token that is matched in text literally.
struct Added {
    id: u32,
    content: String,
    special: bool,
    single_word: bool,
    strip_left: bool,
    strip_right: bool,
}

impl Encoder {
    pub fn new(tokenizer: tokenizers::Tokenizer) -> Result<Encoder, TextError> {
        let mut encoder = Encoder { raw: Vec::new(), normalized: Vec::new(), library: tokenizer };
        let mut tokens: Vec<_> = encoder.library.get_added_tokens_decoder().into_iter().collect();
        // Longest first, so that the first match at a position is the longest.
        tokens.sort_by(|(a, x), (b, y)| y.content.len().cmp(&x.content.len()).then(a.cmp(b)));
        for (id, token) in tokens {
            let mut content = token.content;
            if token.normalized
                && let Some(normalizer) = encoder.library.get_normalizer()
            {
                let mut text = NormalizedString::from(content.as_str());
                normalizer.normalize(&mut text).map_err(|error| library("normalize a token", &*error))?;
                content = text.get().to_owned();
            }
            if content.is_empty() {
                continue;
            }
            let (special, single_word) = (token.special, token.single_word);
            let (strip_left, strip_right) = (token.lstrip, token.rstrip);
            let added = Added { id, content, special, single_word, strip_left, strip_right };
            if token.normalized { encoder.normalized.push(added) } else { encoder.raw.push(added) }
        }
        Ok(encoder)
    }

    /// The texts of special tokens.
    pub fn special_texts(&self) -> impl Iterator<Item = &str> {
        self.raw
            .iter()
            .chain(&self.normalized)
            .filter(|added| added.special)
            .map(|added| added.content.as_str())
    }

    /// Encodes without adding anything.
    pub fn encode(&self, text: &str, literal: &Literal) -> Result<Vec<u32>, TextError> {
        if self.needs_own_matching(text, literal) {
            return self.encode_guarded(text, literal);
        }
        match self.library.encode_fast(text, false) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(library("encode the text", &*error)),
        }
    }

    /// The library matches all special tokens or none; where there is none to match, it may do all the work.
    fn needs_own_matching(&self, text: &str, literal: &Literal) -> bool {
        match literal {
            Literal::Nowhere => false,
            Literal::At(positions) => !positions.is_empty(),
            Literal::Everywhere => {
                self.normalized.iter().any(|added| added.special)
                    || self.raw.iter().any(|added| added.special && text.contains(&added.content))
            }
        }
    }

    /// The library's own pipeline (match added tokens, normalize, match again, pre-tokenize, apply the model), with
    /// the two matchings replaced by ones that respect `literal`.
    fn encode_guarded(&self, text: &str, literal: &Literal) -> Result<Vec<u32>, TextError> {
        let fail = |error: tokenizers::Error| library("encode the text", &*error);
        let mut pieces = PreTokenizedString::from(text);
        pieces
            .split(|_, piece| {
                let matches = find_added(piece.get(), &self.raw, |range| literal.forbids(range));
                cut(&piece, &matches)
            })
            .map_err(fail)?;
        pieces
            .split(|_, mut piece| {
                if let Some(normalizer) = self.library.get_normalizer() {
                    normalizer.normalize(&mut piece)?;
                }
                let start = piece.offsets_original().0;
                let matches = find_added(piece.get(), &self.normalized, |range| {
                    let original = piece.convert_offsets(LibraryRange::Normalized(range.clone()));
                    // A match that cannot be traced back to the text is treated as forbidden.
                    original.is_none_or(|at| {
                        literal.forbids(&(start + at.start..start + at.end.max(at.start + 1)))
                    })
                });
                cut(&piece, &matches)
            })
            .map_err(fail)?;
        if let Some(pre_tokenizer) = self.library.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(fail)?;
        }
        pieces.tokenize(|piece| self.library.get_model().tokenize(piece.get())).map_err(fail)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(fail)?;
        Ok(encoding.get_ids().to_vec())
    }
}

fn library(what: &'static str, error: &(dyn std::error::Error + Send + Sync)) -> TextError {
    TextError::Library { what, why: sentence(&error.to_string()) }
}

/// The added tokens in `text`, leftmost first, then longest; `forbidden` applies to special ones.
fn find_added(
    text: &str,
    tokens: &[Added],
    forbidden: impl Fn(&Range<usize>) -> bool,
) -> Vec<(Range<usize>, u32)> {
    let mut by_first_byte: Vec<Vec<&Added>> = (0..=255).map(|_| Vec::new()).collect();
    for token in tokens {
        let first = token.content.as_bytes().first().copied().unwrap_or(0);
        if let Some(bucket) = by_first_byte.get_mut(usize::from(first)) {
            bucket.push(token);
        }
    }
    let mut found: Vec<(Range<usize>, u32)> = Vec::new();
    let (mut at, mut free) = (0, 0);
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        let bucket = rest.as_bytes().first().and_then(|&first| by_first_byte.get(usize::from(first)));
        let matching = bucket.into_iter().flatten().find(|token| {
            let range = at..at + token.content.len();
            rest.starts_with(&token.content) && !(token.special && forbidden(&range))
        });
        let Some(token) = matching else {
            at += rest.chars().next().map_or(1, char::len_utf8);
            continue;
        };
        let end = at + token.content.len();
        let (before, after) = (text.get(..at).unwrap_or(""), text.get(end..).unwrap_or(""));
        if token.single_word && (before.ends_with(is_word) || after.starts_with(is_word)) {
            at = end;
            continue;
        }
        let start = if token.strip_left { before.trim_end().len().max(free) } else { at };
        free = if token.strip_right { end + (after.len() - after.trim_start().len()) } else { end };
        found.push((start..free, token.id));
        at = free;
    }
    found
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Cuts `piece` at the matches: each match becomes its token, the rest stays text.
fn cut(piece: &NormalizedString, matches: &[(Range<usize>, u32)]) -> tokenizers::Result<Vec<Split>> {
    let slice = |range: Range<usize>| {
        piece
            .slice(LibraryRange::Normalized(range))
            .ok_or_else(|| tokenizers::Error::from("a cut inside a character"))
    };
    let mut splits = Vec::with_capacity(matches.len() * 2 + 1);
    let mut at = 0;
    for (range, id) in matches {
        if at < range.start {
            splits.push(Split::from(slice(at..range.start)?));
        }
        let matched = slice(range.clone())?;
        let token = Token::new(*id, matched.get().to_owned(), (0, range.len()));
        splits.push(Split::from((matched, Some(vec![token]))));
        at = range.end;
    }
    if at < piece.get().len() {
        splits.push(Split::from(slice(at..piece.get().len())?));
    }
    Ok(splits)
}
