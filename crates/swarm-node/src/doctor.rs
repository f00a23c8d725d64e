//! Looks at the network and at the way to every machine that can be found: what `swarm-os doctor` reports.
//!
//! It announces itself and listens, as a worker does, so that others can be asked whether they hear it and reach it.
//! First it only listens, then it dials everybody side by side, then it measures one link after the other.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use swarm_link::{
    Connection, Discovery, DiscoveryEvent, Identity, InstanceId, InterfaceAddress, LinkError, LinkSettings,
    Listener, PROTOCOL_VERSION, Remembered, Scope, dial, interfaces, shows_code,
};
use swarm_wire::{CONTROL_BYTES_MAX, CloseCode, Control, Examine, Examined, Hello, PADDING_BYTES_MAX, Role};

use crate::control::{self, ControlReceiver, ControlSender};
use crate::deadlines::{
    EXAMINE_ANSWER, EXAMINE_HEARS, EXAMINE_LOOK, FIRST_MESSAGE, LINK_BULK, SETTLE, WELCOME,
};
use crate::error::{NodeError, chain};
use crate::examine::serve_examine;
use crate::link_probe::{serve_probe, time_link};
use crate::machine;
use crate::pairing::Addresses;
use crate::worker::spawn;

/// Machines looked at; a network may announce anything.
const TARGETS_MAX: usize = 32;
/// Addresses of an unreachable machine that are looked at one by one.
const ADDRESSES_TRIED: usize = 4;
/// Connections answered at once.
const GUESTS_MAX: usize = 16;
/// Messages of the greatest size that measure the way back.
const BULKS: usize = 6;

/// What to look at, and from where.
pub struct Look<'a> {
    /// Who looks.
    pub identity: &'a Identity,
    /// Machines that were named by an address.
    pub named: &'a [Addresses],
    /// Where machines were reached before is kept here.
    pub state_dir: Option<&'a Path>,
    /// The interfaces to be heard on.
    pub scope: Scope,
    /// A port where a worker of this computer listens, which others should reach; by default one that is opened for
    /// this look.
    pub port: Option<u16>,
    /// How long to listen at most.
    pub within: Duration,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct NetworkReport {
    /// Addresses of this computer, loopback left out.
    pub interfaces: Vec<InterfaceAddress>,
    /// This computer hears its own multicast; `None`: it was not known in time.
    pub hears_itself: Option<bool>,
    /// What discovery said of itself when it failed.
    pub trouble: Option<String>,
    /// The port that others were asked to reach.
    pub port: u16,
    /// Every machine that was announced, remembered or named.
    pub peers: Vec<PeerReport>,
    /// Machines of this swarm of which nothing was seen, by name: strangers' texts.
    pub absent: Vec<String>,
}

/// One machine.
#[derive(Clone, Debug)]
pub struct PeerReport {
    /// Where it was reached, or would be.
    pub address: SocketAddr,
    /// What it is called, if this machine knows: a stranger's text.
    pub name: Option<String>,
    /// It is this computer.
    pub own: bool,
    /// It was heard by multicast.
    pub announced: bool,
    /// Its address was typed.
    pub named: bool,
    /// What it is.
    pub state: PeerState,
}

/// What a machine turned out to be.
#[derive(Clone, Debug)]
pub enum PeerState {
    /// In this swarm, and what the link to it is.
    Member(LinkReport),
    /// In this swarm, but the link could not be measured, and why.
    Unmeasured(String),
    /// It shows a pairing code.
    ShowsCode,
    /// In another swarm.
    OtherSwarm,
    /// No connection can be made.
    Unreachable(Silence),
    /// It answers, but not as a node of this version, and how.
    Unusable(String),
}

/// How a machine cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// The computer answers that nobody listens there: the program has ended, or its port is another now.
    Closed,
    /// Nothing comes back: a firewall, or a network that keeps its clients apart.
    NoAnswer,
    /// The computer itself is not found in the network.
    NoRoute,
}

/// What a link was measured to be, encryption on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkReport {
    /// Median of 100 round trips of a small message.
    pub round_trip_us_p50: f64,
    /// The second longest of them.
    pub round_trip_us_p99: f64,
    /// 10^6 bits per second from here to there, in messages of 128 KiB, less a round trip each.
    pub up_mbit_s: f64,
    /// The same from there to here.
    pub down_mbit_s: f64,
    /// It can open a connection to this computer.
    pub reaches_back: bool,
    /// It hears this computer's announcement; `None`: it does not listen for any.
    pub hears: Option<bool>,
    /// Memory it offers.
    pub memory_bytes: u64,
}

/// Looks around. Takes `look.within` at most to listen, some seconds more where machines are announced that cannot be
/// reached, and about a second for each that can.
///
/// # Errors
/// [`NodeError`] when not even a socket or a thread can be had.
pub fn examine(look: &Look<'_>) -> Result<NetworkReport, NodeError> {
    let identity = look.identity.another_instance()?;
    let presence = Presence::open(&identity, look.scope.clone())?;
    let trouble = listen(&presence.discovery, look.within);
    let port = look.port.unwrap_or_else(|| presence.listener.port());
    let mut seen: Vec<(Target, Approach)> = Vec::new();
    for (target, approach) in approach_all(targets(look, &presence.discovery), &identity) {
        // The same machine at another address.
        let node = |approach: &Approach| approach.as_ref().ok().map(|link| link.peer.node);
        match seen.iter_mut().find(|(_, known)| node(&approach).is_some() && node(known) == node(&approach)) {
            Some((known, _)) => {
                known.announced |= target.announced;
                known.named |= target.named;
            }
            None => seen.push((target, approach)),
        }
    }
    let mut present = Vec::new();
    let mut peers = Vec::new();
    for (target, approach) in seen {
        let of_old = !target.announced && !target.named;
        match approach {
            // Where somebody was long ago: no news.
            Err(PeerState::Unreachable(_)) if of_old => {}
            Err(state) => peers.extend(target.report(None, false, state)),
            Ok(link) => {
                present.push(link.peer.static_key);
                peers.push(measure(target, link, &identity, port));
            }
        }
    }
    peers.sort_by_key(|peer| peer.address);
    let members = identity.peers().into_iter();
    Ok(NetworkReport {
        interfaces: interfaces().unwrap_or_default(),
        hears_itself: presence.discovery.hears_itself(),
        trouble,
        port,
        peers,
        absent: members.filter(|peer| !present.contains(&peer.key)).map(|peer| peer.name).collect(),
    })
}

/// This look as others see it: announced, and polite to whoever comes.
struct Presence {
    listener: Listener,
    discovery: Arc<Discovery>,
}

impl Presence {
    fn open(identity: &Identity, scope: Scope) -> Result<Self, NodeError> {
        let listener = Listener::bind(0, identity, &LinkSettings::default())?;
        let discovery = Arc::new(Discovery::start_in(identity.instance(), scope)?);
        discovery.advertise(listener.port());
        let (connections, hears) = (listener.connections().clone(), Arc::downgrade(&discovery));
        let own = own_hello(identity);
        let places = Arc::new(());
        spawn("doctor", move || {
            for connection in &connections {
                let (own, hears, place) = (own.clone(), hears.clone(), places.clone());
                if Arc::strong_count(&places) > GUESTS_MAX + 1 {
                    continue;
                }
                let answer = move || {
                    let hears = |instance| hears.upgrade().map(|discovery| is_heard(&discovery, instance));
                    receive_guest(connection, &own, hears);
                    drop(place);
                };
                // Nobody is owed an answer.
                let _ = spawn("doctor", answer);
            }
        })?;
        Ok(Self { listener, discovery })
    }
}

/// Whether the announcement of `instance` was heard.
pub(crate) fn is_heard(discovery: &Discovery, instance: InstanceId) -> bool {
    discovery.peers().iter().any(|peer| peer.instance == instance)
}

fn own_hello(identity: &Identity) -> Hello {
    let (id, memory) = (control::wire_id(identity.node_id()), control::memory_offered(None));
    control::hello(id, &machine::host_name(), Role::Coordinator, machine::cores(), memory, None)
}

/// Answers a coordinator that looks for workers, so that it knows that this is none, and another look.
fn receive_guest(mut connection: Connection, own: &Hello, hears: impl Fn(InstanceId) -> Option<bool>) {
    connection.receiver.set_message_bytes_max(CONTROL_BYTES_MAX);
    let mut first = Vec::new();
    if connection.receiver.set_idle_timeout(Some(FIRST_MESSAGE)).is_err()
        || connection.receiver.receive(&mut first).is_err()
    {
        return;
    }
    match Control::decode(&first) {
        Ok(Control::Hello(_)) => {
            let (_, sender, mut receiver, _closer) = control::split(connection);
            if sender.send(&Control::Welcome(own.clone())).is_ok() {
                // It leaves by itself.
                let _ = receiver.receive(Some(FIRST_MESSAGE));
            }
        }
        Ok(Control::Probe) => serve_probe(connection),
        Ok(Control::Examine(question)) => serve_examine(connection, question, || own.clone(), hears),
        _ => {}
    }
}

/// Listens until somebody was heard and a little longer, `within` at most. Gives what discovery said when it failed.
fn listen(discovery: &Discovery, within: Duration) -> Option<String> {
    let until = Instant::now() + within;
    let (mut trouble, mut found_at) = (None, None);
    loop {
        let now = Instant::now();
        let echo = discovery.hears_itself();
        let end = match found_at {
            Some(at) if echo.is_some() => until.min(at + SETTLE),
            // Nobody will be heard.
            None if echo == Some(false) => now,
            _ => until,
        };
        if now >= end {
            return trouble;
        }
        match discovery.events().recv_deadline(end.min(now + EXAMINE_LOOK)) {
            Ok(DiscoveryEvent::Found(_)) => found_at = found_at.or(Some(now)),
            Ok(DiscoveryEvent::Unavailable { why, .. }) => trouble = Some(why),
            Ok(DiscoveryEvent::Available) => trouble = None,
            Ok(DiscoveryEvent::Lost(_)) | Err(_) => {}
        }
    }
}

/// Somebody to look at.
struct Target {
    addresses: Addresses,
    announced: bool,
    named: bool,
    /// The link version that was announced.
    version: Option<u16>,
}

impl Target {
    fn report(&self, name: Option<String>, own: bool, state: PeerState) -> Option<PeerReport> {
        let &address = self.addresses.first()?;
        Some(PeerReport { address, name, own, announced: self.announced, named: self.named, state })
    }
}

/// Everybody announced, named or remembered, each once.
fn targets(look: &Look<'_>, discovery: &Discovery) -> Vec<Target> {
    let mut targets: Vec<Target> = discovery
        .peers()
        .into_iter()
        .map(|peer| Target {
            addresses: peer.addresses,
            announced: true,
            named: false,
            version: Some(peer.version),
        })
        .collect();
    let remembered = look.state_dir.map(|dir| Remembered::load(dir).addresses()).unwrap_or_default();
    let typed = look.named.iter().map(|addresses| (addresses.clone(), true));
    for (addresses, named) in typed.chain(remembered.into_iter().map(|address| (vec![address], false))) {
        let same = |target: &&mut Target| target.addresses.iter().any(|known| addresses.contains(known));
        match targets.iter_mut().find(same) {
            Some(known) => known.named |= named,
            None => targets.push(Target { addresses, announced: false, named, version: None }),
        }
    }
    // Those who were typed stay in any case.
    targets.sort_by_key(|target| !target.named);
    targets.truncate(TARGETS_MAX);
    targets
}

type Approach = Result<Connection, PeerState>;

/// Dials everybody side by side.
fn approach_all(targets: Vec<Target>, identity: &Identity) -> Vec<(Target, Approach)> {
    std::thread::scope(|scope| {
        let tries: Vec<_> = targets
            .into_iter()
            .map(|target| {
                let (addresses, version) = (target.addresses.clone(), target.version);
                let body = move || approach(&addresses, version, identity);
                (target, std::thread::Builder::new().name("approach".into()).spawn_scoped(scope, body))
            })
            .collect();
        let unknown = || Err(PeerState::Unmeasured("no thread for it".into()));
        tries
            .into_iter()
            .map(|(target, thread)| {
                let approach = thread.ok().and_then(|thread| thread.join().ok());
                (target, approach.unwrap_or_else(unknown))
            })
            .collect()
    })
}

fn approach(addresses: &[SocketAddr], version: Option<u16>, identity: &Identity) -> Approach {
    if let Some(theirs) = version
        && theirs != u16::from(PROTOCOL_VERSION)
    {
        let ours = PROTOCOL_VERSION;
        return Err(PeerState::Unusable(format!("it speaks link version {theirs}, this computer {ours}")));
    }
    let settings = LinkSettings { write_timeout: EXAMINE_ANSWER, ..LinkSettings::default() };
    Err(match dial(addresses, identity, &settings, WELCOME) {
        Ok(connection) => return Ok(connection),
        Err(LinkError::Refused { .. }) => match shows_code(addresses, WELCOME) {
            Ok(true) => PeerState::ShowsCode,
            _ => PeerState::OtherSwarm,
        },
        Err(LinkError::Unreachable { .. }) => PeerState::Unreachable(silence(addresses)),
        Err(error) => PeerState::Unusable(chain(&error)),
    })
}

/// The most telling of what the addresses say: that nobody listens is said by the computer itself.
fn silence(addresses: &[SocketAddr]) -> Silence {
    let addresses = addresses.get(..ADDRESSES_TRIED).unwrap_or(addresses);
    let answers: Vec<ErrorKind> = std::thread::scope(|scope| {
        let tries: Vec<_> = addresses
            .iter()
            .map(|address| {
                let body = move || TcpStream::connect_timeout(address, WELCOME).map_err(|error| error.kind());
                std::thread::Builder::new().name("approach".into()).spawn_scoped(scope, body)
            })
            .collect();
        let answers = tries.into_iter().filter_map(|thread| thread.ok()?.join().ok());
        answers.filter_map(Result::err).collect()
    });
    let no_route = [ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable];
    if answers.contains(&ErrorKind::ConnectionRefused) {
        Silence::Closed
    } else if !answers.is_empty() && answers.iter().all(|kind| no_route.contains(kind)) {
        Silence::NoRoute
    } else {
        Silence::NoAnswer
    }
}

/// A member that answers questions.
struct Asker {
    sender: ControlSender,
    receiver: ControlReceiver,
    asked: u64,
    node: String,
}

impl Asker {
    fn ask(&mut self, question: Examine) -> Result<Examined, NodeError> {
        self.asked += 1;
        let lost = |error: &dyn std::error::Error, node: &str| NodeError::Lost {
            node: node.to_owned(),
            what: format!("does not answer: {}", chain(error)),
        };
        let question = Control::Examine(Examine { id: self.asked, ..question });
        self.sender.send(&question).map_err(|error| lost(&error, &self.node))?;
        match self.receiver.receive(Some(EXAMINE_ANSWER)).map_err(|error| lost(&error, &self.node))? {
            Control::Examined(answer) if answer.id == self.asked => Ok(*answer),
            _ => Err(NodeError::BadPeer {
                node: self.node.clone(),
                what: "it did not answer the question".into(),
                code: CloseCode::Unexpected,
            }),
        }
    }
}

/// Measures the link to a member.
fn measure(mut target: Target, link: Connection, identity: &Identity, port: u16) -> PeerReport {
    let peer = link.peer;
    target.addresses = vec![peer.address];
    let own = peer.static_key == *identity.public_key();
    let known = identity.peers().into_iter().find(|known| known.key == peer.static_key);
    let mut name = known.map(|known| known.name);
    let (peer, sender, receiver, _closer) = control::split(link);
    let mut asker = Asker { sender, receiver, asked: 0, node: peer.address.to_string() };
    let state = match asker.ask(Examine::default()) {
        Err(error) => PeerState::Unmeasured(error.chain()),
        Ok(first) => {
            name = Some(first.hello.name.clone());
            match control::check_hello(&peer, &first.hello) {
                Err(error) => PeerState::Unusable(error.chain()),
                Ok(()) => match link_report(&mut asker, &first.hello, identity, &peer.address, port) {
                    Ok(report) => PeerState::Member(report),
                    Err(error) => PeerState::Unmeasured(error.chain()),
                },
            }
        }
    };
    PeerReport { address: peer.address, name, own, announced: target.announced, named: target.named, state }
}

fn link_report(
    asker: &mut Asker,
    hello: &Hello,
    identity: &Identity,
    address: &SocketAddr,
    port: u16,
) -> Result<LinkReport, NodeError> {
    let up = time_link(identity, &[*address])?;
    let mbit_s = |bytes_per_s: f64| bytes_per_s * 8.0 / 1e6;
    let us = |ns: u64| ns as f64 / 1e3;
    let (down_bytes_per_s, reaches) =
        (way_back(asker)?, asker.ask(Examine { reach: Some(port), ..Examine::default() })?);
    Ok(LinkReport {
        round_trip_us_p50: us(up.round_trip_ns_p50),
        round_trip_us_p99: us(up.round_trip_ns_p99),
        up_mbit_s: mbit_s(up.bytes_per_s),
        down_mbit_s: mbit_s(down_bytes_per_s),
        reaches_back: reaches.reaches == Some(true),
        hears: hears(asker, identity.instance())?,
        memory_bytes: hello.memory_bytes_available,
    })
}

/// Bytes per second from there to here: answers of the greatest size, less what one of the smallest takes.
fn way_back(asker: &mut Asker) -> Result<f64, NodeError> {
    let mut time = |padding_bytes: usize| -> Result<Duration, NodeError> {
        let started = Instant::now();
        asker.ask(Examine { padding_bytes: padding_bytes as u32, ..Examine::default() })?;
        Ok(started.elapsed())
    };
    let empty = time(0)?.min(time(0)?).min(time(0)?);
    let (mut best, started) = (f64::MIN_POSITIVE, Instant::now());
    for _ in 0..BULKS {
        let whole = time(PADDING_BYTES_MAX)?;
        let transfer = whole.saturating_sub(empty).max(whole / 10).max(Duration::from_nanos(1));
        best = f64::max(best, PADDING_BYTES_MAX as f64 / transfer.as_secs_f64());
        if started.elapsed() > LINK_BULK {
            break;
        }
    }
    Ok(best)
}

/// Whether the other end hears `instance`, which it may do a little later.
fn hears(asker: &mut Asker, instance: InstanceId) -> Result<Option<bool>, NodeError> {
    let until = Instant::now() + EXAMINE_HEARS;
    loop {
        let question = Examine { hear: Some(instance.to_string()), ..Examine::default() };
        let heard = asker.ask(question)?.hears;
        if heard != Some(false) || Instant::now() >= until {
            return Ok(heard);
        }
        std::thread::sleep(EXAMINE_LOOK);
    }
}

/// How the system gives out huge pages, as it names its choice: `always`, `madvise` or `never`; `None` where it has none.
pub fn huge_pages() -> Option<String> {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    chosen(&text)
}

fn chosen(text: &str) -> Option<String> {
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_tells_an_ended_program_from_a_computer_that_is_not_there() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        // A network for documentation: nobody is there.
        assert_eq!(silence(&[closed]), Silence::Closed);
        assert_eq!(silence(&["192.0.2.1:9".parse().unwrap(), closed]), Silence::Closed);
        assert_eq!(silence(&[]), Silence::NoAnswer);
    }

    #[test]
    fn the_choice_of_huge_pages_is_read() {
        assert_eq!(chosen("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(chosen("always madvise never"), None);
        assert_eq!(chosen(""), None);
    }
}
