//! What Python gets: JSON as dictionaries, events of a start as JSON.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use serde_json::{Value, json};
use swarm_node::{EngineEvent, SearchEvent};

/// A JSON value as Python's own.
pub fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Bool(value) => value.into_pyobject(py)?.to_owned().into_any(),
        Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
            (Some(number), ..) => number.into_pyobject(py)?.into_any(),
            (_, Some(number), _) => number.into_pyobject(py)?.into_any(),
            (.., number) => number.unwrap_or(f64::NAN).into_pyobject(py)?.into_any(),
        },
        Value::String(text) => text.into_pyobject(py)?.into_any(),
        Value::Array(items) => {
            let list = PyList::empty(py);
            items.iter().try_for_each(|item| list.append(to_python(py, item)?))?;
            list.into_any()
        }
        Value::Object(fields) => {
            let dict = PyDict::new(py);
            fields.iter().try_for_each(|(name, value)| dict.set_item(name, to_python(py, value)?))?;
            dict.into_any()
        }
    })
}

/// Several values as a list.
pub fn to_list<'py>(py: Python<'py>, values: &[Value]) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    values.iter().try_for_each(|value| list.append(to_python(py, value)?))?;
    Ok(list)
}

/// What happens while an engine starts.
pub fn event(event: &EngineEvent) -> Value {
    match event {
        EngineEvent::Search(SearchEvent::Searching { within }) => {
            json!({"event": "searching", "within_s": within.as_secs_f64()})
        }
        EngineEvent::Search(SearchEvent::DiscoveryUnavailable { why }) => {
            json!({"event": "discovery_unavailable", "why": why})
        }
        EngineEvent::Search(SearchEvent::Found { name, address }) => {
            json!({"event": "found", "name": name, "address": address.to_string()})
        }
        EngineEvent::Search(SearchEvent::Unusable { address, why }) => {
            json!({"event": "unusable", "address": address, "why": why})
        }
        EngineEvent::Placed(placement) => {
            let stages: Vec<Value> = placement.stages.iter().map(placed).collect();
            json!({"event": "placed", "stages": stages})
        }
        EngineEvent::Loading { node, bytes_done, bytes_total, from } => {
            json!({"event": "loading", "node": node, "bytes_done": bytes_done, "bytes_total": bytes_total,
                "from": from})
        }
    }
}

fn placed(stage: &swarm_node::PlacedStage) -> Value {
    json!({"name": stage.name, "layers": [stage.layers.start, stage.layers.end]})
}
