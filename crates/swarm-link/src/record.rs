//! Messages over sealed records, over any byte stream.
//!
//! A record is a little-endian `u16` length and that many bytes of ciphertext, at most 60 KiB of it
//! plaintext. A message is a little-endian `u32` length followed by its bytes, starting in a new record and
//! continuing in as many as it needs. No record is empty. Record numbers are the AEAD nonces, counted by
//! each side and never sent, so a record that was changed, dropped, repeated or moved does not decrypt.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use snow::StatelessTransportState;

use crate::error::LinkError;
use crate::noise::TAG_BYTES;

/// Plaintext of a full record. Below Noise's 65535 so that decryption overlaps with receiving.
pub(crate) const PLAIN_MAX: usize = 60 * 1024;
const HEAD_BYTES: usize = 2;
const LENGTH_BYTES: usize = 4;
const RECORD_MAX: usize = HEAD_BYTES + u16::MAX as usize;
/// Records sealed before they are written together: large messages need fewer system calls, and the
/// network works on one batch while the next is sealed.
const BATCH_RECORDS: usize = 4;
/// Two records, so that one read can fetch the rest of one and the start of the next.
const READ_BUFFER_BYTES: usize = 2 * RECORD_MAX;
/// With full records this keeps an attacker's advantage against AES-GCM below 2^-32; at 1000 records a
/// second it is two years.
const RECORDS_MAX: u64 = 1 << 36;

pub(crate) struct RecordWriter<W> {
    output: W,
    keys: Arc<StatelessTransportState>,
    record: u64,
    bytes_max: usize,
    plain: Vec<u8>,
    wire: Vec<u8>,
    broken: bool,
}

impl<W: Write> RecordWriter<W> {
    pub(crate) fn new(output: W, keys: Arc<StatelessTransportState>, record: u64, bytes_max: usize) -> Self {
        Self { output, keys, record, bytes_max, plain: Vec::new(), wire: Vec::new(), broken: false }
    }

    pub(crate) fn set_bytes_max(&mut self, bytes_max: usize) {
        self.bytes_max = bytes_max;
    }

    /// Sends the concatenation of `parts` as one message; returns the bytes written to the stream.
    pub(crate) fn send(&mut self, parts: &[&[u8]]) -> Result<usize, LinkError> {
        if self.broken {
            return Err(LinkError::Broken);
        }
        let bytes = parts.iter().try_fold(0usize, |sum, part| sum.checked_add(part.len()));
        let too_long =
            LinkError::SendTooLong { bytes: bytes.unwrap_or(usize::MAX), bytes_max: self.bytes_max };
        let Some(bytes) = bytes.filter(|bytes| *bytes <= self.bytes_max) else { return Err(too_long) };
        let Ok(length) = u32::try_from(bytes) else { return Err(too_long) };
        let sent = self.send_records(length, bytes, parts);
        self.broken = sent.is_err();
        sent
    }

    fn send_records(&mut self, length: u32, bytes: usize, parts: &[&[u8]]) -> Result<usize, LinkError> {
        let mut cursor = Cursor { parts, at: 0 };
        let mut left = bytes;
        let mut sent = 0usize;
        let mut filled = 0usize;
        let mut batched = 0usize;
        let mut first = true;
        while first || left > 0 {
            let take = left.min(if first { PLAIN_MAX - LENGTH_BYTES } else { PLAIN_MAX });
            self.plain.clear();
            let direct = if first {
                self.plain.extend_from_slice(&length.to_le_bytes());
                None
            } else {
                cursor.take_whole(take)
            };
            let plain = match direct {
                Some(slice) => slice,
                None => {
                    cursor.copy(take, &mut self.plain);
                    &self.plain
                }
            };
            filled += seal(&self.keys, &mut self.record, plain, &mut self.wire, filled)?;
            left -= take;
            batched += 1;
            first = false;
            if batched == BATCH_RECORDS || left == 0 {
                self.output.write_all(self.wire.get(..filled).unwrap_or_default()).map_err(lost)?;
                sent += filled;
                (filled, batched) = (0, 0);
            }
        }
        Ok(sent)
    }
}

/// Appends one record to `wire` at `at`; returns its bytes. `wire` only grows, so it is cleared once.
fn seal(
    keys: &StatelessTransportState,
    record: &mut u64,
    plain: &[u8],
    wire: &mut Vec<u8>,
    at: usize,
) -> Result<usize, LinkError> {
    if *record >= RECORDS_MAX {
        return Err(LinkError::WornOut);
    }
    let sealed = plain.len() + TAG_BYTES;
    let end = at + HEAD_BYTES + sealed;
    if wire.len() < end {
        wire.resize(end, 0);
    }
    let head = u16::try_from(sealed).map_err(|_| LinkError::Broken)?.to_le_bytes();
    let place = wire.get_mut(at..end).ok_or(LinkError::Broken)?;
    let (head_place, body) = place.split_at_mut(HEAD_BYTES);
    head_place.copy_from_slice(&head);
    keys.write_message(*record, plain, body).map_err(|_| LinkError::Broken)?;
    *record += 1;
    Ok(HEAD_BYTES + sealed)
}

/// Walks over the parts of a message as if they were one slice.
struct Cursor<'a> {
    parts: &'a [&'a [u8]],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// The next `want` bytes if they lie in one part: no copy needed.
    fn take_whole(&mut self, want: usize) -> Option<&'a [u8]> {
        self.skip_finished();
        let slice = self.parts.first()?.get(self.at..)?.get(..want)?;
        self.at += want;
        Some(slice)
    }

    /// Appends the next `want` bytes to `out`.
    fn copy(&mut self, mut want: usize, out: &mut Vec<u8>) {
        while want > 0 {
            self.skip_finished();
            let Some(rest) = self.parts.first().and_then(|part| part.get(self.at..)) else { return };
            let taken = rest.len().min(want);
            out.extend_from_slice(rest.get(..taken).unwrap_or_default());
            self.at += taken;
            want -= taken;
        }
    }

    fn skip_finished(&mut self) {
        while let Some((part, rest)) = self.parts.split_first() {
            if self.at < part.len() {
                return;
            }
            (self.parts, self.at) = (rest, 0);
        }
    }
}

pub(crate) struct RecordReader<R> {
    input: R,
    keys: Arc<StatelessTransportState>,
    record: u64,
    bytes_max: usize,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    first: Vec<u8>,
    broken: bool,
    /// When bytes came last.
    read_at: Option<Instant>,
    /// When the first bytes of the last message were here.
    began_at: Option<Instant>,
    /// Set: a timeout of the stream is a look around, and a message that has begun must be whole after so long.
    whole_within: Option<Duration>,
}

impl<R: Read> RecordReader<R> {
    pub(crate) fn new(input: R, keys: Arc<StatelessTransportState>, record: u64, bytes_max: usize) -> Self {
        let buffer = vec![0; READ_BUFFER_BYTES];
        Self {
            input,
            keys,
            record,
            bytes_max,
            buffer,
            start: 0,
            end: 0,
            first: Vec::new(),
            broken: false,
            read_at: None,
            began_at: None,
            whole_within: None,
        }
    }

    /// When the first bytes of the message received last were here.
    pub(crate) fn began_at(&self) -> Option<Instant> {
        self.began_at
    }

    pub(crate) fn set_bytes_max(&mut self, bytes_max: usize) {
        self.bytes_max = bytes_max;
    }

    /// A timeout is an end only between two messages (`None`), or where nothing of one was used yet.
    pub(crate) fn set_whole_within(&mut self, whole_within: Option<Duration>) {
        self.whole_within = whole_within;
    }

    /// Puts the next message into `message`; returns the bytes it took on the stream. After any error but
    /// [`LinkError::Idle`] the reader is broken and `message` empty.
    pub(crate) fn receive(&mut self, message: &mut Vec<u8>) -> Result<usize, LinkError> {
        message.clear();
        if self.broken {
            return Err(LinkError::Broken);
        }
        let received = self.receive_records(message);
        if let Err(error) = &received {
            self.broken = !matches!(error, LinkError::Idle { .. });
            message.clear();
        }
        received
    }

    fn receive_records(&mut self, message: &mut Vec<u8>) -> Result<usize, LinkError> {
        // What is here already came with the message before.
        self.began_at = self.read_at.filter(|_| self.start < self.end);
        let sealed = self.next_record(true)?;
        let mut first = std::mem::take(&mut self.first);
        first.clear();
        let plain = self.open(sealed, &mut first);
        let started = plain.and_then(|()| self.start_message(&first, message));
        self.first = first;
        let bytes = started?;
        let mut wire = HEAD_BYTES + sealed;
        while message.len() < bytes {
            let sealed = self.next_record(false)?;
            if sealed - TAG_BYTES > bytes - message.len() {
                return Err(LinkError::BadRecord { record: self.record });
            }
            self.open(sealed, message)?;
            wire = wire.saturating_add(HEAD_BYTES + sealed);
        }
        Ok(wire)
    }

    /// Holds the announced length against the limit, and only then makes room for it.
    fn start_message(&self, first: &[u8], message: &mut Vec<u8>) -> Result<usize, LinkError> {
        let bad = LinkError::BadRecord { record: self.record.saturating_sub(1) };
        let Some((length, body)) = first.split_first_chunk::<LENGTH_BYTES>() else { return Err(bad) };
        let bytes = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if bytes > self.bytes_max {
            return Err(LinkError::MessageTooLong { bytes, bytes_max: self.bytes_max });
        }
        if body.len() > bytes {
            return Err(bad);
        }
        // Room for the last record's tag, which is decrypted in place and cut off.
        let room = bytes.saturating_add(TAG_BYTES);
        message.try_reserve(room).map_err(|_| LinkError::NoMemory { bytes })?;
        message.extend_from_slice(body);
        Ok(bytes)
    }

    /// Waits for one whole record at the start of the buffer; returns its ciphertext length, which is more
    /// than a tag.
    fn next_record(&mut self, boundary: bool) -> Result<usize, LinkError> {
        self.fill(HEAD_BYTES, boundary)?;
        let head = self.buffer.get(self.start..).and_then(|bytes| bytes.first_chunk());
        let sealed = usize::from(u16::from_le_bytes(*head.ok_or(LinkError::Broken)?));
        if sealed <= TAG_BYTES {
            return Err(LinkError::BadRecord { record: self.record });
        }
        self.fill(HEAD_BYTES + sealed, boundary)?;
        Ok(sealed)
    }

    /// Decrypts the record at the start of the buffer onto the end of `out`.
    fn open(&mut self, sealed: usize, out: &mut Vec<u8>) -> Result<(), LinkError> {
        if self.record >= RECORDS_MAX {
            return Err(LinkError::WornOut);
        }
        let from = self.start + HEAD_BYTES;
        let ciphertext = self.buffer.get(from..from + sealed).ok_or(LinkError::Broken)?;
        let had = out.len();
        out.resize(had + sealed, 0);
        let place = out.get_mut(had..).ok_or(LinkError::Broken)?;
        let opened = self.keys.read_message(self.record, ciphertext, place);
        let plain = opened.map_err(|_| LinkError::Tampered { record: self.record })?;
        out.truncate(had + plain);
        self.record += 1;
        self.start = from + sealed;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        Ok(())
    }

    /// Reads until `want` bytes are buffered. `boundary`: no byte of the current message was used yet.
    fn fill(&mut self, want: usize, boundary: bool) -> Result<(), LinkError> {
        while self.end - self.start < want {
            if self.start + want > self.buffer.len() {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            let between = boundary && self.start == self.end;
            let free = self.buffer.get_mut(self.end..).unwrap_or_default();
            match self.input.read(free) {
                Ok(0) if between => return Err(LinkError::Closed),
                Ok(0) => return Err(lost(ErrorKind::UnexpectedEof.into())),
                Ok(bytes) => {
                    self.end += bytes;
                    let now = Instant::now();
                    self.read_at = Some(now);
                    self.began_at.get_or_insert(now);
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => self.timed_out(between, boundary)?,
                    _ => return Err(lost(error)),
                },
            }
        }
        Ok(())
    }

    /// No bytes came for the stream's timeout: goes on waiting, or says how that ends.
    fn timed_out(&self, between: bool, boundary: bool) -> Result<(), LinkError> {
        let began = || self.began_at.map_or(Duration::ZERO, |began| began.elapsed());
        match self.whole_within {
            _ if between => Err(LinkError::Idle { waited_ms: 0 }),
            // What is here of the first record stays in the buffer.
            Some(_) if boundary => Err(LinkError::Idle { waited_ms: 0 }),
            Some(within) if began() < within => Ok(()),
            _ => Err(LinkError::Stalled),
        }
    }
}

fn lost(source: io::Error) -> LinkError {
    match source.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => LinkError::WriteTimeout { waited_ms: 0 },
        _ => LinkError::Lost { source },
    }
}

impl<T> std::fmt::Debug for RecordWriter<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the buffers: they hold plaintext.
        f.debug_struct("RecordWriter")
            .field("record", &self.record)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl<T> std::fmt::Debug for RecordReader<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the buffers: they hold plaintext.
        f.debug_struct("RecordReader")
            .field("record", &self.record)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
