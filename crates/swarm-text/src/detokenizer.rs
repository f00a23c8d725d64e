//! Token ids to text, as they come.

use std::sync::Arc;

use crate::Tokenizer;
use crate::pieces::{Lead, Pieces};

/// Turns a stream of token ids into text, each character once and whole.
///
/// For any ids, the concatenation of what [`push`](Self::push) and [`finish`](Self::finish) return equals
/// [`Tokenizer::decode`] of all of them. Bytes that cannot be UTF-8 become U+FFFD by the rules of
/// [`String::from_utf8_lossy`] (one for each maximal invalid prefix), and only once no later token could still
/// complete the character. Nothing that was returned is ever changed.
///
/// Costs a copy of the token's bytes; holds at most three bytes back.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    skip_special: bool,
    /// The beginning of a character that is not complete yet.
    pending: Vec<u8>,
    lead: LeadState,
}

impl Detokenizer {
    /// A stream that begins now: it treats the first token's leading space as [`Tokenizer::decode`] does.
    /// With `skip_special`, special tokens leave no text.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Detokenizer {
        let pieces = tokenizer.pieces();
        let lead = LeadState::new(pieces.lead());
        Detokenizer { pieces, skip_special, pending: Vec::new(), lead }
    }

    /// The text that has become certain with this token; often one word, sometimes nothing. An id outside the
    /// vocabulary leaves no text.
    pub fn push(&mut self, id: u32) -> String {
        let pieces = Arc::clone(&self.pieces);
        if self.skip_special && pieces.is_special(id) {
            return String::new();
        }
        let Some(bytes) = pieces.bytes_of(id) else { return String::new() };
        self.lead.append(bytes, &mut self.pending);
        take_certain(&mut self.pending)
    }

    /// Ends the stream: U+FFFD if it ended inside a character, else nothing.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// Remembers whether the space in front of the first word is still to be dropped.
#[derive(Debug, Clone)]
struct LeadState {
    lead: Lead,
    at_start: bool,
}

impl LeadState {
    fn new(lead: Lead) -> LeadState {
        LeadState { lead, at_start: true }
    }

    /// Appends one token's bytes, less what belongs to the start of the text only.
    fn append(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let at_start = self.at_start;
        match self.lead {
            Lead::DropSpace => {
                self.at_start &= bytes.is_empty(); // the first byte decides, whichever token brings it
                out.extend_from_slice(bytes.strip_prefix(b" ").filter(|_| at_start).unwrap_or(bytes));
            }
            Lead::DropFirstTokenSpaces => {
                self.at_start = false;
                out.extend(bytes.iter().copied().filter(|&b| !(at_start && b == b' ')));
            }
            Lead::Keep => out.extend_from_slice(bytes),
        }
    }
}

/// All of `ids` at once: the meaning of [`Detokenizer`].
pub(crate) fn decode_all(pieces: &Pieces, ids: &[u32], skip_special: bool) -> String {
    let mut lead = LeadState::new(pieces.lead());
    let mut bytes = Vec::new();
    for &id in ids {
        if skip_special && pieces.is_special(id) {
            continue;
        }
        if let Some(piece) = pieces.bytes_of(id) {
            lead.append(piece, &mut bytes);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Removes and returns all text of which no later byte can change anything; leaves the start of a character.
fn take_certain(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = pending.as_slice();
    loop {
        let error = match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => error,
        };
        let (valid, after) = rest.split_at(error.valid_up_to());
        text.push_str(&String::from_utf8_lossy(valid)); // valid by the line above; nothing is replaced
        let Some(invalid) = error.error_len() else {
            rest = after; // a character's beginning: wait
            break;
        };
        text.push(char::REPLACEMENT_CHARACTER);
        rest = after.get(invalid..).unwrap_or(&[]);
    }
    *pending = rest.to_vec();
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pieces::{Entry, Spelling};
    use proptest::prelude::*;

    fn stream(pieces: Arc<Pieces>, skip_special: bool) -> Detokenizer {
        let lead = LeadState::new(pieces.lead());
        Detokenizer { pieces, skip_special, pending: Vec::new(), lead }
    }

    /// Ids 0..=255 are the bytes, then a few pieces with spaces, halves of characters, and a special token.
    fn table(lead: Lead) -> Arc<Pieces> {
        let texts: Vec<String> = (0..=255u8)
            .map(|b| format!("<0x{b:02X}>"))
            .chain(
                ["\u{2581}", "\u{2581}\u{2581}", "\u{2581}a", "b\u{2581}", "\u{1F600}", "", "<s>"]
                    .map(String::from),
            )
            .collect();
        let entries = texts
            .iter()
            .enumerate()
            .map(|(id, text)| Entry { id: id as u32, text, added: text == "<s>", special: text == "<s>" })
            .collect();
        let spelling = Spelling::Marked { space_mark: true, byte_fallback: true };
        Arc::new(Pieces::build(entries, spelling, lead).expect("the table is sound"))
    }

    #[test]
    fn an_emoji_in_four_tokens_comes_whole() {
        let mut stream = stream(table(Lead::Keep), true);
        let bytes = "\u{1F600}".as_bytes();
        for &byte in &bytes[..3] {
            assert_eq!(stream.push(u32::from(byte)), "");
        }
        assert_eq!(stream.push(u32::from(bytes[3])), "\u{1F600}");
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn a_broken_character_is_replaced_only_once_that_is_certain() {
        let mut stream = stream(table(Lead::Keep), true);
        assert_eq!(stream.push(0xF0), "");
        assert_eq!(stream.push(0x9F), "");
        assert_eq!(stream.push(0x41), "\u{FFFD}A");
        assert_eq!(stream.push(0xE2), "");
        assert_eq!(stream.finish(), "\u{FFFD}");
    }

    #[test]
    fn the_leading_space_goes_once() {
        let (mark, marks, a) = (256, 257, 258);
        let drop_space = table(Lead::DropSpace);
        assert_eq!(decode_all(&drop_space, &[a, a], true), "a a");
        assert_eq!(decode_all(&drop_space, &[marks, a], true), "  a");
        assert_eq!(decode_all(&drop_space, &[262, a], true), "a");
        assert_eq!(decode_all(&drop_space, &[262, a], false), "<s> a");
        assert_eq!(decode_all(&drop_space, &[0x20, a], true), " a");
        let first = table(Lead::DropFirstTokenSpaces);
        assert_eq!(decode_all(&first, &[marks, a], true), " a");
        assert_eq!(decode_all(&table(Lead::Keep), &[mark, a], true), "  a");
    }

    proptest! {
        #[test]
        fn pushing_equals_decoding_all(
            // Mostly bytes of multi-byte characters, so that characters begin, break and complete.
            ids in prop::collection::vec(prop_oneof![0u32..270, 0x80u32..0x100, Just(0xF0), Just(0x9F), Just(0xE2)], 0..40),
            lead in prop::sample::select(vec![Lead::Keep, Lead::DropSpace, Lead::DropFirstTokenSpaces]),
            skip_special: bool,
        ) {
            let pieces = table(lead);
            let whole = decode_all(&pieces, &ids, skip_special);
            let mut stream = stream(pieces, skip_special);
            let mut text = String::new();
            for &id in &ids {
                text.push_str(&stream.push(id));
                prop_assert!(whole.starts_with(&text), "emitted text was changed later");
                prop_assert!(stream.pending.len() <= 3);
            }
            text.push_str(&stream.finish());
            prop_assert_eq!(text, whole);
        }
    }
}
