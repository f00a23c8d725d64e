//! Looks for workers that were lost, while the ring goes on without them.
//!
//! A thread of its own tries where they were, and hears who is announced. Who says welcome is pinged like a member and
//! kept until the next placement; nothing else is disturbed.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use swarm_link::{Discovery, DiscoveryEvent, Identity};
use swarm_wire::{Hello, NodeId, Role};

use crate::deadlines::LOOK_AGAIN;
use crate::error::NodeError;
use crate::room::{Circle, Member, follow, greet};
use crate::worker::spawn;

/// Addresses tried at most; a network may announce anything.
const PLACES_MAX: usize = 64;

/// Nodes and where they are.
pub(crate) type Here = Vec<(NodeId, Vec<SocketAddr>)>;

/// Who is looked for, and by whom.
pub(crate) struct Wanted {
    /// Where the lost ones were.
    pub places: Vec<Vec<SocketAddr>>,
    /// Members that are here: announcements of theirs are no news.
    pub here: Here,
    /// Look on the local network, too.
    pub discover: bool,
    pub identity: Identity,
    pub own: Hello,
    pub circle: Arc<Circle>,
}

/// A search in the background. Ends when dropped.
pub(crate) struct Lookout {
    found: Arc<Mutex<Vec<Member>>>,
    places: Vec<Vec<SocketAddr>>,
    here: Here,
    _stop: Sender<()>,
}

impl Lookout {
    /// Begins to look.
    pub fn start(wanted: Wanted) -> Result<Self, NodeError> {
        let found = Arc::<Mutex<Vec<Member>>>::default();
        let (stop, stopped) = bounded(0);
        let (places, here) = (wanted.places.clone(), wanted.here.clone());
        let search = Search { found: found.clone(), wanted };
        spawn("lookout", move || search.run(&stopped))?;
        Ok(Self { found, places, here, _stop: stop })
    }

    /// It looks for nodes at these places, beside those who are here.
    pub fn is_for(&self, places: &[Vec<SocketAddr>], here: &Here) -> bool {
        self.places == places && self.here == *here
    }

    /// Somebody is back.
    pub fn has_found(&self) -> bool {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.iter().any(|member| !member.pulse.is_lost())
    }

    /// Those who are back.
    pub fn take(&self) -> Vec<Member> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let mut members = std::mem::take(&mut *found);
        members.retain(|member| !member.pulse.is_lost());
        members
    }
}

struct Search {
    found: Arc<Mutex<Vec<Member>>>,
    wanted: Wanted,
}

impl Search {
    fn run(mut self, stopped: &Receiver<()>) {
        let count = self.wanted.places.len();
        // Without multicast the old places are all there is.
        let discovery = self
            .wanted
            .discover
            .then(|| Discovery::start(self.wanted.identity.instance()))
            .and_then(Result::ok);
        while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(LOOK_AGAIN) {
            if let Some(discovery) = &discovery {
                self.hear(discovery);
            }
            self.locked().retain(|member| !member.pulse.is_lost());
            for place in self.wanted.places.clone() {
                if self.locked().len() < count {
                    self.look(&place);
                }
            }
        }
        // Whoever was not taken is let go.
        self.locked().drain(..).for_each(|member| member.closer.close());
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Vec<Member>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers who is announced and is not here yet.
    fn hear(&mut self, discovery: &Discovery) {
        while let Ok(event) = discovery.events().try_recv() {
            if let DiscoveryEvent::Found(peer) = event
                && self.wanted.places.len() < PLACES_MAX
                && !self.wanted.places.contains(&peer.addresses)
                && !self.is_here(&peer.addresses)
            {
                self.wanted.places.push(peer.addresses);
            }
        }
    }

    fn is_here(&self, addresses: &[SocketAddr]) -> bool {
        self.wanted.here.iter().any(|(_, known)| known.iter().any(|address| addresses.contains(address)))
    }

    /// Dials one place. Nobody there is no news.
    fn look(&self, place: &[SocketAddr]) {
        let Wanted { identity, own, circle, here, .. } = &self.wanted;
        if self.locked().iter().any(|member| member.addresses.iter().any(|address| place.contains(address))) {
            return;
        }
        let Ok((member, receiver)) = greet(place, identity, own) else { return };
        let id = member.id();
        let known = here.iter().any(|(node, _)| *node == id) || self.locked().iter().any(|m| m.id() == id);
        if known || member.hello.role != Role::Worker || follow(&member, receiver, circle.clone()).is_err() {
            member.closer.close();
            return;
        }
        self.locked().push(member);
    }
}
