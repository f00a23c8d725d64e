//! The receipt of a batch: it travels against the data, on the connection that the batch came on.

use crate::cursor::Cursor;
use crate::error::DecodeError;
use crate::ids::Epoch;

/// Bytes of an encoded [`Ack`].
pub const ACK_BYTES: usize = 16;
/// Beside the kinds of frames, and never one of them.
const KIND: u8 = 7;
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
        let mut out = [0; ACK_BYTES];
        out[0] = KIND;
        out[4..8].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[8..].copy_from_slice(&self.lap.to_le_bytes());
        out
    }

    /// Decodes a receipt. Total; allocates nothing.
    ///
    /// # Errors
    /// [`DecodeError`] for every byte string that [`Ack::encode`] does not give.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        match cursor.u8()? {
            KIND => {}
            other => return Err(DecodeError::UnknownKind(other)),
        }
        cursor.zero::<3>("receipt")?;
        let (epoch, lap) = (Epoch(cursor.u32()?), cursor.u64()?);
        cursor.finish()?;
        Ok(Self { epoch, lap })
    }
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
        fn any_bytes_are_a_receipt_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(ack) = Ack::decode(&bytes) {
                let encoded = ack.encode();
                prop_assert_eq!(encoded.as_slice(), bytes.as_slice());
            }
            let _any_bytes_will_do = Ack::of(&bytes);
        }
    }
}
