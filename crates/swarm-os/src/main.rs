//! The command `swarm-os`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(swarm_os::command(std::env::args_os().collect()))
}
