//! A file of the store: as long as the original, with holes where nothing was fetched.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::folder::{Folder, write_whole};
use super::manifest::{self, HEADER_BYTES, RECORD_BYTES, Record};
use super::{StoreError, fetch, pieces, supply};
use crate::hub::RemoteFile;
use crate::source::{FileSource, Source, SourceError, check_range};

/// What the list of a file's ranges is called, after the file's own name.
const RANGES: &str = ".ranges";

/// The path of the list that belongs to `path`.
pub(crate) fn ranges_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(RANGES);
    name.into()
}

/// A file with holes. Bytes are held against their digest before they are given out for the first time; what is
/// missing or damaged is fetched when it is read.
pub(crate) struct StoredFile {
    name: String,
    path: PathBuf,
    size: u64,
    source: FileSource,
    pub folder: Arc<Folder>,
    pub remote: RemoteFile,
    index: Mutex<Index>,
    /// A piece came.
    came: Condvar,
}

#[derive(Default)]
struct Index {
    /// By offset; they do not overlap.
    records: BTreeMap<u64, Held>,
    /// Bytes of the list that were read.
    read: u64,
}

#[derive(Clone, Copy)]
struct Held {
    record: Record,
    /// Its bytes were held against the digest since this file was opened, or came from the Hub just now.
    checked: bool,
}

impl Index {
    fn insert(&mut self, record: Record, checked: bool) {
        if let Some(held) = self.records.get_mut(&record.offset).filter(|held| held.record.len == record.len)
        {
            *held = Held { record, checked: checked || held.checked && held.record == record };
            return;
        }
        // Of records that overlap, which nobody writes on purpose, the first counts.
        let before = self.records.range(..=record.offset).next_back();
        let free = before.is_none_or(|(_, held)| held.record.end() <= record.offset)
            && self.records.range(record.offset..).next().is_none_or(|(start, _)| *start >= record.end());
        if free {
            self.records.insert(record.offset, Held { record, checked });
        }
    }

    fn at(&self, offset: u64) -> Option<Held> {
        let (_, held) = self.records.range(..=offset).next_back()?;
        (offset < held.record.end()).then_some(*held)
    }
}

impl StoredFile {
    /// Makes the file and its list where they are not there yet.
    pub fn make(path: &Path, size: u64) -> Result<(), StoreError> {
        let ranges = ranges_path(path);
        if ranges.is_file() && path.is_file() {
            return Ok(());
        }
        write_whole(&ranges, &manifest::header(size))?;
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let sized = file.and_then(|file| file.set_len(size));
        sized.map_err(|source| StoreError::io("make", path, size, source))
    }

    pub fn open(path: &Path, folder: Arc<Folder>) -> Result<Self, StoreError> {
        let damaged = |why: &str| StoreError::Damaged { path: path.to_owned(), why: why.to_owned() };
        let inside = folder.inside(path).ok_or_else(|| damaged("its path is none of its folder"))?;
        let ranges = ranges_path(path);
        let mut head = Vec::new();
        let file = File::open(&ranges).and_then(|file| file.take(HEADER_BYTES as u64).read_to_end(&mut head));
        file.map_err(|source| StoreError::io("read", &ranges, 0, source))?;
        let size = manifest::size(&head).ok_or_else(|| damaged("the list of its ranges has no beginning"))?;
        let source = FileSource::open(path).map_err(|error| damaged(&error.to_string()))?;
        if source.len() != size {
            return Err(damaged("it has another length than its list of ranges says"));
        }
        let remote = RemoteFile { size: Some(size), ..folder.remote(&inside) };
        let index = Mutex::new(Index { read: HEADER_BYTES as u64, ..Index::default() });
        let file = Self {
            name: path.display().to_string(),
            path: path.to_owned(),
            size,
            source,
            folder,
            remote,
            index,
            came: Condvar::new(),
        };
        file.reload()?;
        Ok(file)
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what other processes added to the list.
    pub fn reload(&self) -> Result<(), StoreError> {
        let ranges = ranges_path(&self.path);
        let fail = |source| StoreError::io("read", &ranges, 0, source);
        let mut index = self.index();
        let mut bytes = Vec::new();
        let mut file = File::open(&ranges).map_err(fail)?;
        file.seek(SeekFrom::Start(index.read)).map_err(fail)?;
        file.read_to_end(&mut bytes).map_err(fail)?;
        let whole = bytes.len() - bytes.len() % RECORD_BYTES;
        for record in manifest::records(bytes.get(..whole).unwrap_or_default(), self.size) {
            index.insert(record, false);
        }
        index.read = index.read.saturating_add(whole as u64);
        Ok(())
    }

    /// Cuts off what a crash left of a record, so that the next one begins at its place. Only while nobody else writes.
    fn mend(&self) -> Result<(), StoreError> {
        let ranges = ranges_path(&self.path);
        let fail = |source| StoreError::io("write", &ranges, 0, source);
        let file = OpenOptions::new().write(true).open(&ranges).map_err(fail)?;
        let len = file.metadata().map_err(fail)?.len();
        let rest = len.saturating_sub(HEADER_BYTES as u64) % RECORD_BYTES as u64;
        if rest == 0 { Ok(()) } else { file.set_len(len - rest).map_err(fail) }
    }

    /// The ranges that are here, in order.
    pub fn present(&self) -> Vec<Range<u64>> {
        self.index().records.values().map(|held| held.record.offset..held.record.end()).collect()
    }

    /// What of `wanted` is not here.
    pub fn missing(&self, wanted: &[Range<u64>]) -> Vec<Range<u64>> {
        pieces::missing(wanted, &self.present())
    }

    /// The digest of a piece that is listed as it is.
    pub fn digest(&self, range: &Range<u64>) -> Option<[u8; 32]> {
        let record = self.index().at(range.start)?.record;
        ((record.offset, record.end()) == (range.start, range.end)).then_some(record.hash)
    }

    /// Reads a piece for another node, and tells its digest; `None` when it is not here whole. One that is a record is
    /// not held against its digest here: whoever gets it does that.
    pub fn held_piece(&self, range: &Range<u64>, out: &mut Vec<u8>) -> Result<Option<[u8; 32]>, SourceError> {
        let found = self.index().at(range.start);
        let Some(record) = found.map(|held| held.record) else { return Ok(None) };
        if !self.missing(std::slice::from_ref(range)).is_empty() {
            return Ok(None);
        }
        out.resize(usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX), 0);
        if (record.offset, record.end()) == (range.start, range.end) {
            self.source.read_at(range.start, out)?;
            return Ok(Some(record.hash));
        }
        self.read_at(range.start, out)?;
        Ok(Some(*blake3::hash(out).as_bytes()))
    }

    /// Waits until a piece came or somebody said that none will, or for `within`.
    pub fn wait(&self, within: Duration) {
        // A wake-up too early costs a look.
        drop(self.came.wait_timeout(self.index(), within));
    }

    /// Wakes those who wait.
    pub fn wake(&self) {
        self.came.notify_all();
    }

    /// Makes ready for [`StoredFile::put`]. Only while nobody else writes.
    pub fn writer(&self) -> Result<Writer<'_>, StoreError> {
        self.mend()?;
        self.reload()?;
        let ranges = ranges_path(&self.path);
        let open = |options: &mut OpenOptions, path: &Path| {
            options.open(path).map_err(|source| StoreError::io("open", path, 0, source))
        };
        Ok(Writer {
            stored: self,
            data: open(OpenOptions::new().write(true), &self.path)?,
            ranges: Mutex::new(open(OpenOptions::new().append(true), &ranges)?),
        })
    }

    /// Reads a record whole and holds it against its digest; `None` when it does not match.
    fn checked(&self, record: &Record) -> Result<Option<Vec<u8>>, SourceError> {
        let mut bytes = vec![0; record.len as usize]; // within the file, and one piece by those who write
        self.source.read_at(record.offset, &mut bytes)?;
        if blake3::hash(&bytes) != blake3::Hash::from_bytes(record.hash) {
            return Ok(None);
        }
        if let Some(held) = self.index().records.get_mut(&record.offset) {
            held.checked = held.checked || held.record == *record;
        }
        Ok(Some(bytes))
    }

    /// Fetches a damaged record again. What comes must be what came the first time.
    fn again(&self, record: &Record) -> Result<Vec<u8>, StoreError> {
        let corrupt =
            || StoreError::Corrupt { path: self.path.clone(), offset: record.offset, end: record.end() };
        let _writing = self.folder.write_lock(&AtomicBool::new(false), &mut || {})?;
        if let Some(bytes) = supply::again_from(&self.folder.suppliers(), &self.remote.path, record) {
            self.writer()?.put(record.offset, &bytes)?;
            return Ok(bytes);
        }
        if !self.folder.has_hub() {
            return Err(corrupt());
        }
        let mut bytes = Vec::new();
        let range = record.offset..record.end();
        let fetched = self.folder.client.range(
            &self.remote,
            range,
            &mut |_, piece| {
                bytes.extend_from_slice(piece);
                Ok(())
            },
            &AtomicBool::new(false),
        );
        fetched.map_err(|source| StoreError::Fetch { file: self.remote.label(), source })?;
        if Record::new(record.offset, &bytes) != *record {
            return Err(corrupt());
        }
        self.writer()?.put(record.offset, &bytes)?;
        Ok(bytes)
    }

    /// Fills `out`, which lies in one record.
    fn read_held(&self, held: Held, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        if held.checked {
            return self.source.read_at(offset, out);
        }
        let bytes = match self.checked(&held.record)? {
            Some(bytes) => bytes,
            None => self.again(&held.record).map_err(|source| self.unread(source))?,
        };
        let start = usize::try_from(offset.saturating_sub(held.record.offset)).unwrap_or(usize::MAX);
        let end = start.saturating_add(out.len());
        let part =
            bytes.get(start..end).ok_or_else(|| SourceError::Shrunk { name: self.name.clone(), offset })?;
        out.copy_from_slice(part);
        Ok(())
    }

    fn unread(&self, source: StoreError) -> SourceError {
        SourceError::Store { name: self.name.clone(), source: Box::new(source) }
    }
}

/// Adds pieces to a file, from any thread.
pub(crate) struct Writer<'a> {
    pub stored: &'a StoredFile,
    data: File,
    ranges: Mutex<File>,
}

impl Writer<'_> {
    /// Keeps a piece: first its bytes, then the word that they are there.
    pub fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.put_checked(Record::new(offset, bytes), bytes)
    }

    /// The same for bytes that were held against the digest of their record just now.
    pub fn put_checked(&self, record: Record, bytes: &[u8]) -> Result<(), StoreError> {
        self.write(record.offset, bytes)?;
        self.list(record)
    }

    /// Writes bytes that do not count before their record is listed.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let (path, need) = (&self.stored.path, bytes.len() as u64);
        write_at(&self.data, bytes, offset).map_err(|source| StoreError::io("write", path, need, source))
    }

    /// The word that the bytes of a record are there.
    pub fn list(&self, record: Record) -> Result<(), StoreError> {
        let (path, need) = (&self.stored.path, RECORD_BYTES as u64);
        let mut ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(source) = ranges.write_all(&record.encode()) {
            drop(self.stored.mend());
            return Err(StoreError::io("write", &ranges_path(path), need, source));
        }
        drop(ranges);
        self.stored.index().insert(record, true);
        self.stored.wake();
        Ok(())
    }
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_at(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    let (mut rest, mut at) = (bytes, offset);
    while !rest.is_empty() {
        let written = std::os::windows::fs::FileExt::seek_write(file, rest, at)?;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        rest = rest.get(written..).unwrap_or_default();
        at = at.saturating_add(written as u64);
    }
    Ok(())
}

impl Source for StoredFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        check_range(&self.name, offset, out.len(), self.size)?;
        let end = offset.saturating_add(out.len() as u64);
        let (mut at, mut rest) = (offset, out);
        while !rest.is_empty() {
            let found = self.index().at(at);
            let Some(held) = found else {
                let wanted = std::slice::from_ref(&(at..end)).to_vec();
                fetch::now(self, &wanted).map_err(|source| self.unread(source))?;
                if self.index().at(at).is_none() {
                    return Err(SourceError::Shrunk { name: self.name.clone(), offset: at });
                }
                continue;
            };
            let len = usize::try_from(held.record.end() - at).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at_mut(len);
            self.read_held(held, at, part)?;
            at = at.saturating_add(len as u64);
            rest = after;
        }
        Ok(())
    }

    fn stored(&self) -> Option<&StoredFile> {
        Some(self)
    }
}

/// Bytes of a file of the store that are here, as its list says; 0 without one.
pub(super) fn held_bytes(path: &Path) -> u64 {
    let Ok(bytes) = fs::read(ranges_path(path)) else { return 0 };
    let (Some(size), Some(list)) = (manifest::size(&bytes), bytes.get(HEADER_BYTES..)) else { return 0 };
    let mut index = Index::default();
    manifest::records(list, size).for_each(|record| index.insert(record, false));
    index.records.values().map(|held| u64::from(held.record.len)).sum()
}
