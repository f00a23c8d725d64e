//! Weights that stay from one placement to the next: a node reads only the layers that it did not have.

use std::sync::{Mutex, MutexGuard, PoisonError};

use swarm_kernels::Quant;
use swarm_model::Kept;

/// Whose weights a coordinator's own shelf is for.
pub(crate) const OWN: u64 = 0;

/// What makes two layers of one number the same, whatever ring they are part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeldModel {
    pub fingerprint: [u8; 32],
    pub quant: Option<Quant>,
}

/// Room for what one stage leaves. Opened for an owner; what another one leaves, or the same one after it has gone, is
/// not kept.
#[derive(Default)]
pub(crate) struct Shelf(Mutex<Content>);

#[derive(Default)]
struct Content {
    owner: Option<u64>,
    kept: Option<(HeldModel, Kept)>,
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

    /// Keeps weights of `model`, if the shelf is still open for `owner`.
    pub fn put(&self, owner: u64, model: HeldModel, kept: Kept) {
        let mut content = self.lock();
        if content.owner == Some(owner) {
            content.kept = Some((model, kept));
        }
    }

    /// What was kept of `model`. Weights of another one go: their memory is needed.
    pub fn take(&self, model: &HeldModel) -> Kept {
        let kept = self.lock().kept.take();
        kept.filter(|(of, _)| of == model).map(|(_, kept)| kept).unwrap_or_default()
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
        self.lock().kept.as_ref().map_or(0, |(_, kept)| kept.weight_bytes() as u64)
    }
}
