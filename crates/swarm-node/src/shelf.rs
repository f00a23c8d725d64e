//! The weights of a stage, kept from one placement to the next: a node whose layers stay the same reads nothing.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use swarm_model::Stage;

/// Whose stages a coordinator's own shelf is for.
pub(crate) const OWN: u64 = 0;

/// What makes two stages the same, whatever ring they are part of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StageKey {
    pub fingerprint: [u8; 32],
    pub layers: Range<usize>,
    pub context: usize,
}

/// Room for one stage. Opened for an owner; what another one leaves, or the same one after it has gone, is not kept.
#[derive(Default)]
pub(crate) struct Shelf(Mutex<Content>);

#[derive(Default)]
struct Content {
    owner: Option<u64>,
    kept: Option<(StageKey, Stage)>,
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on what `owner` leaves is kept. What somebody else left goes.
    pub fn open(&self, owner: u64) {
        let mut content = self.lock();
        if content.owner != Some(owner) {
            *content = Content { owner: Some(owner), kept: None };
        }
    }

    /// Keeps a stage, if the shelf is still open for `owner`.
    pub fn put(&self, owner: u64, key: StageKey, stage: Stage) {
        let mut content = self.lock();
        if content.owner == Some(owner) {
            content.kept = Some((key, stage));
        }
    }

    /// The stage that was kept, if it is the one that is needed. Another one goes: its memory is needed.
    pub fn take(&self, key: &StageKey) -> Option<Stage> {
        let kept = self.lock().kept.take();
        kept.filter(|(of, _)| of == key).map(|(_, stage)| stage)
    }

    /// Keeps nothing of `owner` any more.
    pub fn close(&self, owner: u64) {
        let mut content = self.lock();
        if content.owner == Some(owner) {
            *content = Content::default();
        }
    }

    /// Bytes of weights that are kept.
    pub fn bytes(&self) -> u64 {
        self.lock().kept.as_ref().map_or(0, |(_, stage)| stage.weight_bytes() as u64)
    }
}
