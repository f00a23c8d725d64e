//! Who does what, and what now: placement, sessions, deadlines and lap telemetry.
//!
//! Invariants of this room:
//! - Pure: events and times go in, actions come out. No clock, socket, thread or randomness.
//! - Times are microseconds of the coordinator's monotonic clock, given by the caller. A peer's
//!   number is never added to one of them unclamped.
//! - Nothing iterates a map whose order is not fixed: one schedule of events has one outcome.
//! - Weights and rows are never seen here, only their sizes.
#![forbid(unsafe_code)]

mod clock;
mod download;
mod gate;
mod heartbeat;
mod kept;
mod partition;
mod percentiles;
mod place;
mod place_words;
mod plan;
mod scheduler;
mod session;
mod telemetry;
mod timers;

pub use clock::ClockOffset;
pub use download::{Downloads, Missing, SLACK_PERCENT};
pub use gate::{Gate, GateError, Refusal, SessionBook};
pub use heartbeat::{Health, Heartbeat};
pub use partition::partition;
pub use percentiles::Percentiles;
pub use place::{
    Alternative, Link, ModelShape, NodeProfile, NodeSpeed, Objective, PlaceError, PlacedStage, Placement,
    Plan, RoomProfile, SpeedSource, Split, StageMemory,
};
pub use plan::{CutStage, EXACT_NODES_MAX, plan, plan_cut, plan_frugally};
pub use scheduler::{
    Action, ConfigError, Counters, Event, LapError, ReplayPoint, Scheduler, SchedulerConfig, StepPlan,
};
pub use session::{FinishReason, OpenError, SessionError, SessionRequest};
pub use telemetry::{Arrival, LapTimes, StageLap, StageTelemetry, Telemetry, TypicalLap, TypicalStage};
pub use timers::Timers;
