//! The record layer over memory: any split survives, any change is noticed.

use std::io::Cursor as Bytes;

use proptest::prelude::*;

use super::*;
use crate::noise::tests::{node, pair};
use crate::noise::{Established, Suite};

const LIMIT: usize = 1 << 20;

fn ends() -> (Established, Established) {
    pair(&node(1), &node(1), Suite::preferred())
}

/// Takes bytes, and counts the calls.
#[derive(Default)]
struct Sink {
    bytes: Vec<u8>,
    writes: usize,
}

impl Write for &mut Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        self.writes += 1;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives bytes in chunks of the sizes asked for, over and over, with an interruption now and then.
struct Drip<'a> {
    bytes: &'a [u8],
    chunks: Vec<usize>,
    turn: usize,
}

impl Read for Drip<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.turn += 1;
        if self.turn.is_multiple_of(5) {
            return Err(ErrorKind::Interrupted.into());
        }
        let chunk = self.chunks[self.turn % self.chunks.len()].min(out.len()).min(self.bytes.len());
        let (now, later) = self.bytes.split_at(chunk);
        out[..chunk].copy_from_slice(now);
        self.bytes = later;
        Ok(chunk)
    }
}

/// Seals each message on its own; the wire bytes of each.
fn sealed(end: &Established, messages: &[&[u8]]) -> Vec<Vec<u8>> {
    let mut record = end.first_sent;
    messages
        .iter()
        .map(|message| {
            let mut sink = Sink::default();
            let mut writer = RecordWriter::new(&mut sink, Arc::clone(&end.keys), record, LIMIT);
            writer.send(&[message]).unwrap();
            record = writer.record;
            sink.bytes
        })
        .collect()
}

fn reader<R: Read>(end: &Established, input: R) -> RecordReader<R> {
    RecordReader::new(input, Arc::clone(&end.keys), end.first_received, LIMIT)
}

/// Receives until an error; the messages and the error.
fn receive_all(end: &Established, wire: &[u8]) -> (Vec<Vec<u8>>, LinkError) {
    let mut reader = reader(end, Bytes::new(wire));
    let mut messages = Vec::new();
    let mut message = Vec::new();
    loop {
        match reader.receive(&mut message) {
            Ok(_) => messages.push(message.clone()),
            Err(error) => {
                assert!(message.is_empty());
                assert!(matches!(reader.receive(&mut message), Err(LinkError::Broken)));
                return (messages, error);
            }
        }
    }
}

fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|index| (index as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

#[test]
fn a_small_message_is_one_write_and_steady_sending_grows_nothing() {
    let (one, two) = ends();
    let mut sink = Sink::default();
    let mut writer = RecordWriter::new(&mut sink, Arc::clone(&one.keys), one.first_sent, LIMIT);
    let body = pattern(8192, 1);
    let sent = writer.send(&[&body[..20], &body[20..]]).unwrap();
    let (plain, wire) = (writer.plain.capacity(), writer.wire.capacity());
    for _ in 0..10 {
        writer.send(&[&body]).unwrap();
    }
    assert_eq!((writer.plain.capacity(), writer.wire.capacity()), (plain, wire));
    assert_eq!(sent, 2 + 4 + 8192 + 16);
    assert_eq!(sink.writes, 11);
    let mut reader = reader(&two, Bytes::new(&sink.bytes));
    let mut message = Vec::new();
    assert_eq!(reader.receive(&mut message).unwrap(), sent);
    let capacity = message.capacity();
    for _ in 0..10 {
        reader.receive(&mut message).unwrap();
        assert_eq!(message, body);
    }
    assert_eq!(message.capacity(), capacity);
}

#[test]
fn a_large_message_takes_a_write_per_batch() {
    let (one, two) = ends();
    for (bytes, writes) in [(PLAIN_MAX - LENGTH_BYTES, 1), (BATCH_RECORDS * PLAIN_MAX - 4, 1), (1 << 20, 5)] {
        let mut sink = Sink::default();
        let body = pattern(bytes, 9);
        RecordWriter::new(&mut sink, Arc::clone(&one.keys), one.first_sent, LIMIT).send(&[&body]).unwrap();
        assert_eq!(sink.writes, writes, "{bytes} bytes");
        assert_eq!(receive_all(&two, &sink.bytes).0, [body]);
    }
}

#[test]
fn a_message_over_the_limit_is_refused_before_room_is_made() {
    let (one, two) = ends();
    let wire = sealed(&one, &[&pattern(5000, 1)]).concat();
    let mut reader = RecordReader::new(Bytes::new(&wire), Arc::clone(&two.keys), two.first_received, 4999);
    let mut message = Vec::new();
    let error = reader.receive(&mut message).unwrap_err();
    assert!(matches!(error, LinkError::MessageTooLong { bytes: 5000, bytes_max: 4999 }), "{error}");
    assert_eq!(message.capacity(), 0);

    // The largest length there is, in a record that is otherwise fine.
    let (mut record, mut wire) = (one.first_sent, Vec::new());
    seal(&one.keys, &mut record, &u32::MAX.to_le_bytes(), &mut wire, 0).unwrap();
    let (_, error) = receive_all(&two, &wire);
    assert!(matches!(error, LinkError::MessageTooLong { bytes: 0xffff_ffff, .. }), "{error}");
}

#[test]
fn a_message_too_long_to_send_leaves_the_link_intact() {
    let (one, two) = ends();
    let mut sink = Sink::default();
    let mut writer = RecordWriter::new(&mut sink, Arc::clone(&one.keys), one.first_sent, 10);
    let error = writer.send(&[b"123456", b"78901"]).unwrap_err();
    assert!(matches!(error, LinkError::SendTooLong { bytes: 11, bytes_max: 10 }), "{error}");
    writer.send(&[b"1234567890"]).unwrap();
    writer.set_bytes_max(11);
    writer.send(&[b"12345678901"]).unwrap();
    assert_eq!(receive_all(&two, &sink.bytes).0, [b"1234567890".to_vec(), b"12345678901".to_vec()]);
}

#[test]
fn records_a_peer_must_not_build_are_refused() {
    let (one, two) = ends();
    let craft = |records: &[&[u8]]| {
        let (mut record, mut wire) = (one.first_sent, Vec::new());
        for plain in records {
            let at = wire.len();
            seal(&one.keys, &mut record, plain, &mut wire, at).unwrap();
        }
        receive_all(&two, &wire)
    };
    let cases: [&[&[u8]]; 5] = [
        &[b""],                          // nothing at all
        &[b"\x01\x00\x00"],              // half a length
        &[b"\x01\x00\x00\x00ab"],        // more than announced
        &[b"\x03\x00\x00\x00a", b"bcd"], // more than announced, later
        &[b"\x02\x00\x00\x00a", b""],    // no progress
    ];
    for (index, case) in cases.into_iter().enumerate() {
        let (messages, error) = craft(case);
        assert!(messages.is_empty() && matches!(error, LinkError::BadRecord { .. }), "case {index}: {error}");
    }
    assert_eq!(craft(&[b"\x02\x00\x00\x00a", b"b"]).0, [b"ab".to_vec()]);
    assert_eq!(craft(&[b"\x00\x00\x00\x00"]).0, [b"".to_vec()]);
}

#[test]
fn replayed_reordered_dropped_and_reflected_records_are_refused() {
    let (one, two) = ends();
    let wires = sealed(&one, &[b"first", b"second", b"third"]);
    let [a, b, c] = wires.as_slice() else { panic!() };
    let tampered = |wire: &[&[u8]], good: usize| {
        let (messages, error) = receive_all(&two, &wire.concat());
        assert_eq!(messages.len(), good);
        assert!(matches!(error, LinkError::Tampered { record } if record == good as u64), "{error}");
    };
    tampered(&[a, a, b], 1);
    tampered(&[b, a, c], 0);
    tampered(&[a, c], 1);
    tampered(&[a, b, c, a], 3);
    // What `one` sent comes back to `one`.
    let (messages, error) = receive_all(&one, a);
    assert!(messages.is_empty() && matches!(error, LinkError::Tampered { .. }), "{error}");
    // A record of another link between the same two nodes.
    let (other, _) = ends();
    let (_, error) = receive_all(&two, &sealed(&other, &[b"first"]).concat());
    assert!(matches!(error, LinkError::Tampered { .. }), "{error}");
}

#[test]
fn worn_out_keys_are_not_used() {
    let (one, two) = ends();
    let mut sink = Sink::default();
    let mut writer = RecordWriter::new(&mut sink, Arc::clone(&one.keys), RECORDS_MAX - 1, LIMIT);
    writer.send(&[b"the last one"]).unwrap();
    assert!(matches!(writer.send(&[b"one more"]), Err(LinkError::WornOut)));
    assert!(matches!(writer.send(&[b"one more"]), Err(LinkError::Broken)));
    let mut extra = Vec::new();
    seal(&one.keys, &mut 0, b"\x00\x00\x00\x00", &mut extra, 0).unwrap();
    let wire = [sink.bytes, extra].concat();
    let mut reader = RecordReader::new(Bytes::new(&wire), Arc::clone(&two.keys), RECORDS_MAX - 1, LIMIT);
    let mut message = Vec::new();
    reader.receive(&mut message).unwrap();
    assert!(matches!(reader.receive(&mut message), Err(LinkError::WornOut)));
}

/// Times out when its bytes are at an end.
struct Silent<'a>(&'a [u8]);

impl Read for Silent<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.0.is_empty() { Err(ErrorKind::WouldBlock.into()) } else { self.0.read(out) }
    }
}

#[test]
fn a_reader_that_looks_around_goes_on_with_a_message_that_is_partly_here() {
    let (one, two) = ends();
    let (short, long) = (b"short".as_slice(), pattern(PLAIN_MAX + 100, 3));
    let wires = sealed(&one, &[short, &long]);
    let mut message = Vec::new();
    for cut in 0..wires[0].len() {
        let mut looking = reader(&two, Silent(&wires[0][..cut]));
        looking.set_whole_within(Some(Duration::ZERO));
        for _ in 0..2 {
            assert!(matches!(looking.receive(&mut message), Err(LinkError::Idle { .. })), "cut at {cut}");
        }
        looking.input.0 = &wires[0][cut..];
        looking.receive(&mut message).unwrap();
        assert_eq!(message, short);
        // What does not fit a record is not waited for without end once its first record was used.
        looking.input.0 = &wires[1][..wires[1].len() - 1];
        assert!(matches!(looking.receive(&mut message), Err(LinkError::Stalled)));
    }
}

#[test]
fn silence_between_messages_is_not_an_end_but_silence_within_one_is() {
    let (one, two) = ends();
    let wires = sealed(&one, &[b"first", b"second"]);
    let mut message = Vec::new();
    let mut whole = reader(&two, Silent(&wires[0]));
    whole.receive(&mut message).unwrap();
    assert!(matches!(whole.receive(&mut message), Err(LinkError::Idle { .. })));
    whole.input.0 = &wires[1];
    whole.receive(&mut message).unwrap();
    assert_eq!(message, b"second");
    for cut in 1..wires[0].len() {
        let mut half = reader(&two, Silent(&wires[0][..cut]));
        assert!(matches!(half.receive(&mut message), Err(LinkError::Stalled)), "cut at {cut}");
        assert!(matches!(half.receive(&mut message), Err(LinkError::Broken)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn messages_survive_any_split(
        messages in prop::collection::vec((0usize..200_000, prop::collection::vec(0usize..200_000, 0..5)), 1..5),
        chunks in prop::collection::vec(1usize..70_000, 1..6),
    ) {
        let (one, two) = ends();
        let mut sink = Sink::default();
        let mut writer = RecordWriter::new(&mut sink, Arc::clone(&one.keys), one.first_sent, LIMIT);
        let bodies: Vec<Vec<u8>> = messages.iter().zip(0u8..).map(|((bytes, _), seed)| pattern(*bytes, seed)).collect();
        let mut sent = Vec::new();
        for (body, (_, cuts)) in bodies.iter().zip(&messages) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (body.len() + 1)).collect();
            cuts.extend([0, body.len()]);
            cuts.sort_unstable();
            let parts: Vec<&[u8]> = cuts.windows(2).map(|cut| &body[cut[0]..cut[1]]).collect();
            sent.push(writer.send(&parts).unwrap());
        }
        prop_assert_eq!(sent.iter().sum::<usize>(), sink.bytes.len());
        let mut reader = reader(&two, Drip { bytes: &sink.bytes, chunks, turn: 0 });
        let mut message = Vec::new();
        for (body, sent) in bodies.iter().zip(sent) {
            prop_assert_eq!(reader.receive(&mut message).unwrap(), sent);
            prop_assert_eq!(&message, body);
        }
        prop_assert!(matches!(reader.receive(&mut message), Err(LinkError::Closed)));
    }

    /// Changing one byte anywhere loses that message and all later ones, and never alters one.
    #[test]
    fn a_changed_byte_is_noticed(
        sizes in prop::collection::vec(0usize..3000, 1..5), at: prop::sample::Index, flip in 1u8..=255,
    ) {
        let (one, two) = ends();
        let bodies: Vec<Vec<u8>> = sizes.iter().map(|bytes| pattern(*bytes, 3)).collect();
        let wires = sealed(&one, &bodies.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let mut wire = wires.concat();
        let at = at.index(wire.len());
        wire[at] ^= flip;
        let (messages, error) = receive_all(&two, &wire);
        let mut ends = 0;
        let whole = wires.iter().take_while(|wire| { ends += wire.len(); ends <= at }).count();
        prop_assert_eq!(messages.as_slice(), &bodies[..whole]);
        prop_assert!(matches!(
            error,
            LinkError::Tampered { .. } | LinkError::BadRecord { .. } | LinkError::Lost { .. }
        ), "{}", error);
    }

    /// A stream cut between two messages looks closed, anywhere else broken.
    #[test]
    fn a_cut_stream_is_noticed(sizes in prop::collection::vec(0usize..3000, 1..4), at: prop::sample::Index) {
        let (one, two) = ends();
        let bodies: Vec<Vec<u8>> = sizes.iter().map(|bytes| pattern(*bytes, 3)).collect();
        let wires = sealed(&one, &bodies.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let wire = wires.concat();
        let at = at.index(wire.len() + 1);
        let (messages, error) = receive_all(&two, &wire[..at]);
        let mut ends = 0;
        let whole = wires.iter().take_while(|wire| { ends += wire.len(); ends <= at }).count();
        prop_assert_eq!(messages.as_slice(), &bodies[..whole]);
        let boundary = wires[..whole].iter().map(Vec::len).sum::<usize>() == at;
        prop_assert_eq!(matches!(error, LinkError::Closed), boundary);
        prop_assert_eq!(matches!(error, LinkError::Lost { .. }), !boundary);
    }

    #[test]
    fn any_bytes_are_an_error(wire in prop::collection::vec(any::<u8>(), 0..300)) {
        let (_, two) = ends();
        prop_assert_eq!(receive_all(&two, &wire).0.len(), 0);
    }
}
