//! `cargo xtask fuzz`: long runs of the fuzz targets, in the release profile.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use crate::steps::cargo;

/// Builds `swarm-fuzz` and hands it `args`. Ctrl-C ends it.
pub fn fuzz(root: &Path, args: &[&str]) -> Result<ExitCode> {
    let mut command = cargo(root);
    command.args(["run", "--release", "--quiet", "--package", "swarm-fuzz", "--"]).args(args);
    let code = command.status()?.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(1)))
}
