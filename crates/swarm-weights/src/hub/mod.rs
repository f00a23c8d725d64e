//! Models that are elsewhere: a client for the Hub's paths, headers and redirects, over byte ranges.

mod client;
mod error;
mod listing;
mod name;
mod settings;

pub use client::HubClient;
pub use error::HubError;
pub(crate) use listing::{Listed, Listing};
pub use name::ModelRef;
pub(crate) use name::{is_commit, is_file_name, is_plain};
pub use settings::{HubSettings, Retry, Token};

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often somebody who waits looks whether it is over.
const LOOK: Duration = Duration::from_millis(50);

/// A file of a repository at one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// `organisation/name`.
    pub id: String,
    pub commit: String,
    /// Its path in the repository.
    pub path: String,
    /// Its length, where that is known.
    pub size: Option<u64>,
    /// The tag of its content, where that is known.
    pub tag: Option<String>,
}

impl RemoteFile {
    /// What it is called in messages.
    pub fn label(&self) -> String {
        format!("{}/{}", self.id, self.path)
    }
}

/// Waits, unless it is called off. True when it was not.
pub(crate) fn pause(for_so_long: Duration, abort: &AtomicBool) -> bool {
    let end = Instant::now() + for_so_long;
    while !abort.load(Ordering::Relaxed) {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(LOOK));
    }
    false
}
