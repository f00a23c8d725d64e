//! An authenticated link over TCP: the handshake with its deadline, and the two halves that follow it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

use crate::desk::PairingDesk;
use crate::error::{IdentityError, LinkError};
use crate::id::{InstanceId, NodeId};
use crate::identity::Identity;
use crate::meet;
use crate::members::Key;
use crate::noise::{
    Established, Finished, First, HandshakeFailure, Initiator, LATE_BYTES, PROTOCOL_VERSION, Preamble,
    Purpose, Responder, Second, Suite, THIRD_NEWS_BYTES, preamble_of, read_preamble,
};
use crate::record::{RecordReader, RecordWriter};

/// Bytes of a background link that wait in its socket before they are on their way.
#[cfg(target_os = "linux")]
const BACKGROUND_UNSENT_BYTES: u32 = 128 << 10;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    stream: Shared,
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

    /// Marks what is sent from now on as less urgent than everything else, for this computer's own queue and for routers
    /// that look at it. Where a system has no such mark, nothing changes.
    pub fn set_background(&self) {
        let socket = SockRef::from(&*self.stream.0);
        // RFC 8622: lower effort.
        const LOWER_EFFORT: u32 = 1 << 2;
        let _ = socket.set_tos_v4(LOWER_EFFORT);
        #[cfg(target_os = "linux")]
        {
            // 2 is bulk; what is not yet on its way stays small, so that it can still be thought over.
            let _ = socket.set_priority(2);
            let _ = socket.set_tcp_notsent_lowat(BACKGROUND_UNSENT_BYTES);
        }
    }

    /// Limits the bytes that are on their way at any time; a network queue cannot hold more of this link. The system
    /// rounds the number, and has a smallest one.
    pub fn set_in_flight_bytes(&self, bytes: usize) {
        // A system that refuses sends more at a time.
        let _ = SockRef::from(&*self.stream.0).set_send_buffer_size(bytes);
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

    /// When the first bytes of the message received last were here; the rest came, and was decrypted, after that. `None`
    /// before the first message.
    pub fn began_at(&self) -> Option<Instant> {
        self.records.began_at()
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
        self.records.set_whole_within(None);
        Ok(())
    }

    /// For a thread that has other things to do as well: [`LinkError::Idle`] comes every `look`, also when a message is
    /// partly here, and receiving again goes on with it. Only one that is longer than a record, and has begun, is waited
    /// for until it is whole, `whole_within` at most. Until the idle timeout is set again.
    ///
    /// # Errors
    /// [`LinkError::System`] when the socket is gone.
    pub fn set_looks(&mut self, look: Duration, whole_within: Duration) -> Result<(), LinkError> {
        self.set_idle_timeout(Some(look))?;
        self.records.set_whole_within(Some(whole_within));
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
    /// Whether anybody still holds the socket.
    pub(crate) fn is_open(&self) -> bool {
        self.stream.strong_count() > 0
    }

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
    /// The other side typed another code than the one that is shown here.
    WrongCode,
    /// The files of this node cannot be read or written.
    Us(IdentityError),
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
            Self::WrongCode => LinkError::WrongCode { address },
            Self::Us(source) => LinkError::Identity { source: Box::new(source) },
            Self::Io(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                    LinkError::HandshakeTimeout { address, waited_ms: millis(timeout) }
                }
                _ => LinkError::HungUp { address },
            },
        }
    }
}

/// How a dialling side's handshake went.
pub(crate) enum Dialled {
    Linked(Box<Established>),
    /// The other side was paired with this machine and refused: one of the two may have missed a change of the secret.
    Estranged,
}

/// The handshake of the side that dialled.
pub(crate) fn initiate(
    stream: &TcpStream,
    identity: &Identity,
    suite: Suite,
    deadline: Instant,
) -> Result<Dialled, Failure> {
    identity.refresh();
    let mut timed = Timed { stream, deadline };
    let (initiator, first) = Initiator::start(identity, suite)?;
    let second = timed.exchange_first((Purpose::Link, suite), &first)?;
    let (waiting, third) = initiator.answer(&second)?;
    timed.write(&third)?;
    let mut confirmation = [0; 18];
    match timed.read(&mut confirmation) {
        Err(Failure::Io(error)) if !is_timeout(&error) => match identity.may_have_secrets(waiting.peer_key())
        {
            true => Ok(Dialled::Estranged),
            false => Err(Failure::RefusedByPeer),
        },
        other => {
            other?;
            Ok(Dialled::Linked(Box::new(waiting.confirm(&confirmation)?)))
        }
    }
}

/// Asks for the secret that followed this machine's own `age` changes ago, and takes it over.
pub(crate) fn ask_news(
    stream: &TcpStream,
    identity: &Identity,
    age: u8,
    deadline: Instant,
) -> Result<Key, Failure> {
    let (mut timed, what) = (Timed { stream, deadline }, (Purpose::Ask(age), Suite::preferred()));
    let (initiator, first) = Initiator::start_for(identity, what, 0)?;
    let second = timed.exchange_first(what, &first)?;
    let (waiting, third) = initiator.answer(&second)?;
    timed.write(&third)?;
    let mut late = [0; LATE_BYTES];
    timed.read(&mut late)?;
    let (key, gift) = waiting.late(&late)?;
    match identity.rotate(gift, &key) {
        Ok(true) => Ok(key),
        Ok(false) => Err(Failure::RefusedByPeer),
        Err(error) => Err(Failure::Us(error)),
    }
}

/// Brings the current secret to a machine that has the one of `age` before it; fails when it is not so.
pub(crate) fn bring_news(
    stream: &TcpStream,
    identity: &Identity,
    age: usize,
    deadline: Instant,
) -> Result<Key, Failure> {
    let (mut timed, what) = (Timed { stream, deadline }, (Purpose::News, Suite::preferred()));
    let (initiator, first) = Initiator::start_for(identity, what, age)?;
    let second = timed.exchange_first(what, &first)?;
    let (waiting, third) = initiator.bring_news(&second)?;
    timed.write(&third)?;
    let mut confirmation = [0; 18];
    timed.read(&mut confirmation)?;
    Ok(waiting.confirm(&confirmation)?.peer_key)
}

/// What a connection that was dialled by somebody else came for, and got.
pub(crate) enum Served {
    Linked(Box<Established>),
    /// A member brought a new secret, or took one that it had missed.
    News,
    /// A machine asked whether it may pair (`false`), or proved that it knows the code.
    Pairing(bool),
}

/// The handshake of the side that was dialled. Holds under 2 KiB of a stranger's.
pub(crate) fn respond(
    stream: &TcpStream,
    identity: &Identity,
    desk: Option<&PairingDesk>,
    address: SocketAddr,
    deadline: Instant,
) -> Result<Served, Failure> {
    identity.refresh();
    let mut timed = Timed { stream, deadline };
    let mut asked: Preamble = [0; 6];
    timed.read(&mut asked)?;
    let (purpose, suite) = match read_preamble(&asked) {
        Err(failure @ HandshakeFailure::OtherVersion(_)) => {
            // Our version is no secret, and tells the user of the other node what to do.
            timed.write(&preamble_of(Purpose::Link, Suite::preferred()))?;
            return Err(failure.into());
        }
        other => other?,
    };
    if purpose == Purpose::Pair {
        let desk = desk.ok_or(HandshakeFailure::Refused)?;
        return meet::show(&mut timed, identity, desk, suite, address).map(Served::Pairing);
    }
    let mut first = [0; 48];
    timed.read(&mut first)?;
    let (responder, second) = Responder::answer_for(identity, (purpose, suite), &first)?;
    timed.write(&[preamble_of(purpose, suite).as_slice(), &second].concat())?;
    if purpose == Purpose::News {
        let mut third = [0; THIRD_NEWS_BYTES];
        timed.read(&mut third)?;
        let (gift, established, confirmation) = responder.hear_news(&third)?;
        return match identity.rotate(gift, &established.peer_key) {
            Ok(true) => timed.write(&confirmation).map(|()| Served::News),
            Ok(false) => Err(HandshakeFailure::Refused.into()),
            Err(error) => Err(Failure::Us(error)),
        };
    }
    let mut third = [0; 80];
    timed.read(&mut third)?;
    match responder.finish(&third)? {
        Finished::Member(established, confirmation) => {
            timed.write(&confirmation)?;
            Ok(Served::Linked(Box::new(established)))
        }
        Finished::Late(news) => timed.write(news.as_slice()).map(|()| Served::News),
    }
}

/// A socket with one deadline over everything, not one per read: a peer that sends a byte a second must
/// not hold a place for ever.
pub(crate) struct Timed<'a> {
    pub stream: &'a TcpStream,
    pub deadline: Instant,
}

impl Timed<'_> {
    /// Sends preamble and first message; the preamble that comes back must be the same.
    fn exchange_first(&mut self, what: (Purpose, Suite), first: &First) -> Result<Second, Failure> {
        self.write(&[preamble_of(what.0, what.1).as_slice(), first].concat())?;
        self.expect_preamble(what)?;
        let mut second = [0; 112];
        self.read(&mut second)?;
        Ok(second)
    }

    pub(crate) fn expect_preamble(&mut self, what: (Purpose, Suite)) -> Result<(), Failure> {
        let mut reply: Preamble = [0; 6];
        self.read(&mut reply)?;
        if read_preamble(&reply)? == what { Ok(()) } else { Err(HandshakeFailure::NotSwarm.into()) }
    }

    fn left(&self) -> Result<Duration, Failure> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(Failure::Io(ErrorKind::TimedOut.into())) } else { Ok(at_least_one_ms(left)) }
    }

    pub(crate) fn read(&mut self, out: &mut [u8]) -> Result<(), Failure> {
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

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        // Under 1200 bytes on an idle socket fit its buffer, so this is one write in practice.
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
    identity: &Identity,
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
        stream: shared.clone(),
        closed_here: Arc::clone(&closed_here),
        write_timeout: settings.write_timeout,
    };
    let records = RecordReader::new(shared.clone(), keys, first_received, bytes_max);
    let mut receiver = Receiver { records, closed_here, stream: shared, idle_timeout: None };
    receiver.set_idle_timeout(settings.idle_timeout)?;
    identity.watch(peer_key, closer.clone());
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

pub(crate) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// A timeout of zero means "for ever" to a socket.
fn at_least_one_ms(duration: Duration) -> Duration {
    duration.max(Duration::from_millis(1))
}
