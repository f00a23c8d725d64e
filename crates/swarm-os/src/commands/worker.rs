//! `swarm-os worker`: waits in the room and serves a stage.

use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use serde_json::json;
use swarm_link::{Identity, LinkError, Remembered};
use swarm_node::pairing::{find_showing, pair_with_any};
use swarm_node::{NodeError, Worker, WorkerConfig, WorkerObserver, machine, memory_offered};

use super::pair::pair_failure;
use crate::args::{WorkerArgs, absolute_model};
use crate::failure::Failure;
use crate::interrupt::{self, Repeat};
use crate::live;
use crate::present::worker::{Voice, WorkerView};
use crate::present::{pairing, text};
use crate::settings;
use crate::start::read_bandwidth;

/// How long `--join` looks for the computer that shows the code.
const JOIN_WITHIN: Duration = Duration::from_secs(30);

/// Serves until Ctrl-C; with `--local`, until standard input closes.
pub fn worker(args: &WorkerArgs) -> Result<(), Failure> {
    let (config, identity) = prepare(args)?;
    let voice = match (args.json, args.quiet) {
        (true, _) => Voice::Json,
        (false, true) => Voice::Counter,
        (false, false) => Voice::Lines,
    };
    let (end, ended) = channel();
    let _interrupt = if args.local {
        // Ctrl-C is for the command that started this worker, and closes standard input in the end.
        interrupt::during(Repeat::Same, || {})
    } else {
        let end = end.clone();
        interrupt::during(Repeat::End, move || {
            let _ = end.send(());
        })
    };
    let view = Arc::new(WorkerView::new(voice));
    let watch = view.clone();
    let observer: WorkerObserver = Arc::new(move |event| watch.event(&event));
    let worker = start(args, &config, &identity, observer)?;
    let _shown = show(&worker, args.local);
    let (waiting, words) = announcement(&config, &identity, worker.port());
    text::say(&if voice == Voice::Json { waiting.to_string() } else { words + "\nCtrl-C ends it" })?;
    if args.local {
        end_with_stdin(end)?;
    }
    // Both ends are gone only when the process is about to end anyway.
    let _ = ended.recv();
    drop(worker);
    Ok(())
}

/// Checks the arguments, measures this computer, and meets whoever shows the code of `--join`.
pub fn prepare(args: &WorkerArgs) -> Result<(WorkerConfig, Identity), Failure> {
    let config = config(args)?;
    let (_, identity) = settings::identity()?;
    if let Some(code) = &args.join
        && identity.is_fresh()
    {
        join(code, &identity, &config.name)?;
    }
    Ok((config, identity))
}

/// Lets `status` see a worker.
pub fn show(worker: &Worker, local: bool) -> live::Shown {
    let watch = worker.watch();
    live::show("worker", move || {
        let mut status = serde_json::to_value(watch.status()).unwrap_or_default();
        status["local"] = local.into();
        status
    })
}

/// Starts it at the port of last time, where others remember it and firewalls know it, unless a port was asked for.
pub fn start(
    args: &WorkerArgs,
    config: &WorkerConfig,
    identity: &Identity,
    observer: WorkerObserver,
) -> Result<Worker, Failure> {
    if args.local || args.port.is_some() {
        return Ok(Worker::start(config.clone(), identity.clone(), observer)?);
    }
    let mut remembered = Remembered::load(&settings::state_folder()?);
    if let Some(port) = remembered.own_port() {
        let there = WorkerConfig { port, ..config.clone() };
        match Worker::start(there, identity.clone(), observer.clone()) {
            // Another worker of this user, most likely, whose port it stays.
            Err(NodeError::Link(error)) if matches!(*error, LinkError::PortInUse { .. }) => {
                return Ok(Worker::start(config.clone(), identity.clone(), observer)?);
            }
            other => return Ok(other?),
        }
    }
    let worker = Worker::start(config.clone(), identity.clone(), observer)?;
    if let Err(error) = remembered.note_own_port(worker.port()) {
        tracing::warn!("the port is another next time: {error}");
    }
    Ok(worker)
}

/// Types the code that another computer shows.
fn join(code: &str, identity: &Identity, name: &str) -> Result<(), Failure> {
    let code = settings::pair_code("--join", code)?;
    let showing = find_showing(identity, &[], true, JOIN_WITHIN)?;
    let paired = pair_with_any(&showing, identity, &code, name).map_err(pair_failure)?;
    text::note(&pairing::paired(&paired.name, paired.joined));
    Ok(())
}

fn config(args: &WorkerArgs) -> Result<WorkerConfig, Failure> {
    let model = match &args.model {
        Some(model) => {
            // Opened once to tell now what would fail when a coordinator comes.
            swarm_node::open_model(model)?;
            Some(absolute_model(swarm_node::resolve_model(model)?))
        }
        None => None,
    };
    let mut config = WorkerConfig {
        name: args.name.clone().unwrap_or_else(machine::host_name),
        port: args.port.unwrap_or(0),
        bind: args.bind,
        interfaces: settings::interfaces(&args.interface)?,
        local_only: args.local,
        show_code: !args.local,
        model,
        threads: args.compute.threads,
        cores: settings::cores(&args.compute)?,
        memory_bytes: settings::memory(&args.compute)?,
        read_gb_s: None,
        profile_dir: Some(settings::state_folder()?),
        keep_quantized: args.keep_quantized,
    };
    if !args.local {
        config.read_gb_s = Some(read_bandwidth(config.threads, config.cores.clone())?);
    }
    Ok(config)
}

/// Who and where this worker is, and what it offers, for programs and for people. Those who start workers wait for the
/// first.
pub fn announcement(config: &WorkerConfig, identity: &Identity, port: u16) -> (serde_json::Value, String) {
    let name = format!("{}-{}", text::line(&config.name), &identity.node_id().short()[..4]);
    let threads = config.threads.unwrap_or_else(machine::cores);
    let memory = memory_offered(config.memory_bytes);
    let waiting = json!({"event": "waiting", "port": port, "name": name, "threads": threads,
        "memory_bytes": memory, "read_gb_s": config.read_gb_s});
    let words = format!(
        "worker {name} waits on port {port}\noffers {threads} threads and {} of memory, reads {}\nholds {} at most for those who connect, and no stage that does not fit",
        text::bytes(memory),
        text::number(config.read_gb_s, 1, " GB/s"),
        text::bytes(swarm_node::connections_bytes_max()),
    );
    (waiting, words)
}

/// Sends the end when standard input closes: whoever started this worker has gone.
fn end_with_stdin(end: Sender<()>) -> Result<(), Failure> {
    let wait = move || {
        let mut sink = [0; 256];
        while matches!(std::io::stdin().lock().read(&mut sink), Ok(count) if count > 0) {}
        let _ = end.send(());
    };
    std::thread::Builder::new()
        .name("standard input".into())
        .spawn(wait)
        .map(drop)
        .map_err(|source| NodeError::System { what: "a thread cannot be started".into(), source }.into())
}
