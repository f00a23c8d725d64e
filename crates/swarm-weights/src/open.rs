//! From a path to the parts of a checkpoint: which format it is, which files, and their headers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use swarm_kernels::DType;

use crate::checkpoint::{Format, Parts};
use crate::config::{ConfigError, ModelConfig};
use crate::error::WeightsError;
use crate::gguf::{self, GgufHeader, GgufVocab, MetadataError, split};
use crate::hf;
use crate::layout::{self, RawTensor};
use crate::safetensors::SafetensorsHeader;
use crate::source::{Opener, Source, SourceError};
use crate::tokenizer::TokenizerFiles;

pub(crate) const CONFIG_FILE: &str = "config.json";
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
const ROPE_FACTORS: &str = "rope_freqs.weight";

pub(crate) fn parts(path: &Path, opener: &Opener<'_>) -> Result<Parts, WeightsError> {
    let open = |source| SourceError::Open { name: path.display().to_string(), source };
    if !std::fs::metadata(path).map_err(open)?.is_dir() {
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            return not_a_model(
                path,
                format!("one safetensors file lacks its {CONFIG_FILE}; give the folder"),
            );
        }
        return gguf_parts(path, opener);
    }
    if path.join(CONFIG_FILE).exists() {
        return folder_parts(path, opener);
    }
    match gguf_files(path).as_slice() {
        [only] => gguf_parts(only, opener),
        [] => not_a_model(path, format!("it has neither {CONFIG_FILE} nor a .gguf file")),
        several => not_a_model(path, format!("it has several .gguf files; name one of {}", listed(several))),
    }
}

fn not_a_model<T>(path: &Path, why: String) -> Result<T, WeightsError> {
    Err(WeightsError::NotAModel { path: path.to_owned(), why })
}

fn listed(files: &[PathBuf]) -> String {
    let names = files.iter().filter_map(|file| file.file_name()).map(|name| name.display().to_string());
    names.collect::<Vec<_>>().join(", ")
}

/// The `.gguf` files directly in `folder`, sorted, of a model over several files the first. An unreadable folder has
/// none.
pub(crate) fn gguf_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> =
        entries.map(|entry| entry.path()).filter(|path| is_gguf(path) && path.is_file()).collect();
    files.retain(|path| path.file_name().is_some_and(|name| split::leads(&name.to_string_lossy())));
    files.sort();
    files
}

pub(crate) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

fn gguf_parts(path: &Path, opener: &Opener<'_>) -> Result<Parts, WeightsError> {
    let file_name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let names = split::parts(&file_name);
    let mut raw = BTreeMap::new();
    let mut sources = Vec::new();
    let mut first = None;
    for (number, name) in names.iter().enumerate() {
        // A file of its own may have any name, also one that is no text.
        let source = if names.len() == 1 { opener(path)? } else { opener(&path.with_file_name(name))? };
        let header = GgufHeader::read(source.as_ref())?;
        check_part(source.name(), &header, number, names.len())?;
        gguf_tensors(source.name(), &header, number, &mut raw)?;
        sources.push(source);
        first.get_or_insert(header);
    }
    // There is at least one name.
    let (Some(header), Some(file)) = (first, sources.first().map(|source| source.name().to_owned())) else {
        return not_a_model(path, "it has no name".into());
    };
    let fail = |error| WeightsError::Gguf { file: file.clone(), source: error };
    let factors = raw.remove(ROPE_FACTORS).map(|info| rope_factors(&sources, &info)).transpose()?;
    let config = gguf::config_from(&header, &raw, factors).map_err(|error| match error {
        MetadataError::Gguf(error) => fail(error),
        MetadataError::Config(source) => WeightsError::Config { file: file.clone(), source },
    })?;
    let interleaved = header.string("general.architecture").map_err(fail)? == Some("llama");
    let tokenizer = match GgufVocab::read(&header).map_err(fail)? {
        Some(vocab) => TokenizerFiles::Gguf(Box::new(vocab)),
        None => TokenizerFiles::Missing { why: format!("there is no tokenizer.ggml.tokens in {file}") },
    };
    let eos_token_ids = gguf::eos_token_ids(&header).map_err(fail)?;
    Ok(Parts {
        name: split::stem(&file_name).to_owned(),
        format: Format::Gguf,
        config,
        sources,
        raw,
        interleaved,
        tokenizer,
        eos_token_ids,
    })
}

/// A file of several says itself which one it is.
fn check_part(file: &str, header: &GgufHeader, number: usize, count: usize) -> Result<(), WeightsError> {
    let fail = |source| WeightsError::Gguf { file: file.to_owned(), source };
    let said = header.unsigned("split.count").map_err(fail)?.unwrap_or(1).max(1);
    let place = header.unsigned("split.no").map_err(fail)?.unwrap_or(0);
    // Tools before the numbers were written into the files wrote them into the names only.
    let unsaid = said == 1 && place == 0;
    if (said, place) == (count as u64, number as u64) || (unsaid && count > 1) {
        return Ok(());
    }
    let why = format!(
        "it says that it is part {} of {said}; parts are recognized by names that end in -00001-of-{said:05}.gguf and so on",
        place.saturating_add(1)
    );
    Err(WeightsError::File { file: file.to_owned(), why })
}

/// Adds the tensors of one file to those of the model.
fn gguf_tensors(
    file: &str,
    header: &GgufHeader,
    number: usize,
    raw: &mut BTreeMap<String, RawTensor>,
) -> Result<(), WeightsError> {
    for (stored_name, tensor) in &header.tensors {
        let shape = tensor.dims.iter().rev().copied().collect();
        let found = RawTensor {
            stored_name: stored_name.clone(),
            dtype: Ok(tensor.dtype),
            shape,
            source: number,
            offset: tensor.offset,
            bytes: tensor.bytes,
        };
        // Two stored names may mean one tensor, for example blk.0.attn_q.weight and its HF spelling.
        if raw.insert(gguf::hf_name(stored_name), found).is_some() {
            let source = gguf::GgufError::Duplicate { what: "tensor", name: stored_name.clone() };
            return Err(WeightsError::Gguf { file: file.to_owned(), source });
        }
    }
    Ok(())
}

/// Reads `rope_freqs.weight`: one f32 per frequency.
fn rope_factors(sources: &[Arc<dyn Source>], info: &RawTensor) -> Result<Vec<f32>, WeightsError> {
    /// More than any head has frequencies; the exact count is checked with the configuration.
    const FACTORS_MAX: u64 = 1 << 12;
    let name = || info.stored_name.clone();
    match &info.dtype {
        Ok(DType::F32) => {}
        other => {
            let dtype = other.as_ref().map_or_else(Clone::clone, |dtype| dtype.name().to_owned());
            return Err(WeightsError::Dtype { name: name(), dtype, hint: "; F32 is" });
        }
    }
    if info.bytes > 4 * FACTORS_MAX {
        return Err(WeightsError::Shape { name: name(), want: vec![FACTORS_MAX], got: info.shape.clone() });
    }
    let mut bytes = vec![0; info.bytes as usize];
    let source = sources
        .get(info.source)
        .ok_or_else(|| WeightsError::NoSuchTensor { model: String::new(), name: name() })?;
    source.read_at(info.offset, &mut bytes)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect())
}

fn folder_parts(folder: &Path, opener: &Opener<'_>) -> Result<Parts, WeightsError> {
    let config_path = folder.join(CONFIG_FILE);
    let json = read_json(&config_path)?.unwrap_or_default();
    let file = config_path.display().to_string();
    let config = hf::config_from(&json).map_err(|source| WeightsError::Config { file, source })?;
    let (sources, mut raw) = safetensors(folder, opener)?;
    // A tied pair is stored once, and not always under the embedding's name.
    if config.tie_word_embeddings
        && !raw.contains_key(layout::EMBED)
        && let Some(head) = raw.remove(layout::HEAD)
    {
        raw.insert(layout::EMBED.to_owned(), head);
    }
    Ok(Parts {
        name: folder_name(folder),
        format: Format::Safetensors,
        eos_token_ids: eos_token_ids(folder, &json, &config)?,
        config,
        sources,
        raw,
        interleaved: false,
        tokenizer: hf::read_tokenizer(folder)?,
    })
}

fn read_json(path: &Path) -> Result<Option<Value>, WeightsError> {
    let Some(bytes) = hf::read_optional(path, hf::CONFIG_BYTES_MAX)? else { return Ok(None) };
    let file = path.display().to_string();
    serde_json::from_slice(&bytes).map(Some).map_err(|source| WeightsError::Json { file, source })
}

/// The generation defaults come first: they are what transformers stops at. Ids the vocabulary does
/// not have can never be produced and are left out.
fn eos_token_ids(folder: &Path, config: &Value, model: &ModelConfig) -> Result<Vec<u32>, WeightsError> {
    let generation_path = folder.join("generation_config.json");
    let generation = read_json(&generation_path)?;
    let mut ids = Vec::new();
    let files = [(generation_path, generation.as_ref()), (folder.join(CONFIG_FILE), Some(config))];
    for (path, json) in files {
        let Some(json) = json else { continue };
        let read = || -> Result<Vec<u32>, ConfigError> {
            hf::token_ids(hf::Object::new("the file", json)?, "eos_token_id")
        };
        let found =
            read().map_err(|source| WeightsError::Config { file: path.display().to_string(), source })?;
        for id in found {
            if !ids.contains(&id) && (id as usize) < model.vocab_size {
                ids.push(id);
            }
        }
    }
    Ok(ids)
}

type Safetensors = (Vec<Arc<dyn Source>>, BTreeMap<String, RawTensor>);

/// The single file if it is there, as transformers chooses, else the files of the index.
fn safetensors(folder: &Path, opener: &Opener<'_>) -> Result<Safetensors, WeightsError> {
    let single = folder.join(SINGLE_FILE);
    if single.exists() {
        let source = opener(&single)?;
        let header = SafetensorsHeader::read(source.as_ref())?;
        let raw = header.tensors.into_iter().map(|(name, tensor)| raw_tensor(name, tensor, 0)).collect();
        return Ok((vec![source], raw));
    }
    let index_path = folder.join(INDEX_FILE);
    let Some(index) = hf::read_index(&index_path)? else {
        return not_a_model(folder, no_weights(folder));
    };
    let mut shards: Vec<&String> = index.values().collect();
    shards.sort_unstable();
    shards.dedup();
    let mut sources = Vec::new();
    let mut headers = BTreeMap::new();
    for (number, shard) in shards.into_iter().enumerate() {
        let source = opener(&folder.join(shard))?;
        headers.insert(shard.as_str(), (number, SafetensorsHeader::read(source.as_ref())?));
        sources.push(source);
    }
    let mut raw = BTreeMap::new();
    for (name, shard) in &index {
        let entry = headers.get_mut(shard.as_str()).and_then(|(number, header)| {
            header.tensors.remove(name).map(|tensor| raw_tensor(name.clone(), tensor, *number))
        });
        let Some((name, tensor)) = entry else {
            let why = format!("it says that {name} is in {shard}, which does not have it");
            return Err(WeightsError::File { file: index_path.display().to_string(), why });
        };
        raw.insert(name, tensor);
    }
    Ok((sources, raw))
}

fn raw_tensor(name: String, tensor: crate::safetensors::SafeTensor, source: usize) -> (String, RawTensor) {
    let dtype = match tensor.dtype.as_str() {
        "F32" => Ok(DType::F32),
        "F16" => Ok(DType::F16),
        "BF16" => Ok(DType::BF16),
        _ => Err(tensor.dtype),
    };
    let (shape, offset, bytes) = (tensor.shape, tensor.offset, tensor.bytes);
    (name.clone(), RawTensor { stored_name: name, dtype, shape, source, offset, bytes })
}

fn no_weights(folder: &Path) -> String {
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"];
    match pickled.iter().find(|name| folder.join(name).exists()) {
        Some(name) => {
            format!("its weights are pickled ({name}), which is not read; convert them to safetensors")
        }
        None => format!("it has neither {SINGLE_FILE} nor {INDEX_FILE}"),
    }
}

/// `org/name` for a snapshot of the Hugging Face cache or a folder of the store, else the folder's own name.
pub(crate) fn folder_name(folder: &Path) -> String {
    let full = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    commit_of(&full).map_or_else(|| part(Some(&full)), |(id, _)| id)
}

fn part(path: Option<&Path>) -> String {
    path.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Repository and commit of a folder: `models--org--name/snapshots/COMMIT` of the Hugging Face cache,
/// `models--org--name/COMMIT` of the store.
pub(crate) fn commit_of(folder: &Path) -> Option<(String, String)> {
    let above = folder.parent();
    let repo = if part(above) == "snapshots" { above.and_then(Path::parent) } else { above };
    let id = part(repo).strip_prefix("models--")?.replacen("--", "/", 1);
    let commit = part(Some(folder));
    crate::hub::is_commit(&commit).then_some((id, commit))
}
