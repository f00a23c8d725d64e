//! Messages to token ids, so that nobody's message can speak for another.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::encoder::Literal;
use crate::{ChatTemplate, RenderOptions, TextError, Tokenizer};

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; templates may know others.
    pub role: String,
    /// Text. Special tokens written in it are ordinary characters to [`ChatTemplate::encode`].
    pub content: String,
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    pub fn system(content: impl Into<String>) -> Message {
        Message::new("system", content)
    }

    pub fn user(content: impl Into<String>) -> Message {
        Message::new("user", content)
    }

    pub fn assistant(content: impl Into<String>) -> Message {
        Message::new("assistant", content)
    }
}

/// Noncharacters: Unicode keeps them free for a program's own use, so no text has a claim to them.
const MARKS: std::ops::RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

impl ChatTemplate {
    /// The chat as token ids: rendered, then encoded so that special tokens count where the template wrote them and
    /// are ordinary characters where a message did.
    ///
    /// A beginning-of-sequence token comes first if the template writes one or if the model's files ask for one;
    /// never twice. An end-of-sequence token is never added at the end.
    ///
    /// How: before rendering, a mark is put into every special token that a message contains; marks come out of the
    /// template wherever it puts the message, are removed, and their places are encoded literally. Messages without
    /// special tokens, nearly all, are rendered as they are.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_with`] and [`Tokenizer::encode`].
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<Vec<u32>, TextError> {
        let special: Vec<&str> = tokenizer.special_texts().collect();
        let mark = free_mark(messages, options);
        let mut marked = messages.to_vec();
        let mut any = false;
        for message in &mut marked {
            for text in [&mut message.role, &mut message.content] {
                any |= put_marks(text, &special, mark);
            }
        }
        let (prompt, literal) = if any {
            let (prompt, positions) = take_marks(&self.render_with(&marked, options)?, mark);
            (prompt, Literal::At(positions))
        } else {
            (self.render_with(messages, options)?, Literal::Nowhere)
        };
        let ids = tokenizer.encode_literal(&prompt, literal)?;
        if ids.starts_with(tokenizer.prefix()) {
            return Ok(ids);
        }
        Ok([tokenizer.prefix(), &ids].concat())
    }
}

/// A mark that occurs in nobody's text. With all 32 in use, the last: its own occurrences are then dropped from the
/// text when marks are taken out, which harms only the text of whoever sent noncharacters.
fn free_mark(messages: &[Message], options: &RenderOptions) -> char {
    let free = |mark: &char| {
        let in_messages = messages.iter().any(|m| m.role.contains(*mark) || m.content.contains(*mark));
        !in_messages && !options.variables.values().any(|value| value.to_string().contains(*mark))
    };
    MARKS.into_iter().find(free).unwrap_or(*MARKS.end())
}

/// Puts `mark` behind the first character of every occurrence of a special token, overlapping ones too.
fn put_marks(text: &mut String, special: &[&str], mark: char) -> bool {
    let mut places = BTreeSet::new();
    for token in special {
        let Some(first) = token.chars().next() else { continue };
        let mut from = 0;
        while let Some(found) = text.get(from..).and_then(|rest| rest.find(token)) {
            places.insert(from + found + first.len_utf8());
            from += found + first.len_utf8();
        }
    }
    for &place in places.iter().rev() {
        text.insert(place, mark);
    }
    !places.is_empty()
}

/// Removes the marks; returns the text and the positions of the characters that stood before them.
fn take_marks(text: &str, mark: char) -> (String, BTreeSet<usize>) {
    let mut clean = String::with_capacity(text.len());
    let mut positions = BTreeSet::new();
    for (index, part) in text.split(mark).enumerate() {
        if index > 0
            && let Some((at, _)) = clean.char_indices().next_back()
        {
            positions.insert(at);
        }
        clean.push_str(part);
    }
    (clean, positions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_go_in_and_come_out() {
        let special = ["<s>", "<s><s>", "é|"];
        let mut text = "a<s><s>bé|".to_owned();
        assert!(put_marks(&mut text, &special, '\u{FDD0}'));
        assert_eq!(text, "a<\u{FDD0}s><\u{FDD0}s>bé\u{FDD0}|");
        let (clean, positions) = take_marks(&text, '\u{FDD0}');
        assert_eq!(clean, "a<s><s>bé|");
        assert_eq!(positions, BTreeSet::from([1, 4, 8]));
        let mut plain = "a < s >".to_owned();
        assert!(!put_marks(&mut plain, &special, '\u{FDD0}'));
    }
}
