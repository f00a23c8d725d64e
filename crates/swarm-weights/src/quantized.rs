//! Weights that were quantized once, on disk: the next start reads them in place of the originals.
//!
//! ```text
//! CACHE/quantized/ID/model.json               which model this is; its time says when it was used last
//!                   /TENSOR.blocks            rows of blocks, digests, footer
//! ```
//!
//! The id is [`Checkpoint::held_fingerprint`]. A tensor has a file of its own, so that every node keeps what its own layers
//! need. A file is written under another name and appears when it is whole; each piece of it has a blake3 digest and is
//! held against it when it is read. One that does not match, or does not fit the model, is made anew.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::error::WeightsError;
use crate::layout::TensorInfo;
use crate::source::{FileSource, Source};
use crate::store::Store;

const FOLDER: &str = "quantized";
const ABOUT: &str = "model.json";
const EXTENSION: &str = "blocks";
/// Of files that are being written.
const UNFINISHED: &str = "unfinished";
const MAGIC: &[u8; 8] = b"swarmqz1";
const FOOTER: usize = 8 + 3 * 8 + 8;
const DIGEST: usize = 32;
/// A piece is read at once.
const PIECE_BYTES_MAX: usize = 64 << 20;

/// Why quantized weights could not be kept. They are in memory all the same.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizedError {
    #[error(
        "the disk is full: these layers take {need} bytes in that form in {path}, of which {there} are there and are used; free the rest, or choose another folder with SWARM_OS_CACHE"
    )]
    DiskFull { path: PathBuf, need: u64, there: u64 },
    #[error("cannot {what} {path}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

fn failed(what: &'static str, path: &Path, need: u64) -> impl FnOnce(io::Error) -> QuantizedError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            QuantizedError::DiskFull { path, need, there: 0 }
        }
        _ => QuantizedError::Io { what, path, source },
    }
}

/// The quantized weights of one model on this computer.
#[derive(Debug)]
pub struct QuantizedStore {
    folder: PathBuf,
    /// New ones are kept.
    keeps: bool,
    trouble: Mutex<Option<QuantizedError>>,
    /// Bytes of all files that were found here or begun, and of those that are whole: a full disk is told with all that is
    /// needed, since whoever frees what one tensor needs finds it full again at the next.
    need: AtomicU64,
    there: AtomicU64,
}

/// What `model.json` says, for people and for the list.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    model: String,
    quant: String,
}

impl QuantizedStore {
    /// The place of `checkpoint` in this user's cache; `None` for a model that is not quantized while it is loaded. What
    /// is there is used; with `keeps`, what is not comes there.
    ///
    /// # Errors
    /// As [`Checkpoint::held_fingerprint`].
    pub fn of_user(checkpoint: &Checkpoint, keeps: bool) -> Result<Option<Self>, WeightsError> {
        Self::open(Store::of_user().root(), checkpoint, keeps)
    }

    /// The same in another cache.
    ///
    /// # Errors
    /// As [`Checkpoint::held_fingerprint`].
    pub fn open(cache: &Path, checkpoint: &Checkpoint, keeps: bool) -> Result<Option<Self>, WeightsError> {
        let Some(quant) = checkpoint.quant() else { return Ok(None) };
        let id = blake3::Hash::from(checkpoint.held_fingerprint()?).to_hex();
        let folder = cache.join(FOLDER).join(id.get(..32).unwrap_or_default());
        let (need, there) = (AtomicU64::new(0), AtomicU64::new(0));
        let store = Self { folder, keeps, trouble: Mutex::default(), need, there };
        let about = About { model: checkpoint.name().to_owned(), quant: quant.name().to_owned() };
        if let Err(error) = store.note_use(&about) {
            store.complain(error);
        }
        Ok(Some(store))
    }

    /// Writes `model.json`, where there is, or is to be, something.
    fn note_use(&self, about: &About) -> Result<(), QuantizedError> {
        if self.keeps {
            fs::create_dir_all(&self.folder).map_err(failed("make the folder", &self.folder, 0))?;
        } else if !self.folder.exists() {
            return Ok(());
        }
        let (json, path) = (serde_json::to_vec_pretty(about).unwrap_or_default(), self.folder.join(ABOUT));
        fs::write(&path, &json).map_err(failed("write", &path, json.len() as u64))
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What kept weights from being kept, told once.
    pub fn trouble(&self) -> Option<QuantizedError> {
        match lock(&self.trouble).take()? {
            QuantizedError::DiskFull { need, .. } => Some(QuantizedError::DiskFull {
                path: self.folder.clone(),
                need: need.max(self.need.load(Ordering::Relaxed)),
                there: self.there.load(Ordering::Relaxed),
            }),
            other => Some(other),
        }
    }

    /// Counts a tensor that was found here and is used.
    pub fn note_found(&self, found: &QuantizedRows) {
        let bytes = found.shape.file_bytes().unwrap_or_default();
        self.need.fetch_add(bytes, Ordering::Relaxed);
        self.there.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Nothing more is kept; the first reason is told.
    fn complain(&self, error: QuantizedError) {
        lock(&self.trouble).get_or_insert(error);
    }

    fn path(&self, info: &TensorInfo) -> PathBuf {
        self.folder.join(format!("{}.{EXTENSION}", info.name))
    }

    /// The blocks of a tensor, if they are here and fit it.
    pub fn find(&self, info: &TensorInfo) -> Option<QuantizedRows> {
        QuantizedRows::open(&self.path(info), info)
    }

    /// A file for the blocks of a tensor, which come in pieces of `piece_rows`; `None` where none are to be kept.
    pub fn begin(self: &Arc<Self>, info: &TensorInfo, piece_rows: usize) -> Option<QuantizedWriter> {
        if !self.keeps {
            return None;
        }
        let bytes = Shape::new(info, piece_rows).and_then(|shape| shape.file_bytes());
        self.need.fetch_add(bytes.unwrap_or_default(), Ordering::Relaxed);
        if lock(&self.trouble).is_some() {
            return None;
        }
        let made = QuantizedWriter::new(self.clone(), info, piece_rows);
        made.map_err(|error| self.complain(error)).ok()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a tensor's blocks lie in their file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    rows: usize,
    row_bytes: usize,
    piece_rows: usize,
}

impl Shape {
    /// `None` for what no writer makes.
    fn new(info: &TensorInfo, piece_rows: usize) -> Option<Self> {
        let row_bytes = info.held.row_bytes(info.cols)?;
        let fits = piece_rows > 0 && piece_rows.checked_mul(row_bytes)? <= PIECE_BYTES_MAX;
        fits.then_some(Self { rows: info.rows, row_bytes, piece_rows })
    }

    fn pieces(&self) -> usize {
        self.rows.div_ceil(self.piece_rows)
    }

    fn data_bytes(&self) -> Option<usize> {
        self.rows.checked_mul(self.row_bytes)
    }

    /// Data, digests, footer.
    fn file_bytes(&self) -> Option<u64> {
        let digests = self.pieces().checked_mul(DIGEST)?;
        Some(self.data_bytes()?.checked_add(digests)?.checked_add(FOOTER)? as u64)
    }

    fn footer(&self, info: &TensorInfo) -> [u8; FOOTER] {
        let mut footer = [0; FOOTER];
        let numbers = [info.rows, info.cols, self.piece_rows].map(|number| (number as u64).to_le_bytes());
        let name = info.held.name().as_bytes();
        let parts = MAGIC.iter().chain(numbers.as_flattened()).chain(name);
        footer.iter_mut().zip(parts).for_each(|(place, byte)| *place = *byte);
        footer
    }

    /// Which piece `rows` are, if they are one.
    fn piece(&self, rows: &Range<usize>) -> Option<usize> {
        let whole = rows.start.is_multiple_of(self.piece_rows)
            && rows.end == rows.start.saturating_add(self.piece_rows).min(self.rows);
        whole.then(|| rows.start / self.piece_rows)
    }
}

/// A tensor's blocks on disk.
pub struct QuantizedRows {
    source: FileSource,
    shape: Shape,
    digests: Vec<[u8; DIGEST]>,
}

impl QuantizedRows {
    fn open(path: &Path, info: &TensorInfo) -> Option<Self> {
        let source = FileSource::open(path).ok()?;
        let mut footer = [0; FOOTER];
        source.read_at(source.len().checked_sub(FOOTER as u64)?, &mut footer).ok()?;
        let piece_rows = u64::from_le_bytes(*footer.get(24..32)?.first_chunk()?);
        let shape = Shape::new(info, usize::try_from(piece_rows).ok()?)?;
        if footer != shape.footer(info) || shape.file_bytes()? != source.len() {
            return None;
        }
        // Their number is bounded by the length of the file.
        let mut digests = vec![[0; DIGEST]; shape.pieces()];
        source.read_at(shape.data_bytes()? as u64, digests.as_flattened_mut()).ok()?;
        Some(Self { source, shape, digests })
    }

    /// Rows that [`QuantizedRows::read`] takes at once.
    pub fn piece_rows(&self) -> usize {
        self.shape.piece_rows
    }

    /// Reads one piece and holds it against its digest. False when it does not match, is no piece, or cannot be read:
    /// then it has to be made anew, and the file goes.
    pub fn read(&self, rows: Range<usize>, out: &mut [u8]) -> bool {
        let is_it = self.verified(&rows, out).is_some();
        if !is_it {
            tracing::warn!("{} is damaged and is made anew", self.source.name());
            // Somebody else may have removed it already.
            drop(fs::remove_file(self.source.name()));
        }
        is_it
    }

    fn verified(&self, rows: &Range<usize>, out: &mut [u8]) -> Option<()> {
        let digest = self.digests.get(self.shape.piece(rows)?)?;
        let at = rows.start.checked_mul(self.shape.row_bytes)?;
        self.source.read_at(at as u64, out).ok()?;
        (blake3::hash(out) == *digest).then_some(())
    }
}

/// A file that is being written, by any threads in any order. It appears with its last piece, and goes if that does not
/// come.
pub struct QuantizedWriter {
    store: Arc<QuantizedStore>,
    path: PathBuf,
    unfinished: PathBuf,
    shape: Shape,
    footer: [u8; FOOTER],
    state: Mutex<Writing>,
}

struct Writing {
    /// `None` after the end.
    file: Option<File>,
    digests: Vec<[u8; DIGEST]>,
    missing: usize,
}

/// So that two writers of one process have two files.
static WRITERS: AtomicU64 = AtomicU64::new(0);

impl QuantizedWriter {
    fn new(store: Arc<QuantizedStore>, info: &TensorInfo, piece_rows: usize) -> Result<Self, QuantizedError> {
        let path = store.path(info);
        let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
        let shape = Shape::new(info, piece_rows).ok_or_else(wrong).map_err(failed("lay out", &path, 0))?;
        let bytes = shape.file_bytes().ok_or_else(wrong).map_err(failed("lay out", &path, 0))?;
        let number = WRITERS.fetch_add(1, Ordering::Relaxed);
        let unfinished = path.with_extension(format!("{}-{number}.{UNFINISHED}", std::process::id()));
        let file = File::create(&unfinished).map_err(failed("write", &unfinished, bytes))?;
        let state =
            Writing { file: Some(file), digests: vec![[0; DIGEST]; shape.pieces()], missing: shape.pieces() };
        let footer = shape.footer(info);
        Ok(Self { store, path, unfinished, shape, footer, state: Mutex::new(state) })
    }

    /// Writes one piece. What goes wrong is told by [`QuantizedStore::trouble`]; the file goes then.
    pub fn write(&self, rows: Range<usize>, blocks: &[u8]) {
        let digest = *blake3::hash(blocks).as_bytes();
        let mut state = lock(&self.state);
        if let Err(source) = self.put(&mut state, &rows, blocks, digest) {
            state.file = None;
            drop(fs::remove_file(&self.unfinished));
            let need = self.shape.file_bytes().unwrap_or_default();
            self.store.complain(failed("write", &self.path, need)(source));
        }
    }

    fn put(
        &self,
        state: &mut Writing,
        rows: &Range<usize>,
        blocks: &[u8],
        digest: [u8; DIGEST],
    ) -> io::Result<()> {
        let Writing { file, digests, missing } = state;
        let Some(open) = file else { return Ok(()) };
        let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
        let piece = self.shape.piece(rows).ok_or_else(wrong)?;
        let at = rows.start.checked_mul(self.shape.row_bytes).ok_or_else(wrong)?;
        open.seek(SeekFrom::Start(at as u64))?;
        open.write_all(blocks)?;
        *digests.get_mut(piece).ok_or_else(wrong)? = digest;
        *missing = missing.saturating_sub(1);
        if *missing == 0 {
            open.seek(SeekFrom::Start(self.shape.data_bytes().ok_or_else(wrong)? as u64))?;
            open.write_all(digests.as_flattened())?;
            open.write_all(&self.footer)?;
            *file = None;
            fs::rename(&self.unfinished, &self.path)?;
            self.store.there.fetch_add(self.shape.file_bytes().unwrap_or_default(), Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Drop for QuantizedWriter {
    fn drop(&mut self) {
        if lock(&self.state).file.take().is_some() {
            drop(fs::remove_file(&self.unfinished));
        }
    }
}

/// One model's quantized weights.
#[derive(Clone, Debug)]
pub struct QuantizedEntry {
    pub model: String,
    pub quant: String,
    pub path: PathBuf,
    pub bytes: u64,
    pub last_used: SystemTime,
}

/// What is in a cache, least recently used first.
pub fn entries(cache: &Path) -> Vec<QuantizedEntry> {
    let inside = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    let entry = |folder: fs::DirEntry| {
        let about = folder.path().join(ABOUT);
        let last_used = fs::metadata(&about).and_then(|about| about.modified()).ok()?;
        let About { model, quant } = serde_json::from_slice(&fs::read(&about).ok()?).ok()?;
        let files = inside(&folder.path()).filter_map(|file| file.metadata().ok());
        let bytes = files.map(|file| file.len()).sum();
        Some(QuantizedEntry { model, quant, path: folder.path(), bytes, last_used })
    };
    let mut entries: Vec<_> = inside(&cache.join(FOLDER)).filter_map(entry).collect();
    entries.sort_by_key(|entry| entry.last_used);
    entries
}

/// Removes entries, least recently used first, until `keep` bytes or fewer are left; gives those that went. A stage that
/// is being loaded goes on: what it does not find any more it makes from the originals.
///
/// # Errors
/// [`QuantizedError`] when one cannot be removed.
pub fn prune(cache: &Path, keep: u64) -> Result<Vec<QuantizedEntry>, QuantizedError> {
    let entries = entries(cache);
    let mut bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
    let mut removed = Vec::new();
    for entry in entries {
        if bytes <= keep {
            break;
        }
        fs::remove_dir_all(&entry.path).map_err(failed("remove", &entry.path, 0))?;
        bytes = bytes.saturating_sub(entry.bytes);
        removed.push(entry);
    }
    Ok(removed)
}
