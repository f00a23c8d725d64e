//! Workers on this computer for the duration of one command: `run --nodes N`, `demo`, `verify`, `bench`.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::deadlines::{LOCAL_LEAVE, LOCAL_START};
use crate::error::NodeError;

/// Child processes running `swarm-os worker`, ended when dropped. Each also ends by itself when its standard input
/// closes, so that none outlives a coordinator that was killed.
pub struct LocalWorkers {
    children: Vec<Child>,
    addresses: Vec<SocketAddr>,
    /// Each closes when its child's output does, which is when the child ends.
    ended: Vec<Receiver<()>>,
}

impl LocalWorkers {
    /// Starts `count` workers with `worker --local` after `command`, a program and its first arguments, and with
    /// `arguments(i)` appended for the `i`-th.
    ///
    /// # Errors
    /// [`NodeError::System`] when a process cannot be started, [`NodeError::Lost`] when it says nothing in time.
    pub fn start(
        command: &[OsString],
        count: usize,
        arguments: impl Fn(usize) -> Vec<String>,
    ) -> Result<Self, NodeError> {
        let mut workers = Self { children: Vec::new(), addresses: Vec::new(), ended: Vec::new() };
        let [program, first @ ..] = command else {
            return Err(NodeError::Bug("no program is named that could be a worker".into()));
        };
        for index in 0..count {
            let mut command = Command::new(program);
            command.args(first).args(["worker", "--local", "--json"]).args(arguments(index));
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
            let failed = |source| NodeError::System {
                what: format!("worker {} cannot be started", index + 1),
                source,
            };
            workers.children.push(command.spawn().map_err(failed)?);
        }
        for index in 0..count {
            let address = workers.await_port(index)?;
            workers.addresses.push(address);
        }
        Ok(workers)
    }

    /// Where each listens, in a form for [`crate::WorkerSearch::peers`].
    pub fn peers(&self) -> Vec<Vec<SocketAddr>> {
        self.addresses.iter().map(|&address| vec![address]).collect()
    }

    /// The process ids.
    pub fn process_ids(&self) -> Vec<u32> {
        self.children.iter().map(Child::id).collect()
    }

    /// Reads the worker's lines on a thread of its own (they must be read, or it would block) until the first says
    /// which port it listens on.
    fn await_port(&mut self, index: usize) -> Result<SocketAddr, NodeError> {
        let lost =
            |what: &str| NodeError::Lost { node: format!("worker {}", index + 1), what: what.to_owned() };
        let output = self.children[index].stdout.take().ok_or_else(|| lost("has no output"))?;
        let (found, port) = bounded(1);
        let (alive, ended) = bounded(0);
        self.ended.push(ended);
        crate::worker::spawn("worker output", move || {
            let _alive: Sender<()> = alive;
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { return };
                let event: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                if event["event"] == "waiting"
                    && let Some(port) = event["port"].as_u64().and_then(|port| u16::try_from(port).ok())
                {
                    let _ = found.try_send(port);
                }
            }
        })?;
        let port =
            port.recv_timeout(LOCAL_START).map_err(|_| lost("did not start; its own message is above"))?;
        Ok(([127, 0, 0, 1], port).into())
    }
}

impl Drop for LocalWorkers {
    fn drop(&mut self) {
        for child in &mut self.children {
            // Closing its input asks it to leave; then it is waited for, and ended if it does not.
            drop(child.stdin.take());
        }
        let deadline = Instant::now() + LOCAL_LEAVE;
        // One that was never listened to is not waited for.
        for ended in &self.ended {
            let _ = ended.recv_deadline(deadline);
        }
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
