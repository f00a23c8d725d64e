//! Bytes of weights between nodes: who needs some asks for pieces, who has them sends each with its digest.
//!
//! Such a connection is a link of its own, so that no frame of a ring ever waits behind a piece. Whoever asks sends
//! [`Ask`]s; every piece of an ask is answered in order, by [`Answer::Piece`] with some or all of its bytes, and
//! [`Answer::Bytes`] with the others, or by [`Answer::Absent`]. [`Answer::Wait`] may come between answers: the piece is on its way to whoever was asked.

use crate::cursor::Cursor;
use crate::error::DecodeError;
use crate::limits::within;

/// Longest piece.
pub const PIECE_BYTES_MAX: u32 = 256 << 10;
/// Most pieces of one ask.
pub const PIECES_MAX: usize = 512;
/// Longest message on such a connection after its first two.
pub const BULK_BYTES_MAX: usize = PIECE_HEAD_BYTES + PIECE_BYTES_MAX as usize;
/// What comes before the first bytes of a piece.
pub const PIECE_HEAD_BYTES: usize = 48;

/// Beside the kinds of frames and receipts, and never one of them.
const ASK: u8 = 16;
const PIECE: u8 = 17;
const BYTES: u8 = 18;
const ABSENT: u8 = 19;
const WAIT: u8 = 20;

/// A stretch of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PieceRange {
    /// Its first byte.
    pub offset: u64,
    /// Its length; above zero and at most [`PIECE_BYTES_MAX`].
    pub bytes: u32,
}

impl PieceRange {
    /// One past its last byte.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes.into())
    }
}

/// Asks for pieces of one file.
///
/// Layout: 16, how far (0 or 1), file u16, then for each piece offset u64 and bytes u32.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Index in the list of files that the connection began with.
    pub file: u16,
    /// Fetch what is not there from where the model was published; else only what is there is sent.
    pub through: bool,
    /// In order, and none overlaps another.
    pub pieces: Vec<PieceRange>,
}

impl Ask {
    /// Replaces the content of `out` by this message.
    ///
    /// # Errors
    /// [`DecodeError`], which the receiver would have said.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), DecodeError> {
        out.clear();
        out.push(ASK);
        out.push(u8::from(self.through));
        out.extend_from_slice(&self.file.to_le_bytes());
        for piece in &self.pieces {
            out.extend_from_slice(&piece.offset.to_le_bytes());
            out.extend_from_slice(&piece.bytes.to_le_bytes());
        }
        Self::decode(out).map(drop)
    }

    /// Decodes a message. Total; allocates what [`PIECES_MAX`] pieces take at most.
    ///
    /// # Errors
    /// [`DecodeError`] for every byte string that [`Ask::encode`] does not give.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        match cursor.u8()? {
            ASK => {}
            other => return Err(DecodeError::UnknownKind(other)),
        }
        let through = match cursor.u8()? {
            0 => false,
            1 => true,
            _ => return Err(DecodeError::Reserved("ask")),
        };
        let file = cursor.u16()?;
        let count = cursor.rest_len() / 12;
        within("pieces", count as u64, PIECES_MAX as u64)?;
        if count == 0 {
            return Err(DecodeError::Empty("pieces"));
        }
        let mut pieces: Vec<PieceRange> = Vec::with_capacity(count);
        for _ in 0..count {
            let piece = PieceRange { offset: cursor.u64()?, bytes: cursor.u32()? };
            check_length(piece.bytes)?;
            within("piece offset", piece.offset, u64::MAX - u64::from(PIECE_BYTES_MAX))?;
            let free = pieces.last().map_or(0, PieceRange::end);
            // A piece before the end of the last one is out of range from above, seen from there.
            within("piece order", free, piece.offset)?;
            pieces.push(piece);
        }
        cursor.finish()?;
        Ok(Self { file, through, pieces })
    }
}

fn check_length(bytes: u32) -> Result<(), DecodeError> {
    if bytes == 0 {
        return Err(DecodeError::Empty("piece bytes"));
    }
    within("piece bytes", bytes.into(), PIECE_BYTES_MAX.into())
}

/// What comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// The next piece that was asked for is there; [`Answer::Bytes`] follow until it is whole.
    ///
    /// Layout: 17, three zero bytes, bytes u32, offset u64, digest, the first bytes.
    Piece {
        /// As in the ask.
        range: PieceRange,
        /// blake3 of its bytes.
        digest: [u8; 32],
        /// Its first bytes; never more than it has.
        bytes: &'a [u8],
    },
    /// More of its bytes. Layout: 18, three zero bytes, the bytes.
    Bytes(&'a [u8]),
    /// The next piece that was asked for is not to be had here. Layout: 19, three zero bytes, bytes u32, offset u64.
    Absent {
        /// As in the ask.
        range: PieceRange,
    },
    /// The next piece will be there. Layout: 20, three zero bytes.
    Wait,
}

impl<'a> Answer<'a> {
    /// What [`Answer::Bytes`] begins with, so that the bytes themselves need no copy.
    pub const BYTES_HEAD: [u8; 4] = [BYTES, 0, 0, 0];

    /// What [`Answer::Piece`] begins with.
    pub fn piece_head(range: &PieceRange, digest: &[u8; 32]) -> [u8; PIECE_HEAD_BYTES] {
        let parts = [&[PIECE, 0, 0, 0][..], &range.bytes.to_le_bytes(), &range.offset.to_le_bytes(), digest];
        let mut out = [0; PIECE_HEAD_BYTES];
        for (place, byte) in out.iter_mut().zip(parts.into_iter().flatten()) {
            *place = *byte;
        }
        out
    }

    /// Replaces the content of `out` by this message.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let kind = match self {
            Self::Piece { .. } => PIECE,
            Self::Bytes(_) => BYTES,
            Self::Absent { .. } => ABSENT,
            Self::Wait => WAIT,
        };
        out.clear();
        out.extend_from_slice(&[kind, 0, 0, 0]);
        match self {
            Self::Piece { range, digest, bytes } => {
                put_range(range, out);
                out.extend_from_slice(digest);
                out.extend_from_slice(bytes);
            }
            Self::Bytes(bytes) => out.extend_from_slice(bytes),
            Self::Absent { range } => put_range(range, out),
            Self::Wait => {}
        }
    }

    /// Decodes a message. Total; allocates nothing.
    ///
    /// # Errors
    /// [`DecodeError`] for every byte string that [`Answer::encode`] of a sound answer does not give.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let kind = cursor.u8()?;
        if !matches!(kind, PIECE | BYTES | ABSENT | WAIT) {
            return Err(DecodeError::UnknownKind(kind));
        }
        cursor.zero::<3>("answer")?;
        let answer = match kind {
            PIECE => {
                let (range, digest) = (take_range(&mut cursor)?, cursor.array()?);
                within("bytes", cursor.rest_len() as u64, range.bytes.into())?;
                Self::Piece { range, digest, bytes: cursor.take(cursor.rest_len())? }
            }
            ABSENT => Self::Absent { range: take_range(&mut cursor)? },
            WAIT => Self::Wait,
            _ => {
                within("bytes", cursor.rest_len() as u64, PIECE_BYTES_MAX.into())?;
                let bytes = cursor.take(cursor.rest_len())?;
                if bytes.is_empty() {
                    return Err(DecodeError::Empty("bytes"));
                }
                Self::Bytes(bytes)
            }
        };
        cursor.finish()?;
        Ok(answer)
    }
}

fn put_range(range: &PieceRange, out: &mut Vec<u8>) {
    out.extend_from_slice(&range.bytes.to_le_bytes());
    out.extend_from_slice(&range.offset.to_le_bytes());
}

fn take_range(cursor: &mut Cursor<'_>) -> Result<PieceRange, DecodeError> {
    let bytes = cursor.u32()?;
    check_length(bytes)?;
    let offset = cursor.u64()?;
    within("piece offset", offset, u64::MAX - u64::from(PIECE_BYTES_MAX))?;
    Ok(PieceRange { offset, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pieces() -> impl Strategy<Value = Vec<PieceRange>> {
        proptest::collection::vec((0_u64..1 << 40, 1..=PIECE_BYTES_MAX), 1..20).prop_map(|gaps| {
            let mut at = 0;
            let place = |(gap, bytes): (u64, u32)| {
                let piece = PieceRange { offset: at + gap, bytes };
                at = piece.end();
                piece
            };
            gaps.into_iter().map(place).collect()
        })
    }

    proptest! {
        #[test]
        fn asks_come_back_as_they_were(file in any::<u16>(), through in any::<bool>(), pieces in pieces()) {
            let (ask, mut out) = (Ask { file, through, pieces }, Vec::new());
            ask.encode(&mut out).unwrap();
            prop_assert_eq!(Ask::decode(&out), Ok(ask));
            prop_assert!(Answer::decode(&out).is_err() && crate::peek(&out).is_err());
            for len in 0..out.len() {
                if let Ok(shorter) = Ask::decode(&out[..len]) {
                    prop_assert!(len % 12 == 4 && shorter.pieces.len() < out.len() / 12);
                }
            }
        }

        #[test]
        fn answers_come_back_as_they_were(offset in 0_u64..1 << 60, bytes in 1..=PIECE_BYTES_MAX, digest in any::<[u8; 32]>(), body in proptest::collection::vec(any::<u8>(), 1..50)) {
            let range = PieceRange { offset, bytes };
            let first = &body[..body.len().min(bytes as usize)];
            let answers = [Answer::Piece { range, digest, bytes: first }, Answer::Piece { range, digest, bytes: &[] }, Answer::Bytes(&body), Answer::Absent { range }, Answer::Wait];
            for answer in answers {
                let mut out = Vec::new();
                answer.encode(&mut out);
                prop_assert_eq!(Answer::decode(&out), Ok(answer));
                prop_assert!(Ask::decode(&out).is_err());
                prop_assert!(out.len() <= BULK_BYTES_MAX);
            }
            let mut out = Vec::new();
            Answer::Bytes(&body).encode(&mut out);
            prop_assert_eq!(&out, &[&Answer::BYTES_HEAD[..], &body].concat());
            Answer::Piece { range, digest, bytes: first }.encode(&mut out);
            prop_assert_eq!(out, [&Answer::piece_head(&range, &digest)[..], first].concat());
        }

        #[test]
        fn any_bytes_are_a_message_or_an_error(kind in 14_u8..22, rest in proptest::collection::vec(any::<u8>(), 0..80)) {
            let bytes = [&[kind][..], &rest].concat();
            let mut out = Vec::new();
            if let Ok(ask) = Ask::decode(&bytes) {
                ask.encode(&mut out).unwrap();
                prop_assert_eq!(&out, &bytes);
            }
            if let Ok(answer) = Answer::decode(&bytes) {
                answer.encode(&mut out);
                prop_assert_eq!(&out, &bytes);
            }
        }
    }

    #[test]
    fn what_is_out_of_order_or_too_long_is_refused() {
        let piece = |offset, bytes| PieceRange { offset, bytes };
        let refused = |pieces: &[PieceRange]| {
            Ask { file: 0, through: false, pieces: pieces.to_vec() }.encode(&mut Vec::new()).unwrap_err()
        };
        assert_eq!(refused(&[]), DecodeError::Empty("pieces"));
        assert_eq!(refused(&[piece(0, 0)]), DecodeError::Empty("piece bytes"));
        for pieces in [
            vec![piece(0, PIECE_BYTES_MAX + 1)],
            vec![piece(u64::MAX - 3, 3)],
            vec![piece(5, 5), piece(9, 1)],
            vec![piece(0, 1); PIECES_MAX + 1],
        ] {
            assert!(matches!(refused(&pieces), DecodeError::OutOfRange { .. }), "{:?}", pieces.first());
        }
        let long = [&Answer::BYTES_HEAD[..], &vec![0; PIECE_BYTES_MAX as usize + 1]].concat();
        assert!(matches!(Answer::decode(&long), Err(DecodeError::OutOfRange { .. })));
        let more = [&Answer::piece_head(&piece(0, 3), &[0; 32])[..], &[0; 4]].concat();
        assert!(matches!(Answer::decode(&more), Err(DecodeError::OutOfRange { .. })));
    }
}
