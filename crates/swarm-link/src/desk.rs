//! Where a code is shown: how often it may be guessed, and when it is replaced. No socket.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::code::PairCode;
use crate::error::IdentityError;
use crate::members::cut;

/// Wrong codes before the code is dead.
pub const CODE_TRIES: u8 = 3;
/// After a dead code nobody may pair for this long; it doubles with every further one.
const REST_FIRST: Duration = Duration::from_secs(2);
/// With three guesses in each five minutes, a guesser who is left alone for a day has tried 864 of 10^8 codes.
const REST_MAX: Duration = Duration::from_secs(300);
const EVENTS_MAX: usize = 64;

/// What happens at a desk.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PairingEvent {
    /// A code to show: the first one, or one that replaces a code that is used up or dead.
    Code(PairCode),
    /// Somebody used another code.
    WrongCode {
        /// Who.
        address: SocketAddr,
        /// What is left of this code.
        tries_left: u8,
        /// How long nobody may pair now; zero unless the code is dead.
        rest: Duration,
    },
    /// Both machines are in one swarm now.
    Paired {
        /// What the other machine is called: a stranger's text.
        name: String,
    },
    /// The codes fit, but both machines have a swarm of their own.
    TwoSwarms {
        /// What the other machine is called: a stranger's text.
        name: String,
    },
}

/// Shows a code until it is closed. Give it to [`crate::Listener::set_desk`]. A clone is the same desk.
#[derive(Debug, Clone)]
pub struct PairingDesk(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    state: Mutex<State>,
    sink: Sender<PairingEvent>,
    events: Receiver<PairingEvent>,
}

#[derive(Debug)]
struct State {
    code: PairCode,
    /// Counts codes: a guess counts against the code that it was made for.
    number: u64,
    tries_left: u8,
    dead_in_a_row: u32,
    closed_until: Option<Instant>,
}

impl PairingDesk {
    /// Opens with a new code. `name` is what the other machine will call this one.
    ///
    /// # Errors
    /// [`IdentityError::Random`] when the system gives no random bytes.
    pub fn open(name: &str) -> Result<Self, IdentityError> {
        let code = PairCode::random()?;
        let (sink, events) = bounded(EVENTS_MAX);
        let state = State {
            code: code.clone(),
            number: 0,
            tries_left: CODE_TRIES,
            dead_in_a_row: 0,
            closed_until: None,
        };
        let desk = Self(Arc::new(Inner { name: cut(name), state: Mutex::new(state), sink, events }));
        desk.tell(PairingEvent::Code(code));
        Ok(desk)
    }

    /// What happens, as it happens; the first is the first code. At most 64 wait, more are dropped.
    #[must_use]
    pub fn events(&self) -> &Receiver<PairingEvent> {
        &self.0.events
    }

    /// The code to show now.
    #[must_use]
    pub fn code(&self) -> PairCode {
        self.state().code.clone()
    }

    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    /// The number of the code, and the code; `None` while nobody may pair.
    pub(crate) fn enter(&self, now: Instant) -> Option<(u64, PairCode)> {
        let state = self.state();
        let open = state.closed_until.is_none_or(|until| now >= until);
        open.then(|| (state.number, state.code.clone()))
    }

    /// Takes one of the tries of code `number`, before it is known whether the guess is right: guesses that run
    /// side by side are as many as those that follow each other. `false`: that code is dead or used up.
    pub(crate) fn spend(&self, number: u64) -> bool {
        let mut state = self.state();
        if state.number != number || state.tries_left == 0 {
            return false;
        }
        state.tries_left -= 1;
        true
    }

    /// The try was wrong; after the last one there is a new code.
    pub(crate) fn wrong(&self, number: u64, address: SocketAddr, now: Instant) {
        let mut state = self.state();
        if state.number != number {
            return;
        }
        let tries_left = state.tries_left;
        if tries_left > 0 {
            drop(state);
            return self.tell(PairingEvent::WrongCode { address, tries_left, rest: Duration::ZERO });
        }
        let doubled = REST_FIRST.saturating_mul(1 << state.dead_in_a_row.min(16));
        let rest = doubled.min(REST_MAX);
        state.dead_in_a_row = state.dead_in_a_row.saturating_add(1);
        state.closed_until = Some(now + rest);
        let code = state.renew();
        drop(state);
        self.tell(PairingEvent::WrongCode { address, tries_left, rest });
        self.tell(PairingEvent::Code(code));
    }

    /// The try was right: the code is used up. The next one is told when the pairing is over.
    pub(crate) fn right(&self, number: u64) {
        let mut state = self.state();
        if state.number == number {
            state.dead_in_a_row = 0;
            state.renew();
        }
    }

    pub(crate) fn tell(&self, event: PairingEvent) {
        let _ = self.0.sink.try_send(event);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A new code with all its tries. Without random numbers no code fits any more.
    fn renew(&mut self) -> PairCode {
        self.number = self.number.wrapping_add(1);
        match PairCode::random() {
            Ok(code) => {
                self.code = code;
                self.tries_left = CODE_TRIES;
            }
            Err(error) => {
                tracing::warn!("no new code: {error}");
                self.tries_left = 0;
            }
        }
        self.code.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_guesses_a_code_side_by_side_or_not_and_longer_and_longer_rests() {
        let desk = PairingDesk::open("den").unwrap();
        let (address, mut now) = (SocketAddr::from(([10, 0, 0, 1], 1)), Instant::now());
        let mut guesses = 0u32;
        let end = now + Duration::from_secs(24 * 3600);
        while now < end {
            let Some((number, code)) = desk.enter(now) else {
                now += Duration::from_secs(1);
                continue;
            };
            // A hundred at once, all begun while this code was the right one.
            let taken = (0..100).filter(|_| desk.spend(number)).count();
            assert_eq!(taken, usize::from(CODE_TRIES));
            (0..taken).for_each(|_| desk.wrong(number, address, now));
            assert!(desk.code() != code && !desk.spend(number));
            guesses += u32::from(CODE_TRIES);
        }
        assert!(guesses < 1000, "{guesses} in a day");
    }

    #[test]
    fn a_used_code_is_replaced_and_forgives() {
        let desk = PairingDesk::open("den").unwrap();
        let now = Instant::now();
        let (number, code) = desk.enter(now).unwrap();
        assert_eq!(desk.events().try_recv(), Ok(PairingEvent::Code(code.clone())));
        assert!(desk.spend(number));
        desk.right(number);
        assert_ne!(desk.code(), code);
        assert!(!desk.spend(number) && desk.enter(now).is_some());
    }
}
