//! Toy models, golden files, process helpers and a simulator. A development dependency only: it
//! knows file formats and processes, and of the rooms it helps to test only the pure ones, `swarm-wire`
//! and `swarm-ring`, which the simulator runs.
//!
//! - [`toy`]: small models of every family, made from a formula and written as Hugging Face
//!   folders or GGUF files at test time, so that no weights are committed.
//! - [`golden()`]: what `transformers` computes for those models; [`quant_vectors`]: what the
//!   `gguf` Python package reads from raw blocks.
//! - [`Proc`], [`wait_for`], [`NetLab`], [`TempHome`]: real processes and real networks, every
//!   wait with a deadline, everything cleaned up on drop.
//! - [`hub`]: a Hub with the layout of the public one, its troubles, and a log of the bytes it served.
//! - [`lossy`]: a relay that makes the link between two processes as bad as a test needs; also
//!   the binary `swarm-lossy`.
//! - [`sim`]: whole lives of a swarm on a virtual network, each decided by a seed.
#![forbid(unsafe_code)]

mod golden;
pub mod hub;
pub mod lossy;
mod netlab;
mod place;
mod process;
pub mod sim;
pub mod toy;

pub use golden::{Golden, QuantVector, golden, quant_vectors};
pub use hub::Hub;
pub use netlab::NetLab;
pub use place::{TempHome, demo_model, free_port, swarm_os_binary, workspace_root};
pub use process::{Finished, Proc, wait_for};
