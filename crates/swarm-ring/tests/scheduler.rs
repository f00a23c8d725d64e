//! What the scheduler does in the situations one can name.

use std::collections::BTreeSet;

use swarm_ring::{
    Action, ConfigError, Event, FinishReason, LapError, OpenError, Scheduler, SchedulerConfig, SessionError,
    SessionRequest, StepPlan, Timers,
};
use swarm_wire::{Blame, Epoch, FrameHead, Limits, Position, Sampling, SessionId, TokenOut};

const CONFIG: SchedulerConfig = SchedulerConfig {
    epoch: Epoch(3),
    limits: Limits { width: 8, vocab: 100, context_max: 64, tokens_max: 16, segments_max: 8, stages_max: 4 },
    sessions_max: 4,
    chunk: 8,
    stages: 1,
    frames_in_flight_max: 3,
    timers: Timers {
        lap_us_min: 1_000_000,
        factor: 8,
        first_lap_us: 10_000_000,
        first_row_us: 500_000,
        lap_us_max: 120_000_000,
    },
};

fn request(prompt: usize) -> SessionRequest {
    SessionRequest {
        prompt: (0..prompt as u32).collect(),
        max_tokens: 5,
        sampling: Sampling::default(),
        end_tokens: BTreeSet::from([99]),
        context: 64,
        logits_hash: false,
    }
}

struct Desk {
    scheduler: Scheduler,
    plan: StepPlan,
}

impl Desk {
    fn new() -> Self {
        Self { scheduler: Scheduler::new(CONFIG).unwrap(), plan: StepPlan::default() }
    }

    fn poll(&mut self, now_us: u64) -> Option<Action> {
        self.scheduler.poll(now_us, 16, &mut self.plan)
    }

    /// The next step; opens and closes on the way are taken.
    fn step(&mut self, now_us: u64) -> Option<FrameHead> {
        loop {
            match self.poll(now_us)? {
                Action::Step(head) => return Some(head),
                _ => continue,
            }
        }
    }

    fn shape(&self) -> Vec<(u64, u32, u32, bool)> {
        let shape = |segment: &swarm_wire::SegmentHead| {
            (segment.session.0, segment.position.0, segment.tokens, segment.sample)
        };
        self.plan.segments.iter().map(shape).collect()
    }

    fn answer(&mut self, now_us: u64, head: FrameHead, items: &[TokenOut]) -> Result<(), LapError> {
        self.scheduler.lap_arrived(now_us, head, items.iter().copied())
    }

    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.scheduler.next_event()).collect()
    }
}

fn token(session: SessionId, position: u32, token: u32) -> TokenOut {
    TokenOut { session, position: Position(position), token, logits_hash: None }
}

#[test]
fn prompt_chunks_follow_each_other_without_waiting() {
    let mut desk = Desk::new();
    let id = desk.scheduler.open(request(20)).unwrap();
    assert_eq!(desk.poll(0), Some(Action::Open(id)));
    let laps: Vec<_> = (0..3)
        .map(|_| {
            let head = desk.step(0).unwrap();
            (head.lap, desk.shape())
        })
        .collect();
    assert_eq!(laps, [(1, vec![(1, 0, 8, false)]), (2, vec![(1, 8, 8, false)]), (3, vec![(1, 16, 4, true)])]);
    assert_eq!(desk.poll(0), None);
    let head = |lap| FrameHead { epoch: Epoch(3), lap };
    desk.answer(1, head(1), &[]).unwrap();
    assert_eq!(desk.poll(1), None, "nothing is known to send");
    desk.answer(2, head(2), &[]).unwrap();
    desk.answer(3, head(3), &[token(id, 20, 42)]).unwrap();
    assert_eq!(
        desk.events(),
        [Event::Token { session: id, position: Position(20), token: 42, logits_hash: None }]
    );
    desk.step(4).unwrap();
    assert_eq!(desk.shape(), [(1, 20, 1, true)]);
    assert_eq!(desk.plan.ids, [42]);
    assert!(!desk.plan.prefill);
    assert_eq!(desk.scheduler.tokens(id).unwrap().len(), 21);
}

#[test]
fn decode_rows_ride_in_front_of_prompt_chunks() {
    let mut desk = Desk::new();
    let first = desk.scheduler.open(request(2)).unwrap();
    let head = desk.step(0).unwrap();
    desk.answer(1, head, &[token(first, 2, 7)]).unwrap();
    desk.scheduler.open(request(12)).unwrap();
    desk.step(2).unwrap();
    assert_eq!(desk.shape(), [(1, 2, 1, true), (2, 0, 8, false)]);
    assert!(desk.plan.prefill);
}

/// All in one frame would leave each stage idle while the other one works.
#[test]
fn two_stages_share_the_decoding_sessions() {
    let mut desk = Desk::new();
    desk.scheduler.set_ring(2, 8);
    let ids: Vec<_> = (0..3).map(|_| desk.scheduler.open(request(2)).unwrap()).collect();
    let head = desk.step(0).unwrap();
    assert_eq!(desk.shape().len(), 3, "the prompts go together");
    desk.answer(1, head, &[token(ids[0], 2, 7), token(ids[1], 2, 7), token(ids[2], 2, 7)]).unwrap();
    let first = desk.step(1).unwrap();
    assert_eq!(desk.shape(), [(1, 2, 1, true), (2, 2, 1, true)]);
    desk.step(1).unwrap();
    assert_eq!(desk.shape(), [(3, 2, 1, true)]);
    assert_eq!(desk.step(1), None, "nothing is known to send");
    desk.answer(2, first, &[token(ids[0], 3, 8), token(ids[1], 3, 8)]).unwrap();
    desk.step(2).unwrap();
    assert_eq!(desk.shape(), [(1, 3, 1, true), (2, 3, 1, true)]);
}

#[test]
fn prompts_take_turns() {
    let mut desk = Desk::new();
    desk.scheduler.open(request(16)).unwrap();
    desk.scheduler.open(request(16)).unwrap();
    let mut shapes = Vec::new();
    while desk.step(0).is_some() {
        shapes.push(desk.shape());
    }
    assert_eq!(shapes, [[(1, 0, 8, false)], [(2, 0, 8, false)], [(1, 8, 8, true)]]);
}

/// Decode rows that fill every frame must not keep a prompt out for ever.
#[test]
fn a_prompt_is_not_starved_by_decoding() {
    let limits = Limits { tokens_max: 2, ..CONFIG.limits };
    let config = SchedulerConfig { limits, frames_in_flight_max: 1, ..CONFIG };
    let mut desk = Desk { scheduler: Scheduler::new(config).unwrap(), plan: StepPlan::default() };
    let long = |prompt| SessionRequest { max_tokens: 60, ..request(prompt) };
    desk.scheduler.open(long(1)).unwrap();
    desk.scheduler.open(long(1)).unwrap();
    let mut waiting = None;
    for lap in 0..20 {
        let head = desk.step(lap).unwrap();
        let items: Vec<_> = desk
            .plan
            .segments
            .iter()
            .filter(|segment| segment.sample)
            .map(|segment| token(segment.session, segment.position.0 + segment.tokens, 5))
            .collect();
        desk.answer(lap, head, &items).unwrap();
        if lap == 3 {
            waiting = Some(desk.scheduler.open(long(4)).unwrap());
        }
    }
    let sent = desk
        .events()
        .into_iter()
        .any(|event| matches!(event, Event::Token { session, .. } if Some(session) == waiting));
    assert!(sent);
}

#[test]
fn ends_are_told_and_closed() {
    let mut desk = Desk::new();
    let stop = desk.scheduler.open(request(2)).unwrap();
    let length = desk.scheduler.open(SessionRequest { max_tokens: 1, ..request(3) }).unwrap();
    let full = desk.scheduler.open(SessionRequest { context: 3, ..request(3) }).unwrap();
    let head = desk.step(0).unwrap();
    assert_eq!(desk.shape(), [(1, 0, 2, true), (2, 0, 3, true), (3, 0, 3, true)]);
    desk.answer(1, head, &[token(stop, 2, 99), token(length, 3, 5), token(full, 3, 6)]).unwrap();
    let finished = |session, reason, tokens| Event::Finished { session, reason, tokens };
    let emitted = |session, token| Event::Token { session, position: Position(3), token, logits_hash: None };
    assert_eq!(
        desk.events(),
        [
            finished(stop, FinishReason::Stop { token: 99 }, 0),
            emitted(length, 5),
            finished(length, FinishReason::Length, 1),
            emitted(full, 6),
            finished(full, FinishReason::ContextFull, 1),
        ]
    );
    for id in [stop, length, full] {
        assert_eq!(desk.poll(2), Some(Action::Close(id)));
    }
    assert_eq!(desk.poll(2), None);
}

#[test]
fn a_session_cancelled_before_it_was_announced_leaves_no_trace() {
    let mut desk = Desk::new();
    let id = desk.scheduler.open(request(2)).unwrap();
    assert!(desk.scheduler.cancel(id));
    assert_eq!(desk.poll(0), None);
    assert_eq!(desk.events(), [Event::Finished { session: id, reason: FinishReason::Cancelled, tokens: 0 }]);
}

#[test]
fn a_token_that_comes_after_a_cancel_is_counted_and_dropped() {
    let mut desk = Desk::new();
    let id = desk.scheduler.open(request(2)).unwrap();
    let head = desk.step(0).unwrap();
    assert!(desk.scheduler.cancel(id));
    desk.events();
    assert_eq!(desk.poll(0), Some(Action::Close(id)));
    desk.answer(1, head, &[token(id, 2, 5)]).unwrap();
    assert_eq!(desk.events(), []);
    assert_eq!(desk.scheduler.counters().late_tokens, 1);
}

#[test]
fn wrong_answers_name_what_is_wrong() {
    let mut desk = Desk::new();
    let id = desk.scheduler.open(request(2)).unwrap();
    let head = desk.step(0).unwrap();
    let wrong = desk.answer(1, FrameHead { lap: 2, ..head }, &[]).unwrap_err();
    assert_eq!(wrong.to_string(), "an answer to lap 2, but lap 1 is due");
    let early = desk.answer(1, head, &[token(id, 1, 5)]).unwrap_err();
    assert_eq!(early, LapError::Unexpected { lap: 1, session: id, position: Position(1) });
    let missing = desk.answer(1, head, &[]).unwrap_err();
    assert_eq!(missing, LapError::Missing { lap: 1, session: id, position: Position(2) });
    assert_eq!(desk.events(), []);
    desk.answer(1, head, &[token(id, 2, 5)]).unwrap();
    assert_eq!(desk.answer(1, head, &[]), Err(LapError::WrongLap { got: 1, due: None }));
}

#[test]
fn a_silent_ring_ends_every_session_and_a_new_epoch_starts_clean() {
    let mut desk = Desk::new();
    assert_eq!(desk.scheduler.next_deadline_us(), None);
    let id = desk.scheduler.open(request(2)).unwrap();
    let head = desk.step(1_000).unwrap();
    // Nothing was measured: 10 s and half a second per row.
    assert_eq!(desk.scheduler.next_deadline_us(), Some(11_001_000));
    desk.answer(101_000, head, &[token(id, 2, 5)]).unwrap();
    let decode = desk.step(200_000).unwrap();
    assert_eq!(desk.scheduler.next_deadline_us(), Some(10_700_000));
    desk.answer(230_000, decode, &[token(id, 3, 6)]).unwrap();
    let silent = desk.step(300_000).unwrap();
    // A decode lap took 30 ms: the least deadline holds.
    assert_eq!(desk.scheduler.next_deadline_us(), Some(1_300_000));
    assert_eq!(desk.scheduler.tick(1_299_999), None);
    let error = SessionError::NodeSilent { lap: 3, waited_ms: 1000 };
    assert_eq!(desk.scheduler.tick(1_300_000), Some(error.clone()));
    assert_eq!(error.blame(), Blame::Link);
    let last = desk.events().pop();
    assert_eq!(last, Some(Event::Finished { session: id, reason: FinishReason::Error(error), tokens: 2 }));
    assert!(desk.scheduler.is_down());
    assert_eq!(desk.poll(1_400_000), None);
    assert_eq!(desk.scheduler.open(request(1)), Err(OpenError::RingDown));
    assert_eq!(desk.scheduler.start_epoch(Epoch(4), CONFIG.limits), Ok(true));
    // The lost answer arrives after all.
    desk.answer(1_500_000, silent, &[token(id, 4, 7)]).unwrap();
    assert_eq!(desk.events(), []);
    assert_eq!(desk.scheduler.counters().stale_answers, 1);
    let again = desk.scheduler.open(request(1)).unwrap();
    assert_ne!(again, id);
    assert_eq!(desk.step(1_600_000).map(|head| head.epoch), Some(Epoch(4)));
}

/// With several laps on their way each is waited for since the answer before it.
#[test]
fn a_queue_of_laps_does_not_run_out_of_time_together() {
    let mut desk = Desk::new();
    desk.scheduler.open(request(20)).unwrap();
    let laps: Vec<_> = (0..3).filter_map(|_| desk.step(0)).collect();
    assert_eq!(desk.scheduler.next_deadline_us(), Some(14_000_000));
    desk.answer(8_000_000, laps[0], &[]).unwrap();
    // Eight rows took 8 s: 1 s a row, eight times that for eight rows.
    assert_eq!(desk.scheduler.next_deadline_us(), Some(72_000_000));
}

#[test]
fn requests_that_cannot_succeed_are_refused() {
    let mut desk = Desk::new();
    let refused = |desk: &mut Desk, request| desk.scheduler.open(request).unwrap_err();
    let base = request(2);
    let none = SessionRequest { prompt: vec![], ..base.clone() };
    assert_eq!(refused(&mut desk, none), OpenError::EmptyPrompt);
    assert_eq!(refused(&mut desk, request(65)), OpenError::PromptTooLong { tokens: 65, context: 64 });
    let alien = SessionRequest { prompt: vec![100], ..base.clone() };
    assert_eq!(refused(&mut desk, alien), OpenError::BadToken { token: 100, vocab: 100 });
    assert_eq!(refused(&mut desk, SessionRequest { max_tokens: 0, ..base.clone() }), OpenError::NoTokens);
    let hot = Sampling { temperature: f32::NAN, ..Sampling::default() };
    let error = refused(&mut desk, SessionRequest { sampling: hot, ..base.clone() });
    assert_eq!(error.blame(), Blame::Caller);
    for _ in 0..4 {
        desk.scheduler.open(base.clone()).unwrap();
    }
    assert_eq!(refused(&mut desk, base), OpenError::Busy { sessions_max: 4 });
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    let zero = SchedulerConfig { chunk: 0, ..CONFIG };
    assert_eq!(Scheduler::new(zero).unwrap_err(), ConfigError::Zero("chunk"));
    let limits = Limits { vocab: 0, ..CONFIG.limits };
    assert!(Scheduler::new(SchedulerConfig { limits, ..CONFIG }).is_err());
}

/// Runs a session to its end: the prompt, and these tokens.
fn answered(desk: &mut Desk, id: SessionId, mut position: u32, tokens: &[u32]) {
    for &next in tokens {
        let head = loop {
            let head = desk.step(1).expect("a step");
            let sampled = desk.plan.segments.iter().any(|segment| segment.sample);
            if sampled {
                break head;
            }
            desk.answer(1, head, &[]).unwrap();
        };
        desk.answer(1, head, &[token(id, position, next)]).unwrap();
        position += 1;
    }
}

#[test]
fn a_conversation_goes_on_from_its_rows() {
    let mut desk = Desk::new();
    let id = desk.scheduler.open(request(10)).unwrap();
    desk.scheduler.keep(id);
    answered(&mut desk, id, 10, &[50, 51, 99]);
    assert_eq!(desk.poll(2), None, "its rows stay");
    assert_eq!(desk.scheduler.sessions(), 0);
    // The prompt, both tokens, and what was said since: only that is computed.
    let mut more = request(10);
    more.prompt.extend([50, 51, 60, 61, 62]);
    assert_eq!(desk.scheduler.open(more.clone()), Ok(id));
    desk.scheduler.keep(id);
    assert_eq!((desk.scheduler.rows(id), desk.poll(2)), (12, Some(Action::Open(id))));
    assert_eq!(desk.scheduler.open_message(id).unwrap().prompt, more.prompt);
    answered(&mut desk, id, 15, &[70]);
    assert_eq!(desk.scheduler.tokens(id).unwrap().len(), 16);
    let head = desk.step(3).unwrap();
    assert_eq!(desk.shape(), [(1, 15, 1, true)]);
    desk.answer(3, head, &[token(id, 16, 99)]).unwrap();
    // A conversation that was changed keeps what is the same, and the same one again has its last row computed.
    let mut other = more.clone();
    other.prompt[11] = 80;
    for (request, rows) in [(other.clone(), 11), (other, 14)] {
        assert_eq!(desk.scheduler.open(request), Ok(id));
        desk.scheduler.keep(id);
        assert_eq!(desk.poll(4), Some(Action::Truncate(id, Position(rows))));
        assert_eq!(desk.poll(4), Some(Action::Open(id)));
        answered(&mut desk, id, 15, &[99]);
    }
}

#[test]
fn rows_that_nobody_goes_on_from_are_sent_away() {
    let kept = || {
        let mut desk = Desk::new();
        let id = desk.scheduler.open(request(4)).unwrap();
        desk.scheduler.keep(id);
        answered(&mut desk, id, 4, &[99]);
        (desk, id)
    };
    // Another prompt.
    let (mut desk, id) = kept();
    let other = SessionRequest { prompt: vec![7, 8], ..request(2) };
    let second = desk.scheduler.open(other).unwrap();
    assert_ne!(second, id);
    assert_eq!(desk.poll(2), Some(Action::Close(id)));
    assert_eq!(desk.poll(2), Some(Action::Open(second)));
    // A stage that lost them.
    let (mut desk, id) = kept();
    assert!(!desk.scheduler.session_failed(id, Blame::Us, "no memory"));
    assert_eq!(desk.poll(2), Some(Action::Close(id)));
    assert_ne!(desk.scheduler.open(request(4)), Ok(id));
    // One that is cancelled before it went on.
    let (mut desk, id) = kept();
    assert_eq!(desk.scheduler.open(request(6)), Ok(id));
    assert!(desk.scheduler.cancel(id));
    assert_eq!((desk.poll(2), desk.poll(2)), (Some(Action::Close(id)), None));
    // A lost ring.
    let (mut desk, id) = kept();
    let text = "gone".to_owned();
    desk.scheduler.fail(&SessionError::RingLost { blame: Blame::Link, text });
    desk.scheduler.start_epoch(Epoch(4), CONFIG.limits).unwrap();
    assert_ne!(desk.scheduler.open(request(4)), Ok(id));
}

/// A token of the old answer that is on its way must not be taken for one of the new.
#[test]
fn rows_of_an_answer_whose_token_is_on_its_way_are_not_gone_on_from() {
    let mut desk = Desk::new();
    let id = desk.scheduler.open(request(4)).unwrap();
    desk.scheduler.keep(id);
    let head = desk.step(1).unwrap();
    assert!(desk.scheduler.cancel(id));
    let second = desk.scheduler.open(request(6)).unwrap();
    assert_ne!(second, id);
    assert_eq!(desk.poll(2), Some(Action::Close(id)));
    desk.answer(2, head, &[token(id, 4, 9)]).unwrap();
    assert_eq!(desk.scheduler.tokens(second).unwrap().len(), 6);
    assert_eq!(desk.scheduler.counters().late_tokens, 1);
}
