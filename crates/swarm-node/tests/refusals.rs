//! What a stage does with frames that must not touch its KV rows: it drops them, gives the session up, or closes the
//! link and says why. Everything else of the worker goes on.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::puppet::{Caller, Puppet, ends};
use common::{answer, config, identity, model, request};
use swarm_link::{Connection, Identity};
use swarm_node::{Engine, Finish, Worker, WorkerConfig, WorkerSearch};
use swarm_testkit::wait_for;
use swarm_wire::{
    Ack, Blame, CloseCode, Closing, Control, DataKind, Echo, Epoch, Frame, FrameHead, FrameView, Hidden,
    Limits, Open, Ping, Position, Receipt, Refused, SegmentHead, SessionId, StageTime,
};

const WAIT: Duration = Duration::from_secs(10);
const ONE: SessionId = SessionId(1);
const TWO: SessionId = SessionId(2);

fn worker(identity: &Identity, model: &Path) -> Worker {
    let config = WorkerConfig {
        local_only: true,
        model: Some(model.to_owned()),
        threads: Some(1),
        ..WorkerConfig::default()
    };
    Worker::start(config, identity.another_instance().unwrap(), Arc::new(|_| {})).unwrap()
}

/// What the tail said of a lap.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<(SessionId, u32)>,
    failed: Vec<(SessionId, Blame)>,
}

/// A worker's stage under a coordinator by hand.
struct Stage {
    caller: Caller,
    hidden: Connection,
    tokens: Connection,
    epoch: Epoch,
    limits: Limits,
    lap: u64,
}

impl Stage {
    fn start(mut caller: Caller, model: &Path, epoch: Epoch) -> Self {
        let order = Caller::order(model, epoch);
        let limits = order.limits;
        caller.prepare(order);
        let (hidden, tokens) = caller.join(epoch);
        Self { caller, hidden, tokens, epoch, limits, lap: 0 }
    }

    fn encode(&self, frame: &Frame<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame.encode(&self.limits, &mut bytes).unwrap();
        bytes
    }

    fn open(&self, epoch: Epoch, session: SessionId) -> Vec<u8> {
        let (sampling, prompt) =
            (swarm_wire::Sampling { temperature: 0.0, ..Default::default() }, &[1, 2][..]);
        self.encode(&Frame::Open(Open { epoch, session, sampling, prompt, logits_hash: false }))
    }

    /// A batch of `segments`, each `(session, position, tokens)`, with rows that depend on session and position only.
    fn batch(&self, epoch: Epoch, lap: u64, segments: &[(SessionId, u32, u32)]) -> Vec<u8> {
        let width = self.limits.width as usize;
        let row = |session: SessionId, position: u32| {
            (0..width).map(move |i| ((session.0 as f32) + (position as f32) * 0.7 + i as f32 * 0.3).sin())
        };
        let rows: Vec<f32> = segments
            .iter()
            .flat_map(|&(session, at, tokens)| (at..at + tokens).flat_map(move |at| row(session, at)))
            .collect();
        let segments: Vec<SegmentHead> = segments
            .iter()
            .map(|&(session, at, tokens)| SegmentHead {
                session,
                position: Position(at),
                tokens,
                sample: true,
            })
            .collect();
        let (head, trail) = (FrameHead { epoch, lap }, [StageTime::default()]);
        self.encode(&Frame::Hidden(Hidden { head, segments: &segments, trail: &trail, rows: &rows }))
    }

    fn send(&mut self, bytes: &[u8]) {
        self.hidden.sender.set_message_bytes_max(1 << 26);
        self.hidden.sender.send(&[bytes]).unwrap();
    }

    /// The next batch, and what the tail says to it.
    fn step(&mut self, segments: &[(SessionId, u32, u32)]) -> Answer {
        self.lap += 1;
        let bytes = self.batch(self.epoch, self.lap, segments);
        self.send(&bytes);
        self.hear()
    }

    fn hear(&mut self) -> Answer {
        let (mut answer, mut bytes) = (Answer::default(), Vec::new());
        self.tokens.receiver.set_idle_timeout(Some(WAIT)).unwrap();
        loop {
            self.tokens.receiver.receive(&mut bytes).unwrap();
            match FrameView::decode(&bytes, &self.limits).unwrap() {
                FrameView::Failed(failed) => answer.failed.push((failed.session.unwrap(), failed.blame)),
                FrameView::Tokens(tokens) => {
                    assert_eq!((tokens.head.epoch, tokens.head.lap), (self.epoch, self.lap));
                    answer.tokens.extend(tokens.items().map(|item| (item.session, item.token)));
                    return answer;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Two sessions with two rows each.
    fn begin(&mut self) {
        for session in [ONE, TWO] {
            let bytes = self.open(self.epoch, session);
            self.send(&bytes);
        }
        let answer = self.step(&[(ONE, 0, 2), (TWO, 0, 2)]);
        assert_eq!((answer.tokens.len(), answer.failed.len()), (2, 0));
    }

    /// Why the worker closed the link for hidden rows, as it says there itself, and as it says on the control connection.
    fn closed(&mut self) -> (Closing, Refused) {
        let mut bytes = Vec::new();
        self.hidden.receiver.set_idle_timeout(Some(WAIT)).unwrap();
        let closing = loop {
            self.hidden.receiver.receive(&mut bytes).unwrap();
            if let Ok(closing) = Closing::decode(&bytes) {
                break closing;
            }
        };
        assert!(ends(&mut self.hidden, WAIT) && ends(&mut self.tokens, WAIT));
        let refused = self.caller.talk.hear_until(|message| match message {
            Control::Refused(refused) => Some(refused),
            _ => None,
        });
        (closing, refused)
    }

    fn stale(&mut self) -> u64 {
        self.caller.talk.say(&Control::StatsRequest { id: 5 });
        self.caller.talk.hear_until(|message| match message {
            Control::Stats(stats) => Some(stats.frames_stale),
            _ => None,
        })
    }
}

/// The tokens that follow [`Stage::begin`] where nothing disturbs.
fn undisturbed(identity: &Identity, model: &Path) -> Vec<Answer> {
    let worker = worker(identity, model);
    let mut stage = Stage::start(Caller::greet(identity, worker.port()), model, Epoch(9));
    stage.begin();
    (2..6).map(|at| stage.step(&[(ONE, at, 1), (TWO, at, 1)])).collect()
}

#[test]
fn a_frame_of_an_old_placement_is_dropped_and_counted() {
    let (model, identity) = (model("llama", 2), identity());
    let want = undisturbed(&identity, &model.path);
    let worker = worker(&identity, &model.path);
    let mut stage = Stage::start(Caller::greet(&identity, worker.port()), &model.path, Epoch(9));
    stage.begin();
    let old = Epoch(8);
    for bytes in [
        stage.batch(old, 2, &[(ONE, 2, 1)]),
        stage.batch(old, 1, &[(ONE, 0, 2)]),
        stage.open(old, SessionId(3)),
        stage.encode(&Frame::Close { epoch: old, session: ONE }),
        stage.encode(&Frame::Truncate { epoch: old, session: TWO, position: Position(1) }),
    ] {
        stage.send(&bytes);
    }
    for (at, want) in (2..).zip(&want) {
        assert_eq!(stage.step(&[(ONE, at, 1), (TWO, at, 1)]), *want);
    }
    assert_eq!(stage.stale(), 5);
    assert_eq!(worker.watch().status().stage.unwrap().frames_stale, 5);
    assert!(worker.watch().status().links_refused.is_empty());
}

#[test]
fn rows_of_another_session_or_another_place_end_that_session_only() {
    let (model, identity) = (model("llama", 2), identity());
    let want = undisturbed(&identity, &model.path);
    let two = |answer: &Answer| answer.tokens[1];
    // A session that was never opened, a gap, a repeat, and rows beyond all that are here.
    for (session, at) in [(SessionId(7), 2), (ONE, 3), (ONE, 0), (ONE, 1), (ONE, 100)] {
        let worker = worker(&identity, &model.path);
        let mut stage = Stage::start(Caller::greet(&identity, worker.port()), &model.path, Epoch(9));
        stage.begin();
        let answer = stage.step(&[(session, at, 1), (TWO, 2, 1)]);
        assert_eq!(answer.failed, [(session, Blame::Peer)], "{session} at {at}");
        assert_eq!(answer.tokens, [two(&want[0])], "{session} at {at}");
        assert_eq!(stage.step(&[(TWO, 3, 1)]).tokens, [two(&want[1])]);
        if session == ONE {
            // Its rows are gone: it does not go on as if nothing had been.
            assert_eq!(stage.step(&[(ONE, 2, 1)]).failed, [(ONE, Blame::Peer)]);
        }
        assert!(worker.watch().status().links_refused.is_empty());
    }
}

/// Sends `bad` in the middle of two sessions: the link closes with `code`, which is counted; another coordinator's
/// connection lives on, and the next stage of this one computes as ever.
fn closes_with(code: CloseCode, bad: impl Fn(&Stage) -> Vec<Vec<u8>>) {
    let (model, identity) = (model("llama", 2), identity());
    let want = undisturbed(&identity, &model.path);
    let worker = worker(&identity, &model.path);
    let mut bystander = Caller::greet(&identity, worker.port());
    let mut stage = Stage::start(Caller::greet(&identity, worker.port()), &model.path, Epoch(9));
    stage.begin();
    for bytes in bad(&stage) {
        stage.send(&bytes);
    }
    let (closing, refused) = stage.closed();
    assert_eq!(closing, Closing { epoch: Epoch(9), code }, "{}", refused.reason);
    assert_eq!((refused.code, refused.epoch), (Some(code), Some(Epoch(9))), "{}", refused.reason);
    wait_for(WAIT, "the link to be counted", || {
        worker.watch().status().links_refused.get(code.name()) == Some(&1)
    })
    .unwrap();
    bystander.talk.say(&Control::Ping(Ping { id: 77, sent_us: 1 }));
    bystander
        .talk
        .hear_until(|message| matches!(message, Control::Pong(pong) if pong.id == 77).then_some(()));
    let mut next = Stage::start(stage.caller, &model.path, Epoch(10));
    next.begin();
    assert_eq!(next.step(&[(ONE, 2, 1), (TWO, 2, 1)]), want[0]);
}

#[test]
fn an_echo_comes_back_behind_the_receipt_of_what_came_before_it() {
    let (model, identity) = (model("llama", 2), identity());
    let worker = worker(&identity, &model.path);
    let mut stage = Stage::start(Caller::greet(&identity, worker.port()), &model.path, Epoch(9));
    stage.begin();
    // Close behind a batch, so while the stage computes it.
    let (epoch, lap) = (stage.epoch, stage.lap + 1);
    let (batch, echo) = (stage.batch(epoch, lap, &[(ONE, 2, 1)]), Echo { epoch, lap });
    stage.send(&batch);
    stage.send(&echo.encode());
    let mut receipts = Vec::new();
    stage.hidden.receiver.set_idle_timeout(Some(WAIT)).unwrap();
    while receipts.last() != Some(&Receipt::Echo(echo)) {
        let mut bytes = Vec::new();
        stage.hidden.receiver.receive(&mut bytes).unwrap();
        receipts.push(Receipt::decode(&bytes).unwrap());
    }
    let acks = (1..=lap).map(|lap| Receipt::Ack(Ack { epoch, lap }));
    assert_eq!(receipts, acks.chain([Receipt::Echo(echo)]).collect::<Vec<_>>());
    stage.lap = lap;
    assert_eq!(stage.hear().tokens.len(), 1, "the stage goes on");
}

#[test]
fn a_lap_that_was_lost_closes_the_link() {
    closes_with(CloseCode::Order, |stage| vec![stage.batch(stage.epoch, stage.lap + 2, &[(ONE, 2, 1)])]);
}

#[test]
fn a_lap_that_comes_twice_closes_the_link() {
    closes_with(CloseCode::Order, |stage| {
        vec![stage.batch(stage.epoch, stage.lap, &[(ONE, 0, 2), (TWO, 0, 2)])]
    });
}

#[test]
fn a_message_that_is_too_long_closes_the_link() {
    closes_with(CloseCode::OverLimit, |stage| {
        let bytes = usize::try_from(stage.limits.frame_bytes_max().unwrap()).unwrap() + 1;
        vec![vec![1; bytes]]
    });
}

#[test]
fn a_number_above_its_limit_closes_the_link() {
    closes_with(CloseCode::OverLimit, |stage| {
        let mut bytes = stage.batch(stage.epoch, stage.lap + 1, &[(ONE, 2, 1)]);
        // More segments than were agreed.
        bytes[2] = 200;
        vec![bytes]
    });
}

#[test]
fn rows_that_are_not_numbers_close_the_link() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        closes_with(CloseCode::NotNumbers, |stage| {
            let mut bytes = stage.batch(stage.epoch, stage.lap + 1, &[(ONE, 2, 1), (TWO, 2, 1)]);
            let at = bytes.len() - 8;
            bytes[at..at + 4].copy_from_slice(&bad.to_le_bytes());
            vec![bytes]
        });
    }
}

#[test]
fn garbage_closes_the_link() {
    closes_with(CloseCode::Malformed, |_| vec![(0..200u8).map(|i| i.wrapping_mul(37) ^ 0xa5).collect()]);
}

#[test]
fn a_frame_that_ends_early_closes_the_link() {
    closes_with(CloseCode::Malformed, |stage| {
        let mut bytes = stage.batch(stage.epoch, stage.lap + 1, &[(ONE, 2, 1)]);
        bytes.pop();
        vec![bytes]
    });
}

#[test]
fn reserved_bits_of_another_version_close_the_link() {
    closes_with(CloseCode::Version, |stage| {
        let mut bytes = stage.batch(stage.epoch, stage.lap + 1, &[(ONE, 2, 1)]);
        bytes[1] = 1;
        vec![bytes]
    });
}

#[test]
fn a_placement_that_is_yet_to_come_closes_the_link() {
    closes_with(CloseCode::Epoch, |stage| vec![stage.batch(Epoch(10), stage.lap + 1, &[(ONE, 2, 1)])]);
}

#[test]
fn tokens_down_the_ring_close_the_link() {
    closes_with(CloseCode::Unexpected, |stage| {
        let head = FrameHead { epoch: stage.epoch, lap: stage.lap + 1 };
        let trail = [StageTime::default()];
        vec![stage.encode(&Frame::Tokens(swarm_wire::Tokens { head, items: &[], trail: &trail }))]
    });
}

/// The code on a connection that is closed after its first message.
fn code_of(link: &mut Connection) -> CloseCode {
    let mut bytes = Vec::new();
    link.receiver.set_idle_timeout(Some(WAIT)).unwrap();
    link.receiver.receive(&mut bytes).unwrap();
    let code = Closing::decode(&bytes).unwrap().code;
    assert!(ends(link, WAIT));
    code
}

#[test]
fn links_that_belong_nowhere_are_told_so() {
    let (model, identity) = (model("llama", 2), identity());
    let worker = worker(&identity, &model.path);
    let caller = Caller::greet(&identity, worker.port());
    // No stage at all, then one of another placement.
    assert_eq!(code_of(&mut caller.connect(Epoch(9), DataKind::Hidden)), CloseCode::Epoch);
    let mut stage = Stage::start(caller, &model.path, Epoch(9));
    stage.begin();
    assert_eq!(code_of(&mut stage.caller.connect(Epoch(8), DataKind::Hidden)), CloseCode::Epoch);
    assert_eq!(code_of(&mut stage.caller.connect(Epoch(9), DataKind::Hidden)), CloseCode::Taken);
    let stranger = identity.another_instance().unwrap();
    let address = ([127, 0, 0, 1], worker.port()).into();
    let dial =
        || swarm_link::dial(&[address], &stranger, &swarm_link::LinkSettings::default(), WAIT).unwrap();
    let mut garbage = dial();
    garbage.sender.send(&[&[0xee; 300]]).unwrap();
    assert_eq!(code_of(&mut garbage), CloseCode::Malformed);
    // One that speaks in another's name.
    let mut false_name = dial();
    let from = swarm_wire::NodeId(*stage.caller.identity.node_id().as_bytes());
    let hello = swarm_wire::DataHello { epoch: Epoch(9), kind: DataKind::Tokens, from };
    false_name.sender.send(&[&hello.encode()]).unwrap();
    assert_eq!(code_of(&mut false_name), CloseCode::Unexpected);
    assert_eq!(stage.step(&[(ONE, 2, 1)]).tokens.len(), 1);
    let refused = worker.watch().status().links_refused;
    let counts = ["epoch", "taken", "malformed", "unexpected"].map(|code| refused[code]);
    assert_eq!(counts, [2, 1, 1, 1], "{refused:?}");
}

#[test]
fn another_protocol_version_is_refused_by_both_numbers() {
    let (model, identity) = (model("llama", 2), identity());
    let worker = worker(&identity, &model.path);
    let refused = Caller::greet_as(&identity, worker.port(), |hello| hello.protocol_major += 41);
    let refused = refused.map(drop).unwrap_err();
    assert_eq!(refused.code, Some(CloseCode::Version));
    let (theirs, ours) = (swarm_wire::PROTOCOL_MAJOR + 41, swarm_wire::PROTOCOL_MAJOR);
    let versions = format!("protocol {theirs}, this node {ours}");
    assert!(refused.reason.contains(&versions), "{}", refused.reason);
    assert_eq!(worker.watch().status().links_refused["version"], 1);
    Caller::greet(&identity, worker.port());
}

#[test]
fn a_tail_that_breaks_the_protocol_is_told_why_and_done_without() {
    let model = model("llama", 2);
    let head = |epoch| FrameHead { epoch, lap: 1 };
    let tokens = |epoch, items: &[swarm_wire::TokenOut]| {
        let limits = Limits {
            width: 1,
            vocab: u32::MAX,
            context_max: 512,
            tokens_max: 32,
            segments_max: 4,
            stages_max: 4,
        };
        let (mut bytes, trail) = (Vec::new(), [StageTime::default(); 2]);
        let frame = Frame::Tokens(swarm_wire::Tokens { head: head(epoch), items, trail: &trail });
        frame.encode(&limits, &mut bytes).unwrap();
        bytes
    };
    let item =
        swarm_wire::TokenOut { session: SessionId(1), position: Position(23), token: 4, logits_hash: None };
    let unknown = swarm_wire::TokenOut { token: u32::MAX - 1, ..item };
    let early = swarm_wire::TokenOut { position: Position(3), ..item };
    let garbage = |_: Epoch| vec![0xaa; 64];
    type Bytes<'a> = Box<dyn Fn(Epoch) -> Vec<u8> + 'a>;
    let cases: [(CloseCode, Bytes<'_>); 4] = [
        (CloseCode::Malformed, Box::new(garbage)),
        (CloseCode::OverLimit, Box::new(|epoch| tokens(epoch, &[unknown]))),
        (CloseCode::Order, Box::new(|epoch| tokens(epoch, &[early]))),
        (CloseCode::OverLimit, Box::new(|_| vec![5; 1 << 22])),
    ];
    for (code, bytes) in cases {
        let identity = identity();
        let puppet = Puppet::start(&identity, "puppet");
        let search = WorkerSearch {
            peers: vec![vec![puppet.address]],
            at_least: 1,
            at_most: 1,
            within: WAIT,
            ..WorkerSearch::default()
        };
        let engine = Engine::start(&config(&model.path, search), &identity, &|_| {}).unwrap();
        let generation = engine.generate(request(5)).unwrap();
        puppet.say_as_tail(bytes(puppet.orders()[0]));
        let Finish::Error(why) = generation.finish().finish else { panic!("{code:?}") };
        assert!(why.contains("puppet") && why.contains("layers 1..2"), "{why}");
        wait_for(WAIT, "the code", || puppet.closings() == [code]).unwrap();
        assert_eq!(engine.watch().status().links_refused[code.name()], 1);
        if code == CloseCode::Malformed {
            answer(&engine, 3);
            assert_eq!(engine.nodes().len(), 1);
        }
    }
}
