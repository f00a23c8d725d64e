//! Whose fault a failure is. Policy reads only this.

use serde::{Deserialize, Serialize};

/// Whose fault a failed step is. The coordinator's policy reads only this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blame {
    /// The caller's request can never succeed here. Do not retry; answer HTTP 400.
    Caller,
    /// The link or the far node went away. Heal the ring, replay, carry on.
    Link,
    /// The peer broke the protocol. Close the link, drop the peer from the placement.
    Peer,
    /// Our own bug or our own disk. Answer HTTP 500 and keep the evidence.
    Us,
}

impl Blame {
    /// The byte that stands for this blame on the data plane. Never zero, never reused.
    pub const fn to_wire(self) -> u8 {
        match self {
            Self::Caller => 1,
            Self::Link => 2,
            Self::Peer => 3,
            Self::Us => 4,
        }
    }

    /// The blame a wire byte stands for; `None` for a byte that no build has given a meaning.
    pub const fn from_wire(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Caller),
            2 => Some(Self::Link),
            3 => Some(Self::Peer),
            4 => Some(Self::Us),
            _ => None,
        }
    }
}
