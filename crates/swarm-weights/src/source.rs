//! Where bytes come from: one trait, "give me this range", and the plain file behind it.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// A read that did not happen. Every variant names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    #[error("cannot open {name}")]
    Open { name: String, source: std::io::Error },
    #[error("{name} is not a regular file")]
    NotAFile { name: String },
    #[error("cannot read {len} bytes at offset {offset} of {name}")]
    Read { name: String, offset: u64, len: u64, source: std::io::Error },
    #[error("{name} ends at byte {file_len}; {len} bytes at offset {offset} were asked for")]
    OutOfRange { name: String, offset: u64, len: u64, file_len: u64 },
    #[error("{name} became shorter while it was open: no byte left at offset {offset}; fetch it again")]
    Shrunk { name: String, offset: u64 },
    #[error("bytes of {name} are not to be had")]
    Store { name: String, source: Box<crate::store::StoreError> },
}

/// Bytes by range. Safe to read from several threads at once: a read carries its own offset.
pub trait Source: Send + Sync {
    /// What to call it in an error: the path for files.
    fn name(&self) -> &str;

    /// Length in bytes when it was opened.
    fn len(&self) -> u64;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `out` with the bytes from `offset` on. Reads exactly `out.len()` bytes and no others.
    ///
    /// # Errors
    /// [`SourceError::OutOfRange`] when the range leaves the file, before anything is read;
    /// [`SourceError::Shrunk`] or [`SourceError::Read`] when the file changed or the disk failed.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), SourceError>;

    /// The same as a file of the store, which may have holes; `None` for what is here whole.
    #[doc(hidden)]
    #[allow(private_interfaces)]
    fn stored(&self) -> Option<&crate::store::StoredFile> {
        None
    }
}

/// Opens a path as a source. [`crate::Checkpoint::open_with`] takes one, so that a test may count
/// reads and a user may choose [`crate::MmapSource`].
pub type Opener<'a> = dyn Fn(&Path) -> Result<Arc<dyn Source>, SourceError> + 'a;

/// Holds `offset..offset + len` against the file's length.
pub(crate) fn check_range(name: &str, offset: u64, len: usize, file_len: u64) -> Result<(), SourceError> {
    let len = len as u64;
    match offset.checked_add(len) {
        Some(end) if end <= file_len => Ok(()),
        _ => Err(SourceError::OutOfRange { name: name.to_owned(), offset, len, file_len }),
    }
}

/// A file read by position (`pread`). No seek pointer is shared, nothing is cached here: the
/// operating system's page cache does that.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    len: u64,
    name: String,
}

impl FileSource {
    /// Opens `path` for reading. Symbolic links are followed.
    ///
    /// # Errors
    /// [`SourceError::Open`], or [`SourceError::NotAFile`] for folders and devices.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let (file, len, name) = open_regular(path)?;
        Ok(Self { file, len, name })
    }

    /// [`FileSource::open`] in the shape of an [`Opener`].
    pub fn opener(path: &Path) -> Result<Arc<dyn Source>, SourceError> {
        Ok(Arc::new(Self::open(path)?))
    }
}

pub(crate) fn open_regular(path: &Path) -> Result<(File, u64, String), SourceError> {
    let name = path.display().to_string();
    // The type is asked before opening: opening a named pipe would wait for a writer for ever.
    let metadata =
        std::fs::metadata(path).map_err(|source| SourceError::Open { name: name.clone(), source })?;
    if !metadata.is_file() {
        return Err(SourceError::NotAFile { name });
    }
    let file = File::open(path).map_err(|source| SourceError::Open { name: name.clone(), source })?;
    let len = file.metadata().map_err(|source| SourceError::Open { name: name.clone(), source })?.len();
    Ok((file, len, name))
}

impl Source for FileSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        check_range(&self.name, offset, out.len(), self.len)?;
        let len = out.len() as u64;
        let mut position = offset;
        let mut rest = out;
        while !rest.is_empty() {
            match read_some(&self.file, rest, position) {
                Ok(0) => return Err(SourceError::Shrunk { name: self.name.clone(), offset: position }),
                Ok(count) => {
                    position += count as u64;
                    rest = rest.get_mut(count..).unwrap_or_default();
                }
                Err(source) if source.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(SourceError::Read { name: self.name.clone(), offset, len, source });
                }
            }
        }
        Ok(())
    }
}

#[cfg(unix)]
fn read_some(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, out, offset)
}

#[cfg(windows)]
fn read_some(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, out, offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file.flush().unwrap();
        file
    }

    #[test]
    fn reads_ranges_and_refuses_what_lies_outside() {
        let file = file_of(b"0123456789");
        let sources: [Arc<dyn Source>; 2] =
            [FileSource::opener(file.path()).unwrap(), crate::MmapSource::opener(file.path()).unwrap()];
        for source in sources {
            assert_eq!(source.len(), 10);
            let mut out = [0; 4];
            source.read_at(3, &mut out).unwrap();
            assert_eq!(&out, b"3456");
            source.read_at(10, &mut []).unwrap();
            for offset in [7, 10, 11, u64::MAX, u64::MAX - 3] {
                assert!(
                    matches!(source.read_at(offset, &mut out), Err(SourceError::OutOfRange { .. })),
                    "{offset}"
                );
            }
        }
    }

    #[test]
    fn empty_files_open_and_hold_nothing() {
        let file = file_of(b"");
        for source in
            [FileSource::opener(file.path()).unwrap(), crate::MmapSource::opener(file.path()).unwrap()]
        {
            assert!(source.is_empty());
            assert!(source.read_at(0, &mut [0]).is_err());
        }
    }

    #[test]
    fn a_file_cut_short_while_open_is_an_error() {
        let file = file_of(&[7; 4096]);
        let source = FileSource::open(file.path()).unwrap();
        file.as_file().set_len(100).unwrap();
        let error = source.read_at(50, &mut [0; 200]).unwrap_err();
        assert!(matches!(error, SourceError::Shrunk { offset: 100, .. }), "{error}");
    }

    #[test]
    fn folders_and_missing_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(FileSource::open(folder.path()), Err(SourceError::NotAFile { .. })));
        let error = FileSource::open(&folder.path().join("absent")).unwrap_err();
        assert!(error.to_string().contains("absent"), "{error}");
    }
}
