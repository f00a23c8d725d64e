//! Small private files, written so that no reader ever sees half of one.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use zeroize::Zeroizing;

use crate::error::IdentityError;

/// Makes `dir` and its parents; a folder made here is 0700.
pub(crate) fn create_private_dir(dir: &Path) -> Result<(), IdentityError> {
    let failed = |source| IdentityError::Write { path: dir.to_path_buf(), source };
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    match builder.create(dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && dir.is_dir() => check_dir_mode(dir),
        other => other.map_err(failed),
    }
}

/// A folder that anyone may write to lets anyone swap the secret for their own.
#[cfg(unix)]
fn check_dir_mode(dir: &Path) -> Result<(), IdentityError> {
    use std::os::unix::fs::PermissionsExt;
    let read = |source| IdentityError::Read { path: dir.to_path_buf(), source };
    let mode = fs::metadata(dir).map_err(read)?.permissions().mode();
    let sticky = mode & 0o1000 != 0;
    if mode & 0o002 != 0 && !sticky {
        return Err(IdentityError::OpenFolder { path: dir.to_path_buf() });
    }
    if mode & 0o020 != 0 && !sticky {
        tracing::warn!("{} can be written by its group; `chmod go-w` it", dir.display());
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_dir_mode(_dir: &Path) -> Result<(), IdentityError> {
    Ok(())
}

/// Every file of `dir` that holds a secret, old ones too, and the folder itself, where others may read or write what
/// they should not. A folder that is not there holds none.
pub(crate) fn exposed(dir: &Path, stems: &[&str]) -> Vec<IdentityError> {
    let mut found: Vec<IdentityError> = check_dir_mode(dir).err().into_iter().collect();
    found.retain(|error| matches!(error, IdentityError::OpenFolder { .. }));
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    let secret = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        stems.iter().any(|stem| name.starts_with(stem)) && path.is_file()
    };
    for path in paths.iter().filter(|path| secret(path)) {
        match File::open(path).map(|file| check_file_mode(path, &file)) {
            Ok(checked) => found.extend(checked.err()),
            Err(source) => found.push(IdentityError::Read { path: path.clone(), source }),
        }
    }
    found
}

/// Longest wait for another process of this user that writes the same files.
const LOCK_WITHIN: Duration = Duration::from_secs(5);
const LOCK_EVERY: Duration = Duration::from_millis(5);

/// Held while files of a folder are read and written together.
pub(crate) struct FolderLock(File);

impl FolderLock {
    /// Waits for other processes of this user, 5 s at most.
    pub(crate) fn take(dir: &Path) -> Result<Self, IdentityError> {
        let path = dir.join("swarm.lock");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let failed = |source| IdentityError::Write { path: path.clone(), source };
        let file = options.open(&path).map_err(failed)?;
        let deadline = Instant::now() + LOCK_WITHIN;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::Error(source)) => return Err(failed(source)),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => {
                    return Err(failed(ErrorKind::TimedOut.into()));
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_EVERY),
            }
        }
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Closing the file unlocks it as well.
        let _ = self.0.unlock();
    }
}

/// What changes when a file is written: its time and length, or nothing where there is no file.
pub(crate) fn stamp(path: &Path) -> Option<(SystemTime, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

/// Reads a private file of at most `bytes_max` bytes; `None` when there is none.
///
/// A file that others may read is refused, not quietly repaired: if its mode was wrong, somebody else may
/// have the secret already, and only the user can judge that.
pub(crate) fn read_private(path: &Path, bytes_max: u64) -> Result<Option<Zeroizing<String>>, IdentityError> {
    let failed = |source| IdentityError::Read { path: path.to_path_buf(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    check_file_mode(path, &file)?;
    let mut text = Zeroizing::new(String::with_capacity(usize::try_from(bytes_max).unwrap_or(0)));
    file.take(bytes_max).read_to_string(&mut text).map_err(failed)?;
    Ok(Some(text))
}

#[cfg(unix)]
fn check_file_mode(path: &Path, file: &File) -> Result<(), IdentityError> {
    use std::os::unix::fs::PermissionsExt;
    let read = |source| IdentityError::Read { path: path.to_path_buf(), source };
    let mode = file.metadata().map_err(read)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::OpenSecret { path: path.to_path_buf(), mode });
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_file_mode(_path: &Path, _file: &File) -> Result<(), IdentityError> {
    Ok(())
}

/// Creates `path` with `text` unless it exists. `false`: another process was first, read its file.
pub(crate) fn create_new(path: &Path, text: &str) -> Result<bool, IdentityError> {
    let temporary = Temporary::write(path, text)?;
    match fs::hard_link(&temporary.path, path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(IdentityError::Write { path: path.to_path_buf(), source }),
    }
}

/// Puts `text` at `path` in one step, over whatever is there.
pub(crate) fn replace(path: &Path, text: &str) -> Result<(), IdentityError> {
    let temporary = Temporary::write(path, text)?;
    fs::rename(&temporary.path, path)
        .map_err(|source| IdentityError::Write { path: path.to_path_buf(), source })
}

/// Keeps what is at `path` under the first free name `path.backup-1`, `-2` ... and returns that name.
pub(crate) fn back_up(path: &Path) -> Result<PathBuf, IdentityError> {
    for number in 1..=999 {
        let mut name = path.as_os_str().to_os_string();
        name.push(format!(".backup-{number}"));
        let backup = PathBuf::from(name);
        match fs::hard_link(path, &backup) {
            Ok(()) => return Ok(backup),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(source) => return Err(IdentityError::Write { path: backup, source }),
        }
    }
    Err(IdentityError::TooManyBackups { path: path.to_path_buf() })
}

/// A 0600 file beside its target, gone when dropped unless renamed away.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn write(target: &Path, text: &str) -> Result<Self, IdentityError> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(IdentityError::Random)?;
        let mut name = target.as_os_str().to_os_string();
        name.push(format!(".{:016x}.tmp", u64::from_le_bytes(random)));
        let path = PathBuf::from(name);
        let failed = |source| IdentityError::Write { path: target.to_path_buf(), source };
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&path).map_err(failed)?;
        let temporary = Self { path };
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
        Ok(temporary)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Renamed away is the good case; otherwise a left-over is an inconvenience, not an error.
        let _ = fs::remove_file(&self.path);
    }
}
