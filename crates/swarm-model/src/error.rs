//! What can go wrong, and whose fault it is.

use std::ops::Range;

use swarm_kernels::ShapeError;
use swarm_weights::WeightsError;

use crate::{KvError, families::FamilyError};

/// Why a stage could not be loaded. All but [`LoadError::Pack`] are about the files or the request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    #[error("loading was given up: the stage is not wanted any more")]
    Aborted,
    #[error("layers {}..{} are not a stage of a model of {num_layers} layers", layers.start, layers.end)]
    Layers { layers: Range<usize>, num_layers: usize },
    #[error("a context of {context} positions was asked for, but the model was made for 1 to {max}")]
    Context { context: usize, max: usize },
    #[error("{model} cannot be run")]
    Family { model: String, source: FamilyError },
    #[error("{heads} query heads on {kv_heads} kv heads are not supported; at most {max} may share one")]
    Group { heads: usize, kv_heads: usize, max: usize },
    #[error("RoPE scaling: {why}")]
    Rope { why: String },
    #[error("{name} is missing from {model}; the download may be incomplete")]
    MissingTensor { name: String, model: String },
    #[error("{name} is [{rows}, {cols}], but the configuration wants [{want_rows}, {want_cols}]")]
    Shape { name: String, rows: usize, cols: usize, want_rows: usize, want_cols: usize },
    #[error("{name} could not be packed")]
    Pack { name: String, source: ShapeError },
    #[error("{name} could not be read")]
    Read { name: String, source: Box<WeightsError> },
}

/// Whose fault a failed step is. Policy reads only this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The request can never succeed here.
    Caller,
    /// The previous stage sent what does not belong here: another model, a lost or repeated step.
    Peer,
    /// The KV cache has no room now. It may later, when another session closes.
    Full,
    /// Our own bug, or our own disk.
    Us,
}

/// Why a step was refused. The KV cache is as it was before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    #[error("token {token} is outside the vocabulary of {vocab}")]
    TokenOutsideVocab { token: u32, vocab: usize },
    #[error("a step at position {got} came where position {want} was due")]
    OutOfOrder { want: usize, got: usize },
    #[error("{tokens} tokens at position {position} do not fit a context of {context}")]
    ContextFull { context: usize, position: usize, tokens: usize },
    #[error("a segment without tokens at position {position}")]
    EmptySegment { position: usize },
    #[error("{what} hold {got} numbers, but {want} belong there; the previous stage may run another model")]
    WidthMismatch { what: &'static str, want: usize, got: usize },
    #[error("layers {}..{} hold no {what}", layers.start, layers.end)]
    NotThisStage { layers: Range<usize>, what: &'static str },
    #[error("the KV cache given belongs to a stage of another shape")]
    ForeignKv,
    #[error("the embedding of token {token} cannot be read any more: {why}")]
    Embedding { token: u32, why: String },
    #[error(transparent)]
    Kv(#[from] KvError),
}

impl StepError {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::TokenOutsideVocab { .. } | Self::ContextFull { .. } => Blame::Caller,
            Self::OutOfOrder { .. } | Self::EmptySegment { .. } | Self::WidthMismatch { .. } => Blame::Peer,
            Self::Kv(KvError::Full { .. }) => Blame::Full,
            Self::Kv(KvError::TruncateBeyondEnd { .. }) => Blame::Peer,
            Self::NotThisStage { .. } | Self::ForeignKv | Self::Embedding { .. } => Blame::Us,
        }
    }
}
