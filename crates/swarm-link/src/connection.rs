//! An authenticated link over TCP: the handshake with its deadline, and the two halves that follow it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

use crate::error::LinkError;
use crate::id::{InstanceId, NodeId};
use crate::identity::Identity;
use crate::noise::{
    Established, HandshakeFailure, Initiator, PROTOCOL_VERSION, Preamble, Responder, Suite, preamble,
    read_preamble,
};
use crate::record::{RecordReader, RecordWriter};

/// Deadlines and limits of a link. The limits may be changed once the two ends agree on others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkSettings {
    /// From the first byte to an authenticated link, over all reads and writes together.
    pub handshake_timeout: Duration,
    /// Longest wait for the next bytes when receiving; `None` waits until the link ends.
    pub idle_timeout: Option<Duration>,
    /// Longest wait for the peer to take any bytes when sending.
    pub write_timeout: Duration,
    /// Longest message sent or received, in bytes.
    pub message_bytes_max: usize,
}

impl Default for LinkSettings {
    /// 3 s for the handshake, no idle timeout, 10 s for a write, messages up to 1 MiB.
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(3),
            idle_timeout: None,
            write_timeout: Duration::from_secs(10),
            message_bytes_max: 1 << 20,
        }
    }
}

/// Who is at the other end, as the handshake proved it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    /// Its static X25519 public key. Nodes that share a config folder share it.
    pub static_key: [u8; 32],
    /// The random name of its process, as in its mDNS announcement.
    pub instance: InstanceId,
    /// Both of the above in one name.
    pub node: NodeId,
    /// The address of its end of the TCP connection. Its port is the listening one only if this node dialled.
    pub address: SocketAddr,
}

/// A link to a peer that holds the same swarm secret. The socket closes when both halves are dropped, or
/// by the closer. Closing while messages from the peer lie unread resets the connection, and the peer may then
/// lose what it has not read either: say goodbye, and wait for the answer, where that matters.
#[derive(Debug)]
pub struct Connection {
    /// Who it is.
    pub peer: PeerInfo,
    /// The cipher in use.
    pub suite: Suite,
    /// For one thread.
    pub sender: Sender,
    /// For another.
    pub receiver: Receiver,
    /// For any number.
    pub closer: Closer,
}

/// The sending half. Not cloneable: record numbers must be used once.
#[derive(Debug)]
pub struct Sender {
    records: RecordWriter<Shared>,
    closed_here: Arc<AtomicBool>,
    write_timeout: Duration,
}

impl Sender {
    /// Sends the concatenation of `parts` as one message; returns the bytes put on the wire (the message,
    /// 4 bytes, and 18 bytes for every 60 KiB). A message of up to 240 KiB is one system call. Nothing is
    /// allocated once a message of this size has been sent.
    ///
    /// # Errors
    /// [`LinkError::SendTooLong`] leaves the link as it was. After any other error this half is broken:
    /// the peer may have seen part of the message.
    pub fn send(&mut self, parts: &[&[u8]]) -> Result<usize, LinkError> {
        self.records.send(parts).map_err(|error| match error {
            _ if self.closed_here.load(Ordering::Acquire) => LinkError::ClosedHere,
            LinkError::WriteTimeout { .. } => {
                LinkError::WriteTimeout { waited_ms: millis(self.write_timeout) }
            }
            error => error,
        })
    }

    /// Changes the longest message this half may send, in bytes.
    pub fn set_message_bytes_max(&mut self, bytes: usize) {
        self.records.set_bytes_max(bytes);
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver {
    records: RecordReader<Shared>,
    closed_here: Arc<AtomicBool>,
    stream: Shared,
    idle_timeout: Option<Duration>,
}

impl Receiver {
    /// Waits for the next message and puts it into `message`, replacing what was there; returns the bytes
    /// it took on the wire. Grows `message` at most once, by an amount held against the limit first.
    ///
    /// # Errors
    /// [`LinkError::Idle`] when nothing came for the idle timeout: receiving again is allowed. After any
    /// other error this half is broken and `message` empty. [`LinkError::Closed`] is an end between two
    /// messages; it is not authenticated, so anyone on the path can cause it.
    pub fn receive(&mut self, message: &mut Vec<u8>) -> Result<usize, LinkError> {
        self.records.receive(message).map_err(|error| match error {
            LinkError::Idle { .. } => LinkError::Idle { waited_ms: self.idle_timeout.map_or(0, millis) },
            _ if self.closed_here.load(Ordering::Acquire) => LinkError::ClosedHere,
            error => error,
        })
    }

    /// Changes the longest message this half accepts, in bytes.
    pub fn set_message_bytes_max(&mut self, bytes: usize) {
        self.records.set_bytes_max(bytes);
    }

    /// Changes how long to wait for the next bytes; `None` waits until the link ends.
    ///
    /// # Errors
    /// [`LinkError::System`] when the socket is gone.
    pub fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> Result<(), LinkError> {
        let timeout = timeout.map(at_least_one_ms);
        self.stream.0.set_read_timeout(timeout).map_err(system("setting a read timeout"))?;
        self.idle_timeout = timeout;
        Ok(())
    }
}

/// Ends a link from any thread. Does not keep the socket alive.
#[derive(Debug, Clone)]
pub struct Closer {
    stream: Weak<TcpStream>,
    closed_here: Arc<AtomicBool>,
}

impl Closer {
    /// Ends the link: a blocked receive or send returns [`LinkError::ClosedHere`] at once. Does nothing
    /// the second time.
    pub fn close(&self) {
        self.closed_here.store(true, Ordering::Release);
        if let Some(stream) = self.stream.upgrade() {
            // An error means that the connection is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// One socket for both halves: reads and writes of a TCP stream do not disturb each other.
#[derive(Debug, Clone)]
struct Shared(Arc<TcpStream>);

impl Read for Shared {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(out)
    }
}

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a handshake over a socket says when it fails.
pub(crate) enum Failure {
    Io(io::Error),
    Noise(HandshakeFailure),
    /// The responder had all it needed to accept, and hung up instead.
    RefusedByPeer,
}

impl From<HandshakeFailure> for Failure {
    fn from(failure: HandshakeFailure) -> Self {
        Self::Noise(failure)
    }
}

impl Failure {
    pub(crate) fn explain(self, address: SocketAddr, timeout: Duration) -> LinkError {
        match self {
            Self::Noise(HandshakeFailure::NotSwarm) => LinkError::NotSwarm { address },
            Self::Noise(HandshakeFailure::OtherVersion(theirs)) => {
                LinkError::OtherVersion { address, theirs, ours: PROTOCOL_VERSION }
            }
            Self::Noise(HandshakeFailure::OwnAddress) => LinkError::OwnAddress { address },
            Self::Noise(HandshakeFailure::Refused) | Self::RefusedByPeer => LinkError::Refused { address },
            Self::Io(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                    LinkError::HandshakeTimeout { address, waited_ms: millis(timeout) }
                }
                _ => LinkError::HungUp { address },
            },
        }
    }
}

/// The handshake of the side that dialled.
pub(crate) fn initiate(
    stream: &TcpStream,
    identity: &Identity,
    suite: Suite,
    deadline: Instant,
) -> Result<Established, Failure> {
    let mut timed = Timed { stream, deadline };
    let (initiator, first) = Initiator::start(identity, suite)?;
    timed.write(&[preamble(suite).as_slice(), &first].concat())?;
    let mut reply: Preamble = [0; 6];
    timed.read(&mut reply)?;
    if read_preamble(&reply)? != suite {
        return Err(HandshakeFailure::NotSwarm.into());
    }
    let mut second = [0; 112];
    timed.read(&mut second)?;
    let (waiting, third) = initiator.answer(&second)?;
    timed.write(&third)?;
    let mut confirmation = [0; 18];
    timed.read(&mut confirmation).map_err(|failure| match failure {
        Failure::Io(error) if !is_timeout(&error) => Failure::RefusedByPeer,
        failure => failure,
    })?;
    Ok(waiting.confirm(&confirmation)?)
}

/// The handshake of the side that was dialled. Holds under 300 bytes of a stranger's.
pub(crate) fn respond(
    stream: &TcpStream,
    identity: &Identity,
    deadline: Instant,
) -> Result<Established, Failure> {
    let mut timed = Timed { stream, deadline };
    let mut asked: Preamble = [0; 6];
    timed.read(&mut asked)?;
    let suite = match read_preamble(&asked) {
        Err(failure @ HandshakeFailure::OtherVersion(_)) => {
            // Our version is no secret, and tells the user of the other node what to do.
            timed.write(&preamble(Suite::preferred()))?;
            return Err(failure.into());
        }
        other => other?,
    };
    let mut first = [0; 48];
    timed.read(&mut first)?;
    let (responder, second) = Responder::answer(identity, suite, &first)?;
    timed.write(&[preamble(suite).as_slice(), &second].concat())?;
    let mut third = [0; 80];
    timed.read(&mut third)?;
    let (established, confirmation) = responder.finish(&third)?;
    timed.write(&confirmation)?;
    Ok(established)
}

/// A socket with one deadline over everything, not one per read: a peer that sends a byte a second must
/// not hold a place for ever.
struct Timed<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Timed<'_> {
    fn left(&self) -> Result<Duration, Failure> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(Failure::Io(ErrorKind::TimedOut.into())) } else { Ok(at_least_one_ms(left)) }
    }

    fn read(&mut self, out: &mut [u8]) -> Result<(), Failure> {
        let mut had = 0;
        while let Some(rest) = out.get_mut(had..).filter(|rest| !rest.is_empty()) {
            self.stream.set_read_timeout(Some(self.left()?)).map_err(Failure::Io)?;
            match (&*self.stream).read(rest) {
                Ok(0) => return Err(Failure::Io(ErrorKind::UnexpectedEof.into())),
                Ok(bytes) => had += bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::Io(error)),
            }
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        // Under 200 bytes on an idle socket fit its buffer, so this is one write in practice.
        self.stream.set_write_timeout(Some(self.left()?)).map_err(Failure::Io)?;
        (&*self.stream).write_all(bytes).map_err(Failure::Io)
    }
}

/// Options every link socket has.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    // Heartbeats notice a dead peer much sooner; this only keeps idle links from living for ever.
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5));
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// Turns a finished handshake into the two halves.
pub(crate) fn connect_halves(
    stream: Arc<TcpStream>,
    established: Established,
    address: SocketAddr,
    settings: &LinkSettings,
) -> Result<Connection, LinkError> {
    let Established { keys, suite, peer_key, peer_instance, first_sent, first_received } = established;
    stream
        .set_write_timeout(Some(at_least_one_ms(settings.write_timeout)))
        .map_err(system("setting a write timeout"))?;
    let closed_here = Arc::new(AtomicBool::new(false));
    let closer = Closer { stream: Arc::downgrade(&stream), closed_here: Arc::clone(&closed_here) };
    let shared = Shared(stream);
    let bytes_max = settings.message_bytes_max;
    let sender = Sender {
        records: RecordWriter::new(shared.clone(), Arc::clone(&keys), first_sent, bytes_max),
        closed_here: Arc::clone(&closed_here),
        write_timeout: settings.write_timeout,
    };
    let records = RecordReader::new(shared.clone(), keys, first_received, bytes_max);
    let mut receiver = Receiver { records, closed_here, stream: shared, idle_timeout: None };
    receiver.set_idle_timeout(settings.idle_timeout)?;
    let node = NodeId::of(&peer_key, peer_instance);
    let peer = PeerInfo { static_key: peer_key, instance: peer_instance, node, address };
    Ok(Connection { peer, suite, sender, receiver, closer })
}

pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> LinkError {
    move |source| LinkError::System { what, source }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// A timeout of zero means "for ever" to a socket.
fn at_least_one_ms(duration: Duration) -> Duration {
    duration.max(Duration::from_millis(1))
}
