//! The Rust half of the Python package `swarm_os`: [`Engine`](swarm_node::Engine) and
//! [`Worker`](swarm_node::Worker) in a Python process, and the command.
//!
//! What users see is in `python/swarm_os`; here is what needs the engine. Nothing here calls into Python from a thread
//! of the engine: whatever takes long is a [`task::Task`] that Python waits for in slices, so that Ctrl-C is heard and
//! other threads go on, and news is fetched, not delivered. Settings, errors and numbers are the command's own.

#![forbid(unsafe_code)]

mod answer;
mod convert;
mod engine;
mod errors;
mod fork;
mod given;
mod task;
mod worker;

use std::ffi::OsString;

use pyo3::prelude::*;

/// Runs the command `swarm-os` with the words `args`, the first of which is its own name, and gives the exit code.
/// `again` starts it another time, for `--nodes`: a program and its first arguments.
#[pyfunction]
fn command(py: Python<'_>, args: Vec<OsString>, again: Vec<OsString>) -> PyResult<u8> {
    fork::check()?;
    swarm_os::start::set_command(again);
    Ok(py.detach(|| swarm_os::command(args)))
}

#[pymodule]
#[pyo3(name = "_native")]
fn native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    fork::remember_process();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<task::Task>()?;
    module.add_class::<engine::Engine>()?;
    module.add_class::<answer::Generation>()?;
    module.add_class::<worker::Worker>()?;
    module.add_function(wrap_pyfunction!(command, module)?)?;
    module.add_function(wrap_pyfunction!(engine::check, module)?)?;
    module.add_function(wrap_pyfunction!(worker::check_worker, module)?)?;
    module.add_function(wrap_pyfunction!(engine::connect, module)?)?;
    module.add_function(wrap_pyfunction!(engine::plan, module)?)?;
    module.add_function(wrap_pyfunction!(worker::start_worker, module)?)
}
