//! A worker in this process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use serde_json::Value;
use swarm_node::{StageEvent, WorkerEvent, WorkerObserver};
use swarm_os::args::WorkerArgs;
use swarm_os::commands::worker as command;
use swarm_os::live::Shown;
use swarm_os::present::worker::{Voice, WorkerView};

use crate::convert::{to_list, to_python};
use crate::given::{Given, join_code, wrong};
use crate::task::{Product, Task};
use crate::{errors, fork};

/// Events kept for whoever reads them; later ones are left out, and a worker never waits for a reader.
const EVENTS_MAX: usize = 4096;

/// A worker that was started.
pub struct Served {
    worker: Node,
    port: u16,
    events: Receiver<Value>,
    steps: Arc<AtomicBool>,
}

struct Node {
    _shown: Shown,
    worker: swarm_node::Worker,
}

/// A worker that waits in the room, or serves a stage.
#[pyclass(frozen, module = "swarm_os._native")]
pub struct Worker {
    worker: Mutex<Option<Arc<Node>>>,
    events: Receiver<Value>,
    steps: Arc<AtomicBool>,
    /// The port it listens on.
    #[pyo3(get)]
    port: u16,
}

fn arguments(given: &Given<'_, '_>) -> PyResult<WorkerArgs> {
    let local = given.get("local")?.unwrap_or(false);
    let bind = given.get::<String>("bind")?.map(|address| {
        address
            .parse()
            .map_err(|_| wrong(&format!("bind: {address:?} is no IP address; give one like 192.168.1.5")))
    });
    let interface = given.texts("interfaces")?;
    let join = given.get("join")?.or_else(|| join_code().filter(|_| !local));
    if local && (bind.is_some() || !interface.is_empty() || join.is_some()) {
        return Err(wrong("local: a worker for this computer only takes no bind, interfaces or join"));
    }
    Ok(WorkerArgs {
        name: given.get("name")?,
        port: given.get("port")?,
        bind: bind.transpose()?,
        interface,
        model: given.get("model")?,
        join,
        compute: given.compute()?,
        keep_quantized: given.get("keep_quantized")?.unwrap_or(false),
        quiet: true,
        json: true,
        local,
        role: None,
    })
}

/// Says now what is wrong with the settings of a worker.
#[pyfunction]
pub fn check_worker(settings: &Bound<'_, PyDict>) -> PyResult<()> {
    fork::check()?;
    arguments(&Given(settings)).map(drop)
}

/// Measures this computer, listens, and is announced. The result is a `Worker`.
#[pyfunction]
pub fn start_worker(settings: &Bound<'_, PyDict>) -> PyResult<Task> {
    fork::check()?;
    let args = arguments(&Given(settings))?;
    Task::begin("worker start", move |_| {
        let (config, identity) = command::prepare(&args)?;
        let (sender, events) = bounded(EVENTS_MAX);
        let steps = Arc::new(AtomicBool::new(false));
        let (view, wanted, news) = (WorkerView::new(Voice::Json), steps.clone(), sender.clone());
        let observer: WorkerObserver = Arc::new(move |event: WorkerEvent| {
            let step = matches!(event, WorkerEvent::Stage(StageEvent::Step { .. }));
            if step && !wanted.load(Ordering::Relaxed) {
                return;
            }
            if let Some(object) = view.object(&event) {
                let _ = news.try_send(object);
            }
        });
        let worker = command::start(&args, &config, &identity, observer)?;
        let port = worker.port();
        let (mut waiting, words) = command::announcement(&config, &identity, port);
        waiting["words"] = words.into();
        let _ = sender.try_send(waiting);
        let node = Node { _shown: command::show(&worker, args.local), worker };
        Ok(Product::Worker(Box::new(Served { worker: node, port, events, steps })))
    })
}

impl Worker {
    pub fn new(Served { worker, port, events, steps }: Served) -> Self {
        Self { worker: Mutex::new(Some(Arc::new(worker))), events, steps, port }
    }

    fn take(&self) -> Option<Arc<Node>> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[pymethods]
impl Worker {
    /// What happened since the last call, oldest first; waits for the first, `seconds` at most, while other threads go
    /// on. With `steps`, also every step it computes.
    fn events<'py>(&self, py: Python<'py>, seconds: f64, steps: bool) -> PyResult<Bound<'py, PyList>> {
        fork::check()?;
        self.steps.store(steps, Ordering::Relaxed);
        let within = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let events: Vec<Value> = py.detach(|| {
            let first = self.events.recv_timeout(within).ok();
            first.into_iter().chain(self.events.try_iter()).collect()
        });
        to_list(py, &events)
    }

    /// It was ended.
    #[getter]
    fn stopped(&self) -> bool {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// What it is doing.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        fork::check()?;
        let node = self.worker.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let stopped = || errors::raised("SwarmError", "the worker was stopped; call start() first");
        let status = py.detach(|| {
            let status = node.map(|node| node.worker.watch().status());
            status.map(|status| serde_json::to_value(status).unwrap_or_default())
        });
        to_python(py, &status.ok_or_else(stopped)?)
    }

    /// Ends it; a coordinator that uses it is told goodbye.
    fn stop(&self) -> PyResult<()> {
        fork::check()?;
        fork::let_go(self.take());
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        fork::let_go(self.take());
    }
}
