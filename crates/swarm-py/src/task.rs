//! Work that takes long, on a thread of its own. Python waits for it in slices.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use pyo3::prelude::*;
use pyo3::types::PyList;
use serde_json::{Value, json};
use swarm_os::failure::{Code, Failure};

use crate::convert::{to_list, to_python};
use crate::engine::{Connected, Engine};
use crate::worker::{Served, Worker};
use crate::{errors, fork};

/// What work gives in the end.
pub enum Product {
    Engine(Box<Connected>),
    Worker(Box<Served>),
    Value(Value),
}

enum News {
    Event(Value),
    Done(Result<Product, Failure>),
}

/// What the work tells whoever waits for it.
pub struct Teller {
    news: Sender<News>,
    abandoned: Arc<AtomicBool>,
}

impl Teller {
    pub fn event(&self, event: Value) {
        // Whoever waited may have gone.
        let _ = self.news.send(News::Event(event));
    }

    /// Something a person should read that is not an error.
    pub fn note(&self, text: &str) {
        self.event(json!({"event": "note", "text": text}));
    }

    /// Nobody waits any more.
    pub fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
    }
}

/// Work on its way. Dropping it leaves the work to itself: it ends as soon as it can, and what it made goes.
#[pyclass(frozen, module = "swarm_os._native")]
pub struct Task {
    news: Receiver<News>,
    heard: Mutex<Heard>,
    abandoned: Arc<AtomicBool>,
}

#[derive(Default)]
struct Heard {
    events: Vec<Value>,
    done: Option<Result<Product, Failure>>,
}

impl Task {
    /// Begins `work` on a thread called `name`.
    pub fn begin(
        name: &str,
        work: impl FnOnce(&Teller) -> Result<Product, Failure> + Send + 'static,
    ) -> PyResult<Self> {
        let (sender, news) = unbounded();
        let abandoned = Arc::new(AtomicBool::new(false));
        let teller = Teller { news: sender, abandoned: abandoned.clone() };
        let body = move || {
            let done = swarm_os::start_log("off").and_then(|()| swarm_os::check_kernels());
            let done = done.and_then(|()| work(&teller));
            // What nobody waits for any more ends here, on this thread.
            let _ = teller.news.send(News::Done(done));
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(body).map_err(|error| {
            errors::raised("SwarmError", &format!("a thread cannot be started: {error}; end other programs"))
        })?;
        Ok(Self { news, heard: Mutex::default(), abandoned })
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what is here already, and says whether that was the end.
    fn listen(&self, within: Duration) -> bool {
        let mut heard = self.heard();
        let mut next = if heard.done.is_some() { return true } else { self.news.recv_timeout(within) };
        loop {
            match next {
                Ok(News::Event(event)) => heard.events.push(event),
                Ok(News::Done(done)) => heard.done = Some(done),
                Err(RecvTimeoutError::Timeout) => return false,
                Err(RecvTimeoutError::Disconnected) => {
                    let text = "the work ended without a result; this is a bug, please report it";
                    heard.done = Some(Err(Failure::new(Code::Failed, text)));
                }
            }
            if heard.done.is_some() {
                return true;
            }
            next = self.news.recv_timeout(Duration::ZERO);
        }
    }
}

#[pymethods]
impl Task {
    /// Waits until it is done, `seconds` at most, while other threads go on. True when it is done.
    fn wait(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        fork::check()?;
        let within = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        Ok(py.detach(|| self.listen(within)))
    }

    /// What happened since the last call, oldest first.
    fn events<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let events = std::mem::take(&mut self.heard().events);
        to_list(py, &events)
    }

    /// What it made, once; raises what it failed with.
    fn result<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        fork::check()?;
        match self.heard().done.take() {
            None => Err(errors::raised("SwarmError", "there is no result yet, or it was taken already")),
            Some(Err(failure)) => Err(errors::of_failure(&failure)),
            Some(Ok(Product::Value(value))) => to_python(py, &value),
            Some(Ok(Product::Engine(made))) => Ok(Bound::new(py, Engine::new(*made))?.into_any()),
            Some(Ok(Product::Worker(made))) => Ok(Bound::new(py, Worker::new(*made))?.into_any()),
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.abandoned.store(true, Ordering::Relaxed);
        let heard = std::mem::take(&mut *self.heard());
        // Also what was sent and not heard.
        let unheard: Vec<News> = self.news.try_iter().collect();
        fork::let_go((heard.done, unheard));
    }
}
