//! A session whose rows stay when its answer ends, for a next request that begins with the same tokens: a conversation
//! computes only what was said since.
//!
//! At most one, so that rows nobody may ever ask for again take no more memory than one answer does: whatever else
//! opens sends it away.

use swarm_wire::SessionId;

use crate::session::{FinishReason, Session};

/// Rows on all stages that no answer uses.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) id: SessionId,
    /// The ids of the rows.
    ids: Vec<u32>,
}

impl Kept {
    /// What is left of a session that ended, if it was asked to leave something.
    pub(crate) fn of(id: SessionId, session: &Session, reason: &FinishReason) -> Option<Self> {
        let ended =
            matches!(reason, FinishReason::Stop { .. } | FinishReason::Length | FinishReason::Cancelled);
        let ids = session.tokens.get(..session.sent)?;
        (session.keep && ended && session.announced && !ids.is_empty())
            .then(|| Self { id, ids: ids.to_vec() })
    }

    /// How many rows of it a new session goes on from: those of the tokens that both begin with, less one where the
    /// prompt has no other, for something has to be computed to sample from.
    pub(crate) fn common(&self, session: &Session) -> usize {
        let common = self.ids.iter().zip(&session.tokens).take_while(|(kept, asked)| kept == asked).count();
        common.min(session.tokens.len().saturating_sub(1))
    }

    /// How many rows it has.
    pub(crate) fn rows(&self) -> usize {
        self.ids.len()
    }
}
