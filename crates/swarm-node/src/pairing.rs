//! First meetings and farewells of machines: finding those that show a code, showing one, and telling members of a new
//! secret. What pairing is and proves is `swarm-link`'s.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use swarm_link::{
    Discovery, DiscoveryEvent, Identity, InstanceId, LinkSettings, Listener, PairCode, PairError, Paired,
    PairingDesk, PairingEvent, shows_code, tell_member,
};

use crate::deadlines::{MEMBERS_LOOK, SETTLE, WELCOME};
use crate::error::NodeError;
use crate::worker::{Shared, WorkerEvent, spawn};

/// All addresses of one machine.
pub type Addresses = Vec<SocketAddr>;

/// Finds machines that show a code now, at `peers` and, if told to, on the local network. Returns when none came for a
/// while after the first, or after `within`.
///
/// # Errors
/// [`NodeError::System`] when no thread can be started. Nobody found is an empty list.
pub fn find_showing(
    identity: &Identity,
    peers: &[Addresses],
    discover: bool,
    within: Duration,
) -> Result<Vec<Addresses>, NodeError> {
    let mut showing: Vec<(Option<InstanceId>, Addresses)> = Vec::new();
    visit(
        identity,
        peers,
        discover,
        within,
        |addresses| shows_code(addresses, WELCOME),
        |found, shows| {
            let known = showing.iter().any(|(instance, addresses)| {
                // A code that is typed at one machine twice costs two of its tries.
                addresses.iter().any(|address| found.1.contains(address))
                    || (instance.is_some() && *instance == found.0)
            });
            if matches!(shows, Ok(true)) && !known {
                showing.push(found);
            }
            !showing.is_empty()
        },
    )?;
    Ok(showing.into_iter().map(|(_, addresses)| addresses).collect())
}

/// Pairs with the first of `showing` whose code this is. Every other one loses one of the three tries of its own.
///
/// # Errors
/// The last failure. `showing` is empty: [`swarm_link::LinkError::NoAddress`].
pub fn pair_with_any(
    showing: &[Addresses],
    identity: &Identity,
    code: &PairCode,
    name: &str,
) -> Result<Paired, PairError> {
    let mut last = PairError::Link(swarm_link::LinkError::NoAddress);
    for addresses in showing {
        match swarm_link::pair(addresses, identity, code, name, WELCOME) {
            Err(error @ (PairError::WrongCode { .. } | PairError::Closed { .. } | PairError::Link(_))) => {
                last = error;
            }
            // The codes fit: this is the one.
            other => return other,
        }
    }
    Err(last)
}

/// Brings the current secret to the members that are there now, at `peers` and on the local network, for `within`.
/// Those that are not there get it when they next meet one that has it. Returns the keys of those that took it.
///
/// # Errors
/// [`NodeError::System`] when no thread can be started.
pub fn tell_members(
    identity: &Identity,
    peers: &[Addresses],
    within: Duration,
) -> Result<BTreeSet<[u8; 32]>, NodeError> {
    let mut told = BTreeSet::new();
    visit(
        identity,
        peers,
        true,
        within,
        |addresses| tell_member(addresses, identity, WELCOME),
        |_, key| {
            told.extend(key.ok().flatten());
            false
        },
    )?;
    told.remove(identity.public_key());
    Ok(told)
}

type Found = (Option<InstanceId>, Addresses);

/// Does `ask` with everybody who is found, side by side, and gives the answers to `take`, until `within` is over or
/// nothing has come for a while after `take` said that it has enough.
fn visit<T: Send>(
    identity: &Identity,
    peers: &[Addresses],
    discover: bool,
    within: Duration,
    ask: impl Fn(&[SocketAddr]) -> T + Sync,
    mut take: impl FnMut(Found, T) -> bool,
) -> Result<(), NodeError> {
    let discovery = if discover { Some(Discovery::start(identity.instance())?) } else { None };
    let silent = crossbeam_channel::never();
    let sightings = discovery.as_ref().map_or(&silent, Discovery::events);
    let (sink, answers) = unbounded();
    let mut until = Instant::now() + within;
    let (mut tried, mut pending): (Vec<Addresses>, usize) = (Vec::new(), 0);
    std::thread::scope(|scope| {
        let mut go = |found: Found, pending: &mut usize| {
            if found.1.is_empty() || tried.contains(&found.1) || tried.len() > 256 {
                return;
            }
            tried.push(found.1.clone());
            let (sink, ask) = (sink.clone(), &ask);
            let body = move || {
                let answer = ask(&found.1);
                let _ = sink.send((found, answer));
            };
            if std::thread::Builder::new().name("visit".into()).spawn_scoped(scope, body).is_ok() {
                *pending += 1;
            }
        };
        peers.iter().for_each(|peer| go((None, peer.clone()), &mut pending));
        while Instant::now() < until && (discovery.is_some() || pending > 0) {
            crossbeam_channel::select! {
                recv(sightings) -> event => match event {
                    Ok(DiscoveryEvent::Found(peer)) => go((Some(peer.instance), peer.addresses), &mut pending),
                    Ok(_) => {}
                    Err(_) => break,
                },
                recv(answers) -> answer => if let Ok((found, answer)) = answer {
                    pending -= 1;
                    if take(found, answer) {
                        until = until.min(Instant::now() + SETTLE);
                    }
                },
                default(until.saturating_duration_since(Instant::now())) => {}
            }
        }
    });
    Ok(())
}

/// Shows a code on its own, without serving anything: `swarm-os pair`. Ends when dropped.
pub struct PairingStand {
    desk: PairingDesk,
    listener: Listener,
    _discovery: Discovery,
}

impl PairingStand {
    /// Listens on `port` (0: any), announces that, and shows a code. `name` is what others will call this machine.
    ///
    /// # Errors
    /// [`NodeError`] when the port cannot be used or the system gives no thread or random bytes.
    pub fn open(identity: &Identity, name: &str, port: u16) -> Result<Self, NodeError> {
        let listener = Listener::bind(port, identity, &LinkSettings::default())?;
        let desk = PairingDesk::open(name)?;
        listener.set_desk(Some(desk.clone()));
        let discovery = Discovery::start(identity.instance())?;
        discovery.advertise(listener.port());
        let connections = listener.connections().clone();
        // Members that look for workers find nobody here.
        spawn("stand", move || connections.iter().for_each(drop))?;
        Ok(Self { desk, listener, _discovery: discovery })
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.listener.port()
    }

    /// What happens; the first event is the code.
    pub fn events(&self) -> &Receiver<PairingEvent> {
        self.desk.events()
    }
}

/// Shows a code at a worker that knows nobody, until it has been paired with; and notices within a second what other
/// processes of this user do to the members.
pub(crate) fn watch(shared: Arc<Shared>) -> Result<(), NodeError> {
    let mut desk = None;
    if shared.config.show_code && shared.identity.is_fresh() {
        let opened = PairingDesk::open(&shared.config.name)?;
        shared.listener.set_desk(Some(opened.clone()));
        desk = Some(opened);
    }
    let stopped = shared.stopped.clone();
    spawn("pairing", move || {
        let silent = crossbeam_channel::never();
        loop {
            let fresh = shared.identity.is_fresh();
            if !fresh && let Some(desk) = desk.take() {
                shared.listener.set_desk(None);
                for event in desk.events().try_iter() {
                    tell(&shared, event);
                }
            }
            let events = desk.as_ref().map_or(&silent, PairingDesk::events).clone();
            crossbeam_channel::select! {
                recv(stopped) -> _ => return,
                recv(events) -> event => if let Ok(event) = event {
                    tell(&shared, event);
                },
                default(MEMBERS_LOOK) => {}
            }
        }
    })
}

fn tell(shared: &Shared, event: PairingEvent) {
    // A code that replaces one that was used up is not shown: this worker has been paired.
    if matches!(event, PairingEvent::Code(_)) && !shared.identity.is_fresh() {
        return;
    }
    (shared.observer)(WorkerEvent::Pairing(event));
}

/// Waits for the next event, `until` at most; `None`: it is over.
pub fn next_event(stand: &PairingStand, until: Instant) -> Option<PairingEvent> {
    stand.events().recv_deadline(until).ok()
}
