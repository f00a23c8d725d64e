//! Sending batches that must be acknowledged.
//!
//! Whoever receives a batch says so at once, on the same connection, from the thread that receives. A thread of its own
//! here reads these receipts; one that is overdue means that the batch was lost on the way, which heartbeats on another
//! connection do not see, and the lap's own deadline sees only after the slowest node could have computed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use swarm_link::LinkError;
use swarm_wire::{ACK_BYTES, Ack, Epoch, Limits, Receipt};

use crate::clock::now_us;
use crate::deadlines::{ACKNOWLEDGE, HEARTBEAT};
use crate::error::NodeError;
use crate::serve::limit_sender;
use crate::worker::spawn;

/// No link is slower than this, in bytes per second: what is on its way may take so much longer to arrive.
const BYTES_PER_S_MIN: u64 = 64_000;

/// Told once, in words, when the other end does not take what it is sent.
pub(crate) type OnSilence = Box<dyn FnOnce(String) + Send>;

/// The sending half of a data connection.
pub(crate) struct Outbox {
    sender: swarm_link::Sender,
    due: Arc<Due>,
}

/// Batches whose receipt is due, oldest first.
#[derive(Default)]
struct Due(Mutex<VecDeque<Sent>>);

#[derive(Clone, Copy, Debug)]
struct Sent {
    lap: u64,
    sent_us: u64,
    bytes: u64,
    /// Its receipt is due so long after.
    within_us: u64,
}

impl Due {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Sent>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a batch that is about to be written.
    fn add(&self, lap: u64, bytes: u64, now_us: u64) {
        let mut due = self.lock();
        let before = due.iter().fold(0u64, |sum, sent| sum.saturating_add(sent.bytes));
        let slow_us = before.saturating_add(bytes).saturating_mul(1_000_000) / BYTES_PER_S_MIN;
        let within_us = u64::try_from(ACKNOWLEDGE.as_micros()).unwrap_or(u64::MAX).saturating_add(slow_us);
        due.push_back(Sent { lap, sent_us: now_us, bytes, within_us });
    }

    /// Takes a receipt. Frames arrive in order, so it is the oldest one's.
    fn acknowledge(&self, lap: u64) -> Result<(), String> {
        match self.lock().pop_front() {
            Some(sent) if sent.lap == lap => Ok(()),
            Some(sent) => Err(format!("acknowledged lap {lap}, but lap {} is due", sent.lap)),
            None => Err(format!("acknowledged lap {lap}, but none is due")),
        }
    }

    /// The oldest batch, and how long its receipt is due, when that is too long.
    fn overdue(&self, now_us: u64) -> Option<(u64, u64)> {
        let sent = *self.lock().front()?;
        let waited_us = now_us.saturating_sub(sent.sent_us);
        (waited_us >= sent.within_us).then_some((sent.lap, waited_us))
    }
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
        let sender = limit_sender(sender, limits)?;
        let due = Arc::<Due>::default();
        let receipts = Receipts { receiver, epoch, due: due.clone() };
        spawn("receipts", move || receipts.read(silent))?;
        Ok(Self { sender, due })
    }

    /// Sends a frame; returns the bytes it took on the wire.
    pub fn send(&mut self, frame: &[u8]) -> Result<usize, LinkError> {
        if let Some(Ack { lap, .. }) = Ack::of(frame) {
            self.due.add(lap, frame.len() as u64, now_us());
        }
        self.sender.send(&[frame])
    }
}

struct Receipts {
    receiver: swarm_link::Receiver,
    epoch: Epoch,
    due: Arc<Due>,
}

impl Receipts {
    /// Reads until the link ends, which others notice, or until the other end breaks its word.
    fn read(mut self, silent: OnSilence) {
        self.receiver.set_message_bytes_max(ACK_BYTES);
        if self.receiver.set_idle_timeout(Some(HEARTBEAT)).is_err() {
            return;
        }
        let mut bytes = Vec::new();
        // A process that was stopped finds the time gone by, and the receipts not yet read: two looks must agree.
        let mut suspected = None;
        loop {
            let fault = match self.receiver.receive(&mut bytes) {
                Ok(_) => self.receipt(&bytes).err(),
                Err(LinkError::Idle { .. }) => {
                    let overdue = self.due.overdue(now_us());
                    let twice = overdue.filter(|(lap, _)| suspected == Some(*lap));
                    suspected = overdue.map(|(lap, _)| lap);
                    twice.map(|(lap, us)| format!("did not acknowledge lap {lap} for {} ms", us / 1000))
                }
                Err(_) => return,
            };
            if let Some(fault) = fault {
                silent(fault);
                return;
            }
        }
    }

    fn receipt(&self, bytes: &[u8]) -> Result<(), String> {
        let receipt = Receipt::decode(bytes).map_err(|error| format!("sent no receipt: {error}"))?;
        let ack = match receipt {
            Receipt::Ack(ack) => ack,
            Receipt::Closing(closing) => return Err(format!("closed the link: {}", closing.code)),
        };
        if ack.epoch != self.epoch {
            return Err(format!("acknowledged a batch of {}, but the ring is at {}", ack.epoch, self.epoch));
        }
        self.due.acknowledge(ack.lap)
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
}
