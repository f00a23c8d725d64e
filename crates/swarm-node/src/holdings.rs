//! What each node has of a model on its disk, and so what it would have to fetch.

use std::path::PathBuf;

use swarm_ring::Missing;
use swarm_weights::{Checkpoint, EMBED, HEAD, NORM, Store};
use swarm_wire::{Held, LayerRange, ModelId};

use crate::error::NodeError;
use crate::stage_setup::{self, WantedModel, whole_here};

/// Which model this is, as workers are asked for it.
pub(crate) fn model_id(name: &str, model: &Checkpoint) -> Result<ModelId, NodeError> {
    Ok(ModelId {
        name: name.chars().take(swarm_wire::MODEL_CHARS_MAX).collect(),
        fingerprint: swarm_wire::Fingerprint(model.fingerprint()?),
        origin: stage_setup::origin(model),
    })
}

fn head(model: &Checkpoint) -> &'static str {
    if model.config().tie_word_embeddings { EMBED } else { HEAD }
}

/// What is here of an opened model.
fn held(model: &Checkpoint) -> Held {
    let range = |range: std::ops::Range<usize>| LayerRange::try_from(range).ok();
    Held {
        layers: model.held_layers().into_iter().filter_map(range).collect(),
        embed: model.holds(EMBED),
        norm: model.holds(NORM),
        head: model.holds(head(model)),
    }
}

/// A worker's answer: what it has of a model that the machine `from` asks about.
pub(crate) fn answer(own: Option<&PathBuf>, id: &ModelId, from: [u8; 32]) -> Held {
    let wanted = WantedModel { named: &id.name, fingerprint: &id.fingerprint.0, origin: id.origin.as_ref() };
    if let Ok(Some(found)) = whole_here(own, &wanted) {
        return held(&found);
    }
    if own.is_some() {
        return Held::default();
    }
    let origin = id.origin.as_ref().map(stage_setup::known_origin);
    let found = Store::of_user().held(origin.as_ref(), id.fingerprint.0, from);
    found.as_ref().map(held).unwrap_or_default()
}

/// What a node lacks that has `held` of `model`.
pub(crate) fn missing(model: &Checkpoint, held: &Held) -> Missing {
    let has = |layer: usize| {
        let inside = |range: &LayerRange| std::ops::Range::<usize>::from(*range).contains(&layer);
        held.layers.iter().any(inside)
    };
    let bytes = |name: &str| model.tensor(name).map_or(0, |info| info.bytes);
    let unless = |here: bool, bytes: u64| if here { 0 } else { bytes };
    Missing {
        layers: model.config().layers().map(|layer| unless(has(layer), model.layer_bytes(layer))).collect(),
        embed: unless(held.embed, bytes(EMBED)),
        norm: unless(held.norm, bytes(NORM)),
        head: unless(held.head, bytes(head(model))),
    }
}

/// What this node lacks.
pub(crate) fn own_missing(model: &Checkpoint) -> Missing {
    missing(model, &held(model))
}

/// What a node lacks that did not say: all of it, where the coordinator has to fetch as well; else it is taken to have
/// the files, too.
pub(crate) fn assumed_missing(model: &Checkpoint) -> Missing {
    if model.is_partial() { missing(model, &Held::default()) } else { Missing::default() }
}
