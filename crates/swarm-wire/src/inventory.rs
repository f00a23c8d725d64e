//! Which models a node has: asked and answered on a connection of its own.

use serde::{Deserialize, Serialize};

use crate::control::{ControlError, LayerRange};
use crate::control_check::{
    BYTES_MAX, CONTROL_BYTES_MAX, LAYERS_MAX, MODEL_CHARS_MAX, NAME_CHARS_MAX, TAG_CHARS_MAX, at_most,
    between, text,
};
use crate::supply::validate_ranges;

/// Most models that an answer names.
pub const LISTED_MAX: usize = 256;
/// Most layer ranges of one of them.
pub const RANGES_MAX: usize = 256;
/// What an answer has beside its models: its kind, a name in the longest spelling of JSON, a number.
const HEAD_BYTES: usize = 2048;

/// What is on a node's disk, whole and in part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// What its owner calls the node. A stranger's text.
    pub name: String,
    /// One entry for each model.
    pub models: Vec<ListedModel>,
    /// Models that are there and not named, because a message has an end.
    #[serde(default)]
    pub left_out: u32,
}

/// A model of a node, and how much of it is there. All texts are a stranger's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedModel {
    /// What it is called there; `organisation/name` for one of a repository.
    pub name: String,
    /// The version of a repository's model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The GGUF file of the repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// `gguf` or `safetensors`.
    pub format: String,
    /// Layers of the whole model.
    pub layers_total: u32,
    /// Those that are there whole, in order.
    pub layers: Vec<LayerRange>,
    /// Bytes of all its weights.
    pub bytes: u64,
    /// Those that are there.
    pub bytes_held: u64,
}

impl Listed {
    /// As many of `models` as fit a message, the first ones first; the others are counted.
    pub fn fitting(name: &str, models: Vec<ListedModel>) -> Self {
        let mut listed = Self { name: name.chars().take(NAME_CHARS_MAX).collect(), ..Self::default() };
        let mut room = CONTROL_BYTES_MAX - HEAD_BYTES;
        for model in models {
            let bytes = serde_json::to_vec(&model).map_or(usize::MAX, |json| json.len().saturating_add(1));
            let fits = listed.models.len() < LISTED_MAX && bytes <= room && validate_model(&model).is_ok();
            if fits {
                room -= bytes;
                listed.models.push(model);
            } else {
                listed.left_out = listed.left_out.saturating_add(1);
            }
        }
        listed
    }
}

pub(crate) fn validate_listed(listed: &Listed) -> Result<(), ControlError> {
    text("name", &listed.name, NAME_CHARS_MAX)?;
    at_most("models", listed.models.len() as u64, LISTED_MAX as u64)?;
    listed.models.iter().try_for_each(validate_model)
}

fn validate_model(model: &ListedModel) -> Result<(), ControlError> {
    text("models.name", &model.name, MODEL_CHARS_MAX)?;
    text("models.commit", model.commit.as_deref().unwrap_or_default(), TAG_CHARS_MAX)?;
    text("models.file", model.file.as_deref().unwrap_or_default(), MODEL_CHARS_MAX)?;
    text("models.format", &model.format, TAG_CHARS_MAX)?;
    between("models.layers_total", model.layers_total.into(), 1, LAYERS_MAX.into())?;
    at_most("models.layers", model.layers.len() as u64, RANGES_MAX as u64)?;
    validate_ranges("models.layers", &model.layers, model.layers_total)?;
    at_most("models.bytes", model.bytes, BYTES_MAX)?;
    at_most("models.bytes_held", model.bytes_held, model.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Control;

    fn model(name: String) -> ListedModel {
        ListedModel {
            name,
            commit: Some("0".repeat(40)),
            file: None,
            format: "safetensors".into(),
            layers_total: 30,
            layers: vec![LayerRange { start: 0, end: 12 }],
            bytes: 1000,
            bytes_held: 400,
        }
    }

    #[test]
    fn an_answer_always_fits_and_counts_what_does_not() {
        let many = |count: usize, name: &str| (0..count).map(|_| model(name.to_owned())).collect();
        let long = "\u{1}".repeat(MODEL_CHARS_MAX);
        for (count, name, named) in
            [(3, "org/name", 3), (1000, "org/name", LISTED_MAX), (1000, long.as_str(), 0)]
        {
            // A name of control characters takes six bytes for each in JSON, as the node's own may.
            let listed = Listed::fitting(&"\u{1}".repeat(1000), many(count, name));
            assert_eq!(listed.models.len() + listed.left_out as usize, count);
            assert!(listed.models.len() >= named && (named == 0 || listed.models.len() == named));
            let mut out = Vec::new();
            Control::Listed(Box::new(listed.clone())).encode(&mut out).unwrap();
            assert_eq!(Control::decode(&out).unwrap(), Control::Listed(Box::new(listed)));
        }
    }

    #[test]
    fn what_is_no_sound_entry_is_counted() {
        let broken = ListedModel { bytes_held: 2000, ..model("a".into()) };
        let split = LayerRange { start: 2, end: 3 };
        let doubled = ListedModel { layers: vec![split, split], ..model("a".into()) };
        let beyond = ListedModel { layers: vec![LayerRange { start: 29, end: 31 }], ..model("a".into()) };
        let listed = Listed::fitting("kitchen", vec![broken, doubled, beyond, model("b".into())]);
        assert_eq!((listed.models.len(), listed.left_out), (1, 3));
    }
}
