//! Bytes from other nodes: asked for before the Hub is, and held against their digests as they come.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::fetch::{FetchControl, FetchProgress, FetchSource};
use super::file::{StoredFile, Writer, ranges_path};
use super::folder::{Folder, Repo, write_whole};
use super::manifest::Record;
use super::{GENERATION_FILE, Store, StoreError, TOKENIZER_FILES, pieces};
use crate::checkpoint::{Checkpoint, Origin};
use crate::hub::{Listed, ModelRef, is_commit, is_file_name};
use crate::open::{CONFIG_FILE, INDEX_FILE};
use crate::share::{SHARED_SMALL_BYTES_MAX, SharedFile};
use crate::unit::{self, Unit};

/// Most pieces in one ask, and most bytes.
const ASK_PIECES_MAX: usize = 256;
const ASK_BYTES_MAX: u64 = 4 << 20;
/// The same where the other node fetches them on the way, several requests at once.
const THROUGH_BYTES_MAX: u64 = 16 << 20;
/// A supplier that sent so many pieces which are not what their digests say is not asked again.
const CORRUPT_MAX: u32 = 3;
/// Models of no repository that others handed over, below the folder of the store.
const HANDED: &str = "handed";

/// Pieces of one file, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SupplyAsk {
    /// The file's name in the model's list.
    pub file: String,
    pub pieces: Vec<Range<u64>>,
}

/// What a supplier says while it brings pieces.
#[derive(Debug)]
pub enum Brought<'a> {
    /// A piece of ask number `ask`, and the digest that its bytes are to have.
    Piece { ask: usize, range: Range<u64>, digest: [u8; 32], bytes: &'a [u8] },
    /// It is still there.
    Nothing,
}

/// Takes what comes; false ends it.
pub type Take<'a> = dyn FnMut(Brought<'_>) -> bool + 'a;

/// Another node that may have bytes of a model. Nothing it says is believed but digests, which are the coordinator's or
/// were agreed with it.
pub trait Supplier: Send + Sync {
    /// What to call it in messages, safe to print.
    fn name(&self) -> &str;

    /// What may be taken of it, unit by unit: each must hash to what was agreed before any of it counts. None: everything,
    /// because its word on digests is the coordinator's own.
    fn units(&self) -> Option<&[Unit]> {
        None
    }

    /// Asks for the pieces of all asks, in order; `take` is given those that the other node has. With `through`, it
    /// fetches the others from the Hub on the way.
    ///
    /// # Errors
    /// When it is gone, or broke the protocol.
    fn bring(
        &self,
        asks: &[SupplyAsk],
        through: bool,
        take: &mut Take<'_>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// A model as another node describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Catalogue {
    /// For people.
    pub name: String,
    /// Which published model it is.
    pub origin: Option<Origin>,
    pub fingerprint: [u8; 32],
    /// The machine that says so: what it hands over of files of its own is kept apart from what others do.
    pub from: [u8; 32],
    pub files: Vec<SharedFile>,
}

/// A model whose bytes another node supplies, as long as this value lives.
pub struct Adopted {
    /// What [`crate::Checkpoint::open`] takes.
    pub path: PathBuf,
    folder: Arc<Folder>,
    supplier: Arc<dyn Supplier>,
}

impl Drop for Adopted {
    fn drop(&mut self) {
        self.folder.detach(&self.supplier);
    }
}

impl Catalogue {
    /// Holds every name against what may become part of a path here.
    fn check(&self) -> Result<(), StoreError> {
        let refused =
            |why: String| Err(StoreError::NotAModel { id: self.name.escape_debug().to_string(), why });
        for file in &self.files {
            let known = match file.small {
                true => [CONFIG_FILE, GENERATION_FILE, INDEX_FILE]
                    .iter()
                    .chain(&TOKENIZER_FILES)
                    .any(|name| *name == file.name),
                false => file.name.ends_with(".safetensors") || file.name.ends_with(".gguf"),
            };
            if !known || !is_file_name(&file.name) {
                return refused(format!("a file of it is called {:?}", file.name));
            }
            if file.small && file.bytes > SHARED_SMALL_BYTES_MAX {
                return refused(format!("{} has {} bytes", file.name, file.bytes));
            }
        }
        match &self.origin {
            Some(origin) if !is_commit(&origin.commit) || !is_id(&origin.id) => {
                refused("it names no repository at a commit".into())
            }
            _ => Ok(()),
        }
    }

    /// Where it is kept, below the store, and under which commit. Of files of somebody's own, the name is made of the
    /// digest and of who handed them over.
    fn place(&self) -> (PathBuf, String) {
        if let Some(origin) = &self.origin {
            return (PathBuf::from(ModelRef::folder(&origin.id)), origin.commit.clone());
        }
        let both = blake3::hash(&[self.fingerprint, self.from].concat());
        (PathBuf::from(HANDED), both.to_hex().chars().take(40).collect())
    }

    fn repo(&self, commit: String) -> Repo {
        let listed =
            |file: &SharedFile| (file.name.clone(), Listed { size: Some(file.bytes), tag: file.tag.clone() });
        Repo {
            id: self
                .origin
                .as_ref()
                .map_or_else(|| self.name.escape_debug().to_string(), |origin| origin.id.clone()),
            commit,
            files: self.files.iter().map(listed).collect(),
            partial: self.origin.is_some(),
            fingerprint: self
                .origin
                .is_none()
                .then(|| blake3::Hash::from_bytes(self.fingerprint).to_hex().to_string()),
        }
    }
}

fn is_id(id: &str) -> bool {
    ModelRef::parse(id).is_some_and(|model| model.id == id)
}

impl Store {
    /// Makes a model ready to be opened that `supplier` describes: its small files are fetched, and room is made for its
    /// weights, which come from the supplier before the Hub is asked.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn adopt(&self, model: &Catalogue, supplier: Arc<dyn Supplier>) -> Result<Adopted, StoreError> {
        model.check()?;
        let (place, commit) = model.place();
        let path = self.root().join(place).join(&commit);
        let folder = match Folder::read(&path) {
            Ok(_) => self.folder(&path)?,
            Err(_) => self.remember(Folder::found(&path, &model.repo(commit), self.client.clone())?),
        };
        let adopted = |path| Adopted { path, folder: folder.clone(), supplier: supplier.clone() };
        let _writing = folder.write_lock(&AtomicBool::new(false), &mut || {})?;
        for file in &model.files {
            let path = folder.path.join(&file.name);
            if file.small {
                if !path.is_file() {
                    write_whole(&path, &small(&*supplier, file)?)?;
                }
            } else if !(path.is_file() && (ranges_path(&path).is_file() || path.is_symlink())) {
                StoredFile::make(&path, file.bytes)?;
            }
        }
        folder.attach(supplier.clone());
        let is_folder = model.files.iter().any(|file| file.name == CONFIG_FILE);
        let first = model.files.iter().find(|file| !file.small);
        Ok(match first {
            Some(first) if !is_folder => adopted(folder.path.join(&first.name)),
            _ => adopted(folder.path.clone()),
        })
    }
}

impl Store {
    /// What the store has of a model: a published one, or one that `from` handed over. Asks nobody, and to look is not to
    /// use.
    pub fn held(&self, origin: Option<&Origin>, fingerprint: [u8; 32], from: [u8; 32]) -> Option<Checkpoint> {
        let origin = origin.cloned();
        let wanted = Catalogue { name: String::new(), origin, fingerprint, from, files: Vec::new() };
        wanted.check().ok()?;
        let (place, commit) = wanted.place();
        let entry = super::entry(&self.root().join(place).join(commit))?;
        let is_it = |model: &Checkpoint| wanted.origin.is_none() || model.origin() == wanted.origin.as_ref();
        self.models(&entry).into_iter().find(is_it)
    }
}

impl Store {
    /// Whether the machine `of` may hear of an entry: of one that another machine handed over it may not.
    pub fn may_name(&self, entry: &super::StoreEntry, of: [u8; 32]) -> bool {
        let Some(fingerprint) = Folder::fingerprint_of(&entry.path) else { return true };
        let theirs =
            Catalogue { name: String::new(), origin: None, fingerprint, from: of, files: Vec::new() };
        let (place, commit) = theirs.place();
        entry.path == self.root().join(place).join(commit)
    }
}

/// A small file, whole.
fn small(supplier: &dyn Supplier, file: &SharedFile) -> Result<Vec<u8>, StoreError> {
    let asks = asks_of(&file.name, &pieces::cut(std::slice::from_ref(&(0..file.bytes))));
    let mut whole = Vec::new();
    let brought = supplier.bring(&asks, false, &mut |brought| {
        if let Brought::Piece { range, digest, bytes, .. } = brought {
            let sound = range.start == whole.len() as u64 && *blake3::hash(bytes).as_bytes() == digest;
            if sound {
                whole.extend_from_slice(bytes);
            }
            return sound;
        }
        true
    });
    let node = supplier.name().to_owned();
    brought.map_err(|source| StoreError::Supply { node: node.clone(), source })?;
    if whole.len() as u64 == file.bytes {
        Ok(whole)
    } else {
        Err(StoreError::NotSupplied { file: file.name.clone(), bytes: file.bytes - whole.len() as u64 })
    }
}

/// Cuts pieces into asks.
fn asks_of(file: &str, pieces: &[Range<u64>]) -> Vec<SupplyAsk> {
    asks_within(file, pieces, ASK_BYTES_MAX)
}

fn asks_within(file: &str, pieces: &[Range<u64>], bytes_max: u64) -> Vec<SupplyAsk> {
    let mut asks: Vec<SupplyAsk> = Vec::new();
    for piece in pieces {
        if let Some(ask) = asks.last_mut()
            && ask.pieces.len() < ASK_PIECES_MAX
            && ask.pieces.first().is_some_and(|first| piece.end.saturating_sub(first.start) <= bytes_max)
        {
            ask.pieces.push(piece.clone());
            continue;
        }
        asks.push(SupplyAsk { file: file.to_owned(), pieces: vec![piece.clone()] });
    }
    asks
}

/// Fetches from `supplier` what it has of what is missing. Only a disk that fails or an abort is an error: whatever a
/// supplier does, the rest is to be had elsewhere.
pub(super) fn from_supplier(
    supplier: &dyn Supplier,
    writers: &[(Writer<'_>, &Vec<Range<u64>>)],
    through: bool,
    control: &mut FetchControl<'_>,
) -> Result<(), StoreError> {
    let (mut asks, mut to) = (Vec::new(), Vec::new());
    for (writer, wanted) in writers {
        let missing = pieces::cut(&writer.stored.missing(wanted));
        let bytes_max = if through { THROUGH_BYTES_MAX } else { ASK_BYTES_MAX };
        let more = asks_within(&writer.stored.remote.path, &missing, bytes_max);
        to.extend(std::iter::repeat_n(writer, more.len()));
        asks.extend(more);
    }
    if asks.is_empty() {
        return Ok(());
    }
    let bytes_total = asks.iter().map(|ask| pieces::bytes(&ask.pieces)).sum();
    let mut progress = FetchProgress { bytes_done: 0, bytes_total, from: FetchSource::Peer };
    let (mut failed, mut corrupt) = (None, 0);
    let brought = supplier.bring(&asks, through, &mut |brought| {
        if control.abort.load(Ordering::Relaxed) {
            failed = Some(StoreError::Aborted);
            return false;
        }
        if let Brought::Piece { ask, range, digest, bytes } = brought {
            let len = range.end.saturating_sub(range.start);
            let sound = bytes.len() as u64 == len && *blake3::hash(bytes).as_bytes() == digest;
            if let (true, Some(writer)) = (sound, to.get(ask)) {
                if let Err(error) = writer.put_checked(Record::known(range.start, bytes, digest), bytes) {
                    failed = Some(error.needing(bytes_total.saturating_sub(progress.bytes_done)));
                    return false;
                }
                progress.bytes_done = progress.bytes_done.saturating_add(len);
            } else {
                corrupt += 1;
                tracing::warn!(
                    "{} sent bytes that are not what their digest says; they are refused",
                    supplier.name()
                );
            }
        }
        (control.progress)(progress);
        corrupt < CORRUPT_MAX
    });
    if let Some(error) = failed {
        return Err(error);
    }
    if let Err(error) = brought {
        tracing::warn!("{} supplies no more bytes: {error}", supplier.name());
    }
    Ok(())
}

/// Fetches those units from `supplier` that lack anything and may be taken of it. What does not hash to what was agreed
/// stays unlisted, and then no more is asked of it. Errors as [`from_supplier`].
pub(super) fn units_from_supplier(
    supplier: &dyn Supplier,
    units: &[Unit],
    writers: &[(Writer<'_>, &Vec<Range<u64>>)],
    control: &mut FetchControl<'_>,
) -> Result<(), StoreError> {
    let wanted: Vec<Parts<'_>> = units.iter().filter_map(|unit| Parts::of(unit, writers)).collect();
    let bytes_total = wanted.iter().map(Parts::missing_bytes).sum();
    let mut progress = FetchProgress { bytes_done: 0, bytes_total, from: FetchSource::Peer };
    for parts in wanted {
        let (asks, to) = parts.asks();
        let (mut failed, mut fresh) = (None, BTreeMap::new());
        let brought = supplier.bring(&asks, false, &mut |brought| {
            if control.abort.load(Ordering::Relaxed) {
                failed = Some(StoreError::Aborted);
                return false;
            }
            if let Brought::Piece { ask, range, digest, bytes } = brought
                && *blake3::hash(bytes).as_bytes() == digest
                && let Some((part, writer)) = to.get(ask)
            {
                if let Err(error) = writer.write(range.start, bytes) {
                    failed = Some(error);
                    return false;
                }
                progress.bytes_done = progress.bytes_done.saturating_add(bytes.len() as u64);
                fresh.insert((*part, range.start), Record::known(range.start, bytes, digest));
            }
            (control.progress)(progress);
            true
        });
        if let Some(error) = failed {
            return Err(error);
        }
        if parts.root(&fresh) != Some(parts.unit.root) {
            let why = brought
                .err()
                .map_or_else(|| "it is not what was agreed".to_owned(), |error| error.to_string());
            tracing::warn!("{} supplies no more bytes: {why}", supplier.name());
            return Ok(());
        }
        for ((part, _), record) in fresh {
            if let Some((writer, _)) = parts.places.get(part) {
                writer.list(record)?;
            }
        }
    }
    Ok(())
}

/// A unit and where its tensors go.
struct Parts<'a> {
    unit: &'a Unit,
    /// For each tensor: the writer of its file, and its range.
    places: Vec<(&'a Writer<'a>, Range<u64>)>,
}

impl<'a> Parts<'a> {
    /// `None` when nothing of it is missing, or not all of it belongs to files that are fetched.
    fn of(unit: &'a Unit, writers: &'a [(Writer<'a>, &Vec<Range<u64>>)]) -> Option<Self> {
        let place = |(file, range): &(String, Range<u64>)| {
            let (writer, _) = writers
                .iter()
                .find(|(writer, wanted)| writer.stored.remote.path == *file && wanted.contains(range))?;
            Some((writer, range.clone()))
        };
        let places: Option<Vec<_>> = unit.parts.iter().map(place).collect();
        let parts = Self { unit, places: places? };
        (parts.missing_bytes() > 0).then_some(parts)
    }

    fn missing(writer: &Writer<'_>, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut pieces = pieces::cut(std::slice::from_ref(range));
        pieces.retain(|piece| writer.stored.digest(piece).is_none());
        pieces
    }

    fn missing_bytes(&self) -> u64 {
        self.places.iter().map(|(writer, range)| pieces::bytes(&Self::missing(writer, range))).sum()
    }

    /// What to ask for, and for each ask the tensor it belongs to.
    fn asks(&self) -> (Vec<SupplyAsk>, Vec<(usize, &'a Writer<'a>)>) {
        let (mut asks, mut to) = (Vec::new(), Vec::new());
        for (part, (writer, range)) in self.places.iter().enumerate() {
            let more = asks_of(&writer.stored.remote.path, &Self::missing(writer, range));
            to.extend(std::iter::repeat_n((part, *writer), more.len()));
            asks.extend(more);
        }
        (asks, to)
    }

    /// What the unit hashes to with what came; `None` while a piece is not there.
    fn root(&self, fresh: &BTreeMap<(usize, u64), Record>) -> Option<[u8; 32]> {
        let mut digests = Vec::new();
        for (part, (writer, range)) in self.places.iter().enumerate() {
            for piece in pieces::cut(std::slice::from_ref(range)) {
                let came = fresh.get(&(part, piece.start)).map(|record| record.hash);
                digests.push(came.or_else(|| writer.stored.digest(&piece))?);
            }
        }
        Some(unit::root(digests.into_iter()))
    }
}

/// Passes pieces on that lenders have or fetch. `None` when there is no lender.
pub(super) fn through(
    suppliers: &[Arc<dyn Supplier>],
    file: &StoredFile,
    wanted: &[Range<u64>],
    each: &mut dyn FnMut(&Range<u64>, &[u8]) -> bool,
) -> Option<Result<(), StoreError>> {
    let lender = suppliers.iter().find(|supplier| supplier.units().is_none())?;
    let asks = asks_within(&file.remote.path, wanted, THROUGH_BYTES_MAX);
    let brought = lender.bring(&asks, true, &mut |brought| match brought {
        Brought::Piece { range, digest, bytes, .. } => {
            *blake3::hash(bytes).as_bytes() == digest && each(&range, bytes)
        }
        Brought::Nothing => true,
    });
    Some(brought.map_err(|source| StoreError::Supply { node: lender.name().to_owned(), source }))
}

/// One piece that is held already and damaged here; only the same bytes will do.
pub(super) fn again_from(suppliers: &[Arc<dyn Supplier>], file: &str, record: &Record) -> Option<Vec<u8>> {
    let range = record.offset..record.end();
    let asks = [SupplyAsk { file: file.to_owned(), pieces: vec![range] }];
    suppliers.iter().find_map(|supplier| {
        let mut found = None;
        let brought = supplier.bring(&asks, false, &mut |brought| {
            if let Brought::Piece { bytes, .. } = brought {
                found = (Record::new(record.offset, bytes) == *record).then(|| bytes.to_vec());
            }
            true
        });
        brought.ok().and(found)
    })
}
