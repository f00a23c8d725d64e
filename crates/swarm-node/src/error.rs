//! What can go wrong on a node, and whose fault it is.

use swarm_wire::{Blame, CloseCode};

/// Why a node could not do what it was asked. The text says what happened, to what, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    #[error(transparent)]
    Resolve(#[from] swarm_weights::cache::ResolveError),
    #[error(
        "{model} is not to be had from any node of the room either ({})",
        if asked.is_empty() { "nobody was found to ask".to_owned() } else { asked.join("; ") }
    )]
    NotLent {
        model: String,
        asked: Vec<String>,
        /// Of those who were asked, the workers that are not paired with this computer.
        showing: Vec<Vec<std::net::SocketAddr>>,
        source: Box<swarm_weights::cache::ResolveError>,
    },
    #[error("the model cannot be opened")]
    Weights(#[source] Box<swarm_weights::WeightsError>),
    #[error("layers {}..{} cannot be fetched", layers.start, layers.end)]
    Fetch { layers: std::ops::Range<usize>, source: Box<swarm_weights::StoreError> },
    #[error(
        "{} would be fetched ({}), and no more than {} may be without asking",
        bytes_text(nodes.iter().map(|(_, bytes)| bytes).sum()),
        nodes.iter().map(|(name, bytes)| format!("{name}: {}", bytes_text(*bytes))).collect::<Vec<_>>().join(", "),
        bytes_text(*max)
    )]
    MuchToFetch { nodes: Vec<(String, u64)>, max: u64 },
    #[error("layers {}..{} cannot be loaded", layers.start, layers.end)]
    Load { layers: std::ops::Range<usize>, source: Box<swarm_model::LoadError> },
    #[error("quantized weights are not kept")]
    Keep(#[source] Box<swarm_weights::QuantizedError>),
    #[error("the model's tokenizer or chat template cannot be used")]
    Text(#[source] Box<swarm_text::TextError>),
    #[error("this node has no identity")]
    Identity(#[source] Box<swarm_link::IdentityError>),
    #[error(transparent)]
    Link(Box<swarm_link::LinkError>),
    #[error("the layers cannot be placed")]
    Place(#[source] Box<swarm_ring::PlaceError>),
    #[error("{0}")]
    NoWorkers(String),
    #[error(
        "only workers that are not paired with this computer were found ({}); type the code that one of them shows with --join CODE, or set SWARM_OS_JOIN",
        showing.iter().flatten().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    Unpaired { showing: Vec<Vec<std::net::SocketAddr>> },
    #[error("{node} speaks protocol {theirs}, this node {ours}; update the older one")]
    Protocol { node: String, theirs: u32, ours: u32 },
    #[error("{node} computes by numeric contract {theirs}, this node by {ours}; update the older one")]
    Numerics { node: String, theirs: String, ours: String },
    #[error("{node} cannot serve its stage: {reason}")]
    Refused { node: String, blame: Blame, reason: String },
    #[error("{node} {what}")]
    Lost { node: String, what: String },
    #[error("{node} broke the protocol: {what}")]
    BadPeer { node: String, what: String, code: CloseCode },
    #[error("{link} broke: {reason}")]
    Broken { link: String, reason: String },
    #[error("{node} closed the link: {code}")]
    Closed { node: String, code: CloseCode },
    #[error(
        "layers {}..{} need {} of memory here ({} of weights, {} of KV rows, {} of buffers), but {} are free; give this node fewer layers, or ask for a smaller --context",
        layers.start, layers.end, bytes_text(weights.saturating_add(*kv).saturating_add(*buffers)),
        bytes_text(*weights), bytes_text(*kv), bytes_text(*buffers), bytes_text(*have)
    )]
    Memory { layers: std::ops::Range<usize>, weights: u64, kv: u64, buffers: u64, have: u64 },
    #[error("{0}")]
    Request(String),
    #[error("the engine has stopped: {0}")]
    Stopped(String),
    #[error("{0}; this is a bug, please report it")]
    Bug(String),
    #[error("{what}")]
    System { what: String, source: std::io::Error },
}

/// Errors of the rooms below, boxed: they are large, and rare.
macro_rules! boxed {
    ($($variant:ident: $error:ty;)*) => {$(
        impl From<$error> for NodeError {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        }
    )*};
}

boxed! {
    Weights: swarm_weights::WeightsError;
    Place: swarm_ring::PlaceError;
    Link: swarm_link::LinkError;
    Identity: swarm_link::IdentityError;
    Text: swarm_text::TextError;
}

impl NodeError {
    /// Whose fault it is; policy and exit codes read only this.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Refused { blame, .. } => *blame,
            Self::Link(_)
            | Self::Lost { .. }
            | Self::Closed { .. }
            | Self::Broken { .. }
            | Self::NoWorkers(_)
            | Self::Unpaired { .. }
            | Self::Stopped(_) => Blame::Link,
            Self::Protocol { .. } | Self::Numerics { .. } | Self::BadPeer { .. } => Blame::Peer,
            Self::System { .. } | Self::Identity(_) | Self::Bug(_) | Self::Fetch { .. } | Self::Keep(_) => {
                Blame::Us
            }
            _ => Blame::Caller,
        }
    }

    /// What the other end of a link is told that is closed for this; `None` where it is not to blame.
    pub fn code(&self) -> Option<CloseCode> {
        match self {
            Self::BadPeer { code, .. } => Some(*code),
            Self::Protocol { .. } | Self::Numerics { .. } => Some(CloseCode::Version),
            Self::Link(error) => crate::refusals::link_code(error),
            _ => None,
        }
    }

    /// The error and everything it came from, in one line.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and its sources, joined by colons.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let part = error.to_string();
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = error.source();
    }
    text
}

/// A stranger's text on one line: what a terminal might obey, or nobody can see, is spelled out.
pub fn printable(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, char| {
        match char {
            '\'' | '"' | '\\' => out.push(char),
            _ => out.extend(char.escape_debug()),
        }
        out
    })
}

/// Bytes for people: `1.50 GB`.
pub fn bytes_text(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_texts_are_harmless_and_readable() {
        assert_eq!(printable("it's C:\\a \"b\" é 日"), "it's C:\\a \"b\" é 日");
        assert_eq!(printable("a\u{1b}[2J\nb\u{202e}\u{9b}"), "a\\u{1b}[2J\\nb\\u{202e}\\u{9b}");
    }
}
