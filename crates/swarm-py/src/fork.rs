//! A process that was forked has none of the threads that the engine needs: it is told so, and nothing of the parent's
//! is touched in it.

use std::sync::OnceLock;

use pyo3::prelude::*;

use crate::errors;

/// The process that imported the package.
static PROCESS: OnceLock<u32> = OnceLock::new();

pub fn remember_process() {
    let _ = PROCESS.set(std::process::id());
}

/// Whether this is the process that imported the package.
pub fn is_here() -> bool {
    PROCESS.get() == Some(&std::process::id())
}

/// # Errors
/// `ForkError` in a process that was forked.
pub fn check() -> PyResult<()> {
    if is_here() {
        return Ok(());
    }
    Err(errors::raised(
        "ForkError",
        "this process was forked from one that had imported swarm_os, and a fork has no engine; \
         start it anew instead, with multiprocessing.get_context(\"spawn\") or subprocess",
    ))
}

/// Drops what may wait for threads: with other Python threads going on meanwhile, and in a fork, where those threads
/// are not, not at all.
pub fn let_go<T: Send>(value: T) {
    if !is_here() {
        std::mem::forget(value);
        return;
    }
    let mut value = Some(value);
    // Without an interpreter any more, there is nobody to wait for.
    Python::try_attach(|py| py.detach(|| drop(value.take())));
    drop(value);
}
