//! What a peer may make this node hold, agreed at handshake.

use serde::{Deserialize, Serialize};

use crate::error::DecodeError;
use crate::frame::{
    CLOSE_BYTES, FAILED_HEAD_BYTES, FAILED_TEXT_BYTES_MAX, HIDDEN_HEAD_BYTES, OPEN_HEAD_BYTES, SEGMENT_BYTES,
    STAGE_TIME_BYTES, TOKEN_OUT_BYTES_MAX, TRUNCATE_BYTES,
};

/// No set of limits may allow a frame above this many bytes.
pub const FRAME_BYTES_CAP: u64 = 1 << 30;

/// The sizes both ends of a data connection agreed on. Every length in a frame is held against
/// them on the line that reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Limits {
    /// Floats in one hidden row (the model's `hidden_size`).
    pub width: u32,
    /// Token ids are below this.
    pub vocab: u32,
    /// Positions of one session, and token ids of one prompt.
    pub context_max: u32,
    /// Rows of one frame, summed over its segments. Also the token items of one frame.
    pub tokens_max: u32,
    /// Segments of one frame.
    pub segments_max: u32,
    /// Stages of the ring, and so entries of a frame's trail.
    pub stages_max: u32,
}

/// Limits that no node would agree to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LimitsError {
    /// A number outside its range.
    #[error("limit {what} is {value}, but it must be between 1 and {max}")]
    OutOfRange {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u32,
        /// The largest value this build accepts.
        max: u32,
    },
    /// Each number is fine, but together they allow too large a frame.
    #[error(
        "these limits allow a frame of {bytes} bytes, above the cap of {FRAME_BYTES_CAP}; lower tokens_max or context_max"
    )]
    FrameTooLarge {
        /// Bytes of the largest frame.
        bytes: u64,
    },
}

impl Limits {
    /// Checks each number and the largest frame they allow.
    ///
    /// # Errors
    /// [`LimitsError`] naming the number that is zero or too large.
    pub fn validate(&self) -> Result<(), LimitsError> {
        let ranged = [
            ("width", self.width, 1 << 16),
            ("vocab", self.vocab, 1 << 24),
            ("context_max", self.context_max, 1 << 24),
            ("tokens_max", self.tokens_max, u32::from(u16::MAX)),
            ("segments_max", self.segments_max, 1 << 10),
            ("stages_max", self.stages_max, 1 << 8),
        ];
        for (what, value, max) in ranged {
            if value == 0 || value > max {
                return Err(LimitsError::OutOfRange { what, value, max });
            }
        }
        self.frame_bytes_max().map(|_| ())
    }

    /// Bytes of the largest frame of any kind that these limits allow: what a receiver must be
    /// able to hold, and the length above which it closes the link unread.
    ///
    /// # Errors
    /// [`LimitsError::FrameTooLarge`] above [`FRAME_BYTES_CAP`], or when the sum is no number.
    pub fn frame_bytes_max(&self) -> Result<u64, LimitsError> {
        let bytes = self.largest().unwrap_or(u64::MAX);
        if bytes > FRAME_BYTES_CAP { Err(LimitsError::FrameTooLarge { bytes }) } else { Ok(bytes) }
    }

    fn largest(&self) -> Option<u64> {
        let trail = u64::from(self.stages_max).checked_mul(STAGE_TIME_BYTES as u64)?;
        let head = trail.checked_add(HIDDEN_HEAD_BYTES as u64)?;
        let table = u64::from(self.segments_max).checked_mul(SEGMENT_BYTES as u64)?;
        let row = u64::from(self.width).checked_mul(4)?;
        let rows = u64::from(self.tokens_max).checked_mul(row)?;
        let hidden = head.checked_add(table)?.checked_add(rows)?;
        let items = u64::from(self.tokens_max).checked_mul(TOKEN_OUT_BYTES_MAX as u64)?;
        let tokens = head.checked_add(items)?;
        let open = u64::from(self.context_max).checked_mul(4)?.checked_add(OPEN_HEAD_BYTES as u64)?;
        let failed = (FAILED_HEAD_BYTES + FAILED_TEXT_BYTES_MAX) as u64;
        let small = failed.max(TRUNCATE_BYTES as u64).max(CLOSE_BYTES as u64);
        Some(hidden.max(tokens).max(open).max(small))
    }
}

/// Holds `value` against `max` on the line that reads it.
pub(crate) fn within(what: &'static str, value: u64, max: u64) -> Result<(), DecodeError> {
    if value > max { Err(DecodeError::OutOfRange { what, value, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Limits = Limits {
        width: 4096,
        vocab: 128_256,
        context_max: 131_072,
        tokens_max: 512,
        segments_max: 64,
        stages_max: 16,
    };

    #[test]
    fn ordinary_limits_pass_and_the_largest_frame_is_the_rows() {
        GOOD.validate().unwrap();
        assert_eq!(GOOD.frame_bytes_max(), Ok(24 + 16 * 48 + 64 * 16 + 512 * 4096 * 4));
    }

    #[test]
    fn zero_and_huge_are_refused_without_overflow() {
        assert!(Limits { width: 0, ..GOOD }.validate().is_err());
        assert!(Limits { tokens_max: 65_536, ..GOOD }.validate().is_err());
        let all = u32::MAX;
        let huge = Limits {
            width: all,
            vocab: all,
            context_max: all,
            tokens_max: all,
            segments_max: all,
            stages_max: all,
        };
        assert!(huge.validate().is_err());
        assert!(matches!(huge.frame_bytes_max(), Err(LimitsError::FrameTooLarge { .. })));
        let together = Limits { width: 65_536, tokens_max: 65_535, ..GOOD };
        assert!(matches!(together.validate(), Err(LimitsError::FrameTooLarge { .. })));
    }
}
