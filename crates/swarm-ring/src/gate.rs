//! What may touch a stage's KV rows: the admission of frames, and the book of sessions and positions.
//!
//! A link delivers its bytes in order and once, so a frame that is out of order, repeated or of another
//! placement is never bad luck: it is a straggler, which is dropped, or the peer's fault, which ends the link.

use std::collections::BTreeMap;

use swarm_wire::{
    Blame, CloseCode, DataKind, DecodeError, Epoch, FrameKind, FrameView, Limits, Position, SegmentHead,
    SessionId, peek,
};

/// The admission of frames at a stage: epoch, kind, limits, lap order.
#[derive(Clone, Debug)]
pub struct Gate {
    epoch: Epoch,
    limits: Limits,
    last_lap: Option<u64>,
    stale: u64,
}

/// Why a frame ends its link. Always the sender's fault.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GateError {
    /// The bytes are no frame within the limits agreed on.
    #[error("it sent a frame that cannot be read: {0}")]
    Malformed(#[from] DecodeError),
    /// Only the coordinator raises the epoch, and it tells the stages first.
    #[error("its placement is newer than this stage knows: {got} instead of {current}")]
    FutureEpoch {
        /// In the frame.
        got: Epoch,
        /// The stage's.
        current: Epoch,
    },
    /// Tokens come from the tail and go to the coordinator.
    #[error("it sent tokens down the ring")]
    Tokens,
    /// A lap was lost, repeated or overtaken.
    #[error("it sent lap {got}, but lap {due} is due")]
    LapOrder {
        /// In the frame.
        got: u64,
        /// One after the last.
        due: u64,
    },
}

impl GateError {
    /// The sender's fault.
    pub const fn blame(&self) -> Blame {
        Blame::Peer
    }

    /// What the sender is told when its link is closed.
    pub const fn code(&self) -> CloseCode {
        match self {
            Self::Malformed(error) => error.code(),
            Self::FutureEpoch { .. } => CloseCode::Epoch,
            Self::Tokens => CloseCode::Unexpected,
            Self::LapOrder { .. } => CloseCode::Order,
        }
    }
}

impl Gate {
    /// The gate of a stage in the placement `epoch`.
    pub fn new(epoch: Epoch, limits: Limits) -> Self {
        Self { epoch, limits, last_lap: None, stale: 0 }
    }

    /// Decodes a frame that may go on to the sessions. `None` for a frame of an older placement, which is counted
    /// and dropped before anything else of it is read: the limits it was made for may be gone.
    ///
    /// # Errors
    /// [`GateError`]; close the link. Nothing of the frame was taken.
    pub fn admit<'b>(&mut self, bytes: &'b [u8]) -> Result<Option<FrameView<'b>>, GateError> {
        let head = peek(bytes)?;
        if head.epoch < self.epoch {
            self.stale = self.stale.saturating_add(1);
            return Ok(None);
        }
        if head.epoch > self.epoch {
            return Err(GateError::FutureEpoch { got: head.epoch, current: self.epoch });
        }
        if !head.kind.belongs_on(DataKind::Hidden) || head.kind == FrameKind::Tokens {
            return Err(GateError::Tokens);
        }
        let view = FrameView::decode(bytes, &self.limits)?;
        if let FrameView::Hidden(hidden) = &view {
            self.lap(hidden.head.lap)?;
        }
        Ok(Some(view))
    }

    /// Every lap passes every stage, whatever became of its sessions on the way.
    fn lap(&mut self, got: u64) -> Result<(), GateError> {
        if let Some(due) = self.last_lap.map(|last| last.saturating_add(1))
            && got != due
        {
            return Err(GateError::LapOrder { got, due });
        }
        self.last_lap = Some(got);
        Ok(())
    }

    /// The placement.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Frames of older placements that were dropped.
    pub fn stale(&self) -> u64 {
        self.stale
    }
}

/// The sessions of a stage and how many KV rows each has.
#[derive(Clone, Debug)]
pub struct SessionBook {
    sessions_max: usize,
    rows: BTreeMap<SessionId, u32>,
    last_opened: Option<SessionId>,
}

/// Why a session cannot go on at this stage. The others of the frame are unaffected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Opened twice.
    #[error("{0} is open already")]
    OpenAlready(SessionId),
    /// A coordinator counts its sessions up, so this one is repeated or late. It would never be closed.
    #[error("{0} was opened before, or a later one was")]
    OpenedBefore(SessionId),
    /// No place is left.
    #[error("{0} sessions are open, no more were agreed")]
    Full(usize),
    /// Rows or a message for a session that is not here.
    #[error("{0} is not open here")]
    Unknown(SessionId),
    /// Rows that do not follow the ones here: some are missing, or come again.
    #[error("rows for {got}, but {want} is due")]
    OutOfOrder {
        /// Rows that are here.
        want: Position,
        /// In the frame.
        got: Position,
    },
    /// More rows to be kept than there are.
    #[error("rows up to {got} cannot be kept of {have}")]
    Beyond {
        /// Rows that are here.
        have: Position,
        /// In the message.
        got: Position,
    },
}

impl Refusal {
    /// Whose fault it is.
    pub const fn blame(&self) -> Blame {
        match self {
            Self::Full(_) => Blame::Caller,
            _ => Blame::Peer,
        }
    }
}

impl SessionBook {
    /// No sessions yet, and never more than `sessions_max`.
    pub fn new(sessions_max: usize) -> Self {
        Self { sessions_max, rows: BTreeMap::new(), last_opened: None }
    }

    /// Enters a session without rows.
    ///
    /// # Errors
    /// [`Refusal::OpenAlready`], which leaves the session as it is, [`Refusal::OpenedBefore`] or [`Refusal::Full`].
    pub fn open(&mut self, session: SessionId) -> Result<(), Refusal> {
        if self.rows.contains_key(&session) {
            return Err(Refusal::OpenAlready(session));
        }
        if self.last_opened.is_some_and(|last| session <= last) {
            return Err(Refusal::OpenedBefore(session));
        }
        if self.rows.len() >= self.sessions_max {
            return Err(Refusal::Full(self.sessions_max));
        }
        self.last_opened = Some(session);
        self.rows.insert(session, 0);
        Ok(())
    }

    /// Whether a session is here.
    pub fn is_open(&self, session: SessionId) -> bool {
        self.rows.contains_key(&session)
    }

    /// Forgets a session; false when it is not here, which is no error: it may have failed here before.
    pub fn close(&mut self, session: SessionId) -> bool {
        self.rows.remove(&session).is_some()
    }

    /// Forgets all.
    pub fn close_all(&mut self) {
        self.rows.clear();
    }

    /// Keeps the first `position` rows of a session.
    ///
    /// # Errors
    /// [`Refusal::Unknown`]; [`Refusal::Beyond`] when there are fewer. Nothing was done.
    pub fn truncate(&mut self, session: SessionId, position: Position) -> Result<(), Refusal> {
        let rows = self.rows.get_mut(&session).ok_or(Refusal::Unknown(session))?;
        if position.0 > *rows {
            return Err(Refusal::Beyond { have: Position(*rows), got: position });
        }
        *rows = position.0;
        Ok(())
    }

    /// Whether a segment's rows come next. Call [`SessionBook::grew`] when they are in the KV cache.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] or [`Refusal::OutOfOrder`].
    pub fn check(&self, segment: &SegmentHead) -> Result<(), Refusal> {
        let rows = self.rows.get(&segment.session).ok_or(Refusal::Unknown(segment.session))?;
        if segment.position.0 == *rows {
            return Ok(());
        }
        Err(Refusal::OutOfOrder { want: Position(*rows), got: segment.position })
    }

    /// A segment's rows are in the KV cache.
    pub fn grew(&mut self, segment: &SegmentHead) {
        if let Some(rows) = self.rows.get_mut(&segment.session) {
            *rows = rows.saturating_add(segment.tokens);
        }
    }

    /// Sessions that are open.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// No session is open.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// KV rows of all sessions.
    pub fn rows(&self) -> u64 {
        self.rows.values().map(|&rows| u64::from(rows)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_wire::{Frame, FrameHead, Hidden};

    const LIMITS: Limits =
        Limits { width: 1, vocab: 9, context_max: 8, tokens_max: 4, segments_max: 2, stages_max: 2 };

    fn hidden(epoch: u32, lap: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let head = FrameHead { epoch: Epoch(epoch), lap };
        Frame::Hidden(Hidden { head, segments: &[], trail: &[], rows: &[] })
            .encode(&LIMITS, &mut out)
            .unwrap();
        out
    }

    fn segment(session: u64, position: u32, tokens: u32) -> SegmentHead {
        SegmentHead { session: SessionId(session), position: Position(position), tokens, sample: false }
    }

    #[test]
    fn stragglers_are_dropped_and_counted_and_the_future_ends_the_link() {
        let mut gate = Gate::new(Epoch(7), LIMITS);
        assert_eq!(gate.admit(&hidden(6, 90)), Ok(None));
        // What follows the first eight bytes of a straggler is nobody's business.
        assert_eq!(gate.admit(&hidden(6, 90)[..8]), Ok(None));
        assert_eq!(gate.stale(), 2);
        assert!(gate.admit(&hidden(7, 3)).unwrap().is_some());
        let future = GateError::FutureEpoch { got: Epoch(8), current: Epoch(7) };
        assert_eq!(gate.admit(&hidden(8, 4)), Err(future));
        assert!(matches!(gate.admit(&hidden(7, 4)[..9]), Err(GateError::Malformed(_))));
        let mut tokens = hidden(7, 4);
        tokens[0] = 5;
        assert_eq!(gate.admit(&tokens), Err(GateError::Tokens));
        // None of them counted as a lap.
        assert!(gate.admit(&hidden(7, 4)).unwrap().is_some());
    }

    #[test]
    fn laps_come_once_and_in_order() {
        let mut gate = Gate::new(Epoch(1), LIMITS);
        assert!(gate.admit(&hidden(1, 5)).is_ok());
        for got in [5, 7, 4, 0] {
            assert_eq!(gate.admit(&hidden(1, got)), Err(GateError::LapOrder { got, due: 6 }));
        }
        assert!(gate.admit(&hidden(1, 6)).is_ok());
    }

    #[test]
    fn rows_follow_each_other_without_gap_or_repeat() {
        let mut book = SessionBook::new(2);
        assert_eq!(book.check(&segment(1, 0, 3)), Err(Refusal::Unknown(SessionId(1))));
        book.open(SessionId(1)).unwrap();
        assert_eq!(book.open(SessionId(1)), Err(Refusal::OpenAlready(SessionId(1))));
        book.open(SessionId(2)).unwrap();
        assert_eq!(book.open(SessionId(3)), Err(Refusal::Full(2)));
        book.check(&segment(1, 0, 3)).unwrap();
        book.grew(&segment(1, 0, 3));
        for got in [0, 2, 4] {
            let refusal = Refusal::OutOfOrder { want: Position(3), got: Position(got) };
            assert_eq!(book.check(&segment(1, got, 1)), Err(refusal));
        }
        assert!(book.truncate(SessionId(1), Position(4)).is_err());
        book.truncate(SessionId(1), Position(1)).unwrap();
        book.check(&segment(1, 1, 1)).unwrap();
        assert_eq!((book.len(), book.rows()), (2, 1));
        assert!(book.close(SessionId(1)) && !book.close(SessionId(1)));
        assert_eq!(book.open(SessionId(1)), Err(Refusal::OpenedBefore(SessionId(1))));
        book.close_all();
        assert!(book.is_empty());
    }
}
