//! What each token id is as bytes. One table serves decoding, whole and incremental.

use crate::TextError;
use crate::error::quoted;

/// The mark that SentencePiece-style vocabularies use for a space.
pub(crate) const SPACE_MARK: &str = "\u{2581}";

/// What happens to the space in front of the first word of a decoded text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lead {
    /// Nothing: byte-level vocabularies.
    Keep,
    /// One leading space of the whole text is dropped: the one that the encoder put there.
    DropSpace,
    /// All spaces of the first token are dropped.
    DropFirstTokenSpaces,
}

/// How a token's text becomes bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// GPT-2 byte-level: each character stands for one byte.
    ByteLevel,
    /// SentencePiece-style: a mark for spaces; `<0xE2>` stands for one byte when `byte_fallback`.
    Marked { space_mark: bool, byte_fallback: bool },
}

/// Bytes and kind of each id. Ids without a token have no bytes.
#[derive(Debug)]
pub(crate) struct Pieces {
    bytes: Vec<u8>,
    /// `ends[id]` is where id's bytes end; they begin where those of `id - 1` end.
    ends: Vec<u32>,
    special: Vec<bool>,
    lead: Lead,
}

/// One vocabulary entry, borrowed while the table is built.
pub(crate) struct Entry<'a> {
    pub id: u32,
    pub text: &'a str,
    /// Matched in text before the model sees it; its text is meant literally.
    pub added: bool,
    pub special: bool,
}

impl Pieces {
    /// Builds the table from entries in any order.
    ///
    /// # Errors
    /// Two entries with one id, or an id far beyond the number of entries (the table would be mostly holes).
    pub fn build(mut entries: Vec<Entry<'_>>, spelling: Spelling, lead: Lead) -> Result<Pieces, TextError> {
        entries.sort_unstable_by_key(|entry| entry.id);
        if let Some([first, second]) = entries.array_windows().find(|[a, b]| a.id == b.id) {
            let why = format!("{} and {} share id {}", quoted(first.text), quoted(second.text), first.id);
            return Err(TextError::Vocabulary { why });
        }
        let ids_max = entries.len().saturating_mul(4).saturating_add(4096);
        let mut pieces = Pieces { bytes: Vec::new(), ends: Vec::new(), special: Vec::new(), lead };
        for entry in &entries {
            let id = entry.id as usize;
            if id >= ids_max {
                let why = format!("{} has id {id} among {} tokens", quoted(entry.text), entries.len());
                return Err(TextError::Vocabulary { why });
            }
            while pieces.ends.len() < id {
                pieces.close_entry(false)?; // a hole
            }
            spell(entry, spelling, &mut pieces.bytes);
            pieces.close_entry(entry.special)?;
        }
        Ok(pieces)
    }

    fn close_entry(&mut self, special: bool) -> Result<(), TextError> {
        let end = u32::try_from(self.bytes.len())
            .map_err(|_| TextError::Vocabulary { why: "its texts exceed 4 GiB".to_owned() })?;
        self.ends.push(end);
        self.special.push(special);
        Ok(())
    }

    /// One more than the largest id.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn lead(&self) -> Lead {
        self.lead
    }

    /// The bytes that `id` stands for inside a text; `None` for an id outside the vocabulary.
    pub fn bytes_of(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.ends.get(id)? as usize;
        let start = match id.checked_sub(1) {
            Some(previous) => *self.ends.get(previous)? as usize,
            None => 0,
        };
        self.bytes.get(start..end)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

fn spell(entry: &Entry<'_>, spelling: Spelling, out: &mut Vec<u8>) {
    match spelling {
        Spelling::ByteLevel if entry.added => out.extend_from_slice(entry.text.as_bytes()),
        Spelling::ByteLevel => {
            let start = out.len();
            for c in entry.text.chars() {
                let Some(byte) = byte_of(c) else {
                    // Not written in the byte alphabet: the token means its own text.
                    out.truncate(start);
                    out.extend_from_slice(entry.text.as_bytes());
                    return;
                };
                out.push(byte);
            }
        }
        Spelling::Marked { byte_fallback: true, .. } if byte_token(entry.text).is_some() => {
            out.extend(byte_token(entry.text));
        }
        Spelling::Marked { space_mark: true, .. } => {
            out.extend_from_slice(entry.text.replace(SPACE_MARK, " ").as_bytes());
        }
        Spelling::Marked { space_mark: false, .. } => out.extend_from_slice(entry.text.as_bytes()),
    }
}

/// The byte that a `<0xE2>` token stands for.
pub(crate) fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

/// The byte a character of the GPT-2 byte alphabet stands for: printable Latin-1 characters are themselves, the
/// other 68 bytes are U+0100 onwards, in order.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        0x100..=0x143 => {
            let rank = u8::try_from(code - 0x100).ok()?;
            match rank {
                0..=0x20 => Some(rank),                  // 0x00..=0x20
                0x21..=0x42 => Some(rank - 0x21 + 0x7F), // 0x7F..=0xA0
                _ => Some(0xAD),
            }
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_the_librarys() {
        use tokenizers::pre_tokenizers::byte_level::ByteLevel;
        let mut seen = [false; 256];
        for c in ByteLevel::alphabet() {
            let byte = byte_of(c).expect("every character of the alphabet is a byte");
            assert!(!seen[usize::from(byte)], "two characters for byte {byte}");
            seen[usize::from(byte)] = true;
        }
        assert!(seen.iter().all(|&s| s));
        assert_eq!(byte_of('\u{120}'), Some(b' '));
        assert_eq!(byte_of('\u{144}'), None);
        assert_eq!(byte_of(' '), None);
    }

    #[test]
    fn byte_tokens_are_exactly_six_characters() {
        assert_eq!(byte_token("<0xE2>"), Some(0xE2));
        assert_eq!(byte_token("<0xe2>"), Some(0xE2));
        for wrong in ["<0xE>", "<0xE22>", "<0x+1>", "0xE2", "<0xE2", "<0xG0>", ""] {
            assert_eq!(byte_token(wrong), None, "{wrong}");
        }
    }

    fn entry(id: u32, text: &str) -> Entry<'_> {
        Entry { id, text, added: false, special: false }
    }

    #[test]
    fn holes_duplicates_and_far_ids() {
        let pieces =
            Pieces::build(vec![entry(3, "b"), entry(1, "a")], Spelling::ByteLevel, Lead::Keep).expect("fine");
        assert_eq!(pieces.len(), 4);
        assert_eq!(pieces.bytes_of(0), Some(&b""[..]));
        assert_eq!(pieces.bytes_of(1), Some(&b"a"[..]));
        assert_eq!(pieces.bytes_of(3), Some(&b"b"[..]));
        assert_eq!(pieces.bytes_of(4), None);
        assert_eq!(pieces.bytes_of(u32::MAX), None);
        assert!(Pieces::build(vec![entry(1, "a"), entry(1, "b")], Spelling::ByteLevel, Lead::Keep).is_err());
        assert!(Pieces::build(vec![entry(u32::MAX, "a")], Spelling::ByteLevel, Lead::Keep).is_err());
    }
}
