//! Bytes to frames. A view borrows the bytes; nothing here allocates.

use crate::blame::Blame;
use crate::cursor::Cursor;
use crate::error::{DecodeError, RowsError};
use crate::frame::{
    FAILED_TEXT_BYTES_MAX, Failed, FrameHead, FrameKind, Peek, SEGMENT_BYTES, STAGE_TIME_BYTES, SegmentHead,
    StageTime, TIME_US_MAX, TokenOut, check_prompt_len, check_segments, check_token,
};
use crate::ids::{Epoch, NodeId, Position, SessionId};
use crate::limits::{Limits, within};
use crate::sampling::Sampling;

/// Reads kind and epoch of a frame and nothing else. A receiver drops and counts a frame of an
/// older epoch after this, before it decodes: the limits of that epoch may be gone.
///
/// # Errors
/// [`DecodeError`] when there are no eight bytes or the kind is unknown.
pub fn peek(bytes: &[u8]) -> Result<Peek, DecodeError> {
    let mut cursor = Cursor::new(bytes);
    let byte = cursor.u8()?;
    cursor.take(3)?;
    let epoch = Epoch(cursor.u32()?);
    let kind = FrameKind::from_wire(byte).ok_or(DecodeError::UnknownKind(byte))?;
    Ok(Peek { kind, epoch })
}

/// A decoded frame that borrows the bytes it came from. Every number in it was held against the
/// limits, so its iterators cannot fail.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum FrameView<'a> {
    /// A batch of hidden rows.
    Hidden(HiddenView<'a>),
    /// A session starts.
    Open(OpenView<'a>),
    /// Forget the session's KV rows from `position` on.
    Truncate {
        /// The placement.
        epoch: Epoch,
        /// Whose rows.
        session: SessionId,
        /// The first row to forget.
        position: Position,
    },
    /// Forget the session.
    Close {
        /// The placement.
        epoch: Epoch,
        /// Which session.
        session: SessionId,
    },
    /// What the tail sampled.
    Tokens(TokensView<'a>),
    /// A step cannot be finished.
    Failed(FailedView<'a>),
}

/// A failure owns nothing either way, so its view is the message itself.
pub type FailedView<'a> = Failed<'a>;

/// A batch of hidden rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HiddenView<'a> {
    /// Epoch and lap.
    pub head: FrameHead,
    tokens: u32,
    segments: &'a [[u8; SEGMENT_BYTES]],
    trail: &'a [[u8; STAGE_TIME_BYTES]],
    rows: &'a [u8],
}

/// A session starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpenView<'a> {
    /// The placement.
    pub epoch: Epoch,
    /// The new session.
    pub session: SessionId,
    /// How the tail samples; every number is in range.
    pub sampling: Sampling,
    /// The tail adds a digest of the logits to each token.
    pub logits_hash: bool,
    prompt: &'a [[u8; 4]],
}

/// What the tail sampled in one lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokensView<'a> {
    /// Epoch and lap of the batch this answers.
    pub head: FrameHead,
    count: usize,
    items: &'a [u8],
    trail: &'a [[u8; STAGE_TIME_BYTES]],
}

impl<'a> HiddenView<'a> {
    /// The segments in row order, each session once; none when all of them failed on the way.
    pub fn segments(&self) -> impl ExactSizeIterator<Item = SegmentHead> + Clone + use<'a> {
        self.segments.iter().map(read_segment)
    }

    /// One entry per stage already passed, coordinator first.
    pub fn trail(&self) -> impl ExactSizeIterator<Item = StageTime> + Clone + use<'a> {
        self.trail.iter().map(read_stage_time)
    }

    /// Rows in the frame: the tokens of all segments.
    pub fn tokens(&self) -> usize {
        self.tokens as usize
    }

    /// The rows as they lie in the frame, `[tokens, width]` little-endian f32, at any alignment.
    pub fn rows_bytes(&self) -> &'a [u8] {
        self.rows
    }

    /// Floats in the frame, `tokens * width`.
    pub fn rows_len(&self) -> usize {
        self.rows.len() / 4
    }

    /// Copies the rows into `out`, which must hold exactly [`HiddenView::rows_len`] floats.
    /// Works at any alignment and on big-endian hosts.
    ///
    /// # Errors
    /// [`RowsError`] when `out` has another length; `out` is then untouched.
    pub fn rows_into(&self, out: &mut [f32]) -> Result<(), RowsError> {
        if out.len() != self.rows_len() {
            return Err(RowsError { want: self.rows_len(), got: out.len() });
        }
        if cfg!(target_endian = "little") {
            bytemuck::cast_slice_mut::<f32, u8>(out).copy_from_slice(self.rows);
        } else {
            let (rows, _) = self.rows.as_chunks::<4>();
            for (value, bytes) in out.iter_mut().zip(rows) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Ok(())
    }
}

impl<'a> OpenView<'a> {
    /// The prompt's token ids, each below the vocabulary size; at least one.
    pub fn prompt(&self) -> impl ExactSizeIterator<Item = u32> + Clone + use<'a> {
        self.prompt.iter().map(|bytes| u32::from_le_bytes(*bytes))
    }
}

impl<'a> TokensView<'a> {
    /// The sampled tokens.
    pub fn items(&self) -> impl Iterator<Item = TokenOut> + Clone + use<'a> {
        let mut cursor = self.items;
        // The same bytes were read once by `decode`, so every read succeeds.
        std::iter::from_fn(move || {
            let mut reader = Cursor::new(cursor);
            let item = read_token(&mut reader).ok()?;
            cursor = cursor.get(cursor.len() - reader.rest_len()..)?;
            Some(item)
        })
    }

    /// How many tokens [`TokensView::items`] gives.
    pub fn len(&self) -> usize {
        self.count
    }

    /// No segment of the lap asked for a token.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The whole lap: one entry per stage, coordinator first.
    pub fn trail(&self) -> impl ExactSizeIterator<Item = StageTime> + Clone + use<'a> {
        self.trail.iter().map(read_stage_time)
    }
}

impl<'a> FrameView<'a> {
    /// Decodes one whole frame. Total: every byte string gives a frame or an error, allocates
    /// nothing, and never reads a length it has not first held against `limits`.
    ///
    /// # Errors
    /// [`DecodeError`]; always the sender's fault. Close the link.
    pub fn decode(bytes: &'a [u8], limits: &Limits) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let kind = cursor.u8()?;
        let byte = cursor.u8()?;
        let count = cursor.u16()?;
        let epoch = Epoch(cursor.u32()?);
        let kind = FrameKind::from_wire(kind).ok_or(DecodeError::UnknownKind(kind))?;
        let view = match kind {
            FrameKind::Hidden => Self::Hidden(hidden(&mut cursor, byte, count, epoch, limits)?),
            FrameKind::Open => Self::Open(open(&mut cursor, byte, count, epoch, limits)?),
            FrameKind::Truncate => {
                plain(byte, count)?;
                let session = SessionId(cursor.u64()?);
                let position = cursor.u32()?;
                within("position", position.into(), limits.context_max.into())?;
                Self::Truncate { epoch, session, position: Position(position) }
            }
            FrameKind::Close => {
                plain(byte, count)?;
                Self::Close { epoch, session: SessionId(cursor.u64()?) }
            }
            FrameKind::Tokens => Self::Tokens(tokens(&mut cursor, byte, count, epoch, limits)?),
            FrameKind::Failed => Self::Failed(failed(&mut cursor, byte, count, epoch)?),
        };
        cursor.finish()?;
        Ok(view)
    }

    /// The placement this frame belongs to.
    pub fn epoch(&self) -> Epoch {
        match self {
            Self::Hidden(view) => view.head.epoch,
            Self::Open(view) => view.epoch,
            Self::Truncate { epoch, .. } | Self::Close { epoch, .. } => *epoch,
            Self::Tokens(view) => view.head.epoch,
            Self::Failed(view) => view.epoch,
        }
    }

    /// What the frame is.
    pub fn kind(&self) -> FrameKind {
        match self {
            Self::Hidden(_) => FrameKind::Hidden,
            Self::Open(_) => FrameKind::Open,
            Self::Truncate { .. } => FrameKind::Truncate,
            Self::Close { .. } => FrameKind::Close,
            Self::Tokens(_) => FrameKind::Tokens,
            Self::Failed(_) => FrameKind::Failed,
        }
    }
}

/// Neither the byte nor the count of the header has a meaning in this kind.
fn plain(byte: u8, count: u16) -> Result<(), DecodeError> {
    if byte == 0 && count == 0 { Ok(()) } else { Err(DecodeError::Reserved("frame header")) }
}

fn hidden<'a>(
    cursor: &mut Cursor<'a>,
    byte: u8,
    count: u16,
    epoch: Epoch,
    limits: &Limits,
) -> Result<HiddenView<'a>, DecodeError> {
    plain(byte, 0)?;
    within("segments", count.into(), limits.segments_max.into())?;
    let (lap, trail, width) = lap(cursor, limits)?;
    if width != limits.width {
        return Err(DecodeError::WidthMismatch { want: limits.width, got: width });
    }
    let (segments, _) = cursor.table(usize::from(count), SEGMENT_BYTES)?.as_chunks::<SEGMENT_BYTES>();
    // Bit 0 of the last two bytes is the sample flag; the others have no meaning yet.
    if segments.iter().any(|segment| segment[15] != 0 || segment[14] > 1) {
        return Err(DecodeError::Reserved("segment"));
    }
    let tokens = check_segments(segments.iter().map(read_segment), limits)?;
    let row_bytes = (width as usize).saturating_mul(4);
    let rows = cursor.table(tokens as usize, row_bytes)?;
    Ok(HiddenView { head: FrameHead { epoch, lap }, tokens, segments, trail, rows })
}

type Trail<'a> = &'a [[u8; STAGE_TIME_BYTES]];

/// Lap number, trail and width: the part that hidden and tokens frames share.
fn lap<'a>(cursor: &mut Cursor<'a>, limits: &Limits) -> Result<(u64, Trail<'a>, u32), DecodeError> {
    let lap = cursor.u64()?;
    let stages = cursor.u16()?;
    within("stages", stages.into(), limits.stages_max.into())?;
    cursor.zero::<2>("frame header")?;
    let width = cursor.u32()?;
    let (trail, _) = cursor.table(usize::from(stages), STAGE_TIME_BYTES)?.as_chunks();
    for value in trail.iter().flat_map(|entry| entry.as_chunks::<8>().0) {
        within("stage time", u64::from_le_bytes(*value), TIME_US_MAX)?;
    }
    Ok((lap, trail, width))
}

fn open<'a>(
    cursor: &mut Cursor<'a>,
    byte: u8,
    count: u16,
    epoch: Epoch,
    limits: &Limits,
) -> Result<OpenView<'a>, DecodeError> {
    plain(byte & !1, count)?;
    let session = SessionId(cursor.u64()?);
    let temperature = cursor.f32()?;
    let top_k = cursor.u32()?;
    let top_p = cursor.f32()?;
    let min_p = cursor.f32()?;
    let repetition_penalty = cursor.f32()?;
    let len = cursor.u32()?;
    check_prompt_len(len.into(), limits)?;
    let seed = cursor.u64()?;
    let sampling = Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed };
    sampling.validate().map_err(DecodeError::Sampling)?;
    let (prompt, _) = cursor.table(len as usize, 4)?.as_chunks::<4>();
    for token in prompt {
        check_token(u32::from_le_bytes(*token), limits)?;
    }
    Ok(OpenView { epoch, session, sampling, logits_hash: byte == 1, prompt })
}

fn tokens<'a>(
    cursor: &mut Cursor<'a>,
    byte: u8,
    count: u16,
    epoch: Epoch,
    limits: &Limits,
) -> Result<TokensView<'a>, DecodeError> {
    plain(byte, 0)?;
    within("token items", count.into(), limits.tokens_max.into())?;
    let (lap, trail, width) = lap(cursor, limits)?;
    if width != 0 {
        return Err(DecodeError::Reserved("frame header"));
    }
    let items = cursor.rest();
    let mut reader = Cursor::new(items);
    for _ in 0..count {
        let item = read_token(&mut reader)?;
        within("position", item.position.0.into(), limits.context_max.into())?;
        check_token(item.token, limits)?;
    }
    let items = cursor.take(items.len() - reader.rest_len())?;
    Ok(TokensView { head: FrameHead { epoch, lap }, count: usize::from(count), items, trail })
}

fn failed<'a>(
    cursor: &mut Cursor<'a>,
    byte: u8,
    flags: u16,
    epoch: Epoch,
) -> Result<FailedView<'a>, DecodeError> {
    let blame = Blame::from_wire(byte).ok_or(DecodeError::UnknownBlame(byte))?;
    let session = cursor.u64()?;
    let session = match (flags, session) {
        (1, session) => Some(SessionId(session)),
        (0, 0) => None,
        _ => return Err(DecodeError::Reserved("failure")),
    };
    let from = NodeId(cursor.array()?);
    let len = cursor.u16()?;
    within("length of a text", len.into(), FAILED_TEXT_BYTES_MAX as u64)?;
    let text = str::from_utf8(cursor.take(usize::from(len))?).map_err(|_| DecodeError::NotUtf8)?;
    Ok(Failed { epoch, session, blame, from, text })
}

fn read_segment(bytes: &[u8; SEGMENT_BYTES]) -> SegmentHead {
    let [s0, s1, s2, s3, s4, s5, s6, s7, p0, p1, p2, p3, t0, t1, sample, _] = *bytes;
    SegmentHead {
        session: SessionId(u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7])),
        position: Position(u32::from_le_bytes([p0, p1, p2, p3])),
        tokens: u32::from(u16::from_le_bytes([t0, t1])),
        sample: sample == 1,
    }
}

fn read_stage_time(bytes: &[u8; STAGE_TIME_BYTES]) -> StageTime {
    let mut values = bytes.as_chunks::<8>().0.iter().map(|value| u64::from_le_bytes(*value));
    let mut next = || values.next().unwrap_or_default(); // 48 bytes are six values
    StageTime {
        arriving_us: next(),
        received_us: next(),
        started_us: next(),
        finished_us: next(),
        sent_us: next(),
        bytes_in: next(),
    }
}

fn read_token(cursor: &mut Cursor<'_>) -> Result<TokenOut, DecodeError> {
    let session = SessionId(cursor.u64()?);
    let position = Position(cursor.u32()?);
    let token = cursor.u32()?;
    let logits_hash = match cursor.u8()? {
        0 => None,
        1 => Some(cursor.array()?),
        _ => return Err(DecodeError::Reserved("token item")),
    };
    Ok(TokenOut { session, position, token, logits_hash })
}
