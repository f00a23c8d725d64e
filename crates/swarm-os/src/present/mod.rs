//! What people and programs see: plain text, tables, progress, JSON. Nothing here decides anything.

pub mod answer;
pub mod pairing;
pub mod progress;
pub mod report;
pub mod text;
pub mod trace;
pub mod worker;
