//! Which models the nodes of the room have.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use swarm_link::Connection;
use swarm_weights::{Checkpoint, Store, cache};
use swarm_wire::{CloseCode, Control, LISTED_MAX, LayerRange, Listed, ListedModel, RANGES_MAX};

use crate::deadlines::{LISTED, LISTING};
use crate::error::{NodeError, chain, printable};
use crate::neighbours::{Around, Asked, Patience, address_text, ask_around, first_answer};

/// What the room has.
#[derive(Clone, Debug, Default)]
pub struct RoomModels {
    /// Those who answered, by name.
    pub nodes: Vec<NodeModels>,
    /// Those who did not, by name or address, and why where that is known. Safe to print.
    pub silent: Vec<(String, Option<String>)>,
}

/// One node.
#[derive(Clone, Debug)]
pub struct NodeModels {
    /// What its owner calls it. Safe to print.
    pub name: String,
    /// Where it answered.
    pub address: SocketAddr,
    /// What it has; strangers' texts.
    pub models: Vec<ListedModel>,
    /// Models that it did not name.
    pub left_out: u32,
}

/// How long [`list_room`] takes at most.
pub fn listing_within() -> Duration {
    LISTED
}

/// Asks everybody around what is on their disks. Machines of this swarm of which nothing is heard are named.
pub fn list_room(around: &Around<'_>) -> RoomModels {
    let known = around.identity.peers();
    let all_heard = |asked: &[Asked<Listed>]| {
        let heard: BTreeSet<_> = asked.iter().filter_map(|asked| Some(asked.peer?.static_key)).collect();
        known.iter().all(|peer| heard.contains(&peer.key))
    };
    let patience =
        |asked: &[Asked<Listed>]| if all_heard(asked) { Patience::Pending } else { Patience::More };
    let asked = ask_around(around, ask, patience);
    let mut room = RoomModels::default();
    let mut accounted = BTreeSet::new();
    for Asked { addresses, peer, answer, .. } in asked {
        let named = peer.and_then(|peer| known.iter().find(|known| known.key == peer.static_key));
        accounted.extend(named.map(|named| named.key));
        let Some(address) = peer.map(|peer| peer.address).or(addresses.first().copied()) else { continue };
        match answer {
            Ok(Listed { name, models, left_out }) => {
                room.nodes.push(NodeModels { name: printable(&name), address, models, left_out });
            }
            Err(error) => {
                let name = named.map_or_else(|| address_text(&addresses), |named| printable(&named.name));
                room.silent.push((name, Some(error.chain())));
            }
        }
    }
    let absent = known.iter().filter(|peer| !accounted.contains(&peer.key));
    room.silent.extend(absent.map(|peer| (printable(&peer.name), None)));
    room.nodes.sort_by(|a, b| (&a.name, a.address).cmp(&(&b.name, b.address)));
    room.silent.sort();
    room
}

fn ask(mut link: Connection) -> Result<Listed, NodeError> {
    match first_answer(&mut link, &Control::List, LISTED)? {
        Control::Listed(listed) => Ok(*listed),
        _ => Err(NodeError::BadPeer {
            node: link.peer.address.to_string(),
            what: "it did not say which models it has".into(),
            code: CloseCode::Unexpected,
        }),
    }
}

/// A worker's answer: what is on its disk, of that what it may serve. `own` is the one model that it was started for.
pub(crate) fn serve_list(mut link: Connection, own: Option<&PathBuf>, name: &str) {
    let (models, unread) = models(own, link.peer.static_key);
    let mut listed = Listed::fitting(name, models);
    listed.left_out = listed.left_out.saturating_add(unread);
    let mut out = Vec::new();
    if let Err(error) = Control::Listed(Box::new(listed)).encode(&mut out) {
        tracing::warn!("models are not listed: {}", chain(&error));
        return;
    }
    // Whoever does not hear it has gone.
    let _ = link.sender.send(&[&out]);
}

/// The models here, and how many were not looked at: to open one takes time, and whoever asks does not wait for ever.
fn models(own: Option<&PathBuf>, from: [u8; 32]) -> (Vec<ListedModel>, u32) {
    let until = Instant::now() + LISTING;
    let mut listed = Vec::<ListedModel>::new();
    let mut unread = 0_u32;
    let mut add = |opened: &mut dyn FnMut() -> Vec<Checkpoint>| {
        if listed.len() >= LISTED_MAX || Instant::now() >= until {
            unread = unread.saturating_add(1);
            return;
        }
        for model in opened() {
            let Some(model) = entry(&model) else {
                unread = unread.saturating_add(1);
                continue;
            };
            // A whole file of the Hugging Face cache may be linked to from the store.
            let id = |model: &ListedModel| (model.name.clone(), model.commit.clone(), model.file.clone());
            if model.commit.is_none() || !listed.iter().any(|known| id(known) == id(&model)) {
                listed.push(model);
            }
        }
    };
    let open = |path: &Path| Checkpoint::open(path).into_iter().collect();
    if let Some(path) = own {
        add(&mut || open(path));
        return (listed, unread);
    }
    cache::list().iter().for_each(|model| add(&mut || open(&model.path)));
    let store = Store::of_user();
    // What another machine handed over is its own business.
    for fetched in store.entries().iter().filter(|fetched| store.may_name(fetched, from)) {
        add(&mut || store.models(fetched));
    }
    (listed, unread)
}

fn entry(model: &Checkpoint) -> Option<ListedModel> {
    let layers = model.config().layers();
    let missing = model.missing_bytes(layers.clone());
    let origin = model.origin();
    let held = model.held_layers().into_iter().filter_map(|range| LayerRange::try_from(range).ok());
    Some(ListedModel {
        name: origin.map_or(model.name(), |origin| &origin.id).to_owned(),
        commit: origin.map(|origin| origin.commit.clone()),
        file: origin.and_then(|origin| origin.file.clone()),
        format: model.format().name().to_owned(),
        layers_total: u32::try_from(layers.end).ok()?,
        layers: held.take(RANGES_MAX).collect(),
        bytes: model.weight_bytes(),
        bytes_held: model.weight_bytes().saturating_sub(missing),
    })
}
