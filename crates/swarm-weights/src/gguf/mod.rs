//! GGUF, versions 2 and 3: one file with metadata, vocabulary and tensors.

mod config;
mod names;
mod parse;
pub(crate) mod split;
mod vocab;

use std::collections::BTreeMap;
use std::ops::Range;

use swarm_kernels::DType;

use crate::error::WeightsError;
use crate::source::Source;

pub(crate) use config::{MetadataError, config_from, eos_token_ids};
pub(crate) use names::hf_name;
use parse::Contents;
pub use parse::{HEADER_BYTES_MAX, Parsed, parse};
pub use vocab::GgufVocab;

/// First read of a header. What is read after it is as much again, until the header is complete: of one that comes over
/// a network, little is read beyond its end.
const FIRST_READ_BYTES: u64 = 32 << 10;
/// Later reads are this long, or a quarter of what is there.
const READ_BYTES_MAX: u64 = 256 << 10;

/// How much more of a header to read when `have` bytes were not all of it.
fn step(have: u64) -> u64 {
    have.clamp(FIRST_READ_BYTES, READ_BYTES_MAX.max(have / 4))
}

/// What makes a file unreadable as GGUF. The file's name is added by [`WeightsError::Gguf`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    #[error("it starts with \"{}\" instead of \"GGUF\"", got.escape_ascii())]
    Magic { got: [u8; 4] },
    #[error("it is a big-endian file; convert it to little-endian")]
    BigEndian,
    #[error("it has format version {version}; versions 2 and 3 are read")]
    Version { version: u32 },
    #[error(
        "it ends at byte {file_len}, inside its header: {len} bytes at offset {at} are missing; fetch it again"
    )]
    Truncated { at: u64, len: u64, file_len: u64 },
    #[error("its header is longer than {max} bytes")]
    HeaderTooLarge { max: u64 },
    #[error("it declares {count} {what}, more than the {max} that are accepted")]
    TooMany { what: &'static str, count: u64, max: u64 },
    #[error("it declares {count} {what}, which the {left} bytes that follow cannot hold")]
    Count { what: &'static str, count: u64, left: u64 },
    #[error("a {what} has {len} bytes, more than the {max} that are accepted")]
    TooLong { what: &'static str, len: u64, max: u64 },
    #[error("{what} is not valid UTF-8")]
    NotUtf8 { what: String },
    #[error("{what} {name:?} occurs twice")]
    Duplicate { what: &'static str, name: String },
    #[error("{key:?} has the unknown value type {kind}")]
    ValueType { key: String, kind: u32 },
    #[error("{key:?} is an array of arrays, which is not read")]
    NestedArray { key: String },
    #[error("{key:?} is a boolean with the value {got}")]
    Bool { key: String, got: u8 },
    #[error("general.alignment is {got}; a power of two up to 1048576 is needed")]
    Alignment { got: String },
    #[error("tensor {tensor:?} has {got} dimensions; 1 to {max} are possible")]
    Dimensions { tensor: String, got: u32, max: u32 },
    #[error(
        "tensor {tensor:?} has type {kind} ({known_as}), which is not supported; use a file with F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K"
    )]
    TensorType { tensor: String, kind: u32, known_as: &'static str },
    #[error("tensor {tensor:?} of type {dtype} cannot have dimensions {dims:?}")]
    TensorSize { tensor: String, dims: Vec<u64>, dtype: &'static str },
    #[error(
        "tensor {tensor:?} starts at offset {offset}, which is not a multiple of the alignment {alignment}"
    )]
    Misaligned { tensor: String, offset: u64, alignment: u64 },
    #[error(
        "tensor {tensor:?} ({bytes} bytes at offset {offset} of the data) lies outside the file of {file_len} bytes; fetch it again"
    )]
    OutsideFile { tensor: String, offset: u64, bytes: u64, file_len: u64 },
    #[error("tensors {first:?} and {second:?} overlap")]
    Overlap { first: String, second: String },
    #[error("{key:?} is {got}, not {want}")]
    Type { key: String, want: &'static str, got: &'static str },
    #[error("{key:?} has {count} elements, more than the {max} that are accepted")]
    ArrayLen { key: String, count: u64, max: u64 },
}

/// Type of a metadata value or of an array's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    U64,
    I64,
    F64,
}

impl ElementType {
    /// Arrays are not elements: see [`Value::Array`].
    const ARRAY_ID: u32 = 9;

    fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::String,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// Bytes of one element; for strings, of the shortest.
    const fn bytes_min(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::String | Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }
}

/// A metadata value. Strings and arrays are ranges of the header's own bytes, so that a header costs
/// its length and no more until a value is asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(Range<usize>),
    Array { element: ElementType, count: u64, bytes: Range<usize> },
}

impl Value {
    const fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) | Self::Signed(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a boolean",
            Self::String(_) => "a string",
            Self::Array { .. } => "an array",
        }
    }
}

/// Where a tensor lies. `dims` are in the file's order, the row length first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    pub dtype: DType,
    pub dims: Vec<u64>,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// A complete, sound header: every tensor lies inside the file and none overlap.
#[derive(Debug)]
pub struct GgufHeader {
    bytes: Vec<u8>,
    pub version: u32,
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, GgufTensor>,
}

impl GgufHeader {
    /// Reads the header of `source`, in growing pieces, and nothing after it but the rest of the last
    /// piece.
    ///
    /// # Errors
    /// [`WeightsError::Gguf`] or [`WeightsError::Source`].
    pub fn read(source: &dyn Source) -> Result<Self, WeightsError> {
        let file_len = source.len();
        let mut prefix = Vec::new();
        let mut want = FIRST_READ_BYTES;
        loop {
            let have = prefix.len() as u64;
            let len = want.max(have.saturating_add(step(have))).min(HEADER_BYTES_MAX).min(file_len);
            prefix.resize(len as usize, 0); // at most HEADER_BYTES_MAX
            source.read_at(have, prefix.get_mut(have as usize..).unwrap_or_default())?;
            match parse::contents(&prefix, file_len) {
                Ok(Contents::Need(bytes)) => want = bytes,
                Ok(Contents::Done { header_len, mut header }) => {
                    prefix.truncate(header_len);
                    prefix.shrink_to_fit();
                    header.bytes = prefix;
                    return Ok(header);
                }
                Err(error) => {
                    return Err(WeightsError::Gguf { file: source.name().to_owned(), source: error });
                }
            }
        }
    }

    /// A string value, `None` when the key is absent.
    ///
    /// # Errors
    /// [`GgufError::Type`] when it is something else, [`GgufError::NotUtf8`].
    pub fn string(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::String(range)) => self.text(key, range.clone()).map(Some),
            Some(other) => Err(type_error(key, "a string", other.kind())),
        }
    }

    /// A whole number that is not negative. An array of equal numbers counts as that number, because
    /// some writers give one value per layer.
    ///
    /// # Errors
    /// [`GgufError::Type`].
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, GgufError> {
        let want = "a whole number from 0 on";
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Unsigned(value)) => Ok(Some(value)),
            Some(&Value::Signed(value)) => match u64::try_from(value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(type_error(key, want, "negative")),
            },
            Some(Value::Array { element: ElementType::U32 | ElementType::I32, .. }) => {
                let values = self.i32s(key)?.unwrap_or_default();
                match values.split_first() {
                    Some((&first, rest)) if first >= 0 && rest.iter().all(|value| *value == first) => {
                        Ok(Some(first as u64)) // not negative by the guard
                    }
                    _ => Err(type_error(key, want, "an array of different numbers, one per layer")),
                }
            }
            Some(other) => Err(type_error(key, want, other.kind())),
        }
    }

    /// A number of any kind, as f64.
    ///
    /// # Errors
    /// [`GgufError::Type`].
    pub fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Float(value)) => Ok(Some(value)),
            Some(&Value::Unsigned(value)) => Ok(Some(value as f64)),
            Some(&Value::Signed(value)) => Ok(Some(value as f64)),
            Some(other) => Err(type_error(key, "a number", other.kind())),
        }
    }

    /// # Errors
    /// [`GgufError::Type`].
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(type_error(key, "a boolean", other.kind())),
        }
    }

    /// An array of strings. Allocates them: at most `max` of them, whose bytes are in the header.
    ///
    /// # Errors
    /// [`GgufError::Type`], [`GgufError::ArrayLen`], [`GgufError::NotUtf8`].
    pub fn strings(&self, key: &str, max: u64) -> Result<Option<Vec<String>>, GgufError> {
        let Some((count, range)) = self.array(key, &[ElementType::String], "an array of strings")? else {
            return Ok(None);
        };
        if count > max {
            return Err(GgufError::ArrayLen { key: key.into(), count, max });
        }
        let mut out = Vec::new();
        let mut at = range.start;
        for _ in 0..count {
            let (start, len) = self.string_at(at).ok_or_else(|| type_error(key, "whole", "cut"))?;
            at = start + len; // inside the header: string_at looked
            out.push(self.text(key, start..at)?.to_owned());
        }
        Ok(Some(out))
    }

    /// An array of 32-bit whole numbers.
    ///
    /// # Errors
    /// [`GgufError::Type`].
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>, GgufError> {
        let kinds = [ElementType::I32, ElementType::U32];
        let words = self.words(key, &kinds, "an array of 32-bit integers")?;
        Ok(words.map(|words| words.map(i32::from_le_bytes).collect()))
    }

    /// An array of 32-bit floats.
    ///
    /// # Errors
    /// [`GgufError::Type`].
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        let words = self.words(key, &[ElementType::F32], "an array of 32-bit floats")?;
        Ok(words.map(|words| words.map(f32::from_le_bytes).collect()))
    }

    fn words(
        &self,
        key: &str,
        kinds: &[ElementType],
        want: &'static str,
    ) -> Result<Option<impl Iterator<Item = [u8; 4]>>, GgufError> {
        let array = self.array(key, kinds, want)?;
        Ok(array.map(|(_, range)| {
            let bytes = self.bytes.get(range).unwrap_or_default();
            bytes.as_chunks::<4>().0.iter().copied()
        }))
    }

    fn array(
        &self,
        key: &str,
        kinds: &[ElementType],
        want: &'static str,
    ) -> Result<Option<(u64, Range<usize>)>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array { element, count, bytes }) if kinds.contains(element) => {
                Ok(Some((*count, bytes.clone())))
            }
            Some(other) => Err(type_error(key, want, other.kind())),
        }
    }

    /// Start and length of the length-prefixed string at `at`, when it lies inside the header.
    fn string_at(&self, at: usize) -> Option<(usize, usize)> {
        let start = at.checked_add(8)?;
        let len = self.bytes.get(at..start)?.try_into().map(u64::from_le_bytes).ok()?;
        let len = usize::try_from(len).ok()?;
        (start.checked_add(len)? <= self.bytes.len()).then_some((start, len))
    }

    fn text(&self, key: &str, range: Range<usize>) -> Result<&str, GgufError> {
        let bytes = self.bytes.get(range).unwrap_or_default();
        std::str::from_utf8(bytes).map_err(|_| GgufError::NotUtf8 { what: key.to_owned() })
    }
}

fn type_error(key: &str, want: &'static str, got: &'static str) -> GgufError {
    GgufError::Type { key: key.to_owned(), want, got }
}
