//! Serving bytes of a model to another node: its asks are answered from the files that are here.
//!
//! Such a link is one of its own, marked as less urgent than the ring's. While steps are computed here little is sent at a
//! time, and only between two of them.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use swarm_link::{Closer, Connection, Identity, LinkError, LinkSettings, dial};
use swarm_weights::{Checkpoint, Found, Share};
use swarm_wire::{
    Answer, Ask, BULK_BYTES_MAX, Blame, CONTROL_BYTES_MAX, Control, Epoch, Fingerprint, ModelId, NextHop,
    PieceRange, Refused, SuppliedFile, Supply,
};

use crate::control;
use crate::deadlines::{SUPPLY_ASK, SUPPLY_DIAL, SUPPLY_WORD};
use crate::error::{NodeError, chain};
use crate::holdings;
use crate::room::Want;
use crate::stage_setup;
use crate::traffic::{TRAFFIC, Turn};
use crate::worker::spawn;

/// Bytes that are sent in one go while steps are computed here: 0.3 ms at 100 Mbit/s. With four times as many, here and
/// in the next line, a token's p99 beside a transfer was 29 % longer, and with these 3 %; the transfer was 10 % faster.
const GENTLE_BYTES: usize = 4 << 10;
/// Bytes that may be on their way then (the system allows twice as many), and else.
const GENTLE_IN_FLIGHT_BYTES: usize = 4 << 10;
const FREE_IN_FLIGHT_BYTES: usize = 2 << 20;

/// What a connection for bytes begins with.
pub(crate) fn supply_of(model: &Checkpoint, share: &Share, epoch: Epoch) -> Result<Supply, NodeError> {
    let file = |file: &swarm_weights::SharedFile| SuppliedFile {
        name: file.name.clone(),
        bytes: file.bytes,
        tag: file.tag.clone(),
        small: file.small,
    };
    // Nodes with the same cache wait for its lock, and not for each other.
    let cache = if model.is_partial() { swarm_weights::Store::of_user().number().ok() } else { None };
    Ok(Supply {
        epoch,
        fingerprint: Fingerprint(model.fingerprint()?),
        name: model.name().chars().take(swarm_wire::MODEL_CHARS_MAX).collect(),
        origin: stage_setup::origin(model),
        cache: cache.map(Fingerprint),
        files: share.files().iter().map(file).collect(),
    })
}

/// Serves those members that say they want bytes, as long as it lives.
pub(crate) struct Giving {
    closers: Arc<Mutex<Vec<Closer>>>,
    _stop: Sender<()>,
}

/// What the coordinator serves, and to whom.
pub(crate) struct Gift {
    pub identity: Identity,
    pub supply: Supply,
    pub share: Arc<Share>,
    pub members: Vec<NextHop>,
    pub wants: Receiver<Want>,
}

impl Giving {
    /// Waits for members that want bytes on a thread of its own; each has another one.
    pub fn start(gift: Gift) -> Result<Self, NodeError> {
        let (stop, stopped) = bounded::<()>(0);
        let closers = Arc::<Mutex<Vec<Closer>>>::default();
        let (open, gift) = (closers.clone(), Arc::new(gift));
        spawn("giving", move || {
            loop {
                crossbeam_channel::select! {
                    recv(stopped) -> _ => return,
                    recv(gift.wants) -> want => {
                        let Ok((node, epoch)) = want else { return };
                        // One of an earlier placement is not answered any more.
                        let target = gift.members.iter().find(|member| member.node_id == node);
                        let Some(target) = target.filter(|_| epoch == gift.supply.epoch) else { continue };
                        let (gift, target, open) = (gift.clone(), target.clone(), open.clone());
                        let spawned = spawn("give", move || {
                            if let Err(error) = give_to(&gift, &target, &open) {
                                tracing::debug!("{} is served no more bytes: {}", target.node_id.short(), error.chain());
                            }
                        });
                        if let Err(error) = spawned {
                            tracing::warn!("a worker is served no bytes: {}", error.chain());
                        }
                    }
                }
            }
        })?;
        Ok(Self { closers, _stop: stop })
    }
}

impl Drop for Giving {
    fn drop(&mut self) {
        self.closers.lock().unwrap_or_else(PoisonError::into_inner).drain(..).for_each(|link| link.close());
    }
}

fn give_to(gift: &Gift, target: &NextHop, open: &Mutex<Vec<Closer>>) -> Result<(), NodeError> {
    let mut link = dial(&target.addresses, &gift.identity, &LinkSettings::default(), SUPPLY_DIAL)?;
    if control::wire_id(link.peer.node) != target.node_id {
        return Ok(());
    }
    open.lock().unwrap_or_else(PoisonError::into_inner).push(link.closer.clone());
    begin(&mut link, &gift.supply)?;
    // A coordinator fetches for workers that cannot, where it can; a worker only gives what it has.
    serve_asks(&mut link, &gift.share, Fetches::OrAsksItsLender)
}

/// A worker's answer to whoever wants bytes of a model: what it has of it, and then the bytes. Models that it would have
/// to fetch itself are refused.
pub(crate) fn serve_fetch(mut link: Connection, own: Option<&PathBuf>, id: &ModelId) {
    let Some(model) = holdings::find(own, id, link.peer.static_key) else {
        let why = "nothing of this model is on this worker";
        let mut out = Vec::new();
        let refused = Control::Refused(Refused::new(Blame::Caller, why));
        if refused.encode(&mut out).is_ok() {
            // Whoever does not hear it finds the link closed.
            let _ = link.sender.send(&[&out]);
        }
        return;
    };
    let address = link.peer.address;
    if let Err(error) = serve_model(link, &model) {
        tracing::debug!("{address} is served no more bytes: {}", error.chain());
    }
}

/// Serves the bytes of a model on a link until the other side leaves; that side calls [`crate::take_model`].
///
/// # Errors
/// [`NodeError`] when the link breaks, or the model's files cannot be described.
pub fn serve_model(mut link: Connection, model: &Checkpoint) -> Result<(), NodeError> {
    let share = model.share()?;
    begin(&mut link, &supply_of(model, &share, Epoch(0))?)?;
    serve_asks(&mut link, &share, Fetches::No)
}

/// Says what there is.
pub(crate) fn begin(link: &mut Connection, supply: &Supply) -> Result<(), NodeError> {
    let mut first = Vec::new();
    Control::Supply(Box::new(supply.clone())).encode(&mut first).map_err(|error| {
        NodeError::Request(format!("the model cannot be described to others: {}", chain(&error)))
    })?;
    link.sender.set_message_bytes_max(CONTROL_BYTES_MAX);
    link.sender.send(&[&first])?;
    Ok(())
}

/// Answers asks until the other side leaves.
pub(crate) fn serve_asks(link: &mut Connection, share: &Share, fetches: Fetches) -> Result<(), NodeError> {
    link.sender.set_message_bytes_max(BULK_BYTES_MAX);
    link.receiver.set_message_bytes_max(BULK_BYTES_MAX);
    link.receiver.set_idle_timeout(Some(SUPPLY_ASK))?;
    link.sender.set_background();
    let mut giver = Giver {
        sender: &mut link.sender,
        share,
        bytes: Vec::new(),
        out: Vec::new(),
        turn: Turn::Free,
        fetches,
    };
    let mut message = Vec::new();
    loop {
        match link.receiver.receive(&mut message) {
            Err(LinkError::Closed | LinkError::ClosedHere) => return Ok(()),
            other => other?,
        };
        let ask = Ask::decode(&message).map_err(|error| NodeError::BadPeer {
            node: link.peer.address.to_string(),
            code: error.code(),
            what: chain(&error),
        })?;
        giver.answer(&ask)?;
    }
}

struct Giver<'a> {
    sender: &'a mut swarm_link::Sender,
    share: &'a Share,
    bytes: Vec<u8>,
    out: Vec<u8>,
    turn: Turn,
    fetches: Fetches,
}

/// Whether pieces that are not here are fetched for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fetches {
    No,
    /// From the Hub. A lender goes no further: the one that it asked could be the one that asks.
    FromHub,
    /// From the Hub, else from the node that this one has the model from.
    OrAsksItsLender,
}

impl Giver<'_> {
    fn answer(&mut self, ask: &Ask) -> Result<(), LinkError> {
        let file = usize::from(ask.file);
        let mut rest = ask.pieces.as_slice();
        while let Some((piece, after)) = rest.split_first() {
            let range = piece.offset..piece.end();
            match self.found(file, &range)? {
                Some(digest) => {
                    let bytes = std::mem::take(&mut self.bytes);
                    let sent = self.piece(piece, &digest, &bytes);
                    self.bytes = bytes;
                    sent?;
                    rest = after;
                }
                None if ask.through && self.fetches != Fetches::No => rest = self.through(file, rest)?,
                None => {
                    self.say(&Answer::Absent { range: *piece })?;
                    rest = after;
                }
            }
        }
        Ok(())
    }

    /// Reads a piece into `bytes`; waits for it as long as this process fetches it itself, which ends by its own deadlines.
    fn found(&mut self, file: usize, range: &Range<u64>) -> Result<Option<[u8; 32]>, LinkError> {
        let mut word: Option<Instant> = None;
        loop {
            match self.share.piece(file, range, &mut self.bytes) {
                Ok(Some(Found::Here(digest))) => return Ok(Some(digest)),
                Ok(Some(Found::Coming)) => {
                    // Every piece that comes wakes this thread; a word now and then is enough.
                    if word.is_none_or(|last| last.elapsed() >= SUPPLY_WORD) {
                        self.say(&Answer::Wait)?;
                        word = Some(Instant::now());
                    }
                    self.share.wait(file, SUPPLY_WORD);
                }
                Ok(Some(Found::Absent) | None) => return Ok(None),
                Err(error) => {
                    tracing::warn!("a piece cannot be given to another node: {}", chain(&error));
                    return Ok(None);
                }
            }
        }
    }

    /// Fetches the pieces at the beginning of `pieces` that are not here, from the Hub or a lender, and passes them on. What does not
    /// come is absent. Gives what is left of `pieces`.
    fn through<'p>(&mut self, file: usize, pieces: &'p [PieceRange]) -> Result<&'p [PieceRange], LinkError> {
        let is_here = |piece: &PieceRange| {
            matches!(
                self.share.piece(file, &(piece.offset..piece.end()), &mut Vec::new()),
                Ok(Some(Found::Here(_)))
            )
        };
        let count = pieces.iter().position(is_here).unwrap_or(pieces.len()).max(1);
        let (absent, rest) = pieces.split_at_checked(count).unwrap_or((pieces, &[]));
        let ranges: Vec<Range<u64>> = absent.iter().map(|piece| piece.offset..piece.end()).collect();
        let (share, mut passed, mut failed) = (self.share, 0, None);
        let lenders = self.fetches == Fetches::OrAsksItsLender;
        let came = share.through(file, &ranges, lenders, &mut |range, bytes| {
            let Some(piece) = absent.get(passed).filter(|piece| piece.offset == range.start) else {
                return false;
            };
            passed += 1;
            let sent = self.piece(piece, blake3::hash(bytes).as_bytes(), bytes);
            failed = sent.err();
            failed.is_none()
        });
        if let Some(error) = failed {
            return Err(error);
        }
        if let Err(error) = came {
            tracing::warn!("nothing can be fetched for another node: {}", chain(&error));
        }
        for range in absent.get(passed..).unwrap_or_default() {
            self.say(&Answer::Absent { range: *range })?;
        }
        Ok(rest)
    }

    fn say(&mut self, answer: &Answer<'_>) -> Result<(), LinkError> {
        answer.encode(&mut self.out);
        self.sender.send(&[&self.out]).map(drop)
    }

    /// Sends a piece: whole when nobody computes here, else little by little.
    fn piece(&mut self, range: &PieceRange, digest: &[u8; 32], bytes: &[u8]) -> Result<(), LinkError> {
        let head = Answer::piece_head(range, digest);
        let mut rest = bytes;
        let mut is_first = true;
        while is_first || !rest.is_empty() {
            let (part, after) = match self.next_turn() {
                Turn::Free => (rest, &[][..]),
                Turn::Gentle => rest.split_at_checked(GENTLE_BYTES).unwrap_or((rest, &[])),
            };
            let head = if is_first { &head[..] } else { &Answer::BYTES_HEAD[..] };
            self.sender.send(&[head, part])?;
            (rest, is_first) = (after, false);
        }
        Ok(())
    }

    fn next_turn(&mut self) -> Turn {
        let turn = TRAFFIC.turn();
        if turn != self.turn {
            self.turn = turn;
            self.sender.set_in_flight_bytes(match turn {
                Turn::Free => FREE_IN_FLIGHT_BYTES,
                Turn::Gentle => GENTLE_IN_FLIGHT_BYTES,
            });
        }
        turn
    }
}
