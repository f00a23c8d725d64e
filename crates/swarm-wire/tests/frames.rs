//! The data plane under hostile input: total, exact, one encoding per meaning.

use proptest::collection::vec;
use proptest::prelude::*;
use swarm_wire::{
    Blame, DataHello, DataKind, DecodeError, EncodeError, Epoch, FAILED_TEXT_BYTES_MAX, Failed, Frame,
    FrameHead, FrameKind, FrameView, HIDDEN_HEAD_BYTES, Hidden, Limits, NodeId, Open, Position, Sampling,
    SegmentHead, SessionId, StageTime, TIME_US_MAX, TokenOut, Tokens, patch_sent_us, peek,
};

const LIMITS: Limits =
    Limits { width: 3, vocab: 1000, context_max: 64, tokens_max: 16, segments_max: 6, stages_max: 5 };

/// A frame that owns what [`Frame`] borrows.
#[derive(Clone, Debug, PartialEq)]
enum Owned {
    Hidden(FrameHead, Vec<SegmentHead>, Vec<StageTime>, Vec<f32>),
    Open(Epoch, SessionId, Sampling, Vec<u32>, bool),
    Truncate(Epoch, SessionId, Position),
    Close(Epoch, SessionId),
    Tokens(FrameHead, Vec<TokenOut>, Vec<StageTime>),
    Failed(Epoch, Option<SessionId>, Blame, NodeId, String),
}

impl Owned {
    fn borrow(&self) -> Frame<'_> {
        match self {
            Self::Hidden(head, segments, trail, rows) => {
                Frame::Hidden(Hidden { head: *head, segments, trail, rows })
            }
            Self::Open(epoch, session, sampling, prompt, logits_hash) => Frame::Open(Open {
                epoch: *epoch,
                session: *session,
                sampling: *sampling,
                prompt,
                logits_hash: *logits_hash,
            }),
            Self::Truncate(epoch, session, position) => {
                Frame::Truncate { epoch: *epoch, session: *session, position: *position }
            }
            Self::Close(epoch, session) => Frame::Close { epoch: *epoch, session: *session },
            Self::Tokens(head, items, trail) => Frame::Tokens(Tokens { head: *head, items, trail }),
            Self::Failed(epoch, session, blame, from, text) => {
                Frame::Failed(Failed { epoch: *epoch, session: *session, blame: *blame, from: *from, text })
            }
        }
    }

    fn of(view: &FrameView<'_>) -> Self {
        match view {
            FrameView::Hidden(view) => {
                let mut rows = vec![0.0; view.rows_len()];
                view.rows_into(&mut rows).unwrap();
                Self::Hidden(view.head, view.segments().collect(), view.trail().collect(), rows)
            }
            FrameView::Open(view) => {
                Self::Open(view.epoch, view.session, view.sampling, view.prompt().collect(), view.logits_hash)
            }
            FrameView::Truncate { epoch, session, position } => Self::Truncate(*epoch, *session, *position),
            FrameView::Close { epoch, session } => Self::Close(*epoch, *session),
            FrameView::Tokens(view) => {
                let items: Vec<_> = view.items().collect();
                assert_eq!(items.len(), view.len());
                Self::Tokens(view.head, items, view.trail().collect())
            }
            FrameView::Failed(view) => {
                Self::Failed(view.epoch, view.session, view.blame, view.from, view.text.to_owned())
            }
            other => panic!("a kind without a test: {other:?}"),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.borrow().encode(&LIMITS, &mut out).unwrap();
        out
    }
}

fn head() -> impl Strategy<Value = FrameHead> {
    (any::<u32>(), any::<u64>()).prop_map(|(epoch, lap)| FrameHead { epoch: Epoch(epoch), lap })
}

fn trail() -> impl Strategy<Value = Vec<StageTime>> {
    let value = || 0..=TIME_US_MAX;
    let entry = (value(), value(), value(), value(), value(), value()).prop_map(
        |(arriving_us, received_us, started_us, finished_us, sent_us, bytes_in)| StageTime {
            arriving_us,
            received_us,
            started_us,
            finished_us,
            sent_us,
            bytes_in,
        },
    );
    vec(entry, 0..=5)
}

fn segments() -> impl Strategy<Value = Vec<SegmentHead>> {
    vec((0u32..=62, 1u32..=2, any::<bool>(), any::<u32>()), 0..=6).prop_map(|parts| {
        let segment =
            |(index, (position, tokens, sample, high)): (usize, (u32, u32, bool, u32))| SegmentHead {
                session: SessionId((u64::from(high) << 8) | index as u64),
                position: Position(position),
                tokens,
                sample,
            };
        parts.into_iter().enumerate().map(segment).collect()
    })
}

fn finite_f32() -> impl Strategy<Value = f32> {
    -1e6f32..1e6
}

fn hidden() -> impl Strategy<Value = Owned> {
    (head(), segments(), trail())
        .prop_flat_map(|(head, segments, trail)| {
            let tokens: u32 = segments.iter().map(|segment| segment.tokens).sum();
            let rows = vec(finite_f32(), (tokens * LIMITS.width) as usize);
            (Just(head), Just(segments), Just(trail), rows)
        })
        .prop_map(|(head, segments, trail, rows)| Owned::Hidden(head, segments, trail, rows))
}

fn sampling() -> impl Strategy<Value = Sampling> {
    (0f32..=100.0, any::<u32>(), 0.001f32..=1.0, 0f32..=1.0, 0.01f32..=100.0, any::<u64>()).prop_map(
        |(temperature, top_k, top_p, min_p, repetition_penalty, seed)| Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
        },
    )
}

fn frame() -> impl Strategy<Value = Owned> {
    let session = || any::<u64>().prop_map(SessionId);
    let epoch = || any::<u32>().prop_map(Epoch);
    let position = || (0u32..=64).prop_map(Position);
    let item = (session(), position(), 0u32..1000, any::<Option<[u8; 32]>>()).prop_map(
        |(session, position, token, logits_hash)| TokenOut { session, position, token, logits_hash },
    );
    let blame = prop_oneof![Just(Blame::Caller), Just(Blame::Link), Just(Blame::Peer), Just(Blame::Us)];
    prop_oneof![
        3 => hidden(),
        2 => (epoch(), session(), sampling(), vec(0u32..1000, 1..=64), any::<bool>())
            .prop_map(|(e, s, sampling, prompt, hash)| Owned::Open(e, s, sampling, prompt, hash)),
        1 => (epoch(), session(), position()).prop_map(|(e, s, p)| Owned::Truncate(e, s, p)),
        1 => (epoch(), session()).prop_map(|(e, s)| Owned::Close(e, s)),
        2 => (head(), vec(item, 0..=16), trail()).prop_map(|(h, i, t)| Owned::Tokens(h, i, t)),
        1 => (epoch(), proptest::option::of(session()), blame, any::<[u8; 32]>(), ".{0,40}")
            .prop_map(|(e, s, b, n, t)| Owned::Failed(e, s, b, NodeId(n), t)),
    ]
}

/// The one law of a decoder: an error, or a frame that encodes to the same bytes.
fn total(bytes: &[u8]) {
    let _ = peek(bytes);
    let _ = DataHello::decode(bytes);
    if let Ok(view) = FrameView::decode(bytes, &LIMITS) {
        assert_eq!(Owned::of(&view).bytes(), bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn round_trip(frame in frame()) {
        let bytes = frame.bytes();
        prop_assert!(bytes.len() as u64 <= LIMITS.frame_bytes_max().unwrap());
        let view = FrameView::decode(&bytes, &LIMITS).unwrap();
        prop_assert_eq!(&Owned::of(&view), &frame);
        let seen = peek(&bytes).unwrap();
        prop_assert_eq!((seen.kind, seen.epoch), (view.kind(), view.epoch()));
    }

    #[test]
    fn random_bytes(bytes in vec(any::<u8>(), 0..400)) {
        total(&bytes);
    }

    /// Random bytes rarely pass the header, so give them one.
    #[test]
    fn random_bytes_after_a_plausible_header(
        kind in 0u8..8, flags in 0u8..5, count in 0u16..8, rest in vec(prop_oneof![Just(0u8), 0u8..4, any::<u8>()], 0..300),
    ) {
        let mut bytes = vec![kind, flags];
        bytes.extend(count.to_le_bytes());
        bytes.extend([1, 0, 0, 0]);
        bytes.extend(rest);
        total(&bytes);
    }

    #[test]
    fn unaligned_rows(frame in hidden(), shift in 0usize..8) {
        let mut bytes = vec![0u8; shift];
        bytes.extend(frame.bytes());
        let view = FrameView::decode(&bytes[shift..], &LIMITS).unwrap();
        prop_assert_eq!(Owned::of(&view), frame);
    }

    #[test]
    fn data_hello(epoch in any::<u32>(), hidden in any::<bool>(), from in any::<[u8; 32]>(), flip in 0usize..44, bit in 0u32..8) {
        let kind = if hidden { DataKind::Hidden } else { DataKind::Tokens };
        let hello = DataHello { epoch: Epoch(epoch), kind, from: NodeId(from) };
        let mut bytes = hello.encode().to_vec();
        prop_assert_eq!(DataHello::decode(&bytes), Ok(hello));
        for len in 0..bytes.len() {
            prop_assert!(DataHello::decode(&bytes[..len]).is_err());
        }
        bytes.push(0);
        prop_assert!(DataHello::decode(&bytes).is_err());
        bytes.pop();
        bytes[flip] ^= 1 << bit;
        if let Ok(other) = DataHello::decode(&bytes) {
            prop_assert_eq!(other.encode().to_vec(), bytes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_bit_of_every_byte_flipped(frame in frame()) {
        let mut bytes = frame.bytes();
        for at in 0..bytes.len() {
            let kept = bytes[at];
            for mask in [0xff, 1, 2, 4, 8, 16, 32, 64, 128] {
                bytes[at] = kept ^ mask;
                total(&bytes);
            }
            bytes[at] = kept;
        }
    }

    #[test]
    fn every_truncation_and_every_longer_length(frame in frame()) {
        let mut bytes = frame.bytes();
        for len in 0..bytes.len() {
            prop_assert!(FrameView::decode(&bytes[..len], &LIMITS).is_err());
        }
        for extra in [0u8, 1, 255] {
            bytes.push(extra);
            prop_assert!(FrameView::decode(&bytes, &LIMITS).is_err());
        }
    }

    /// Each aligned group of 2, 4 and 8 bytes becomes the largest number.
    #[test]
    fn huge_lengths(frame in frame()) {
        let bytes = frame.bytes();
        for size in [2, 4, 8] {
            for at in (0..bytes.len().saturating_sub(size)).step_by(size) {
                let mut bytes = bytes.clone();
                bytes[at..at + size].fill(0xff);
                total(&bytes);
                bytes[at + size - 1] = 0x7f;
                total(&bytes);
            }
        }
    }
}

fn one_row() -> Owned {
    let segment = SegmentHead { session: SessionId(9), position: Position(3), tokens: 1, sample: true };
    let trail = vec![StageTime::default(), StageTime { bytes_in: 7, ..StageTime::default() }];
    Owned::Hidden(FrameHead { epoch: Epoch(2), lap: 5 }, vec![segment], trail, vec![1.0, 2.0, 3.0])
}

#[test]
fn sent_us_is_patched_in_the_last_entry_only() {
    let mut bytes = one_row().bytes();
    patch_sent_us(&mut bytes, 1234).unwrap();
    let FrameView::Hidden(view) = FrameView::decode(&bytes, &LIMITS).unwrap() else { panic!() };
    let trail: Vec<_> = view.trail().collect();
    assert_eq!(trail[0], StageTime::default());
    assert_eq!(trail[1], StageTime { sent_us: 1234, bytes_in: 7, ..StageTime::default() });
    patch_sent_us(&mut bytes, u64::MAX).unwrap();
    assert!(FrameView::decode(&bytes, &LIMITS).is_ok());
    let mut close = Owned::Close(Epoch(0), SessionId(0)).bytes();
    assert_eq!(patch_sent_us(&mut close, 1), Err(EncodeError::NoTrail));
    for len in 0..HIDDEN_HEAD_BYTES + 80 - 8 {
        assert!(patch_sent_us(&mut bytes[..len].to_vec(), 1).is_err(), "{len}");
    }
}

#[test]
fn a_reused_buffer_is_not_reallocated() {
    let frame = one_row();
    let mut out = Vec::new();
    frame.borrow().encode(&LIMITS, &mut out).unwrap();
    let (pointer, capacity) = (out.as_ptr(), out.capacity());
    for _ in 0..3 {
        frame.borrow().encode(&LIMITS, &mut out).unwrap();
    }
    assert_eq!((out.as_ptr(), out.capacity()), (pointer, capacity));
}

#[test]
fn a_middle_stage_extends_the_trail() {
    let bytes = one_row().bytes();
    let FrameView::Hidden(view) = FrameView::decode(&bytes, &LIMITS).unwrap() else { panic!() };
    let mut rows = vec![0.0; view.rows_len()];
    view.rows_into(&mut rows).unwrap();
    rows.iter_mut().for_each(|value| *value += 1.0);
    let segments: Vec<_> = view.segments().collect();
    let own = StageTime { bytes_in: bytes.len() as u64, ..StageTime::default() };
    let trail: Vec<_> = view.trail().chain([own]).collect();
    let onward = Owned::Hidden(view.head, segments, trail.clone(), rows);
    let onward = onward.bytes();
    let FrameView::Hidden(next) = FrameView::decode(&onward, &LIMITS).unwrap() else { panic!() };
    assert_eq!(next.trail().collect::<Vec<_>>(), trail);
    assert!(view.rows_into(&mut [0.0; 2]).is_err());
}

#[test]
fn what_a_peer_would_refuse_is_not_sent() {
    let mut out = Vec::new();
    let segment = |session, position, tokens| SegmentHead {
        session: SessionId(session),
        position: Position(position),
        tokens,
        sample: false,
    };
    let mut refused = |segments: &[SegmentHead], floats: usize| {
        let rows = vec![0.0; floats];
        let head = FrameHead { epoch: Epoch(1), lap: 0 };
        let frame = Frame::Hidden(Hidden { head, segments, trail: &[], rows: &rows });
        frame.encode(&LIMITS, &mut out).unwrap_err()
    };
    let inner = |error: EncodeError| match error {
        EncodeError::WouldBeRefused(error) => error,
        other => panic!("{other}"),
    };
    assert!(matches!(inner(refused(&[segment(1, 0, 0)], 0)), DecodeError::Empty(_)));
    assert!(matches!(inner(refused(&[segment(1, 63, 2)], 6)), DecodeError::OutOfRange { max: 64, .. }));
    assert!(matches!(inner(refused(&[segment(1, u32::MAX, u32::MAX)], 0)), DecodeError::OutOfRange { .. }));
    assert!(matches!(inner(refused(&[segment(1, 0, 17)], 51)), DecodeError::OutOfRange { max: 16, .. }));
    assert!(matches!(
        inner(refused(&[segment(1, 0, 9), segment(2, 0, 9)], 54)),
        DecodeError::OutOfRange { max: 16, .. }
    ));
    assert_eq!(
        inner(refused(&[segment(1, 0, 1), segment(1, 1, 1)], 6)),
        DecodeError::RepeatedSession(SessionId(1))
    );
    assert!(matches!(refused(&[segment(1, 0, 1)], 4), EncodeError::RowsMismatch { want: 3, got: 4, .. }));
    let many: Vec<_> = (0..7).map(|session| segment(session, 0, 1)).collect();
    assert!(matches!(inner(refused(&many, 21)), DecodeError::OutOfRange { what: "segments", .. }));
}

#[test]
fn limits_are_enforced_by_the_reader() {
    let bytes = one_row().bytes();
    let narrow = Limits { width: 4, ..LIMITS };
    assert_eq!(FrameView::decode(&bytes, &narrow), Err(DecodeError::WidthMismatch { want: 4, got: 3 }));
    let short = Limits { context_max: 3, ..LIMITS };
    assert!(matches!(FrameView::decode(&bytes, &short), Err(DecodeError::OutOfRange { value: 4, .. })));
    let few = Limits { stages_max: 1, ..LIMITS };
    assert!(matches!(FrameView::decode(&bytes, &few), Err(DecodeError::OutOfRange { what: "stages", .. })));
    let open = Owned::Open(Epoch(1), SessionId(1), Sampling::default(), vec![1, 2, 999, 4], false).bytes();
    let small = Limits { vocab: 999, ..LIMITS };
    assert!(matches!(
        FrameView::decode(&open, &small),
        Err(DecodeError::OutOfRange { what: "token id", .. })
    ));
    let short = Limits { context_max: 3, ..LIMITS };
    assert!(matches!(FrameView::decode(&open, &short), Err(DecodeError::OutOfRange { value: 4, .. })));
    assert_eq!(FrameView::decode(&[7; 64], &LIMITS), Err(DecodeError::UnknownKind(7)));
    assert_eq!(DecodeError::UnknownKind(7).blame(), Blame::Peer);
}

#[test]
fn long_failure_texts_are_cut_at_a_character() {
    let text = "é".repeat(FAILED_TEXT_BYTES_MAX);
    let bytes = Owned::Failed(Epoch(1), None, Blame::Us, NodeId([1; 32]), format!("a{text}")).bytes();
    let FrameView::Failed(view) = FrameView::decode(&bytes, &LIMITS).unwrap() else { panic!() };
    assert_eq!(view.text.len(), FAILED_TEXT_BYTES_MAX - 1);
}

#[test]
fn kinds_and_connections() {
    assert!(FrameKind::Hidden.belongs_on(DataKind::Hidden));
    assert!(FrameKind::Failed.belongs_on(DataKind::Hidden));
    assert!(FrameKind::Failed.belongs_on(DataKind::Tokens));
    assert!(!FrameKind::Tokens.belongs_on(DataKind::Hidden));
    assert!(!FrameKind::Hidden.belongs_on(DataKind::Tokens));
}

#[test]
fn blame_bytes_round_trip() {
    let known: Vec<_> = (0..=255).filter_map(Blame::from_wire).collect();
    assert_eq!(known.len(), 4);
    for blame in known {
        assert_eq!(Blame::from_wire(blame.to_wire()), Some(blame));
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The layout other builds rely on. A change here is a change of the protocol's major number.
#[test]
fn the_bytes_are_the_documented_ones() {
    let head = FrameHead { epoch: Epoch(2), lap: 5 };
    let time =
        StageTime { arriving_us: 6, received_us: 1, started_us: 2, finished_us: 3, sent_us: 4, bytes_in: 5 };
    let segment = SegmentHead { session: SessionId(9), position: Position(3), tokens: 1, sample: true };
    let hidden = Owned::Hidden(head, vec![segment], vec![time], vec![1.0, 2.0, -0.5]);
    let trail = concat!(
        "0600000000000000",
        "01000000000000000200000000000000030000000000000004000000000000000500000000000000"
    );
    assert_eq!(
        hex(&hidden.bytes()),
        [
            "0100010002000000050000000000000001000000",
            "03000000",
            trail,
            "0900000000000000030000000100",
            "0100",
            "0000803f00000040000000bf",
        ]
        .concat()
    );
    let item =
        TokenOut { session: SessionId(9), position: Position(4), token: 258, logits_hash: Some([7; 32]) };
    assert_eq!(
        hex(&Owned::Tokens(head, vec![item], vec![time]).bytes()),
        [
            "0500010002000000050000000000000001000000",
            "00000000",
            trail,
            "0900000000000000040000000201000001",
            &"07".repeat(32),
        ]
        .concat()
    );
    let open =
        Owned::Open(Epoch(2), SessionId(9), Sampling { seed: 6, ..Sampling::default() }, vec![258], true);
    assert_eq!(
        hex(&open.bytes()),
        "0201000002000000090000000000000000000000000000000000803f000000000000803f01000000060000000000000002010000"
    );
    assert_eq!(
        hex(&Owned::Truncate(Epoch(2), SessionId(9), Position(3)).bytes()),
        "0300000002000000090000000000000003000000"
    );
    assert_eq!(hex(&Owned::Close(Epoch(2), SessionId(9)).bytes()), "04000000020000000900000000000000");
    let failed = Owned::Failed(Epoch(2), Some(SessionId(9)), Blame::Peer, NodeId([8; 32]), "no".into());
    assert_eq!(
        hex(&failed.bytes()),
        ["06030100020000000900000000000000", &"08".repeat(32), "02006e6f"].concat()
    );
    let hello = DataHello { epoch: Epoch(2), kind: DataKind::Tokens, from: NodeId([8; 32]) };
    assert_eq!(hex(&hello.encode()), ["53774f530200000002000000", &"08".repeat(32)].concat());
}
