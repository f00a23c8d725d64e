//! One direction of one connection: a thread that reads, a thread that writes, and the bytes in between.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::settings::Way;
use super::{Link, Shared};

/// How often a thread that waits looks whether its connection was reset.
pub(super) const LOOK: Duration = Duration::from_millis(20);
/// Bytes under way; then the reader waits, and so does the sender behind it.
const BYTES_MAX: usize = 4 << 20;
const PIECE_BYTES: usize = 16 << 10;

#[derive(Default)]
struct Queue {
    pieces: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    ended: bool,
}

pub(super) struct Pipe {
    way: Way,
    shared: Arc<Shared>,
    link: Arc<Link>,
    queue: Mutex<Queue>,
    moved: Condvar,
}

impl Pipe {
    pub fn new(way: Way, shared: Arc<Shared>, link: Arc<Link>) -> Self {
        Self { way, shared, link, queue: Mutex::default(), moved: Condvar::new() }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn source(&self) -> &TcpStream {
        if self.way == Way::Up { &self.link.near } else { &self.link.far }
    }

    fn sink(&self) -> &TcpStream {
        if self.way == Way::Up { &self.link.far } else { &self.link.near }
    }

    fn is_reset(&self) -> bool {
        self.link.reset.load(Ordering::Relaxed)
    }

    /// Takes bytes and notes when each piece may arrive.
    pub fn read(&self) {
        let mut buffer = vec![0; PIECE_BYTES];
        let mut latest = Instant::now();
        while !self.is_reset() {
            match self.source().read(&mut buffer) {
                Ok(0) => break,
                Ok(len) => {
                    latest = latest.max(Instant::now() + self.lateness());
                    self.put(latest, buffer[..len].to_vec());
                }
                Err(error) if is_timeout(&error) => {}
                // One end was reset, so the other is as well.
                Err(_) => self.link.reset.store(true, Ordering::Relaxed),
            }
        }
        self.queue().ended = true;
        self.moved.notify_all();
    }

    fn lateness(&self) -> Duration {
        let mut state = self.shared.state();
        let jitter_us = u64::try_from(state.settings.jitter.as_micros()).unwrap_or(u64::MAX - 1);
        let more = state.rng.below(jitter_us + 1);
        state.settings.delay + Duration::from_micros(more)
    }

    fn put(&self, due: Instant, piece: Vec<u8>) {
        let mut queue = self.queue();
        while queue.bytes >= BYTES_MAX && !self.is_reset() {
            queue = self.moved.wait_timeout(queue, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        queue.bytes += piece.len();
        queue.pieces.push_back((due, piece));
        drop(queue);
        self.moved.notify_all();
    }

    /// When a piece that is due at `due` has gone through a link that is `free` from then on.
    fn through(&self, due: Instant, free: Instant, bytes: usize) -> Instant {
        match self.shared.state().settings.rate {
            Some(rate) => free.max(due) + Duration::from_secs_f64(bytes as f64 / rate as f64),
            None => due,
        }
    }

    /// The next piece, not before its time; `None` after the last. Delay and rate are one wait, because every wait ends a
    /// little late.
    fn take(&self, free: &mut Instant) -> Option<Vec<u8>> {
        let mut queue = self.queue();
        while !self.is_reset() {
            let now = Instant::now();
            let front = queue.pieces.front().map(|(due, piece)| self.through(*due, *free, piece.len()));
            let wait = match front {
                Some(at) if at <= now => {
                    let (_, piece) = queue.pieces.pop_front()?;
                    queue.bytes -= piece.len();
                    drop(queue);
                    self.moved.notify_all();
                    *free = at;
                    return Some(piece);
                }
                Some(at) => at.duration_since(now),
                None if queue.ended => return None,
                None => LOOK,
            };
            queue = self.moved.wait_timeout(queue, wait.min(LOOK)).unwrap_or_else(PoisonError::into_inner).0;
        }
        None
    }

    /// Delivers pieces as the settings allow.
    pub fn write(&self) {
        let mut free = Instant::now();
        while let Some(mut piece) = self.take(&mut free) {
            if self.held() {
                // What was held up does not go through faster than the rest.
                free = Instant::now();
            }
            if self.is_reset() {
                return;
            }
            self.damage(&mut piece);
            if !self.deliver(&piece) {
                self.link.reset.store(true, Ordering::Relaxed);
                return;
            }
        }
        self.held();
        if !self.is_reset() {
            // The other side is gone when this fails, and with it whoever would hear of the end.
            let _ = self.sink().shutdown(Shutdown::Write);
        }
    }

    /// Waits as long as this direction is cut or stalled; true when it was.
    fn held(&self) -> bool {
        let mut state = self.shared.state();
        let mut waited = false;
        while !self.is_reset() {
            let lane = state.lane(self.way);
            let left =
                lane.stalled_until.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()));
            let cut = lane.cut.holds(self.link.number);
            if !cut && left.is_zero() {
                break;
            }
            waited = true;
            let wait = if cut { LOOK } else { left.min(LOOK) };
            state = self.shared.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        waited
    }

    fn damage(&self, piece: &mut [u8]) {
        let mut state = self.shared.state();
        state.lane(self.way).bytes += piece.len() as u64;
        if state.lane(self.way).corrupt > 0 {
            state.lane(self.way).corrupt -= 1;
            let at = state.rng.index(piece.len());
            let bit = state.rng.below(8);
            if let Some(byte) = piece.get_mut(at) {
                *byte ^= 1 << bit;
            }
        }
    }

    /// False when the receiver is gone.
    fn deliver(&self, mut piece: &[u8]) -> bool {
        while !piece.is_empty() && !self.is_reset() {
            match self.sink().write(piece) {
                Ok(0) => return false,
                Ok(len) => piece = piece.get(len..).unwrap_or_default(),
                Err(error) if is_timeout(&error) => {}
                Err(_) => return false,
            }
        }
        true
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
