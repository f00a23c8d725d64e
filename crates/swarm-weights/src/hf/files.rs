//! Small files beside the weights, read whole under a limit.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::SMALL_BYTES_MAX;
use crate::error::WeightsError;
use crate::safetensors::{TENSORS_MAX, insert_new};
use crate::source::SourceError;
use crate::tokenizer::TokenizerFiles;

/// The largest published are 30 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// The whole file, `None` when there is none.
pub(crate) fn read_optional(path: &Path, max: u64) -> Result<Option<Vec<u8>>, WeightsError> {
    let name = path.display().to_string();
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(SourceError::Open { name, source }.into()),
    };
    if !metadata.is_file() {
        return Err(SourceError::NotAFile { name }.into());
    }
    if metadata.len() > max {
        let why = format!("it has {} bytes, more than the {max} that are accepted", metadata.len());
        return Err(WeightsError::File { file: name, why });
    }
    let mut bytes = Vec::new();
    let len = metadata.len();
    let fail = |source| SourceError::Read { name: name.clone(), offset: 0, len, source };
    let file = File::open(path).map_err(|source| SourceError::Open { name: name.clone(), source })?;
    file.take(max).read_to_end(&mut bytes).map_err(fail)?;
    Ok(Some(bytes))
}

/// `model.safetensors.index.json`: which file holds which tensor.
pub(crate) fn read_index(path: &Path) -> Result<Option<BTreeMap<String, String>>, WeightsError> {
    let Some(bytes) = read_optional(path, INDEX_BYTES_MAX)? else { return Ok(None) };
    let file = path.display().to_string();
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|source| WeightsError::Json { file: file.clone(), source })?;
    for shard in index.weight_map.0.values() {
        // A name with a path in it could reach any file of this computer.
        let plain = Path::new(shard).file_name().is_some_and(|name| name == shard.as_str());
        if !plain || shard.contains(['/', '\\', ':']) || !shard.ends_with(".safetensors") {
            let why = format!("weight_map names {shard:?}, which is not a plain .safetensors file name");
            return Err(WeightsError::File { file, why });
        }
    }
    Ok(Some(index.weight_map.0))
}

#[derive(Deserialize)]
struct Index {
    weight_map: WeightMap,
}

struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = WeightMap;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor names and file names")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((name, file)) = map.next_entry::<String, String>()? {
                    if out.len() == TENSORS_MAX {
                        return Err(A::Error::custom(format!("more than {TENSORS_MAX} tensors")));
                    }
                    if let Some(name) = insert_new(&mut out, name, file) {
                        return Err(A::Error::custom(format!("tensor {name:?} occurs twice")));
                    }
                }
                Ok(WeightMap(out))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// The tokenizer's files in `folder`, unparsed.
pub(crate) fn read_tokenizer(folder: &Path) -> Result<TokenizerFiles, WeightsError> {
    let small = |name: &str| read_optional(&folder.join(name), SMALL_BYTES_MAX);
    let Some(tokenizer_json) = read_optional(&folder.join("tokenizer.json"), TOKENIZER_BYTES_MAX)? else {
        let other = if folder.join("tokenizer.model").exists() {
            "; its tokenizer.model must be converted to tokenizer.json first"
        } else {
            ""
        };
        let why = format!("there is no tokenizer.json in {}{other}", folder.display());
        return Ok(TokenizerFiles::Missing { why });
    };
    Ok(TokenizerFiles::Hf {
        tokenizer_json,
        tokenizer_config: small("tokenizer_config.json")?,
        chat_template: chat_template(folder)?,
        special_tokens_map: small("special_tokens_map.json")?,
        generation_config: small("generation_config.json")?,
    })
}

/// `chat_template.jinja`, else the older `chat_template.json`. A template inside
/// `tokenizer_config.json` comes after both, and is left there.
fn chat_template(folder: &Path) -> Result<Option<String>, WeightsError> {
    let jinja = folder.join("chat_template.jinja");
    if let Some(bytes) = read_optional(&jinja, SMALL_BYTES_MAX)? {
        return String::from_utf8(bytes).map(Some).map_err(|_| WeightsError::File {
            file: jinja.display().to_string(),
            why: "it is not UTF-8".into(),
        });
    }
    let json = folder.join("chat_template.json");
    let Some(bytes) = read_optional(&json, SMALL_BYTES_MAX)? else { return Ok(None) };
    let value: serde_json::Value = serde_json::from_slice(&bytes)
        .map_err(|source| WeightsError::Json { file: json.display().to_string(), source })?;
    Ok(value.get("chat_template").and_then(serde_json::Value::as_str).map(str::to_owned))
}
