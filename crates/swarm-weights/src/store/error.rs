//! What can go wrong between a model's name and its bytes in the store.

use std::io;
use std::path::{Path, PathBuf};

use crate::hub::HubError;

/// Why bytes are not in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error("{file} was not fetched")]
    Fetch { file: String, source: HubError },
    #[error(
        "the disk is full: {need} bytes more are needed in {path}; free them, or choose another folder with SWARM_OS_CACHE; what was fetched is kept"
    )]
    DiskFull { path: PathBuf, need: u64 },
    #[error("cannot {what} {path}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is not what this program wrote: {why}; remove the folder to fetch it again")]
    Damaged { path: PathBuf, why: String },
    #[error(
        "bytes {offset} to {end} of {path} do not match their digest any more, and what the Hub sends for them does not either"
    )]
    Corrupt { path: PathBuf, offset: u64, end: u64 },
    #[error("{id} holds several models; name one of {}", choices.join(", "))]
    Ambiguous { id: String, choices: Vec<String> },
    #[error("{id} has no {wanted}; it has {}", choices.join(", "))]
    NoSuchFile { id: String, wanted: String, choices: Vec<String> },
    #[error("{id} is no model that this program reads: {why}")]
    NotAModel { id: String, why: String },
    #[error("{node} does not supply bytes of the model")]
    Supply { node: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error(
        "{bytes} bytes of {file} came from no node, and there is no Hub that has them; ask the coordinator's user for the files"
    )]
    NotSupplied { file: String, bytes: u64 },
    #[error("{file} is of no repository")]
    NoHub { file: String },
    #[error("it was called off")]
    Aborted,
}

impl StoreError {
    /// An error of the file system; `need` says how many bytes more the folder has to take.
    pub(super) fn io(what: &'static str, path: &Path, need: u64, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path, need },
            _ => Self::Io { what, path, source },
        }
    }

    /// Nobody could be asked.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Hub(error) | Self::Fetch { source: error, .. } if error.is_unreachable())
    }

    /// The bytes that are missing in all, where a full disk is the cause.
    pub(super) fn needing(self, bytes: u64) -> Self {
        match self {
            Self::DiskFull { path, need } => Self::DiskFull { path, need: need.max(bytes) },
            other => other,
        }
    }
}
