//! `cargo xtask wheel`, and the tests of the Python package, in virtual environments under `target/python`.
//!
//! pip brings its own settings for mirrors and proxies; nothing is installed outside the two environments.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use swarm_testkit::toy::{self, Storage};

use crate::steps::{Steps, run_within, succeeds};

/// What builds a wheel.
const BUILDER: &str = "maturin>=1.9.4,<2";
/// What the tests need beside the wheel.
const TESTERS: [&str; 4] = ["pytest", "mypy", "numpy", "tqdm"];
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// Builds the wheel in release mode and says where it is.
pub fn wheel(root: &Path) -> Result<()> {
    let path = build(root, "release")?;
    println!("{}", path.display());
    Ok(())
}

/// Builds the package as the other tests are built, installs it into a fresh environment, and tests it there.
pub fn test(root: &Path, steps: &mut Steps, notes: &mut Vec<String>) -> Result<()> {
    if !succeeds(python(root).args(["-c", "import ensurepip, venv"])) {
        notes.push(
            "NOT RUN: the tests of the Python package, which need python3 with its venv module".to_owned(),
        );
        return Ok(());
    }
    let wheel = steps.step("Python wheel", || build(root, "dev"))?;
    let fresh = folder(root).join("tests");
    let installed = steps.step("Python environment", || {
        let program = environment(root, &fresh, true)?;
        let mut install = pip(root, &program);
        run(install.args(TESTERS).arg(&wheel), "pip cannot install the wheel and what tests it")?;
        Ok(program)
    })?;
    let toys = toys(root)?;
    let mut pytest = Command::new(&installed);
    pytest.args(["-m", "pytest", "-q", "python/tests"]).current_dir(root).stdin(Stdio::null());
    pytest.env("SWARM_OS_TOYS", toys).env_remove("VIRTUAL_ENV");
    steps.command("Python tests", &mut pytest, LIMIT)
}

/// The wheel of this computer's platform, in `target/python/PROFILE`.
fn build(root: &Path, profile: &str) -> Result<PathBuf> {
    let tools = folder(root).join("tools");
    let program = environment(root, &tools, false)?;
    if !succeeds(Command::new(&program).args(["-m", "maturin", "--version"])) {
        run(pip(root, &program).arg(BUILDER), "pip cannot install maturin")?;
    }
    let wheels = folder(root).join(profile);
    // One wheel is there afterwards, so that it is known which.
    let _ = fs::remove_dir_all(&wheels);
    let mut maturin = Command::new(&program);
    maturin.args(["-m", "maturin", "build", "--locked", "--profile", profile, "--out"]).arg(&wheels);
    maturin.current_dir(root).stdin(Stdio::null());
    run(&mut maturin, "maturin cannot build the wheel")?;
    let entries = fs::read_dir(&wheels).with_context(|| format!("cannot read {}", wheels.display()))?;
    let mut found = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let found = found.find(|path| path.extension() == Some(OsStr::new("whl")));
    found.with_context(|| format!("maturin left no wheel in {}", wheels.display()))
}

fn folder(root: &Path) -> PathBuf {
    root.join("target/python")
}

/// The python of a virtual environment at `path`, made when it is missing or to be `fresh`.
fn environment(root: &Path, path: &Path, fresh: bool) -> Result<PathBuf> {
    let program = if cfg!(windows) { path.join("Scripts/python.exe") } else { path.join("bin/python") };
    if fresh || !succeeds(Command::new(&program).arg("--version")) {
        let mut make = python(root);
        make.args(["-m", "venv", "--clear"]).arg(path);
        run(&mut make, "python3 cannot make a virtual environment; install its venv module (python3-venv)")?;
    }
    Ok(program)
}

fn python(root: &Path) -> Command {
    let mut command = Command::new(env::var_os("PYTHON").unwrap_or_else(|| "python3".into()));
    command.current_dir(root).stdin(Stdio::null());
    command
}

fn pip(root: &Path, program: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    command.current_dir(root).stdin(Stdio::null());
    command
}

fn run(command: &mut Command, what: &str) -> Result<()> {
    let status = run_within(command, LIMIT).with_context(|| what.to_owned())?;
    if !status.success() {
        bail!("{what}: {status}, see above");
    }
    Ok(())
}

/// Toy models for the tests: one that answers at once, one that takes some milliseconds a token.
fn toys(root: &Path) -> Result<PathBuf> {
    let folder = folder(root).join("toys");
    for name in ["llama", "qwen3"] {
        toy::spec(name).write_hf(&folder.join(name), Storage::F32)?;
    }
    let slow = [("hidden_size", 512), ("intermediate_size", 1024), ("max_position_embeddings", 2048)];
    let slow = slow
        .iter()
        .fold(toy::spec("llama").with_layers(8), |model, &(key, value)| model.with_config(key, value.into()));
    slow.write_hf(&folder.join("slow"), Storage::F32)?;
    Ok(folder)
}
