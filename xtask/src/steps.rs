//! Commands with a name, a limit and a place in the closing summary.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The cargo that runs us, in the workspace root.
pub fn cargo(root: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).stdin(Stdio::null());
    command
}

/// Whether `command` runs and succeeds; its output is dropped.
pub fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// Steps done so far, each with its seconds.
#[derive(Default)]
pub struct Steps {
    done: Vec<String>,
}

impl Steps {
    /// Runs `work` as the step `name`.
    pub fn step<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("== {name}");
        let start = Instant::now();
        let value = work().with_context(|| format!("step `{name}` failed"))?;
        self.done.push(format!("{name} {:.1} s", start.elapsed().as_secs_f64()));
        Ok(value)
    }

    /// Runs `command` as the step `name`; past `limit` it is killed with all it started.
    pub fn command(&mut self, name: &str, command: &mut Command, limit: Duration) -> Result<()> {
        self.step(name, || {
            let status = run_within(command, limit)?;
            if !status.success() {
                bail!("{}", describe(status));
            }
            Ok(())
        })
    }

    pub fn summary(&self) -> String {
        self.done.join(", ")
    }
}

fn describe(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("exit code {code}, see above"),
        None => format!("{status}"),
    }
}

/// Runs `command` to its end; past `limit` it is killed with all it started.
pub fn run_within(command: &mut Command, limit: Duration) -> Result<ExitStatus> {
    // Not a process group of its own: Ctrl-C has to reach it.
    let mut child = command.spawn().context("cannot start it")?;
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            kill(&mut child);
            bail!("still ran after {} s, so it was killed", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Kills the child and everything it started, so that no test outlives its run.
fn kill(child: &mut Child) {
    let family = descendants(child.id());
    // Failures mean that they have just ended.
    drop(child.kill());
    drop(child.wait());
    if !family.is_empty() {
        signal("KILL", family.iter().map(u32::to_string));
    }
}

fn descendants(ancestor: u32) -> Vec<u32> {
    let pairs = processes();
    let mut family = vec![ancestor];
    let mut next = 0;
    while let Some(&parent) = family.get(next) {
        family.extend(pairs.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    family.split_off(1)
}

/// `(process, its parent)` of every process: from /proc, else from ps.
fn processes() -> Vec<(u32, u32)> {
    let pair = |pid: &str, parent: &str| Some((pid.parse().ok()?, parent.parse().ok()?));
    let from_proc = fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| {
        let stat = fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
        // `pid (name) state parent ...`, and the name may hold anything.
        let (pid, rest) = stat.split_once(' ')?;
        pair(pid, rest.rsplit_once(')')?.1.split_whitespace().nth(1)?)
    });
    let found: Vec<_> = from_proc.collect();
    if !found.is_empty() {
        return found;
    }
    let Ok(output) = Command::new("ps").args(["-A", "-o", "pid=,ppid="]).output() else { return found };
    let listed = String::from_utf8_lossy(&output.stdout);
    let columns = listed.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
    columns.filter_map(|(pid, parent)| pair(pid, parent.trim())).collect()
}

/// Through the shell's own kill: a small system may have no other.
fn signal(name: &str, pids: impl Iterator<Item = String>) -> bool {
    succeeds(Command::new("sh").args(["-c", "kill -s \"$0\" -- \"$@\"", name]).args(pids))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_limit_kills_grandchildren_too() {
        let marker = std::env::temp_dir().join(format!("xtask-limit-{}", std::process::id()));
        let script = format!("sleep 60 & echo $! > {}; wait", marker.display());
        let error =
            run_within(Command::new("sh").args(["-c", &script]), Duration::from_millis(500)).unwrap_err();
        assert!(error.to_string().contains("killed"), "{error}");
        let grandchild = fs::read_to_string(&marker).unwrap();
        fs::remove_file(&marker).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while signal("0", [grandchild.trim().to_owned()].into_iter()) {
            assert!(Instant::now() < deadline, "{grandchild} still runs");
            thread::sleep(Duration::from_millis(10));
        }
    }
}
