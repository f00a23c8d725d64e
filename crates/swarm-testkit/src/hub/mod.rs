//! A Hub on this computer: models behind the same paths, headers and redirects as the public one, with every trouble
//! that a server or a network has, and a log of the bytes it gave away.
//!
//! Two listeners, as there are two hosts: the front answers `/api/models/ID/revision/REV` and
//! `/ID/resolve/REV/FILE`, serves small files itself and redirects large ones to the store with a signed URL that
//! expires. A token that reaches the store is seen in [`Served::token_leaked`].

mod http;
mod serve;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A request as [`Hub::trouble`] sees it.
#[derive(Clone, Debug)]
pub struct HubRequest {
    /// Requests of this host before this one.
    pub number: u64,
    /// Asked of the store, not of the front.
    pub store: bool,
    /// `org/name/file` for files, else the path.
    pub path: String,
    /// The range that was asked for, end exclusive.
    pub range: Option<(u64, u64)>,
}

/// What goes wrong with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    None,
    /// 429, with `Retry-After` in seconds.
    Busy(Option<u64>),
    /// Any status without a useful body.
    Status(u16),
    /// 403, as for a signed URL that has expired.
    Expired,
    /// The connection ends after so many bytes of the body.
    Cut(u64),
    /// A pause after every 4 KiB of the body.
    Slow(Duration),
    /// Nothing comes after so many bytes of the body, for so long.
    Stall(u64, Duration),
    /// 200 and the whole file, whatever was asked for.
    IgnoreRange,
    /// 206 with the `Content-Range` of bytes that start so much later, and those bytes.
    Shifted(u64),
    /// 206 without a `Content-Range`.
    NoContentRange,
    /// 206 with a `Content-Range` of another total length.
    OtherTotal,
    /// 206 with the first half of what was asked for.
    Half,
    /// The file as it is after somebody replaced it: other bytes, another tag, the same length.
    OtherVersion,
    /// Another commit in `X-Repo-Commit`.
    OtherCommit,
}

/// One answer that was given.
#[derive(Clone, Debug)]
pub struct Served {
    pub store: bool,
    /// The token of whoever asked; for the store, of whom the signed URL was made for.
    pub who: Option<String>,
    /// `org/name/file` for files, else the path.
    pub path: String,
    /// First byte of the body in the file.
    pub offset: u64,
    /// Bytes of the body that were sent.
    pub bytes: u64,
    pub status: u16,
    /// A token came with a request that went to the store.
    pub token_leaked: bool,
}

type Plan = dyn Fn(&HubRequest) -> Trouble + Send + Sync;

#[derive(Clone)]
pub(crate) struct StoredFile {
    pub bytes: Arc<Vec<u8>>,
    pub tag: String,
}

impl StoredFile {
    fn new(name: &str, bytes: Vec<u8>) -> Self {
        let tag = digest(&bytes, if is_large(name) { 64 } else { 40 });
        Self { bytes: Arc::new(bytes), tag }
    }
}

/// Kept outside of git, as weights are: served by the store.
pub(crate) fn is_large(name: &str) -> bool {
    [".safetensors", ".gguf", ".bin"].iter().any(|end| name.ends_with(end))
}

#[derive(Clone)]
pub(crate) struct Repo {
    pub commit: String,
    pub files: BTreeMap<String, StoredFile>,
}

pub(crate) struct State {
    pub front: SocketAddr,
    pub store: SocketAddr,
    /// All commits of every repository, the newest last.
    pub repos: Mutex<BTreeMap<String, Vec<Repo>>>,
    pub plan: Mutex<Arc<Plan>>,
    pub log: Mutex<Vec<Served>>,
    /// Entries that [`Hub::clear_log`] took out of sight; answers under way keep their place.
    pub log_start: AtomicUsize,
    pub url_life: Mutex<Duration>,
    pub required_token: Mutex<Option<String>>,
    pub numbers: [AtomicU64; 2],
    pub started: Instant,
    pub closed: AtomicBool,
    /// Sizes and tags are part of the listing.
    pub lists_blobs: AtomicBool,
}

pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hexadecimal digits that change with `bytes`. Not cryptographic: the store signs for a test only.
pub(crate) fn digest(bytes: &[u8], digits: usize) -> String {
    let word = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        (salt, bytes).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    };
    let mut text: String = (0..digits.div_ceil(16) as u64).map(word).collect();
    text.truncate(digits);
    text
}

/// A running Hub. It ends with this value.
pub struct Hub {
    state: Arc<State>,
}

impl Hub {
    /// Starts on two free ports of 127.0.0.1.
    ///
    /// # Errors
    /// When no port can be had.
    pub fn start() -> io::Result<Self> {
        let listeners = [0, 0].map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)));
        let [front, store] = listeners;
        Self::with(front?, store?)
    }

    /// Starts on listeners of one's own, for another network namespace or a port that must be known.
    ///
    /// # Errors
    /// When their addresses cannot be told.
    pub fn with(front: TcpListener, store: TcpListener) -> io::Result<Self> {
        let state = Arc::new(State {
            front: front.local_addr()?,
            store: store.local_addr()?,
            repos: Mutex::default(),
            plan: Mutex::new(Arc::new(|_| Trouble::None)),
            log: Mutex::default(),
            log_start: AtomicUsize::new(0),
            url_life: Mutex::new(Duration::from_secs(3600)),
            required_token: Mutex::default(),
            numbers: Default::default(),
            started: Instant::now(),
            closed: AtomicBool::new(false),
            lists_blobs: AtomicBool::new(true),
        });
        serve::listen(front, &state, false);
        serve::listen(store, &state, true);
        Ok(Self { state })
    }

    /// What `HF_ENDPOINT` is to be.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.state.front)
    }

    /// The files directly in `folder` become a new commit of `id`. Returns the commit.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn add(&self, id: &str, folder: &Path) -> io::Result<String> {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                let name = entry.file_name().to_string_lossy().into_owned();
                files.insert(name.clone(), StoredFile::new(&name, std::fs::read(entry.path())?));
            }
        }
        let mut all = Vec::new();
        for (name, file) in &files {
            all.extend_from_slice(name.as_bytes());
            all.extend_from_slice(file.tag.as_bytes());
        }
        let commit = digest(&all, 40);
        lock(&self.state.repos)
            .entry(id.to_owned())
            .or_default()
            .push(Repo { commit: commit.clone(), files });
        Ok(commit)
    }

    /// Decides what goes wrong from now on.
    pub fn trouble(&self, plan: impl Fn(&HubRequest) -> Trouble + Send + Sync + 'static) {
        *lock(&self.state.plan) = Arc::new(plan);
    }

    /// How long a signed URL is good for.
    pub fn set_url_life(&self, life: Duration) {
        *lock(&self.state.url_life) = life;
    }

    /// Only those with this token get anything.
    pub fn require_token(&self, token: &str) {
        *lock(&self.state.required_token) = Some(token.to_owned());
    }

    /// Whether the listing tells sizes and tags, as `?blobs=true` asks.
    pub fn set_lists_blobs(&self, lists: bool) {
        self.state.lists_blobs.store(lists, Ordering::Relaxed);
    }

    /// All answers so far.
    pub fn log(&self) -> Vec<Served> {
        let log = lock(&self.state.log);
        log.iter().skip(self.state.log_start.load(Ordering::Relaxed)).cloned().collect()
    }

    /// Forgets the log.
    pub fn clear_log(&self) {
        self.state.log_start.store(lock(&self.state.log).len(), Ordering::Relaxed);
    }

    /// Bytes of bodies that went to whoever has this token.
    pub fn bytes_to(&self, token: &str) -> u64 {
        self.log()
            .iter()
            .filter(|served| served.who.as_deref() == Some(token))
            .map(|served| served.bytes)
            .sum()
    }

    /// Bytes of bodies of files whose name ends so.
    pub fn bytes_of(&self, end: &str) -> u64 {
        self.log().iter().filter(|served| served.path.ends_with(end)).map(|served| served.bytes).sum()
    }

    /// Bytes of weight files that were sent more than once, to anybody.
    pub fn bytes_again(&self) -> u64 {
        let mut spans: BTreeMap<String, Vec<(u64, u64)>> = BTreeMap::new();
        for served in self.log().into_iter().filter(|served| served.store && served.status < 300) {
            spans.entry(served.path).or_default().push((served.offset, served.offset + served.bytes));
        }
        let mut again = 0;
        for mut spans in spans.into_values() {
            spans.sort_unstable();
            let mut end = 0;
            for (start, stop) in spans {
                again += end.min(stop).saturating_sub(start);
                end = end.max(stop);
            }
        }
        again
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.state.closed.store(true, Ordering::Relaxed);
        // Wakes the listeners, which then see that it is over.
        for address in [self.state.front, self.state.store] {
            drop(std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)));
        }
    }
}
