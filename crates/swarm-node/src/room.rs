//! Finding the other nodes of the room and keeping touch with them.
//!
//! Members are found by mDNS, by `--peer`, and at the addresses where they were last reached. Each gets one control
//! connection; a thread of its own reads it, and one thread pings all of them four times a second.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use swarm_link::{
    Closer, Discovery, DiscoveryEvent, Identity, InstanceId, LinkError, LinkSettings, PeerFound, Remembered,
    Scope, dial, shows_code,
};
use swarm_ring::{ClockOffset, Health, Heartbeat};
use swarm_wire::{CloseCode, Control, Hello, NextHop, NodeId, Ping, Role, Stats};

use crate::clock::now_us;
use crate::control::{self, ControlReceiver, ControlSender};
use crate::deadlines::{DEAD, HEARTBEAT, SETTLE, WELCOME};
use crate::error::{NodeError, chain};
use crate::outbox::OnSilence;
use crate::worker::spawn;

/// Every so many heartbeats a member is asked what its stage counted.
const STATS_EVERY: u64 = 4;
/// News that may wait to be read, each at most a control message; beyond it comes only that a member is lost.
const NOTES_MAX: usize = 256;
/// Said of a worker that shows a code while others are there already.
const UNPAIRED: &str =
    "it is not paired with this computer; `swarm-os pair --join CODE` with the code that it shows";

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

/// A worker with its control connection.
pub(crate) struct Member {
    pub name: String,
    /// The static key of its machine.
    pub key: [u8; 32],
    pub hello: Hello,
    /// Where it can be dialled, best first.
    pub addresses: Vec<SocketAddr>,
    pub control: ControlSender,
    pub closer: Closer,
    pub pulse: Arc<Pulse>,
}

/// What heartbeats tell of a member.
#[derive(Default)]
pub(crate) struct Pulse {
    pub clock: Mutex<ClockOffset>,
    heartbeat: Mutex<Heartbeat>,
    lost: AtomicBool,
    /// The ring's links end with this member.
    in_ring: AtomicBool,
    /// What its stage counted, as it said last; and the question that is open.
    pub stats: Mutex<Option<Stats>>,
    asked: AtomicU64,
}

impl Pulse {
    /// The member is gone: it said so, its link closed, or it did not answer.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Heartbeats went unanswered for a second.
    pub fn is_suspect(&self) -> bool {
        lock(&self.heartbeat).health() >= Health::Suspect
    }
}

/// Who is pinged, and what ends with any of them.
pub(crate) struct Circle {
    pinged: Mutex<Vec<Pinged>>,
    /// The coordinator's data links. A thread may wait in a send on one of them, for a worker that waits itself for
    /// the member that died, so all of them end with any member.
    data_links: Mutex<Vec<Closer>>,
    notes: Sender<Note>,
}

#[derive(Clone)]
struct Pinged {
    node: NodeId,
    control: ControlSender,
    closer: Closer,
    pulse: Arc<Pulse>,
}

impl Circle {
    /// Tells why a member is lost, once, and ends the ring's links: in this order, so that who finds a link closed
    /// finds the reason as well.
    fn lose(&self, node: NodeId, pulse: &Pulse, why: String) {
        if !pulse.lost.swap(true, Ordering::Relaxed) {
            let _ = self.notes.send(Note { node, what: NoteKind::Lost(why) });
            if pulse.in_ring.load(Ordering::Relaxed) {
                self.close_data_links();
            }
        }
    }

    fn close_data_links(&self) {
        lock(&self.data_links).drain(..).for_each(|link| link.close());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// News of a member.
pub(crate) struct Note {
    pub node: NodeId,
    pub what: NoteKind,
}

pub(crate) enum NoteKind {
    Says(Box<Control>),
    Lost(String),
}

/// The members found, and the news of them.
pub(crate) struct Room {
    pub members: Vec<Member>,
    pub notes: Receiver<Note>,
    circle: Arc<Circle>,
    /// Ways between members that broke while both were well, and were not measured since.
    broken: Mutex<BTreeSet<(NodeId, NodeId)>>,
    _stop_pings: Sender<()>,
}

impl Room {
    /// Gives a member up that is there and of no use.
    pub fn give_up(&self, member: &Member, why: String) {
        self.circle.lose(member.id(), &member.pulse, why);
        member.closer.close();
    }

    /// The way from a node to the `other`-th member broke: the next placement does without it.
    pub fn note_broken(&self, from: NodeId, other: usize) {
        let to = self.members.get(other).map(Member::id);
        lock(&self.broken).extend(to.map(|to| (from, to)));
    }

    /// The way between two members is not to be used, unless a measurement says that it is well.
    pub fn is_broken(&self, from: NodeId, to: NodeId, measured: bool) -> bool {
        let mut broken = lock(&self.broken);
        if measured {
            broken.remove(&(from, to));
        }
        broken.contains(&(from, to))
    }

    /// Remembers a data link of the ring, which ends with any member of it.
    pub fn add_data_link(&self, closer: Closer) {
        lock(&self.circle.data_links).push(closer);
    }

    /// Keeps these members, in this order, and lets the others go. Gives where those are.
    pub fn keep(&mut self, order: &[NodeId]) -> Vec<Vec<SocketAddr>> {
        let others = self.members.iter().filter(|member| !order.contains(&member.id()));
        let (ids, places): (Vec<NodeId>, _) =
            others.map(|member| (member.id(), member.addresses.clone())).unzip();
        self.dismiss(&ids);
        self.members.sort_by_key(|member| order.iter().position(|id| *id == member.id()));
        places
    }

    /// Ends the ring's data links; the members stay.
    pub fn close_data_links(&self) {
        self.circle.close_data_links();
    }

    /// What to do when `member` does not acknowledge what it is sent: it is lost.
    pub fn on_silence(&self, member: &Member) -> OnSilence {
        let (circle, pulse, node) = (self.circle.clone(), member.pulse.clone(), member.id());
        let closer = member.closer.clone();
        Box::new(move |why| {
            circle.lose(node, &pulse, format!("it {why}"));
            closer.close();
        })
    }

    /// Lets go of members that are lost, and gives them; what the others said of an earlier placement is forgotten.
    pub fn without_lost(&mut self) -> Vec<Member> {
        let (lost, here) = std::mem::take(&mut self.members).into_iter().partition(|m| m.pulse.is_lost());
        self.members = here;
        lock(&self.circle.pinged).retain(|pinged| !pinged.pulse.is_lost());
        while self.notes.try_recv().is_ok() {}
        lost
    }

    /// Takes in newcomers, each at its place.
    pub fn take_in(&mut self, newcomers: Vec<Member>) {
        newcomers.iter().for_each(|member| member.pulse.in_ring.store(true, Ordering::Relaxed));
        self.members.extend(newcomers);
        sort(&mut self.members);
    }

    /// Lets these go again, with a goodbye. True when any of them was here.
    pub fn dismiss(&mut self, guests: &[NodeId]) -> bool {
        let (gone, here): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.members).into_iter().partition(|member| guests.contains(&member.id()));
        self.members = here;
        lock(&self.circle.pinged).retain(|pinged| !guests.contains(&pinged.node));
        for member in &gone {
            member.pulse.in_ring.store(false, Ordering::Relaxed);
            let _ = member.control.send(&Control::Bye);
            member.closer.close();
        }
        !gone.is_empty()
    }

    /// Tells every member to forget its stage and the ring's links to end. Who is lost does not hear it.
    pub fn release(&self, reason: &str) {
        self.close_data_links();
        for member in &self.members {
            let _ = member.control.send(&Control::Release { reason: reason.to_owned() });
        }
    }

    pub fn circle(&self) -> Arc<Circle> {
        self.circle.clone()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.close_data_links();
        for member in &self.members {
            // A goodbye, so that the worker does not take this for a fault.
            let _ = member.control.send(&Control::Bye);
            member.closer.close();
        }
    }
}

impl Member {
    pub fn id(&self) -> NodeId {
        self.hello.node_id
    }

    /// It is on this computer.
    pub fn is_local(&self) -> bool {
        self.addresses.first().is_some_and(|address| address.ip().is_loopback())
    }

    /// The addresses of `other` as this member may reach it. Loopback addresses lead from another computer to itself,
    /// so they are named only between two nodes that were both reached by loopback.
    pub fn way_to(&self, other: &Self) -> NextHop {
        let mut addresses = other.addresses.clone();
        if !(self.is_local() && other.is_local())
            && addresses.iter().any(|address| !address.ip().is_loopback())
        {
            addresses.retain(|address| !address.ip().is_loopback());
        }
        addresses.truncate(swarm_wire::ADDRESSES_MAX);
        NextHop { node_id: other.id(), addresses }
    }

    /// Shortest round trip of the heartbeats lately.
    pub fn round_trip_us(&self) -> Option<u64> {
        lock(&self.pulse.clock).round_trip_us()
    }

    pub fn offset_us(&self) -> Option<i64> {
        lock(&self.pulse.clock).offset_us()
    }
}

/// Looks for workers as `search` says.
pub(crate) fn gather(
    search: &WorkerSearch,
    identity: &Identity,
    own: &Hello,
    state_dir: Option<&std::path::Path>,
    tell: &dyn Fn(SearchEvent),
) -> Result<Room, NodeError> {
    let (note_sink, notes) = unbounded();
    let circle =
        Arc::new(Circle { pinged: Mutex::default(), data_links: Mutex::default(), notes: note_sink });
    let (stop, stopped) = bounded(0);
    let mut room = Room {
        members: Vec::new(),
        notes,
        circle: circle.clone(),
        broken: Mutex::default(),
        _stop_pings: stop,
    };
    if search.at_most > 0 && (search.discover || !search.peers.is_empty()) {
        // A worker that is not pinged takes its coordinator for dead, and others may be looked for much longer.
        start_pings(circle.clone(), stopped)?;
        let mut search_now = Search::new(search, identity, own, circle, tell);
        room.members = search_now.run(state_dir);
        let showing = std::mem::take(&mut search_now.showing);
        if search.pairing && room.members.len() < search.at_least.max(1) && !showing.is_empty() {
            return Err(NodeError::Unpaired { showing });
        }
        for addresses in showing.iter().filter_map(|addresses| addresses.first()) {
            tell(SearchEvent::Unusable { address: addresses.to_string(), why: UNPAIRED.into() });
        }
    }
    if room.members.len() < search.at_least {
        return Err(NodeError::NoWorkers(nobody(room.members.len(), search)));
    }
    Ok(room)
}

fn nobody(found: usize, search: &WorkerSearch) -> String {
    let secs = search.within.as_secs_f32();
    let start = match found {
        0 => format!("no worker was found within {secs:.0} s"),
        n => format!("only {n} of {} workers were found within {secs:.0} s", search.at_least),
    };
    format!(
        "{start}; check that `swarm-os worker` runs on the other computer, that both are on the same network, that \
         its firewall lets the port it prints and UDP 5353 through, that both are paired or have the \
         same swarm secret (`swarm-os pair` there and here); where multicast is blocked, use --peer HOST:PORT"
    )
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

struct Search<'a> {
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
    showing: Vec<Vec<SocketAddr>>,
    showing_instances: Vec<InstanceId>,
    /// Workers that were announced and are being dialled, or are here: other addresses of theirs are no news.
    busy: Vec<InstanceId>,
    pending: usize,
}

impl<'a> Search<'a> {
    fn new(
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

    fn run(&mut self, state_dir: Option<&std::path::Path>) -> Vec<Member> {
        let deadline = Instant::now() + self.search.within;
        (self.tell)(SearchEvent::Searching { within: self.search.within });
        for addresses in self.search.peers.clone() {
            self.try_peer(addresses.into());
        }
        let discovery = self.search.discover.then(|| {
            let scope = Scope { interfaces: self.search.interfaces.clone(), address: None };
            Discovery::start_in(self.identity.instance(), scope)
        });
        let discovery = match discovery {
            Some(Err(error)) => {
                (self.tell)(SearchEvent::DiscoveryUnavailable { why: chain(&error) });
                None
            }
            other => other.and_then(Result::ok),
        };
        let mut remembered = state_dir.map(Remembered::load);
        if let (true, Some(remembered)) = (self.search.discover, &remembered) {
            self.remembered = remembered.addresses();
            self.remembered.clone().into_iter().for_each(|address| self.try_peer(vec![address].into()));
        }
        let silent = crossbeam_channel::never();
        let sightings = discovery.as_ref().map_or(&silent, Discovery::events);
        let answers = self.candidates.1.clone();
        let mut members: Vec<Member> = Vec::new();
        let mut until = deadline;
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
                default(until.saturating_duration_since(Instant::now())) => {}
            }
        }
        sort(&mut members);
        members
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
        let (Some(discovery), Some(instance)) = (discovery, peer.instance) else { return };
        self.busy.retain(|busy| *busy != instance);
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

/// Ring order must not depend on who answered first.
fn sort(members: &mut [Member]) {
    members.sort_by(|a, b| (&a.hello.name, a.hello.node_id).cmp(&(&b.hello.name, b.hello.node_id)));
}

fn unreachable(error: &NodeError) -> bool {
    matches!(error, NodeError::Link(error) if matches!(**error, LinkError::Unreachable { .. }))
}

fn own_address(error: &NodeError) -> bool {
    matches!(error, NodeError::Link(error) if matches!(**error, LinkError::OwnAddress { .. }))
}

/// Connects to a peer, says hello, and waits for its welcome.
pub(crate) fn greet(
    addresses: &[SocketAddr],
    identity: &Identity,
    own: &Hello,
) -> Result<(Member, ControlReceiver), NodeError> {
    let connection = match dial(addresses, identity, &LinkSettings::default(), WELCOME) {
        Err(LinkError::Refused { address }) if shows_code(&[address], WELCOME).unwrap_or(false) => {
            return Err(NodeError::Unpaired { showing: vec![addresses.to_vec()] });
        }
        other => other?,
    };
    let (peer, control, mut receiver, closer) = control::split(connection);
    let unknown = peer.address.to_string();
    let lost = |error: &dyn std::error::Error| NodeError::Lost { node: unknown.clone(), what: chain(error) };
    control.send(&Control::Hello(own.clone())).map_err(|error| lost(&error))?;
    let hello = match receiver.receive(Some(WELCOME)).map_err(|error| lost(&error))? {
        Control::Welcome(hello) => hello,
        Control::Refused(refused) => {
            let reason = crate::error::printable(&refused.reason);
            return Err(NodeError::Refused { node: unknown, blame: refused.blame, reason });
        }
        _ => {
            let what = "it did not say welcome".to_owned();
            return Err(NodeError::BadPeer { node: unknown, what, code: CloseCode::Unexpected });
        }
    };
    control::check_hello(&peer, &hello)?;
    // A name that cannot be written down is asked for at the next meeting.
    let _ = identity.note_met(&peer.static_key, &hello.name);
    // The address that answered first, then the others the node announced.
    let mut known = vec![peer.address];
    known.extend(addresses.iter().copied().filter(|address| *address != peer.address));
    let name = control::node_name(&hello.name, &hello.node_id);
    let key = peer.static_key;
    Ok((Member { name, key, hello, addresses: known, control, closer, pulse: Arc::default() }, receiver))
}

/// Reads a member's control connection until it ends, and has it pinged meanwhile.
pub(crate) fn follow(
    member: &Member,
    mut receiver: ControlReceiver,
    circle: Arc<Circle>,
) -> Result<(), NodeError> {
    let (node, pulse) = (member.id(), member.pulse.clone());
    let (control, closer) = (member.control.clone(), member.closer.clone());
    let pinged = Pinged { node, control, closer: closer.clone(), pulse: pulse.clone() };
    // The first ping does not wait for the next heartbeat: short answers are measured, too.
    let _ = pinged.control.send(&Control::Ping(Ping { id: 0, sent_us: now_us() }));
    lock(&circle.pinged).push(pinged);
    spawn("control", move || {
        let why = loop {
            match receiver.receive(None) {
                Ok(Control::Pong(pong)) => {
                    lock(&pulse.heartbeat).pong();
                    lock(&pulse.clock).add(pong.sent_us, pong.node_us, now_us());
                }
                // The answer to the question that is open; nobody else reads it.
                Ok(Control::Stats(stats))
                    if stats.id > 0 && pulse.asked.swap(0, Ordering::Relaxed) == stats.id =>
                {
                    *lock(&pulse.stats) = Some(stats);
                }
                // The next one says more, and nobody reads while this node loads its own layers.
                Ok(Control::Loading(_)) if circle.notes.len() > NOTES_MAX / 2 => {}
                Ok(_) if circle.notes.len() > NOTES_MAX => {
                    break "it says more than it was asked for".to_owned();
                }
                Ok(Control::Bye) => break "it said goodbye".to_owned(),
                Ok(message) => {
                    if circle.notes.send(Note { node, what: NoteKind::Says(Box::new(message)) }).is_err() {
                        return;
                    }
                }
                Err(error) => break chain(&error),
            }
        };
        circle.lose(node, &pulse, why);
        closer.close();
    })
}

/// Pings everybody until the room is closed; who does not answer is given up, and its link closed.
fn start_pings(circle: Arc<Circle>, stopped: Receiver<()>) -> Result<(), NodeError> {
    spawn("heartbeat", move || {
        let mut id = 0;
        loop {
            id += 1;
            let pinged = lock(&circle.pinged).clone();
            for member in pinged {
                let health = lock(&member.pulse.heartbeat).ping();
                if health == Health::Dead {
                    let silent_ms = DEAD.as_millis();
                    circle.lose(member.node, &member.pulse, format!("it did not answer for {silent_ms} ms"));
                    member.closer.close();
                }
                // A link that is broken is reported by its reading thread.
                let _ = member.control.send(&Control::Ping(Ping { id, sent_us: now_us() }));
                if id.is_multiple_of(STATS_EVERY) {
                    member.pulse.asked.store(id, Ordering::Relaxed);
                    let _ = member.control.send(&Control::StatsRequest { id });
                }
            }
            match stopped.recv_timeout(HEARTBEAT) {
                Err(crossbeam_channel::RecvTimeoutError::Timeout) => {}
                _ => return,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_not_there_is_tried_again_when_it_is_announced() {
        let secret = swarm_link::SwarmSecret::random().unwrap();
        let identity = Identity::ephemeral(secret).unwrap();
        let id = control::wire_id(identity.node_id());
        let own = control::hello(id, "node", Role::Coordinator, 1, 1, None);
        let circle = Circle { pinged: Mutex::default(), data_links: Mutex::default(), notes: unbounded().0 };
        let search = WorkerSearch::default();
        let mut search = Search::new(&search, &identity, &own, Arc::new(circle), &|_| {});
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        for _ in 0..2 {
            search.try_peer(vec![nobody].into());
            search.try_peer(vec![nobody].into());
            assert_eq!(search.tried.len(), 1);
            let answer = search.candidates.1.recv_timeout(Duration::from_secs(5)).unwrap();
            let Err((peer, error)) = answer else { panic!("somebody listens there") };
            search.missed(&peer, &error, None);
            assert!(search.tried.is_empty(), "{error}");
        }
    }
}
