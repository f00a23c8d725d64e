//! One error type for the room. Strangers' words (token texts, names from files) are escaped and cut short.

use std::time::Duration;

/// Why text could not become tokens, or messages a prompt.
///
/// The model's files are to blame for everything except [`TextError::TextTooLong`] and
/// [`TextError::MessagesRefused`], which are the caller's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The model came without a tokenizer.
    #[error("the model has no tokenizer: {why}; put its tokenizer.json beside the weights")]
    Missing { why: String },
    /// A file is larger than any real one.
    #[error("{what} has {bytes} bytes, more than the {max} that are accepted")]
    FileTooLarge { what: &'static str, bytes: usize, max: usize },
    /// A file is not the JSON it should be.
    #[error("{what} is not valid JSON for this purpose")]
    Json {
        what: &'static str,
        #[source]
        source: serde_json::Error,
    },
    /// The tokenizer uses a part that this build does not know. Nothing is guessed.
    #[error("the tokenizer's {part} {name} is not supported by this build")]
    Unsupported { part: &'static str, name: String },
    /// GGUF metadata name a pre-tokenizer that this build does not know.
    #[error("pre-tokenizer {name} (tokenizer.ggml.pre) is not supported by this build; known: {known}")]
    UnknownPreTokenizer { name: String, known: String },
    /// The vocabulary contradicts itself.
    #[error("the vocabulary is broken: {why}")]
    Vocabulary { why: String },
    /// The tokenizer library refused the file or the text.
    #[error("the tokenizer failed to {what}: {why}")]
    Library { what: &'static str, why: String },
    /// Foreign code panicked. It was contained; this tokenizer or template must not be trusted.
    #[error("the model's own rules crashed while trying to {what}: {why}")]
    Panicked { what: &'static str, why: String },
    /// Foreign code did not come back in time.
    #[error("the model's own rules did not {what} within {limit:?}; the file is not usable")]
    TimedOut { what: &'static str, limit: Duration },
    /// An earlier text never finished, so no other one is tried.
    #[error("this tokenizer hung on an earlier text and is not used any more; load the model again")]
    Stuck,
    /// The system refused a thread.
    #[error("could not start a thread to {what}")]
    Thread {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// The caller's text is longer than [`crate::TEXT_BYTES_MAX`].
    #[error("text of {bytes} bytes is longer than the {max} that are accepted; shorten the prompt")]
    TextTooLong { bytes: usize, max: usize },
    /// The chat template does not compile or fails while it runs.
    #[error("the chat template failed: {why}")]
    Template { why: String },
    /// The template spent its budget of work or output: a broken or hostile template.
    #[error("the chat template {why}; it is broken or hostile")]
    TemplateLimit { why: String },
    /// The template itself refused these messages (`raise_exception`): wrong roles or wrong order, usually.
    #[error("the chat template refuses these messages: {why}")]
    MessagesRefused { why: String },
}

/// A stranger's words, quoted, escaped, and cut at 80 characters.
pub(crate) fn quoted(words: &str) -> String {
    const CHARS_MAX: usize = 80;
    let mut shown: String = words.chars().take(CHARS_MAX).flat_map(char::escape_debug).collect();
    if words.chars().nth(CHARS_MAX).is_some() {
        shown.push_str("...");
    }
    format!("\"{shown}\"")
}

/// As [`quoted`] without the quotes, and longer: for messages that are sentences themselves.
pub(crate) fn sentence(words: &str) -> String {
    const CHARS_MAX: usize = 400;
    let mut shown = String::new();
    for c in words.chars().take(CHARS_MAX) {
        if c.is_control() { shown.extend(c.escape_debug()) } else { shown.push(c) }
    }
    if words.chars().nth(CHARS_MAX).is_some() {
        shown.push_str("...");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_words_cannot_steer_a_terminal() {
        assert_eq!(quoted("a\u{1b}[2Jb"), "\"a\\u{1b}[2Jb\"");
        assert_eq!(sentence("a\u{1b}\nb"), "a\\u{1b}\\nb");
        assert!(quoted(&"x".repeat(1000)).len() < 100);
        assert!(sentence(&"x".repeat(1000)).len() < 500);
    }
}
