//! Looking for workers: by mDNS, by `--peer`, and at the addresses where they were last reached.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use swarm_link::{Discovery, DiscoveryEvent, Identity, InstanceId, LinkError, PeerFound, Remembered, Scope};
use swarm_wire::{Hello, Role};

use crate::control::ControlReceiver;
use crate::deadlines::{LOOK_AGAIN, SETTLE};
use crate::error::{NodeError, chain};
use crate::room::{Circle, Member, follow, greet, sort};
use crate::worker::spawn;

/// Whom to look for, and for how long.
#[derive(Clone, Debug, Default)]
pub struct WorkerSearch {
    /// Addresses to try, each peer's own list.
    pub peers: Vec<Vec<SocketAddr>>,
    /// Look for workers on the local network, and where they were last reached.
    pub discover: bool,
    /// The network interfaces to look on, by name; all of them by default.
    pub interfaces: Vec<String>,
    /// Fewer workers than this is an error.
    pub at_least: usize,
    /// More workers than this are left alone.
    pub at_most: usize,
    /// How long to look.
    pub within: Duration,
    /// Finding only workers that show a pairing code is [`NodeError::Unpaired`], so that somebody can type it.
    pub pairing: bool,
}

/// What the search reports while it goes on.
#[derive(Clone, Debug)]
pub enum SearchEvent {
    /// Looking on the local network.
    Searching { within: Duration },
    /// mDNS does not work here; peers by address still do.
    DiscoveryUnavailable { why: String },
    /// A worker said welcome.
    Found { name: String, address: SocketAddr },
    /// Somebody was there but cannot be used.
    Unusable { address: String, why: String },
}

type Candidate = Result<(Member, ControlReceiver), (Peer, NodeError)>;

/// Somebody to try: all addresses of one node, and its name on the network if it was announced there.
#[derive(Clone)]
struct Peer {
    addresses: Vec<SocketAddr>,
    instance: Option<InstanceId>,
}

impl From<Vec<SocketAddr>> for Peer {
    fn from(addresses: Vec<SocketAddr>) -> Self {
        Self { addresses, instance: None }
    }
}

/// One search.
pub(crate) struct Search<'a> {
    search: &'a WorkerSearch,
    identity: &'a Identity,
    own: &'a Hello,
    circle: Arc<Circle>,
    tell: &'a dyn Fn(SearchEvent),
    candidates: (Sender<Candidate>, Receiver<Candidate>),
    tried: Vec<Vec<SocketAddr>>,
    /// Where workers were once: that nobody is there any more is no news.
    remembered: Vec<SocketAddr>,
    /// Workers that show a pairing code, each once.
    pub showing: Vec<Vec<SocketAddr>>,
    showing_instances: Vec<InstanceId>,
    /// Workers that were announced and are being dialled, or are here: other addresses of theirs are no news.
    busy: Vec<InstanceId>,
    pending: usize,
}

impl<'a> Search<'a> {
    pub fn new(
        search: &'a WorkerSearch,
        identity: &'a Identity,
        own: &'a Hello,
        circle: Arc<Circle>,
        tell: &'a dyn Fn(SearchEvent),
    ) -> Self {
        let (candidates, tried, remembered) = (unbounded(), Vec::new(), Vec::new());
        let (showing, showing_instances) = (Vec::new(), Vec::new());
        Self {
            search,
            identity,
            own,
            circle,
            tell,
            candidates,
            tried,
            remembered,
            showing,
            showing_instances,
            busy: Vec::new(),
            pending: 0,
        }
    }

    /// Looks as it was told to, and gives the workers in the order of the ring.
    pub fn run(&mut self, state_dir: Option<&std::path::Path>) -> Vec<Member> {
        let deadline = Instant::now() + self.search.within;
        (self.tell)(SearchEvent::Searching { within: self.search.within });
        for addresses in self.search.peers.clone() {
            self.try_peer(addresses.into());
        }
        let discovery = if self.search.discover { self.discovery() } else { None };
        let mut remembered = state_dir.map(Remembered::load);
        if let (true, Some(remembered)) = (self.search.discover, &remembered) {
            self.remembered = remembered.addresses();
            self.try_remembered();
        }
        let silent = crossbeam_channel::never();
        let sightings = discovery.as_ref().map_or(&silent, Discovery::events);
        let answers = self.candidates.1.clone();
        let mut members: Vec<Member> = Vec::new();
        let (mut until, mut again) = (deadline, Instant::now() + LOOK_AGAIN);
        while members.len() < self.search.at_most && Instant::now() < until {
            // Without discovery there is nobody to wait for but those already dialled.
            if discovery.is_none() && self.pending == 0 {
                break;
            }
            crossbeam_channel::select! {
                recv(sightings) -> event => match event {
                    Ok(DiscoveryEvent::Found(PeerFound { instance, addresses, .. })) => {
                        self.try_peer(Peer { addresses, instance: Some(instance) });
                    }
                    Ok(DiscoveryEvent::Unavailable { why, .. }) => {
                        (self.tell)(SearchEvent::DiscoveryUnavailable { why });
                    }
                    Ok(_) => {}
                    Err(_) => break,
                },
                recv(answers) -> answer => if let Ok(answer) = answer {
                    self.pending -= 1;
                    if let Err((peer, error)) = &answer {
                        self.missed(peer, error, discovery.as_ref());
                        if self.shows_code(peer, error) && members.is_empty() && self.search.pairing {
                            until = until.min(Instant::now() + SETTLE);
                        }
                    }
                    if let Some(member) = self.take(answer, &members) {
                        if let Some(remembered) = &mut remembered && let Some(&address) = member.addresses.first() {
                            // Losing the list costs nothing but a search next time.
                            let _ = remembered.note_reached(address, &member.key);
                        }
                        members.push(member);
                        if members.len() >= self.search.at_least {
                            until = deadline.min(Instant::now() + SETTLE);
                        }
                    }
                },
                default(until.min(again).saturating_duration_since(Instant::now())) => {}
            }
            if Instant::now() >= again {
                again = Instant::now() + LOOK_AGAIN;
                self.try_remembered();
            }
        }
        sort(&mut members);
        members
    }

    /// mDNS, where it works.
    fn discovery(&self) -> Option<Discovery> {
        let scope = Scope { interfaces: self.search.interfaces.clone(), address: None };
        let started = Discovery::start_in(self.identity.instance(), scope);
        started.inspect_err(|error| (self.tell)(SearchEvent::DiscoveryUnavailable { why: chain(error) })).ok()
    }

    /// Where nobody was a moment ago, a laptop may have been opened since, and no announcement may ever come.
    fn try_remembered(&mut self) {
        self.remembered.clone().into_iter().for_each(|address| self.try_peer(vec![address].into()));
    }

    /// Dials and greets on a thread of its own, once per address list.
    fn try_peer(&mut self, peer: Peer) {
        let busy = peer.instance.is_some_and(|instance| self.busy.contains(&instance));
        let tried = busy || self.tried.contains(&peer.addresses);
        if peer.addresses.is_empty() || tried || self.tried.len() > 256 {
            return;
        }
        self.tried.push(peer.addresses.clone());
        let (identity, own, answers) = (self.identity.clone(), self.own.clone(), self.candidates.0.clone());
        let instance = peer.instance;
        let body = move || {
            let _ = answers.send(greet(&peer.addresses, &identity, &own).map_err(|error| (peer, error)));
        };
        if spawn("greet", body).is_ok() {
            self.busy.extend(instance);
            self.pending += 1;
        }
    }

    /// Nobody was there now. A worker may still come to these addresses, and one that was killed could not say
    /// goodbye: whether it is there is asked on the network.
    fn missed(&mut self, peer: &Peer, error: &NodeError, discovery: Option<&Discovery>) {
        if !unreachable(error) {
            return;
        }
        self.tried.retain(|addresses| *addresses != peer.addresses);
        self.busy.retain(|busy| Some(*busy) != peer.instance);
        let (Some(discovery), Some(instance)) = (discovery, peer.instance) else { return };
        discovery.doubt(instance);
        // It may have been announced elsewhere meanwhile.
        let newest = discovery.peers().into_iter().find(|found| found.instance == instance);
        if let Some(found) = newest.filter(|found| found.addresses != peer.addresses) {
            self.try_peer(Peer { addresses: found.addresses, instance: Some(instance) });
        }
    }

    /// Notes a worker that shows a code, once however many addresses it has; whether it is one.
    fn shows_code(&mut self, peer: &Peer, error: &NodeError) -> bool {
        if !matches!(error, NodeError::Unpaired { .. }) {
            return false;
        }
        // A code that is typed at one machine twice costs two of its tries.
        let same = peer.instance.is_some_and(|instance| self.showing_instances.contains(&instance));
        let shared = |list: &Vec<SocketAddr>| list.iter().any(|address| peer.addresses.contains(address));
        if !same && !self.showing.iter().any(shared) {
            self.showing_instances.extend(peer.instance);
            self.showing.push(peer.addresses.clone());
        }
        true
    }

    fn is_remembered(&self, peer: &Peer) -> bool {
        matches!(peer.addresses[..], [only] if self.remembered.contains(&only))
    }

    fn take(&self, answer: Candidate, members: &[Member]) -> Option<Member> {
        let (member, receiver) = match answer {
            Ok(found) => found,
            // Ourselves, or an address of old that nobody listens at any more: no news to anyone.
            Err((peer, error)) if own_address(&error) || unreachable(&error) && self.is_remembered(&peer) => {
                return None;
            }
            // Told at the end, when it is known whether there are others.
            Err((_, NodeError::Unpaired { .. })) => return None,
            Err((peer, error)) => {
                let address = peer.addresses.first().map(ToString::to_string).unwrap_or_default();
                (self.tell)(SearchEvent::Unusable { address, why: error.chain() });
                return None;
            }
        };
        if member.hello.role != Role::Worker || members.iter().any(|known| known.id() == member.id()) {
            return None;
        }
        member.pulse.in_ring.store(true, Ordering::Relaxed);
        if let Err(error) = follow(&member, receiver, self.circle.clone()) {
            (self.tell)(SearchEvent::Unusable { address: member.name, why: error.chain() });
            return None;
        }
        if let Some(&address) = member.addresses.first() {
            (self.tell)(SearchEvent::Found { name: member.name.clone(), address });
        }
        Some(member)
    }
}

fn unreachable(error: &NodeError) -> bool {
    matches!(error, NodeError::Link(error) if matches!(**error, LinkError::Unreachable { .. }))
}

fn own_address(error: &NodeError) -> bool {
    matches!(error, NodeError::Link(error) if matches!(**error, LinkError::OwnAddress { .. }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control;

    /// Calls `body` with a search that nobody answers, and an address where nobody is.
    fn searching(body: impl FnOnce(Search<'_>, SocketAddr)) {
        let secret = swarm_link::SwarmSecret::random().unwrap();
        let identity = Identity::ephemeral(secret).unwrap();
        let id = control::wire_id(identity.node_id());
        let own = control::hello(id, "node", Role::Coordinator, 1, 1, None);
        let (circle, search) = (Circle::new(unbounded().0), WorkerSearch::default());
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        body(Search::new(&search, &identity, &own, Arc::new(circle), &|_| {}), nobody);
    }

    fn next_miss(search: &mut Search<'_>) {
        let answer = search.candidates.1.recv_timeout(Duration::from_secs(5)).unwrap();
        let Err((peer, error)) = answer else { panic!("somebody listens there") };
        search.missed(&peer, &error, None);
        assert!(search.tried.is_empty(), "{error}");
    }

    #[test]
    fn who_is_announced_with_more_addresses_is_dialled_once_at_a_time() {
        searching(|mut search, nobody| {
            let instance = Some(InstanceId::from_bytes([1; 16]));
            let other = SocketAddr::new(nobody.ip(), 9);
            for _ in 0..2 {
                search.try_peer(Peer { addresses: vec![nobody], instance });
                search.try_peer(Peer { addresses: vec![nobody, other], instance });
                assert_eq!((search.tried.len(), search.pending), (1, 1));
                next_miss(&mut search);
                search.pending -= 1;
            }
        });
    }

    #[test]
    fn where_nobody_was_is_tried_again_if_somebody_was_there_once() {
        searching(|mut search, nobody| {
            search.remembered = vec![nobody];
            for _ in 0..2 {
                search.try_remembered();
                search.try_remembered();
                assert_eq!(search.tried.len(), 1);
                next_miss(&mut search);
            }
        });
    }

    #[test]
    fn who_was_not_there_is_tried_again_when_it_is_announced() {
        searching(|mut search, nobody| {
            for _ in 0..2 {
                search.try_peer(vec![nobody].into());
                search.try_peer(vec![nobody].into());
                assert_eq!(search.tried.len(), 1);
                next_miss(&mut search);
            }
        });
    }
}
