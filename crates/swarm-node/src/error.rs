//! What can go wrong on a node, and whose fault it is.

use swarm_wire::Blame;

/// Why a node could not do what it was asked. The text says what happened, to what, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    #[error(transparent)]
    Resolve(#[from] swarm_weights::cache::ResolveError),
    #[error("the model cannot be opened")]
    Weights(#[from] swarm_weights::WeightsError),
    #[error("layers {}..{} cannot be loaded", layers.start, layers.end)]
    Load { layers: std::ops::Range<usize>, source: swarm_model::LoadError },
    #[error("the model's tokenizer or chat template cannot be used")]
    Text(#[from] swarm_text::TextError),
    #[error("this node has no identity")]
    Identity(#[from] swarm_link::IdentityError),
    #[error(transparent)]
    Link(#[from] swarm_link::LinkError),
    #[error("the layers cannot be placed")]
    Place(#[from] swarm_ring::PlaceError),
    #[error("{0}")]
    NoWorkers(String),
    #[error("{node} speaks protocol {theirs}, this node {ours}; update the older one")]
    Protocol { node: String, theirs: u32, ours: u32 },
    #[error("{node} computes by numeric contract {theirs}, this node by {ours}; update the older one")]
    Numerics { node: String, theirs: String, ours: String },
    #[error("{node} refused its stage: {reason}")]
    Refused { node: String, blame: Blame, reason: String },
    #[error("{node} {what}")]
    Lost { node: String, what: String },
    #[error("{node} broke the protocol: {what}")]
    BadPeer { node: String, what: String },
    #[error(
        "layers {}..{} need {need} of memory here ({weights} of weights, {kv} of KV rows, {buffers} of buffers), but {have} are free; give this node fewer layers, or ask for a smaller --context",
        layers.start, layers.end
    )]
    Memory {
        layers: std::ops::Range<usize>,
        need: String,
        weights: String,
        kv: String,
        buffers: String,
        have: String,
    },
    #[error("{0}")]
    Request(String),
    #[error("the engine has stopped: {0}")]
    Stopped(String),
    #[error("{what}")]
    System { what: String, source: std::io::Error },
}

impl NodeError {
    /// Whose fault it is; policy and exit codes read only this.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Refused { blame, .. } => *blame,
            Self::Link(_) | Self::Lost { .. } | Self::NoWorkers(_) | Self::Stopped(_) => Blame::Link,
            Self::Protocol { .. } | Self::Numerics { .. } | Self::BadPeer { .. } => Blame::Peer,
            Self::System { .. } | Self::Identity(_) => Blame::Us,
            _ => Blame::Caller,
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

/// Bytes for people: `1.50 GB`.
pub fn bytes_text(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
