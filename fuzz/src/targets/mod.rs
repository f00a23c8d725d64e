//! What is fuzzed.

mod files;
mod frames;
mod sequences;
mod text;

use std::hash::{DefaultHasher, Hash, Hasher};

/// How inputs are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Numbers at their places.
    Binary,
    /// A tree of values, mostly.
    Json,
    /// Words.
    Text,
}

/// A function that must answer whatever it is given.
pub struct Target {
    /// Its name on the command line.
    pub name: &'static str,
    /// How its inputs are changed.
    pub shape: Shape,
    /// Words of its format.
    pub words: &'static [&'static str],
    /// Sound inputs.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Runs one input and tells outcomes apart. Panics when a promise is broken.
    pub run: fn(&[u8]) -> u64,
    /// Inputs of the bounded run in the test suite: some seconds in the dev profile.
    pub runs: u64,
}

/// All targets.
pub const TARGETS: [Target; 7] = [
    frames::FRAMES,
    sequences::SEQUENCES,
    frames::CONTROL,
    files::GGUF,
    files::SAFETENSORS,
    text::TOKENIZER,
    text::TEMPLATE,
];

/// The target of a name.
pub fn target(name: &str) -> Option<&'static Target> {
    const ALL: &[Target] = &TARGETS;
    ALL.iter().find(|target| target.name == name)
}

/// Tells error texts apart by their words; their numbers and quotations are the input's own.
fn outcome(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut quoted = false;
    for character in text.chars().take(400) {
        match character {
            '"' | '`' => quoted = !quoted,
            '0'..='9' => {}
            other if !quoted => other.hash(&mut hasher),
            _ => {}
        }
    }
    hasher.finish()
}

/// An error with all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
