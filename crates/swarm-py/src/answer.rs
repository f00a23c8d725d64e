//! One answer as a Python iterator.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::Duration;

use pyo3::prelude::*;
use serde_json::Value;
use swarm_node::{Finish, Waited};
use swarm_os::commands::run;
use swarm_os::present::report::RunReport;

use crate::engine::Held;
use crate::{errors, fork};

/// Between two looks for Ctrl-C while no token comes.
const LOOK: Duration = Duration::from_millis(50);
/// How long `close` waits for the last news of an answer, whose numbers are in it.
const CLOSING: Duration = Duration::from_secs(1);

/// What an engine remembers of its answers.
#[derive(Default)]
pub struct Tally {
    /// Tokens handed out.
    pub tokens: AtomicU64,
    /// What was measured of the answer that ended last.
    pub last: Mutex<Option<Value>>,
}

/// An answer on its way: an iterator of pieces of text. Closing or dropping it ends the answer on every node.
#[pyclass(frozen, module = "swarm_os._native")]
pub struct Generation {
    answer: Mutex<Option<swarm_node::Generation>>,
    cancel: Box<dyn Fn() + Send + Sync>,
    engine: Weak<Held>,
    tally: Arc<Tally>,
    /// Nothing comes any more.
    over: AtomicBool,
}

impl Generation {
    pub fn new(answer: swarm_node::Generation, engine: &Arc<Held>, tally: Arc<Tally>) -> Self {
        let cancel = Box::new(answer.canceller());
        let engine = Arc::downgrade(engine);
        Self { answer: Mutex::new(Some(answer)), cancel, engine, tally, over: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<swarm_node::Generation>> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(answer: &mut Option<swarm_node::Generation>, within: Duration) -> Waited {
        answer.as_mut().map_or(Waited::Ended, |answer| answer.wait(within))
    }

    /// The next text that is not empty; `None` after the last.
    fn next_text(&self, py: Python<'_>) -> PyResult<Option<String>> {
        fork::check()?;
        while !self.over.load(Ordering::Relaxed) {
            // Here, and not only where nothing comes: `list` and `read` go from piece to piece without a look.
            if let Err(interrupted) = py.check_signals() {
                self.close(py)?;
                return Err(interrupted);
            }
            // A piece that is here is taken at once: to let other threads in would cost more than to take it.
            let mut waited = match self.answer.try_lock() {
                Ok(mut answer) => Self::wait(&mut answer, Duration::ZERO),
                Err(TryLockError::Poisoned(answer)) => Self::wait(&mut answer.into_inner(), Duration::ZERO),
                Err(TryLockError::WouldBlock) => Waited::Pending,
            };
            if waited == Waited::Pending {
                waited = py.detach(|| Self::wait(&mut self.lock(), LOOK));
            }
            match waited {
                Waited::Piece(piece) => {
                    self.tally.tokens.fetch_add(u64::from(piece.token.is_some()), Ordering::Relaxed);
                    if !piece.text.is_empty() {
                        return Ok(Some(piece.text));
                    }
                }
                Waited::Ended => self.ended(py)?,
                Waited::Pending => {}
            }
        }
        Ok(None)
    }

    /// Notes what was measured; an answer that ended in an error raises it.
    fn ended(&self, py: Python<'_>) -> PyResult<()> {
        if self.over.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let failed = py.detach(|| {
            let answer = self.lock();
            let outcome = answer.as_ref()?.outcome();
            let Some(held) = self.engine.upgrade() else {
                // Closed meanwhile: there is nothing to measure by any more.
                let Finish::Error(why) = &outcome.finish else { return None };
                return Some(errors::of_failure(&run::ended_early(why)));
            };
            let engine = &held.running.engine;
            let report = serde_json::to_value(RunReport::new(engine, outcome)).unwrap_or_default();
            *self.tally.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
            run::check(engine, outcome).err().map(|failure| errors::of_answer(&failure, engine))
        });
        failed.map_or(Ok(()), Err)
    }

    fn look<T: Send>(&self, py: Python<'_>, at: impl FnOnce(&swarm_node::Outcome) -> T + Send) -> Option<T> {
        py.detach(|| self.lock().as_ref().map(|answer| at(answer.outcome())))
    }
}

#[pymethods]
impl Generation {
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<String>> {
        self.next_text(py)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py)
    }

    /// Reads what is left and gives the whole text.
    fn read(&self, py: Python<'_>) -> PyResult<String> {
        while self.next_text(py)?.is_some() {}
        self.text(py)
    }

    /// Ends the answer on every node at once, without waiting for anything; what came already may still be read.
    fn cancel(&self) -> PyResult<()> {
        fork::check()?;
        (self.cancel)();
        Ok(())
    }

    /// Ends the answer on every node at once. What was not read is dropped.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        fork::check()?;
        if self.over.load(Ordering::Relaxed) {
            return Ok(());
        }
        (self.cancel)();
        py.detach(|| {
            let until = std::time::Instant::now() + CLOSING;
            let mut answer = self.lock();
            let left = || until.saturating_duration_since(std::time::Instant::now());
            while matches!(Self::wait(&mut answer, left()), Waited::Piece(_)) {}
        });
        // That it was ended is no error.
        let _ = self.ended(py);
        Ok(())
    }

    /// The text so far.
    #[getter]
    fn text(&self, py: Python<'_>) -> PyResult<String> {
        fork::check()?;
        Ok(self.look(py, |outcome| outcome.text.clone()).unwrap_or_default())
    }

    /// The token ids so far.
    #[getter]
    fn token_ids(&self, py: Python<'_>) -> PyResult<Vec<u32>> {
        fork::check()?;
        Ok(self.look(py, |outcome| outcome.token_ids.clone()).unwrap_or_default())
    }

    /// Tokens of the prompt.
    #[getter]
    fn prompt_tokens(&self, py: Python<'_>) -> PyResult<usize> {
        fork::check()?;
        Ok(self.look(py, |outcome| outcome.prompt_tokens).unwrap_or_default())
    }

    /// `stop`, `length`, `cancelled` or `error`; `None` while it goes on.
    #[getter]
    fn finish_reason(&self, py: Python<'_>) -> PyResult<Option<&'static str>> {
        fork::check()?;
        let over = self.over.load(Ordering::Relaxed);
        Ok(self.look(py, |outcome| outcome.finish.as_str()).filter(|_| over))
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        // Dropping the answer cancels it.
        fork::let_go(self.lock().take());
    }
}
