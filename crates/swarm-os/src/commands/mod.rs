//! One file per command.

pub mod bench;
pub mod chat;
pub mod demo;
pub mod doctor;
pub mod models;
pub mod pair;
pub mod peers;
pub mod perplexity;
pub mod plan;
pub mod prune;
pub mod pull;
pub mod run;
pub mod secret;
pub mod status;
pub mod top;
pub mod verify;
pub mod worker;
