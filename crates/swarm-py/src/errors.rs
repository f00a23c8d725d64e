//! Failures of the command as exceptions. The classes are in `swarm_os/errors.py`; the texts are the command's.

use pyo3::prelude::*;
use swarm_node::{Engine, NodeState};
use swarm_os::failure::{Code, Failure, Kind};

/// An exception of the class `name` of `swarm_os.errors`.
pub fn raised(name: &str, text: &str) -> PyErr {
    Python::attach(|py| build(py, name, text, None))
}

/// A failure as an exception.
pub fn of_failure(failure: &Failure) -> PyErr {
    let text = failure.to_string();
    let name = match failure.kind() {
        Kind::Lost { node } => {
            let (node, layers) = name_and_layers(node);
            return Python::attach(|py| build(py, "NodeLostError", &text, Some((Some(node), layers))));
        }
        Kind::NoWorker => "NoWorkerError",
        Kind::Unpaired => "NotPairedError",
        Kind::Model => "ModelError",
        Kind::Memory => "OutOfMemoryError",
        Kind::Usage => "ArgumentError",
        Kind::Other => "SwarmError",
    };
    raised(name, &text)
}

/// An answer's failure. Where the ring was lost, the exception names the node and its layers.
pub fn of_answer(failure: &Failure, engine: &Engine) -> PyErr {
    if failure.code() != Code::Ring {
        return of_failure(failure);
    }
    let text = failure.to_string();
    let nodes = engine.nodes();
    let told = nodes.iter().skip(1).find(|node| text.contains(&node.name));
    let lost = told.or_else(|| nodes.iter().find(|node| node.state == NodeState::Lost));
    let who = lost.map(|node| (Some(node.name.clone()), Some((node.layers.start, node.layers.end))));
    Python::attach(|py| build(py, "NodeLostError", &text, Some(who.unwrap_or((None, None)))))
}

type Who = (Option<String>, Option<(usize, usize)>);

fn build(py: Python<'_>, name: &str, text: &str, who: Option<Who>) -> PyErr {
    let made =
        py.import("swarm_os.errors").and_then(|module| module.getattr(name)).and_then(|class| match who {
            Some((node, layers)) => class.call1((text, node, layers)),
            None => class.call1((text,)),
        });
    made.map_or_else(|error| error, PyErr::from_value)
}

/// `kitchen-1a2b (layers 4..8)`, as nodes are named where their layers are known.
fn name_and_layers(label: &str) -> (String, Option<(usize, usize)>) {
    let split = || -> Option<(String, (usize, usize))> {
        let (name, rest) = label.rsplit_once(" (layers ")?;
        let (start, end) = rest.strip_suffix(')')?.split_once("..")?;
        Some((name.to_owned(), (start.parse().ok()?, end.parse().ok()?)))
    };
    split().map_or_else(|| (label.to_owned(), None), |(name, layers)| (name, Some(layers)))
}
