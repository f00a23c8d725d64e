//! Fuzz targets: whatever a stranger's bytes are, there is an answer or an error, and no panic.
//!
//! A [`Target`] is a pure function of bytes that panics when a promise is broken; its seeds are sound inputs. The
//! engine in [`fuzz`] changes seeds with knowledge of their structure (numbers in their places, JSON as a tree, the
//! words of a format) and keeps what leads to an outcome it has not seen: another error, another shape of success. It
//! needs neither nightly nor instrumentation, and equal seeds give equal runs.
#![forbid(unsafe_code)]

mod engine;
mod mutate;
mod targets;

pub use engine::{Budget, Crash, Stats, check, fuzz};
pub use targets::{Shape, TARGETS, Target, target};
