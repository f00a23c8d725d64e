//! A relay between two real processes that makes their link as bad as a test needs.
//!
//! [`Relay`] listens, and for every connection dials the target and carries the bytes both ways: late, slowly,
//! damaged, or not at all. It needs no rights and no kernel modules, so it works where `netem` does not. What it does
//! is changed while it runs, by [`Relay::command`]; the binary `swarm-lossy` takes the same commands on its standard
//! input and on a control port.
//!
//! A relay ends TCP at both its sides. Bytes that a cut or a stall holds back are not lost: they arrive when it ends,
//! as those of a real link would, sent again by the kernel.

mod pipe;
mod settings;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use pipe::Pipe;
use settings::{Change, State};
pub use settings::{Settings, Way};

/// Longest wait for the target to take a connection.
const DIAL: Duration = Duration::from_secs(5);

/// A running relay. Dropping it resets its connections.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    links: Mutex<Vec<Weak<Link>>>,
    stopped: AtomicBool,
}

/// One relayed connection.
#[derive(Debug)]
struct Link {
    /// Counted from 1.
    number: u64,
    near: TcpStream,
    far: TcpStream,
    /// Both pipes end at once, and the kernel sends resets instead of the rest.
    reset: AtomicBool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn links(&self) -> Vec<Arc<Link>> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|link| link.strong_count() > 0);
        links.iter().filter_map(Weak::upgrade).collect()
    }

    fn reset_all(&self) {
        for link in self.links() {
            link.reset.store(true, Ordering::Relaxed);
        }
        self.changed.notify_all();
    }
}

impl Relay {
    /// Listens on `listen` (port 0 for any) and relays to `target`.
    ///
    /// # Errors
    /// When it cannot listen, or `target` is no address.
    pub fn start(listen: &str, target: &str, settings: Settings) -> Result<Relay> {
        let target = target.to_socket_addrs().with_context(|| format!("{target:?} is no address"))?;
        let target: Vec<SocketAddr> = target.collect();
        let listener = TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new(settings)),
            changed: Condvar::new(),
            links: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        thread::Builder::new().name("relay".into()).spawn(move || accept(&listener, &target, &accepting))?;
        Ok(Relay { address, shared })
    }

    /// A relay on a free loopback port.
    ///
    /// # Errors
    /// As [`Relay::start`].
    pub fn to(target: &str, settings: Settings) -> Result<Relay> {
        Relay::start("127.0.0.1:0", target, settings)
    }

    /// Where to dial instead of the target.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what the relay does, or asks how it stands; see [`HELP`]. Returns one line.
    ///
    /// # Errors
    /// A command that is none.
    pub fn command(&self, line: &str) -> Result<String> {
        let change = Change::parse(line)?;
        match change {
            Change::Reset => self.shared.reset_all(),
            Change::Status => {
                let links = self.shared.links().len();
                return Ok(self.shared.state().status(links));
            }
            change => {
                self.shared.state().apply(change);
                self.shared.changed.notify_all();
            }
        }
        Ok("ok".to_owned())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        self.shared.reset_all();
        // Wakes the accepting thread; when even that fails it ends with the process.
        drop(TcpStream::connect_timeout(&self.address, Duration::from_millis(200)));
    }
}

/// The commands of [`Relay::command`].
pub const HELP: &str = "\
delay MS [JITTER_MS]      every byte arrives this much later, in both directions, and up to the jitter more
rate BYTES_PER_S | off    no more bytes than this per second, in each direction
stall MS [up|down]        nothing arrives for this long
cut up | down | both      nothing arrives until `heal`; up is from the dialler to the target
cut up | down | both newest    the same for the newest connection only
heal                      ends cuts, stalls and the damage still to be done
corrupt COUNT [up|down]   one bit is flipped in each of the next COUNT pieces
reset                     every connection ends with a reset
status                    connections and bytes";

fn accept(listener: &TcpListener, target: &[SocketAddr], shared: &Arc<Shared>) {
    // In the order in which they were accepted, whichever reaches the target first.
    for number in 1.. {
        match listener.accept() {
            _ if shared.stopped.load(Ordering::Relaxed) => return,
            Ok((near, _)) => {
                let (shared, target) = (Arc::clone(shared), target.to_vec());
                let serve = move || {
                    if let Err(error) = carry(near, number, &target, &shared) {
                        eprintln!("swarm-lossy: a connection is dropped: {error:#}");
                    }
                };
                if let Err(error) = thread::Builder::new().name("relay".into()).spawn(serve) {
                    eprintln!("swarm-lossy: {error}");
                }
            }
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            Err(error) => return eprintln!("swarm-lossy: cannot accept any more: {error}"),
        }
    }
}

/// Carries one connection until both its directions have ended.
fn carry(near: TcpStream, number: u64, target: &[SocketAddr], shared: &Arc<Shared>) -> Result<()> {
    let dial = |address: &SocketAddr| TcpStream::connect_timeout(address, DIAL).ok();
    let far = target.iter().find_map(dial).context("the target does not take connections")?;
    for stream in [&near, &far] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(pipe::LOOK))?;
        stream.set_write_timeout(Some(pipe::LOOK))?;
    }
    {
        let mut state = shared.state();
        state.newest = state.newest.max(number);
    }
    let link = Arc::new(Link { number, near, far, reset: AtomicBool::new(false) });
    shared.links.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&link));
    thread::scope(|scope| {
        for way in [Way::Up, Way::Down] {
            let pipe = Arc::new(Pipe::new(way, Arc::clone(shared), Arc::clone(&link)));
            let reading = Arc::clone(&pipe);
            scope.spawn(move || reading.read());
            scope.spawn(move || pipe.write());
        }
    });
    if link.reset.load(Ordering::Relaxed) {
        for stream in [&link.near, &link.far] {
            // With no time to linger, closing sends a reset.
            socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
        }
    }
    Ok(())
}
