//! What a model is made of, as whoever serves its bytes tells whoever needs them.

use serde::{Deserialize, Serialize};

use crate::control::{ControlError, LayerRange, NextHop, Origin};
use crate::control_check::{
    ADDRESSES_MAX, BYTES_MAX, LAYERS_MAX, MODEL_CHARS_MAX, TAG_CHARS_MAX, at_most, between, invalid, text,
    validate_origin,
};
use crate::ids::{Epoch, Fingerprint};

/// Most files of a model: its configuration, an index, and its weights.
pub const FILES_MAX: usize = 512;
/// Longest name of a file.
const FILE_CHARS_MAX: usize = 256;
/// Most units that a message names.
pub const ROOTS_MAX: usize = 1024;
/// Most nodes that a stage may take weights from.
pub const SOURCES_MAX: usize = 16;

/// First message of a coordinator that dials a worker so that its stage can ask for bytes; and the answer to a
/// fetch. From then on the other side sends [`crate::Ask`]s.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supply {
    /// The placement whose stage may ask; zero in the answer to a fetch.
    pub epoch: Epoch,
    /// Digest of the model.
    pub fingerprint: Fingerprint,
    /// What it is called, for people. A stranger's text.
    pub name: String,
    /// Which published model it is; absent for files of the coordinator's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The cache that the sender has the model in; absent when it is in none. Who has the same cache has the same bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Fingerprint>,
    /// Its files. An ask names them by their index.
    pub files: Vec<SuppliedFile>,
}

/// A file of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SuppliedFile {
    /// Its name, with folders inside the repository. Held against its grammar before it becomes part of a path.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// The Hub's tag of its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// It is no weight file: needed whole before the model can be opened.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub small: bool,
}

/// Which model is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelId {
    /// As the coordinator's user named it. A stranger's text.
    pub name: String,
    /// Digest of the model, as the coordinator has it.
    pub fingerprint: Fingerprint,
    /// Which published model it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

/// What a node has of a model on its disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Layers that are there whole, in order.
    pub layers: Vec<LayerRange>,
    /// The embedding is.
    pub embed: bool,
    /// The final norm is.
    pub norm: bool,
    /// The head is; the embedding, where they are tied.
    pub head: bool,
    /// Units whose pieces it can list, and what they hash to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roots: Vec<UnitRoot>,
}

/// A part of a model that nodes agree on as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitRoot {
    /// A layer by its number; after the last the embedding, the final norm and the head.
    pub unit: u32,
    /// Digest over the digests of its pieces.
    pub root: Fingerprint,
}

/// A node that has units which a stage needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightSource {
    /// Who, and where.
    pub node: NextHop,
    /// What may be taken from it, as the coordinator knows it.
    pub units: Vec<UnitRoot>,
}

pub(crate) fn validate_source(source: &WeightSource) -> Result<(), ControlError> {
    between("sources.addresses", source.node.addresses.len() as u64, 1, ADDRESSES_MAX as u64)?;
    validate_roots(&source.units)
}

fn validate_roots(roots: &[UnitRoot]) -> Result<(), ControlError> {
    at_most("roots", roots.len() as u64, ROOTS_MAX as u64)?;
    roots.iter().try_for_each(|root| at_most("unit", root.unit.into(), u64::from(LAYERS_MAX) + 2))
}

pub(crate) fn validate_model(model: &ModelId) -> Result<(), ControlError> {
    text("model.name", &model.name, MODEL_CHARS_MAX)?;
    model.origin.iter().try_for_each(validate_origin)
}

pub(crate) fn validate_held(held: &Held) -> Result<(), ControlError> {
    at_most("held.layers", held.layers.len() as u64, LAYERS_MAX.into())?;
    validate_ranges("held.layers", &held.layers, LAYERS_MAX)?;
    validate_roots(&held.roots)
}

/// Layer ranges in order, none of them empty or twice, of a model of `layers`.
pub(crate) fn validate_ranges(
    field: &'static str,
    ranges: &[LayerRange],
    layers: u32,
) -> Result<(), ControlError> {
    let mut free = 0;
    for range in ranges {
        if range.start < free || range.start >= range.end || range.end > layers {
            return Err(invalid(field, "a range that is empty, out of order, or of no model"));
        }
        free = range.end;
    }
    Ok(())
}

pub(crate) fn validate_supply(supply: &Supply) -> Result<(), ControlError> {
    text("name", &supply.name, MODEL_CHARS_MAX)?;
    supply.origin.iter().try_for_each(validate_origin)?;
    between("files", supply.files.len() as u64, 1, FILES_MAX as u64)?;
    for file in &supply.files {
        text("files.name", &file.name, FILE_CHARS_MAX)?;
        text("files.tag", file.tag.as_deref().unwrap_or_default(), TAG_CHARS_MAX)?;
        at_most("files.bytes", file.bytes, BYTES_MAX)?;
    }
    let mut names: Vec<&str> = supply.files.iter().map(|file| file.name.as_str()).collect();
    names.sort_unstable();
    if names.windows(2).any(|pair| pair.first() == pair.last()) {
        return Err(invalid("files", "a name twice"));
    }
    Ok(())
}
