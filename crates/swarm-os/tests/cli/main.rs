//! The command as its users see it: real processes, real sockets, exit codes, one line of error.

mod bad_input;
mod common;
mod computer;
mod console;
mod discovery;
mod doctor;
mod faults;
mod help;
mod hub;
mod lend;
mod live;
mod lossy;
mod models;
mod pairing;
mod perplexity;
mod plan;
mod quant;
mod real_model;
mod ring;
mod room;
mod supply;
#[cfg(target_os = "linux")]
mod supply_figures;
