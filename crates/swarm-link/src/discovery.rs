//! mDNS: saying that this node is here, and hearing who else is.
//!
//! What is announced: the protocol version, a random instance id as instance and host name, port and
//! addresses. Nothing about the user, the computer, the model or the secret.
//!
//! The mDNS library runs a thread that parses every multicast packet of the network. Should it die or hang,
//! it is started again with growing pauses; until then the user is told, and links that exist live on. It is also
//! started anew when strangers announced more than there is room for: those who answer then are really there, and
//! what the library keeps of the others is freed.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select};
use mdns_sd::{
    DaemonEvent, DaemonStatus, ResolvedService, ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo,
};

use crate::connection::{millis, system};
use crate::error::LinkError;
use crate::id::InstanceId;
use crate::interfaces::Scope;
use crate::noise::PROTOCOL_VERSION;
use crate::sightings::{Announcement, Gone, PeerFound, SERVICE, Seen, Sightings, fullname};

const EVENTS_MAX: usize = 256;
const INPUTS_MAX: usize = 256;
/// How often the library's thread is asked whether it lives, and how long it may take to say so.
const PULSE_EVERY: Duration = Duration::from_secs(5);
const PULSE_TIMEOUT: Duration = Duration::from_secs(2);
/// An announcement is multicast within 750 ms and comes back to its sender; a computer that does not
/// hear itself by then has no working multicast.
const ECHO_TIMEOUT: Duration = Duration::from_secs(6);
/// After a restart every live peer has answered by then.
const ROUND: Duration = Duration::from_secs(10);
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long a doubted peer may take to answer.
const DOUBT_TIMEOUT: Duration = Duration::from_secs(2);
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);
/// After this computer's addresses changed, it is announced again. The library says a new address once, at the moment
/// it sees it, and that may be before the system has a route for it.
const AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];
/// Records that the library may keep, a few for each service. It has no limit of its own.
const RECORDS_MAX: i64 = 20_000;
/// After a list that was full, discovery begins again; later each time while that does not help.
const RENEW_FIRST: Duration = Duration::from_secs(10);
const RENEW_MAX: Duration = Duration::from_secs(320);

/// News from the local network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiscoveryEvent {
    /// A peer announced itself, or announced other addresses than before.
    Found(PeerFound),
    /// A peer said goodbye, or its announcement expired. Anyone can forge this: it must not end a link.
    Lost(InstanceId),
    /// Peers cannot be found for now; `--peer host:port` and remembered peers still work.
    Unavailable {
        /// For the user.
        why: String,
        /// When it will be tried again.
        retry_in_ms: u64,
    },
    /// Discovery works, after an [`DiscoveryEvent::Unavailable`].
    Available,
}

/// What discovery has counted since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiscoveryStats {
    /// Announcements not written as a node writes them.
    pub malformed: u64,
    /// Announcements dropped because [`crate::PEERS_MAX`] peers were known.
    pub no_room: u64,
    /// Events dropped because nobody read them; [`Discovery::peers`] is right all the same.
    pub events_dropped: u64,
    /// Times the mDNS library was started again because it failed.
    pub restarts: u64,
    /// Times it was started again because strangers announced too much.
    pub renewals: u64,
}

/// Announces this node, if asked to, and listens for others. Dropping it says goodbye.
#[derive(Debug)]
pub struct Discovery {
    commands: Sender<Command>,
    events: Receiver<DiscoveryEvent>,
    board: Arc<Board>,
    done: Receiver<()>,
}

#[derive(Debug)]
enum Command {
    Advertise(u16),
    Doubt(InstanceId),
    Close,
    /// Ends the library's thread, as a panic would.
    #[cfg(test)]
    Kill,
}

/// What callers may look at any time.
#[derive(Debug, Default)]
struct Board {
    peers: Mutex<Vec<PeerFound>>,
    malformed: AtomicU64,
    no_room: AtomicU64,
    events_dropped: AtomicU64,
    restarts: AtomicU64,
    renewals: AtomicU64,
    /// 0 until it is known.
    echo: AtomicU8,
}

const ECHO_HEARD: u8 = 1;
const ECHO_MISSED: u8 = 2;

impl Board {
    fn peers(&self) -> MutexGuard<'_, Vec<PeerFound>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Discovery {
    /// Begins to listen for peers other than `own`. Failing networks are told as events, not here.
    ///
    /// # Errors
    /// [`LinkError::System`] when no thread can be started.
    pub fn start(own: InstanceId) -> Result<Self, LinkError> {
        Self::start_in(own, Scope::default())
    }

    /// The same on some interfaces only.
    ///
    /// # Errors
    /// As [`Discovery::start`].
    pub fn start_in(own: InstanceId, scope: Scope) -> Result<Self, LinkError> {
        let (commands, command_source) = bounded(8);
        let (event_sink, events) = bounded(EVENTS_MAX);
        let (done_sink, done) = bounded(1);
        let board = Arc::new(Board::default());
        let supervisor = Supervisor {
            own,
            scope,
            port: None,
            commands: command_source,
            events: event_sink,
            board: Arc::clone(&board),
            sightings: Sightings::new(own),
            ailing: false,
            pause: PAUSE_FIRST,
            renew_after: RENEW_FIRST,
        };
        thread::Builder::new()
            .name("discovery".into())
            .spawn(move || {
                supervisor.run();
                let _ = done_sink.send(());
            })
            .map_err(system("starting a thread"))?;
        Ok(Self { commands, events, board, done })
    }

    /// Announces that this node listens on `port`, on every interface and address it has, from now on.
    pub fn advertise(&self, port: u16) {
        // The supervisor lives as long as this value, and takes a command within seconds.
        let _ = self.commands.send_timeout(Command::Advertise(port), PULSE_TIMEOUT + PULSE_TIMEOUT);
    }

    /// Asks whether the peer `instance` is still there, for instance because dialling it failed: one that was
    /// killed cannot say goodbye, and would stay listed for two minutes. If it does not answer, it is lost.
    pub fn doubt(&self, instance: InstanceId) {
        let _ = self.commands.try_send(Command::Doubt(instance));
    }

    /// News, as it comes. At most 256 wait; more are dropped and counted.
    #[must_use]
    pub fn events(&self) -> &Receiver<DiscoveryEvent> {
        &self.events
    }

    /// Everyone known now, at most [`crate::PEERS_MAX`].
    #[must_use]
    pub fn peers(&self) -> Vec<PeerFound> {
        self.board.peers().clone()
    }

    /// Whether this node heard its own announcement, which it does where multicast works at all; `None` until that
    /// is known (6 s at most), or when nothing was announced.
    #[must_use]
    pub fn hears_itself(&self) -> Option<bool> {
        match self.board.echo.load(Ordering::Relaxed) {
            ECHO_HEARD => Some(true),
            ECHO_MISSED => Some(false),
            _ => None,
        }
    }

    /// Counters so far.
    #[must_use]
    pub fn stats(&self) -> DiscoveryStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DiscoveryStats {
            malformed: count(&self.board.malformed),
            no_room: count(&self.board.no_room),
            events_dropped: count(&self.board.events_dropped),
            restarts: count(&self.board.restarts),
            renewals: count(&self.board.renewals),
        }
    }
}

impl Drop for Discovery {
    /// Says goodbye, waiting at most a second for it to be sent.
    fn drop(&mut self) {
        let _ = self.commands.try_send(Command::Close);
        let _ = self.done.recv_timeout(GOODBYE_TIMEOUT + GOODBYE_TIMEOUT);
    }
}

/// Why a life of the mDNS library ended.
enum End {
    Closed,
    Failed(String),
    /// It works, and shall begin again.
    Renewed,
}

enum Input {
    Service(ServiceEvent),
    Daemon(DaemonEvent),
    Gone,
}

struct Supervisor {
    own: InstanceId,
    scope: Scope,
    port: Option<u16>,
    commands: Receiver<Command>,
    events: Sender<DiscoveryEvent>,
    board: Arc<Board>,
    sightings: Sightings,
    ailing: bool,
    pause: Duration,
    renew_after: Duration,
}

/// The clocks of one life of the library.
struct Life {
    daemon: ServiceDaemon,
    pulse_at: Instant,
    round_ends: Option<Instant>,
    /// When this node's own announcement must have been heard; `None`: heard, or nothing announced.
    echo_by: Option<Instant>,
    /// When to announce this node again, soonest last.
    again: Vec<Instant>,
    began: Instant,
    /// Somebody was announced for whom there was no room.
    full: bool,
}

impl Supervisor {
    fn run(mut self) {
        loop {
            let why = match self.live() {
                End::Closed => return,
                End::Renewed => {
                    self.board.renewals.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                End::Failed(why) => why,
            };
            self.board.restarts.fetch_add(1, Ordering::Relaxed);
            let pause = jittered(self.pause);
            self.pause = self.pause.saturating_mul(2).min(PAUSE_MAX);
            tracing::debug!("discovery failed: {why}");
            if !self.ailing {
                self.ailing = true;
                self.emit(DiscoveryEvent::Unavailable { why, retry_in_ms: millis(pause) });
            }
            let until = Instant::now() + pause;
            loop {
                match self.commands.recv_deadline(until) {
                    Ok(Command::Advertise(port)) => self.port = Some(port),
                    Ok(Command::Close) => return,
                    Ok(_) => {}
                    Err(error) if error.is_disconnected() => return,
                    Err(_) => break,
                }
            }
        }
    }

    /// One life of the mDNS library.
    fn live(&mut self) -> End {
        let (mut life, inputs) = match self.begin() {
            Ok(begun) => begun,
            Err(error) => return End::Failed(format!("mDNS does not start: {error}")),
        };
        let end = loop {
            let wake = life.wake_at().saturating_duration_since(Instant::now());
            let commands = self.commands.clone();
            select! {
                recv(commands) -> command => match command {
                    Ok(Command::Advertise(port)) => {
                        self.port = Some(port);
                        if let Err(error) = self.register(&mut life) {
                            break End::Failed(format!("announcing this node failed: {error}"));
                        }
                    }
                    Ok(Command::Doubt(instance)) => {
                        for name in self.sightings.fullnames(instance) {
                            // Not asked is not answered: the announcement then expires by itself, later.
                            let _ = life.daemon.verify(name, DOUBT_TIMEOUT);
                        }
                    }
                    #[cfg(test)]
                    Ok(Command::Kill) => drop(life.daemon.shutdown()),
                    Ok(Command::Close) | Err(_) => break End::Closed,
                },
                recv(inputs) -> input => {
                    if let Some(why) = self.take(input.unwrap_or(Input::Gone), &mut life) {
                        break End::Failed(why);
                    }
                }
                default(wake) => {}
            }
            if let Some(end) = self.look_at_clocks(&mut life) {
                break end;
            }
        };
        self.finish(&life);
        end
    }

    fn begin(&mut self) -> mdns_sd::Result<(Life, Receiver<Input>)> {
        let daemon = ServiceDaemon::new()?;
        let now = Instant::now();
        let mut life = Life {
            daemon,
            pulse_at: now + PULSE_EVERY,
            round_ends: Some(now + ROUND),
            echo_by: None,
            again: Vec::new(),
            began: now,
            full: false,
        };
        self.sightings.begin_round();
        let scoped = self.scope.apply(&life.daemon);
        let listening = scoped.and_then(|()| listen(&life.daemon));
        let listening = listening.and_then(|inputs| self.register(&mut life).map(|()| inputs));
        match listening {
            Ok(inputs) => Ok((life, inputs)),
            Err(error) => {
                // Its thread does not end by being forgotten.
                self.finish(&life);
                Err(error)
            }
        }
    }

    fn register(&self, life: &mut Life) -> mdns_sd::Result<()> {
        if self.port.is_some() {
            life.echo_by = Some(Instant::now() + ECHO_TIMEOUT);
        }
        self.announce(life)
    }

    fn announce(&self, life: &Life) -> mdns_sd::Result<()> {
        let Some(port) = self.port else { return Ok(()) };
        let name = self.own.to_string();
        let txt = [("v", PROTOCOL_VERSION.to_string()), ("id", name.clone())];
        let only = self.scope.only_address();
        let addresses = only.map(|address| address.to_string()).unwrap_or_default();
        let service =
            ServiceInfo::new(SERVICE, &name, &format!("{name}.local."), addresses.as_str(), port, &txt[..])?;
        life.daemon.register(if only.is_some() { service } else { service.enable_addr_auto() })
    }

    /// Takes one event of the library; `Some` says why this life must end.
    fn take(&mut self, input: Input, life: &mut Life) -> Option<String> {
        match input {
            Input::Service(ServiceEvent::ServiceResolved(service)) => self.resolved(&service, life),
            Input::Service(ServiceEvent::ServiceRemoved(_, fullname)) => {
                if let Some(gone) = self.sightings.lose(&fullname) {
                    self.publish();
                    self.emit(match gone {
                        Gone::Peer(instance) => DiscoveryEvent::Lost(instance),
                        Gone::Name(left) => DiscoveryEvent::Found(left),
                    });
                }
            }
            Input::Service(ServiceEvent::SearchStopped(_)) | Input::Gone => {
                return Some("the mDNS thread ended".into());
            }
            Input::Daemon(DaemonEvent::Error(error)) => tracing::debug!("mDNS: {error}"),
            Input::Daemon(DaemonEvent::IpAdd(_) | DaemonEvent::IpDel(_)) => {
                let now = Instant::now();
                life.again = AGAIN.iter().rev().map(|after| now + *after).collect();
            }
            Input::Service(_) | Input::Daemon(_) => {}
        }
        None
    }

    fn resolved(&mut self, service: &ResolvedService, life: &mut Life) {
        let announcement = Announcement {
            fullname: &service.fullname,
            id: service.get_property_val_str("id"),
            version: service.get_property_val_str("v"),
            port: service.port,
            addresses: service.addresses.iter().map(address).collect(),
        };
        match self.sightings.see(&announcement) {
            Seen::Changed(found) => {
                self.publish();
                self.emit(DiscoveryEvent::Found(found));
            }
            Seen::Replaced(found, gone) => {
                self.publish();
                self.emit(DiscoveryEvent::Lost(gone));
                self.emit(DiscoveryEvent::Found(found));
            }
            Seen::Own => {
                life.echo_by = None;
                self.board.echo.store(ECHO_HEARD, Ordering::Relaxed);
                self.well();
            }
            Seen::Known => {}
            Seen::Malformed => {
                self.board.malformed.fetch_add(1, Ordering::Relaxed);
            }
            Seen::NoRoom => {
                life.full = true;
                self.board.no_room.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// What the time has come for; `Some` ends this life.
    fn look_at_clocks(&mut self, life: &mut Life) -> Option<End> {
        let now = Instant::now();
        if life.round_ends.is_some_and(|at| now >= at) {
            life.round_ends = None;
            for instance in self.sightings.end_round() {
                self.publish();
                self.emit(DiscoveryEvent::Lost(instance));
            }
        }
        if life.echo_by.is_some_and(|at| now >= at) {
            self.board.echo.store(ECHO_MISSED, Ordering::Relaxed);
            return Some(End::Failed("this computer does not hear its own multicast; a firewall, VPN or missing network may block it".into()));
        }
        if life.again.last().is_some_and(|at| now >= *at) {
            life.again.pop();
            if let Err(error) = self.announce(life) {
                // It is busy, in a flood for instance; the pulse finds out whether it lives.
                tracing::debug!("not announced again yet: {error}");
                life.again.push(now + AGAIN[0]);
            }
        }
        if now >= life.pulse_at {
            life.pulse_at = now + PULSE_EVERY;
            let status = life.daemon.status().ok().and_then(|answer| answer.recv_timeout(PULSE_TIMEOUT).ok());
            if !matches!(status, Some(DaemonStatus::Running)) {
                return Some(End::Failed("the mDNS thread does not answer".into()));
            }
            if life.echo_by.is_none() {
                self.well();
            }
            if self.is_flooded(life, now) {
                return Some(End::Renewed);
            }
        }
        None
    }

    /// Strangers announced more than there is room for, here or in the library, and it is time to begin again.
    fn is_flooded(&mut self, life: &Life, now: Instant) -> bool {
        let metrics =
            life.daemon.get_metrics().ok().and_then(|answer| answer.recv_timeout(PULSE_TIMEOUT).ok());
        let kept = metrics.into_iter().flatten().filter(|(name, _)| name.starts_with("cached-"));
        if kept.map(|(_, count)| count).sum::<i64>() > RECORDS_MAX {
            return true;
        }
        let lived = now.saturating_duration_since(life.began);
        if !life.full {
            if lived >= self.renew_after {
                self.renew_after = RENEW_FIRST;
            }
            return false;
        }
        if lived < self.renew_after {
            return false;
        }
        self.renew_after = self.renew_after.saturating_mul(2).min(RENEW_MAX);
        true
    }

    fn well(&mut self) {
        self.pause = PAUSE_FIRST;
        if std::mem::take(&mut self.ailing) {
            self.emit(DiscoveryEvent::Available);
        }
    }

    fn finish(&self, life: &Life) {
        if self.port.is_some() {
            let goodbye = life.daemon.unregister(&fullname(self.own, 1));
            let _ = goodbye.map(|sent| sent.recv_timeout(GOODBYE_TIMEOUT));
        }
        let _ = life.daemon.shutdown().map(|status| status.recv_timeout(GOODBYE_TIMEOUT));
    }

    fn publish(&self) {
        *self.board.peers() = self.sightings.peers();
    }

    fn emit(&self, event: DiscoveryEvent) {
        if let Err(TrySendError::Full(_)) = self.events.try_send(event) {
            self.board.events_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Life {
    fn wake_at(&self) -> Instant {
        let clocks = [self.round_ends, self.echo_by, self.again.last().copied()];
        clocks.into_iter().flatten().fold(self.pulse_at, Instant::min)
    }
}

fn address(ip: &ScopedIp) -> (IpAddr, u32) {
    match ip {
        ScopedIp::V6(v6) => (IpAddr::V6(*v6.addr()), v6.scope_id().index),
        other => (other.to_ip_addr(), 0),
    }
}

fn listen(daemon: &ServiceDaemon) -> mdns_sd::Result<Receiver<Input>> {
    let (sink, inputs) = bounded(INPUTS_MAX);
    forward(daemon.monitor()?, sink.clone(), Input::Daemon)?;
    forward(daemon.browse(SERVICE)?, sink, Input::Service)?;
    Ok(inputs)
}

/// The library's channels cannot be waited on together, so a thread each brings them into one. It ends
/// with the library's thread, which drops the other end even when it panics.
fn forward<T: Send + 'static>(
    source: mdns_sd::Receiver<T>,
    sink: Sender<Input>,
    wrap: fn(T) -> Input,
) -> mdns_sd::Result<()> {
    let relay = move || {
        for event in &source {
            if sink.send(wrap(event)).is_err() {
                return;
            }
        }
        let _ = sink.send(Input::Gone);
    };
    thread::Builder::new()
        .name("discovery-relay".into())
        .spawn(relay)
        .map(drop)
        .map_err(|error| mdns_sd::Error::Msg(error.to_string()))
}

/// Between half and all of `pause`: computers that lost the same network do not come back in step.
fn jittered(pause: Duration) -> Duration {
    let random = getrandom::u32().unwrap_or(u32::MAX);
    pause / 2 + pause.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn next(discovery: &Discovery, what: &str, wanted: impl Fn(&DiscoveryEvent) -> bool) {
        let deadline = Instant::now() + SOON;
        while let Ok(event) = discovery.events().recv_deadline(deadline) {
            if wanted(&event) {
                return;
            }
        }
        panic!("not {what} within {SOON:?}; {:?} {:?}", discovery.stats(), discovery.peers());
    }

    #[test]
    fn a_library_that_dies_is_told_and_started_again() {
        let (one, two) = (InstanceId::random().unwrap(), InstanceId::random().unwrap());
        let (first, second) = (Discovery::start(one).unwrap(), Discovery::start(two).unwrap());
        first.advertise(4001);
        second.advertise(4002);
        next(&first, "found", |event| matches!(event, DiscoveryEvent::Found(peer) if peer.instance == two));
        next(&second, "found", |event| matches!(event, DiscoveryEvent::Found(peer) if peer.instance == one));
        first.commands.send(Command::Kill).unwrap();
        next(&first, "told", |event| matches!(event, DiscoveryEvent::Unavailable { .. }));
        next(&first, "well again", |event| *event == DiscoveryEvent::Available);
        assert_eq!(first.stats().restarts, 1);
        // It is announced again, and sees who comes.
        let three = InstanceId::random().unwrap();
        let third = Discovery::start(three).unwrap();
        third.advertise(4003);
        next(&third, "found", |event| matches!(event, DiscoveryEvent::Found(peer) if peer.instance == one));
        next(&first, "found", |event| matches!(event, DiscoveryEvent::Found(peer) if peer.instance == three));
        assert!(first.peers().iter().any(|peer| peer.instance == two), "who stayed is still known");
        assert_eq!(first.hears_itself(), Some(true));
    }
}
