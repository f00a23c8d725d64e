//! Sequences of frames, answers and times against `swarm-ring`: the admission and the book of a stage beside a
//! coordinator's scheduler, whatever comes in whatever order.
//!
//! An input is a script: a byte chooses what happens, the bytes after it choose its numbers. Most frames are sound
//! but for one number; some are any bytes at all.

use std::collections::BTreeMap;

use swarm_ring::{
    Action, Event, FinishReason, Gate, Heartbeat, Scheduler, SchedulerConfig, SessionBook, SessionError,
    SessionRequest, StepPlan, Timers,
};
use swarm_wire::{
    Blame, Epoch, Frame, FrameHead, FrameView, Hidden, Position, Sampling, SegmentHead, SessionId, TokenOut,
};

use super::frames::LIMITS;
use super::{Shape, Target, outcome};

pub const SEQUENCES: Target =
    Target { name: "sequences", shape: Shape::Binary, words: &[], seeds, run, runs: 80_000 };

/// Scripts in which sessions are opened, stepped and answered; the fuzzer breaks them.
fn seeds() -> Vec<Vec<u8>> {
    let lap: Vec<u8> = [&[1][..], &[2], &[1], &[2]].concat();
    let session = [vec![0, 5, 3, 0], lap.repeat(6)].concat();
    let strangers = vec![3, 1, 0, 0, 1, 2, 0, 4, 2, 3, 1, 0, 4, 0, 6, 1, 7, 1, 1, 9, 200];
    vec![
        session.clone(),
        [session.clone(), vec![8, 0], session.clone(), vec![10, 255, 255], session.clone()].concat(),
        [session.clone(), strangers.clone(), session.clone()].concat(),
        strangers,
        vec![0, 9, 9, 1, 0, 2, 2, 0, 1, 1, 1, 1, 2, 5, 0, 1, 0, 11, 11, 4, 2, 1],
    ]
}

struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    fn number(&mut self) -> u32 {
        u32::from(self.byte().unwrap_or(0))
    }

    fn rest(&mut self, len: usize) -> Vec<u8> {
        let (part, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        part.to_vec()
    }
}

/// What the owner of a session was told.
struct Told {
    prompt: u32,
    max_tokens: u32,
    tokens: u32,
}

struct World {
    scheduler: Scheduler,
    gate: Gate,
    book: SessionBook,
    /// What a KV cache would hold: kept beside the book, by the frames that were let through.
    kv: BTreeMap<SessionId, u32>,
    last_lap: Option<u64>,
    told: BTreeMap<SessionId, Told>,
    /// Laps whose answer is due, with the tokens it must bring.
    flight: Vec<(FrameHead, Vec<TokenOut>)>,
    heartbeat: Heartbeat,
    now_us: u64,
    trace: u64,
}

fn run(bytes: &[u8]) -> u64 {
    let mut world = World::new();
    let mut script = Script(bytes);
    for _ in 0..400 {
        let Some(what) = script.byte() else { break };
        world.now_us = world.now_us.saturating_add(1_000);
        world.step(what % 13, &mut script);
        world.read_events();
        assert!(world.scheduler.frames_in_flight() <= 3 && world.scheduler.sessions() <= 2);
    }
    world.trace
}

impl World {
    fn new() -> Self {
        let config = SchedulerConfig {
            epoch: Epoch(2),
            limits: LIMITS,
            sessions_max: 2,
            chunk: 3,
            frames_in_flight_max: 3,
            stages: 2,
            timers: Timers::default(),
        };
        Self {
            scheduler: Scheduler::new(config).expect("a sound configuration"),
            gate: Gate::new(Epoch(2), LIMITS),
            book: SessionBook::new(2),
            kv: BTreeMap::new(),
            last_lap: None,
            told: BTreeMap::new(),
            flight: Vec::new(),
            heartbeat: Heartbeat::default(),
            now_us: 0,
            trace: 0,
        }
    }

    fn saw(&mut self, what: &str) {
        // The order of kinds of outcomes, shortened: enough to tell scripts apart.
        self.trace = (self.trace.rotate_left(5) ^ outcome(what)) & 0xffff;
    }

    fn step(&mut self, what: u8, script: &mut Script<'_>) {
        match what {
            0 => self.open(script),
            1 => self.poll(8),
            2 => self.answer_well(),
            3 => self.stray_hidden(script),
            4 => self.stray_answer(script),
            5 => {
                let bytes = script.rest(48);
                self.arrive(&bytes);
            }
            6 | 7 => self.stray_message(what, script),
            8 => {
                let epoch = Epoch(self.scheduler.epoch().0.wrapping_add(script.number() % 3));
                if let Ok(true) = self.scheduler.start_epoch(epoch, LIMITS) {
                    (self.gate, self.book) = (Gate::new(epoch, LIMITS), SessionBook::new(2));
                    self.kv.clear();
                    self.last_lap = None;
                    self.flight.clear();
                }
            }
            9 => {
                let _ = self.scheduler.cancel(SessionId(script.number().into()));
            }
            10 => {
                self.now_us =
                    self.now_us.saturating_add(u64::from(script.number()) << (script.number() % 64));
                if self.scheduler.tick(self.now_us).is_some() {
                    assert!(self.scheduler.is_down());
                    self.saw("overdue");
                }
            }
            11 => {
                let _ =
                    self.scheduler.session_failed(SessionId(script.number().into()), Blame::Us, "x\u{1b}");
            }
            _ => {
                if script.number().is_multiple_of(2) {
                    self.heartbeat.pong();
                } else {
                    let _ = self.heartbeat.ping();
                }
                if script.number() == 255 {
                    self.scheduler.fail(&SessionError::RingLost { blame: Blame::Link, text: "x".into() });
                }
            }
        }
    }

    fn open(&mut self, script: &mut Script<'_>) {
        let (len, max_tokens) = (script.number() % 70, script.number() % 9);
        let request = SessionRequest {
            prompt: (0..len).map(|at| at % LIMITS.vocab).collect(),
            max_tokens,
            sampling: Sampling::default(),
            end_tokens: [script.number()].into(),
            context: LIMITS.context_max,
            logits_hash: false,
        };
        if let Ok(id) = self.scheduler.open(request) {
            let told = Told { prompt: len, max_tokens, tokens: 0 };
            assert!(self.told.insert(id, told).is_none(), "an id was given twice");
        }
    }

    /// The coordinator's next step, to a stage that is the tail.
    fn poll(&mut self, budget: u32) {
        let mut plan = StepPlan::default();
        let mut out = Vec::new();
        let limits = LIMITS;
        match self.scheduler.poll(self.now_us, budget, &mut plan) {
            None => return,
            Some(Action::Open(id)) => {
                let open = self.scheduler.open_message(id).expect("an open without a session");
                Frame::Open(open).encode(&limits, &mut out).expect("the scheduler keeps the limits");
            }
            Some(Action::Close(session)) => {
                let epoch = self.scheduler.epoch();
                Frame::Close { epoch, session }.encode(&limits, &mut out).expect("a close always fits");
            }
            Some(Action::Step(head)) => {
                let rows = vec![0.0; plan.ids.len() * 4];
                let segments = &plan.segments;
                let frame = Frame::Hidden(Hidden { head, segments, trail: &[], rows: &rows });
                frame.encode(&limits, &mut out).expect("the scheduler keeps the limits");
                let due = segments.iter().filter(|segment| segment.sample).filter_map(|segment| {
                    let position = segment.position.after(segment.tokens)?;
                    Some(TokenOut { session: segment.session, position, token: 50, logits_hash: None })
                });
                self.flight.push((head, due.collect()));
            }
            Some(_) => {}
        }
        self.arrive(&out);
    }

    /// A frame at the stage. What is let through is held against a KV cache of our own.
    fn arrive(&mut self, bytes: &[u8]) {
        let view = match self.gate.admit(bytes) {
            Ok(Some(view)) => view,
            Ok(None) => return self.saw("stale"),
            Err(error) => return self.saw(&error.to_string()),
        };
        assert_eq!(view.epoch(), self.gate.epoch(), "a frame of another placement was let through");
        match view {
            FrameView::Hidden(hidden) => {
                let lap = hidden.head.lap;
                assert!(self.last_lap.is_none_or(|last| lap == last + 1), "a lap was skipped or came again");
                self.last_lap = Some(lap);
                for segment in hidden.segments() {
                    match self.book.check(&segment) {
                        Ok(()) => {
                            let rows = self.kv.get_mut(&segment.session).expect("rows of a session not open");
                            assert_eq!(*rows, segment.position.0, "rows with a gap or a repeat");
                            *rows += segment.tokens;
                            assert!(*rows <= LIMITS.context_max);
                            self.book.grew(&segment);
                        }
                        Err(refusal) => self.saw(&refusal.to_string()),
                    }
                }
            }
            FrameView::Open(open) => match self.book.open(open.session) {
                Ok(()) => assert!(self.kv.insert(open.session, 0).is_none(), "opened over another"),
                Err(refusal) => self.saw(&refusal.to_string()),
            },
            FrameView::Close { session, .. } => {
                assert_eq!(self.book.close(session), self.kv.remove(&session).is_some());
            }
            FrameView::Truncate { session, position, .. } => match self.book.truncate(session, position) {
                Ok(()) => *self.kv.get_mut(&session).expect("a session not open") = position.0,
                Err(refusal) => self.saw(&refusal.to_string()),
            },
            _ => {}
        }
        assert_eq!(self.book.len(), self.kv.len());
        assert_eq!(self.book.rows(), self.kv.values().map(|&rows| u64::from(rows)).sum::<u64>());
        assert!(self.book.len() <= 2);
    }

    fn stray_hidden(&mut self, script: &mut Script<'_>) {
        let epoch = Epoch(self.gate.epoch().0.wrapping_add(script.number() % 3).wrapping_sub(1));
        let lap = self.last_lap.unwrap_or(0).wrapping_add(u64::from(script.number() % 4));
        let segment = SegmentHead {
            session: SessionId(u64::from(script.number() % 4)),
            position: Position(script.number() % 66),
            tokens: 1 + script.number() % 3,
            sample: script.number() % 2 == 1,
        };
        let rows = vec![f32::NAN; segment.tokens as usize * 4];
        let head = FrameHead { epoch, lap };
        let mut out = Vec::new();
        let frame = Frame::Hidden(Hidden { head, segments: &[segment], trail: &[], rows: &rows });
        if frame.encode(&LIMITS, &mut out).is_ok() {
            self.arrive(&out);
        }
    }

    fn stray_message(&mut self, what: u8, script: &mut Script<'_>) {
        let (epoch, session) = (self.gate.epoch(), SessionId(u64::from(script.number() % 4)));
        let position = Position(script.number() % 70);
        let frame = match (what, script.number() % 2) {
            (6, 0) => Frame::Truncate { epoch, session, position },
            (6, _) => Frame::Close { epoch, session },
            _ => Frame::Open(swarm_wire::Open {
                epoch,
                session,
                sampling: Sampling::default(),
                prompt: &[1],
                logits_hash: false,
            }),
        };
        let mut out = Vec::new();
        if frame.encode(&LIMITS, &mut out).is_ok() {
            self.arrive(&out);
        }
    }

    fn answer_well(&mut self) {
        if self.flight.is_empty() {
            return;
        }
        let (head, items) = self.flight.remove(0);
        match self.scheduler.lap_arrived(self.now_us, head, items.into_iter()) {
            Ok(()) => self.saw("answered"),
            // Stray answers may have been taken for this lap, or the ring is another by now.
            Err(error) => self.saw(&error.to_string()),
        }
    }

    fn stray_answer(&mut self, script: &mut Script<'_>) {
        let epoch = Epoch(self.scheduler.epoch().0.wrapping_add(script.number() % 3).wrapping_sub(1));
        let lap = self.flight.first().map_or(0, |(head, _)| head.lap) + u64::from(script.number() % 2);
        let items: Vec<TokenOut> = (0..script.number() % 3)
            .map(|_| TokenOut {
                session: SessionId(u64::from(script.number() % 4)),
                position: Position(script.number() % 66),
                token: script.number(),
                logits_hash: (script.number() > 200).then_some([1; 32]),
            })
            .collect();
        let before = self.scheduler.clone();
        let head = FrameHead { epoch, lap };
        if let Err(error) = self.scheduler.lap_arrived(self.now_us, head, items.iter().copied()) {
            assert_eq!(
                self.scheduler.frames_in_flight(),
                before.frames_in_flight(),
                "a refused answer left a trace"
            );
            assert!(self.scheduler.next_event().is_none(), "a refused answer emitted something");
            self.saw(&error.to_string());
        }
    }

    fn read_events(&mut self) {
        while let Some(event) = self.scheduler.next_event() {
            match event {
                Event::Token { session, position, token, .. } => {
                    let told = self.told.get_mut(&session).expect("a token of a session that has ended");
                    assert_eq!(position.0, told.prompt + told.tokens, "a token out of its place");
                    assert!(token < LIMITS.vocab);
                    told.tokens += 1;
                    assert!(told.tokens <= told.max_tokens);
                }
                Event::Finished { session, tokens, reason } => {
                    let told = self.told.remove(&session).expect("a session ended twice");
                    assert_eq!(tokens, told.tokens);
                    if reason == FinishReason::Length {
                        assert_eq!(told.tokens, told.max_tokens);
                    }
                    self.saw("finished");
                }
                _ => {}
            }
        }
    }
}
