//! Keeping touch with the other nodes of the room.
//!
//! Each member that `search.rs` finds has one control connection; a thread of its own reads it, and one thread pings all
//! of them four times a second.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use swarm_link::{Closer, Identity, LinkError, LinkSettings, dial, shows_code};
use swarm_ring::{ClockOffset, Health, Heartbeat};
use swarm_wire::{CloseCode, Control, Epoch, Hello, NextHop, NodeId, Ping, Stats};

use crate::clock::now_us;
use crate::control::{self, ControlReceiver, ControlSender};
use crate::deadlines::{DEAD, HEARTBEAT, WELCOME};
use crate::error::{NodeError, chain};
use crate::outbox::OnSilence;
use crate::search::{Search, SearchEvent, WorkerSearch};
use crate::worker::spawn;

/// Every so many heartbeats a member is asked what its stage counted.
const STATS_EVERY: u64 = 4;
/// News that may wait to be read, each at most a control message; beyond it comes only that a member is lost.
const NOTES_MAX: usize = 256;
/// Members that want bytes and are not served yet; what a member wants twice is dropped.
const WANTS_MAX: usize = 64;
/// Said of a worker that shows a code while others are there already.
const UNPAIRED: &str =
    "it is not paired with this computer; `swarm-os pair CODE` with the code that it shows";

/// A member that wants bytes of the model, and the placement that it wants them for.
pub(crate) type Want = (NodeId, Epoch);

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
    pub in_ring: AtomicBool,
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
    /// Members that want bytes of the model, for a placement.
    wants: (Sender<Want>, Receiver<Want>),
}

#[derive(Clone)]
struct Pinged {
    node: NodeId,
    control: ControlSender,
    closer: Closer,
    pulse: Arc<Pulse>,
}

impl Circle {
    /// Nobody is pinged; news goes to `notes`.
    pub fn new(notes: Sender<Note>) -> Self {
        Self { pinged: Mutex::default(), data_links: Mutex::default(), notes, wants: bounded(WANTS_MAX) }
    }

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

    /// Who wants bytes of the model.
    pub fn wants(&self) -> Receiver<Want> {
        self.circle.wants.1.clone()
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
    let circle = Arc::new(Circle::new(note_sink));
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

/// Ring order must not depend on who answered first.
pub(crate) fn sort(members: &mut [Member]) {
    members.sort_by(|a, b| (&a.hello.name, a.hello.node_id).cmp(&(&b.hello.name, b.hello.node_id)));
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
                Ok(Control::Wanting { epoch }) => {
                    // One that asks more often than it can be served waits in vain.
                    let _ = circle.wants.0.try_send((node, epoch));
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
