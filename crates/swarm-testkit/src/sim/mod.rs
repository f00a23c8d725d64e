//! Whole lives of a swarm on a virtual network and a virtual clock, each decided by one number.
//!
//! [`live`] runs one or two coordinators and up to four workers. What decides is the code that decides in a real
//! swarm: the scheduler, the admission of frames, the book of sessions and positions, the heartbeat, and the frames
//! themselves, as bytes. Around it the simulator plays everything else: the wiring of a ring, sockets, a clock, and
//! a model of hashes in which every row depends on all rows before it.
//!
//! A life has two phases. In the first, links are slow, cut in one direction or both, or lost; nodes stop, are
//! killed or lose power, and start again; in some lives the network also repeats, swaps and replays frames, which an
//! authenticated link never does. Then all faults end, and the swarm must work again. Promises checked at every
//! step:
//!
//! - P1: every token is the one that a machine alone would have said, at its position, once.
//! - P2: nobody waits longer than the longest lap for a sign of life, and after the faults everything goes on.
//! - P4: no node holds more than was agreed, and in the end no stage holds a session.
//!
//! A broken promise names its seed; the same seed gives the same life, to the last event.

mod clients;
mod coordinator;
mod faults;
mod life;
mod model;
mod net;
mod rng;
mod worker;

pub use life::{Report, Violation, live};
pub use rng::Rng;

/// A rule broken on purpose, to show that the simulator would notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A stage takes laps and rows in any order: no check of laps and positions.
    TakesAnyOrder,
    /// The tail samples from the first row of a segment instead of the last.
    SamplesFirstRow,
    /// The placement leaves out a layer.
    SkipsLayer,
    /// A stage forgets to free the sessions that end.
    KeepsSessions,
    /// A worker does not give up a coordinator that is silent.
    WaitsForever,
    /// A coordinator gives up neither silent members nor overdue laps.
    NeverGivesUp,
    /// A new placement has the number of the one before.
    KeepsEpoch,
}
