//! Looks for workers that were lost, while the ring goes on without them.
//!
//! A thread of its own tries where they were, and those who are announced, side by side: what does not answer holds up
//! nobody. Who says welcome is pinged like a member and kept until the next placement; nothing else is disturbed.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use swarm_link::{Discovery, Identity, LinkError, Scope};
use swarm_wire::{Hello, NodeId, Role};

use crate::deadlines::LOOK_AGAIN;
use crate::error::NodeError;
use crate::room::{Circle, Member, follow, greet};
use crate::worker::spawn;

/// Places tried at a time; a network may announce anything.
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
    /// On these interfaces only; none: all.
    pub interfaces: Vec<String>,
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
        let search = Search { found: found.clone(), wanted, strangers: Mutex::default() };
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
    /// Those of other swarms, who need not be asked again.
    strangers: Mutex<Vec<Vec<SocketAddr>>>,
}

impl Search {
    fn run(self, stopped: &Receiver<()>) {
        let Wanted { discover, interfaces, identity, .. } = &self.wanted;
        let scope = Scope { interfaces: interfaces.clone(), address: None };
        // Without multicast the old places are all there is.
        let discovery =
            discover.then(|| Discovery::start_in(identity.instance(), scope)).and_then(Result::ok);
        while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(LOOK_AGAIN) {
            self.locked().retain(|member| !member.pulse.is_lost());
            if self.locked().len() >= self.wanted.places.len() {
                continue;
            }
            let places = self.places(discovery.as_ref());
            std::thread::scope(|scope| {
                for place in &places {
                    // One that finds no thread is tried again next time.
                    let look = || self.look(place);
                    let _ = std::thread::Builder::new().name("look".into()).spawn_scoped(scope, look);
                }
            });
        }
        // Whoever was not taken is let go.
        self.locked().drain(..).for_each(|member| member.closer.close());
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Vec<Member>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the lost ones were, and everybody who is announced and not here.
    fn places(&self, discovery: Option<&Discovery>) -> Vec<Vec<SocketAddr>> {
        let mut places = self.wanted.places.clone();
        let strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        for peer in discovery.map(Discovery::peers).unwrap_or_default() {
            let known = places.contains(&peer.addresses) || strangers.contains(&peer.addresses);
            if !known && !self.is_here(&peer.addresses) {
                places.push(peer.addresses);
            }
        }
        places.truncate(PLACES_MAX);
        places
    }

    fn is_here(&self, addresses: &[SocketAddr]) -> bool {
        self.wanted.here.iter().any(|(_, known)| known.iter().any(|address| addresses.contains(address)))
    }

    /// Dials one place. Nobody there is no news.
    fn look(&self, place: &[SocketAddr]) {
        let Wanted { identity, own, circle, here, places, .. } = &self.wanted;
        if self.locked().iter().any(|member| member.addresses.iter().any(|address| place.contains(address))) {
            return;
        }
        let (member, receiver) = match greet(place, identity, own) {
            Ok(met) => met,
            Err(NodeError::Link(error)) if matches!(*error, LinkError::Refused { .. }) => {
                let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
                if strangers.len() < PLACES_MAX {
                    strangers.push(place.to_vec());
                }
                return;
            }
            Err(_) => return,
        };
        let id = member.id();
        // Held until it is among them, so that the same node at two places is there once.
        let mut found = self.locked();
        let known = here.iter().any(|(node, _)| *node == id) || found.iter().any(|m| m.id() == id);
        if known
            || found.len() >= places.len()
            || member.hello.role != Role::Worker
            || follow(&member, receiver, circle.clone()).is_err()
        {
            member.closer.close();
            return;
        }
        found.push(member);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Duration;

    use super::*;
    use crate::control;
    use crate::worker::{Worker, WorkerConfig};

    #[test]
    fn who_is_back_is_found_among_many_who_say_nothing() {
        let identity = Identity::ephemeral(swarm_link::SwarmSecret::random().unwrap()).unwrap();
        let config = WorkerConfig { local_only: true, name: "back".into(), ..WorkerConfig::default() };
        let worker = Worker::start(config, identity.another_instance().unwrap(), Arc::new(|_| {})).unwrap();
        // They take connections and never say a word.
        let silent: Vec<TcpListener> = (0..20).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let mut places: Vec<Vec<SocketAddr>> =
            silent.iter().map(|listener| vec![listener.local_addr().unwrap()]).collect();
        // Its place twice, and once more by another way.
        let address = SocketAddr::from(([127, 0, 0, 1], worker.port()));
        places.extend([vec![address], vec![address, silent[0].local_addr().unwrap()]]);
        let id = control::wire_id(identity.node_id());
        let wanted = Wanted {
            places,
            here: Vec::new(),
            discover: false,
            interfaces: Vec::new(),
            own: control::hello(id, "node", Role::Coordinator, 1, 1, None),
            identity,
            circle: Arc::new(Circle::new(crossbeam_channel::unbounded().0)),
        };
        let lookout = Lookout::start(wanted).unwrap();
        let began = std::time::Instant::now();
        while !lookout.has_found() {
            // One after the other would take a minute.
            assert!(began.elapsed() < Duration::from_secs(15));
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(lookout.take().len(), 1);
    }
}
