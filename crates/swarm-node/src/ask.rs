//! Asking another node for bytes of a model, over a link of its own.

use std::error::Error;
use std::sync::{Mutex, PoisonError};

use swarm_link::{Connection, Receiver, Sender};
use swarm_weights::{Brought, Catalogue, SharedFile, Supplier, SupplyAsk, Take};
use swarm_wire::{Answer, Ask, BULK_BYTES_MAX, DecodeError, PIECE_BYTES_MAX, PieceRange, Supply};

use crate::deadlines::{SUPPLY_SILENT, SUPPLY_THROUGH};

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
