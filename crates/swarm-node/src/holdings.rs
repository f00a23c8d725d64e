//! What each node has of a model on its disk, and so what it would have to fetch.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crossbeam_channel::{Receiver, TryRecvError};
use swarm_ring::Missing;
use swarm_weights::{Checkpoint, EMBED, HEAD, HashedUnits, NORM, Store};
use swarm_wire::{Fingerprint, Held, LayerRange, ModelId, ROOTS_MAX, SOURCES_MAX, UnitRoot};

use crate::deadlines::HASHING;
use crate::error::NodeError;
use crate::stage_setup::{self, WantedModel, whole_here};
use crate::traffic::TRAFFIC;
use crate::worker::spawn;

/// Which model this is, as workers are asked for it.
pub(crate) fn model_id(name: &str, model: &Checkpoint) -> Result<ModelId, NodeError> {
    Ok(ModelId {
        name: name.chars().take(swarm_wire::MODEL_CHARS_MAX).collect(),
        fingerprint: Fingerprint(model.fingerprint()?),
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
        roots: roots(model),
    }
}

/// The units whose pieces are listed here, or were read from whole files, and what they hash to.
fn roots(model: &Checkpoint) -> Vec<UnitRoot> {
    let units = 0..model.config().num_hidden_layers.saturating_add(3);
    let hashed = HashedUnits::of_user(model);
    let root = |unit: usize| {
        let root = model.unit_root(unit).or_else(|| hashed.as_ref()?.root(unit))?;
        Some(UnitRoot { unit: u32::try_from(unit).ok()?, root: Fingerprint(root) })
    };
    units.filter_map(root).take(ROOTS_MAX).collect()
}

/// Which units a node may take from which other: those that it lacks, that the coordinator cannot give it, and on whose
/// digest everybody who has one agrees. `who` numbers the nodes, the coordinator first; so are `held` and the answer.
pub(crate) fn sources(needs: &[u32], who: usize, held: &[Option<Held>]) -> Vec<(usize, Vec<UnitRoot>)> {
    let roots = |node: usize| held.get(node).and_then(Option::as_ref).map_or(&[][..], |held| &held.roots[..]);
    let of = |node: usize, unit: u32| roots(node).iter().find(|root| root.unit == unit).map(|root| root.root);
    let mut from: Vec<(usize, Vec<UnitRoot>)> = Vec::new();
    for &unit in needs.iter().filter(|&&unit| of(who, unit).is_none()) {
        let known: Vec<(usize, Fingerprint)> =
            (0..held.len()).filter_map(|node| Some((node, of(node, unit)?))).collect();
        let Some((first, root)) = known.first().copied() else { continue };
        // What the coordinator has it gives itself. Where two say different things, one of them is damaged.
        if first == 0 || known.iter().any(|(_, other)| *other != root) {
            continue;
        }
        // The one that gives least so far.
        let given = |node: usize| from.iter().find(|(of, _)| *of == node).map_or(0, |(_, units)| units.len());
        let Some(node) = known.iter().map(|(node, _)| *node).min_by_key(|&node| (given(node), node)) else {
            continue;
        };
        match from.iter_mut().find(|(of, _)| *of == node) {
            Some((_, units)) => units.push(UnitRoot { unit, root }),
            None => from.push((node, vec![UnitRoot { unit, root }])),
        }
    }
    from.truncate(SOURCES_MAX);
    from
}

/// What this node has.
pub(crate) fn own(model: &Checkpoint) -> Held {
    held(model)
}

/// A worker's answer: what it has of a model that the machine `from` asks about.
/// Whole files that another tool fetched are read for that, now as far as time allows, and then until `stopped` closes.
pub(crate) fn answer(own: Option<&PathBuf>, id: &ModelId, from: [u8; 32], stopped: &Receiver<()>) -> Held {
    let Some(model) = find(own, id, from) else { return Held::default() };
    let until = Instant::now() + HASHING;
    if let Some(mut hashed) = HashedUnits::of_user(&model)
        && !hashed.hash_more(&model, &mut || Instant::now() < until)
    {
        let held = held(&model);
        hash_rest(model, hashed, stopped.clone());
        return held;
    }
    held(&model)
}

/// One model at a time.
static HASHING_NOW: AtomicBool = AtomicBool::new(false);

/// Reads the rest of whole files between steps, so that more can be said the next time.
fn hash_rest(model: Checkpoint, mut hashed: HashedUnits, stopped: Receiver<()>) {
    if HASHING_NOW.swap(true, Ordering::SeqCst) {
        return;
    }
    /// Lets the next one be read, also after a panic.
    struct Done;
    impl Drop for Done {
        fn drop(&mut self) {
            HASHING_NOW.store(false, Ordering::SeqCst);
        }
    }
    let done = Done;
    let spawned = spawn("hash", move || {
        let _done = done;
        let mut go_on = || {
            TRAFFIC.turn();
            !matches!(stopped.try_recv(), Err(TryRecvError::Disconnected))
        };
        hashed.hash_more(&model, &mut go_on);
    });
    if let Err(error) = spawned {
        tracing::warn!("whole files are not hashed: {}", error.chain());
    }
}

/// A model that the machine `from` asks about, if it is on this computer whole or in part. Asks nobody.
pub(crate) fn find(own: Option<&PathBuf>, id: &ModelId, from: [u8; 32]) -> Option<Checkpoint> {
    let wanted = WantedModel { named: &id.name, fingerprint: &id.fingerprint.0, origin: id.origin.as_ref() };
    // Whoever asks waits for more than this: a published model is looked for where it belongs.
    if let Ok(Some(found)) = whole_here(own, &wanted, id.origin.is_none()) {
        return Some(found);
    }
    if own.is_some() {
        return None;
    }
    let origin = id.origin.as_ref().map(stage_setup::known_origin);
    Store::of_user().held(origin.as_ref(), id.fingerprint.0, from)
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

/// What a node lacks that did not say: all of it, where the coordinator has to fetch as well; else it is taken to have
/// the files, too.
pub(crate) fn assumed_missing(model: &Checkpoint) -> Missing {
    if model.is_partial() { missing(model, &Held::default()) } else { Missing::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(roots: &[(u32, u8)]) -> Option<Held> {
        let root = |&(unit, byte): &(u32, u8)| UnitRoot { unit, root: Fingerprint([byte; 32]) };
        Some(Held { roots: roots.iter().map(root).collect(), ..Held::default() })
    }

    fn taken(needs: &[u32], who: usize, held: &[Option<Held>]) -> Vec<(usize, Vec<u32>)> {
        let plain =
            |(node, units): (usize, Vec<UnitRoot>)| (node, units.iter().map(|unit| unit.unit).collect());
        sources(needs, who, held).into_iter().map(plain).collect()
    }

    #[test]
    fn units_come_from_those_who_have_them_and_agree() {
        let held = [has(&[(0, 1)]), has(&[(1, 1), (2, 2), (3, 3)]), None, has(&[(2, 2), (3, 9), (4, 4)])];
        // 0 is the coordinator's to give, 1 to 3 are here, 5 nobody has.
        assert_eq!(taken(&[0, 1, 2, 3, 4, 5], 1, &held), [(3, vec![4])]);
        // Two say different things of 3.
        assert_eq!(taken(&[0, 3, 5], 2, &held), []);
        assert_eq!(taken(&[1, 2, 4], 2, &held), [(1, vec![1]), (3, vec![2, 4])]);
        // The coordinator itself takes what it lacks.
        assert_eq!(taken(&[0, 1], 0, &held), [(1, vec![1])]);
        assert_eq!(taken(&[0], 2, &[]), []);
    }
}
