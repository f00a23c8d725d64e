//! A file mapped into memory. Opt in, and the only unsafe code of this crate.
#![allow(unsafe_code)]

use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::source::{Source, SourceError, check_range, open_regular};

/// A memory-mapped file.
///
/// Saves a system call per read when the file sits on a local disk. The price: if another process
/// shortens the file while it is mapped, touching the lost pages ends this process (SIGBUS on Unix);
/// [`crate::FileSource`] reports an error instead, which is why it is the default. Do not map files
/// on network file systems.
#[derive(Debug)]
pub struct MmapSource {
    /// `None` for an empty file, which not every system can map.
    map: Option<Mmap>,
    name: String,
}

impl MmapSource {
    /// Maps `path` read-only.
    ///
    /// # Errors
    /// [`SourceError::Open`] or [`SourceError::NotAFile`].
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let (file, len, name) = open_regular(path)?;
        if len == 0 {
            return Ok(Self { map: None, name });
        }
        // That nobody shortens the file meanwhile cannot be proved here; it is the documented condition
        // of choosing this source, and breaking it ends the process rather than giving wrong bytes.
        // SAFETY: the mapping is read-only and private to this value, and bytes leave it only by
        // copying, so no reference into it outlives a call.
        let map = unsafe { Mmap::map(&file) };
        let map = map.map_err(|source| SourceError::Open { name: name.clone(), source })?;
        Ok(Self { map: Some(map), name })
    }

    /// [`MmapSource::open`] in the shape of an [`crate::Opener`].
    pub fn opener(path: &Path) -> Result<Arc<dyn Source>, SourceError> {
        Ok(Arc::new(Self::open(path)?))
    }

    fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

impl Source for MmapSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.bytes().len() as u64
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        check_range(&self.name, offset, out.len(), self.len())?;
        // The range was checked against the mapping's own length, so it fits usize.
        let start = offset as usize;
        if let Some(bytes) = self.bytes().get(start..start + out.len()) {
            out.copy_from_slice(bytes);
        }
        Ok(())
    }
}
