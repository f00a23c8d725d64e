//! Reaching a peer at one of several addresses.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::connection::{Connection, LinkSettings, connect_halves, initiate, prepare, system};
use crate::error::{Blame, LinkError};
use crate::identity::Identity;
use crate::noise::Suite;

/// How long one address may stay silent before the next is tried beside it.
const STAGGER: Duration = Duration::from_millis(200);
/// A peer has a handful of interfaces; more is somebody playing.
const ADDRESSES_MAX: usize = 16;

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

fn shake_hands(
    stream: TcpStream,
    address: SocketAddr,
    identity: &Identity,
    settings: &LinkSettings,
    deadline: Instant,
) -> Result<Connection, LinkError> {
    prepare(&stream).map_err(system("setting up a socket"))?;
    let began = Instant::now();
    let established = initiate(&stream, identity, Suite::preferred(), deadline)
        .map_err(|failure| failure.explain(address, deadline.saturating_duration_since(began)))?;
    connect_halves(Arc::new(stream), established, address, settings)
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
