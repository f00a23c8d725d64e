//! `cargo xtask demo`: the real model over several nodes on this computer.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::{fetch, steps};

/// Fetches the model and hands over to `swarm-os demo`, whose exit code is ours.
pub fn demo(root: &Path, args: &[&str]) -> Result<ExitCode> {
    let nodes = match args {
        [] => "3",
        ["--nodes", nodes] => nodes,
        other => bail!("demo takes [--nodes N], not `{}`", other.join(" ")),
    };
    if !nodes.parse::<u32>().is_ok_and(|nodes| nodes > 0) {
        bail!("--nodes wants a number from 1 on, not `{nodes}`");
    }
    let model = fetch::fetch(root)?;
    fetch::share(&model)?;
    let mut command = steps::cargo(root);
    command.args([
        "run",
        "--quiet",
        "--release",
        "--package",
        "swarm-os",
        "--",
        "demo",
        "--nodes",
        nodes,
        "--model",
    ]);
    command.arg(model);
    eprintln!("building swarm-os in release mode; the first time takes a few minutes");
    let status = command.status().context("cannot start cargo")?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}
