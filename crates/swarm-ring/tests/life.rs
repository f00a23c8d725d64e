//! Random lives of a scheduler against a simulated ring that knows what it must be given.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::collection::vec;
use proptest::prelude::*;
use swarm_ring::{Action, Event, FinishReason, Scheduler, SchedulerConfig, SessionRequest, StepPlan, Timers};
use swarm_wire::{
    Blame, Epoch, Frame, FrameHead, Hidden, Limits, Position, Sampling, SegmentHead, SessionId, TokenOut,
};

const VOCAB: u32 = 50;

#[derive(Clone, Debug)]
enum Op {
    Open { prompt: usize, max_tokens: u32, context: u32, hash: bool, ends: bool },
    Poll { budget: u32 },
    Answer,
    Cancel(usize),
    StageFails { session: usize, drops_items: bool },
    NewEpoch,
}

fn op() -> impl Strategy<Value = Op> {
    let open = (1usize..40, 1u32..12, 8u32..64, any::<bool>(), any::<bool>()).prop_map(
        |(prompt, max_tokens, context, hash, ends)| Op::Open { prompt, max_tokens, context, hash, ends },
    );
    let fails =
        (0usize..8, any::<bool>()).prop_map(|(session, drops_items)| Op::StageFails { session, drops_items });
    prop_oneof![
        4 => open,
        12 => (0u32..20).prop_map(|budget| Op::Poll { budget }),
        10 => Just(Op::Answer),
        1 => (0usize..8).prop_map(Op::Cancel),
        1 => fails,
        1 => prop_oneof![9 => Just(Op::Answer), 1 => Just(Op::NewEpoch)],
    ]
}

fn config() -> impl Strategy<Value = SchedulerConfig> {
    (1u32..16, 1u32..6, 1u32..6, 1u32..10, 1u32..5, 1u32..4).prop_map(
        |(tokens_max, segments_max, sessions_max, chunk, frames_in_flight_max, stages)| SchedulerConfig {
            epoch: Epoch(1),
            limits: Limits {
                width: 1,
                vocab: VOCAB,
                context_max: 48,
                tokens_max,
                segments_max,
                stages_max: 3,
            },
            sessions_max,
            chunk,
            stages,
            frames_in_flight_max,
            timers: Timers::default(),
        },
    )
}

/// What the simulated model says at a position: any fixed function will do.
fn sampled(session: SessionId, position: Position) -> u32 {
    (session.0 as u32).wrapping_mul(31).wrapping_add(position.0.wrapping_mul(17)) % VOCAB
}

/// What the ring knows of a session.
struct Kv {
    prompt: Vec<u32>,
    len: u32,
    hash: bool,
}

/// What the user of a session saw.
#[derive(Default)]
struct Seen {
    prompt_len: u32,
    max_tokens: u32,
    tokens: u32,
    finished: Option<FinishReason>,
}

/// The far side: stages, tail and users.
struct Room {
    scheduler: Scheduler,
    config: SchedulerConfig,
    kv: BTreeMap<SessionId, Kv>,
    failed: BTreeMap<SessionId, bool>,
    flight: VecDeque<(FrameHead, Vec<SegmentHead>)>,
    seen: BTreeMap<SessionId, Seen>,
    plan: StepPlan,
    now_us: u64,
}

impl Room {
    fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config).unwrap(),
            config,
            kv: BTreeMap::new(),
            failed: BTreeMap::new(),
            flight: VecDeque::new(),
            seen: BTreeMap::new(),
            plan: StepPlan::default(),
            now_us: 0,
        }
    }

    fn open(&mut self, prompt: usize, max_tokens: u32, context: u32, logits_hash: bool, ends: bool) {
        let tokens: Vec<u32> = (0..prompt as u32).map(|i| (i * 7 + max_tokens) % VOCAB).collect();
        let request = SessionRequest {
            prompt: tokens,
            max_tokens,
            sampling: Sampling::default(),
            end_tokens: if ends { (0..VOCAB / 5).collect() } else { BTreeSet::new() },
            context,
            logits_hash,
        };
        let fits = prompt <= context.min(self.config.limits.context_max) as usize;
        let free = self.scheduler.sessions() < self.config.sessions_max as usize;
        match self.scheduler.open(request) {
            Ok(id) => {
                assert!(fits && free);
                let seen = Seen { prompt_len: prompt as u32, max_tokens, ..Seen::default() };
                assert!(self.seen.insert(id, seen).is_none(), "an id was used twice");
            }
            Err(_) => assert!(!fits || !free),
        }
    }

    /// One poll; false when there was nothing to do.
    fn poll(&mut self, budget: u32) -> bool {
        self.now_us += 1000;
        let in_flight = self.scheduler.frames_in_flight();
        match self.scheduler.poll(self.now_us, budget, &mut self.plan) {
            None => {
                assert!(self.plan.segments.is_empty() && self.plan.ids.is_empty());
                return false;
            }
            Some(Action::Open(id)) => {
                let open = self.scheduler.open_message(id).expect("an open without a session");
                Frame::Open(open).encode(&self.config.limits, &mut Vec::new()).unwrap();
                assert_eq!(open.epoch, self.scheduler.epoch());
                let kv = Kv { prompt: open.prompt.to_vec(), len: 0, hash: open.logits_hash };
                assert!(self.kv.insert(id, kv).is_none(), "opened twice");
            }
            Some(Action::Close(id)) => {
                assert!(self.kv.remove(&id).is_some(), "closed, but not open");
                self.failed.remove(&id);
            }
            Some(Action::Step(head)) => {
                assert!(in_flight < self.config.frames_in_flight_max as usize);
                self.step(head, budget);
            }
            Some(other) => panic!("an action without a test: {other:?}"),
        }
        true
    }

    fn step(&mut self, head: FrameHead, budget: u32) {
        let StepPlan { segments, ids, prefill } = &self.plan;
        let rows = vec![0.0; ids.len()];
        assert!(!segments.is_empty() && ids.len() <= budget as usize);
        // The wire refuses too many rows or segments, a session twice, and rows that do not match.
        let frame = Frame::Hidden(Hidden { head, segments, trail: &[], rows: &rows });
        frame.encode(&self.config.limits, &mut Vec::new()).unwrap();
        let mut left = ids.as_slice();
        let mut prompt_rows = 0;
        for segment in segments {
            let kv = self.kv.get_mut(&segment.session).expect("rows for a session that is not open");
            assert_eq!(segment.position, Position(kv.len), "a gap or a repeat");
            let (own, rest) = left.split_at(segment.tokens as usize);
            left = rest;
            for &id in own {
                let wanted = match kv.prompt.get(kv.len as usize) {
                    Some(&id) => id,
                    None => sampled(segment.session, Position(kv.len)),
                };
                assert_eq!(id, wanted, "position {} of {}", kv.len, segment.session);
                prompt_rows += u32::from(kv.len < kv.prompt.len() as u32);
                kv.len += 1;
            }
            assert_eq!(segment.sample, kv.len >= kv.prompt.len() as u32);
        }
        assert!(left.is_empty());
        assert!(prompt_rows <= self.config.chunk);
        assert_eq!(*prefill, prompt_rows > 0);
        self.flight.push_back((head, segments.clone()));
    }

    fn answer_of(&self, segments: &[SegmentHead]) -> Vec<TokenOut> {
        let item = |segment: &SegmentHead| {
            if !segment.sample || self.failed.get(&segment.session) == Some(&true) {
                return None;
            }
            let position = segment.position.after(segment.tokens)?;
            let hash = self.kv.get(&segment.session).is_some_and(|kv| kv.hash);
            let token = sampled(segment.session, position);
            Some(TokenOut { session: segment.session, position, token, logits_hash: hash.then_some([1; 32]) })
        };
        segments.iter().filter_map(item).collect()
    }

    fn answer(&mut self) {
        self.now_us += 1000;
        let Some((head, segments)) = self.flight.pop_front() else { return };
        let items = self.answer_of(&segments);
        self.refuse_wrong_answers(head, &items);
        self.scheduler.lap_arrived(self.now_us, head, items.iter().copied()).unwrap();
        self.read_events();
    }

    /// None of these may be taken, and none may leave a trace.
    fn refuse_wrong_answers(&mut self, head: FrameHead, items: &[TokenOut]) {
        if head.epoch != self.scheduler.epoch() {
            return;
        }
        let mut wrong: Vec<(FrameHead, Vec<TokenOut>)> = vec![
            (FrameHead { lap: head.lap + 1, ..head }, items.to_vec()),
            (FrameHead { lap: head.lap.wrapping_sub(1), ..head }, items.to_vec()),
            (FrameHead { epoch: Epoch(head.epoch.0 + 1), ..head }, items.to_vec()),
        ];
        let stranger =
            TokenOut { session: SessionId(999), position: Position(1), token: 1, logits_hash: None };
        wrong.push((head, [items, &[stranger]].concat()));
        wrong.push((head, [&[stranger], items].concat()));
        if let Some(last) = items.last() {
            wrong.push((head, [items, &[*last]].concat()));
        }
        for (index, item) in items.iter().enumerate() {
            if !self.live(item.session) {
                continue;
            }
            let with = |changed: TokenOut| {
                let mut items = items.to_vec();
                items[index] = changed;
                (head, items)
            };
            wrong.push(with(TokenOut { position: Position(item.position.0 + 1), ..*item }));
            wrong.push(with(TokenOut { position: Position(item.position.0 - 1), ..*item }));
            wrong.push(with(TokenOut { token: VOCAB, ..*item }));
            let other = if item.logits_hash.is_some() { None } else { Some([2; 32]) };
            wrong.push(with(TokenOut { logits_hash: other, ..*item }));
            let mut missing = items.to_vec();
            missing.remove(index);
            wrong.push((head, missing));
        }
        let in_flight = self.scheduler.frames_in_flight();
        for (head, items) in wrong {
            let error = self.scheduler.lap_arrived(self.now_us, head, items.iter().copied()).unwrap_err();
            assert_eq!(error.blame(), Blame::Peer);
        }
        assert_eq!(self.scheduler.frames_in_flight(), in_flight);
        assert_eq!(self.scheduler.next_event(), None);
    }

    fn live(&self, id: SessionId) -> bool {
        self.seen.get(&id).is_some_and(|seen| seen.finished.is_none())
    }

    fn pick(&self, index: usize) -> Option<SessionId> {
        let live: Vec<_> =
            self.seen.iter().filter(|(_, seen)| seen.finished.is_none()).map(|(id, _)| *id).collect();
        live.get(index % live.len().max(1)).copied()
    }

    fn read_events(&mut self) {
        while let Some(event) = self.scheduler.next_event() {
            match event {
                Event::Token { session, position, token, .. } => {
                    let seen = self.seen.get_mut(&session).expect("a token of no session");
                    assert_eq!(seen.finished, None, "a token after the end");
                    assert_eq!(position.0, seen.prompt_len + seen.tokens);
                    assert_eq!(token, sampled(session, position));
                    seen.tokens += 1;
                }
                Event::Finished { session, reason, tokens } => {
                    let seen = self.seen.get_mut(&session).expect("the end of no session");
                    assert_eq!(seen.finished, None, "ended twice");
                    assert_eq!(tokens, seen.tokens);
                    match &reason {
                        FinishReason::Length => assert_eq!(tokens, seen.max_tokens),
                        FinishReason::Stop { token } => assert!(*token < VOCAB / 5),
                        _ => assert!(tokens <= seen.max_tokens),
                    }
                    seen.finished = Some(reason);
                }
                other => panic!("an event without a test: {other:?}"),
            }
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Open { prompt, max_tokens, context, hash, ends } => {
                self.open(prompt, max_tokens, context, hash, ends);
            }
            Op::Poll { budget } => {
                self.poll(budget);
            }
            Op::Answer => self.answer(),
            Op::Cancel(index) => {
                if let Some(id) = self.pick(index) {
                    assert!(self.scheduler.cancel(id));
                    assert!(!self.scheduler.cancel(id));
                }
            }
            Op::StageFails { session, drops_items } => {
                if let Some(id) = self.pick(session).filter(|id| self.kv.contains_key(id)) {
                    assert!(self.scheduler.session_failed(id, Blame::Us, "no KV page is left"));
                    self.failed.insert(id, drops_items);
                }
            }
            Op::NewEpoch => {
                let epoch = Epoch(self.scheduler.epoch().0 + 1);
                assert_eq!(self.scheduler.start_epoch(epoch, self.config.limits), Ok(true));
                assert_eq!(self.scheduler.start_epoch(epoch, self.config.limits), Ok(false));
                self.kv.clear();
                self.failed.clear();
                // Frames of the old epoch stay on their way: their answers must be dropped.
            }
        }
        self.read_events();
    }

    /// Faults stop, and everything that was asked for must come to an end.
    fn settle(&mut self) {
        for _ in 0..20_000 {
            while self.poll(u32::MAX) {}
            if self.flight.is_empty() {
                break;
            }
            self.answer();
        }
        assert!(self.flight.is_empty(), "the ring does not come to rest");
        assert!(self.seen.values().all(|seen| seen.finished.is_some()), "a session never ended");
        assert!(self.kv.is_empty(), "a session was not closed");
        assert_eq!(self.scheduler.sessions(), 0);
        assert_eq!(self.scheduler.next_deadline_us(), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn any_life_is_in_order_and_ends(config in config(), ops in vec(op(), 0..120)) {
        let mut room = Room::new(config);
        for op in ops {
            room.apply(op);
        }
        room.settle();
    }

    #[test]
    fn one_schedule_has_one_outcome(config in config(), ops in vec(op(), 0..60)) {
        let mut plans = Vec::new();
        for _ in 0..2 {
            let mut room = Room::new(config);
            let mut log = Vec::new();
            for op in ops.clone() {
                room.apply(op);
                log.push(room.plan.clone());
            }
            plans.push(log);
        }
        prop_assert_eq!(&plans[0], &plans[1]);
    }
}
