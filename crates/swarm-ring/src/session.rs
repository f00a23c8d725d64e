//! One sequence, as its coordinator sees it.

use std::collections::BTreeSet;

use swarm_wire::{Blame, Position, Sampling, SamplingError};

/// What a user asks for, as token ids.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionRequest {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// The session ends with [`FinishReason::Length`] after this many tokens; at least 1.
    pub max_tokens: u32,
    /// How the tail samples.
    pub sampling: Sampling,
    /// The session ends with [`FinishReason::Stop`] when one of these is sampled.
    pub end_tokens: BTreeSet<u32>,
    /// Positions this session may have; the ring's context when that is smaller.
    pub context: u32,
    /// The tail adds a digest of the logits to each token.
    pub logits_hash: bool,
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model sampled this end token. It is not emitted as a token.
    Stop {
        /// Its id.
        token: u32,
    },
    /// `max_tokens` were emitted.
    Length,
    /// No position is left.
    ContextFull,
    /// [`crate::Scheduler::cancel`] was called.
    Cancelled,
    /// The session cannot go on.
    Error(SessionError),
}

/// Why a session could not go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// A lap missed its deadline. Which node is silent, the heartbeats know.
    #[error("no answer from the ring for {waited_ms} ms, in lap {lap}; the session was ended")]
    NodeSilent {
        /// The lap that is overdue.
        lap: u64,
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// A stage said so.
    #[error("a stage of the ring failed ({blame:?}): {}", text.escape_debug())]
    StageFailed {
        /// Whose fault it says it is.
        blame: Blame,
        /// Its words, as they came.
        text: String,
    },
    /// The ring was given up for another reason.
    #[error("the ring was lost: {}", text.escape_debug())]
    RingLost {
        /// Whose fault.
        blame: Blame,
        /// What happened.
        text: String,
    },
}

impl SessionError {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::NodeSilent { .. } => Blame::Link,
            Self::StageFailed { blame, .. } | Self::RingLost { blame, .. } => *blame,
        }
    }
}

/// Why a session was not opened.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Nothing to go on from.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// The prompt alone is too long.
    #[error("a prompt of {tokens} tokens does not fit a context of {context}; shorten it")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Positions the session may have.
        context: u32,
    },
    /// A token id the model does not have.
    #[error("token id {token} is not below the vocabulary size of {vocab}")]
    BadToken {
        /// The id.
        token: u32,
        /// The size.
        vocab: u32,
    },
    /// Nothing to do.
    #[error("max_tokens is 0; ask for at least one token")]
    NoTokens,
    /// A sampling number out of range.
    #[error("the sampling parameters are refused")]
    Sampling(#[from] SamplingError),
    /// Every place is taken.
    #[error("all {sessions_max} sessions of the ring are in use; try again when one ends")]
    Busy {
        /// How many there are.
        sessions_max: u32,
    },
    /// The ring failed and no new epoch has begun.
    #[error("the ring is down; wait for its next epoch")]
    RingDown,
}

impl OpenError {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::RingDown => Blame::Link,
            Self::Busy { .. } => Blame::Us,
            _ => Blame::Caller,
        }
    }
}

/// A live session. Positions `0..sent` are in frames that have left; `tokens` are all known ids.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
    pub(crate) sent: usize,
    pub(crate) max_tokens: u32,
    pub(crate) emitted: u32,
    pub(crate) sampling: Sampling,
    pub(crate) end_tokens: BTreeSet<u32>,
    pub(crate) context: u32,
    pub(crate) logits_hash: bool,
    /// `Open` has left: rows may follow, and the end must be told with `Close`.
    pub(crate) announced: bool,
    /// Its rows stay when it ends.
    pub(crate) keep: bool,
}

impl Session {
    pub(crate) fn new(request: SessionRequest, context: u32, vocab: u32) -> Result<Self, OpenError> {
        let context = context.min(request.context);
        let SessionRequest { prompt, max_tokens, sampling, end_tokens, logits_hash, .. } = request;
        if prompt.is_empty() {
            return Err(OpenError::EmptyPrompt);
        }
        if prompt.len() > context as usize {
            return Err(OpenError::PromptTooLong { tokens: prompt.len(), context });
        }
        if let Some(&token) = prompt.iter().find(|&&token| token >= vocab) {
            return Err(OpenError::BadToken { token, vocab });
        }
        if max_tokens == 0 {
            return Err(OpenError::NoTokens);
        }
        sampling.validate()?;
        Ok(Self {
            prompt_len: prompt.len(),
            tokens: prompt,
            sent: 0,
            max_tokens,
            emitted: 0,
            sampling,
            end_tokens,
            context,
            logits_hash,
            announced: false,
            keep: false,
        })
    }

    /// Known ids that have not been sent.
    pub(crate) fn pending(&self) -> &[u32] {
        self.tokens.get(self.sent..).unwrap_or_default()
    }

    /// The pending rows belong to the prompt.
    pub(crate) fn in_prefill(&self) -> bool {
        self.sent < self.prompt_len
    }

    /// Where the next row goes.
    pub(crate) fn position(&self) -> Position {
        Position(u32::try_from(self.sent).unwrap_or(u32::MAX))
    }

    /// Takes a sampled token: whether it is emitted, and whether the session ends with it.
    pub(crate) fn take(&mut self, token: u32) -> Taken {
        if self.end_tokens.contains(&token) {
            return Taken { emit: false, end: Some(FinishReason::Stop { token }) };
        }
        self.tokens.push(token);
        self.emitted = self.emitted.saturating_add(1);
        let end = if self.emitted >= self.max_tokens {
            Some(FinishReason::Length)
        } else if self.tokens.len() > self.context as usize {
            Some(FinishReason::ContextFull) // the token has no position to be fed at
        } else {
            None
        };
        Taken { emit: true, end }
    }
}

/// What became of a sampled token.
pub(crate) struct Taken {
    pub(crate) emit: bool,
    pub(crate) end: Option<FinishReason>,
}
