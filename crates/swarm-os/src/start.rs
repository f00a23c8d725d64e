//! Starting an engine: workers on this computer where asked for, and progress.

use std::ffi::OsString;
use std::sync::OnceLock;
use std::thread;

use swarm_node::{Engine, EngineObserver, LocalWorkers, NodeError, Plan, machine};

use crate::failure::{Code, Failure};
use crate::pairing::{self, Company};
use crate::present::progress::Progress;
use crate::settings::{LocalRing, Start, node_name};

/// Bytes of the buffer that is read to measure bandwidth: far larger than caches.
pub const PROBE_BYTES: usize = 256 << 20;
/// Passes over it.
pub const PROBE_ROUNDS: usize = 3;

/// An engine and the workers that were started for it. The engine goes first.
pub struct Running {
    pub engine: Engine,
    pub workers: Option<LocalWorkers>,
}

impl Start {
    /// Starts workers and engine, as a command.
    pub fn go(self, progress: &Progress) -> Result<Running, Failure> {
        let running = self.go_with(Company::of_command(), &|event| progress.event(event))?;
        progress.clear();
        Ok(running)
    }

    /// Starts workers and engine.
    pub fn go_with(mut self, company: Company<'_>, observer: EngineObserver<'_>) -> Result<Running, Failure> {
        let workers = self.prepare()?;
        let (identity, join) = (self.identity.clone(), self.join.clone());
        let engine = pairing::meanwhile(company, &mut self.config, &identity, join.as_ref(), |config| {
            Engine::start(config, &identity, observer)
        })?;
        Ok(Running { engine, workers })
    }

    /// Places the layers without loading them, as a command.
    pub fn plan(self, progress: &Progress) -> Result<Plan, Failure> {
        self.plan_with(Company::of_command(), &|event| progress.event(event))
    }

    /// Places the layers without loading them.
    pub fn plan_with(mut self, company: Company<'_>, observer: EngineObserver<'_>) -> Result<Plan, Failure> {
        let _workers = self.prepare()?;
        let (identity, join) = (self.identity.clone(), self.join.clone());
        pairing::meanwhile(company, &mut self.config, &identity, join.as_ref(), |config| {
            swarm_node::plan(config, &identity, observer)
        })
    }

    /// The cores this node will be pinned to.
    pub fn first_cores(&self) -> Option<Vec<usize>> {
        match &self.local {
            Some(local) if local.pinned => Some(node_cores(0, local.threads)),
            _ => self.config.cores.clone(),
        }
    }

    /// Starts the workers of this computer, if any, and points the search at them.
    fn prepare(&mut self) -> Result<Option<LocalWorkers>, Failure> {
        if let Some(local) = &self.local {
            self.config.cores = self.first_cores();
            let workers = start_workers(local)?;
            self.config.search.peers = workers.peers();
            return Ok(Some(workers));
        }
        Ok(None)
    }
}

/// How the command is started again, for workers on this computer: a program and its first arguments.
static COMMAND: OnceLock<Vec<OsString>> = OnceLock::new();

/// Says how the command is started again, once, where it is not the file that runs: a Python process is an interpreter.
pub fn set_command(words: Vec<OsString>) {
    let _ = COMMAND.set(words);
}

fn own_command() -> Result<Vec<OsString>, NodeError> {
    match COMMAND.get() {
        Some(words) => Ok(words.clone()),
        None => std::env::current_exe().map(|file| vec![file.into()]).map_err(|source| NodeError::System {
            what: "this program's own file cannot be found".into(),
            source,
        }),
    }
}

fn start_workers(local: &LocalRing) -> Result<LocalWorkers, Failure> {
    let command = own_command()?;
    let arguments = |index: usize| {
        let mut arguments = vec!["--name".to_owned(), node_name(index + 1, local.workers + 1)];
        arguments.extend(["--threads".to_owned(), local.threads.to_string()]);
        arguments.extend(["--model".to_owned(), local.model.to_string_lossy().into_owned()]);
        if local.keep_quantized {
            arguments.push("--keep-quantized".to_owned());
        }
        if local.pinned {
            let cores: Vec<String> =
                node_cores(index + 1, local.threads).iter().map(ToString::to_string).collect();
            arguments.extend(["--cores".to_owned(), cores.join(",")]);
        }
        arguments
    };
    Ok(LocalWorkers::start(&command, local.workers, arguments)?)
}

/// The cores of node `index` when every node is pinned to its own.
pub fn node_cores(index: usize, threads: usize) -> Vec<usize> {
    let all = machine::core_ids();
    (index * threads..(index + 1) * threads)
        .filter_map(|at| all.get(at % all.len().max(1)).copied())
        .collect()
}

/// Sequential read bandwidth with these threads and cores. Measured on a thread of its own, so that
/// pinning does not stay with this one.
pub fn read_bandwidth(threads: Option<usize>, cores: Option<Vec<usize>>) -> Result<f64, Failure> {
    let threads = threads.unwrap_or_else(machine::cores);
    let measure = move || {
        machine::pin_caller(cores.as_deref());
        machine::read_bandwidth(&machine::pool(threads, cores), PROBE_BYTES, PROBE_ROUNDS)
    };
    let measured = thread::Builder::new().name("probe".into()).spawn(measure);
    measured.ok().and_then(|thread| thread.join().ok()).ok_or_else(|| {
        Failure::new(
            Code::Failed,
            "the read bandwidth cannot be measured: no thread for it; end other programs",
        )
    })
}
