//! Where things are: the workspace, the demo model, the command under test, a home of its own.

use std::env;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// The folder with the workspace's `Cargo.toml`.
pub fn workspace_root() -> PathBuf {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    crates.unwrap_or_else(|| Path::new(".")).to_path_buf()
}

/// `models/SmolLM2-135M-Instruct.Q4_1.gguf` of the workspace.
///
/// # Errors
/// When it is not there, with the command that fetches it. A test should fail with this text.
pub fn demo_model() -> Result<PathBuf, String> {
    let path = workspace_root().join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("the demo model is not at {}: run `cargo xtask fetch`", path.display()))
    }
}

/// The `swarm-os` command to test: `SWARM_OS_BIN`, else the one of this build's profile folder
/// (`target/debug/swarm-os` beside the running test).
///
/// # Errors
/// When there is none, with the command that builds it.
pub fn swarm_os_binary() -> Result<PathBuf, String> {
    if let Some(path) = env::var_os("SWARM_OS_BIN").map(PathBuf::from) {
        if path.is_file() {
            return Ok(path);
        }
        return Err(format!("SWARM_OS_BIN names {}, which is not a file", path.display()));
    }
    let test =
        env::current_exe().map_err(|error| format!("cannot tell where the running test is: {error}"))?;
    let name = format!("swarm-os{}", env::consts::EXE_SUFFIX);
    let found = test.ancestors().skip(1).take(2).map(|folder| folder.join(&name)).find(|path| path.is_file());
    found.ok_or_else(|| {
        format!("no swarm-os beside {}: run `cargo build -p swarm-os`, or set SWARM_OS_BIN", test.display())
    })
}

/// A TCP port of 127.0.0.1 that was free a moment ago. Prefer port 0 and reading the port back
/// where the command under test can do that: between this call and its use, another may take it.
pub fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// A configuration folder of its own for the processes of one test, removed on drop.
#[derive(Debug)]
pub struct TempHome {
    dir: TempDir,
}

impl TempHome {
    pub fn new() -> io::Result<TempHome> {
        Ok(TempHome { dir: tempfile::Builder::new().prefix("swarm-home-").tempdir()? })
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Makes `command` use this folder (`SWARM_OS_HOME`). Processes that share one share a secret.
    pub fn apply<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("SWARM_OS_HOME", self.path())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_root_holds_the_workspace() {
        let manifest = std::fs::read_to_string(workspace_root().join("Cargo.toml")).unwrap();
        assert!(manifest.contains("[workspace]"));
    }

    #[test]
    fn a_missing_demo_model_is_an_error_that_says_how_to_get_it() {
        match demo_model() {
            Ok(path) => assert!(path.is_file()),
            Err(text) => assert!(text.contains("cargo xtask fetch")),
        }
    }
}
