//! The command `swarm-os`: the engine for people and scripts.
//!
//! Arguments are parsed twice: `args.rs` knows how they are spelled, `settings.rs` what they mean together. Each
//! command is a file in `commands`; `present` is everything that is read by people and programs.
//!
//! A library, so that the Python package offers the same command, and so that a setting, an error and a number mean
//! the same in both.

#![forbid(unsafe_code)]

pub mod args;
pub mod commands;
pub mod failure;
mod interrupt;
pub mod live;
pub mod pairing;
pub mod present;
pub mod quant;
pub mod settings;
pub mod start;

use std::ffi::OsString;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::args::{Cli, Command, with_role};
use crate::failure::Failure;

/// Says what is logged on standard error.
const LOG_VARIABLE: &str = "SWARM_OS_LOG";

/// Runs the command line `args`, whose first word is the command's own name, and gives the exit code. Takes Ctrl-C and
/// the log of this process over; `--help` and bad usage end the process.
pub fn command(args: Vec<OsString>) -> u8 {
    let cli = Cli::parse_from(with_role(args));
    let ready = start_log("warn").and_then(|()| check_kernels()).and_then(|()| interrupt::install());
    match ready.and_then(|()| dispatch(&cli.command)) {
        Ok(()) => failure::Code::Done as u8,
        Err(failure) => failure.report(),
    }
}

fn dispatch(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Worker(args) => commands::worker::worker(args),
        Command::Chat(args) => commands::chat::chat(args),
        Command::Run(args) => commands::run::run(args),
        Command::Plan(args) => commands::plan::plan(args),
        Command::Verify(args) => commands::verify::verify(args),
        Command::Demo(args) => commands::demo::demo(args),
        Command::Bench(args) => commands::bench::bench(args),
        Command::Perplexity(args) => commands::perplexity::perplexity(args),
        Command::Status(args) => commands::status::status(args),
        Command::Top => commands::top::top(),
        Command::Models(args) => commands::models::models(args),
        Command::Pull(args) => commands::pull::pull(args),
        Command::Prune(args) => commands::prune::prune(args),
        Command::Pair(args) => commands::pair::pair(args),
        Command::Doctor(args) => commands::doctor::doctor(args),
        Command::Peers(args) => commands::peers::peers(args),
        Command::Forget(args) => commands::peers::forget(args),
        Command::Secret(command) => commands::secret::secret(command),
    }
}

/// Kernels that were asked for and are not to be had are a mistake to hear of before anything starts.
///
/// # Errors
/// The kernels of `SWARM_OS_KERNELS` do not run here.
pub fn check_kernels() -> Result<(), Failure> {
    swarm_kernels::KernelPath::chosen().map(|_| ()).map_err(|error| Failure::usage(error.to_string()))
}

/// Logs what `SWARM_OS_LOG` asks for, else `default`. A process that logs already goes on as it does.
///
/// # Errors
/// `SWARM_OS_LOG` is no log filter.
pub fn start_log(default: &str) -> Result<(), Failure> {
    let wanted = std::env::var(LOG_VARIABLE).unwrap_or_else(|_| default.to_owned());
    let filter = EnvFilter::try_new(&wanted).map_err(|error| {
        Failure::usage(format!(
            "{LOG_VARIABLE}: {wanted:?} is no log filter ({error}); try error, warn, info or debug"
        ))
    })?;
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    Ok(())
}
