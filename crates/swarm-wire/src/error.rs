//! Why bytes were refused.

use crate::blame::Blame;
use crate::closing::CloseCode;
use crate::ids::SessionId;
use crate::sampling::SamplingError;

/// Why a byte string is no frame. Always the fault of whoever sent it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes end before the message does.
    #[error("the message ends early: {wanted} more bytes wanted, {left} left")]
    Truncated {
        /// Bytes the next field needs.
        wanted: u64,
        /// Bytes that are there.
        left: u64,
    },
    /// The message ends before the bytes do.
    #[error("{0} bytes follow the end of the message")]
    TrailingBytes(usize),
    /// A kind this build does not know. A skipped step is worse than a closed link.
    #[error("message kind {0} is unknown to this build")]
    UnknownKind(u8),
    /// The message does not start with the four bytes of its kind.
    #[error("this is not a data connection of this protocol")]
    NotOurs,
    /// A number above its limit.
    #[error("{what} is {value}, above the limit of {max}")]
    OutOfRange {
        /// The field.
        what: &'static str,
        /// What the frame says.
        value: u64,
        /// What was agreed.
        max: u64,
    },
    /// A count that must not be zero.
    #[error("{0} is zero")]
    Empty(&'static str),
    /// Bits without a meaning are set: a build of another protocol.
    #[error("reserved bits are set in {0}")]
    Reserved(&'static str),
    /// The previous stage runs another model.
    #[error("rows are {got} floats wide, but {want} were agreed")]
    WidthMismatch {
        /// Agreed at handshake.
        want: u32,
        /// In the frame.
        got: u32,
    },
    /// One session twice in one frame: its KV rows cannot grow twice in one step.
    #[error("{0} appears twice in one frame")]
    RepeatedSession(SessionId),
    /// A blame byte without a meaning.
    #[error("blame byte {0} has no meaning")]
    UnknownBlame(u8),
    /// A close code without a meaning.
    #[error("close code {0} is unknown to this build")]
    UnknownCode(u8),
    /// A text that is not UTF-8.
    #[error("the text of a failure is not UTF-8")]
    NotUtf8,
    /// A sampling number outside its range.
    #[error("the sampling parameters of a session are refused")]
    Sampling(#[source] SamplingError),
}

impl DecodeError {
    /// Whoever sent the bytes broke the protocol.
    pub const fn blame(&self) -> Blame {
        Blame::Peer
    }

    /// What the sender is told when its link is closed for this.
    pub const fn code(&self) -> CloseCode {
        match self {
            Self::Reserved(_) => CloseCode::Version,
            Self::OutOfRange { .. } => CloseCode::OverLimit,
            _ => CloseCode::Malformed,
        }
    }
}

/// This node was about to send a frame its peer would refuse: a bug on this side.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The peer's decoder would say this.
    #[error("a frame was not sent because its receiver would refuse it")]
    WouldBeRefused(#[from] DecodeError),
    /// Rows and segments disagree.
    #[error("a frame of {tokens} tokens needs {want} floats, but {got} were given")]
    RowsMismatch {
        /// Summed over the segments.
        tokens: u64,
        /// `tokens * width`.
        want: u64,
        /// Length of the slice.
        got: u64,
    },
    /// `patch_sent_us` on a frame that has no trail.
    #[error("this frame has no trail to patch")]
    NoTrail,
}

/// A destination of the wrong length for a frame's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the frame holds {want} floats, but the destination holds {got}")]
pub struct RowsError {
    /// Floats in the frame.
    pub want: usize,
    /// Floats in the destination.
    pub got: usize,
}
