//! One commit of a repository on disk: which files it has, where they came from, who uses it now.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::StoreError;
use super::file::ranges_path;
use super::supply::Supplier;
use crate::hub::{HubClient, Listed, Listing, RemoteFile, is_commit, pause};

/// Says that a folder belongs to the store, and of what.
const REPO_FILE: &str = "repo.json";
/// Held shared by who reads, exclusive by who removes.
const USE_FILE: &str = "use.lock";
/// Held by the one who writes.
const WRITE_FILE: &str = "write.lock";
const REPO_BYTES_MAX: u64 = 64 << 20;
/// Between two tries for a lock.
const LOCK_LOOK: Duration = Duration::from_millis(50);

/// What `repo.json` says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Repo {
    pub id: String,
    pub commit: String,
    pub files: BTreeMap<String, Listed>,
    /// Another node told of it: there may be more files.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
    /// Of files that somebody handed over and no repository has: the digest of the model, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

/// A folder of the store, in use as long as this value lives.
pub(crate) struct Folder {
    pub path: PathBuf,
    pub(super) repo: Repo,
    pub client: Arc<HubClient>,
    /// Other nodes that bytes of it are asked of before the Hub.
    suppliers: Mutex<Vec<Arc<dyn Supplier>>>,
    _in_use: File,
}

impl Folder {
    /// Makes the folder of a commit, or opens the one that is there.
    pub fn make(
        path: &Path,
        id: &str,
        listing: &Listing,
        client: Arc<HubClient>,
    ) -> Result<Self, StoreError> {
        let repo = Repo {
            id: id.to_owned(),
            commit: listing.commit.clone(),
            files: listing.files.clone(),
            partial: false,
            fingerprint: None,
        };
        Self::found(path, &repo, client)
    }

    /// Makes the folder of what `repo` says, or opens the one that is there; what another node told is replaced by what
    /// the Hub says.
    pub(super) fn found(path: &Path, repo: &Repo, client: Arc<HubClient>) -> Result<Self, StoreError> {
        fs::create_dir_all(path).map_err(|source| StoreError::io("make the folder", path, 0, source))?;
        let file = path.join(REPO_FILE);
        let told = Self::read(path).ok().filter(|told| told.partial && !repo.partial);
        if told.is_some() || !file.exists() {
            if let Some(told) = told {
                forget_other_lengths(path, &told, repo)?;
            }
            let json = serde_json::to_vec_pretty(repo)
                .map_err(|error| StoreError::Damaged { path: file.clone(), why: error.to_string() })?;
            write_whole(&file, &json)?;
        }
        Self::open(path, client)
    }

    /// Asks `supplier` first from now on.
    pub fn attach(&self, supplier: Arc<dyn Supplier>) {
        self.lock_suppliers().push(supplier);
    }

    pub fn detach(&self, supplier: &Arc<dyn Supplier>) {
        self.lock_suppliers().retain(|other| !Arc::ptr_eq(other, supplier));
    }

    pub fn suppliers(&self) -> Vec<Arc<dyn Supplier>> {
        self.lock_suppliers().clone()
    }

    fn lock_suppliers(&self) -> MutexGuard<'_, Vec<Arc<dyn Supplier>>> {
        self.suppliers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the Hub has these files.
    pub fn has_hub(&self) -> bool {
        self.repo.fingerprint.is_none()
    }

    /// The digest of a model that somebody handed over, where `path` lies in its folder.
    pub fn fingerprint_of(path: &Path) -> Option<[u8; 32]> {
        let text = Self::read(Self::around(path)?).ok()?.fingerprint?;
        Some(*blake3::Hash::from_hex(text).ok()?.as_bytes())
    }

    /// Opens a folder that is there.
    pub fn open(path: &Path, client: Arc<HubClient>) -> Result<Self, StoreError> {
        let repo = Self::read(path)?;
        let file = path.join(USE_FILE);
        let in_use = open_lock(&file)?;
        in_use.lock_shared().map_err(|source| StoreError::io("lock", &file, 0, source))?;
        // The time of the last use decides what is removed first. Without it, older folders go first.
        let _ = in_use.set_modified(SystemTime::now());
        Ok(Self { path: path.to_owned(), repo, client, suppliers: Mutex::default(), _in_use: in_use })
    }

    /// What a folder of the store holds; an error when it is none.
    pub(super) fn read(path: &Path) -> Result<Repo, StoreError> {
        let file = path.join(REPO_FILE);
        let bytes = fs::read(&file).map_err(|source| StoreError::io("read", &file, 0, source))?;
        let damaged = |why: String| StoreError::Damaged { path: file.clone(), why };
        if bytes.len() as u64 > REPO_BYTES_MAX {
            return Err(damaged("it is too long".into()));
        }
        let repo: Repo = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if !is_commit(&repo.commit) {
            return Err(damaged("it names no commit".into()));
        }
        Ok(repo)
    }

    /// The folder of the store that `path` lies in.
    pub fn around(path: &Path) -> Option<&Path> {
        /// A file in a folder of a repository is not deeper.
        const DEPTH_MAX: usize = 8;
        path.ancestors().take(DEPTH_MAX).find(|folder| folder.join(REPO_FILE).is_file())
    }

    /// When the folder was last opened.
    pub fn last_used(path: &Path) -> SystemTime {
        let time = |file: PathBuf| fs::metadata(file).and_then(|metadata| metadata.modified());
        time(path.join(USE_FILE)).or_else(|_| time(path.join(REPO_FILE))).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Puts the time of the last use back. Without it, the folder counts as used just now.
    pub fn set_last_used(path: &Path, time: SystemTime) {
        let file = OpenOptions::new().write(true).open(path.join(USE_FILE));
        let _ = file.and_then(|file| file.set_modified(time));
    }

    /// Removes a folder that nobody uses. False when somebody does.
    pub fn remove(path: &Path) -> Result<bool, StoreError> {
        let file = path.join(USE_FILE);
        let lock = open_lock(&file)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Error(source)) => return Err(StoreError::io("lock", &file, 0, source)),
        }
        // First the mark: what a crash leaves of the folder is not taken for a model.
        let repo = path.join(REPO_FILE);
        fs::remove_file(&repo).map_err(|source| StoreError::io("remove", &repo, 0, source))?;
        fs::remove_dir_all(path).map_err(|source| StoreError::io("remove", path, 0, source))?;
        Ok(true)
    }

    pub fn commit(&self) -> &str {
        &self.repo.commit
    }

    /// The file as the Hub knows it.
    pub fn remote(&self, path: &str) -> RemoteFile {
        let Listed { size, tag } = self.repo.files.get(path).cloned().unwrap_or_default();
        RemoteFile {
            id: self.repo.id.clone(),
            commit: self.repo.commit.clone(),
            path: path.to_owned(),
            size,
            tag,
        }
    }

    /// The path in the repository of a file in this folder.
    pub fn inside(&self, path: &Path) -> Option<String> {
        let parts = path.strip_prefix(&self.path).ok()?.components();
        let parts: Option<Vec<&str>> = parts.map(|part| part.as_os_str().to_str()).collect();
        Some(parts?.join("/"))
    }

    /// Waits until nobody else writes here; two processes that want the same bytes fetch them once.
    /// `waiting` is called now and then meanwhile.
    pub fn write_lock(&self, abort: &AtomicBool, waiting: &mut dyn FnMut()) -> Result<File, StoreError> {
        let path = self.path.join(WRITE_FILE);
        let lock = open_lock(&path)?;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::WouldBlock) => {
                    waiting();
                    if !pause(LOCK_LOOK, abort) {
                        return Err(StoreError::Aborted);
                    }
                }
                Err(TryLockError::Error(source)) => return Err(StoreError::io("lock", &path, 0, source)),
            }
        }
    }

    /// Fetches a small file of the repository unless it is here. False when the repository has none.
    pub fn small(&self, name: &str, max: u64, snapshot: Option<&Path>) -> Result<bool, StoreError> {
        let path = self.path.join(name);
        if path.is_file() {
            return Ok(true);
        }
        if !self.repo.files.contains_key(name) {
            return Ok(false);
        }
        let remote = self.remote(name);
        let here = snapshot.map(|snapshot| snapshot.join(name)).filter(|file| file.is_file());
        let bytes = match here.and_then(|file| fs::read(file).ok()) {
            Some(bytes) if remote.size.is_none_or(|size| size == bytes.len() as u64) => bytes,
            _ => self.client.small(&remote, max)?,
        };
        write_whole(&path, &bytes)?;
        Ok(true)
    }
}

/// Removes files that another node told to be longer or shorter than they are.
fn forget_other_lengths(path: &Path, told: &Repo, now: &Repo) -> Result<(), StoreError> {
    for (name, listed) in &told.files {
        let size = now.files.get(name).and_then(|file| file.size);
        if size.is_some() && size != listed.size {
            let file = path.join(name);
            let list = ranges_path(&file);
            for file in [list, file].iter().filter(|file| file.exists()) {
                fs::remove_file(file).map_err(|source| StoreError::io("remove", file, 0, source))?;
            }
        }
    }
    Ok(())
}

fn open_lock(path: &Path) -> Result<File, StoreError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(|source| StoreError::io("open", path, 0, source))
}

/// Numbers the files being written, since threads of one process write the same ones.
static FRESH: AtomicU64 = AtomicU64::new(0);

/// Writes a file so that it is there whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let need = bytes.len() as u64;
    let fail = |what| move |source| StoreError::io(what, path, need, source);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(fail("make the folder of"))?;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let fresh = path.with_file_name(format!(
        ".{name}.{}.{}",
        std::process::id(),
        FRESH.fetch_add(1, Ordering::Relaxed)
    ));
    let written = File::create(&fresh).and_then(|mut file| file.write_all(bytes));
    let done = written.and_then(|()| fs::rename(&fresh, path));
    done.map_err(|source| {
        drop(fs::remove_file(&fresh));
        fail("write")(source)
    })
}
