//! What nodes tell each other so that layers can be placed: speeds and links.

use serde::{Deserialize, Serialize};

use crate::control::{ControlError, NextHop};
use crate::control_check::{ADDRESSES_MAX, TAG_CHARS_MAX, at_most, between, invalid, text};
use crate::ids::NodeId;
use crate::supply::{Held, ModelId, validate_held, validate_model};

/// Longest list of nodes to measure the link to.
pub const TARGETS_MAX: usize = 64;
/// Most rows or columns of a matrix.
const SIDE_MAX: u64 = 1 << 22;
/// Longest time that is a measurement, in nanoseconds: a quarter of an hour.
const NS_MAX: u64 = 1 << 40;

/// A weight matrix by its shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MatrixShape {
    /// The storage type's name, as GGUF spells it.
    pub dtype: String,
    /// Outputs.
    pub rows: u32,
    /// Inputs.
    pub cols: u32,
}

/// The matrices that a model multiplies with, by shape only.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerShape {
    /// q, k, v, o, gate, up, down of a layer of mean size.
    pub layer: [MatrixShape; 7],
    /// The head.
    pub head: MatrixShape,
    /// Layers of the model.
    pub layers: u32,
}

/// Coordinator to worker: how fast would you compute this model, and how far are these nodes?
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    /// Repeated in the answer.
    pub id: u64,
    /// What would be computed.
    pub shape: LayerShape,
    /// Compute threads; absent: the worker decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// Nodes to measure the link to.
    pub targets: Vec<NextHop>,
    /// Say what is on your disk of this model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelId>,
}

/// One link as a node measured it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeasuredLink {
    /// Who is at its other end.
    pub node_id: NodeId,
    /// There and back again of a small message, in nanoseconds; absent when nobody was reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_trip_ns: Option<u64>,
    /// Bulk transfer, bytes per second; absent when it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<u64>,
}

/// The answer to a [`Measure`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// From the request.
    pub id: u64,
    /// One token through the layer, in nanoseconds; zero when it could not be measured.
    pub layer_ns: u64,
    /// One row of a prompt chunk through the layer, in nanoseconds.
    pub row_ns: u64,
    /// One token through the head, in nanoseconds.
    pub head_ns: u64,
    /// The times are of real layers of such a model, not of a probe.
    pub layers: bool,
    /// The links that were asked for.
    pub links: Vec<MeasuredLink>,
    /// What is there of the model; absent: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<Held>,
}

pub(crate) fn validate_measure(measure: &Measure) -> Result<(), ControlError> {
    let shape = &measure.shape;
    between("layers", shape.layers.into(), 1, 1 << 12)?;
    for matrix in shape.layer.iter().chain([&shape.head]) {
        text("dtype", &matrix.dtype, TAG_CHARS_MAX)?;
        between("rows", matrix.rows.into(), 1, SIDE_MAX)?;
        between("cols", matrix.cols.into(), 1, SIDE_MAX)?;
    }
    if let Some(threads) = measure.threads {
        between("threads", threads.into(), 1, 1 << 14)?;
    }
    measure.model.iter().try_for_each(validate_model)?;
    at_most("targets", measure.targets.len() as u64, TARGETS_MAX as u64)?;
    measure.targets.iter().try_for_each(|target| {
        between("targets.addresses", target.addresses.len() as u64, 1, ADDRESSES_MAX as u64)
    })
}

pub(crate) fn validate_measured(measured: &Measured) -> Result<(), ControlError> {
    for (field, value) in
        [("layer_ns", measured.layer_ns), ("row_ns", measured.row_ns), ("head_ns", measured.head_ns)]
    {
        at_most(field, value, NS_MAX)?;
    }
    measured.held.iter().try_for_each(validate_held)?;
    at_most("links", measured.links.len() as u64, TARGETS_MAX as u64)?;
    for link in &measured.links {
        at_most("round_trip_ns", link.round_trip_ns.unwrap_or(0), NS_MAX)?;
        if link.bytes_per_s == Some(0) {
            return Err(invalid("bytes_per_s", "must be above 0"));
        }
    }
    Ok(())
}
