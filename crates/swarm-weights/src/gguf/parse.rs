//! The GGUF header grammar, v2 and v3, over a growing prefix of the file.
//!
//! Nothing here trusts the file. Every count is held against the bytes that are left before a loop
//! starts, every sum is checked, and nothing is allocated by a declared count: metadata values stay
//! where they are in the prefix, as ranges.

use std::collections::BTreeMap;
use std::ops::Range;

use swarm_kernels::DType;

use super::{ElementType, GgufError, GgufHeader, GgufTensor, Value};

/// No header of a real model comes near it: a vocabulary of 260,000 tokens with merges takes about
/// 20 MB.
pub const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Keys: the format's own limit.
const KEY_BYTES_MAX: u64 = 65_535;
/// Values: a chat template is kilobytes, an embedded `tokenizer.json` some 20 MB.
const STRING_BYTES_MAX: u64 = 32 << 20;
/// Tensor names: twice the format's own limit of 64.
const TENSOR_NAME_BYTES_MAX: u64 = 128;
const KEYS_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 16;
const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT_MAX: u64 = 1 << 20;
const DEFAULT_ALIGNMENT: u64 = 32;
/// Smallest metadata entry: key length, value type, one byte.
const KEY_BYTES_MIN: u64 = 8 + 4 + 1;
/// Smallest tensor entry: name length, number of dimensions, one dimension, type, offset.
const TENSOR_BYTES_MIN: u64 = 8 + 4 + 8 + 4 + 8;

/// What a prefix of a file told.
#[derive(Debug)]
pub enum Parsed {
    /// The header goes on: at least this many bytes from the start of the file are needed. Never
    /// more than the file has, always more than the prefix had.
    Need(u64),
    /// The header is complete and sound.
    Done(GgufHeader),
}

/// Reads the header from `prefix`, the first bytes of a file of `file_len` bytes.
///
/// Costs one pass over the prefix. A caller that doubles the prefix on [`Parsed::Need`] pays at most
/// two passes over the header in all.
///
/// # Errors
/// [`GgufError`] as soon as the prefix cannot belong to a sound file of that length.
pub fn parse(prefix: &[u8], file_len: u64) -> Result<Parsed, GgufError> {
    Ok(match contents(prefix, file_len)? {
        Contents::Need(bytes) => Parsed::Need(bytes),
        Contents::Done { header_len, mut header } => {
            header.bytes = prefix.get(..header_len).unwrap_or_default().to_vec();
            Parsed::Done(header)
        }
    })
}

/// [`Parsed`] for a caller that owns the prefix: the header comes without its bytes, the first
/// `header_len` of the prefix, so that nothing is copied.
pub(super) enum Contents {
    Need(u64),
    Done { header_len: usize, header: GgufHeader },
}

pub(super) fn contents(prefix: &[u8], file_len: u64) -> Result<Contents, GgufError> {
    let mut cursor = Cursor { bytes: prefix, at: 0, file_len };
    match header(&mut cursor) {
        Ok(header) => Ok(Contents::Done { header_len: cursor.at, header }),
        Err(Stop::Need(bytes)) => Ok(Contents::Need(bytes)),
        Err(Stop::Bad(error)) => Err(error),
    }
}

enum Stop {
    Need(u64),
    Bad(GgufError),
}

impl From<GgufError> for Stop {
    fn from(error: GgufError) -> Self {
        Self::Bad(error)
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file_len: u64,
}

impl<'a> Cursor<'a> {
    /// The next `len` bytes as a range of the prefix.
    fn range(&mut self, len: u64) -> Result<Range<usize>, Stop> {
        let end = (self.at as u64).checked_add(len).filter(|&end| end <= self.file_len);
        let Some(end) = end else {
            return Err(GgufError::Truncated { at: self.at as u64, len, file_len: self.file_len }.into());
        };
        if end > HEADER_BYTES_MAX {
            return Err(GgufError::HeaderTooLarge { max: HEADER_BYTES_MAX }.into());
        }
        if end > self.bytes.len() as u64 {
            return Err(Stop::Need(end));
        }
        let start = self.at;
        self.at = end as usize; // at most the prefix's own length
        Ok(start..self.at)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let range = self.range(N as u64)?;
        let mut out = [0; N];
        if let Some(bytes) = self.bytes.get(range) {
            out.copy_from_slice(bytes);
        }
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, Stop> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    /// A length-prefixed string as a range. Whether it is UTF-8 is asked when it is used.
    fn string(&mut self, what: &'static str, max: u64) -> Result<Range<usize>, Stop> {
        let len = self.u64()?;
        if len > max {
            return Err(GgufError::TooLong { what, len, max }.into());
        }
        self.range(len)
    }

    fn text(&self, what: &'static str, range: Range<usize>) -> Result<&'a str, Stop> {
        let bytes = self.bytes.get(range).unwrap_or_default();
        std::str::from_utf8(bytes).map_err(|_| GgufError::NotUtf8 { what: what.into() }.into())
    }

    /// Holds a declared count against what the rest of the file could hold.
    fn check_count(&self, what: &'static str, count: u64, bytes_each: u64) -> Result<(), Stop> {
        let left = self.file_len.saturating_sub(self.at as u64);
        match count.checked_mul(bytes_each) {
            Some(bytes) if bytes <= left => Ok(()),
            _ => Err(GgufError::Count { what, count, left }.into()),
        }
    }
}

fn header(cursor: &mut Cursor<'_>) -> Result<GgufHeader, Stop> {
    let magic: [u8; 4] = cursor.take()?;
    if magic != *b"GGUF" {
        return Err(GgufError::Magic { got: magic }.into());
    }
    let version = cursor.u32()?;
    match version {
        2 | 3 => {}
        _ if matches!(version.swap_bytes(), 1..=3) => return Err(GgufError::BigEndian.into()),
        _ => return Err(GgufError::Version { version }.into()),
    }
    let tensor_count = cursor.u64()?;
    let key_count = cursor.u64()?;
    if tensor_count > TENSORS_MAX {
        return Err(GgufError::TooMany { what: "tensors", count: tensor_count, max: TENSORS_MAX }.into());
    }
    if key_count > KEYS_MAX {
        return Err(GgufError::TooMany { what: "metadata keys", count: key_count, max: KEYS_MAX }.into());
    }
    cursor.check_count("metadata keys", key_count, KEY_BYTES_MIN)?;
    let metadata = metadata(cursor, key_count)?;
    cursor.check_count("tensors", tensor_count, TENSOR_BYTES_MIN)?;
    let alignment = alignment(&metadata)?;
    let mut tensors = BTreeMap::new();
    for _ in 0..tensor_count {
        let (name, tensor) = tensor(cursor, alignment)?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(GgufError::Duplicate { what: "tensor", name }.into());
        }
    }
    let data_start = (cursor.at as u64).next_multiple_of(alignment); // both far below 2^63
    place(&mut tensors, data_start, cursor.file_len)?;
    Ok(GgufHeader { bytes: Vec::new(), version, metadata, tensors })
}

fn metadata(cursor: &mut Cursor<'_>, count: u64) -> Result<BTreeMap<String, Value>, Stop> {
    let mut metadata = BTreeMap::new();
    for _ in 0..count {
        let key = cursor.string("metadata key", KEY_BYTES_MAX)?;
        let key = cursor.text("metadata key", key)?;
        let kind = cursor.u32()?;
        let value = value(cursor, key, kind)?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(GgufError::Duplicate { what: "metadata key", name: key.into() }.into());
        }
    }
    Ok(metadata)
}

fn value(cursor: &mut Cursor<'_>, key: &str, kind: u32) -> Result<Value, Stop> {
    Ok(match ElementType::from_id(kind) {
        Some(ElementType::U8) => Value::Unsigned(u8::from_le_bytes(cursor.take()?).into()),
        Some(ElementType::I8) => Value::Signed(i8::from_le_bytes(cursor.take()?).into()),
        Some(ElementType::U16) => Value::Unsigned(u16::from_le_bytes(cursor.take()?).into()),
        Some(ElementType::I16) => Value::Signed(i16::from_le_bytes(cursor.take()?).into()),
        Some(ElementType::U32) => Value::Unsigned(cursor.u32()?.into()),
        Some(ElementType::I32) => Value::Signed(i32::from_le_bytes(cursor.take()?).into()),
        Some(ElementType::F32) => Value::Float(f32::from_le_bytes(cursor.take()?).into()),
        Some(ElementType::U64) => Value::Unsigned(cursor.u64()?),
        Some(ElementType::I64) => Value::Signed(i64::from_le_bytes(cursor.take()?)),
        Some(ElementType::F64) => Value::Float(f64::from_le_bytes(cursor.take()?)),
        Some(ElementType::Bool) => match cursor.take()? {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            [other] => return Err(GgufError::Bool { key: key.into(), got: other }.into()),
        },
        Some(ElementType::String) => Value::String(cursor.string("string value", STRING_BYTES_MAX)?),
        None if kind == ElementType::ARRAY_ID => array(cursor, key)?,
        None => return Err(GgufError::ValueType { key: key.into(), kind }.into()),
    })
}

/// An array stays where it is; only its extent is found. Arrays of arrays are refused: no model
/// uses them, and llama.cpp refuses them too.
fn array(cursor: &mut Cursor<'_>, key: &str) -> Result<Value, Stop> {
    let kind = cursor.u32()?;
    let Some(element) = ElementType::from_id(kind) else {
        let error = match kind {
            ElementType::ARRAY_ID => GgufError::NestedArray { key: key.into() },
            _ => GgufError::ValueType { key: key.into(), kind },
        };
        return Err(error.into());
    };
    let count = cursor.u64()?;
    cursor.check_count("array elements", count, element.bytes_min())?;
    let start = cursor.at;
    if element == ElementType::String {
        for _ in 0..count {
            cursor.string("string in an array", STRING_BYTES_MAX)?;
        }
    } else {
        cursor.range(count * element.bytes_min())?; // checked by check_count
    }
    Ok(Value::Array { element, count, bytes: start..cursor.at })
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::Unsigned(got)) if got.is_power_of_two() && *got <= ALIGNMENT_MAX => Ok(*got),
        Some(other) => Err(GgufError::Alignment { got: format!("{other:?}") }),
    }
}

fn tensor(cursor: &mut Cursor<'_>, alignment: u64) -> Result<(String, GgufTensor), Stop> {
    let name = cursor.string("tensor name", TENSOR_NAME_BYTES_MAX)?;
    let name = cursor.text("tensor name", name)?.to_owned();
    let dimensions = cursor.u32()?;
    if dimensions == 0 || dimensions > DIMENSIONS_MAX {
        return Err(GgufError::Dimensions { tensor: name, got: dimensions, max: DIMENSIONS_MAX }.into());
    }
    let mut dims = Vec::new();
    for _ in 0..dimensions {
        dims.push(cursor.u64()?);
    }
    let kind = cursor.u32()?;
    let offset = cursor.u64()?;
    let Some(dtype) = dtype_from_id(kind) else {
        return Err(GgufError::TensorType { tensor: name, kind, known_as: foreign_type_name(kind) }.into());
    };
    let Some(bytes) = tensor_bytes(dtype, &dims) else {
        return Err(GgufError::TensorSize { tensor: name, dims, dtype: dtype.name() }.into());
    };
    if !offset.is_multiple_of(alignment) {
        return Err(GgufError::Misaligned { tensor: name, offset, alignment }.into());
    }
    Ok((name, GgufTensor { dtype, dims, offset, bytes }))
}

/// The one place where a tensor's size is computed. `None` when a dimension is zero, a row is not a
/// whole number of blocks, or a product does not fit.
fn tensor_bytes(dtype: DType, dims: &[u64]) -> Option<u64> {
    let (&cols, rest) = dims.split_first()?;
    let row = dtype.row_bytes(usize::try_from(cols).ok().filter(|&cols| cols > 0)?)?;
    let rows = rest.iter().try_fold(1_u64, |rows, &dim| rows.checked_mul(dim)).filter(|&rows| rows > 0)?;
    (row as u64).checked_mul(rows)
}

/// Turns offsets into file positions and holds them against the file and against each other.
fn place(
    tensors: &mut BTreeMap<String, GgufTensor>,
    data_start: u64,
    file_len: u64,
) -> Result<(), GgufError> {
    let mut spans = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors.iter_mut() {
        let start = data_start.checked_add(tensor.offset);
        let end = start.and_then(|start| start.checked_add(tensor.bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => {
                tensor.offset = start;
                spans.push((start, end, name.as_str()));
            }
            _ => {
                return Err(GgufError::OutsideFile {
                    tensor: name.clone(),
                    offset: tensor.offset,
                    bytes: tensor.bytes,
                    file_len,
                });
            }
        }
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if let [(_, end, first), (start, _, second)] = pair
            && start < end
        {
            return Err(GgufError::Overlap { first: (*first).into(), second: (*second).into() });
        }
    }
    Ok(())
}

fn dtype_from_id(id: u32) -> Option<DType> {
    Some(match id {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        6 => DType::Q5_0,
        7 => DType::Q5_1,
        8 => DType::Q8_0,
        10 => DType::Q2_K,
        11 => DType::Q3_K,
        12 => DType::Q4_K,
        13 => DType::Q5_K,
        14 => DType::Q6_K,
        30 => DType::BF16,
        _ => return None,
    })
}

/// Names of types that exist and are not read, so that the error tells a user what the file holds.
fn foreign_type_name(id: u32) -> &'static str {
    match id {
        4 => "Q4_2 (removed)",
        5 => "Q4_3 (removed)",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31..=33 => "Q4_0 repacked (removed)",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36..=38 => "IQ4_NL repacked (removed)",
        39 => "MXFP4",
        40 => "NVFP4",
        41 => "Q1_0",
        _ => "unknown",
    }
}
