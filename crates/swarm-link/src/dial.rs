//! Reaching a peer at one of several addresses.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::connection::{
    Connection, Dialled, Failure, LinkSettings, connect_halves, initiate, prepare, system,
};
use crate::error::{Blame, LinkError};
use crate::identity::Identity;
use crate::meet::{ask_member, tell_member};
use crate::noise::Suite;

/// How long one address may stay silent before the next is tried beside it.
const STAGGER: Duration = Duration::from_millis(200);
/// A peer has a handful of interfaces; more is somebody playing.
const ADDRESSES_MAX: usize = 16;
/// Handshakes of one call: each side may have missed one change of the secret.
const ROUNDS: usize = 3;

/// Connects to the first of `addresses` that answers and proves that it holds the swarm secret.
///
/// The addresses should be one node's, best first. Each is tried 200 ms after the one before it, sooner if
/// that one failed; `timeout` covers everything, and a handshake has `settings.handshake_timeout` of it.
///
/// # Errors
/// The most telling failure of all addresses: a peer that refused says more than a host that was silent.
pub fn dial(
    addresses: &[SocketAddr],
    identity: &Identity,
    settings: &LinkSettings,
    timeout: Duration,
) -> Result<Connection, LinkError> {
    let addresses = addresses.get(..ADDRESSES_MAX).unwrap_or(addresses);
    if addresses.is_empty() {
        return Err(LinkError::NoAddress);
    }
    let (results, answers) = bounded(addresses.len());
    let attempts = Attempts { deadline: Instant::now() + timeout, results, waiting: 0 };
    run(addresses, attempts, &answers, identity, settings)
}

type Answer = (SocketAddr, Result<TcpStream, LinkError>);

struct Attempts {
    deadline: Instant,
    results: Sender<Answer>,
    waiting: usize,
}

impl Attempts {
    /// A host that accepts and says nothing may use up half of the time left while others may still answer.
    fn handshake_deadline(&self, others: bool, timeout: Duration) -> Instant {
        let now = Instant::now();
        let left = self.deadline.saturating_duration_since(now);
        now + timeout.min(if others { left / 2 } else { left })
    }

    /// Connects on a thread of its own; it ends by itself at the deadline.
    fn launch(&mut self, address: SocketAddr) {
        let left = self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let results = self.results.clone();
        let connect = move || {
            let stream = TcpStream::connect_timeout(&address, left)
                .map_err(|error| LinkError::Unreachable { addresses: vec![address], why: error.to_string() });
            // Nobody listens any more when another address was faster; the stream is closed then.
            let _ = results.send((address, stream));
        };
        self.waiting += 1;
        let spawned = thread::Builder::new().name("dial".into()).spawn(connect);
        if let Err(source) = spawned {
            let _ = self.results.send((address, Err(system("starting a thread")(source))));
        }
    }
}

fn run(
    addresses: &[SocketAddr],
    mut attempts: Attempts,
    answers: &Receiver<Answer>,
    identity: &Identity,
    settings: &LinkSettings,
) -> Result<Connection, LinkError> {
    let mut next = addresses.iter();
    let mut failures = Failures { addresses, told: None, why: "no answer in time".into() };
    if let Some(address) = next.next() {
        attempts.launch(*address);
    }
    loop {
        let now = Instant::now();
        if now >= attempts.deadline {
            return Err(failures.worst());
        }
        let wait = if next.len() > 0 { attempts.deadline.min(now + STAGGER) } else { attempts.deadline };
        match answers.recv_deadline(wait) {
            Ok((address, answer)) => {
                attempts.waiting -= 1;
                let others = next.len() > 0 || attempts.waiting > 0;
                let finished = answer.and_then(|stream| {
                    let deadline = attempts.handshake_deadline(others, settings.handshake_timeout);
                    shake_hands(stream, address, identity, settings, deadline)
                });
                match finished {
                    Ok(connection) => return Ok(connection),
                    Err(error) => failures.note(error),
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        match next.next() {
            Some(address) => attempts.launch(*address),
            None if attempts.waiting == 0 => return Err(failures.worst()),
            None => {}
        }
    }
}

/// Authenticates. When the secret has changed and one side missed it, it is brought up to date on the way.
fn shake_hands(
    stream: TcpStream,
    address: SocketAddr,
    identity: &Identity,
    settings: &LinkSettings,
    deadline: Instant,
) -> Result<Connection, LinkError> {
    let began = Instant::now();
    let explain = |failure: Failure| failure.explain(address, deadline.saturating_duration_since(began));
    let mut stream = stream;
    for _ in 0..ROUNDS {
        prepare(&stream).map_err(system("setting up a socket"))?;
        match initiate(&stream, identity, Suite::preferred(), deadline).map_err(explain)? {
            Dialled::Linked(established) => {
                return connect_halves(Arc::new(stream), *established, address, identity, settings);
            }
            Dialled::Estranged => {
                let left = deadline.saturating_duration_since(Instant::now());
                if tell_member(&[address], identity, left)?.is_none()
                    && !ask_member(address, identity, deadline)?
                {
                    break;
                }
            }
        }
        stream = connect(address, deadline)?;
    }
    Err(LinkError::Refused { address })
}

fn connect(address: SocketAddr, deadline: Instant) -> Result<TcpStream, LinkError> {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    TcpStream::connect_timeout(&address, left)
        .map_err(|error| LinkError::Unreachable { addresses: vec![address], why: error.to_string() })
}

/// A connection to the first of `addresses` that takes one, with nothing said yet.
pub(crate) fn first_stream(
    addresses: &[SocketAddr],
    deadline: Instant,
) -> Result<(TcpStream, SocketAddr), LinkError> {
    let addresses = addresses.get(..ADDRESSES_MAX).unwrap_or(addresses);
    let mut last = LinkError::NoAddress;
    for (index, address) in addresses.iter().enumerate() {
        // Each has its share of the time that is left.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len().saturating_sub(index)).unwrap_or(1).max(1);
        match connect(*address, Instant::now() + share) {
            Ok(stream) => {
                prepare(&stream).map_err(system("setting up a socket"))?;
                return Ok((stream, *address));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

struct Failures<'a> {
    addresses: &'a [SocketAddr],
    /// The first failure that a connected peer caused.
    told: Option<LinkError>,
    why: String,
}

impl Failures<'_> {
    fn note(&mut self, error: LinkError) {
        match error {
            LinkError::Unreachable { why, .. } => self.why = why,
            // What the peer said outranks what the network or this node said.
            error
                if self
                    .told
                    .as_ref()
                    .is_none_or(|told| told.blame() != Blame::Peer && error.blame() == Blame::Peer) =>
            {
                self.told = Some(error);
            }
            _ => {}
        }
    }

    fn worst(self) -> LinkError {
        let unreachable = LinkError::Unreachable { addresses: self.addresses.to_vec(), why: self.why };
        self.told.unwrap_or(unreachable)
    }
}
