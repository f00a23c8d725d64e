//! Who may use the network and the cores now: steps first, bulk when no step is under way here.
//!
//! One for the process, as it has one network card and one set of cores.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::deadlines::{QUIET, YIELD};

/// Steps under way, and when the last one ended.
pub(crate) struct Traffic {
    steps: Mutex<Steps>,
    idle: Condvar,
}

#[derive(Default)]
struct Steps {
    under_way: u32,
    last: Option<Instant>,
}

/// A step is under way as long as this lives.
pub(crate) struct StepMark<'a>(&'a Traffic);

/// How much may be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nobody computes here.
    Free,
    /// Between two steps: little at a time.
    Gentle,
}

/// Of this process.
pub(crate) static TRAFFIC: Traffic = Traffic::new();

impl Traffic {
    const fn new() -> Self {
        Self { steps: Mutex::new(Steps { under_way: 0, last: None }), idle: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From the arrival of a frame until what follows from it is sent.
    pub fn step(&self) -> StepMark<'_> {
        self.lock().under_way += 1;
        StepMark(self)
    }

    /// Waits while a step is under way, but not for ever: a prompt may take long, and whoever waits for bytes must not
    /// take this node for gone.
    pub fn turn(&self) -> Turn {
        let steps = self.lock();
        let is_recent = |steps: &Steps| steps.last.is_some_and(|last| last.elapsed() < QUIET);
        if steps.under_way == 0 {
            return if is_recent(&steps) { Turn::Gentle } else { Turn::Free };
        }
        drop(self.idle.wait_timeout_while(steps, YIELD, |steps| steps.under_way > 0));
        Turn::Gentle
    }
}

impl Drop for StepMark<'_> {
    fn drop(&mut self) {
        let mut steps = self.0.lock();
        steps.under_way = steps.under_way.saturating_sub(1);
        steps.last = Some(Instant::now());
        if steps.under_way == 0 {
            self.0.idle.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bulk_waits_for_steps_and_is_gentle_after_them() {
        let traffic = Traffic::new();
        assert_eq!(traffic.turn(), Turn::Free);
        let mark = traffic.step();
        let began = Instant::now();
        // Not for ever.
        assert_eq!(traffic.turn(), Turn::Gentle);
        assert!(began.elapsed() >= YIELD);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| traffic.turn());
            drop(mark);
            assert_eq!(waiting.join().unwrap(), Turn::Gentle);
        });
        assert_eq!(traffic.turn(), Turn::Gentle);
    }
}
