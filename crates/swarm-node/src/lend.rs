//! A model that a coordinator knows by its name alone, from another node of the room: where the Hub cannot be reached, a
//! worker that has it, or can fetch it, says which version it is and hands over its small files; bytes follow when they
//! are read.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::Instant;

use swarm_link::{Connection, Identity, LinkSettings, dial};
use swarm_weights::cache::{self, ResolveError};
use swarm_weights::{Adopted, Checkpoint, ModelRef, Needs, Store, Supplier, SupplyAsk, Take, TokenizerFiles};
use swarm_wire::{Blame, CloseCode, Control, Epoch, Refused, Supply};

use crate::ask::{LinkSupplier, catalogue};
use crate::deadlines::{RESOLVED, SETTLE, SUPPLY_ASK, SUPPLY_DIAL};
use crate::error::{NodeError, chain, printable};
use crate::give::{Fetches, begin, serve_asks, supply_of};
use crate::neighbours::{Around, Asked, Patience, address_text, ask_around, first_answer};
use crate::pairing::Addresses;
use crate::stage_setup::known_origin;

/// Dials of a lender that may fail before it is done without.
const FAILED_MAX: u32 = 3;

/// Where a model is that a coordinator was told to use.
pub struct FoundModel {
    /// What [`Checkpoint::open`] takes.
    pub path: PathBuf,
    /// Who supplies what is not here, where the Hub does not.
    pub lender: Option<Lender>,
}

/// A node that a model is from. Its bytes are to be had as long as a clone of this lives.
#[derive(Clone)]
pub struct Lender(Arc<Lent>);

struct Lent {
    name: String,
    adopted: Adopted,
}

impl Lender {
    /// What [`Checkpoint::open`] takes.
    pub fn path(&self) -> &Path {
        &self.0.adopted.path
    }

    /// Where the node is. Safe to print.
    pub fn name(&self) -> &str {
        &self.0.name
    }
}

impl fmt::Debug for Lender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lender").field(&self.0.name).finish()
    }
}

/// Where a model name leads on this computer, at the Hub, and where that cannot be reached, in the room `around`. `tell`
/// is told before the room is asked.
///
/// # Errors
/// [`NodeError::Resolve`], and [`NodeError::NotLent`] with who was asked and what was said.
pub fn find_model(
    name: &str,
    around: Option<&Around<'_>>,
    tell: &dyn Fn(&str),
) -> Result<FoundModel, NodeError> {
    let Some(around) = around else { return Ok(FoundModel { path: cache::resolve(name)?, lender: None }) };
    let found = cache::resolve_or_ask(name);
    let wanted = match &found {
        Ok(path) if Store::of_user().is_lost() && !is_whole(path) => {
            cache::pinned_name(path).and_then(|name| ModelRef::parse(&name))
        }
        Err(ResolveError::Hub { source, .. }) if source.is_unreachable() => cache::repository(name),
        _ => None,
    };
    let Some(wanted) = wanted else { return Ok(FoundModel { path: found?, lender: None }) };
    tell(&format!("the Hub cannot be asked for {wanted}, so the nodes of the room are"));
    match (borrow(&wanted, around), found) {
        (Ok(lender), _) => Ok(FoundModel { path: lender.path().to_owned(), lender: Some(lender) }),
        // What is here may do, with the layers that workers have.
        (Err(_), Ok(path)) => Ok(FoundModel { path, lender: None }),
        (Err(asked), Err(source)) => {
            let (model, NotAny { asked, showing }) = (wanted.to_string(), asked);
            Err(NodeError::NotLent { model, asked, showing, source: Box::new(source) })
        }
    }
}

/// Nothing of a model can be missing.
fn is_whole(path: &Path) -> bool {
    let lacks = |model: Checkpoint| model.missing_bytes(model.config().layers()) > 0;
    cache::pinned_name(path).is_none() || Checkpoint::open(path).is_ok_and(|model| !lacks(model))
}

/// What is to be said where no node lends the model.
#[derive(Default)]
struct NotAny {
    /// Who was asked, and what each said.
    asked: Vec<String>,
    showing: Vec<Addresses>,
}

/// What a node said that has the model.
type Offer = (Supply, Connection);

/// Finds a node that has a model and takes its small files. The error is what those who were asked said.
fn borrow(wanted: &ModelRef, around: &Around<'_>) -> Result<Lender, NotAny> {
    let around = Around { answers_within: RESOLVED, ..around.clone() };
    let name = wanted.to_string();
    let ask = move |link: Connection| offer(link, &name);
    // Who shows a code may be the one that is meant.
    let counts = |asked: &Asked<Offer>| matches!(asked.answer, Ok(_) | Err(NodeError::Unpaired { .. }));
    let settle = |asked: &[Asked<Offer>]| match asked.iter().any(counts) {
        true => Patience::Little(SETTLE),
        false => Patience::More,
    };
    let (mut said, mut showing, mut offers) = (Vec::new(), Vec::new(), Vec::new());
    let mut absent = around.identity.peers();
    let own_cache = Store::of_user().number().ok();
    for Asked { addresses, peer, answer, .. } in ask_around(&around, ask, settle) {
        let key = peer.map(|peer| peer.static_key);
        let name = absent.iter().find(|known| Some(known.key) == key).map(|known| printable(&known.name));
        let address = address_text(&addresses);
        let node = name.map_or_else(|| address.clone(), |name| format!("{name} ({address})"));
        absent.retain(|known| Some(known.key) != key);
        match answer {
            // Two that write into one cache would wait for each other.
            Ok((Supply { cache: Some(cache), .. }, _)) if own_cache == Some(cache.0) => {
                said.push(format!("{node}: it has the same cache as this node"));
            }
            Ok((supply, link)) if is_it(wanted, &supply) => offers.push((node, supply, link)),
            Ok(_) => said.push(format!("{node}: it answered with another model")),
            Err(NodeError::Unpaired { .. }) => {
                said.push(format!("{node}: it is not paired with this computer and shows a code for --join"));
                showing.push(addresses);
            }
            // Of no stage, as the usual words for a refusal would have it.
            Err(NodeError::Refused { reason, .. }) => said.push(format!("{node}: {reason}")),
            Err(error) => said.push(format!("{node}: {}", error.chain())),
        }
    }
    // Whoever answers first must not decide which one it is.
    offers.sort_by(|a, b| a.0.cmp(&b.0));
    if let Some(versions) = several(&offers) {
        return Err(NotAny { asked: vec![versions], showing: Vec::new() });
    }
    said.extend(absent.iter().map(|known| format!("{}: no answer", printable(&known.name))));
    for (node, supply, link) in offers {
        match adopt(wanted, &node, &supply, link, around.identity) {
            Ok(lender) => return Ok(lender),
            Err(error) => said.push(format!("{node}: {}", error.chain())),
        }
    }
    Err(NotAny { asked: said, showing })
}

fn offer(mut link: Connection, name: &str) -> Result<Offer, NodeError> {
    match first_answer(&mut link, &Control::Resolve { model: name.to_owned() }, RESOLVED)? {
        Control::Supply(supply) => Ok((*supply, link)),
        _ => Err(NodeError::BadPeer {
            node: link.peer.address.to_string(),
            what: "it did not say what it has".to_owned(),
            code: CloseCode::Unexpected,
        }),
    }
}

fn is_it(wanted: &ModelRef, supply: &Supply) -> bool {
    supply.origin.as_ref().is_some_and(|origin| wanted.may_be(&known_origin(origin)))
}

/// What to say when nodes do not mean the same: which of them is right, only a person or the Hub can say.
fn several(offers: &[(String, Supply, Connection)]) -> Option<String> {
    let (_, first, _) = offers.first()?;
    if offers.iter().all(|(_, supply, _)| supply.origin == first.origin) {
        return None;
    }
    let version = |(node, supply, _): &(String, Supply, Connection)| {
        let origin = supply.origin.as_ref()?;
        let file = origin.file.as_ref().map_or_else(String::new, |file| format!(":{}", printable(file)));
        Some(format!("{}@{}{file} at {node}", printable(&origin.repository), printable(&origin.commit)))
    };
    let versions: Vec<String> = offers.iter().filter_map(version).collect();
    Some(format!("nodes have several versions; name one of {}", versions.join(", ")))
}

/// Takes over the small files of what a node offers. What it says of configuration and tensors must hash to what it says of
/// the model.
fn adopt(
    wanted: &ModelRef,
    node: &str,
    supply: &Supply,
    link: Connection,
    identity: &Identity,
) -> Result<Lender, NodeError> {
    let peer = link.peer;
    let origin = supply.origin.as_ref().map(known_origin);
    let file = origin.as_ref().and_then(|origin| origin.file.clone());
    let commit = origin.as_ref().map(|origin| origin.commit.clone()).unwrap_or_default();
    let pinned = ModelRef { id: wanted.id.clone(), revision: Some(commit.clone()), pick: file };
    let lending = Arc::new(LendingNode {
        name: node.to_owned(),
        identity: identity.clone(),
        addresses: vec![peer.address],
        node: peer.node,
        model: pinned.to_string(),
        link: Mutex::new(Some((LinkSupplier::new(node.to_owned(), supply, link), Instant::now()))),
        failed: AtomicU32::new(0),
    });
    let failed = |source| NodeError::Fetch { layers: 0..0, source: Box::new(source) };
    let store = Store::of_user();
    let adopted = store.adopt(&catalogue(supply, peer.static_key), lending).map_err(failed)?;
    let model = Checkpoint::open(&adopted.path)?;
    let said = supply.origin.as_ref().map(|origin| origin.fingerprint.0);
    if model.origin_fingerprint() != said {
        let what = "its configuration and tensors are not those that its digest is of".to_owned();
        return Err(NodeError::BadPeer { node: node.to_owned(), what, code: CloseCode::Unexpected });
    }
    // Without it the name cannot be found again while the Hub is away.
    if let Err(error) = store.note_commit(wanted, &commit) {
        tracing::warn!("the version of {wanted} is not noted: {}", chain(&error));
    }
    Ok(Lender(Arc::new(Lent { name: node.to_owned(), adopted })))
}

/// A node that lends a model; dialled again when it was not needed for long.
struct LendingNode {
    name: String,
    identity: Identity,
    addresses: Vec<std::net::SocketAddr>,
    node: swarm_link::NodeId,
    /// To the commit.
    model: String,
    /// With the time of its last use: the other end closes a link that is not used.
    link: Mutex<Option<(LinkSupplier, Instant)>>,
    /// Failures in a row, of dials and of what was asked for.
    failed: AtomicU32,
}

impl LendingNode {
    fn dial(&self) -> Result<LinkSupplier, NodeError> {
        let link = dial(&self.addresses, &self.identity, &LinkSettings::default(), SUPPLY_DIAL)?;
        if link.peer.node != self.node {
            let what = "it is another one than before".to_owned();
            return Err(NodeError::BadPeer { node: self.name.clone(), what, code: CloseCode::Unexpected });
        }
        let (supply, link) = offer(link, &self.model)?;
        Ok(LinkSupplier::new(self.name.clone(), &supply, link))
    }

    fn bring_once(
        &self,
        asks: &[SupplyAsk],
        through: bool,
        take: &mut Take<'_>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let mut dialled = match self.link.try_lock() {
            Ok(dialled) => dialled,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Long under way for this node itself; what is passed on to another does not wait for that.
            Err(TryLockError::WouldBlock) => {
                let another = self.dial().map_err(|error| error.chain())?;
                return another.bring(asks, through, take);
            }
        };
        let fresh = |(supplier, used): &(LinkSupplier, Instant)| {
            supplier.is_open() && used.elapsed() < SUPPLY_ASK / 2
        };
        let supplier = match dialled.take().filter(fresh) {
            Some((supplier, _)) => supplier,
            None => self.dial().map_err(|error| error.chain())?,
        };
        supplier.bring(asks, through, take)?;
        *dialled = Some((supplier, Instant::now()));
        Ok(())
    }
}

impl Supplier for LendingNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn bring(
        &self,
        asks: &[SupplyAsk],
        through: bool,
        take: &mut Take<'_>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if self.failed.load(Ordering::Relaxed) >= FAILED_MAX {
            return Err("it is gone".into());
        }
        let brought = self.bring_once(asks, through, take);
        match &brought {
            Ok(()) => self.failed.store(0, Ordering::Relaxed),
            Err(_) => _ = self.failed.fetch_add(1, Ordering::Relaxed),
        }
        brought
    }
}

/// A worker's answer to a coordinator that cannot ask the Hub: the model as it is here or as the Hub tells it, and then its
/// bytes, which are fetched on the way where they are not here.
pub(crate) fn serve_resolve(mut link: Connection, own: Option<&PathBuf>, name: &str) {
    let address = link.peer.address;
    let model = match published(own, name) {
        Ok(model) => model,
        Err(why) => {
            let mut out = Vec::new();
            if Control::Refused(Refused::new(Blame::Caller, &why)).encode(&mut out).is_ok() {
                // Whoever does not hear it finds the link closed.
                let _ = link.sender.send(&[&out]);
            }
            return;
        }
    };
    let served = || -> Result<(), NodeError> {
        let share = model.share_for(Needs::Everything)?;
        begin(&mut link, &supply_of(&model, &share, Epoch(0))?)?;
        serve_asks(&mut link, &share, Fetches::FromHub)
    };
    if let Err(error) = { served }() {
        tracing::debug!("{address} is lent no more of {}: {}", printable(name), error.chain());
    }
}

/// A published model by its name, with its tokenizer. A peer's name is never taken for a path.
fn published(own: Option<&PathBuf>, name: &str) -> Result<Checkpoint, String> {
    let wanted = ModelRef::parse(name).ok_or("that is no name of a repository")?;
    let is_it = |model: &Checkpoint| model.origin().is_some_and(|origin| wanted.may_be(origin));
    let open = |path: &Path| Checkpoint::open(path).map_err(|error| chain(&error));
    let here = if Path::new(name).exists() { None } else { cache::resolve_here(name).ok() };
    let model = match (own, here.and_then(|path| open(&path).ok()).filter(|model| is_it(model))) {
        (Some(path), _) => {
            Some(open(path)?).filter(is_it).ok_or("this worker was started for another model")?
        }
        (None, Some(here)) => here,
        (None, None) => {
            let path = Store::of_user().look_up(&wanted, Needs::Everything, true);
            open(&path.map_err(|error| chain(&error))?)?
        }
    };
    match model.tokenizer() {
        TokenizerFiles::Missing { why } => Err(format!("its tokenizer is not here: {why}")),
        _ => Ok(model),
    }
}
