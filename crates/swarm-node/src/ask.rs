//! Asking another node for bytes of a model, over a link of its own.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use swarm_link::{Connection, Identity, LinkSettings, Receiver, Sender, dial};
use swarm_weights::{
    Attached, Brought, Catalogue, Checkpoint, SharedFile, Store, Supplier, SupplyAsk, Take, Unit,
};
use swarm_wire::{
    Answer, Ask, BULK_BYTES_MAX, CONTROL_BYTES_MAX, CloseCode, Control, DecodeError, ModelId, NextHop,
    NodeId, PIECE_BYTES_MAX, PieceRange, Supply, UnitRoot, WeightSource,
};

use crate::control;
use crate::deadlines::{SUPPLY_DIAL, SUPPLY_SILENT, SUPPLY_THROUGH};
use crate::error::NodeError;
use crate::holdings;

/// Asks that are under way at a time: the next is there when the one before it is answered.
const WINDOW: usize = 2;

/// Why a node that was asked for bytes brings no more.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("it is gone")]
    Gone,
    #[error(transparent)]
    Link(#[from] swarm_link::LinkError),
    #[error("it sent what is no answer")]
    Malformed(#[from] DecodeError),
    #[error("it answered something else than what was asked")]
    Other,
    #[error("{0} is not among its files")]
    NoFile(String),
}

/// A node at the other end of a link that began with its [`Supply`].
pub(crate) struct LinkSupplier {
    name: String,
    files: Vec<String>,
    /// Gone after the first thing that went wrong: what follows on the link could be taken for something else.
    link: Mutex<Option<Talk>>,
}

struct Talk {
    sender: Sender,
    receiver: Receiver,
    message: Vec<u8>,
    piece: Vec<u8>,
}

impl LinkSupplier {
    /// Takes over a link. `name` is safe to print.
    pub fn new(name: String, supply: &Supply, link: Connection) -> Self {
        let Connection { mut sender, mut receiver, .. } = link;
        sender.set_message_bytes_max(BULK_BYTES_MAX);
        receiver.set_message_bytes_max(BULK_BYTES_MAX);
        let files = supply.files.iter().map(|file| file.name.clone()).collect();
        let talk = Talk { sender, receiver, message: Vec::new(), piece: Vec::new() };
        Self { name, files, link: Mutex::new(Some(talk)) }
    }

    /// False after something went wrong, or was ended in the middle: no more is to be had of this link.
    pub fn is_open(&self) -> bool {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn ask(&self, ask: &SupplyAsk, through: bool) -> Result<Vec<u8>, AskError> {
        let file = self.files.iter().position(|name| *name == ask.file);
        let file = file.and_then(|index| u16::try_from(index).ok());
        let piece = |range: &std::ops::Range<u64>| PieceRange {
            offset: range.start,
            bytes: u32::try_from(range.end.saturating_sub(range.start)).unwrap_or(u32::MAX),
        };
        let mut out = Vec::new();
        let file = file.ok_or_else(|| AskError::NoFile(ask.file.clone()))?;
        Ask { file, through, pieces: ask.pieces.iter().map(piece).collect() }.encode(&mut out)?;
        Ok(out)
    }
}

impl Supplier for LinkSupplier {
    fn name(&self) -> &str {
        &self.name
    }

    fn bring(
        &self,
        asks: &[SupplyAsk],
        through: bool,
        take: &mut Take<'_>,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let messages = asks.iter().map(|ask| self.ask(ask, through)).collect::<Result<Vec<_>, _>>()?;
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        // Not put back after an error, or an end in the middle.
        let mut talk = link.take().ok_or(AskError::Gone)?;
        let silent = if through { SUPPLY_THROUGH } else { SUPPLY_SILENT };
        talk.receiver.set_idle_timeout(Some(silent)).map_err(AskError::from)?;
        if talk.bring(asks, &messages, take)? {
            *link = Some(talk);
        }
        Ok(())
    }
}

impl Talk {
    /// False when `take` ended it before all was answered.
    fn bring(
        &mut self,
        asks: &[SupplyAsk],
        messages: &[Vec<u8>],
        take: &mut Take<'_>,
    ) -> Result<bool, AskError> {
        let mut waiting = messages.iter();
        for message in waiting.by_ref().take(WINDOW - 1) {
            self.sender.send(&[message])?;
        }
        for (number, ask) in asks.iter().enumerate() {
            if let Some(message) = waiting.next() {
                self.sender.send(&[message])?;
            }
            for range in &ask.pieces {
                if !self.piece(number, range, take)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Reads the answer for one piece.
    fn piece(
        &mut self,
        ask: usize,
        wanted: &std::ops::Range<u64>,
        take: &mut Take<'_>,
    ) -> Result<bool, AskError> {
        let is_it = |range: &PieceRange| (range.offset, range.end()) == (wanted.start, wanted.end);
        let digest = loop {
            self.receiver.receive(&mut self.message)?;
            match Answer::decode(&self.message)? {
                Answer::Wait => {
                    if !take(Brought::Nothing) {
                        return Ok(false);
                    }
                }
                Answer::Absent { range } if is_it(&range) => return Ok(true),
                Answer::Piece { range, digest, bytes } if is_it(&range) => {
                    if bytes.len() as u64 == u64::from(range.bytes) {
                        return Ok(take(Brought::Piece { ask, range: wanted.clone(), digest, bytes }));
                    }
                    self.piece.clear();
                    self.piece.extend_from_slice(bytes);
                    break digest;
                }
                _ => return Err(AskError::Other),
            }
        };
        let len = usize::try_from(wanted.end.saturating_sub(wanted.start)).unwrap_or(usize::MAX);
        while self.piece.len() < len {
            self.receiver.receive(&mut self.message)?;
            match Answer::decode(&self.message)? {
                // Held against what is missing before it is kept.
                Answer::Bytes(bytes) if bytes.len() <= len - self.piece.len() => {
                    self.piece.extend_from_slice(bytes)
                }
                _ => return Err(AskError::Other),
            }
        }
        Ok(take(Brought::Piece { ask, range: wanted.clone(), digest, bytes: &self.piece }))
    }
}

/// A member of the room that has units which a stage needs; dialled when it is first asked.
pub(crate) struct SourceNode {
    name: String,
    identity: Identity,
    node: NextHop,
    model: ModelId,
    units: Vec<Unit>,
    /// Nothing before it is dialled, and after that failed.
    link: Mutex<Option<Result<LinkSupplier, ()>>>,
}

impl SourceNode {
    /// Of a source that the coordinator named; `None` when nothing can be taken of it.
    pub fn new(identity: &Identity, model: &Checkpoint, id: &ModelId, source: &WeightSource) -> Option<Self> {
        let unit = |root: &UnitRoot| model.unit(root.unit as usize, root.root.0);
        let units: Vec<Unit> = source.units.iter().filter_map(unit).collect();
        let (identity, node, model) = (identity.clone(), source.node.clone(), id.clone());
        let name = format!("node {}", node.node_id.short());
        (!units.is_empty()).then(|| Self { name, identity, node, model, units, link: Mutex::new(None) })
    }
}

impl Supplier for SourceNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn units(&self) -> Option<&[Unit]> {
        Some(&self.units)
    }

    fn bring(
        &self,
        asks: &[SupplyAsk],
        through: bool,
        take: &mut Take<'_>,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failed = None;
        let dialled = link.get_or_insert_with(|| {
            let answer =
                dial_source(&self.identity, &self.node.addresses, Some(self.node.node_id), &self.model);
            answer.map(|(_, supplier)| supplier).map_err(|error| failed = Some(error.chain()))
        });
        match (dialled, failed) {
            (Ok(supplier), _) => supplier.bring(asks, through, take),
            (Err(()), Some(why)) => Err(why.into()),
            (Err(()), None) => Err(AskError::Gone.into()),
        }
    }
}

/// Dials a worker and asks it for a model. `node` is who it must be.
pub(crate) fn dial_source(
    identity: &Identity,
    addresses: &[SocketAddr],
    node: Option<NodeId>,
    model: &ModelId,
) -> Result<(Supply, LinkSupplier), NodeError> {
    let mut link = dial(addresses, identity, &LinkSettings::default(), SUPPLY_DIAL)?;
    let name = link.peer.address.to_string();
    if node.is_some_and(|node| node != control::wire_id(link.peer.node)) {
        let what = "it is another one than was named".to_owned();
        return Err(NodeError::BadPeer { node: name, what, code: CloseCode::Unexpected });
    }
    let mut message = Vec::new();
    let malformed = |error: swarm_wire::ControlError| NodeError::BadPeer {
        node: name.clone(),
        what: crate::error::chain(&error),
        code: CloseCode::Malformed,
    };
    Control::Fetch(model.clone()).encode(&mut message).map_err(malformed)?;
    link.sender.send(&[&message])?;
    let (supply, supplier) = begin(link)?;
    if supply.fingerprint == model.fingerprint || same_origin(&supply, model) {
        return Ok((supply, supplier));
    }
    let what = "it answered with another model".to_owned();
    Err(NodeError::BadPeer { node: name, what, code: CloseCode::Unexpected })
}

/// Hears what the other side has.
fn begin(mut link: Connection) -> Result<(Supply, LinkSupplier), NodeError> {
    let name = link.peer.address.to_string();
    let mut message = Vec::new();
    link.receiver.set_message_bytes_max(CONTROL_BYTES_MAX);
    link.receiver.set_idle_timeout(Some(SUPPLY_SILENT))?;
    link.receiver.receive(&mut message)?;
    match Control::decode(&message) {
        Ok(Control::Supply(supply)) => {
            let supplier = LinkSupplier::new(name, &supply, link);
            Ok((*supply, supplier))
        }
        Ok(Control::Refused(refused)) => {
            let reason = crate::error::printable(&refused.reason);
            Err(NodeError::Refused { node: name, blame: refused.blame, reason })
        }
        Ok(_) => {
            let what = "it did not say what it has".to_owned();
            Err(NodeError::BadPeer { node: name, what, code: CloseCode::Unexpected })
        }
        Err(error) => {
            let what = crate::error::chain(&error);
            Err(NodeError::BadPeer { node: name, what, code: CloseCode::Malformed })
        }
    }
}

/// The other end of [`crate::serve_model`]: the model as it is described there, and the way to ask for its bytes.
///
/// # Errors
/// [`NodeError`] when the link breaks, or something else comes.
pub fn take_model(link: Connection) -> Result<(Catalogue, Arc<dyn Supplier>), NodeError> {
    let from = link.peer.static_key;
    let (supply, supplier) = begin(link)?;
    Ok((catalogue(&supply, from), Arc::new(supplier)))
}

/// The same bytes by their repository and commit, however each side made its digest.
fn same_origin(supply: &Supply, model: &ModelId) -> bool {
    let place =
        |origin: &swarm_wire::Origin| (origin.repository.clone(), origin.commit.clone(), origin.file.clone());
    supply.origin.as_ref().is_some_and(|origin| Some(place(origin)) == model.origin.as_ref().map(place))
}

/// Asks the worker at `addresses` for bytes of `model` before the Hub, as long as the answer lives. Its word on digests is
/// believed. `None` when it has the model in the cache of this computer.
///
/// # Errors
/// [`NodeError`] when it cannot be reached, or does not have the model.
pub fn ask_worker(
    identity: &Identity,
    addresses: &[SocketAddr],
    name: &str,
    model: &Checkpoint,
) -> Result<Option<Attached>, NodeError> {
    let id = holdings::model_id(name, model)?;
    let (supply, supplier) = dial_source(identity, addresses, None, &id)?;
    let number = Store::of_user().number().ok();
    let shares_cache = supply.cache.is_some_and(|cache| number == Some(cache.0));
    Ok(if shares_cache { None } else { model.attach(Arc::new(supplier)) })
}

/// The model that a supply describes, as the store takes it. `from` is the machine that says so.
pub(crate) fn catalogue(supply: &Supply, from: [u8; 32]) -> Catalogue {
    let origin = supply.origin.as_ref().map(crate::stage_setup::known_origin);
    let file = |file: &swarm_wire::SuppliedFile| SharedFile {
        name: file.name.clone(),
        bytes: file.bytes,
        tag: file.tag.clone(),
        small: file.small,
    };
    Catalogue {
        name: crate::error::printable(&supply.name),
        origin,
        fingerprint: supply.fingerprint.0,
        from,
        files: supply.files.iter().map(file).collect(),
    }
}

/// Pieces are cut alike everywhere.
const _: () = assert!(swarm_weights::PIECE_BYTES == PIECE_BYTES_MAX as u64);
