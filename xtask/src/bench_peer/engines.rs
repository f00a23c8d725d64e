//! Both engines as child processes: one round each, pinned to the same cores.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::usage::Usage;
use crate::steps::{cargo, run_within, succeeds};

const PEER: &str = "llama-cpp-python==0.3.36";
const SCRIPT: &str = include_str!("peer.py");
/// A full-size model at its slowest, one core, takes about two minutes.
const ROUND_LIMIT: Duration = Duration::from_secs(30 * 60);
const BUILD_LIMIT: Duration = Duration::from_secs(2 * 60 * 60);

/// What one round of one engine is.
pub struct Round<'a> {
    pub model: &'a Path,
    pub threads: usize,
    pub cores: &'a [usize],
    pub prompt_tokens: usize,
    pub gen_tokens: usize,
    pub sessions: usize,
}

/// What one round gave. Tokens per second are of all sessions together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    pub prefill_tok_per_s: f64,
    pub decode_tok_per_s: f64,
    pub peak_rss_bytes: u64,
    /// Of our engine only: decode speed of one session x weight bytes per token / read bandwidth.
    pub bandwidth_fraction: Option<f64>,
    pub read_bandwidth_gb_s: Option<f64>,
    /// Cores that other processes kept busy meanwhile; `None` where the system does not tell.
    pub others_cores: Option<f64>,
}

pub struct Engines {
    folder: PathBuf,
    python: PathBuf,
    swarm_os: PathBuf,
}

impl Engines {
    /// Builds `swarm-os` in release mode, and llama.cpp unless `python` has it or an earlier run
    /// built it into `folder`.
    pub fn new(root: &Path, folder: &Path, python: Option<&Path>) -> Result<Engines> {
        let python = match python {
            Some(python) if has_peer(python) => python.to_path_buf(),
            Some(python) => bail!("{} cannot import llama_cpp: install {PEER} there", python.display()),
            None => environment(folder)?,
        };
        eprintln!("bench-peer: building swarm-os in release mode");
        let mut build = cargo(root);
        build.args(["build", "--quiet", "--release", "--package", "swarm-os"]);
        if !run_within(&mut build, BUILD_LIMIT)?.success() {
            bail!("swarm-os does not build: see above");
        }
        let swarm_os = released(root)?;
        // Its own home: settings and keys of this computer's user stay out of it.
        fs::create_dir_all(folder.join("home"))?;
        Ok(Engines { folder: folder.to_path_buf(), python, swarm_os })
    }

    /// Version and build flags of llama.cpp.
    pub fn about_peer(&self) -> Result<Value> {
        self.json(self.script().arg("about"))
    }

    pub fn peer(&self, round: &Round<'_>) -> Result<Measured> {
        let mut command = self.script();
        command.arg("run").arg(round.model).arg(round.threads.to_string()).arg(joined(round.cores));
        for number in [round.prompt_tokens, round.gen_tokens, round.sessions] {
            command.arg(number.to_string());
        }
        self.measure(&mut command)
    }

    pub fn ours(&self, round: &Round<'_>) -> Result<Measured> {
        let mut command = self.script();
        command.arg("pin").arg(joined(round.cores)).arg(&self.swarm_os);
        command.args(["bench", "--json", "--rounds", "1", "--model"]).arg(round.model);
        command.args(["--cores", &joined(round.cores)]);
        for (option, number) in [
            ("--threads", round.threads),
            ("--prompt-tokens", round.prompt_tokens),
            ("--gen-tokens", round.gen_tokens),
            ("--sessions", round.sessions),
        ] {
            command.arg(option).arg(number.to_string());
        }
        command.env("SWARM_OS_HOME", self.folder.join("home"));
        self.measure(&mut command)
    }

    fn measure(&self, command: &mut Command) -> Result<Measured> {
        let before = Usage::now();
        let found = measured(&self.json(command)?)?;
        let others = before.zip(Usage::now()).and_then(|(before, after)| after.others_since(&before));
        Ok(Measured { others_cores: others, ..found })
    }

    fn script(&self) -> Command {
        let mut command = Command::new(&self.python);
        command.args(["-c", SCRIPT]).stdin(Stdio::null());
        command
    }

    /// Runs `command`, whose output is one JSON value.
    fn json(&self, command: &mut Command) -> Result<Value> {
        let path = self.folder.join("output.json");
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let status = run_within(command.stdout(file), ROUND_LIMIT)?;
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if !status.success() {
            bail!("a run failed ({status}): see above");
        }
        serde_json::from_str(&text).with_context(|| format!("a run printed `{}`", text.trim()))
    }
}

/// An interpreter with llama.cpp built for this CPU.
fn environment(folder: &Path) -> Result<PathBuf> {
    let venv = folder.join("venv");
    let python = venv.join("bin").join("python");
    if has_peer(&python) {
        return Ok(python);
    }
    eprintln!(
        "bench-peer: building {PEER} for this CPU into {}; this is done once and takes about 20 minutes on two cores",
        venv.display()
    );
    let mut make = Command::new("python3");
    make.args(["-m", "venv"]).arg(&venv).stdin(Stdio::null());
    if !run_within(&mut make, ROUND_LIMIT).is_ok_and(|status| status.success()) {
        bail!("python3 cannot make {}: install Python 3.10 or newer with venv", venv.display());
    }
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input"]);
    pip.args(["--no-binary", "llama-cpp-python", PEER]);
    pip.env("CMAKE_ARGS", "-DGGML_NATIVE=ON").stdin(Stdio::null());
    // pip's report belongs to the progress, not to the table.
    pip.stdout(std::io::stderr());
    if !run_within(&mut pip, BUILD_LIMIT)?.success() {
        bail!("pip could not build {PEER}: see above (it needs a C++ compiler)");
    }
    if !has_peer(&python) {
        bail!("{} cannot import llama_cpp after its build", python.display());
    }
    Ok(python)
}

fn has_peer(python: &Path) -> bool {
    succeeds(Command::new(python).args(["-c", "import llama_cpp"]))
}

/// The release build beside the running xtask, which is in the dev profile.
fn released(root: &Path) -> Result<PathBuf> {
    let xtask = env::current_exe().context("cannot tell where xtask itself is")?;
    let target = xtask.parent().and_then(Path::parent).unwrap_or(root);
    let path = target.join("release").join(format!("swarm-os{}", env::consts::EXE_SUFFIX));
    if !path.is_file() {
        bail!("{} is not there after its build; run xtask as `cargo xtask`", path.display());
    }
    Ok(path)
}

fn joined(cores: &[usize]) -> String {
    cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

fn measured(value: &Value) -> Result<Measured> {
    let speed = |key: &str| {
        let found = value[key].as_f64().filter(|speed| speed.is_finite() && *speed > 0.0);
        found.with_context(|| format!("a run printed no {key}: {value}"))
    };
    Ok(Measured {
        prefill_tok_per_s: speed("prefill_tok_per_s")?,
        decode_tok_per_s: speed("decode_tok_per_s")?,
        peak_rss_bytes: value["peak_rss_bytes"].as_u64().unwrap_or(0),
        bandwidth_fraction: value["decode_bandwidth_fraction"].as_f64(),
        read_bandwidth_gb_s: value["read_bandwidth_gb_s"].as_f64(),
        others_cores: None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_run_without_a_speed_is_an_error() {
        let good = json!({"prefill_tok_per_s": 80.0, "decode_tok_per_s": 10.5, "peak_rss_bytes": 7});
        let want = Measured {
            prefill_tok_per_s: 80.0,
            decode_tok_per_s: 10.5,
            peak_rss_bytes: 7,
            ..Measured::default()
        };
        assert_eq!(measured(&good).unwrap(), want);
        assert!(measured(&json!({"prefill_tok_per_s": 80.0, "decode_tok_per_s": null})).is_err());
        assert!(measured(&json!({"prefill_tok_per_s": 0.0, "decode_tok_per_s": 1.0})).is_err());
    }

    #[test]
    fn cores_are_joined_as_both_engines_read_them() {
        assert_eq!(joined(&[0, 2, 5]), "0,2,5");
    }
}
