//! `cargo xtask test` and `cargo xtask check`.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::steps::{Steps, cargo, succeeds};
use crate::{fetch, python, tidy};

const BUILD_LIMIT: Duration = Duration::from_secs(30 * 60);
const TEST_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Everything a merge has to pass; `deny` adds the licence check. The last line is a summary.
pub fn test(root: &Path, deny: bool) -> Result<ExitCode> {
    summarised(|steps, notes| checks(root, deny, steps, notes))
}

/// The tests of the Python package alone.
pub fn test_python(root: &Path) -> Result<ExitCode> {
    summarised(|steps, notes| python::test(root, steps, notes))
}

fn summarised(run: impl FnOnce(&mut Steps, &mut Vec<String>) -> Result<()>) -> Result<ExitCode> {
    let mut steps = Steps::default();
    let mut notes = Vec::new();
    match run(&mut steps, &mut notes) {
        Ok(()) => {
            println!("xtask: all passed: {}", steps.summary());
            notes.iter().for_each(|note| println!("xtask: {note}"));
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            println!("xtask: FAILED: {error:#}; passed before: {}", steps.summary());
            Ok(ExitCode::FAILURE)
        }
    }
}

fn checks(root: &Path, deny: bool, steps: &mut Steps, notes: &mut Vec<String>) -> Result<()> {
    steps.step("fetch", || fetch::fetch(root).map(drop))?;
    steps.step("tidy", || tidy::tidy(root))?;
    steps.command("fmt", cargo(root).args(["fmt", "--all", "--check"]), BUILD_LIMIT)?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    steps.command("clippy", cargo(root).args(clippy), BUILD_LIMIT)?;
    if deny {
        if succeeds(cargo(root).args(["deny", "--version"])) {
            let args = ["deny", "check", "licenses", "bans", "sources"];
            steps.command("deny", cargo(root).args(args), BUILD_LIMIT)?;
        } else {
            notes.push("NOT CHECKED: licences, because cargo-deny is not installed".to_owned());
        }
    }
    // Tests start the command itself, so it has to be there and new.
    steps.command("build", cargo(root).args(["build", "--package", "swarm-os"]), BUILD_LIMIT)?;
    let binary = command_under_test()?;
    let skip_netlab = network_lab(notes);
    let mut run = |name: &str, args: &[&str]| {
        let mut command = cargo(root);
        command.args(args).env("SWARM_OS_BIN", &binary);
        if skip_netlab {
            command.env("SWARM_OS_SKIP_NETLAB", "1");
        }
        steps.command(name, &mut command, TEST_LIMIT)
    };
    run("doc tests", &["test", "--workspace", "--doc", "--quiet"])?;
    if succeeds(cargo(root).args(["nextest", "--version"])) {
        run("tests (cargo nextest)", &["nextest", "run", "--workspace"])?;
    } else {
        eprintln!("cargo nextest is not installed; cargo test runs the tests, without a limit for each one");
        run("tests (cargo test)", &["test", "--workspace", "--lib", "--bins", "--tests"])?;
    }
    python::test(root, steps, notes)
}

/// `swarm-os` beside the running xtask: both are built in the dev profile.
fn command_under_test() -> Result<PathBuf> {
    let xtask = env::current_exe().context("cannot tell where xtask itself is")?;
    let path = xtask.with_file_name(format!("swarm-os{}", env::consts::EXE_SUFFIX));
    if !path.is_file() {
        anyhow::bail!("{} is not there after its build; run xtask as `cargo xtask`", path.display());
    }
    Ok(path)
}

/// Makes network namespaces possible where it can, and returns whether their tests have to be
/// left out; then the summary says so.
fn network_lab(notes: &mut Vec<String>) -> bool {
    let has_ip = || succeeds(Command::new("ip").arg("-V"));
    if !has_ip() && is_root() && succeeds(Command::new("apt-get").arg("--version")) {
        eprintln!("installing iproute2, which the network tests need");
        let apt = |args: &[&str]| {
            succeeds(Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(args))
        };
        let installed =
            apt(&["update", "-q"]) && apt(&["install", "-q", "-y", "--no-install-recommends", "iproute2"]);
        if !installed {
            eprintln!("apt-get could not install iproute2");
        }
    }
    let probe = format!("swarm-probe-{}", process::id());
    let possible = has_ip() && succeeds(Command::new("ip").args(["netns", "add", &probe]));
    if possible {
        succeeds(Command::new("ip").args(["netns", "del", &probe]));
    } else {
        let note = "NOT RUN: the network namespace tests, which need root and `ip` of iproute2".to_owned();
        eprintln!("{note}");
        notes.push(note);
    }
    !possible
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}
