//! The list of what a file of the store holds: one record for each piece, added after its bytes were written.
//!
//! ```text
//! "swarm-os ranges 1\n", size u64                       26 bytes
//! offset u64, length u32, blake3 of the bytes, check    48 bytes each, little-endian
//! ```
//!
//! The check is the beginning of the record's own hash. A record that a crash cut short, or that does not fit the file,
//! does not count: its bytes are fetched again.

const MAGIC: &[u8; 18] = b"swarm-os ranges 1\n";
/// Bytes before the first record.
pub const HEADER_BYTES: usize = MAGIC.len() + 8;
/// Bytes of a record.
pub const RECORD_BYTES: usize = 48;
const CHECKED_BYTES: usize = RECORD_BYTES - 4;

/// One piece that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub offset: u64,
    pub len: u32,
    pub hash: [u8; 32],
}

impl Record {
    pub fn new(offset: u64, bytes: &[u8]) -> Self {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Self { offset, len, hash: *blake3::hash(bytes).as_bytes() }
    }

    /// The record of bytes whose digest is known.
    pub fn known(offset: u64, bytes: &[u8], hash: [u8; 32]) -> Self {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Self { offset, len, hash }
    }

    /// One past its last byte.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len.into())
    }

    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let parts = [&self.offset.to_le_bytes()[..], &self.len.to_le_bytes(), &self.hash].concat();
        let check = blake3::hash(&parts);
        let mut out = [0; RECORD_BYTES];
        for (place, byte) in out.iter_mut().zip(parts.iter().chain(check.as_bytes())) {
            *place = *byte;
        }
        out
    }

    fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<Self> {
        let (parts, check) = bytes.split_at(CHECKED_BYTES);
        if blake3::hash(parts).as_bytes().get(..4)? != check {
            return None;
        }
        let (offset, rest) = parts.split_first_chunk()?;
        let (len, hash) = rest.split_first_chunk()?;
        Some(Self {
            offset: u64::from_le_bytes(*offset),
            len: u32::from_le_bytes(*len),
            hash: *hash.first_chunk()?,
        })
    }
}

/// The beginning of a manifest for a file of `size` bytes.
pub fn header(size: u64) -> Vec<u8> {
    [&MAGIC[..], &size.to_le_bytes()].concat()
}

/// The size that a manifest says its file has; nothing when it is no manifest.
pub fn size(bytes: &[u8]) -> Option<u64> {
    let (size, _) = bytes.strip_prefix(MAGIC)?.split_first_chunk()?;
    Some(u64::from_le_bytes(*size))
}

/// The sound records in `bytes`, which begin at a record, of a file of `size` bytes. What is left over is no whole
/// record.
pub fn records(bytes: &[u8], size: u64) -> impl Iterator<Item = Record> {
    let fits = move |record: &Record| {
        record.len > 0 && record.offset.checked_add(record.len.into()).is_some_and(|end| end <= size)
    };
    bytes.as_chunks::<RECORD_BYTES>().0.iter().filter_map(Record::decode).filter(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record() -> impl Strategy<Value = Record> {
        (any::<u64>(), any::<u32>(), any::<[u8; 32]>()).prop_map(|(offset, len, hash)| Record {
            offset,
            len,
            hash,
        })
    }

    proptest! {
        #[test]
        fn records_come_back(all in proptest::collection::vec(record(), 0..20), cut in 0_usize..RECORD_BYTES) {
            let mut bytes: Vec<u8> = all.iter().flat_map(Record::encode).collect();
            bytes.truncate(bytes.len().saturating_sub(cut));
            let whole = bytes.len() / RECORD_BYTES;
            let fit = |record: &&Record| record.len > 0 && record.offset.checked_add(record.len.into()).is_some();
            let want: Vec<Record> = all.iter().take(whole).filter(fit).copied().collect();
            prop_assert_eq!(records(&bytes, u64::MAX).collect::<Vec<_>>(), want);
        }

        #[test]
        fn a_damaged_record_does_not_count(mut all in proptest::collection::vec(record(), 1..5), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            all.iter_mut().for_each(|record| (record.offset, record.len) = (record.offset >> 1, record.len | 1));
            let mut bytes: Vec<u8> = all.iter().flat_map(Record::encode).collect();
            let place = at.index(bytes.len());
            bytes[place] ^= 1 << bit;
            all.remove(place / RECORD_BYTES);
            prop_assert_eq!(records(&bytes, u64::MAX).collect::<Vec<_>>(), all);
        }

        #[test]
        fn anything_is_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300), size in any::<u64>()) {
            let _ = super::size(&bytes);
            prop_assert!(records(&bytes, size).all(|record| record.end() <= size));
        }
    }

    #[test]
    fn a_header_says_the_size() {
        assert_eq!(size(&header(77)), Some(77));
        assert_eq!(header(77).len(), HEADER_BYTES);
        assert_eq!(size(b"swarm-os ranges 2\n12345678"), None);
        let outside = Record::new(70, &[1; 8]).encode();
        assert_eq!(records(&outside, 77).count(), 0);
        assert_eq!(records(&outside, 78).count(), 1);
    }
}
