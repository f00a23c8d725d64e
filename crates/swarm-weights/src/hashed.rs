//! What the units of a model hash to whose files are here whole, as another tool fetched them: nobody listed their pieces
//! when they came, so the files are read for it, once.
//!
//! ```text
//! CACHE/hashed/ID     a line for each unit: its number, what it hashes to
//! ```
//!
//! The id is made of the model's origin and of path, length and time of each file: a file that was changed is read anew.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::checkpoint::Checkpoint;
use crate::store::{Store, cut, write_whole};
use crate::unit::root;

const FOLDER: &str = "hashed";
/// Changes whenever the hashed bytes change their meaning.
const DOMAIN: &[u8] = b"swarm-os hashed files 1";
/// More than the units of any model take.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Digests of the units of one model, as far as they are known.
pub struct HashedUnits {
    file: PathBuf,
    known: BTreeMap<usize, [u8; 32]>,
}

impl HashedUnits {
    /// What is known of a model in this user's cache. `None` for one that no repository published, and for one without a
    /// whole file: others have no name for the first, and the pieces of the second are listed.
    pub fn of_user(model: &Checkpoint) -> Option<Self> {
        Self::open(Store::of_user().root(), model)
    }

    /// The same in another cache.
    pub fn open(cache: &Path, model: &Checkpoint) -> Option<Self> {
        let file = cache.join(FOLDER).join(id(model)?);
        let text = crate::hf::read_optional(&file, FILE_BYTES_MAX).ok().flatten().unwrap_or_default();
        let line = |line: &str| {
            let (unit, root) = line.split_once(' ')?;
            Some((unit.parse().ok()?, *blake3::Hash::from_hex(root).ok()?.as_bytes()))
        };
        let known = String::from_utf8_lossy(&text).lines().filter_map(line).collect();
        Some(Self { file, known })
    }

    pub fn root(&self, unit: usize) -> Option<[u8; 32]> {
        self.known.get(&unit).copied()
    }

    /// Reads and hashes units that are not known yet, one piece after the other, as long as `go_on` says so before each.
    /// What is known then is written down. True when nothing is left to be read.
    pub fn hash_more(&mut self, model: &Checkpoint, go_on: &mut dyn FnMut() -> bool) -> bool {
        let units = 0..model.config().num_hidden_layers.saturating_add(3);
        let before = self.known.len();
        let mut is_done = true;
        for unit in units.filter(|unit| model.unit_root(*unit).is_none()) {
            if self.known.contains_key(&unit) {
                continue;
            }
            match hash(model, unit, go_on) {
                Hashed::Root(root) => drop(self.known.insert(unit, root)),
                Hashed::Lacking => {}
                Hashed::Ended => {
                    is_done = false;
                    break;
                }
            }
        }
        if self.known.len() > before {
            let lines = self.known.iter();
            let lines =
                lines.map(|(unit, root)| format!("{unit} {}\n", blake3::Hash::from_bytes(*root).to_hex()));
            // Where it cannot be written, it is read again another time.
            if let Err(error) = write_whole(&self.file, lines.collect::<String>().as_bytes()) {
                tracing::warn!("what files hash to is not noted: {error}");
            }
        }
        is_done
    }
}

fn id(model: &Checkpoint) -> Option<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(DOMAIN);
    hasher.update(&model.origin_fingerprint()?);
    let mut whole = 0;
    for source in model.sources().iter().filter(|source| source.stored().is_none()) {
        let found = fs::metadata(source.name()).ok()?;
        let since = found.modified().ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        hasher.update(&(source.name().len() as u64).to_le_bytes());
        hasher.update(source.name().as_bytes());
        hasher.update(&found.len().to_le_bytes());
        hasher.update(&since.as_nanos().to_le_bytes());
        whole += 1;
    }
    (whole > 0).then(|| hasher.finalize().to_hex().chars().take(32).collect())
}

enum Hashed {
    Root([u8; 32]),
    /// There is no such unit, or not all of it is here.
    Lacking,
    /// It was called off.
    Ended,
}

fn hash(model: &Checkpoint, unit: usize, go_on: &mut dyn FnMut() -> bool) -> Hashed {
    let tensors = model.unit_tensors(unit);
    let (mut digests, mut bytes) = (Vec::new(), Vec::new());
    for info in &tensors {
        let Some(source) = model.sources().get(info.source) else { return Hashed::Lacking };
        let range = Range { start: info.offset, end: info.offset.saturating_add(info.bytes) };
        for piece in cut(std::slice::from_ref(&range)) {
            let digest = match source.stored() {
                Some(stored) => stored.digest(&piece),
                None if !go_on() => return Hashed::Ended,
                None => {
                    bytes.resize(usize::try_from(piece.end.saturating_sub(piece.start)).unwrap_or(0), 0);
                    let read = source.read_at(piece.start, &mut bytes);
                    read.ok().map(|()| *blake3::hash(&bytes).as_bytes())
                }
            };
            match digest {
                Some(digest) => digests.push(digest),
                None => return Hashed::Lacking,
            }
        }
    }
    if tensors.is_empty() { Hashed::Lacking } else { Hashed::Root(root(digests.into_iter())) }
}
