//! The command `swarm-os`: the engine for people and scripts.
//!
//! Arguments are parsed twice: `args.rs` knows how they are spelled, `settings.rs` what they mean together. Each
//! command is a file in `commands`; `present` is everything that is read by people and programs.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod failure;
mod interrupt;
mod live;
mod pairing;
mod present;
mod quant;
mod settings;
mod start;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::args::{Cli, Command, with_role};
use crate::failure::Failure;

/// Says what is logged on standard error.
const LOG_VARIABLE: &str = "SWARM_OS_LOG";

fn main() -> ExitCode {
    let cli = Cli::parse_from(with_role(std::env::args_os().collect()));
    let ready = start_log().and_then(|()| check_kernels()).and_then(|()| interrupt::install());
    match ready.and_then(|()| dispatch(&cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
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
fn check_kernels() -> Result<(), Failure> {
    swarm_kernels::KernelPath::chosen().map(|_| ()).map_err(|error| Failure::usage(error.to_string()))
}

fn start_log() -> Result<(), Failure> {
    let wanted = std::env::var(LOG_VARIABLE).unwrap_or_else(|_| "warn".to_owned());
    let filter = EnvFilter::try_new(&wanted).map_err(|error| {
        Failure::usage(format!(
            "{LOG_VARIABLE}: {wanted:?} is no log filter ({error}); try error, warn, info or debug"
        ))
    })?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    Ok(())
}
