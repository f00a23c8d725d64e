//! Frames and control messages: total, and one meaning has one encoding.

use swarm_wire::{
    Ack, Answer, Ask, Blame, CONTROL_KINDS, CloseCode, Closing, Control, DataHello, DataKind, Echo, Epoch,
    Failed, Frame, FrameHead, FrameView, Hidden, Limits, NodeId, Open, PIECE_BYTES_MAX, PieceRange, Position,
    Receipt, Sampling, SegmentHead, SessionId, StageTime, TokenOut, Tokens, patch_sent_us, peek,
};

use super::{Shape, Target, chain, outcome};

pub const FRAMES: Target = Target {
    name: "frames",
    shape: Shape::Binary,
    words: &["SwOS"],
    seeds: frame_seeds,
    run: frame,
    runs: 200_000,
};

pub const CONTROL: Target = Target {
    name: "control",
    shape: Shape::Json,
    words: &CONTROL_WORDS,
    seeds: control_seeds,
    run: control,
    runs: 60_000,
};

/// Names of fields, and texts that are no numbers.
const FIELDS: [&str; 22] = [
    "kind",
    "node_id",
    "layers",
    "limits",
    "next",
    "addresses",
    "epoch",
    "read_gb_s",
    "models",
    "code",
    "towards",
    "shape",
    "targets",
    "links",
    "bytes_per_s",
    "files",
    "origin",
    "sources",
    "roots",
    "unit",
    "NaN",
    "1e999",
];

const CONTROL_WORDS: [&str; FIELDS.len() + CONTROL_KINDS.len()] = {
    let mut words = [""; FIELDS.len() + CONTROL_KINDS.len()];
    let mut at = 0;
    while at < words.len() {
        words[at] = if at < FIELDS.len() { FIELDS[at] } else { CONTROL_KINDS[at - FIELDS.len()] };
        at += 1;
    }
    words
};

pub const LIMITS: Limits =
    Limits { width: 4, vocab: 100, context_max: 64, tokens_max: 8, segments_max: 3, stages_max: 3 };

fn frame_seeds() -> Vec<Vec<u8>> {
    let (epoch, session) = (Epoch(5), SessionId(9));
    let head = FrameHead { epoch, lap: 77 };
    let time =
        StageTime { arriving_us: 1, received_us: 1, started_us: 2, finished_us: 3, sent_us: 4, bytes_in: 5 };
    let segment = |session, position, tokens, sample| SegmentHead {
        session: SessionId(session),
        position: Position(position),
        tokens,
        sample,
    };
    let segments = [segment(1, 0, 3, false), segment(2, 40, 1, true)];
    let hashed = TokenOut { session, position: Position(3), token: 99, logits_hash: Some([7; 32]) };
    let items = [hashed, TokenOut { session: SessionId(2), logits_hash: None, ..hashed }];
    let from = NodeId([3; 32]);
    let frames = [
        Frame::Hidden(Hidden { head, segments: &segments, trail: &[time, time], rows: &[0.5; 16] }),
        Frame::Hidden(Hidden { head, segments: &[], trail: &[time], rows: &[] }),
        Frame::Open(Open {
            epoch,
            session,
            sampling: Sampling::default(),
            prompt: &[1, 2, 3],
            logits_hash: true,
        }),
        Frame::Truncate { epoch, session, position: Position(8) },
        Frame::Close { epoch, session },
        Frame::Tokens(Tokens { head, items: &items, trail: &[time; 3] }),
        Frame::Failed(Failed { epoch, session: Some(session), blame: Blame::Peer, from, text: "no memory" }),
        Frame::Failed(Failed { epoch, session: None, blame: Blame::Us, from, text: "" }),
    ];
    let encoded = frames.iter().map(|frame| {
        let mut out = Vec::new();
        frame.encode(&LIMITS, &mut out).expect("a seed is sound");
        out
    });
    let hello = DataHello { epoch, kind: DataKind::Tokens, from };
    let receipts = [
        Ack { epoch, lap: 77 }.encode().to_vec(),
        Echo { epoch, lap: 77 }.encode().to_vec(),
        Closing { epoch, code: CloseCode::Order }.encode().to_vec(),
    ];
    encoded.chain([hello.encode().to_vec()]).chain(receipts).chain(bulk_seeds()).collect()
}

/// Asks for bytes of weights, and answers.
fn bulk_seeds() -> Vec<Vec<u8>> {
    let range = |offset, bytes| PieceRange { offset, bytes };
    let (first, second) = (range(8, 300), range(1 << 33, PIECE_BYTES_MAX));
    let asks = [
        Ask { file: 0, through: false, pieces: vec![first] },
        Ask { file: 3, through: true, pieces: vec![first, second] },
    ];
    let answers = [
        Answer::Piece { range: first, digest: [9; 32], bytes: &[1, 2, 3] },
        Answer::Bytes(&[4, 5]),
        Answer::Absent { range: second },
        Answer::Wait,
    ];
    let mut out = Vec::new();
    let asks = asks.map(|ask| {
        ask.encode(&mut out).expect("a seed is sound");
        out.clone()
    });
    let answers = answers.map(|answer| {
        let mut out = Vec::new();
        answer.encode(&mut out);
        out
    });
    asks.into_iter().chain(answers).collect()
}

/// The messages of a connection for bytes: what decodes, encodes to the same.
fn bulk(bytes: &[u8]) {
    let mut out = Vec::new();
    if let Ok(ask) = Ask::decode(bytes) {
        ask.encode(&mut out).expect("what decodes, encodes");
        assert_eq!(out, bytes, "an ask has two encodings");
        assert!(ask.pieces.windows(2).all(|pair| pair[0].end() <= pair[1].offset), "pieces overlap");
    }
    if let Ok(answer) = Answer::decode(bytes) {
        answer.encode(&mut out);
        assert_eq!(out, bytes, "an answer has two encodings");
    }
}

fn frame(bytes: &[u8]) -> u64 {
    if let Ok(hello) = DataHello::decode(bytes) {
        assert_eq!(hello.encode(), bytes, "a greeting has two encodings");
    }
    match Receipt::decode(bytes) {
        Ok(Receipt::Ack(ack)) => assert_eq!(ack.encode(), bytes, "a receipt has two encodings"),
        Ok(Receipt::Echo(echo)) => assert_eq!(echo.encode(), bytes, "an echo has two encodings"),
        Ok(Receipt::Closing(closing)) => assert_eq!(closing.encode(), bytes, "a closing has two encodings"),
        Err(_) => {}
    }
    bulk(bytes);
    let peeked = peek(bytes);
    let mut patched = bytes.to_vec();
    let _ = patch_sent_us(&mut patched, u64::MAX);
    let tight = Limits { width: 1, vocab: 1, context_max: 1, tokens_max: 1, segments_max: 1, stages_max: 1 };
    let _ = FrameView::decode(bytes, &tight);
    match FrameView::decode(bytes, &LIMITS) {
        Ok(view) => {
            let peeked = peeked.expect("what decodes can be peeked at");
            assert_eq!((peeked.kind, peeked.epoch), (view.kind(), view.epoch()));
            assert_eq!(encode(&view), bytes, "a frame has two encodings");
            outcome(&format!("{:?}", view.kind()))
        }
        Err(error) => outcome(&chain(&error)),
    }
}

/// The frame of a view, as bytes.
fn encode(view: &FrameView<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    let (mut rows, mut segments, mut items, mut prompt) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut trail: Vec<StageTime> = Vec::new();
    let frame = match *view {
        FrameView::Hidden(hidden) => {
            rows.resize(hidden.rows_len(), 0.0);
            hidden.rows_into(&mut rows).expect("the length was asked for");
            segments.extend(hidden.segments());
            trail.extend(hidden.trail());
            Frame::Hidden(Hidden { head: hidden.head, segments: &segments, trail: &trail, rows: &rows })
        }
        FrameView::Open(open) => {
            prompt.extend(open.prompt());
            let (epoch, session, sampling) = (open.epoch, open.session, open.sampling);
            Frame::Open(Open { epoch, session, sampling, prompt: &prompt, logits_hash: open.logits_hash })
        }
        FrameView::Tokens(tokens) => {
            items.extend(tokens.items());
            assert_eq!(items.len(), tokens.len());
            trail.extend(tokens.trail());
            Frame::Tokens(Tokens { head: tokens.head, items: &items, trail: &trail })
        }
        FrameView::Truncate { epoch, session, position } => Frame::Truncate { epoch, session, position },
        FrameView::Close { epoch, session } => Frame::Close { epoch, session },
        FrameView::Failed(failed) => Frame::Failed(failed),
        _ => panic!("a kind of frame without a test"),
    };
    frame.encode(&LIMITS, &mut out).expect("what decodes, encodes");
    out
}

fn control_seeds() -> Vec<Vec<u8>> {
    let id = "ab".repeat(32);
    let hello = format!(
        r#""protocol_major":1,"protocol_minor":0,"build":"0.1.0","numerics":"n-1","role":"worker","node_id":"{id}","name":"den","memory_bytes_available":8000000000,"cores":4,"read_gb_s":12.5,"models":["smol"]"#
    );
    let limits =
        r#"{"width":64,"vocab":300,"context_max":512,"tokens_max":32,"segments_max":4,"stages_max":3}"#;
    let prepare = |layers: &str, tail: bool, next: &str| {
        format!(
            r#"{{"kind":"prepare","epoch":3,"model":"toy","fingerprint":"{id}","layers":{layers},"layers_total":4,"tail":{tail},"kv_type":"f16","context":512,"sessions_max":4,"limits":{limits},"next":{next},"threads":2,"numerics":"n-1"}}"#
        )
    };
    let next = format!(r#"{{"node_id":"{id}","addresses":["10.0.0.7:4000","[fe80::1%3]:4000","[::1]:9"]}}"#);
    let messages = [
        format!(r#"{{"kind":"hello",{hello}}}"#),
        format!(r#"{{"kind":"welcome",{hello},"new_field":{{"a":[1,2]}}}}"#),
        prepare("[1,4]", true, "null"),
        prepare("[1,2]", false, &next),
        r#"{"kind":"loading","bytes_done":1,"bytes_total":2}"#.to_owned(),
        r#"{"kind":"ready","epoch":3,"bytes_loaded":5,"weight_bytes_per_token":4}"#.to_owned(),
        r#"{"kind":"start","epoch":3}"#.to_owned(),
        r#"{"kind":"started","epoch":3}"#.to_owned(),
        r#"{"kind":"refused","blame":"link","reason":"busy"}"#.to_owned(),
        format!(r#"{{"kind":"refused","blame":"peer","reason":"","epoch":3,"code":"order","towards":"{id}"}}"#),
        r#"{"kind":"ping","id":1,"sent_us":2}"#.to_owned(),
        r#"{"kind":"pong","id":1,"sent_us":2,"node_us":3}"#.to_owned(),
        r#"{"kind":"stats_request","id":1}"#.to_owned(),
        r#"{"kind":"stats","id":1,"epoch":3,"sessions":1,"frames":2,"tokens":3,"frames_stale":0,"bytes_in":4,"bytes_out":5,"weight_bytes":7,"kv_bytes":6,"queue_us_p50":1,"queue_us_p99":2,"compute_us_p50":3,"compute_us_p99":4}"#.to_owned(),
        r#"{"kind":"release","reason":"done"}"#.to_owned(),
        format!(
            r#"{{"kind":"measure","id":1,"shape":{{"layer":[{0},{0},{0},{0},{0},{0},{0}],"head":{0},"layers":4}},"threads":2,"targets":[{next}]}}"#,
            r#"{"dtype":"Q4_1","rows":64,"cols":32}"#
        ),
        format!(
            r#"{{"kind":"measured","id":1,"layer_ns":500,"row_ns":90,"head_ns":700,"layers":true,"links":[{{"node_id":"{id}","round_trip_ns":80000,"bytes_per_s":90000000}},{{"node_id":"{id}"}}]}}"#
        ),
        r#"{"kind":"wanting","epoch":3}"#.to_owned(),
        format!(
            r#"{{"kind":"supply","epoch":3,"fingerprint":"{id}","name":"toy","cache":"{id}","origin":{{"repository":"a/b","commit":"{0}","file":"x.gguf","fingerprint":"{id}"}},"files":[{{"name":"config.json","bytes":9,"small":true}},{{"name":"x.gguf","bytes":90000,"tag":"ab"}}]}}"#,
            "0a".repeat(20)
        ),
        format!(r#"{{"kind":"fetch","name":"toy","fingerprint":"{id}"}}"#),
        format!(
            r#"{{"kind":"measured","id":1,"layer_ns":5,"row_ns":9,"head_ns":7,"layers":false,"links":[],"held":{{"layers":[[0,2],[3,4]],"embed":true,"norm":false,"head":true,"roots":[{{"unit":3,"root":"{id}"}}]}}}}"#
        ),
        prepare("[1,4]", true, &format!(r#"null,"sources":[{{"node":{next},"units":[{{"unit":2,"root":"{id}"}}]}}]"#)),
        r#"{"kind":"resolve","model":"a/b@main:Q4_K_M"}"#.to_owned(),
        r#"{"kind":"list"}"#.to_owned(),
        format!(
            r#"{{"kind":"listed","name":"den","left_out":1,"models":[{{"name":"a/b","commit":"{}","file":"x.gguf","format":"gguf","layers_total":4,"layers":[[0,2],[3,4]],"bytes":90,"bytes_held":60}}]}}"#,
            "0a".repeat(20)
        ),
        r#"{"kind":"probe"}"#.to_owned(),
        r#"{"kind":"bye"}"#.to_owned(),
        r#"{"kind":"examine","id":1,"reach":4747,"hear":"00ff","padding_bytes":9}"#.to_owned(),
        format!(r#"{{"kind":"examined","id":1,"hello":{{{hello}}},"reaches":true,"hears":false,"padding":"000"}}"#),
    ];
    messages.into_iter().map(String::into_bytes).collect()
}

fn control(bytes: &[u8]) -> u64 {
    match Control::decode(bytes) {
        Ok(message) => {
            let mut out = Vec::new();
            message.encode(&mut out).expect("what decodes, encodes");
            let again = Control::decode(&out).expect("what was encoded, decodes");
            assert_eq!(again, message, "a message changed on its way");
            let kind = std::mem::discriminant(&message);
            outcome(&format!("{kind:?}")) ^ 1
        }
        Err(error) => outcome(&chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_sound_and_of_every_kind() {
        let seeds: Vec<String> =
            control_seeds().into_iter().map(|seed| String::from_utf8(seed).unwrap()).collect();
        for kind in CONTROL_KINDS {
            let named = format!("{{\"kind\":\"{kind}\"");
            assert!(seeds.iter().any(|seed| seed.starts_with(&named)), "{kind}");
        }
        for seed in control_seeds() {
            Control::decode(&seed)
                .unwrap_or_else(|error| panic!("{}: {}", seed.escape_ascii(), chain(&error)));
        }
    }
}
