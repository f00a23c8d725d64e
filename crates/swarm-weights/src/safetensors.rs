//! The safetensors header: a length, a JSON object, then nothing but tensor bytes without a hole.
//!
//! The verdict is that of the `safetensors` crate or stricter: duplicate names, more than
//! [`TENSORS_MAX`] tensors and more than eight dimensions are refused too.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::error::WeightsError;
use crate::source::Source;

/// The reference implementation's limit.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// The largest published mixtures of experts have some 100,000, over many files.
pub(crate) const TENSORS_MAX: usize = 1 << 18;
const DIMENSIONS_MAX: usize = 8;

/// What makes a file malformed. The file's name is added by [`WeightsError::Safetensors`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SafetensorsError {
    #[error("it has {file_len} bytes, too few for a header")]
    TooShort { file_len: u64 },
    #[error("it declares a header of {len} bytes, more than the {max} that are accepted")]
    HeaderTooLarge { len: u64, max: u64 },
    #[error("it declares a header of {len} bytes and has {file_len} bytes in all; fetch it again")]
    Truncated { len: u64, file_len: u64 },
    #[error("its header does not start with '{{'")]
    NotAnObject,
    #[error("its header is not the JSON that was expected")]
    Json(#[from] serde_json::Error),
    #[error("tensor {name:?} has the unknown type {dtype:?}")]
    UnknownDtype { name: String, dtype: String },
    #[error("tensor {name:?} of type {dtype:?} and shape {shape:?} cannot span bytes {start} to {end}")]
    Size { name: String, dtype: String, shape: Vec<u64>, start: u64, end: u64 },
    #[error(
        "tensor {name:?} starts at byte {start} of the data, the one before ends at {previous_end}: a hole or an overlap"
    )]
    Gap { name: String, start: u64, previous_end: u64 },
    #[error("its tensors take {want} bytes, the file has {got} after its header; fetch it again")]
    DataLength { want: u64, got: u64 },
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SafeTensor {
    /// As spelled in the file; always one that the format knows.
    pub dtype: String,
    /// Row-major, slowest dimension first.
    pub shape: Vec<u64>,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// A complete, sound header.
#[derive(Debug)]
pub struct SafetensorsHeader {
    pub tensors: BTreeMap<String, SafeTensor>,
}

impl SafetensorsHeader {
    /// Reads the header of `source`: eight bytes, then exactly the header.
    ///
    /// # Errors
    /// [`WeightsError::Safetensors`] or [`WeightsError::Source`].
    pub fn read(source: &dyn Source) -> Result<Self, WeightsError> {
        let fail = |error| WeightsError::Safetensors { file: source.name().to_owned(), source: error };
        let file_len = source.len();
        if file_len < 8 {
            return Err(fail(SafetensorsError::TooShort { file_len }));
        }
        let mut len = [0; 8];
        source.read_at(0, &mut len)?;
        let len = u64::from_le_bytes(len);
        check_len(len, file_len).map_err(fail)?;
        let mut json = vec![0; len as usize]; // at most HEADER_BYTES_MAX, and in the file
        source.read_at(8, &mut json)?;
        Self::parse(&json, file_len).map_err(fail)
    }

    /// Checks the JSON part of a header against a file of `file_len` bytes.
    ///
    /// # Errors
    /// [`SafetensorsError`].
    pub fn parse(json: &[u8], file_len: u64) -> Result<Self, SafetensorsError> {
        check_len(json.len() as u64, file_len)?;
        if json.first() != Some(&b'{') {
            return Err(SafetensorsError::NotAnObject);
        }
        let entries: Entries = serde_json::from_slice(json)?;
        let data_start = 8 + json.len() as u64; // check_len: at most file_len
        let mut spans = Vec::with_capacity(entries.0.len());
        for (name, entry) in &entries.0 {
            let (start, end) = entry.data_offsets;
            check_entry(name, entry)?;
            spans.push((start, end, name.as_str()));
        }
        spans.sort_unstable();
        let mut previous_end = 0;
        for (start, end, name) in spans {
            if start != previous_end {
                return Err(SafetensorsError::Gap { name: name.into(), start, previous_end });
            }
            previous_end = end;
        }
        let got = file_len - data_start;
        if previous_end != got {
            return Err(SafetensorsError::DataLength { want: previous_end, got });
        }
        let place = |entry: Entry| {
            let (start, end) = entry.data_offsets;
            let (offset, bytes) = (data_start + start, end - start); // start <= end <= file_len by now
            SafeTensor { dtype: entry.dtype, shape: entry.shape.0, offset, bytes }
        };
        Ok(Self { tensors: entries.0.into_iter().map(|(name, entry)| (name, place(entry))).collect() })
    }
}

fn check_len(len: u64, file_len: u64) -> Result<(), SafetensorsError> {
    if len > HEADER_BYTES_MAX {
        return Err(SafetensorsError::HeaderTooLarge { len, max: HEADER_BYTES_MAX });
    }
    if len.checked_add(8).is_none_or(|end| end > file_len) {
        return Err(SafetensorsError::Truncated { len, file_len });
    }
    Ok(())
}

/// The one place where a tensor's size is computed.
fn check_entry(name: &str, entry: &Entry) -> Result<(), SafetensorsError> {
    let (start, end) = entry.data_offsets;
    let Some(bits) = dtype_bits(&entry.dtype) else {
        return Err(SafetensorsError::UnknownDtype { name: name.into(), dtype: entry.dtype.clone() });
    };
    let elements = entry.shape.0.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim));
    let bits = elements.and_then(|elements| elements.checked_mul(bits));
    match (bits, end.checked_sub(start)) {
        (Some(bits), Some(bytes)) if bits.is_multiple_of(8) && bits / 8 == bytes => Ok(()),
        _ => Err(SafetensorsError::Size {
            name: name.into(),
            dtype: entry.dtype.clone(),
            shape: entry.shape.0.clone(),
            start,
            end,
        }),
    }
}

fn dtype_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// At most eight dimensions, so that a header of many small numbers cannot grow in memory.
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dims;
        impl<'de> Visitor<'de> for Dims {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {DIMENSIONS_MAX} dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == DIMENSIONS_MAX {
                        return Err(A::Error::invalid_length(dims.len() + 1, &self));
                    }
                    dims.push(dim);
                }
                Ok(Shape(dims))
            }
        }
        deserializer.deserialize_seq(Dims)
    }
}

/// The object itself. `__metadata__` must be strings to strings, and is not kept: nothing reads it.
struct Entries(BTreeMap<String, Entry>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = BTreeMap::new();
                let mut metadata_seen = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        let _: StringMap = map.next_value()?;
                        if std::mem::replace(&mut metadata_seen, true) {
                            return Err(A::Error::custom("__metadata__ occurs twice"));
                        }
                        continue;
                    }
                    if entries.len() == TENSORS_MAX {
                        return Err(A::Error::custom(format!("more than {TENSORS_MAX} tensors")));
                    }
                    let entry: Entry = map.next_value()?;
                    if let Some(name) = insert_new(&mut entries, name, entry) {
                        return Err(A::Error::custom(format!("tensor {name:?} occurs twice")));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// Inserts, or gives the name back when it was there.
pub(crate) fn insert_new<V>(map: &mut BTreeMap<String, V>, name: String, value: V) -> Option<String> {
    match map.entry(name) {
        std::collections::btree_map::Entry::Vacant(entry) => {
            entry.insert(value);
            None
        }
        std::collections::btree_map::Entry::Occupied(entry) => Some(entry.key().clone()),
    }
}

/// Checked to be strings to strings, and dropped as it is read. `null` is what some writers leave.
struct StringMap;

impl<'de> Deserialize<'de> for StringMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = StringMap;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_unit<E>(self) -> Result<StringMap, E> {
                Ok(StringMap)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<StringMap, A::Error> {
                while map.next_entry::<String, String>()?.is_some() {}
                Ok(StringMap)
            }
        }
        deserializer.deserialize_any(Pairs)
    }
}
