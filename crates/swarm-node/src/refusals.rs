//! Links that this node closed because of what came on them: the code that the other end is told, and the count.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use swarm_link::{LinkError, Sender};
use swarm_wire::{CloseCode, Closing, Epoch};

/// Links closed, by code.
#[derive(Default)]
pub(crate) struct Refusals([AtomicU64; CloseCode::ALL.len()]);

impl Refusals {
    pub fn count(&self, code: CloseCode) {
        if let Some(count) = self.0.get(usize::from(code.to_wire())) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts the code, and tells it on a data connection that is about to be closed.
    pub fn tell(&self, sender: &mut Sender, epoch: Epoch, code: CloseCode) {
        self.count(code);
        // Whoever does not hear it finds the link closed.
        let _ = sender.send(&[&Closing { epoch, code }.encode()]);
    }

    /// The codes that came up, with their counts.
    pub fn by_name(&self) -> BTreeMap<&'static str, u64> {
        let counts = CloseCode::ALL.iter().zip(&self.0);
        let counts = counts.map(|(code, count)| (code.name(), count.load(Ordering::Relaxed)));
        counts.filter(|&(_, count)| count > 0).collect()
    }
}

/// What the other end of a link is told when this ended it; `None` where it is not to blame.
pub(crate) fn link_code(error: &LinkError) -> Option<CloseCode> {
    match error {
        LinkError::MessageTooLong { .. } => Some(CloseCode::OverLimit),
        LinkError::Tampered { .. } => Some(CloseCode::Changed),
        LinkError::BadRecord { .. } => Some(CloseCode::Malformed),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_came_up_is_shown() {
        let refusals = Refusals::default();
        assert!(refusals.by_name().is_empty());
        [CloseCode::Order, CloseCode::NoPlace, CloseCode::Order]
            .iter()
            .for_each(|&code| refusals.count(code));
        assert_eq!(refusals.by_name(), BTreeMap::from([("order", 2), ("no_place", 1)]));
    }
}
