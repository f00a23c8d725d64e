//! The coordinator's sessions: what goes into the next frame, and what an answer means.
//!
//! A lap is one frame around the ring. The tail answers every lap with one tokens frame, in
//! order; a lap that sampled nothing is answered with no items. Everything a lap must bring back
//! is noted when it leaves, and an answer that is anything else is refused as a whole: a token is
//! never emitted because it looks plausible.

use std::collections::{BTreeMap, VecDeque};

use swarm_wire::{Blame, Epoch, FrameHead, Limits, Open, Position, SegmentHead, SessionId, TokenOut};

use crate::kept::Kept;
use crate::percentiles::Percentiles;
use crate::session::{FinishReason, OpenError, Session, SessionError, SessionRequest};
use crate::timers::{LapClock, LapSize, Timers};

/// How a scheduler behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// The placement the sessions run on.
    pub epoch: Epoch,
    /// Sizes of the data plane: rows and segments of a frame, vocabulary, context.
    pub limits: Limits,
    /// Sessions open at once.
    pub sessions_max: u32,
    /// Prompt rows in one frame. Smaller chunks fill the ring sooner and delay decoding less,
    /// larger ones use each pass over the weights better.
    pub chunk: u32,
    /// Decoding sessions are shared out among so many frames: with all in one, one stage would work while the others wait.
    pub stages: u32,
    /// Frames between the coordinator and the tail's answer. As many as there are stages keep all
    /// of them busy in prefill.
    pub frames_in_flight_max: u32,
    /// Deadlines.
    pub timers: Timers,
}

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The data plane's limits are refused.
    #[error("the limits of the data plane are refused")]
    Limits(#[from] swarm_wire::LimitsError),
    /// A number that must not be zero.
    #[error("{0} is zero; nothing could ever be sent")]
    Zero(&'static str),
}

/// What the caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Send `Open` for this session; [`Scheduler::open_message`] gives it. The stages may have rows of it: then it goes
    /// on from those, with the ids and the sampling of the message.
    Open(SessionId),
    /// Send `Truncate` for this session: the stages keep its rows before the position.
    Truncate(SessionId, Position),
    /// Embed, run and send the step that [`Scheduler::poll`] wrote into the plan, under this head.
    Step(FrameHead),
    /// Send `Close` for this session: the stages free its KV rows.
    Close(SessionId),
}

/// A session as another placement could go on with it: feed `tokens` to empty KV rows, and the next one sampled is
/// the one the user waits for. Sampling is keyed by seed and position, so it is the same token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReplayPoint<'a> {
    /// Which session.
    pub session: SessionId,
    /// All known ids, prompt first. Those after the prompt were shown.
    pub tokens: &'a [u32],
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// How the tail samples.
    pub sampling: swarm_wire::Sampling,
}

/// One frame's worth of rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Segments in row order, each session at most once.
    pub segments: Vec<SegmentHead>,
    /// Token ids to embed, `[tokens]` in row order.
    pub ids: Vec<u32>,
    /// The frame holds prompt rows.
    pub prefill: bool,
}

impl StepPlan {
    fn clear(&mut self) {
        self.segments.clear();
        self.ids.clear();
        self.prefill = false;
    }
}

/// What the sessions' owners are told, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A token to show. Emitted once, never taken back.
    Token {
        /// Whose token.
        session: SessionId,
        /// Where it stands.
        position: Position,
        /// Its id.
        token: u32,
        /// Digest of the logits, when the session asked for it.
        logits_hash: Option<[u8; 32]>,
    },
    /// The last event of a session.
    Finished {
        /// Which session.
        session: SessionId,
        /// Why.
        reason: FinishReason,
        /// Tokens emitted.
        tokens: u32,
    },
}

/// Why a tokens frame was refused. The tail broke the protocol: end the ring with
/// [`Scheduler::fail`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LapError {
    /// The peer is ahead of the coordinator, who alone raises the epoch.
    #[error("an answer of {got}, but the ring is at {current}")]
    FutureEpoch {
        /// In the frame.
        got: Epoch,
        /// The ring's.
        current: Epoch,
    },
    /// Not the lap that is due. Laps come back in order, each once.
    #[error("an answer to lap {got}, but {}", match due { Some(lap) => format!("lap {lap} is due"), None => "none is due".into() })]
    WrongLap {
        /// In the frame.
        got: u64,
        /// The oldest lap in flight.
        due: Option<u64>,
    },
    /// A token nobody asked for, or not there.
    #[error("lap {lap} brought a token for {session} at {position} that was not due")]
    Unexpected {
        /// The lap.
        lap: u64,
        /// In the item.
        session: SessionId,
        /// In the item.
        position: Position,
    },
    /// A live session's token is not in the answer.
    #[error("lap {lap} did not bring the token of {session} at {position}")]
    Missing {
        /// The lap.
        lap: u64,
        /// Whose token.
        session: SessionId,
        /// Where it was due.
        position: Position,
    },
    /// A token id the model does not have.
    #[error("lap {lap} brought token id {token}, which the model does not have")]
    BadToken {
        /// The lap.
        lap: u64,
        /// The id.
        token: u32,
    },
    /// A logits digest is there and was not asked for, or the other way round.
    #[error("lap {lap} brought a token with and without a logits digest at the wrong time")]
    Digest {
        /// The lap.
        lap: u64,
    },
}

impl LapError {
    /// The tail's fault.
    pub const fn blame(&self) -> Blame {
        Blame::Peer
    }
}

/// Totals since the scheduler was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames sent.
    pub laps: u64,
    /// Rows sent.
    pub rows: u64,
    /// Answers of an older epoch that were dropped.
    pub stale_answers: u64,
    /// Tokens that came for a session that had ended meanwhile.
    pub late_tokens: u64,
}

/// A frame on its way.
#[derive(Clone, Debug)]
struct Lap {
    lap: u64,
    sent_us: u64,
    size: LapSize,
    /// Tokens the answer must bring, in order.
    due: Vec<(SessionId, Position)>,
}

/// The coordinator's session logic. Pure: the caller gives the time, sends what [`Scheduler::poll`]
/// says, hands in what arrives, and reads [`Scheduler::next_event`].
#[derive(Clone, Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    sessions: BTreeMap<SessionId, Session>,
    kept: Option<Kept>,
    last_session: u64,
    last_lap: u64,
    actions: VecDeque<Action>,
    events: VecDeque<Event>,
    flight: VecDeque<Lap>,
    /// When the last answer came: the oldest lap in flight is waited for from then on.
    answered_us: u64,
    clock: LapClock,
    /// The session after which the next round starts, for rows of decode and of prefill.
    decode_turn: SessionId,
    prefill_turn: SessionId,
    /// The last frame was filled by decode rows while a prompt waited.
    prefill_first: bool,
    down: bool,
    counters: Counters,
}

impl Scheduler {
    /// A scheduler without sessions.
    ///
    /// # Errors
    /// [`ConfigError`] when nothing could ever be sent.
    pub fn new(config: SchedulerConfig) -> Result<Self, ConfigError> {
        config.limits.validate()?;
        for (what, value) in [
            ("sessions_max", config.sessions_max),
            ("chunk", config.chunk),
            ("stages", config.stages),
            ("frames_in_flight_max", config.frames_in_flight_max),
        ] {
            if value == 0 {
                return Err(ConfigError::Zero(what));
            }
        }
        Ok(Self {
            config,
            sessions: BTreeMap::new(),
            kept: None,
            last_session: 0,
            last_lap: 0,
            actions: VecDeque::new(),
            events: VecDeque::new(),
            flight: VecDeque::new(),
            answered_us: 0,
            clock: LapClock::default(),
            decode_turn: SessionId(0),
            prefill_turn: SessionId(0),
            prefill_first: false,
            down: false,
            counters: Counters::default(),
        })
    }

    /// Opens a session. Its id was never used before, in any epoch, except where it goes on from the rows that
    /// [`Scheduler::keep`] left: then it is that session's.
    ///
    /// # Errors
    /// [`OpenError`]; nothing was queued.
    pub fn open(&mut self, request: SessionRequest) -> Result<SessionId, OpenError> {
        if self.down {
            return Err(OpenError::RingDown);
        }
        let session = Session::new(request, self.config.limits.context_max, self.config.limits.vocab)?;
        if self.sessions.len() >= self.config.sessions_max as usize {
            return Err(OpenError::Busy { sessions_max: self.config.sessions_max });
        }
        let session = match self.resume(session) {
            Ok(id) => return Ok(id),
            Err(session) => session,
        };
        self.last_session += 1; // one per request: 2^64 of them do not happen
        let id = SessionId(self.last_session);
        self.sessions.insert(id, session);
        self.actions.push_back(Action::Open(id));
        Ok(id)
    }

    /// The rows of a live session stay when its answer ends, until another session opens that does not go on from them.
    pub fn keep(&mut self, session: SessionId) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.keep = true;
        }
    }

    /// Rows of a live session that have left, or were there before it.
    pub fn rows(&self, session: SessionId) -> usize {
        self.sessions.get(&session).map_or(0, |session| session.sent)
    }

    /// Goes on from the rows that are kept, or sends them away and gives the session back.
    fn resume(&mut self, mut session: Session) -> Result<SessionId, Session> {
        let Some(kept) = self.kept.take() else { return Err(session) };
        let common = kept.common(&session);
        // A token on its way is one of the old answer, and nothing tells it from one of the new.
        let awaited = |lap: &Lap| lap.due.iter().any(|(due, _)| *due == kept.id);
        let position = u32::try_from(common).ok().filter(|_| common > 0 && !self.flight.iter().any(awaited));
        let Some(position) = position else {
            self.actions.push_back(Action::Close(kept.id));
            return Err(session);
        };
        if common < kept.rows() {
            self.actions.push_back(Action::Truncate(kept.id, Position(position)));
        }
        self.actions.push_back(Action::Open(kept.id));
        session.sent = common;
        self.sessions.insert(kept.id, session);
        Ok(kept.id)
    }

    /// Ends a session at its user's wish. False when it had ended already.
    pub fn cancel(&mut self, session: SessionId) -> bool {
        self.finish(session, FinishReason::Cancelled)
    }

    /// The message that [`Action::Open`] asks for; `None` for a session that is not live.
    pub fn open_message(&self, id: SessionId) -> Option<Open<'_>> {
        let session = self.sessions.get(&id)?;
        Some(Open {
            epoch: self.config.epoch,
            session: id,
            sampling: session.sampling,
            prompt: session.tokens.get(..session.prompt_len)?,
            logits_hash: session.logits_hash,
        })
    }

    /// What to do now, or `None`: wait for an answer, a request or [`Scheduler::next_deadline_us`].
    /// Call until it gives `None`, and do the actions in order.
    ///
    /// Session messages come before the rows that need them. For [`Action::Step`] the rows are in
    /// `plan`, at most `budget_rows` of them: first every session whose next token is known, then
    /// prompt chunks, each kind in turn; prompt rows go first when they were left out before.
    pub fn poll(&mut self, now_us: u64, budget_rows: u32, plan: &mut StepPlan) -> Option<Action> {
        plan.clear();
        if self.down {
            return None;
        }
        if let Some(action) = self.actions.pop_front() {
            if let Action::Open(id) = action
                && let Some(session) = self.sessions.get_mut(&id)
            {
                session.announced = true;
            }
            return Some(action);
        }
        if self.flight.len() >= self.config.frames_in_flight_max as usize {
            return None;
        }
        self.fill(budget_rows.min(self.config.limits.tokens_max), plan);
        if plan.segments.is_empty() {
            return None;
        }
        Some(Action::Step(self.depart(now_us, plan)))
    }

    fn fill(&mut self, budget: u32, plan: &mut StepPlan) {
        let mut room = budget as usize;
        let prefill_first = std::mem::take(&mut self.prefill_first);
        if prefill_first {
            // Half of the frame, so that decoding does not stop either.
            let share = room.div_ceil(2);
            room -= share - self.add_prefill(share, plan);
        }
        room = self.add_decode(room, plan);
        if !prefill_first {
            let full = room == 0 || self.segments_left(plan) == 0;
            self.prefill_first = full && self.sessions.values().any(|session| session.in_prefill());
            self.add_prefill(room, plan);
        }
    }

    fn segments_left(&self, plan: &StepPlan) -> usize {
        (self.config.limits.segments_max as usize).saturating_sub(plan.segments.len())
    }

    /// Adds the rows of sessions whose next token is known, one stage's share of all; gives the room that is left.
    fn add_decode(&mut self, mut room: usize, plan: &mut StepPlan) -> usize {
        let decoding = self.sessions.values().filter(|session| !session.in_prefill()).count();
        let share = decoding.div_ceil(self.config.stages as usize);
        let ready = turn(&self.sessions, self.decode_turn, |session| !session.in_prefill());
        for id in ready.into_iter().take(share) {
            if room == 0 || self.segments_left(plan) == 0 {
                break;
            }
            room -= self.add_rows(id, room, plan);
            self.decode_turn = id;
        }
        room
    }

    /// Adds prompt rows, at most `chunk` in all; gives the room that is left.
    fn add_prefill(&mut self, room: usize, plan: &mut StepPlan) -> usize {
        let share = room.min(self.config.chunk as usize);
        let mut left = share;
        for id in turn(&self.sessions, self.prefill_turn, Session::in_prefill) {
            if left == 0 || self.segments_left(plan) == 0 {
                break;
            }
            left -= self.add_rows(id, left, plan);
            plan.prefill = true;
            self.prefill_turn = id;
        }
        room - (share - left)
    }

    /// Adds at most `room` pending rows of a session, and says how many.
    fn add_rows(&mut self, id: SessionId, room: usize, plan: &mut StepPlan) -> usize {
        let Some(session) = self.sessions.get_mut(&id) else { return 0 };
        let pending = session.pending();
        let rows = pending.len().min(room);
        let Some(ids) = pending.get(..rows) else { return 0 };
        let sample = rows == pending.len();
        plan.ids.extend_from_slice(ids);
        let position = session.position();
        plan.segments.push(SegmentHead { session: id, position, tokens: rows as u32, sample });
        session.sent += rows;
        rows
    }

    fn depart(&mut self, now_us: u64, plan: &StepPlan) -> FrameHead {
        self.last_lap += 1;
        let lap = self.last_lap;
        let due = |segment: &SegmentHead| {
            let position = segment.position.after(segment.tokens)?;
            segment.sample.then_some((segment.session, position))
        };
        let rows = plan.ids.len() as u64;
        self.counters.laps += 1;
        self.counters.rows += rows;
        self.flight.push_back(Lap {
            lap,
            sent_us: now_us,
            size: LapSize { rows, prefill: plan.prefill },
            due: plan.segments.iter().filter_map(due).collect(),
        });
        FrameHead { epoch: self.config.epoch, lap }
    }

    /// Takes the tail's answer to a lap. It is checked as a whole before the first token of it is
    /// emitted. An answer of an older epoch is dropped and counted.
    ///
    /// # Errors
    /// [`LapError`]; nothing was emitted, and the ring should be ended with [`Scheduler::fail`].
    pub fn lap_arrived(
        &mut self,
        now_us: u64,
        head: FrameHead,
        items: impl Iterator<Item = TokenOut> + Clone,
    ) -> Result<(), LapError> {
        if head.epoch > self.config.epoch {
            return Err(LapError::FutureEpoch { got: head.epoch, current: self.config.epoch });
        }
        if head.epoch < self.config.epoch || self.down {
            self.counters.stale_answers += 1;
            return Ok(());
        }
        let due = self.flight.front().map(|lap| lap.lap);
        let Some(lap) = self.flight.front().filter(|lap| lap.lap == head.lap) else {
            return Err(LapError::WrongLap { got: head.lap, due });
        };
        self.check_items(lap, items.clone())?;
        let (size, lap_us) = (lap.size, now_us.saturating_sub(lap.sent_us));
        self.flight.pop_front();
        self.clock.add(size, lap_us);
        self.answered_us = now_us;
        for item in items {
            self.take(item);
        }
        Ok(())
    }

    /// The items must be the due tokens in order. Those of sessions that ended meanwhile may be
    /// there or not: a stage that failed one drops its rows.
    fn check_items(&self, lap: &Lap, items: impl Iterator<Item = TokenOut>) -> Result<(), LapError> {
        let number = lap.lap;
        let mut due = lap.due.iter().copied();
        let live = |id: &SessionId| self.sessions.contains_key(id);
        for item in items {
            let TokenOut { session, position, token, logits_hash } = item;
            loop {
                match due.next() {
                    Some(next) if next == (session, position) => break,
                    Some((missing, position)) if live(&missing) => {
                        // Name what is wrong rather than what is absent, if this item never was due.
                        if !lap.due.contains(&(session, item.position)) {
                            return Err(LapError::Unexpected {
                                lap: number,
                                session,
                                position: item.position,
                            });
                        }
                        return Err(LapError::Missing { lap: number, session: missing, position });
                    }
                    Some(_) => {}
                    None => return Err(LapError::Unexpected { lap: number, session, position }),
                }
            }
            if token >= self.config.limits.vocab {
                return Err(LapError::BadToken { lap: number, token });
            }
            let wanted = self.sessions.get(&session).map(|session| session.logits_hash);
            if wanted.is_some_and(|wanted| wanted != logits_hash.is_some()) {
                return Err(LapError::Digest { lap: number });
            }
        }
        match due.find(|(session, _)| live(session)) {
            Some((session, position)) => Err(LapError::Missing { lap: number, session, position }),
            None => Ok(()),
        }
    }

    fn take(&mut self, item: TokenOut) {
        let TokenOut { session: id, position, token, logits_hash } = item;
        let Some(session) = self.sessions.get_mut(&id) else {
            self.counters.late_tokens += 1;
            return;
        };
        let taken = session.take(token);
        if taken.emit {
            self.events.push_back(Event::Token { session: id, position, token, logits_hash });
        }
        if let Some(reason) = taken.end {
            self.finish(id, reason);
        }
    }

    fn finish(&mut self, id: SessionId, reason: FinishReason) -> bool {
        let Some(session) = self.sessions.remove(&id) else { return false };
        if let Some(kept) = Kept::of(id, &session, &reason) {
            let before = self.kept.replace(kept);
            self.actions.extend(before.map(|before| Action::Close(before.id)));
        } else if session.announced {
            self.actions.push_back(Action::Close(id));
        } else {
            let opening = |action: &Action| matches!(action, Action::Open(which) | Action::Truncate(which, _) if *which == id);
            self.actions.retain(|action| !opening(action));
            // One that was to go on from rows leaves them behind.
            self.actions.extend((session.sent > 0).then_some(Action::Close(id)));
        }
        self.events.push_back(Event::Finished { session: id, reason, tokens: session.emitted });
        true
    }

    /// A stage failed one session: it ends with an error and is closed on the other stages. False
    /// when it had ended already.
    pub fn session_failed(&mut self, session: SessionId, blame: Blame, text: &str) -> bool {
        if let Some(kept) = self.kept.take_if(|kept| kept.id == session) {
            self.actions.push_back(Action::Close(kept.id));
        }
        let error = SessionError::StageFailed { blame, text: text.to_owned() };
        self.finish(session, FinishReason::Error(error))
    }

    /// The ring is lost: every session ends with `error`, nothing more is sent until
    /// [`Scheduler::start_epoch`].
    pub fn fail(&mut self, error: &SessionError) {
        self.down = true;
        self.kept = None;
        self.flight.clear();
        while let Some((id, session)) = self.sessions.pop_first() {
            let reason = FinishReason::Error(error.clone());
            self.events.push_back(Event::Finished { session: id, reason, tokens: session.emitted });
        }
        // The stages forget all sessions with the epoch, so there is nothing to close.
        self.actions.clear();
    }

    /// Goes on with a new placement. False, and nothing done, unless `epoch` is higher than the
    /// last one. Sessions still live end with an error.
    pub fn start_epoch(&mut self, epoch: Epoch, limits: Limits) -> Result<bool, ConfigError> {
        limits.validate()?;
        if epoch <= self.config.epoch {
            return Ok(false);
        }
        let text = "the ring was placed anew".to_owned();
        self.fail(&SessionError::RingLost { blame: Blame::Link, text });
        self.config.epoch = epoch;
        self.config.limits = limits;
        self.clock = LapClock::default();
        self.down = false;
        Ok(true)
    }

    /// What a placement decides: stages, one frame for each on its way and one more, and prompt rows in one frame.
    pub fn set_ring(&mut self, stages: u32, chunk: u32) {
        self.config.stages = stages.max(1);
        self.config.frames_in_flight_max = stages.saturating_add(1);
        self.config.chunk = chunk.max(1);
    }

    /// Where every live session stands: what a placement that goes on with it would have to compute again. A ring
    /// that fails ends them all today, so ask before [`Scheduler::fail`].
    pub fn replay_points(&self) -> impl Iterator<Item = ReplayPoint<'_>> {
        self.sessions.iter().map(|(&session, state)| ReplayPoint {
            session,
            tokens: &state.tokens,
            prompt_len: state.prompt_len,
            sampling: state.sampling,
        })
    }

    /// When [`Scheduler::tick`] must be called at the latest; `None` while nothing is in flight.
    pub fn next_deadline_us(&self) -> Option<u64> {
        let lap = self.flight.front()?;
        Some(self.waited_from_us(lap).saturating_add(self.clock.allowance_us(&self.config.timers, lap.size)))
    }

    /// Laps are answered in order, so the oldest one is waited for since the answer before it.
    fn waited_from_us(&self, lap: &Lap) -> u64 {
        lap.sent_us.max(self.answered_us)
    }

    /// The lap that is overdue, and how many milliseconds it was waited for.
    pub fn overdue(&self, now_us: u64) -> Option<(u64, u64)> {
        if now_us < self.next_deadline_us()? {
            return None;
        }
        let lap = self.flight.front()?;
        Some((lap.lap, now_us.saturating_sub(self.waited_from_us(lap)) / 1000))
    }

    /// Ends the ring when a lap is overdue, and gives the reason that all its sessions ended with.
    pub fn tick(&mut self, now_us: u64) -> Option<SessionError> {
        let (lap, waited_ms) = self.overdue(now_us)?;
        let error = SessionError::NodeSilent { lap, waited_ms };
        self.fail(&error);
        Some(error)
    }

    /// The oldest event that was not read yet.
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// All known ids of a live session, prompt first: what a replay needs.
    pub fn tokens(&self, session: SessionId) -> Option<&[u32]> {
        self.sessions.get(&session).map(|session| session.tokens.as_slice())
    }

    /// Live sessions.
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Frames whose answer is due.
    pub fn frames_in_flight(&self) -> usize {
        self.flight.len()
    }

    /// The current placement's number.
    pub fn epoch(&self) -> Epoch {
        self.config.epoch
    }

    /// The ring failed and no new epoch has begun.
    pub fn is_down(&self) -> bool {
        self.down
    }

    /// Totals.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Measured decode laps of this epoch.
    pub fn decode_lap_us(&self) -> &Percentiles {
        self.clock.decode_us()
    }
}

/// Announced sessions with rows to send that satisfy `which`, starting after `last` and going
/// around once.
fn turn(
    sessions: &BTreeMap<SessionId, Session>,
    last: SessionId,
    which: impl Fn(&Session) -> bool,
) -> Vec<SessionId> {
    use std::ops::Bound::{Excluded, Included, Unbounded};
    let after = sessions.range((Excluded(last), Unbounded));
    let before = sessions.range((Unbounded, Included(last)));
    let ready = |session: &Session| session.announced && !session.pending().is_empty() && which(session);
    after.chain(before).filter(|(_, session)| ready(session)).map(|(id, _)| *id).collect()
}
