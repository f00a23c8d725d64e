//! Receiving frames on a data connection, most of them by the thread that computes.
//!
//! A frame that one thread receives and another computes costs a wake-up between the two, on a core whose caches are
//! full of weights. So whoever computes reads the link itself while it waits, and leaves it on the desk while it
//! computes. A stand-in takes the link up when it has lain there for [`STAND_IN`], and at once behind a frame that
//! takes long to compute: then frames are received and acknowledged beside computing, and wait in a short queue. It
//! gives the link back with the first frame that somebody waits for.
//!
//! Receipts are written by whoever reads, in the order of the frames: by the computing thread when it waits again, by
//! the stand-in before anything else. So no receipt waits for a forward that takes longer than [`STAND_IN`], and an
//! echo is always behind the receipts of what came before it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use swarm_link::LinkError;
use swarm_ring::Arrival;
use swarm_wire::{ACK_BYTES, Ack, CloseCode, Closing, Echo, Epoch, Limits};

use crate::clock::{at_us, now_us};
use crate::deadlines::{ANSWER_LOOK, ANSWER_WHOLE, IDLE, STAND_IN};
use crate::error::NodeError;
use crate::refusals::Refusals;
use crate::worker::spawn;

/// A larger frame is computed for long, and the next one may not fit into the socket's buffer beside it.
const READ_HERE_BYTES: usize = 64 << 10;
/// Looks of the stand-in at a link that others read, before it sleeps until one is left on the desk.
const LOOKS: u32 = 20;

/// Frames that may wait for the compute thread: all batches that a ring of so many stages has on its way, and the
/// beginning and end of every session. A slow stage must not keep the stand-in from acknowledging.
pub(crate) fn queue(limits: &Limits) -> usize {
    let (stages, sessions) = (limits.stages_max as usize, limits.segments_max as usize);
    stages.saturating_add(1).saturating_add(sessions.saturating_mul(2))
}

/// A frame as it came.
pub(crate) struct Inbound {
    pub bytes: Vec<u8>,
    pub arrival: Arrival,
    pub wire_bytes: u64,
}

/// Why no more frames come.
#[derive(Debug)]
pub(crate) enum InboxEnd {
    Link(LinkError),
    /// The other end closed the link and said why.
    Told(CloseCode),
}

impl InboxEnd {
    /// What the other end is told of this; `None` where it is not to blame.
    pub fn code(&self) -> Option<CloseCode> {
        match self {
            Self::Link(error) => crate::refusals::link_code(error),
            Self::Told(_) => None,
        }
    }

    /// The end of the link with `node` as an error.
    pub fn into_error(self, node: &str) -> NodeError {
        match self {
            Self::Link(error) => error.into(),
            Self::Told(code) => NodeError::Closed { node: node.to_owned(), code },
        }
    }
}

/// The two halves of a data connection that frames come on: they are received on one, and acknowledged on the other.
pub(crate) struct Upstream {
    pub receiver: swarm_link::Receiver,
    pub receipts: swarm_link::Sender,
}

/// What a thread that computes waits for beside frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beside {
    Nothing,
    /// It has to look at other things as well, every [`ANSWER_LOOK`].
    Others,
}

impl Beside {
    /// Sets how a link is waited on.
    fn waits_on(self, link: &mut swarm_link::Receiver) -> Result<(), LinkError> {
        match self {
            Self::Nothing => link.set_idle_timeout(None),
            Self::Others => link.set_looks(ANSWER_LOOK, ANSWER_WHOLE),
        }
    }
}

/// What reading brought.
pub(crate) enum Read {
    Frame(Inbound),
    /// Nothing came for [`ANSWER_LOOK`].
    Nothing,
    /// The stand-in reads: the frame comes through the queue.
    Queue,
    /// No more frames come.
    Ended,
}

/// The frames of a link. They end when the link does; `end` then says why.
pub(crate) struct Inbox {
    /// From the stand-in.
    pub frames: Receiver<Inbound>,
    shared: Arc<Shared>,
}

/// What the computing thread and the stand-in share.
struct Shared {
    desk: Mutex<Desk>,
    changed: Condvar,
    receipts: Mutex<Receipts>,
    beside: Beside,
    used: Sender<Vec<u8>>,
    buffers: Receiver<Vec<u8>>,
}

struct Desk {
    /// Here while nobody reads it, and waited on as the computing thread does.
    link: Option<swarm_link::Receiver>,
    /// Since when.
    left: Instant,
    /// The stand-in is to take it now.
    urgent: bool,
    /// The stand-in sleeps until a link is left here.
    asleep: bool,
    /// Somebody waits for the stand-in's next frame.
    awaited: bool,
    /// Nobody wants frames any more.
    closed: bool,
    /// The link has ended, and `end` says why until that is taken.
    ended: bool,
    end: Option<InboxEnd>,
}

impl Desk {
    fn ended_with(&mut self, end: InboxEnd) {
        self.end = Some(end);
        self.ended = true;
    }
}

/// What the other end is to be told, in this order.
struct Receipts {
    sender: swarm_link::Sender,
    due: Vec<[u8; ACK_BYTES]>,
}

impl Receipts {
    fn settle(&mut self) {
        for receipt in self.due.drain(..) {
            // An end of the link is found when the next frame does not come.
            let _ = self.sender.send(&[&receipt]);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Receives, decrypts and acknowledges frames until the link ends or the inbox is dropped.
pub(crate) fn receive_frames(
    upstream: Upstream,
    limits: &Limits,
    beside: Beside,
) -> Result<Inbox, NodeError> {
    let Upstream { receiver: mut link, receipts: sender } = upstream;
    let bytes_max = limits.frame_bytes_max().map_err(|e| NodeError::Request(e.to_string()))?;
    link.set_message_bytes_max(usize::try_from(bytes_max).unwrap_or(usize::MAX));
    beside.waits_on(&mut link)?;
    let (sink, frames) = bounded(queue(limits));
    let (used, buffers) = bounded::<Vec<u8>>(queue(limits).saturating_add(1));
    let desk = Desk {
        link: Some(link),
        left: Instant::now(),
        urgent: true,
        asleep: false,
        awaited: false,
        closed: false,
        ended: false,
        end: None,
    };
    let shared = Arc::new(Shared {
        desk: Mutex::new(desk),
        changed: Condvar::new(),
        receipts: Mutex::new(Receipts { sender, due: Vec::new() }),
        beside,
        used,
        buffers,
    });
    let stand_in = StandIn { shared: shared.clone(), sink };
    spawn("receive", move || stand_in.run())?;
    Ok(Inbox { frames, shared })
}

impl Inbox {
    /// Waits for the next frame; `None` when no more come.
    pub fn next(&self) -> Option<Inbound> {
        loop {
            match self.read() {
                Read::Frame(inbound) => return Some(inbound),
                Read::Nothing => {}
                Read::Queue => return self.frames.recv().ok(),
                Read::Ended => return None,
            }
        }
    }

    /// Sends the receipts that are due, and reads the link unless the stand-in does.
    pub fn read(&self) -> Read {
        lock(&self.shared.receipts).settle();
        let mut desk = lock(&self.shared.desk);
        // Both under the lock: the stand-in gives back the link and its last frame as one.
        if let Ok(inbound) = self.frames.try_recv() {
            return Read::Frame(inbound);
        }
        let Some(mut link) = desk.link.take() else {
            desk.awaited = true;
            return if desk.ended { Read::Ended } else { Read::Queue };
        };
        drop(desk);
        let received = self.shared.receive(&mut link);
        self.shared.leave(link, received)
    }

    /// Gives a frame's buffer back.
    pub fn recycle(&self, inbound: Inbound) {
        self.shared.recycle(inbound.bytes);
    }

    /// Why the link ended, once the frames have.
    pub fn end(&self) -> Option<InboxEnd> {
        lock(&self.shared.desk).end.take()
    }

    /// Counts `code` and tells it to the other end, whose link is about to be closed.
    pub fn refuse(&self, refusals: &Refusals, epoch: Epoch, code: CloseCode) {
        // The stand-in may be about to acknowledge; it holds the sender no longer than a write may take.
        let mut receipts = lock(&self.shared.receipts);
        receipts.settle();
        refusals.tell(&mut receipts.sender, epoch, code);
    }
}

impl Drop for Inbox {
    /// The stand-in reads on until the link ends: closed before, it would be reset, and lose what the other end has not
    /// read yet.
    fn drop(&mut self) {
        lock(&self.shared.desk).closed = true;
        self.shared.changed.notify_one();
    }
}

impl Shared {
    /// Receives one frame and notes its receipt. Nothing when none came for the link's idle timeout.
    fn receive(&self, link: &mut swarm_link::Receiver) -> Result<Option<Inbound>, InboxEnd> {
        let mut bytes = self.buffers.try_recv().unwrap_or_default();
        loop {
            let wire_bytes = match link.receive(&mut bytes) {
                Ok(wire_bytes) => wire_bytes as u64,
                Err(LinkError::Idle { .. }) => {
                    self.recycle(bytes);
                    return Ok(None);
                }
                Err(error) => return Err(InboxEnd::Link(error)),
            };
            let received_us = now_us();
            let arriving_us = link.began_at().map_or(received_us, at_us).min(received_us);
            if let Some(ack) = Ack::of(&bytes) {
                lock(&self.receipts).due.push(ack.encode());
            } else if let Ok(closing) = Closing::decode(&bytes) {
                return Err(InboxEnd::Told(closing.code));
            } else if let Ok(echo) = Echo::decode(&bytes) {
                let mut receipts = lock(&self.receipts);
                receipts.due.push(echo.encode());
                receipts.settle();
                continue;
            }
            let arrival = Arrival { arriving_us, received_us };
            return Ok(Some(Inbound { bytes, arrival, wire_bytes }));
        }
    }

    /// Leaves the link on the desk after reading it, and says what that brought.
    fn leave(&self, link: swarm_link::Receiver, received: Result<Option<Inbound>, InboxEnd>) -> Read {
        let mut desk = lock(&self.desk);
        let read = match received {
            Ok(inbound) => {
                desk.link = Some(link);
                desk.left = Instant::now();
                inbound.map_or(Read::Nothing, Read::Frame)
            }
            Err(end) => {
                desk.ended_with(end);
                Read::Ended
            }
        };
        desk.urgent = matches!(&read, Read::Frame(inbound) if inbound.bytes.len() > READ_HERE_BYTES);
        let call = desk.ended || desk.urgent || std::mem::take(&mut desk.asleep);
        drop(desk);
        if call {
            self.changed.notify_one();
        }
        read
    }

    fn recycle(&self, bytes: Vec<u8>) {
        // Full only when there are enough buffers already.
        let _ = self.used.try_send(bytes);
    }
}

/// The thread that receives while the other one computes.
struct StandIn {
    shared: Arc<Shared>,
    sink: Sender<Inbound>,
}

impl StandIn {
    fn run(&self) {
        while let Some(mut link) = self.take() {
            let set = Beside::Nothing.waits_on(&mut link).map_err(InboxEnd::Link);
            if let Err(end) = set.and_then(|()| self.read(link)) {
                lock(&self.shared.desk).ended_with(end);
                return;
            }
        }
    }

    /// Waits until a link was left for long enough; nothing when there is none any more.
    fn take(&self) -> Option<swarm_link::Receiver> {
        let (mut desk, mut looks) = (lock(&self.shared.desk), 0);
        loop {
            let lain = desk.left.elapsed();
            let due = desk.urgent || desk.closed || lain >= STAND_IN;
            if let Some(link) = desk.link.take_if(|_| due) {
                desk.urgent = false;
                return Some(link);
            }
            // Closed, and nothing to read on: the other thread was in the middle of it, and will not come back.
            if desk.ended || desk.closed {
                return None;
            }
            looks = if desk.link.is_some() { 0 } else { looks + 1 };
            desk.asleep = looks > LOOKS;
            let within = match (desk.asleep, desk.link.is_some()) {
                (true, _) => IDLE,
                (false, true) => STAND_IN.saturating_sub(lain),
                (false, false) => STAND_IN,
            };
            let waited = self.shared.changed.wait_timeout(desk, within);
            desk = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Receives until somebody waits for a frame, and gives the link back with it.
    fn read(&self, mut link: swarm_link::Receiver) -> Result<(), InboxEnd> {
        loop {
            // What the other thread read and has not acknowledged, and then what was read here.
            lock(&self.shared.receipts).settle();
            let Some(inbound) = self.shared.receive(&mut link)? else { continue };
            let mut desk = lock(&self.shared.desk);
            let back = std::mem::take(&mut desk.awaited) && inbound.bytes.len() <= READ_HERE_BYTES;
            if !back {
                drop(desk);
                if self.sink.send(inbound).is_err() {
                    return Err(InboxEnd::Link(LinkError::ClosedHere));
                }
                continue;
            }
            self.shared.beside.waits_on(&mut link).map_err(InboxEnd::Link)?;
            desk.link = Some(link);
            desk.left = Instant::now();
            // Somebody waits, so the queue is empty.
            let sent = self.sink.try_send(inbound);
            drop(desk);
            lock(&self.shared.receipts).settle();
            return sent.map_err(|_| InboxEnd::Link(LinkError::ClosedHere));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;
    use std::time::Duration;
    use swarm_link::{Connection, Identity, LinkSettings, Listener, SwarmSecret, dial};
    use swarm_wire::{Frame, FrameHead, Tokens};

    const EPOCH: Epoch = Epoch(3);
    const LIMITS: Limits =
        Limits { width: 64, vocab: 100, context_max: 512, tokens_max: 1024, segments_max: 4, stages_max: 3 };
    const PATIENCE: Duration = Duration::from_secs(10);

    /// The inbox at one end of a link, and the other end.
    fn inbox(beside: Beside) -> (Inbox, Connection) {
        let secret = SwarmSecret::random().unwrap();
        let identity = || Identity::ephemeral(secret.clone()).unwrap();
        let settings = LinkSettings::default();
        let listener = Listener::bind_to("127.0.0.1:0".parse().unwrap(), &identity(), &settings).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], listener.port()));
        let mut far = dial(&[address], &identity(), &settings, PATIENCE).unwrap();
        far.receiver.set_idle_timeout(Some(PATIENCE)).unwrap();
        let Connection { sender: receipts, receiver, .. } =
            listener.connections().recv_timeout(PATIENCE).unwrap();
        (receive_frames(Upstream { receiver, receipts }, &LIMITS, beside).unwrap(), far)
    }

    /// A batch that is acknowledged, of `bytes` bytes or a few.
    fn batch(lap: u64, bytes: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let head = FrameHead { epoch: EPOCH, lap };
        Frame::Tokens(Tokens { head, items: &[], trail: &[] }).encode(&LIMITS, &mut out).unwrap();
        out.resize(out.len().max(bytes), 0);
        out
    }

    fn send(far: &mut Connection, message: &[u8]) {
        far.sender.send(&[message]).unwrap();
    }

    /// What the other end is told next.
    fn told(far: &mut Connection) -> Vec<u8> {
        let mut message = Vec::new();
        far.receiver.receive(&mut message).unwrap();
        message
    }

    fn receipt(lap: u64) -> Vec<u8> {
        Ack { epoch: EPOCH, lap }.encode().to_vec()
    }

    fn next(inbox: &Inbox) -> Vec<u8> {
        inbox.next().expect("a frame").bytes
    }

    /// Sends `lap`, takes it, and waits until this thread's next reading is its own.
    fn one_frame(inbox: &Inbox, far: &mut Connection, lap: u64) {
        send(far, &batch(lap, 0));
        assert_eq!(next(inbox), batch(lap, 0));
    }

    #[test]
    fn who_waits_reads_and_acknowledges_in_order() {
        for beside in [Beside::Nothing, Beside::Others] {
            let (inbox, mut far) = inbox(beside);
            (0..20).for_each(|lap| one_frame(&inbox, &mut far, lap));
            // Several at once, and waiting again sends the receipts.
            (20..23).for_each(|lap| send(&mut far, &batch(lap, 0)));
            (20..23).for_each(|lap| assert_eq!(next(&inbox), batch(lap, 0)));
            std::thread::scope(|scope| {
                let waits = scope.spawn(|| next(&inbox));
                (0..23).for_each(|lap| assert_eq!(told(&mut far), receipt(lap)));
                send(&mut far, &batch(23, 0));
                assert_eq!(waits.join().unwrap(), batch(23, 0));
            });
        }
    }

    #[test]
    fn beside_a_long_computation_frames_are_acknowledged_and_wait() {
        for bytes in [0, READ_HERE_BYTES + 1] {
            let (inbox, mut far) = inbox(Beside::Nothing);
            one_frame(&inbox, &mut far, 0);
            send(&mut far, &batch(1, bytes));
            assert_eq!(next(&inbox), batch(1, bytes));
            // Nobody waits now.
            send(&mut far, &batch(2, 0));
            send(&mut far, &Echo { epoch: EPOCH, lap: 2 }.encode());
            (0..3).for_each(|lap| assert_eq!(told(&mut far), receipt(lap)));
            assert_eq!(told(&mut far), Echo { epoch: EPOCH, lap: 2 }.encode());
            send(&mut far, &batch(3, 0));
            assert_eq!(told(&mut far), receipt(3));
            assert_eq!((next(&inbox), next(&inbox)), (batch(2, 0), batch(3, 0)));
            // The stand-in gives the link back with the first frame that somebody waits for.
            one_frame(&inbox, &mut far, 4);
            one_frame(&inbox, &mut far, 5);
            assert_eq!((told(&mut far), told(&mut far)), (receipt(4), receipt(5)));
        }
    }

    #[test]
    fn a_look_around_brings_nothing_and_loses_nothing() {
        let (inbox, mut far) = inbox(Beside::Others);
        one_frame(&inbox, &mut far, 0);
        let mut looks = 0;
        while looks < 3 {
            match inbox.read() {
                Read::Nothing => looks += 1,
                Read::Queue => one_frame(&inbox, &mut far, 1),
                Read::Frame(_) | Read::Ended => panic!("nothing was sent, and the link is up"),
            }
        }
        one_frame(&inbox, &mut far, 2);
    }

    #[test]
    fn an_end_says_why_whoever_reads() {
        for computes in [false, true] {
            let (inbox, mut far) = inbox(Beside::Nothing);
            one_frame(&inbox, &mut far, 0);
            send(&mut far, &batch(1, 0));
            if computes {
                // The stand-in has the frame when its receipt is here.
                (0..2).for_each(|lap| assert_eq!(told(&mut far), receipt(lap)));
            }
            send(&mut far, &Closing { epoch: EPOCH, code: CloseCode::Order }.encode());
            assert_eq!(next(&inbox), batch(1, 0));
            assert!(inbox.next().is_none());
            assert!(matches!(inbox.end(), Some(InboxEnd::Told(CloseCode::Order))));
            assert!(inbox.next().is_none() && inbox.end().is_none());
        }
        let (inbox, far) = inbox(Beside::Nothing);
        drop(far);
        assert!(inbox.next().is_none());
        assert!(matches!(inbox.end(), Some(InboxEnd::Link(LinkError::Closed))));
    }
}
