//! The coordinator's compute thread: it asks the scheduler what to do, runs the first stage, sends, and takes answers.
//!
//! With one node it is also the tail, and the loop closes on itself without a socket. Decisions are the scheduler's;
//! here are only hands and a clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, select};
use swarm_link::LinkError;
use swarm_model::{Stage, StepError};
use swarm_ring::{
    Action, Arrival, Event, LapTimes, OpenError, Scheduler, SessionError, SessionRequest, StepPlan, Telemetry,
};
use swarm_wire::{
    Blame, CloseCode, Control, Frame, FrameHead, FrameView, Hidden, Limits, Position, SessionId, StageTime,
    TokenOut, TokensView, patch_sent_us,
};

use crate::clock::now_us;
use crate::deadlines::{EXPLANATION, GRACE, IDLE};
use crate::error::{NodeError, chain};
use crate::inbox::{Inbound, Inbox, InboxEnd, Read};
use crate::outbox::Outbox;
use crate::refusals::Refusals;
use crate::room::{Note, NoteKind, Room};
use crate::runner::{Failure, StageRunner};
use crate::traffic::TRAFFIC;
use crate::watch::{LapTrace, Meter, TRACE_LAPS_MAX};

/// What the engine's callers ask of the compute thread.
pub(crate) enum Command {
    Open {
        request: Box<SessionRequest>,
        /// Keep the times of its laps.
        trace: bool,
        /// Leave its rows for the next request that begins with the same tokens.
        keep: bool,
        events: Sender<SessionNews>,
        reply: Sender<Result<SessionId, OpenError>>,
    },
    Cancel(SessionId),
    /// The logits of a whole prompt, in parts. Only where this node is alone.
    Logits {
        ids: Vec<u32>,
        reply: Sender<Result<Vec<f32>, String>>,
    },
    Stop,
}

/// What a session's owner hears.
pub(crate) enum SessionNews {
    Token {
        token: u32,
        logits_hash: Option<[u8; 32]>,
        at_us: u64,
    },
    /// A prompt chunk came round.
    Alive,
    Finished {
        reason: swarm_ring::FinishReason,
        telemetry: Box<SessionTelemetry>,
    },
}

/// Laps a session took part in, taken apart.
#[derive(Clone, Debug, Default)]
pub struct SessionTelemetry {
    /// When the first prompt chunk was decided on, in this node's microseconds.
    pub started_us: u64,
    /// Tokens of the prompt whose rows were there already.
    pub prompt_kept: usize,
    /// Laps with prompt rows.
    pub prefill: Telemetry,
    /// Laps of one token.
    pub decode: Telemetry,
    /// Bytes of the tokens frames of the decode laps.
    pub return_bytes: u64,
    /// Bytes sent to the next stage for the prompt.
    pub prompt_bytes: u64,
    /// Every lap's hops were measured with known clock offsets.
    pub hops_measured: bool,
    /// The laps themselves, where a trace was asked for.
    pub laps: Vec<LapTrace>,
}

/// The ring beyond the first stage, where there is one.
pub(crate) struct Ring {
    pub next: Outbox,
    /// Tokens from the tail.
    pub inbox: Inbox,
}

/// A lap on its way, for telemetry.
struct Departed {
    sessions: Vec<SessionId>,
    prefill: bool,
    bytes_out: u64,
}

/// A lap that came back, and is not yet in the telemetry.
struct Returned {
    departed: Departed,
    lap: u64,
    trail: Vec<StageTime>,
    arrival: Arrival,
    bytes_in: u64,
}

struct Owner {
    events: Sender<SessionNews>,
    telemetry: SessionTelemetry,
    trace: bool,
}

pub(crate) struct Coordinator {
    pub runner: StageRunner,
    pub scheduler: Scheduler,
    pub limits: Limits,
    pub ring: Option<Ring>,
    pub room: Room,
    pub commands: Receiver<Command>,
    /// The layers of each stage, coordinator first: an error names them with the node.
    pub layers: Vec<std::ops::Range<usize>>,
    /// Why the ring is down, for those who ask later.
    pub fault: std::sync::Arc<std::sync::Mutex<Option<String>>>,
    /// What others may read while this works.
    pub meter: std::sync::Arc<Meter>,
    pub kv_bytes: std::sync::Arc<AtomicU64>,
    pub refusals: std::sync::Arc<Refusals>,
    down: bool,
    owners: BTreeMap<SessionId, Owner>,
    departed: VecDeque<Departed>,
    returned: Vec<Returned>,
    plan: StepPlan,
    out: Vec<u8>,
    lap: LapTimes,
    /// When the last answer was here, if no step has followed it yet.
    answered_us: Option<u64>,
}

/// What outlives the compute thread: whom to place the layers on next, and the numbers that must not start anew.
pub(crate) struct Remains {
    pub room: Room,
    pub scheduler: Scheduler,
    /// The stage, until the next placement begins.
    pub stage: Option<Stage>,
}

/// Whether the loop goes on.
enum Flow {
    On,
    Stop,
}

impl Coordinator {
    pub fn new(
        runner: StageRunner,
        scheduler: Scheduler,
        limits: Limits,
        ring: Option<Ring>,
        room: Room,
        commands: Receiver<Command>,
    ) -> Self {
        Self {
            runner,
            scheduler,
            limits,
            ring,
            room,
            commands,
            layers: Vec::new(),
            fault: std::sync::Arc::default(),
            meter: std::sync::Arc::default(),
            kv_bytes: std::sync::Arc::default(),
            refusals: std::sync::Arc::default(),
            down: false,
            owners: BTreeMap::new(),
            departed: VecDeque::new(),
            returned: Vec::new(),
            plan: StepPlan::default(),
            out: Vec::new(),
            lap: LapTimes::default(),
            answered_us: None,
        }
    }

    /// Serves until told to stop. A lost ring ends its sessions with an error; later requests are refused with it.
    pub fn run(mut self) -> Remains {
        loop {
            let worked = self.work();
            self.deliver();
            let flow = match worked {
                Ok(Flow::On) => self.wait(),
                stopped_or_failed => stopped_or_failed,
            };
            match flow {
                Ok(Flow::On) => {}
                Ok(Flow::Stop) => break,
                Err(error) => self.ring_lost(&error),
            }
            self.deliver();
        }
        let text = "the engine was stopped".to_owned();
        self.scheduler.fail(&SessionError::RingLost { blame: Blame::Us, text });
        self.deliver();
        Remains { room: self.room, scheduler: self.scheduler, stage: Some(self.runner.into_stage()) }
    }

    /// Does what there is to do, looking at what has arrived between any two steps.
    fn work(&mut self) -> Result<Flow, NodeError> {
        loop {
            if let Flow::Stop = self.arrivals()? {
                return Ok(Flow::Stop);
            }
            let mut plan = std::mem::take(&mut self.plan);
            let action = self.scheduler.poll(now_us(), self.limits.tokens_max, &mut plan);
            self.plan = plan;
            match action {
                None => return Ok(Flow::On),
                Some(Action::Open(session)) => self.open(session)?,
                Some(Action::Close(session)) => self.close(session)?,
                Some(Action::Truncate(session, position)) => self.truncate(session, position)?,
                Some(Action::Step(head)) => {
                    self.step(head)?;
                    self.measure_returned();
                }
                Some(_) => {}
            }
            self.deliver();
        }
    }

    /// Takes answers, news and commands that are here already, without waiting. One node alone never waits while it
    /// has a session, so this is where it hears that the session was cancelled.
    fn arrivals(&mut self) -> Result<Flow, NodeError> {
        while let Some(inbound) = self.ring.as_ref().and_then(|ring| ring.inbox.frames.try_recv().ok()) {
            self.answer(inbound)?;
        }
        while !self.down
            && let Ok(note) = self.room.notes.try_recv()
        {
            self.note(note)?;
        }
        while let Ok(command) = self.commands.try_recv() {
            if let Flow::Stop = self.command(command) {
                return Ok(Flow::Stop);
            }
        }
        Ok(Flow::On)
    }

    fn command(&mut self, command: Command) -> Flow {
        match command {
            Command::Open { request, trace, keep, events, reply } => {
                let opened = self.scheduler.open(*request);
                self.admit(&opened, trace, keep, events);
                // A caller that has gone again cancels by dropping its end.
                let _ = reply.send(opened);
            }
            Command::Cancel(session) => {
                self.scheduler.cancel(session);
            }
            Command::Logits { ids, reply } => {
                let given = self.runner.logits(&ids, &mut |rows| reply.send(Ok(rows)).is_ok());
                if let Err(error) = given {
                    // Whoever asked may have gone again.
                    let _ = reply.send(Err(error.to_string()));
                }
            }
            Command::Stop => return Flow::Stop,
        }
        Flow::On
    }

    /// Waits for whatever comes first: a request, an answer, news of a member, or a deadline.
    fn wait(&mut self) -> Result<Flow, NodeError> {
        self.measure_returned();
        // Whatever else comes meanwhile is looked at when the answer is here, or `ANSWER_LOOK` later.
        if let Some(ring) = self.ring.as_ref().filter(|_| self.scheduler.frames_in_flight() > 0) {
            match ring.inbox.read() {
                Read::Frame(inbound) => return self.answer(inbound).map(|()| Flow::On),
                Read::Nothing => return self.in_time(),
                Read::Ended => return Err(self.tail_ended()),
                Read::Queue => {}
            }
        }
        let now = now_us();
        let deadline = self.scheduler.next_deadline_us();
        // A process that was stopped finds its deadline passed, and the answer that is here not yet decrypted.
        let within = deadline.map_or(IDLE, |at| Duration::from_micros(at.saturating_sub(now)).max(GRACE));
        let never = crossbeam_channel::never();
        let inbox = self.ring.as_ref().map_or(&never, |ring| &ring.inbox.frames);
        let silence = crossbeam_channel::never();
        let notes = if self.down { &silence } else { &self.room.notes };
        select! {
            recv(inbox) -> inbound => match inbound {
                Ok(inbound) => self.answer(inbound)?,
                Err(_) => return Err(self.tail_ended()),
            },
            recv(notes) -> note => {
                // The channel closes only with the room, which lives as long as this loop.
                if let Ok(note) = note {
                    self.note(note)?;
                }
            }
            recv(self.commands) -> command => return Ok(command.map_or(Flow::Stop, |command| self.command(command))),
            default(within) => return self.in_time(),
        }
        Ok(Flow::On)
    }

    /// Nothing came: ends the ring when that is for too long.
    fn in_time(&self) -> Result<Flow, NodeError> {
        match self.scheduler.overdue(now_us()) {
            Some(_) => Err(self.overdue(now_us())),
            None => Ok(Flow::On),
        }
    }

    fn admit(
        &mut self,
        opened: &Result<SessionId, OpenError>,
        trace: bool,
        keep: bool,
        events: Sender<SessionNews>,
    ) {
        let Ok(session) = *opened else { return };
        if keep {
            self.scheduler.keep(session);
        }
        let prompt_kept = self.scheduler.rows(session);
        let telemetry = SessionTelemetry { hops_measured: true, prompt_kept, ..SessionTelemetry::default() };
        self.owners.insert(session, Owner { events, telemetry, trace });
    }

    fn open(&mut self, session: SessionId) -> Result<(), NodeError> {
        let Some(open) = self.scheduler.open_message(session) else { return Ok(()) };
        Frame::Open(open).encode(&self.limits, &mut self.out).map_err(|e| ours(&e))?;
        let prompt = open.prompt.iter().copied();
        if let Err(failure) = self.runner.open(session, &open.sampling, prompt, open.logits_hash) {
            self.session_failed(&failure);
        }
        self.send_out().map(drop)
    }

    fn truncate(&mut self, session: SessionId, position: Position) -> Result<(), NodeError> {
        if let Err(failure) = self.runner.truncate(session, position.index()) {
            self.session_failed(&failure);
        }
        let frame = Frame::Truncate { epoch: self.scheduler.epoch(), session, position };
        frame.encode(&self.limits, &mut self.out).map_err(|e| ours(&e))?;
        self.send_out().map(drop)
    }

    fn close(&mut self, session: SessionId) -> Result<(), NodeError> {
        self.runner.close(session);
        let frame = Frame::Close { epoch: self.scheduler.epoch(), session };
        frame.encode(&self.limits, &mut self.out).map_err(|e| ours(&e))?;
        self.send_out().map(drop)
    }

    /// Sends the encoded frame to the next stage, if there is one, and gives the bytes it took.
    fn send_out(&mut self) -> Result<u64, NodeError> {
        let Some(ring) = &mut self.ring else { return Ok(0) };
        ring.next.send(&self.out).map(|bytes| bytes as u64).map_err(|error| self.link_ended(0, &error))
    }

    /// One step of the first stage: embed, layers, and on to the next stage (or, alone, the head and the sampler).
    fn step(&mut self, head: FrameHead) -> Result<(), NodeError> {
        let _under_way = TRAFFIC.step();
        let received_us = self.began_us();
        let sessions: Vec<SessionId> = self.plan.segments.iter().map(|segment| segment.session).collect();
        for session in &sessions {
            if let Some(owner) = self.owners.get_mut(session)
                && owner.telemetry.started_us == 0
            {
                owner.telemetry.started_us = received_us;
            }
        }
        let mut departed = Departed { sessions, prefill: self.plan.prefill, bytes_out: 0 };
        let mut segments = std::mem::take(&mut self.plan.segments);
        self.runner.embed(&self.plan.ids).map_err(unembedded)?;
        let started_us = now_us();
        let mut failures = self.runner.forward(&mut segments);
        if self.ring.is_none() {
            let items = self.runner.sample(&segments, &mut failures);
            let finished_us = now_us();
            self.fail_sessions(failures);
            let arrival = Arrival { arriving_us: finished_us, received_us: finished_us };
            self.departed.push_back(departed);
            let trail = vec![own_time(received_us, started_us, finished_us)];
            return self.lap_done(head, items.iter().copied(), trail, arrival, 0);
        }
        let finished_us = now_us();
        self.fail_sessions(failures);
        let trail = [own_time(received_us, started_us, finished_us)];
        let frame =
            Frame::Hidden(Hidden { head, segments: &segments, trail: &trail, rows: self.runner.rows() });
        frame.encode(&self.limits, &mut self.out).map_err(|e| ours(&e))?;
        patch_sent_us(&mut self.out, now_us()).map_err(|e| ours(&e))?;
        departed.bytes_out = self.send_out()?;
        self.departed.push_back(departed);
        self.plan.segments = segments;
        Ok(())
    }

    /// Where a lap of the coordinator begins: a token that waits for nothing but its predecessor begins when that one
    /// was here, so that laps follow each other without a gap; everything else begins now.
    fn began_us(&mut self) -> u64 {
        let answered = self.answered_us.take();
        let follows = !self.plan.prefill && self.scheduler.frames_in_flight() == 1;
        answered.filter(|_| follows).unwrap_or_else(now_us)
    }

    fn fail_sessions(&mut self, failures: Vec<Failure>) {
        for failure in failures {
            self.runner.close(failure.session);
            self.session_failed(&failure);
        }
    }

    fn session_failed(&mut self, failure: &Failure) {
        self.scheduler.session_failed(failure.session, failure.blame, &failure.text);
    }

    /// A frame from the tail.
    fn answer(&mut self, inbound: Inbound) -> Result<(), NodeError> {
        // The view borrows the bytes, the rest of the loop needs `self`.
        let limits = self.limits;
        match FrameView::decode(&inbound.bytes, &limits)
            .map_err(|e| self.bad_tail(e.to_string(), e.code()))?
        {
            FrameView::Tokens(view) => self.tokens(&view, &inbound)?,
            FrameView::Failed(failed) => match failed.session {
                Some(session) => {
                    self.scheduler.session_failed(session, failed.blame, failed.text);
                }
                None => {
                    let what = format!("a stage gave up: {}", failed.text.escape_debug());
                    return Err(self.bad_tail(what, CloseCode::Unexpected));
                }
            },
            _ => return Err(self.bad_tail("it sent something else than tokens", CloseCode::Unexpected)),
        }
        if let Some(ring) = &self.ring {
            ring.inbox.recycle(inbound);
        }
        Ok(())
    }

    fn tokens(&mut self, view: &TokensView<'_>, inbound: &Inbound) -> Result<(), NodeError> {
        self.lap_done(view.head, view.items(), view.trail().collect(), inbound.arrival, inbound.wire_bytes)
    }

    /// Gives a lap's tokens to the scheduler. Its times are noted when the next step is on its way.
    fn lap_done(
        &mut self,
        head: FrameHead,
        items: impl Iterator<Item = TokenOut> + Clone,
        trail: Vec<StageTime>,
        arrival: Arrival,
        bytes_in: u64,
    ) -> Result<(), NodeError> {
        self.answered_us = Some(arrival.received_us);
        if head.epoch == self.scheduler.epoch()
            && let Some(departed) = self.departed.pop_front()
        {
            self.returned.push(Returned { departed, lap: head.lap, trail, arrival, bytes_in });
        }
        let arrived = self.scheduler.lap_arrived(now_us(), head, items);
        arrived.map_err(|error| self.bad_tail(error.to_string(), CloseCode::Order))
    }

    fn bad_tail(&self, what: impl Into<String>, code: CloseCode) -> NodeError {
        NodeError::BadPeer { node: self.tail(), what: what.into(), code }
    }

    /// Notes the times of the laps that came back, for their sessions.
    fn measure_returned(&mut self) {
        let mut returned = std::mem::take(&mut self.returned);
        returned.drain(..).for_each(|lap| self.measure(lap));
        self.returned = returned;
    }

    fn measure(&mut self, returned: Returned) {
        let Returned { departed, lap, trail, arrival, bytes_in } = returned;
        let mut offsets = vec![Some(0)];
        offsets.extend(self.room.members.iter().map(|member| member.offset_us()));
        self.lap.read(&trail, &offsets, arrival);
        if !departed.prefill {
            self.meter.lap(&self.lap);
        }
        self.kv_bytes.store(self.runner.kv_bytes() as u64, Ordering::Relaxed);
        for session in &departed.sessions {
            let Some(owner) = self.owners.get_mut(session) else { continue };
            let telemetry = &mut owner.telemetry;
            if owner.trace && telemetry.laps.len() < TRACE_LAPS_MAX {
                let (trail, offsets_us) = (trail.to_vec(), offsets.clone());
                telemetry.laps.push(LapTrace { lap, prefill: departed.prefill, trail, offsets_us, arrival });
            }
            telemetry.hops_measured &= self.lap.hops_measured;
            if departed.prefill {
                let _ = owner.events.send(SessionNews::Alive);
                telemetry.prefill.add(&self.lap);
                telemetry.prompt_bytes += departed.bytes_out;
            } else {
                telemetry.decode.add(&self.lap);
                telemetry.return_bytes += bytes_in;
            }
        }
    }

    /// Tells the sessions' owners what happened. An owner that no longer listens cancels its session.
    fn deliver(&mut self) {
        let at_us = now_us();
        self.meter.sessions(self.scheduler.sessions());
        while let Some(event) = self.scheduler.next_event() {
            match event {
                Event::Token { session, token, logits_hash, .. } => {
                    self.meter.token(at_us);
                    let Some(owner) = self.owners.get(&session) else { continue };
                    if owner.events.send(SessionNews::Token { token, logits_hash, at_us }).is_err() {
                        self.scheduler.cancel(session);
                    }
                }
                Event::Finished { session, reason, .. } => {
                    self.measure_returned();
                    if let Some(Owner { events, telemetry, .. }) = self.owners.remove(&session) {
                        let _ = events.send(SessionNews::Finished { reason, telemetry: Box::new(telemetry) });
                    }
                }
                _ => {}
            }
        }
    }

    fn note(&mut self, note: Note) -> Result<(), NodeError> {
        match self.read(note) {
            // A stage that lost its neighbour says so as well, and may be heard before the neighbour is missed.
            Err(error @ (NodeError::Refused { blame: Blame::Link, .. } | NodeError::Broken { .. })) => {
                Err(self.explained(error))
            }
            read => read,
        }
    }

    fn read(&self, note: Note) -> Result<(), NodeError> {
        // Somebody who is not in this ring is no news to it.
        let member = self.room.members.iter().position(|member| member.id() == note.node);
        let Some(node) = member.map(|member| self.label(member)) else { return Ok(()) };
        match note.what {
            NoteKind::Lost(why) => Err(NodeError::Lost { node, what: format!("left the ring: {why}") }),
            NoteKind::Says(message) => match *message {
                Control::Refused(refused) if refused.epoch.is_none_or(|of| of == self.scheduler.epoch()) => {
                    let reason = crate::error::printable(&refused.reason);
                    let at = |id| self.room.members.iter().position(|member| member.id() == id);
                    if let Some(other) = refused.towards.and_then(at) {
                        // Both may be well, and the way between them not.
                        let link = format!("the link from {node} to {}", self.label(other));
                        self.room.note_broken(note.node, other);
                        return Err(NodeError::Broken { link, reason });
                    }
                    Err(NodeError::Refused { node, blame: refused.blame, reason })
                }
                _ => Ok(()),
            },
        }
    }

    /// The `member`-th worker's name and its layers.
    fn label(&self, member: usize) -> String {
        let name = self.room.members.get(member).map_or("a worker", |member| &member.name);
        match self.layers.get(member + 1) {
            Some(layers) => format!("{name} (layers {}..{})", layers.start, layers.end),
            None => name.to_owned(),
        }
    }

    fn tail(&self) -> String {
        self.label(self.room.members.len().saturating_sub(1))
    }

    /// A lap missed its deadline. Who is silent the heartbeats know; a node that answers them is slow.
    fn overdue(&self, now_us: u64) -> NodeError {
        let waited = self.scheduler.overdue(now_us).map_or(0, |(_, waited_ms)| waited_ms);
        let suspects = |suspect: bool| {
            let members = self.room.members.iter().enumerate();
            let which = members.filter(|(_, member)| !suspect || member.pulse.is_suspect());
            which.map(|(index, _)| self.label(index)).collect::<Vec<_>>().join(", ")
        };
        let silent = Some(suspects(true)).filter(|names| !names.is_empty());
        let what = match silent {
            Some(_) => format!("did not answer for {waited} ms"),
            None => format!("did not bring a lap back for {waited} ms, though heartbeats are answered"),
        };
        NodeError::Lost { node: silent.unwrap_or_else(|| suspects(false)), what }
    }

    fn tail_ended(&mut self) -> NodeError {
        let why = self.ring.as_ref().and_then(|ring| ring.inbox.end());
        why.as_ref().and_then(InboxEnd::code).into_iter().for_each(|code| self.refuse(code));
        let error = match why {
            Some(InboxEnd::Link(error)) => error,
            Some(InboxEnd::Told(code)) => {
                return self.explained(NodeError::Closed { node: self.tail(), code });
            }
            None => LinkError::Closed,
        };
        self.link_ended(self.room.members.len().saturating_sub(1), &error)
    }

    /// The data link with the `member`-th worker is gone.
    fn link_ended(&self, member: usize, error: &LinkError) -> NodeError {
        let node = self.label(member);
        self.explained(NodeError::Lost { node, what: format!("cannot be reached: {}", chain(error)) })
    }

    /// A link ends at both sides of a lost worker and beyond; who it was, its control connection tells at about the
    /// same time.
    fn explained(&self, mut error: NodeError) -> NodeError {
        let deadline = Instant::now() + EXPLANATION;
        while let Ok(note) = self.room.notes.recv_deadline(deadline) {
            match self.read(note) {
                Err(lost @ NodeError::Lost { .. }) => return lost,
                Err(_) if matches!(error, NodeError::Broken { .. }) => {}
                Err(other) => error = other,
                Ok(()) => {}
            }
        }
        error
    }

    /// Tells the tail why its link is about to be closed.
    fn refuse(&self, code: CloseCode) {
        if let Some(ring) = &self.ring {
            ring.inbox.refuse(&self.refusals, self.scheduler.epoch(), code);
        }
    }

    fn ring_lost(&mut self, error: &NodeError) {
        if let (NodeError::BadPeer { code, .. }, Some(tail)) = (error, self.room.members.last()) {
            // Only the tail speaks to this thread, and who breaks the protocol is done without.
            self.refuse(*code);
            self.room.give_up(tail, error.chain());
        }
        let text = error.chain();
        self.scheduler.fail(&SessionError::RingLost { blame: error.blame(), text: text.clone() });
        self.take_down(text);
    }

    /// No ring any more: links are closed, and those who ask are told why.
    fn take_down(&mut self, why: String) {
        let mut fault = self.fault.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        fault.get_or_insert(why);
        drop(fault);
        self.ring = None;
        self.down = true;
        self.runner.close_all();
        self.departed.clear();
        // Those who are still there forget the stage at once.
        self.room.release("the ring was lost");
    }
}

/// The times of the first stage. It receives nothing; the answer of the lap is received when it comes.
fn own_time(received_us: u64, started_us: u64, finished_us: u64) -> StageTime {
    let (arriving_us, sent_us) = (received_us, finished_us);
    StageTime { arriving_us, received_us, started_us, finished_us, sent_us, bytes_in: 0 }
}

/// The scheduler checked the ids; the file the rows come from is not in its hands.
fn unembedded(error: StepError) -> NodeError {
    match error {
        StepError::Embedding { .. } => NodeError::Stopped(error.to_string()),
        error => NodeError::Bug(error.to_string()),
    }
}

fn ours(error: &swarm_wire::EncodeError) -> NodeError {
    NodeError::Bug(format!("a frame cannot be encoded: {error}"))
}
