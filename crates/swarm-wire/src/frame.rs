//! Frames: what travels along the data ring, and how it becomes bytes.
//!
//! All numbers are little-endian. Every frame starts with eight bytes: kind u8, a byte and a u16
//! whose meaning belongs to the kind, epoch u32.
//!
//! ```text
//! hidden    1, 0, segments u16, epoch | lap u64 | stages u16, 0 u16, width u32
//!           | stages   x (arriving, received, started, finished, sent, bytes_in: u64)
//!           | segments x (session u64, position u32, tokens u16, flags u16: bit 0 sample)
//!           | tokens x width x f32
//! open      2, flags: bit 0 logits_hash, 0 u16, epoch | session u64
//!           | temperature f32, top_k u32, top_p f32, min_p f32, repetition_penalty f32
//!           | prompt length u32 | seed u64 | prompt x u32
//! truncate  3, 0, 0 u16, epoch | session u64, position u32
//! close     4, 0, 0 u16, epoch | session u64
//! tokens    5, 0, items u16, epoch | lap u64 | stages u16, 0 u16, 0 u32
//!           | stages   x (as above)
//!           | items    x (session u64, position u32, token u32, hashed u8, [hash 32 bytes])
//! failed    6, blame u8, flags u16: bit 0 has session, epoch | session u64 or 0
//!           | from 32 bytes | text length u16, text
//! ```

use crate::blame::Blame;
use crate::cursor::Cursor;
use crate::error::{DecodeError, EncodeError};
use crate::greeting::DataKind;
use crate::ids::{Epoch, NodeId, Position, SessionId};
use crate::limits::{Limits, within};
use crate::sampling::Sampling;

/// Bytes before the trail of a hidden or tokens frame.
pub const HIDDEN_HEAD_BYTES: usize = 24;
/// Longest text of a [`Failed`].
pub const FAILED_TEXT_BYTES_MAX: usize = 1024;
/// Largest time and byte count a peer may state; 285 years, so that differences never overflow.
pub const TIME_US_MAX: u64 = 1 << 53;

pub(crate) const STAGE_TIME_BYTES: usize = 48;
pub(crate) const SEGMENT_BYTES: usize = 16;
pub(crate) const TOKEN_OUT_BYTES_MAX: usize = 49;
pub(crate) const OPEN_HEAD_BYTES: usize = 48;
pub(crate) const FAILED_HEAD_BYTES: usize = 50;
pub(crate) const TRUNCATE_BYTES: usize = 20;
pub(crate) const CLOSE_BYTES: usize = 16;
const SENT_US_FROM_END: usize = 16;

/// The first byte of a frame. Numbers are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum FrameKind {
    /// A batch of hidden rows.
    Hidden,
    /// A session starts.
    Open,
    /// Forget KV rows.
    Truncate,
    /// A session ends.
    Close,
    /// What the tail sampled.
    Tokens,
    /// A step cannot be finished.
    Failed,
}

impl FrameKind {
    pub(crate) const fn to_wire(self) -> u8 {
        match self {
            Self::Hidden => 1,
            Self::Open => 2,
            Self::Truncate => 3,
            Self::Close => 4,
            Self::Tokens => 5,
            Self::Failed => 6,
        }
    }

    pub(crate) const fn from_wire(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Hidden),
            2 => Some(Self::Open),
            3 => Some(Self::Truncate),
            4 => Some(Self::Close),
            5 => Some(Self::Tokens),
            6 => Some(Self::Failed),
            _ => None,
        }
    }

    /// Whether this kind may arrive on a data connection of `kind`; anything else is the peer's
    /// fault.
    pub const fn belongs_on(self, kind: DataKind) -> bool {
        match kind {
            DataKind::Hidden => !matches!(self, Self::Tokens),
            DataKind::Tokens => matches!(self, Self::Tokens | Self::Failed),
        }
    }
}

/// The first eight bytes of a frame: enough to drop a stale one whose limits are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek {
    /// What the frame is.
    pub kind: FrameKind,
    /// The placement it belongs to.
    pub epoch: Epoch,
}

/// What a batch belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameHead {
    /// The placement. A frame of an older one is dropped and counted.
    pub epoch: Epoch,
    /// Counts the coordinator's batches within an epoch; the tail's answer repeats it.
    pub lap: u64,
}

/// One session's share of a batch: rows for positions `position .. position + tokens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentHead {
    /// Whose rows.
    pub session: SessionId,
    /// Position of the first row; must equal the length of the session's KV cache.
    pub position: Position,
    /// Number of rows, at least 1.
    pub tokens: u32,
    /// The tail samples a token after the last row. It will stand at `position + tokens`.
    pub sample: bool,
}

/// What one stage did for a frame, in microseconds of that node's own monotonic clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StageTime {
    /// The first bytes of the frame were here. (Stage 0: as `received_us`.)
    pub arriving_us: u64,
    /// All of the frame was here, decrypted. (Stage 0: the coordinator decided on the step.)
    pub received_us: u64,
    /// The forward began.
    pub started_us: u64,
    /// The forward ended.
    pub finished_us: u64,
    /// The outgoing frame was complete, just before the write. See [`patch_sent_us`].
    pub sent_us: u64,
    /// Bytes of the frame that arrived. (Stage 0: zero.)
    pub bytes_in: u64,
}

/// One sampled token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TokenOut {
    /// Whose token.
    pub session: SessionId,
    /// Where the token stands: one past the row it was sampled from.
    pub position: Position,
    /// Its id, below the vocabulary size.
    pub token: u32,
    /// Digest of the logits it was sampled from, when the session asked for it.
    pub logits_hash: Option<[u8; 32]>,
}

/// A batch of hidden rows on its way to the next stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hidden<'a> {
    /// Epoch and lap.
    pub head: FrameHead,
    /// Each session at most once. None at all when every session of the batch failed on the way:
    /// the lap goes on, so that the coordinator sees it end.
    pub segments: &'a [SegmentHead],
    /// One entry per stage already passed, coordinator first.
    pub trail: &'a [StageTime],
    /// `[tokens, width]` residual rows in segment order, `tokens` summed over the segments.
    pub rows: &'a [f32],
}

/// A session starts. Travels the whole ring ahead of the session's first rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Open<'a> {
    /// The placement.
    pub epoch: Epoch,
    /// The new session.
    pub session: SessionId,
    /// How the tail samples.
    pub sampling: Sampling,
    /// The prompt, at least one token: the tail needs the history for the repetition penalty.
    pub prompt: &'a [u32],
    /// The tail adds a digest of the logits to each token.
    pub logits_hash: bool,
}

/// The sender cannot finish a step. Travels onward to the tail and from there to the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed<'a> {
    /// The placement.
    pub epoch: Epoch,
    /// The session that ends, or `None` when the whole stage is lost.
    pub session: Option<SessionId>,
    /// Whose fault it is.
    pub blame: Blame,
    /// The node that reports it.
    pub from: NodeId,
    /// What happened, to what, in words; escape before printing. At most
    /// [`FAILED_TEXT_BYTES_MAX`] bytes are sent, the rest is cut off at a character.
    pub text: &'a str,
}

/// What the tail sampled in one lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens<'a> {
    /// Epoch and lap of the batch this answers.
    pub head: FrameHead,
    /// One per sampled segment; empty when no segment of the lap asked for a token.
    pub items: &'a [TokenOut],
    /// The whole lap: one entry per stage, coordinator first.
    pub trail: &'a [StageTime],
}

/// A frame to be sent. Stages that do not change a session message may forward its bytes as they
/// came.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Frame<'a> {
    /// A batch of hidden rows.
    Hidden(Hidden<'a>),
    /// A session starts.
    Open(Open<'a>),
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
    Tokens(Tokens<'a>),
    /// A step cannot be finished.
    Failed(Failed<'a>),
}

impl Frame<'_> {
    /// Replaces the content of `out` by this frame. Allocates only when `out` is too small.
    /// Costs one copy of the rows.
    ///
    /// # Errors
    /// [`EncodeError`] when the receiver, holding the same `limits`, would refuse the frame; `out`
    /// is then unspecified.
    pub fn encode(&self, limits: &Limits, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        out.clear();
        match self {
            Self::Hidden(frame) => encode_hidden(frame, limits, out),
            Self::Open(frame) => encode_open(frame, limits, out),
            Self::Truncate { epoch, session, position } => {
                within("position", position.0.into(), limits.context_max.into())?;
                start(out, FrameKind::Truncate, 0, 0, *epoch);
                out.extend_from_slice(&session.0.to_le_bytes());
                out.extend_from_slice(&position.0.to_le_bytes());
                Ok(())
            }
            Self::Close { epoch, session } => {
                start(out, FrameKind::Close, 0, 0, *epoch);
                out.extend_from_slice(&session.0.to_le_bytes());
                Ok(())
            }
            Self::Tokens(frame) => encode_tokens(frame, limits, out),
            Self::Failed(frame) => {
                encode_failed(frame, out);
                Ok(())
            }
        }
    }
}

fn start(out: &mut Vec<u8>, kind: FrameKind, byte: u8, count: u16, epoch: Epoch) {
    out.extend_from_slice(&[kind.to_wire(), byte]);
    out.extend_from_slice(&count.to_le_bytes());
    out.extend_from_slice(&epoch.0.to_le_bytes());
}

/// A count that was held against its limit fits 16 bits unless the limits were never validated.
fn count16(what: &'static str, count: usize, max: u32) -> Result<u16, DecodeError> {
    let max = u64::from(max).min(u64::from(u16::MAX));
    within(what, count as u64, max)?;
    u16::try_from(count).map_err(|_| DecodeError::OutOfRange { what, value: count as u64, max })
}

fn encode_hidden(frame: &Hidden<'_>, limits: &Limits, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let count = count16("segments", frame.segments.len(), limits.segments_max)?;
    let stages = count16("stages", frame.trail.len(), limits.stages_max)?;
    let tokens = check_segments(frame.segments.iter().copied(), limits)?;
    let want = u64::from(tokens) * u64::from(limits.width);
    if frame.rows.len() as u64 != want {
        let got = frame.rows.len() as u64;
        return Err(EncodeError::RowsMismatch { tokens: tokens.into(), want, got });
    }
    let row_bytes = size_of_val(frame.rows);
    out.reserve(
        HIDDEN_HEAD_BYTES
            + frame.trail.len() * STAGE_TIME_BYTES
            + frame.segments.len() * SEGMENT_BYTES
            + row_bytes,
    );
    start(out, FrameKind::Hidden, 0, count, frame.head.epoch);
    put_lap(out, frame.head.lap, stages, limits.width);
    put_trail(out, frame.trail)?;
    for segment in frame.segments {
        let tokens = count16("tokens", segment.tokens as usize, limits.tokens_max)?;
        out.extend_from_slice(&segment.session.0.to_le_bytes());
        out.extend_from_slice(&segment.position.0.to_le_bytes());
        out.extend_from_slice(&tokens.to_le_bytes());
        out.extend_from_slice(&u16::from(segment.sample).to_le_bytes());
    }
    if cfg!(target_endian = "little") {
        out.extend_from_slice(bytemuck::cast_slice(frame.rows));
    } else {
        frame.rows.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
    }
    Ok(())
}

fn encode_open(frame: &Open<'_>, limits: &Limits, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let Open { epoch, session, sampling, prompt, logits_hash } = *frame;
    sampling.validate().map_err(DecodeError::Sampling)?;
    check_prompt_len(prompt.len() as u64, limits)?;
    out.reserve(OPEN_HEAD_BYTES + size_of_val(prompt));
    start(out, FrameKind::Open, logits_hash.into(), 0, epoch);
    out.extend_from_slice(&session.0.to_le_bytes());
    out.extend_from_slice(&sampling.temperature.to_le_bytes());
    out.extend_from_slice(&sampling.top_k.to_le_bytes());
    out.extend_from_slice(&sampling.top_p.to_le_bytes());
    out.extend_from_slice(&sampling.min_p.to_le_bytes());
    out.extend_from_slice(&sampling.repetition_penalty.to_le_bytes());
    out.extend_from_slice(&(prompt.len() as u32).to_le_bytes());
    out.extend_from_slice(&sampling.seed.to_le_bytes());
    for &token in prompt {
        check_token(token, limits)?;
        out.extend_from_slice(&token.to_le_bytes());
    }
    Ok(())
}

fn encode_tokens(frame: &Tokens<'_>, limits: &Limits, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let count = count16("token items", frame.items.len(), limits.tokens_max)?;
    let stages = count16("stages", frame.trail.len(), limits.stages_max)?;
    out.reserve(
        HIDDEN_HEAD_BYTES + frame.trail.len() * STAGE_TIME_BYTES + frame.items.len() * TOKEN_OUT_BYTES_MAX,
    );
    start(out, FrameKind::Tokens, 0, count, frame.head.epoch);
    put_lap(out, frame.head.lap, stages, 0);
    put_trail(out, frame.trail)?;
    for item in frame.items {
        within("position", item.position.0.into(), limits.context_max.into())?;
        check_token(item.token, limits)?;
        out.extend_from_slice(&item.session.0.to_le_bytes());
        out.extend_from_slice(&item.position.0.to_le_bytes());
        out.extend_from_slice(&item.token.to_le_bytes());
        out.push(item.logits_hash.is_some().into());
        if let Some(hash) = &item.logits_hash {
            out.extend_from_slice(hash);
        }
    }
    Ok(())
}

fn encode_failed(frame: &Failed<'_>, out: &mut Vec<u8>) {
    let text = &frame.text[..frame.text.floor_char_boundary(FAILED_TEXT_BYTES_MAX)];
    start(out, FrameKind::Failed, frame.blame.to_wire(), frame.session.is_some().into(), frame.epoch);
    out.extend_from_slice(&frame.session.map_or(0, |session| session.0).to_le_bytes());
    out.extend_from_slice(&frame.from.0);
    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_lap(out: &mut Vec<u8>, lap: u64, stages: u16, width: u32) {
    out.extend_from_slice(&lap.to_le_bytes());
    out.extend_from_slice(&stages.to_le_bytes());
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&width.to_le_bytes());
}

fn put_trail(out: &mut Vec<u8>, trail: &[StageTime]) -> Result<(), DecodeError> {
    for time in trail {
        let StageTime { arriving_us, received_us, started_us, finished_us, sent_us, bytes_in } = *time;
        for value in [arriving_us, received_us, started_us, finished_us, sent_us, bytes_in] {
            within("stage time", value, TIME_US_MAX)?;
            out.extend_from_slice(&value.to_le_bytes());
        }
    }
    Ok(())
}

/// Writes `sent_us` into the last trail entry of an encoded hidden or tokens frame, just before
/// the write. Times above [`TIME_US_MAX`] are written as that.
///
/// # Errors
/// [`EncodeError::NoTrail`] when `frame` is of another kind or its trail is empty.
pub fn patch_sent_us(frame: &mut [u8], sent_us: u64) -> Result<(), EncodeError> {
    let mut head = Cursor::new(frame);
    let kind = FrameKind::from_wire(head.u8()?);
    if !matches!(kind, Some(FrameKind::Hidden | FrameKind::Tokens)) {
        return Err(EncodeError::NoTrail);
    }
    head.take(15)?;
    let stages = usize::from(head.u16()?);
    if stages == 0 {
        return Err(EncodeError::NoTrail);
    }
    let at = HIDDEN_HEAD_BYTES + stages * STAGE_TIME_BYTES - SENT_US_FROM_END;
    let Some(field) = frame.get_mut(at..at + 8) else { return Err(EncodeError::NoTrail) };
    field.copy_from_slice(&sent_us.min(TIME_US_MAX).to_le_bytes());
    Ok(())
}

/// Checks a batch's segments against the limits and gives the sum of their tokens.
pub(crate) fn check_segments(
    segments: impl ExactSizeIterator<Item = SegmentHead> + Clone,
    limits: &Limits,
) -> Result<u32, DecodeError> {
    let mut sum = 0u64;
    for (index, segment) in segments.clone().enumerate() {
        if segment.tokens == 0 {
            return Err(DecodeError::Empty("the number of tokens of a segment"));
        }
        let end = u64::from(segment.position.0) + u64::from(segment.tokens);
        within("end of a segment", end, limits.context_max.into())?;
        sum += u64::from(segment.tokens);
        within("tokens of a frame", sum, limits.tokens_max.into())?;
        // Quadratic, but segments are few and nothing is allocated.
        if segments.clone().take(index).any(|earlier| earlier.session == segment.session) {
            return Err(DecodeError::RepeatedSession(segment.session));
        }
    }
    let max = u64::from(limits.tokens_max);
    u32::try_from(sum).map_err(|_| DecodeError::OutOfRange { what: "tokens of a frame", value: sum, max })
}

pub(crate) fn check_prompt_len(len: u64, limits: &Limits) -> Result<(), DecodeError> {
    if len == 0 {
        return Err(DecodeError::Empty("the length of a prompt"));
    }
    within("length of a prompt", len, limits.context_max.into())
}

pub(crate) fn check_token(token: u32, limits: &Limits) -> Result<(), DecodeError> {
    within("token id", token.into(), u64::from(limits.vocab).saturating_sub(1))
}
