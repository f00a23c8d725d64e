//! What may be said between nodes: encode and decode only.
//!
//! Two planes. The *data plane* ([`Frame`], [`FrameView`], [`DataHello`]) is a fixed little-endian
//! layout with raw f32 rows, written once per hop and step. The *control plane* ([`Control`]) is
//! JSON, read by people in logs and tolerant of fields a newer build adds.
//!
//! Weights travel on connections of their own ([`Ask`], [`Answer`]).
//!
//! Invariants of this room:
//! - Every decoder is total: any byte string gives a message or an error, never a panic.
//! - Nothing is allocated before the length that asks for it was held against a limit. The frame
//!   decoder allocates nothing at all: a [`FrameView`] borrows.
//! - One meaning has one encoding: what decodes, encodes to the same bytes.
//! - No socket, no clock, no thread.
#![forbid(unsafe_code)]

mod ack;
mod blame;
mod bulk;
mod closing;
mod control;
mod control_check;
mod cursor;
mod decode;
mod error;
mod examine;
mod frame;
mod greeting;
mod ids;
mod inventory;
mod limits;
mod measure;
mod sampling;
mod supply;

pub use ack::{ACK_BYTES, Ack, Echo};
pub use blame::Blame;
pub use bulk::{Answer, Ask, BULK_BYTES_MAX, PIECE_BYTES_MAX, PIECE_HEAD_BYTES, PIECES_MAX, PieceRange};
pub use closing::{CloseCode, Closing, Receipt};
pub use control::{
    Control, ControlError, Hello, KvType, LayerRange, LoadSource, Loading, NextHop, Origin, Ping, Pong,
    Prepare, Quant, Ready, Refused, Role, Stats,
};
pub use control_check::{
    ADDRESSES_MAX, CONTROL_BYTES_MAX, CONTROL_KINDS, MODEL_CHARS_MAX, MODELS_MAX, NAME_CHARS_MAX,
    REASON_CHARS_MAX, TAG_CHARS_MAX,
};
pub use decode::{FailedView, FrameView, HiddenView, OpenView, TokensView, peek};
pub use error::{DecodeError, EncodeError, RowsError};
pub use examine::{Examine, Examined, PADDING_BYTES_MAX};
pub use frame::{
    FAILED_TEXT_BYTES_MAX, Failed, Frame, FrameHead, FrameKind, HIDDEN_HEAD_BYTES, Hidden, Open, Peek,
    SegmentHead, StageTime, TIME_US_MAX, TokenOut, Tokens, patch_sent_us,
};
pub use greeting::{DATA_HELLO_BYTES, DataHello, DataKind};
pub use ids::{Epoch, Fingerprint, IdError, NodeId, Position, SessionId};
pub use inventory::{LISTED_MAX, Listed, ListedModel, RANGES_MAX};
pub use limits::{FRAME_BYTES_CAP, Limits, LimitsError};
pub use measure::{LayerShape, MatrixShape, Measure, Measured, MeasuredLink, TARGETS_MAX};
pub use sampling::{Sampling, SamplingError};
pub use supply::{
    FILES_MAX, Held, ModelId, ROOTS_MAX, SOURCES_MAX, SuppliedFile, Supply, UnitRoot, WeightSource,
};

/// Two nodes with another major number cannot talk; both versions are named in the refusal.
pub const PROTOCOL_MAJOR: u32 = 3;
/// A higher minor number only adds control messages or fields that an older build may ignore.
pub const PROTOCOL_MINOR: u32 = 0;
