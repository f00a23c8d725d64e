//! The swarm's own cache: of every model the bytes that were needed here, and no others.
//!
//! ```text
//! models--org--name/refs/main          the commit that a revision was when it was last looked up
//! models--org--name/COMMIT/repo.json   what the repository holds
//!                         /config.json, tokenizer.json, ...            small files, whole
//!                         /model.safetensors, model.safetensors.ranges a file with holes, and what is in it
//! ```
//!
//! A file is as long as the original, so that offsets stay what they are; its list names every piece that is there with
//! its blake3 digest. A piece is held against the digest before it is used for the first time in a process, and fetched
//! again when it does not match. Bytes are written before their record, so a crash costs the pieces that were under way.
//! Complete files of the Hugging Face cache are linked to and never written.

mod choose;
mod error;
mod fetch;
mod file;
mod folder;
mod manifest;
mod pieces;
mod supply;

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

pub use error::StoreError;
pub use fetch::{FetchControl, FetchProgress, FetchSource};
pub(crate) use fetch::{all as fetch_all, through as fetch_through};
pub(crate) use file::{StoredFile, ranges_path};
pub(crate) use folder::{Folder, write_whole};
pub use pieces::PIECE_BYTES;
pub(crate) use pieces::{bytes as ranges_bytes, cut};
pub use supply::{Adopted, Brought, Catalogue, Supplier, SupplyAsk, Take};

use crate::cache::Places;
use crate::checkpoint::Checkpoint;
use crate::hub::{HubClient, HubError, HubSettings, ModelRef, is_commit};
use crate::open::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE};
use crate::source::{FileSource, Source, SourceError};
use choose::Choice;

/// The largest published tokenizers are 30 MB, indices of sharded checkpoints some megabytes.
const SMALL_BYTES_MAX: u64 = 256 << 20;
pub(crate) const TOKENIZER_FILES: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];
pub(crate) const GENERATION_FILE: &str = "generation_config.json";
const COMMIT_BYTES_MAX: u64 = 256;
const NUMBER_FILE: &str = "number";

/// Whether the tokenizer's files are fetched as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    Everything,
    /// A stage computes without a tokenizer.
    WeightsOnly,
}

/// One model of the store.
#[derive(Clone, Debug)]
pub struct StoreEntry {
    /// `organisation/name`.
    pub id: String,
    pub commit: String,
    pub path: PathBuf,
    /// The weight files that are here in part or whole, relative to `path`.
    pub files: Vec<String>,
    /// Bytes of weights and small files on disk.
    pub bytes: u64,
    /// Bytes that the weight files would have in all.
    pub bytes_total: u64,
    pub last_used: SystemTime,
}

/// What [`Store::prune`] did.
#[derive(Clone, Debug, Default)]
pub struct Pruned {
    pub removed: Vec<StoreEntry>,
    /// Would have been removed, but are in use.
    pub in_use: Vec<StoreEntry>,
    /// Bytes that are left.
    pub bytes: u64,
}

/// The cache and the Hub behind it.
pub struct Store {
    root: PathBuf,
    /// The Hugging Face cache.
    snapshots: PathBuf,
    pub(crate) client: Arc<HubClient>,
    /// Folders that were opened, so that all files of one share a hold on it.
    open: Mutex<Vec<std::sync::Weak<Folder>>>,
}

impl Store {
    pub fn new(root: PathBuf, snapshots: PathBuf, settings: HubSettings) -> Self {
        Self { root, snapshots, client: Arc::new(HubClient::new(settings)), open: Mutex::default() }
    }

    /// The store of this user, as the environment says. One for the process: what was learned of the Hub is shared.
    pub fn of_user() -> &'static Arc<Self> {
        static STORE: OnceLock<Arc<Store>> = OnceLock::new();
        STORE.get_or_init(|| {
            let env = |key: &str| std::env::var_os(key);
            let places = Places::from_env(&env);
            let settings = HubSettings::from_env(&env, &places.hf_home);
            Arc::new(Self::new(places.store, places.hub, settings))
        })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether the Hub may be asked.
    pub fn is_offline(&self) -> bool {
        self.client.settings().offline
    }

    /// The Hub may not be asked, or could not be reached a moment ago.
    pub fn is_lost(&self) -> bool {
        self.client.is_lost()
    }

    /// Makes `model` ready to be opened at the path that is returned: looks its revision up, fetches its small files, and
    /// makes room for its weights, of which nothing is fetched yet.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn resolve(&self, model: &ModelRef, needs: Needs) -> Result<PathBuf, StoreError> {
        self.look_up(model, needs, false)
    }

    /// [`Store::resolve`] for who has `others` to ask: then a Hub that cannot be reached is asked once.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn look_up(&self, model: &ModelRef, needs: Needs, others: bool) -> Result<PathBuf, StoreError> {
        let folder = self.folder_of(model, others)?;
        let _writing = folder.write_lock(&AtomicBool::new(false), &mut || {})?;
        let snapshot =
            self.snapshots.join(ModelRef::folder(&model.id)).join("snapshots").join(folder.commit());
        match choose::choose(model, &folder.repo.files)? {
            Choice::Gguf(parts) => {
                parts.iter().try_for_each(|part| self.room_for(&folder, part, &snapshot))?;
                Ok(parts.first().map_or_else(|| folder.path.clone(), |first| folder.path.join(first)))
            }
            Choice::Folder => {
                let small = |name: &str| folder.small(name, SMALL_BYTES_MAX, Some(&snapshot));
                small(CONFIG_FILE)?;
                small(GENERATION_FILE)?;
                if needs == Needs::Everything {
                    TOKENIZER_FILES.iter().try_for_each(|name| small(name).map(drop))?;
                }
                if folder.repo.files.contains_key(SINGLE_FILE) {
                    self.room_for(&folder, SINGLE_FILE, &snapshot)?;
                    return Ok(folder.path.clone());
                }
                small(INDEX_FILE)?;
                let index = crate::hf::read_index(&folder.path.join(INDEX_FILE));
                let not_a_model = |why| StoreError::NotAModel { id: model.id.clone(), why };
                let index = index.map_err(|error| not_a_model(error.to_string()))?.unwrap_or_default();
                let mut shards: Vec<&String> = index.values().collect();
                shards.sort_unstable();
                shards.dedup();
                if let Some(absent) = shards.iter().find(|shard| !folder.repo.files.contains_key(**shard)) {
                    return Err(not_a_model(format!("its index names {absent}, which it does not have")));
                }
                shards.into_iter().try_for_each(|shard| self.room_for(&folder, shard, &snapshot))?;
                Ok(folder.path.clone())
            }
        }
    }

    /// A file with holes for a weight file, or a link to a complete one.
    fn room_for(&self, folder: &Folder, name: &str, snapshot: &Path) -> Result<(), StoreError> {
        let path = folder.path.join(name);
        if path.is_file() && (ranges_path(&path).is_file() || path.is_symlink()) {
            return Ok(());
        }
        let remote = folder.remote(name);
        let size = match remote.size {
            Some(size) => size,
            None => self.client.size(&remote)?,
        };
        let complete = snapshot.join(name);
        let is_whole = fs::metadata(&complete).is_ok_and(|found| found.is_file() && found.len() == size);
        if is_whole && link(&complete, &path).is_ok() {
            return Ok(());
        }
        StoredFile::make(&path, size)
    }

    /// The folder of the commit that `model` means now.
    fn folder_of(&self, model: &ModelRef, others: bool) -> Result<Arc<Folder>, StoreError> {
        let repo = self.root.join(ModelRef::folder(&model.id));
        let revision = model.revision.as_deref().unwrap_or("main");
        let here = Folder::read(&repo.join(revision)).ok().filter(|_| is_commit(revision));
        if here.is_some_and(|here| !here.partial || self.is_offline()) {
            return self.folder(&repo.join(revision));
        }
        let name = self.revision_file(&model.id, revision);
        let listing = match self.client.listing(&model.id, revision, others) {
            Ok(listing) => listing,
            Err(error) if error.is_unreachable() => {
                // What another node told of a commit will do where the Hub does not say more.
                let known = remembered(&name).or_else(|| is_commit(revision).then(|| revision.to_owned()));
                let known = known.filter(|commit| Folder::read(&repo.join(commit)).is_ok());
                let Some(commit) = known else { return Err(error.into()) };
                if !matches!(error, HubError::Offline { .. }) {
                    tracing::warn!("{error}; the version that was fetched last is used");
                }
                return self.folder(&repo.join(commit));
            }
            Err(error) => return Err(error.into()),
        };
        let path = repo.join(&listing.commit);
        if let Some(open) = self.opened(&path).filter(|open| !open.repo.partial) {
            return Ok(open);
        }
        let folder = Folder::make(&path, &model.id, &listing, self.client.clone())?;
        folder::write_whole(&name, listing.commit.as_bytes())?;
        Ok(self.remember(folder))
    }

    /// Notes which commit another node said that `model` is, where the Hub never told.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn note_commit(&self, model: &ModelRef, commit: &str) -> Result<(), StoreError> {
        let revision = model.revision.as_deref().unwrap_or("main");
        let name = self.revision_file(&model.id, revision);
        if is_commit(revision) || !is_commit(commit) || name.exists() {
            return Ok(());
        }
        folder::write_whole(&name, commit.as_bytes())
    }

    /// Where it is kept which commit a revision is.
    fn revision_file(&self, id: &str, revision: &str) -> PathBuf {
        self.root.join(ModelRef::folder(id)).join("refs").join(revision.replace('/', "%2F"))
    }

    /// Opens a folder, or shares the hold on one that is open.
    fn folder(&self, path: &Path) -> Result<Arc<Folder>, StoreError> {
        match self.opened(path) {
            Some(found) => Ok(found),
            None => Ok(self.remember(Folder::open(path, self.client.clone())?)),
        }
    }

    fn opened(&self, path: &Path) -> Option<Arc<Folder>> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // The one that was opened last knows most of the repository.
        open.iter().rev().filter_map(std::sync::Weak::upgrade).find(|folder| folder.path == path)
    }

    /// A number that no other cache has: nodes with the same one share their files.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn number(&self) -> Result<[u8; 32], StoreError> {
        let path = self.root.join(NUMBER_FILE);
        let read = || {
            let bytes = crate::hf::read_optional(&path, 64).ok().flatten()?;
            Some(*blake3::Hash::from_hex(bytes).ok()?.as_bytes())
        };
        if read().is_none() {
            let parts = [(); 4].map(|()| RandomState::new().build_hasher().finish().to_le_bytes());
            folder::write_whole(&path, blake3::hash(&parts.concat()).to_hex().as_bytes())?;
        }
        // Of two who make one at the same time, the later one counts for both.
        read().ok_or_else(|| StoreError::Damaged { path: path.clone(), why: "it is no number".into() })
    }

    fn remember(&self, folder: Folder) -> Arc<Folder> {
        let folder = Arc::new(folder);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|folder| folder.strong_count() > 0);
        open.push(Arc::downgrade(&folder));
        folder
    }

    /// Opens a weight file: one with holes through the store, any other as it is. The shape of an
    /// [`crate::Opener`].
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn open_file(&self, path: &Path) -> Result<Arc<dyn Source>, SourceError> {
        if !ranges_path(path).is_file() {
            return FileSource::opener(path);
        }
        let unread =
            |source| SourceError::Store { name: path.display().to_string(), source: Box::new(source) };
        let lost =
            || StoreError::Damaged { path: path.to_owned(), why: "it lies in no folder of the store".into() };
        let folder =
            Folder::around(path).ok_or_else(lost).and_then(|folder| self.folder(folder)).map_err(unread)?;
        Ok(Arc::new(StoredFile::open(path, folder).map_err(unread)?))
    }

    /// The models of the store, by name, then by last use.
    pub fn entries(&self) -> Vec<StoreEntry> {
        let mut entries: Vec<StoreEntry> = folders(&self.root)
            .into_iter()
            .flat_map(|repo| folders(&repo))
            .filter_map(|path| entry(&path))
            .collect();
        entries.sort_by(|a, b| (&a.id, b.last_used).cmp(&(&b.id, a.last_used)));
        entries
    }

    /// The models of an entry, opened without asking the Hub: those whose headers are here.
    pub fn models(&self, entry: &StoreEntry) -> Vec<Checkpoint> {
        let offline = HubSettings { offline: true, ..self.client.settings().clone() };
        let store = Self::new(self.root.clone(), self.snapshots.clone(), offline);
        let mut paths: Vec<PathBuf> =
            if entry.path.join(CONFIG_FILE).is_file() { vec![entry.path.clone()] } else { Vec::new() };
        let leads = |name: &&String| name.ends_with(".gguf") && crate::gguf::split::leads(name);
        paths.extend(entry.files.iter().filter(leads).map(|name| entry.path.join(name)));
        // To look is not to use.
        let used = Folder::last_used(&entry.path);
        let open = |path: &PathBuf| Checkpoint::open_with(path, &|path| store.open_file(path)).ok();
        let models = paths.iter().filter_map(open).collect();
        Folder::set_last_used(&entry.path, used);
        models
    }

    /// Removes models, least recently used first, until `keep` bytes or fewer are left. What is in use stays.
    ///
    /// # Errors
    /// [`StoreError`] when a folder cannot be removed.
    pub fn prune(&self, keep: u64) -> Result<Pruned, StoreError> {
        let mut entries = self.entries();
        entries.sort_by_key(|entry| entry.last_used);
        let bytes = entries.iter().map(|entry| entry.bytes).sum();
        let mut pruned = Pruned { bytes, ..Pruned::default() };
        for entry in entries {
            if pruned.bytes <= keep {
                break;
            }
            if Folder::remove(&entry.path)? {
                pruned.bytes = pruned.bytes.saturating_sub(entry.bytes);
                pruned.removed.push(entry);
            } else {
                pruned.in_use.push(entry);
            }
        }
        Ok(pruned)
    }
}

#[cfg(unix)]
fn link(from: &Path, to: &Path) -> std::io::Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    std::os::unix::fs::symlink(std::path::absolute(from)?, to)
}

#[cfg(windows)]
fn link(from: &Path, to: &Path) -> std::io::Result<()> {
    std::os::windows::fs::symlink_file(std::path::absolute(from)?, to)
}

/// The commit that a revision was when it was last looked up.
fn remembered(name: &Path) -> Option<String> {
    let bytes = crate::hf::read_optional(name, COMMIT_BYTES_MAX).ok()??;
    let commit = String::from_utf8(bytes).ok()?.trim().to_owned();
    is_commit(&commit).then_some(commit)
}

fn folders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn entry(path: &Path) -> Option<StoreEntry> {
    let repo = Folder::read(path).ok()?;
    let (mut files, mut bytes, mut bytes_total) = (Vec::new(), 0, 0);
    for name in repo.files.keys() {
        let file = path.join(name);
        let Ok(found) = fs::metadata(&file) else { continue };
        if ranges_path(&file).is_file() {
            bytes += file::held_bytes(&file);
        } else if !file.is_symlink() {
            bytes += found.len();
        }
        if ranges_path(&file).is_file() || file.is_symlink() {
            bytes_total += found.len();
            files.push(name.clone());
        }
    }
    let last_used = Folder::last_used(path);
    Some(StoreEntry {
        id: repo.id,
        commit: repo.commit,
        path: path.to_owned(),
        files,
        bytes,
        bytes_total,
        last_used,
    })
}
