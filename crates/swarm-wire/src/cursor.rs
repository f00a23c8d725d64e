//! Reads little-endian fields off the front of a byte slice, never past its end.

use crate::error::DecodeError;

pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let Some((head, rest)) = self.rest.split_at_checked(len) else {
            return Err(self.short(len));
        };
        self.rest = rest;
        Ok(head)
    }

    /// `count * each` bytes; the product is checked before it is believed.
    pub(crate) fn table(&mut self, count: usize, each: usize) -> Result<&'a [u8], DecodeError> {
        match count.checked_mul(each) {
            Some(len) => self.take(len),
            None => Err(self.short(usize::MAX)),
        }
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let Some((head, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(self.short(N));
        };
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn f32(&mut self) -> Result<f32, DecodeError> {
        self.array().map(f32::from_le_bytes)
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn rest_len(&self) -> usize {
        self.rest.len()
    }

    /// A field that has no meaning yet and must be zero.
    pub(crate) fn zero<const N: usize>(&mut self, what: &'static str) -> Result<(), DecodeError> {
        if self.array::<N>()? == [0; N] { Ok(()) } else { Err(DecodeError::Reserved(what)) }
    }

    pub(crate) fn finish(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::TrailingBytes(self.rest.len())) }
    }

    fn short(&self, wanted: usize) -> DecodeError {
        DecodeError::Truncated { wanted: wanted as u64, left: self.rest.len() as u64 }
    }
}
