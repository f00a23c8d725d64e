//! Why a link is closed, as its other end is told.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ack::{ACK_BYTES, Ack, ECHO_KIND, Echo};
use crate::cursor::Cursor;
use crate::error::DecodeError;
use crate::ids::Epoch;

/// Beside the kinds of frames and the receipt, and never one of them.
const KIND: u8 = 8;

/// Why a node closes a link. Numbers are never reused; a name that this build does not know is read as
/// [`CloseCode::Unnamed`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CloseCode {
    /// A message of another protocol version.
    Version,
    /// A link or a batch of a placement that is not served here.
    Epoch,
    /// A batch that was lost, repeated or overtaken.
    Order,
    /// A length or a number above what was agreed.
    OverLimit,
    /// Bytes that are no message.
    Malformed,
    /// Hidden rows with NaN or infinity.
    NotNumbers,
    /// A message, or a sender, that does not belong on this link.
    Unexpected,
    /// Bytes that were changed on the way.
    Changed,
    /// There is such a link already.
    Taken,
    /// All places for links are taken.
    NoPlace,
    /// Anything else.
    #[default]
    #[serde(other)]
    Unnamed,
}

impl CloseCode {
    /// All of them, [`CloseCode::Unnamed`] first; a code's index is its number on the wire.
    pub const ALL: [Self; 11] = [
        Self::Unnamed,
        Self::Version,
        Self::Epoch,
        Self::Order,
        Self::OverLimit,
        Self::Malformed,
        Self::NotNumbers,
        Self::Unexpected,
        Self::Changed,
        Self::Taken,
        Self::NoPlace,
    ];

    /// The byte that stands for the code.
    pub fn to_wire(self) -> u8 {
        let index = Self::ALL.iter().position(|&code| code == self);
        index.and_then(|index| u8::try_from(index).ok()).unwrap_or(0)
    }

    /// The code a byte stands for; `None` for a byte that this build gives no meaning.
    pub fn from_wire(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }

    /// Its name, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Version => "version",
            Self::Epoch => "epoch",
            Self::Order => "order",
            Self::OverLimit => "over_limit",
            Self::Malformed => "malformed",
            Self::NotNumbers => "not_numbers",
            Self::Unexpected => "unexpected",
            Self::Changed => "changed",
            Self::Taken => "taken",
            Self::NoPlace => "no_place",
            Self::Unnamed => "unnamed",
        }
    }
}

/// A clause about the node that closes the link.
impl fmt::Display for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "it got a message of another protocol version",
            Self::Epoch => "it does not serve this placement",
            Self::Order => "it got a batch out of order",
            Self::OverLimit => "it got a length or a number above what was agreed",
            Self::Malformed => "it got bytes that are no message",
            Self::NotNumbers => "it got rows that are not numbers",
            Self::Unexpected => "it got a message that does not belong on this link",
            Self::Changed => "it got bytes that were changed on the way",
            Self::Taken => "it has such a link already",
            Self::NoPlace => "it has no place for another link",
            Self::Unnamed => "for a reason that this build has no name for",
        })
    }
}

/// The last message on a data connection, against the data, from a node that closes it because of what came.
///
/// Layout: 8, code u8, two zero bytes, epoch u32, eight zero bytes; as long as a receipt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closing {
    /// The placement that the link was for.
    pub epoch: Epoch,
    /// Why.
    pub code: CloseCode,
}

impl Closing {
    /// The message as bytes.
    pub fn encode(&self) -> [u8; ACK_BYTES] {
        let mut out = [0; ACK_BYTES];
        out[0] = KIND;
        out[1] = self.code.to_wire();
        out[4..8].copy_from_slice(&self.epoch.0.to_le_bytes());
        out
    }

    /// Decodes the message. Total; allocates nothing.
    ///
    /// # Errors
    /// [`DecodeError`] for every byte string that [`Closing::encode`] does not give.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        match cursor.u8()? {
            KIND => {}
            other => return Err(DecodeError::UnknownKind(other)),
        }
        let byte = cursor.u8()?;
        cursor.zero::<2>("closing")?;
        let epoch = Epoch(cursor.u32()?);
        cursor.zero::<8>("closing")?;
        cursor.finish()?;
        let code = CloseCode::from_wire(byte).ok_or(DecodeError::UnknownCode(byte))?;
        Ok(Self { epoch, code })
    }
}

/// What travels against the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// A batch arrived.
    Ack(Ack),
    /// What was sent behind a late batch is back.
    Echo(Echo),
    /// The link ends.
    Closing(Closing),
}

impl Receipt {
    /// Decodes any of them. Total; allocates nothing.
    ///
    /// # Errors
    /// [`DecodeError`] for bytes that are none.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        match bytes.first() {
            Some(&KIND) => Closing::decode(bytes).map(Self::Closing),
            Some(&ECHO_KIND) => Echo::decode(bytes).map(Self::Echo),
            _ => Ack::decode(bytes).map(Self::Ack),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_code_has_a_number_a_name_and_words_of_its_own() {
        for (index, &code) in CloseCode::ALL.iter().enumerate() {
            assert_eq!(usize::from(code.to_wire()), index);
            assert_eq!(CloseCode::from_wire(code.to_wire()), Some(code));
            assert_eq!(serde_json::to_string(&code).unwrap(), format!("{:?}", code.name()));
            let others = CloseCode::ALL.iter().filter(|&&other| other != code);
            assert!(others.into_iter().all(|other| other.to_string() != code.to_string()));
        }
        assert_eq!(CloseCode::from_wire(200), None);
        // A newer build may know more of them.
        assert_eq!(serde_json::from_str::<CloseCode>("\"of_tomorrow\"").unwrap(), CloseCode::Unnamed);
    }

    proptest! {
        #[test]
        fn closings_come_back_as_they_were(epoch in any::<u32>(), code in 0..CloseCode::ALL.len()) {
            let closing = Closing { epoch: Epoch(epoch), code: CloseCode::ALL[code] };
            prop_assert_eq!(Receipt::decode(&closing.encode()), Ok(Receipt::Closing(closing)));
            // Never taken for a frame or a receipt.
            prop_assert!(crate::peek(&closing.encode()).is_err());
            prop_assert!(Ack::decode(&closing.encode()).is_err());
        }

        #[test]
        fn any_bytes_are_one_of_the_three_or_an_error(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..40),
            kind in proptest::option::of(7u8..10),
        ) {
            if let (Some(first), Some(kind)) = (bytes.first_mut(), kind) {
                *first = kind;
            }
            match Receipt::decode(&bytes) {
                Ok(Receipt::Ack(ack)) => prop_assert_eq!(ack.encode().to_vec(), bytes),
                Ok(Receipt::Echo(echo)) => prop_assert_eq!(echo.encode().to_vec(), bytes),
                Ok(Receipt::Closing(closing)) => prop_assert_eq!(closing.encode().to_vec(), bytes),
                Err(_) => {}
            }
        }
    }
}
