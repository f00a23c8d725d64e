//! The receipt of a batch, which travels against the data on the connection that the batch came on, and the echo, which
//! tells a receipt that is late from one that will never come.

use crate::cursor::Cursor;
use crate::error::DecodeError;
use crate::ids::Epoch;

/// Bytes of an encoded [`Ack`].
pub const ACK_BYTES: usize = 16;
/// Beside the kinds of frames, and never one of them.
const KIND: u8 = 7;
/// The same, of an echo. 8 is the last word on a link.
pub(crate) const ECHO_KIND: u8 = 9;
/// The kinds of frames that are acknowledged: hidden rows and tokens.
const ACKNOWLEDGED: [u8; 2] = [1, 5];

/// Says that a batch has arrived whole, before anything is computed. A sender that misses it knows after a round trip
/// what the lap's deadline would tell much later.
///
/// Layout: 7, three zero bytes, epoch u32, lap u64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The placement.
    pub epoch: Epoch,
    /// The batch.
    pub lap: u64,
}

impl Ack {
    /// The receipt of a frame; `None` for frames that are not acknowledged, and for bytes that are no frame.
    pub fn of(frame: &[u8]) -> Option<Self> {
        let mut cursor = Cursor::new(frame);
        let kind = cursor.u8().ok()?;
        cursor.take(3).ok()?;
        let epoch = Epoch(cursor.u32().ok()?);
        let lap = cursor.u64().ok()?;
        ACKNOWLEDGED.contains(&kind).then_some(Self { epoch, lap })
    }

    /// The receipt as bytes.
    pub fn encode(&self) -> [u8; ACK_BYTES] {
        encode(KIND, self.epoch, self.lap)
    }

    /// Decodes a receipt. Total; allocates nothing.
    ///
    /// # Errors
    /// [`DecodeError`] for every byte string that [`Ack::encode`] does not give.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (epoch, lap) = decode(KIND, "receipt", bytes)?;
        Ok(Self { epoch, lap })
    }
}

/// Follows a batch whose receipt is late, and is sent back as it is by whoever receives it. Both ways keep their order, so an
/// echo that is back before the receipt proves that the batch was lost, however slow the link and both its ends are.
///
/// Layout: 9, three zero bytes, epoch u32, lap u64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo {
    /// The placement.
    pub epoch: Epoch,
    /// The newest batch that was sent before it.
    pub lap: u64,
}

impl Echo {
    /// The echo as bytes.
    pub fn encode(&self) -> [u8; ACK_BYTES] {
        encode(ECHO_KIND, self.epoch, self.lap)
    }

    /// Decodes an echo. Total; allocates nothing.
    ///
    /// # Errors
    /// [`DecodeError`] for every byte string that [`Echo::encode`] does not give.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (epoch, lap) = decode(ECHO_KIND, "echo", bytes)?;
        Ok(Self { epoch, lap })
    }
}

fn encode(kind: u8, epoch: Epoch, lap: u64) -> [u8; ACK_BYTES] {
    let mut out = [0; ACK_BYTES];
    out[0] = kind;
    out[4..8].copy_from_slice(&epoch.0.to_le_bytes());
    out[8..].copy_from_slice(&lap.to_le_bytes());
    out
}

fn decode(kind: u8, what: &'static str, bytes: &[u8]) -> Result<(Epoch, u64), DecodeError> {
    let mut cursor = Cursor::new(bytes);
    match cursor.u8()? {
        found if found == kind => {}
        other => return Err(DecodeError::UnknownKind(other)),
    }
    cursor.zero::<3>(what)?;
    let found = (Epoch(cursor.u32()?), cursor.u64()?);
    cursor.finish()?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn receipts_come_back_as_they_were(epoch in any::<u32>(), lap in any::<u64>()) {
            let ack = Ack { epoch: Epoch(epoch), lap };
            prop_assert_eq!(Ack::decode(&ack.encode()), Ok(ack));
            // No receipt is taken for a frame, or acknowledged itself.
            prop_assert!(crate::peek(&ack.encode()).is_err());
            prop_assert_eq!(Ack::of(&ack.encode()), None);
        }

        #[test]
        fn echoes_come_back_as_they_were(epoch in any::<u32>(), lap in any::<u64>()) {
            let echo = Echo { epoch: Epoch(epoch), lap };
            prop_assert_eq!(Echo::decode(&echo.encode()), Ok(echo));
            // No echo is taken for a frame or a receipt, or acknowledged.
            prop_assert!(crate::peek(&echo.encode()).is_err());
            prop_assert!(Ack::decode(&echo.encode()).is_err());
            prop_assert_eq!(Ack::of(&echo.encode()), None);
        }

        #[test]
        fn any_bytes_are_a_receipt_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(ack) = Ack::decode(&bytes) {
                let encoded = ack.encode();
                prop_assert_eq!(encoded.as_slice(), bytes.as_slice());
            }
            let _any_bytes_will_do = Ack::of(&bytes);
        }
    }
}
