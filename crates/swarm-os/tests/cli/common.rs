//! A home, a model, and short ways to run the command.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use swarm_testkit::toy::{Storage, ToyModel, spec};
use swarm_testkit::{Finished, Proc, TempHome};

/// Long enough for a busy computer, short enough for a person who waits.
pub const SOON: Duration = Duration::from_secs(60);

pub struct Bench {
    pub home: TempHome,
    folder: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self { home: TempHome::new().unwrap(), folder: tempfile::tempdir().unwrap() }
    }

    /// A toy model of four layers.
    pub fn toy(&self) -> PathBuf {
        self.write(&spec("llama"), "toy")
    }

    pub fn write(&self, model: &ToyModel, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        model.write_hf(&path, Storage::F32).unwrap();
        path
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `swarm-os` with this home and without what the tester's own environment says.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_swarm-os"));
        command.args(args).env_remove("SWARM_OS_LOG").env("SWARM_OS_MODELS", self.path("models"));
        // No test asks the public Hub for anything.
        command.env("HF_HUB_CACHE", self.path("hub")).env("SWARM_OS_CACHE", self.path("store"));
        command.env("HF_HUB_OFFLINE", "1").env_remove("HF_ENDPOINT").env_remove("HF_TOKEN");
        self.home.apply(&mut command);
        command
    }

    pub fn start(&self, args: &[&str]) -> Proc {
        Proc::spawn(&mut self.command(args)).unwrap()
    }

    pub fn run(&self, args: &[&str]) -> Finished {
        self.start(args).finish(SOON).unwrap()
    }

    /// Takes the other computer's swarm secret for its own.
    pub fn joins(&self, other: &Self) {
        let secret = other.run(&["secret", "export"]).stdout;
        assert!(self.run(&["secret", "import", secret.trim()]).status.success());
    }

    /// The JSON object that a command prints, which must be all of its standard output.
    pub fn json(&self, args: &[&str]) -> Value {
        let finished = self.run(args);
        assert!(finished.status.success(), "{args:?}: {}", finished.stderr);
        assert_eq!(finished.stdout.lines().count(), 1, "{}", finished.stdout);
        serde_json::from_str(&finished.stdout).unwrap()
    }

    /// Fails as it should: this exit code, one line of error with all of `texts`, nothing on standard output.
    pub fn refused(&self, args: &[&str], code: i32, texts: &[&str]) -> String {
        let finished = self.run(args);
        let said = format!("{args:?}\n{}\n{}", finished.stdout, finished.stderr);
        assert_eq!(finished.status.code(), Some(code), "{said}");
        assert_eq!(finished.stdout, "", "{said}");
        let error = finished.stderr.lines().find(|line| line.starts_with("error: "));
        let error = error.unwrap_or_else(|| panic!("no error line: {said}"));
        texts.iter().for_each(|text| assert!(error.contains(text), "{text:?} is missing: {said}"));
        assert!(!said.contains("panicked"), "{said}");
        error.to_owned()
    }

    /// A worker of this computer and its address.
    pub fn worker(&self, name: &str, model: &Path) -> (Proc, String) {
        self.worker_at(name, model, 0)
    }

    /// The same at a port, 0 for any.
    pub fn worker_at(&self, name: &str, model: &Path, port: u16) -> (Proc, String) {
        let (model, port) = (model.to_str().unwrap(), port.to_string());
        let args = [
            "worker",
            "--local",
            "--json",
            "--name",
            name,
            "--threads",
            "1",
            "--port",
            &port,
            "--model",
            model,
        ];
        let mut worker = self.start(&args);
        let waiting = worker.expect(SOON, "\"waiting\"").unwrap();
        (worker, format!("127.0.0.1:{}", event(&waiting)["port"]))
    }
}

/// A line of `worker --json`.
pub fn event(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?} is no JSON: {error}"))
}

/// A small file system of its own, gone at the end of the test.
#[cfg(target_os = "linux")]
pub struct SmallDisk(PathBuf);

#[cfg(target_os = "linux")]
impl SmallDisk {
    /// `None` where the tester has said that there is none.
    pub fn mount(path: PathBuf, how: &str) -> Option<Self> {
        if std::env::var_os("SWARM_OS_SKIP_NETLAB").is_some_and(|value| value == "1") {
            eprintln!("SKIPPED: no small disk, because SWARM_OS_SKIP_NETLAB=1");
            return None;
        }
        std::fs::create_dir_all(&path).unwrap();
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", how, "tmpfs"]).arg(&path).status();
        assert!(
            done.is_ok_and(|status| status.success()),
            "a small disk needs root: run as root, or set SWARM_OS_SKIP_NETLAB=1"
        );
        Some(Self(path))
    }

    pub fn grow(&self, how: &str) {
        let how = format!("remount,{how}");
        assert!(Command::new("mount").args(["-o", &how]).arg(&self.0).status().unwrap().success());
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg(&self.0).status());
    }
}
