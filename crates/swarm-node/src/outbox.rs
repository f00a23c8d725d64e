//! Sending batches that must be acknowledged.
//!
//! Whoever receives a batch says so at once, on the same connection, from the thread that receives. A thread of its own
//! here reads these receipts. Behind a batch whose receipt is late goes an echo, which that same thread sends back: one
//! that is back before the receipt proves that the batch was lost, a round trip after it was looked for. A slow link or a
//! process that was stopped delays both alike, so this is never a false alarm. When neither comes, the connection does
//! not carry what is sent; heartbeats on another one do not see that, and the lap's own deadline sees it only after the
//! slowest node could have computed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use swarm_link::LinkError;
use swarm_wire::{ACK_BYTES, Ack, Echo, Epoch, Limits, Receipt};

use crate::clock::now_us;
use crate::deadlines::{ACKNOWLEDGE, RECEIPT_HERE, RECEIPT_LATE, RECEIPT_LOOK};
use crate::error::NodeError;
use crate::serve::limit_sender;
use crate::worker::spawn;

/// No link is slower than this, in bytes per second: what is on its way may take so much longer to arrive.
const BYTES_PER_S_MIN: u64 = 64_000;

/// Told once, in words, when the other end does not take what it is sent.
pub(crate) type OnSilence = Box<dyn FnOnce(String) + Send>;

/// The sending half of a data connection.
pub(crate) struct Outbox {
    /// Shared with the thread that sends echoes.
    sender: Arc<Mutex<swarm_link::Sender>>,
    due: Arc<Due>,
    /// Dropped with this, which the thread that reads receipts sees.
    _open: Sender<()>,
}

/// What is due on the connection.
#[derive(Default)]
struct Due(Mutex<DueNow>);

#[derive(Default)]
struct DueNow {
    /// Batches without their receipt, oldest first.
    batches: VecDeque<Sent>,
    /// The newest batch before an echo that is not back.
    echo: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    lap: u64,
    sent_us: u64,
    bytes: u64,
    /// Its receipt is due so long after.
    within_us: u64,
}

impl Due {
    fn lock(&self) -> MutexGuard<'_, DueNow> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a batch that is about to be written.
    fn add(&self, lap: u64, bytes: u64, now_us: u64) {
        let mut due = self.lock();
        let before = due.batches.iter().fold(0u64, |sum, sent| sum.saturating_add(sent.bytes));
        let slow_us = before.saturating_add(bytes).saturating_mul(1_000_000) / BYTES_PER_S_MIN;
        let within_us = micros(ACKNOWLEDGE).saturating_add(slow_us);
        due.batches.push_back(Sent { lap, sent_us: now_us, bytes, within_us });
    }

    /// Takes a receipt. Frames arrive in order, so it is the oldest one's.
    fn acknowledge(&self, lap: u64) -> Result<(), String> {
        match self.lock().batches.pop_front() {
            Some(sent) if sent.lap == lap => Ok(()),
            Some(sent) => Err(format!("acknowledged lap {lap}, but lap {} is due", sent.lap)),
            None => Err(format!("acknowledged lap {lap}, but none is due")),
        }
    }

    /// Whether the oldest receipt is late, and no echo is on its way.
    fn late(&self, now_us: u64) -> bool {
        let due = self.lock();
        let waited_us = due.batches.front().map(|sent| now_us.saturating_sub(sent.sent_us));
        due.echo.is_none() && waited_us.is_some_and(|us| us >= micros(RECEIPT_LATE))
    }

    /// Notes that an echo is about to be written behind every batch so far, and says which is the newest. Nothing, when no
    /// receipt is due any more or an echo is on its way.
    fn ask(&self) -> Option<u64> {
        let mut due = self.lock();
        if due.echo.is_some() {
            return None;
        }
        due.echo = due.batches.back().map(|sent| sent.lap);
        due.echo
    }

    /// Whether an echo is on its way.
    fn is_asked(&self) -> bool {
        self.lock().echo.is_some()
    }

    /// Takes an echo that is back. A batch from before it that is still due was lost.
    fn echoed(&self, lap: u64, now_us: u64) -> Result<(), String> {
        let mut due = self.lock();
        if due.echo.take() != Some(lap) {
            return Err(format!("sent back an echo of lap {lap}, which was not sent"));
        }
        match due.batches.front() {
            Some(oldest) if due.batches.iter().any(|sent| sent.lap == lap) => {
                let (lost, ms) = (oldest.lap, now_us.saturating_sub(oldest.sent_us) / 1000);
                Err(format!(
                    "lost lap {lost}: an echo sent behind it came back without its receipt, after {ms} ms"
                ))
            }
            _ => Ok(()),
        }
    }

    /// The oldest batch, and how long its receipt is due, when that is too long.
    fn overdue(&self, now_us: u64) -> Option<(u64, u64)> {
        let sent = *self.lock().batches.front()?;
        let waited_us = now_us.saturating_sub(sent.sent_us);
        (waited_us >= sent.within_us).then_some((sent.lap, waited_us))
    }
}

fn micros(wait: Duration) -> u64 {
    u64::try_from(wait.as_micros()).unwrap_or(u64::MAX)
}

impl Outbox {
    /// Takes over a data connection that was dialled or accepted. `silent` is called from another thread.
    pub fn new(
        sender: swarm_link::Sender,
        receiver: swarm_link::Receiver,
        epoch: Epoch,
        limits: &Limits,
        silent: OnSilence,
    ) -> Result<Self, NodeError> {
        let sender = Arc::new(Mutex::new(limit_sender(sender, limits)?));
        let due = Arc::<Due>::default();
        let echoes = send_echoes(sender.clone(), due.clone(), epoch)?;
        let (_open, open) = bounded(0);
        let receipts = Receipts { receiver, epoch, due: due.clone(), echoes, open };
        spawn("receipts", move || receipts.read(silent))?;
        Ok(Self { sender, due, _open })
    }

    /// Sends a frame; returns the bytes it took on the wire.
    pub fn send(&mut self, frame: &[u8]) -> Result<usize, LinkError> {
        // Noted and written under one lock: an echo is behind every batch that was noted before it.
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Ack { lap, .. }) = Ack::of(frame) {
            self.due.add(lap, frame.len() as u64, now_us());
        }
        sender.send(&[frame])
    }
}

/// A thread that sends an echo whenever it is asked to, for as long as somebody may ask. The one that reads receipts must
/// not wait behind a frame that a slow link has not taken yet.
fn send_echoes(
    sender: Arc<Mutex<swarm_link::Sender>>,
    due: Arc<Due>,
    epoch: Epoch,
) -> Result<Sender<()>, NodeError> {
    let (asks, asked) = bounded(1);
    spawn("echoes", move || {
        while asked.recv().is_ok() {
            let mut sender = sender.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(lap) = due.ask() else { continue };
            // An end of the link is found by the others who use it.
            if sender.send(&[&Echo { epoch, lap }.encode()]).is_err() {
                return;
            }
        }
    })?;
    Ok(asks)
}

struct Receipts {
    receiver: swarm_link::Receiver,
    epoch: Epoch,
    due: Arc<Due>,
    /// To the thread that sends echoes.
    echoes: Sender<()>,
    /// Ends with the outbox.
    open: Receiver<()>,
}

impl Receipts {
    /// Reads until the link ends, which others notice, or until the other end breaks its word.
    fn read(mut self, silent: OnSilence) {
        self.receiver.set_message_bytes_max(ACK_BYTES);
        let (mut bytes, mut suspected, mut hurried) = (Vec::new(), None, false);
        loop {
            // Receipts are read some at a time: whoever woke for each would take the core from the step that follows it.
            let gone =
                !hurried && self.open.recv_timeout(RECEIPT_LOOK) == Err(RecvTimeoutError::Disconnected);
            let within = if hurried || gone { RECEIPT_LOOK } else { RECEIPT_HERE };
            if self.receiver.set_idle_timeout(Some(within)).is_err() {
                return;
            }
            let fault = loop {
                match self.receiver.receive(&mut bytes) {
                    Ok(_) => {
                        let fault = self.receipt(&bytes).err();
                        hurried &= self.due.is_asked();
                        if fault.is_some() || !(hurried || gone) && within == RECEIPT_LOOK {
                            break fault;
                        }
                    }
                    Err(LinkError::Idle { .. }) => {
                        hurried = self.ask_when_late();
                        break self.overdue(&mut suspected);
                    }
                    Err(_) => return,
                }
            };
            if let Some(fault) = fault {
                silent(fault);
                return;
            }
        }
    }

    /// Has an echo sent behind a batch whose receipt is late. Whether one is on its way now.
    fn ask_when_late(&self) -> bool {
        let late = self.due.late(now_us());
        if late {
            // Full: that thread has not got round to the last one.
            let _ = self.echoes.try_send(());
        }
        late || self.due.is_asked()
    }

    /// A receipt that did not come. A process that was stopped finds the time gone by, and the receipts not yet read:
    /// two looks must agree.
    fn overdue(&self, suspected: &mut Option<u64>) -> Option<String> {
        let overdue = self.due.overdue(now_us());
        let twice = overdue.filter(|(lap, _)| *suspected == Some(*lap));
        *suspected = overdue.map(|(lap, _)| lap);
        twice.map(|(lap, us)| format!("did not acknowledge lap {lap} for {} ms", us / 1000))
    }

    fn receipt(&self, bytes: &[u8]) -> Result<(), String> {
        match Receipt::decode(bytes).map_err(|error| format!("sent no receipt: {error}"))? {
            Receipt::Closing(closing) => Err(format!("closed the link: {}", closing.code)),
            Receipt::Ack(Ack { epoch, .. }) | Receipt::Echo(Echo { epoch, .. }) if epoch != self.epoch => {
                Err(format!("answered for a batch of {epoch}, but the ring is at {}", self.epoch))
            }
            Receipt::Ack(ack) => self.due.acknowledge(ack.lap),
            Receipt::Echo(echo) => self.due.echoed(echo.lap, now_us()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receipts_come_in_order_and_in_time() {
        let due = Due::default();
        assert_eq!(due.overdue(u64::MAX), None);
        due.add(4, 64, 1_000);
        due.add(5, 64_000, 2_000);
        assert_eq!(due.overdue(2_501_999), None);
        assert_eq!(due.overdue(2_502_000), Some((4, 2_501_000)));
        assert!(due.acknowledge(5).is_err());
        // A second more for what was on its way.
        assert_eq!(due.overdue(3_502_999), None);
        assert_eq!(due.overdue(3_503_000), Some((5, 3_501_000)));
        assert!(due.acknowledge(5).is_ok());
        assert!(due.acknowledge(6).is_err());
    }

    #[test]
    fn an_echo_before_the_receipt_is_a_loss_and_behind_it_is_none() {
        let due = Due::default();
        assert!(!due.late(u64::MAX) && due.ask().is_none(), "nothing is due");
        assert!(due.echoed(4, 0).is_err(), "none was sent");
        due.add(4, 64, 1_000);
        assert!(!due.late(50_999));
        assert!(due.late(51_000));
        assert_eq!(due.ask(), Some(4));
        // One at a time, and what is sent behind it says nothing about the batches after it.
        due.add(5, 64, 51_500);
        assert!(!due.late(u64::MAX) && due.ask().is_none());
        assert!(due.acknowledge(4).is_ok());
        assert!(due.echoed(4, 60_000).is_ok());
        // The batch after it is asked about anew, and found lost.
        assert!(due.late(101_500));
        assert_eq!(due.ask(), Some(5));
        let lost = due.echoed(5, 102_500).unwrap_err();
        assert!(lost.contains("lost lap 5") && lost.contains("51 ms"), "{lost}");
        assert!(due.echoed(5, 103_000).is_err(), "it came twice");
    }

    #[test]
    fn an_echo_of_another_batch_is_refused() {
        let due = Due::default();
        due.add(4, 64, 0);
        assert_eq!(due.ask(), Some(4));
        assert!(due.echoed(5, 0).unwrap_err().contains("was not sent"));
    }
}
