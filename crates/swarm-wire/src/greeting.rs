//! The first message on a data connection.

use crate::cursor::Cursor;
use crate::error::DecodeError;
use crate::ids::{Epoch, NodeId};

const MAGIC: [u8; 4] = *b"SwOS";

/// Bytes of an encoded [`DataHello`].
pub const DATA_HELLO_BYTES: usize = 44;

/// What a data connection will carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DataKind {
    /// Hidden rows and session messages, from a stage to the next.
    Hidden,
    /// Token ids and failures, from the tail to the coordinator, who dialled.
    Tokens,
}

/// Sent once by whoever dialled a data connection.
///
/// Layout: magic `SwOS`, epoch u32, kind u8, three zero bytes, node id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataHello {
    /// The placement this connection belongs to.
    pub epoch: Epoch,
    /// What it will carry.
    pub kind: DataKind,
    /// Who dialled.
    pub from: NodeId,
}

impl DataHello {
    /// The greeting as bytes.
    pub fn encode(&self) -> [u8; DATA_HELLO_BYTES] {
        let kind = match self.kind {
            DataKind::Hidden => 1,
            DataKind::Tokens => 2,
        };
        let mut out = [0; DATA_HELLO_BYTES];
        out[..4].copy_from_slice(&MAGIC);
        out[4..8].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[8] = kind;
        out[12..].copy_from_slice(&self.from.0);
        out
    }

    /// Decodes a greeting. Total; allocates nothing.
    ///
    /// # Errors
    /// [`DecodeError`] for every byte string that [`DataHello::encode`] does not give.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        if cursor.array::<4>()? != MAGIC {
            return Err(DecodeError::NotOurs);
        }
        let epoch = Epoch(cursor.u32()?);
        let kind = match cursor.u8()? {
            1 => DataKind::Hidden,
            2 => DataKind::Tokens,
            other => return Err(DecodeError::UnknownKind(other)),
        };
        cursor.zero::<3>("data greeting")?;
        let from = NodeId(cursor.array()?);
        cursor.finish()?;
        Ok(Self { epoch, kind, from })
    }
}
