//! Worker processes of one command: they end with it, soon, and without being killed where they listen.

#![cfg(unix)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use swarm_node::LocalWorkers;

/// A program in place of `swarm-os` that says where it listens and then runs `rest`.
fn program(dir: &Path, rest: &str) -> PathBuf {
    let path = dir.join("program");
    let text = format!("#!/bin/sh\necho '{{\"event\": \"waiting\", \"port\": 4747}}'\n{rest}\n");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn workers_leave_when_their_input_closes() {
    let dir = tempfile::tempdir().unwrap();
    let left = dir.path().join("left");
    let program = program(dir.path(), &format!("cat; echo left > {}", left.display()));
    let workers = LocalWorkers::start(&[program.into()], 2, |_| Vec::new()).unwrap();
    assert_eq!(workers.peers().concat(), [([127, 0, 0, 1], 4747).into(); 2]);
    let began = Instant::now();
    drop(workers);
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert!(left.exists());
}

#[test]
fn a_worker_that_stays_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let program = program(dir.path(), "exec sleep 60");
    let workers = LocalWorkers::start(&[program.into()], 1, |_| Vec::new()).unwrap();
    let began = Instant::now();
    drop(workers);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[test]
fn a_worker_that_does_not_start_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let program = program(dir.path(), "");
    std::fs::write(&program, "#!/bin/sh\nexit 3\n").unwrap();
    let began = Instant::now();
    assert!(LocalWorkers::start(&[program.into()], 2, |_| Vec::new()).is_err());
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}
