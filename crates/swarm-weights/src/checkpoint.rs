//! An opened model: headers parsed and held against the configuration, no weight read yet.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use swarm_kernels::{DType, Quant};

use crate::config::ModelConfig;
use crate::error::WeightsError;
use crate::fingerprint;
use crate::layout::{self, RawTensor, TensorInfo};
use crate::open;
use crate::source::{Opener, Source};
use crate::store::{self, FetchControl, Folder, Store, StoreError, StoredFile};
use crate::tokenizer::TokenizerFiles;

/// File format of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Gguf,
    Safetensors,
}

impl Format {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gguf => "gguf",
            Self::Safetensors => "safetensors",
        }
    }
}

/// One tensor's bytes, rows in the order Hugging Face checkpoints have them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub dtype: DType,
    /// 1 for vectors.
    pub rows: usize,
    pub cols: usize,
    /// `rows` rows of `dtype.row_bytes(cols)` bytes each, little-endian.
    pub bytes: Vec<u8>,
}

/// A model on disk, opened: its configuration, its tensor list, its tokenizer's files. The list is
/// complete and every shape is right, so that a stage that starts to load will not find a hole.
pub struct Checkpoint {
    path: PathBuf,
    name: String,
    format: Format,
    config: ModelConfig,
    sources: Vec<Arc<dyn Source>>,
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
    tokenizer: TokenizerFiles,
    eos_token_ids: Vec<u32>,
    fingerprint: OnceLock<[u8; 32]>,
    origin: Option<Origin>,
    pub(crate) quant: Option<Quant>,
}

/// Which published model it is: two of one origin have the same bytes, whoever holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// `organisation/name`.
    pub id: String,
    pub commit: String,
    /// The GGUF file of the repository; `None` for `config.json` and safetensors.
    pub file: Option<String>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("path", &self.path)
            .field("format", &self.format)
            .field("config", &self.config)
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

/// What the two formats' readers hand over.
pub(crate) struct Parts {
    pub name: String,
    pub format: Format,
    pub config: ModelConfig,
    pub sources: Vec<Arc<dyn Source>>,
    /// By Hugging Face name.
    pub raw: BTreeMap<String, RawTensor>,
    /// `q_proj` and `k_proj` are stored with RoPE pairs next to each other.
    pub interleaved: bool,
    pub tokenizer: TokenizerFiles,
    pub eos_token_ids: Vec<u32>,
}

impl Checkpoint {
    /// Opens a folder with `config.json` and safetensors (single or indexed), a folder with one
    /// `.gguf` file, or a `.gguf` file, the first of several where a model has several. Reads headers and small files
    /// only. What [`crate::cache::resolve`] made of a repository's name opens as any other; bytes that are not here
    /// are fetched as they are read, or before by [`Checkpoint::fetch`].
    ///
    /// # Errors
    /// [`WeightsError`], naming the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        Self::open_with(path, &|path| Store::of_user().open_file(path))
    }

    /// [`Checkpoint::open`] with another way to open the weight files, such as
    /// [`crate::MmapSource::opener`].
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with(path: &Path, opener: &Opener<'_>) -> Result<Self, WeightsError> {
        let checkpoint = Self::assemble(path, open::parts(path, opener)?)?;
        if let Some(told) = std::path::absolute(path).ok().and_then(|path| Folder::fingerprint_of(&path)) {
            // Whoever handed the files over said so; of a few tensors no sample could be taken.
            let _first = checkpoint.fingerprint.set(told);
        }
        Ok(Self { origin: Origin::of(path, checkpoint.format), ..checkpoint })
    }

    fn assemble(path: &Path, parts: Parts) -> Result<Self, WeightsError> {
        let Parts { name, format, config, sources, mut raw, interleaved, tokenizer, eos_token_ids } = parts;
        let layers = config.layers().flat_map(|layer| layout::layer(&config, layer));
        let ends = [layout::embed(&config), layout::norm(&config)].into_iter().chain(layout::head(&config));
        let mut tensors = BTreeMap::new();
        for want in ends.chain(layers) {
            let mut info = want.take(&mut raw, &name)?;
            info.interleaved = interleaved && is_rotated(&info.name);
            tensors.insert(info.name.clone(), info);
        }
        if let Some(extra) = raw.values().find(|extra| !is_ignorable(extra, &config, &raw)) {
            let family = config.family.name();
            return Err(WeightsError::UnexpectedTensor {
                model: name,
                name: extra.stored_name.clone(),
                family,
            });
        }
        Ok(Self {
            path: path.to_owned(),
            name,
            format,
            config,
            sources,
            tensors,
            tokenizer,
            eos_token_ids,
            fingerprint: OnceLock::new(),
            origin: None,
            quant: None,
        })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A name for people: the repository for a snapshot of the Hugging Face cache, else the folder's or
    /// the file's own name. Not escaped.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The names of the files that hold the weights: paths, for files.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().map(|source| source.name())
    }

    pub(crate) fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    /// Which published model it is, if that is known.
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// Some of its files may have holes: it came from a repository, and not whole.
    pub fn is_partial(&self) -> bool {
        self.sources.iter().any(|source| source.stored().is_some())
    }

    /// Stored bytes of the tensors of a stage, each once.
    pub fn stage_bytes(&self, layers: Range<usize>) -> u64 {
        self.stage_tensors(layers).iter().map(|info| info.bytes).sum()
    }

    /// Bytes that a stage of `layers` needs and that are not on this computer.
    pub fn missing_bytes(&self, layers: Range<usize>) -> u64 {
        let wanted = self.stored_ranges(layers);
        wanted.iter().map(|(file, ranges)| store::ranges_bytes(&file.missing(ranges))).sum()
    }

    /// The layers that are on this computer whole, as ranges, first ones first.
    pub fn held_layers(&self) -> Vec<Range<usize>> {
        let mut held: Vec<Range<usize>> = Vec::new();
        for layer in self.config.layers() {
            let wants = layout::layer(&self.config, layer);
            let infos = wants.iter().filter_map(|want| self.tensors.get(&want.name));
            if infos.into_iter().any(|info| !self.is_here(info)) {
                continue;
            }
            match held.last_mut() {
                Some(range) if range.end == layer => range.end += 1,
                _ => held.push(layer..layer + 1),
            }
        }
        held
    }

    /// A tensor is on this computer whole.
    pub fn holds(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|info| self.is_here(info))
    }

    fn is_here(&self, info: &TensorInfo) -> bool {
        let wanted = Range { start: info.offset, end: info.offset.saturating_add(info.bytes) };
        let file = self.sources.get(info.source).and_then(|source| source.stored());
        file.is_none_or(|file| file.missing(std::slice::from_ref(&wanted)).is_empty())
    }

    /// Fetches what a stage of `layers` needs and what is not here, several requests at once. Nothing to do for a model
    /// whose files are all here.
    ///
    /// # Errors
    /// [`StoreError`]. What came stays, and the next call goes on from there.
    pub fn fetch(&self, layers: Range<usize>, control: &mut FetchControl<'_>) -> Result<(), StoreError> {
        store::fetch_all(&self.stored_ranges(layers), control)
    }

    /// The ranges of a stage in each file that may have holes.
    fn stored_ranges(&self, layers: Range<usize>) -> Vec<(&StoredFile, Vec<Range<u64>>)> {
        let mut wanted: BTreeMap<usize, Vec<Range<u64>>> = BTreeMap::new();
        for info in self.stage_tensors(layers) {
            wanted.entry(info.source).or_default().push(info.offset..info.offset.saturating_add(info.bytes));
        }
        let file = |(index, ranges): (usize, _)| Some((self.sources.get(index)?.stored()?, ranges));
        wanted.into_iter().filter_map(file).collect()
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn tokenizer(&self) -> &TokenizerFiles {
        &self.tokenizer
    }

    /// The tokens that end an answer, as the configuration and the generation defaults name them.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        self.eos_token_ids.clone()
    }

    /// `name` in Hugging Face spelling.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Every tensor the model uses, in order of name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// What a stage of `layers` reads: its layers' tensors in the order the forward pass uses them;
    /// before them the embedding, if the stage has the first layer; after them the final norm and the
    /// head, if it has the last one (the embedding, when tied; listed once if both ends are here).
    pub fn stage_tensors(&self, layers: Range<usize>) -> Vec<&TensorInfo> {
        let mut names = Vec::new();
        let is_first = layers.contains(&0);
        let is_tail = self.config.num_hidden_layers.checked_sub(1).is_some_and(|last| layers.contains(&last));
        if is_first {
            names.push(layout::EMBED.to_owned());
        }
        for layer in layers {
            names.extend(layout::layer(&self.config, layer).into_iter().map(|want| want.name));
        }
        if is_tail {
            names.push(layout::NORM.to_owned());
            if !self.config.tie_word_embeddings {
                names.push(layout::HEAD.to_owned());
            } else if !is_first {
                names.push(layout::EMBED.to_owned());
            }
        }
        names.iter().filter_map(|name| self.tensors.get(name)).collect()
    }

    /// Stored bytes of one layer's tensors, 0 for a layer that does not exist.
    pub fn layer_bytes(&self, layer: usize) -> u64 {
        let wants = layout::layer(&self.config, layer);
        wants.iter().filter_map(|want| self.tensors.get(&want.name)).map(|info| info.bytes).sum()
    }

    /// Stored bytes of the embedding.
    pub fn embed_bytes(&self) -> u64 {
        self.bytes_of(layout::EMBED)
    }

    /// Stored bytes of the final norm and the head; a tied head counts as the embedding, which a tail
    /// that is not also the first stage has to hold.
    pub fn head_bytes(&self) -> u64 {
        let head = if self.config.tie_word_embeddings { layout::EMBED } else { layout::HEAD };
        self.bytes_of(layout::NORM) + self.bytes_of(head)
    }

    /// Stored bytes of all tensors, each once.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.values().map(|info| info.bytes).sum()
    }

    fn bytes_of(&self, name: &str) -> u64 {
        self.tensors.get(name).map_or(0, |info| info.bytes)
    }

    /// Reads one tensor: its bytes and no others, in one read. `q_proj` and `k_proj` of GGUF `llama`
    /// files, whose rows are stored for interleaved RoPE, come back in the half-split order.
    ///
    /// # Errors
    /// [`WeightsError::NoSuchTensor`], [`WeightsError::OutOfMemory`], [`WeightsError::Source`].
    pub fn read(&self, name: &str) -> Result<Tensor, WeightsError> {
        let info = self.tensors.get(name).ok_or_else(|| self.no_such_tensor(name))?;
        let out_of_memory = || WeightsError::OutOfMemory { name: info.name.clone(), bytes: info.bytes };
        let len = usize::try_from(info.bytes).map_err(|_| out_of_memory())?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len).map_err(|_| out_of_memory())?;
        bytes.resize(len, 0);
        self.read_rows(info, 0..info.rows, &mut bytes)?;
        Ok(Tensor { dtype: info.dtype, rows: info.rows, cols: info.cols, bytes })
    }

    /// How many rows of a tensor belong together: [`Checkpoint::read_rows`] reads whole multiples. 1, but a head
    /// where rows are stored for interleaved RoPE.
    pub fn row_unit(&self, info: &TensorInfo) -> usize {
        if info.interleaved && info.rows > 1 { self.config.head_dim } else { 1 }
    }

    /// Reads consecutive rows of one of this checkpoint's tensors, in one read, in the order of
    /// [`Checkpoint::read`]. `out` has room for exactly their stored bytes.
    ///
    /// # Errors
    /// [`WeightsError::Rows`] when `rows` or `out` do not fit the tensor, [`WeightsError::Source`].
    pub fn read_rows(
        &self,
        info: &TensorInfo,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), WeightsError> {
        let unit = self.row_unit(info);
        let wrong = || WeightsError::Rows { name: info.name.clone(), rows: rows.clone(), bytes: out.len() };
        let row_bytes = info.dtype.row_bytes(info.cols).ok_or_else(wrong)?;
        let fits = rows.start <= rows.end
            && rows.end <= info.rows
            && rows.start.is_multiple_of(unit)
            && rows.end.is_multiple_of(unit)
            && row_bytes.checked_mul(rows.len()) == Some(out.len());
        if !fits {
            return Err(wrong());
        }
        self.read_range(info, (rows.start as u64).saturating_mul(row_bytes as u64), out)?;
        if info.interleaved {
            // The rows of a matrix, the elements of a bias.
            let rows = if info.rows == 1 { info.cols } else { rows.len() };
            let heads = rows / self.config.head_dim; // shapes were checked: a whole number
            split_halves(out, heads, self.config.head_dim, self.config.rope.rotary_dim);
        }
        Ok(())
    }

    /// A tensor's rows to look up one at a time, from the file.
    ///
    /// # Errors
    /// [`WeightsError::NoSuchTensor`], also for one whose rows are not stored as they are used.
    pub fn rows(&self, name: &str) -> Result<TensorRows, WeightsError> {
        let info = self.tensors.get(name).filter(|info| !info.interleaved);
        let info = info.ok_or_else(|| self.no_such_tensor(name))?;
        let source = self.sources.get(info.source).ok_or_else(|| self.no_such_tensor(name))?;
        let row_bytes = info.dtype.row_bytes(info.cols).ok_or_else(|| self.no_such_tensor(name))?;
        Ok(TensorRows { source: source.clone(), info: info.clone(), row_bytes })
    }

    fn no_such_tensor(&self, name: &str) -> WeightsError {
        WeightsError::NoSuchTensor { model: self.name.clone(), name: name.to_owned() }
    }

    /// Fills `out` with the stored bytes of `info` from `offset` on.
    fn read_range(&self, info: &TensorInfo, offset: u64, out: &mut [u8]) -> Result<(), WeightsError> {
        let missing = || self.no_such_tensor(&info.name);
        let source = self.sources.get(info.source).ok_or_else(missing)?;
        let start = info.offset.checked_add(offset).ok_or_else(missing)?;
        Ok(source.read_at(start, out)?)
    }

    /// A hash of the configuration and of every tensor's name, type, shape, first and last 4 KiB.
    ///
    /// Two checkpoints with equal fingerprints are the same model for practical purposes: it tells
    /// another model, another fine-tune, another quantization or a wrong file apart, at the price of
    /// reading 8 KiB per tensor once. It is not a digest of all bytes: a flipped bit in the middle of a
    /// tensor goes unseen. The tokenizer is not part of it.
    ///
    /// A model that is here in part has [`Checkpoint::origin_fingerprint`] instead: no byte is fetched for it.
    ///
    /// # Errors
    /// [`WeightsError::Source`].
    pub fn fingerprint(&self) -> Result<[u8; 32], WeightsError> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(*known);
        }
        if let Some(hash) = self.origin_fingerprint()
            && self.is_partial()
        {
            return Ok(*self.fingerprint.get_or_init(|| hash));
        }
        let tensors = self.tensors.values();
        let hash =
            fingerprint::of(&self.config, tensors, |info, offset, out| self.read_range(info, offset, out))?;
        Ok(*self.fingerprint.get_or_init(|| hash))
    }
}

impl Checkpoint {
    /// A hash of where the model comes from, to the commit, of its configuration and its tensor list. `None` for files
    /// that nobody knows the origin of.
    pub fn origin_fingerprint(&self) -> Option<[u8; 32]> {
        let Origin { id, commit, file } = self.origin.as_ref()?;
        let parts = [id.as_str(), commit.as_str(), file.as_deref().unwrap_or_default()];
        Some(fingerprint::of_origin(parts, &self.config, self.tensors.values()))
    }

    /// Whether this is the model that somebody else's fingerprint is of, by content or by origin.
    ///
    /// # Errors
    /// [`WeightsError::Source`].
    pub fn is_model(&self, fingerprint: &[u8; 32]) -> Result<bool, WeightsError> {
        Ok(self.origin_fingerprint().as_ref() == Some(fingerprint) || self.fingerprint()? == *fingerprint)
    }
}

impl Origin {
    /// Read from where the files are: in the store, or in a snapshot of the Hugging Face cache.
    pub(crate) fn of(path: &Path, format: Format) -> Option<Self> {
        let full = std::path::absolute(path).ok()?;
        let folder = match Folder::around(&full) {
            Some(folder) => folder,
            None if full.is_dir() => &full,
            None => full.parent()?,
        };
        let (id, commit) = open::commit_of(folder)?;
        let file = match format {
            Format::Safetensors => None,
            // A folder with one file is that file.
            Format::Gguf if full.is_dir() => {
                let files = open::gguf_files(&full);
                Some(files.first()?.file_name()?.to_str()?.to_owned())
            }
            Format::Gguf => Some(full.strip_prefix(folder).ok()?.to_str()?.replace('\\', "/")),
        };
        Some(Self { id, commit, file })
    }
}

/// Rows of one tensor, read from the file when they are wanted: an embedding that is only looked up in takes no
/// memory, but for what the operating system keeps of the file. The file stays open; it must not be written to.
#[derive(Clone)]
pub struct TensorRows {
    source: Arc<dyn Source>,
    info: TensorInfo,
    row_bytes: usize,
}

impl TensorRows {
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// Bytes of one row as stored.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Reads row `row`, as stored, into `out` of [`TensorRows::row_bytes`]. One read of the file.
    ///
    /// # Errors
    /// [`WeightsError::Rows`] when there is no such row or `out` has another length, [`WeightsError::Source`].
    pub fn read(&self, row: usize, out: &mut [u8]) -> Result<(), WeightsError> {
        let (row_bytes, at) = (self.row_bytes as u64, row as u64);
        let offset = at.checked_mul(row_bytes).and_then(|start| start.checked_add(self.info.offset));
        match offset {
            Some(offset) if row < self.info.rows && out.len() == self.row_bytes => {
                Ok(self.source.read_at(offset, out)?)
            }
            _ => {
                let rows = row..row.saturating_add(1);
                Err(WeightsError::Rows { name: self.info.name.clone(), rows, bytes: out.len() })
            }
        }
    }
}

fn is_rotated(name: &str) -> bool {
    name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj.")
}

/// Tensors that some writers add and no forward pass reads.
fn is_ignorable(extra: &RawTensor, config: &ModelConfig, raw: &BTreeMap<String, RawTensor>) -> bool {
    let name = extra.stored_name.as_str();
    let stored_frequencies =
        name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".attn_rot_embd.weight");
    // A tied model's head is its embedding, whatever else the file holds.
    let unused_head = config.tie_word_embeddings && raw.contains_key(layout::HEAD) && name == layout::HEAD;
    stored_frequencies || unused_head
}

/// Undoes the row order of GGUF `llama` files, head by head: rows `2i` and `2i + 1` go to `i` and
/// `i + rotary_dim / 2`; rows from `rotary_dim` on stay. A row is `bytes.len() / (heads * head_dim)`
/// bytes and moves whole, so this works on quantized rows as on floats.
fn split_halves(bytes: &mut [u8], heads: usize, head_dim: usize, rotary_dim: usize) {
    let rows = heads * head_dim;
    if rows == 0 || rotary_dim > head_dim {
        return;
    }
    let row_bytes = bytes.len() / rows;
    let half = rotary_dim / 2;
    if row_bytes == 0 || half == 0 {
        return;
    }
    let mut rotated = vec![0; rotary_dim * row_bytes];
    for head in bytes.chunks_exact_mut(head_dim * row_bytes) {
        let (stored, _) = head.split_at_mut(rotated.len());
        let (first, second) = rotated.split_at_mut(half * row_bytes);
        let pairs = stored.chunks_exact(2 * row_bytes);
        let halves = first.chunks_exact_mut(row_bytes).zip(second.chunks_exact_mut(row_bytes));
        for (pair, (first, second)) in pairs.zip(halves) {
            let (even, odd) = pair.split_at(row_bytes);
            first.copy_from_slice(even);
            second.copy_from_slice(odd);
        }
        stored.copy_from_slice(&rotated);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the GGUF converter does to `q_proj` and `k_proj`.
    fn interleave(rows: &[Vec<u8>], head_dim: usize, rotary_dim: usize) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        for head in rows.chunks(head_dim) {
            for i in 0..rotary_dim / 2 {
                out.push(head[i].clone());
                out.push(head[i + rotary_dim / 2].clone());
            }
            out.extend_from_slice(&head[rotary_dim..]);
        }
        out
    }

    proptest! {
        #[test]
        fn rows_come_back_in_the_half_split_order(
            heads in 1_usize..5, half in 1_usize..9, rotary_half in 1_usize..9, row_bytes in 1_usize..40,
        ) {
            let (head_dim, rotary_dim) = (2 * half, 2 * rotary_half.min(half));
            let rows: Vec<Vec<u8>> = (0..heads * head_dim).map(|row| vec![row as u8; row_bytes]).collect();
            let mut bytes = interleave(&rows, head_dim, rotary_dim).concat();
            split_halves(&mut bytes, heads, head_dim, rotary_dim);
            prop_assert_eq!(bytes, rows.concat());
        }
    }
}
