//! Being reached: a listening socket, and handshakes that cannot stop each other.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::connection::{Connection, LinkSettings, Served, connect_halves, prepare, respond, system};
use crate::desk::PairingDesk;
use crate::error::{Blame, LinkError};
use crate::gate::{Gate, Outcome};
use crate::identity::Identity;

/// Authenticated links waiting for somebody to take them.
const CONNECTIONS_MAX: usize = 64;
/// Refusals kept for somebody to look at; more are only counted.
const REFUSALS_MAX: usize = 32;
const BACKLOG: i32 = 128;
/// After a failed accept (no file descriptors, say), so that the thread does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A handshake that failed, for the user to see.
#[derive(Debug)]
pub struct Refusal {
    /// Who tried.
    pub address: SocketAddr,
    /// Why it failed.
    pub error: LinkError,
}

/// What a listener has counted since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ListenerStats {
    /// TCP connections taken.
    pub accepted: u64,
    /// Links handed over.
    pub authenticated: u64,
    /// Handshakes that failed: another swarm, other versions, no Swarm-OS at all.
    pub refused: u64,
    /// Handshakes that did not finish in time, or hung up.
    pub unfinished: u64,
    /// Handshakes ended to make room for newer ones.
    pub evicted: u64,
    /// Handshakes in progress now.
    pub pending: usize,
}

/// Takes links from peers until closed or dropped. One thread accepts; each handshake has one of its own,
/// at most 32 at a time and 8 per address, 3 s each by default.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    connections: Receiver<Connection>,
    refusals: Receiver<Refusal>,
    shared: Arc<SharedState>,
    done: Receiver<()>,
}

impl Listener {
    /// Listens on `port` (0: any free one) of every interface, IPv6 and IPv4 where possible, else IPv4.
    ///
    /// # Errors
    /// [`LinkError::PortInUse`], [`LinkError::Bind`], [`LinkError::System`].
    pub fn bind(port: u16, identity: &Identity, settings: &LinkSettings) -> Result<Self, LinkError> {
        let v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        match open(v6) {
            Err(LinkError::Bind { source, .. }) => {
                tracing::debug!("no IPv6 here ({source}), listening on IPv4 only");
                Self::bind_to(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), identity, settings)
            }
            other => Self::start(other?, v6, identity, settings),
        }
    }

    /// Listens on exactly this address, for instance one that only this computer can reach.
    ///
    /// # Errors
    /// As [`Listener::bind`].
    pub fn bind_to(
        address: SocketAddr,
        identity: &Identity,
        settings: &LinkSettings,
    ) -> Result<Self, LinkError> {
        Self::start(open(address)?, address, identity, settings)
    }

    fn start(
        socket: TcpListener,
        asked: SocketAddr,
        identity: &Identity,
        settings: &LinkSettings,
    ) -> Result<Self, LinkError> {
        let address = socket.local_addr().map_err(|source| LinkError::Bind { address: asked, source })?;
        let waker = socket.try_clone().map_err(system("copying a socket"))?;
        let (connection_sink, connections) = bounded(CONNECTIONS_MAX);
        let (refusal_sink, refusals) = bounded(REFUSALS_MAX);
        let (done_sink, done) = bounded(1);
        let shared = Arc::new(SharedState {
            gate: Mutex::new(Gate::new()),
            stopped: AtomicBool::new(false),
            counters: Counters::default(),
            waker,
            identity: identity.clone(),
            settings: settings.clone(),
            desk: Mutex::new(None),
            connections: connection_sink,
            refusals: refusal_sink,
        });
        let accepting = Arc::clone(&shared);
        thread::Builder::new()
            .name("accept".into())
            .spawn(move || {
                accept_all(&socket, &accepting);
                drop(socket);
                let _ = done_sink.send(());
            })
            .map_err(system("starting a thread"))?;
        Ok(Self { address, connections, refusals, shared, done })
    }

    /// Where it listens; the port is never 0.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The port it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// From now on machines may pair by the code that `desk` shows; `None` ends that.
    pub fn set_desk(&self, desk: Option<PairingDesk>) {
        *self.shared.desk.lock().unwrap_or_else(PoisonError::into_inner) = desk;
    }

    /// Authenticated links, as they come. At most 64 wait; more are closed and counted as unfinished.
    #[must_use]
    pub fn connections(&self) -> &Receiver<Connection> {
        &self.connections
    }

    /// Handshakes that failed for a reason a user may want to see. Need not be read.
    #[must_use]
    pub fn refusals(&self) -> &Receiver<Refusal> {
        &self.refusals
    }

    /// Counters so far.
    #[must_use]
    pub fn stats(&self) -> ListenerStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.shared.counters;
        ListenerStats {
            accepted: count(&counters.accepted),
            authenticated: count(&counters.authenticated),
            refused: count(&counters.refused),
            unfinished: count(&counters.unfinished),
            evicted: count(&counters.evicted),
            pending: self.shared.gate().pending(),
        }
    }

    /// Stops listening and ends handshakes in progress; links handed over live on. Returns when the port
    /// is free, or after a second. Dropping does the same.
    pub fn close(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        for pending in self.shared.gate().drain() {
            pending.end();
        }
        // On Linux this wakes the accepting thread; elsewhere the connection to ourselves does.
        let _ = SockRef::from(&self.shared.waker).shutdown(Shutdown::Both);
        if let Err(RecvTimeoutError::Timeout) = self.done.recv_timeout(Duration::from_millis(20)) {
            let _ = TcpStream::connect_timeout(&self.own_address(), Duration::from_millis(500));
            let _ = self.done.recv_timeout(Duration::from_millis(500));
        }
    }

    fn own_address(&self) -> SocketAddr {
        let ip = match self.address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        SocketAddr::new(ip, self.address.port())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}

fn open(address: SocketAddr) -> Result<TcpListener, LinkError> {
    let socket = || -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
            socket.set_only_v6(false)?;
        }
        // So that a node that was just stopped can start again on its port. Windows means something else by it.
        #[cfg(unix)]
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    socket().map_err(|source| match source.kind() {
        ErrorKind::AddrInUse => LinkError::PortInUse { port: address.port() },
        _ => LinkError::Bind { address, source },
    })
}

#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    authenticated: AtomicU64,
    refused: AtomicU64,
    unfinished: AtomicU64,
    evicted: AtomicU64,
}

struct SharedState {
    gate: Mutex<Gate<PendingHandle>>,
    stopped: AtomicBool,
    counters: Counters,
    waker: TcpListener,
    identity: Identity,
    settings: LinkSettings,
    desk: Mutex<Option<PairingDesk>>,
    connections: Sender<Connection>,
    refusals: Sender<Refusal>,
}

impl std::fmt::Debug for SharedState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedState").field("counters", &self.counters).finish_non_exhaustive()
    }
}

impl SharedState {
    fn gate(&self) -> MutexGuard<'_, Gate<PendingHandle>> {
        // Every change of the gate is whole, so a panic elsewhere leaves it usable.
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a handshake from outside: the socket for one that reads, the channel for one that waits its turn.
struct PendingHandle {
    stream: Arc<TcpStream>,
    waiting: Sender<()>,
}

impl PendingHandle {
    fn end(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        drop(self.waiting);
    }
}

fn accept_all(socket: &TcpListener, shared: &Arc<SharedState>) {
    while !shared.stopped.load(Ordering::Acquire) {
        match socket.accept() {
            Ok((stream, address)) => {
                if !shared.stopped.load(Ordering::Acquire) {
                    admit(stream, address, shared);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
            Err(error) => {
                if !shared.stopped.load(Ordering::Acquire) {
                    tracing::warn!("taking a connection failed: {error}");
                    thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }
}

fn admit(stream: TcpStream, address: SocketAddr, shared: &Arc<SharedState>) {
    count(&shared.counters.accepted);
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    let began = Instant::now();
    let stream = Arc::new(stream);
    let (waiting, turn) = bounded(1);
    let handle = PendingHandle { stream: Arc::clone(&stream), waiting };
    let admission = shared.gate().admit(address.ip(), began, handle);
    if let Some(evicted) = admission.evicted {
        count(&shared.counters.evicted);
        evicted.end();
    }
    let (ticket, delay) = (admission.ticket, admission.delay);
    let thread_shared = Arc::clone(shared);
    let shake = move || {
        let deadline = began + thread_shared.settings.handshake_timeout;
        if !delay.is_zero() && turn.recv_timeout(delay) == Err(RecvTimeoutError::Disconnected) {
            return count(&thread_shared.counters.unfinished);
        }
        let result = shake_hands(stream, address, &thread_shared, deadline);
        settle(result, ticket, address, &thread_shared);
    };
    if let Err(error) = thread::Builder::new().name("handshake".into()).spawn(shake) {
        tracing::warn!("no thread for a handshake: {error}");
        shared.gate().leave(ticket, address.ip(), Outcome::Unfinished, Instant::now());
        count(&shared.counters.unfinished);
    }
}

fn shake_hands(
    stream: Arc<TcpStream>,
    address: SocketAddr,
    shared: &SharedState,
    deadline: Instant,
) -> Result<Came, LinkError> {
    prepare(&stream).map_err(system("setting up a socket"))?;
    let desk = shared.desk.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let served = respond(&stream, &shared.identity, desk.as_ref(), address, deadline)
        .map_err(|failure| failure.explain(address, shared.settings.handshake_timeout))?;
    match served {
        Served::Linked(established) => {
            connect_halves(stream, *established, address, &shared.identity, &shared.settings)
                .map(|connection| Came::ToStay(Box::new(connection)))
        }
        Served::News | Served::Pairing(true) => Ok(Came::AndWent { proved: true }),
        Served::Pairing(false) => Ok(Came::AndWent { proved: false }),
    }
}

/// Who got through the door.
enum Came {
    ToStay(Box<Connection>),
    /// With its business done. `proved`: it knew a secret.
    AndWent {
        proved: bool,
    },
}

fn settle(result: Result<Came, LinkError>, ticket: u64, address: SocketAddr, shared: &SharedState) {
    let outcome = match &result {
        // A question anybody may ask must not clear an address of its wrong guesses.
        Ok(Came::AndWent { proved: false }) => Outcome::Unfinished,
        Ok(_) => Outcome::Authenticated,
        Err(error) if error.blame() == Blame::Peer => Outcome::Failed,
        Err(_) => Outcome::Unfinished,
    };
    // Before the link is handed over, so that the place is free by the time anyone can see it.
    shared.gate().leave(ticket, address.ip(), outcome, Instant::now());
    match result {
        Ok(Came::AndWent { .. }) => {}
        Ok(Came::ToStay(connection)) if !shared.stopped.load(Ordering::Acquire) => {
            let counter = match shared.connections.try_send(*connection) {
                Ok(()) => &shared.counters.authenticated,
                Err(_) => {
                    tracing::warn!("closed a link from {address}: {CONNECTIONS_MAX} others wait to be taken");
                    &shared.counters.unfinished
                }
            };
            count(counter);
        }
        Ok(_) => count(&shared.counters.unfinished),
        Err(error) => {
            tracing::debug!("handshake: {error}");
            let counter = match outcome {
                Outcome::Failed => &shared.counters.refused,
                _ => &shared.counters.unfinished,
            };
            count(counter);
            let _ = shared.refusals.try_send(Refusal { address, error });
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
