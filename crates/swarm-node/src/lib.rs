//! A node: wires ring, link and model together.
//!
//! [`Engine`] is what everything above uses: a model that answers, on one node or spread over many. [`Worker`] offers
//! a computer to the room. Decisions are `swarm-ring`'s; this room owns the clock, the threads and the wiring.
//!
//! The data path of a step is four named functions on every node: receive ([`inbox::receive_frames`]), admit
//! (`StageLoop::admit`), forward (`StageRunner::forward`), send (`StageLoop::send_batch`); the coordinator's end of it
//! is `coordinator.rs`.

#![forbid(unsafe_code)]

mod ask;
pub mod clock;
mod control;
mod coordinator;
pub mod deadlines;
pub mod doctor;
mod engine;
mod error;
mod examine;
pub mod firewall;
mod generation;
mod give;
mod heal;
mod holdings;
mod inbox;
mod keep;
mod lend;
mod link_probe;
mod listing;
mod local;
mod lookout;
pub mod machine;
mod measure;
mod neighbours;
mod outbox;
pub mod pairing;
mod perplexity;
mod profile;
mod refusals;
mod room;
mod runner;
mod search;
mod serve;
mod setup;
mod shelf;
mod stage_loop;
mod stage_setup;
mod traffic;
mod watch;
mod worker;

pub use ask::{ask_worker, take_model};
pub use control::memory_offered;
pub use coordinator::SessionTelemetry;
pub use engine::{
    Engine, EngineConfig, EngineEvent, EngineObserver, LogitsParts, NodeReport, NodeState, Plan, ToFetch,
    open_model, plan, resolve_model,
};
pub use error::{NodeError, bytes_text, chain, printable};
pub use generation::{Finish, Generation, Outcome, Piece, Prompt, Request, Waited};
pub use give::serve_model;
pub use keep::keep_quantized;
pub use lend::{FoundModel, Lender, find_model};
pub use listing::{NodeModels, RoomModels, list_room, listing_within};
pub use local::LocalWorkers;
pub use neighbours::Around;
pub use perplexity::{TextScore, score_text};
pub use search::{SearchEvent, WorkerSearch};
pub use serve::StageEvent;
pub use stage_loop::StepDone;
pub use swarm_ring::{Arrival, Objective, PlacedStage, Split};
pub use swarm_text::{EncodeOptions, Message};
pub use swarm_wire::{ListedModel, LoadSource, Sampling};
pub use watch::{EngineStatus, EngineWatch, LapTrace, NodeStatus, StageStatus, WorkerStatus};
pub use worker::{Worker, WorkerConfig, WorkerEvent, WorkerObserver, WorkerWatch, connections_bytes_max};
