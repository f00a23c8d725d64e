//! What nodes agree on before one takes bytes of another: a layer, the embedding, the final norm or the head, by one digest
//! over the digests of its pieces.

use std::ops::Range;
use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::layout::{self, TensorInfo};
use crate::store::{self, Folder, Supplier};

/// Changes whenever the hashed bytes change their meaning.
const DOMAIN: &[u8] = b"swarm-os unit 1";

/// A unit of a model, and what its pieces hash to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its tensors: the file's name in the model's list, and where in it.
    pub parts: Vec<(String, Range<u64>)>,
    pub root: [u8; 32],
}

/// The root of a unit whose pieces have these digests, in order.
pub(crate) fn root(digests: impl Iterator<Item = [u8; 32]>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(DOMAIN);
    for digest in digests {
        hasher.update(&digest);
    }
    *hasher.finalize().as_bytes()
}

/// Another node is asked for bytes of a model as long as this lives.
pub struct Attached {
    folder: Arc<Folder>,
    supplier: Arc<dyn Supplier>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.folder.detach(&self.supplier);
    }
}

impl Checkpoint {
    /// The units that a stage of `layers` reads: layers by their number, after them the embedding, the final norm and
    /// the head.
    pub fn stage_units(&self, layers: Range<usize>) -> Vec<usize> {
        let (total, tied) = (self.config().num_hidden_layers, self.config().tie_word_embeddings);
        let (is_first, is_tail) = (layers.start == 0, layers.end == total);
        let mut units: Vec<usize> = layers.collect();
        if is_first || (is_tail && tied) {
            units.push(total);
        }
        if is_tail {
            units.push(total.saturating_add(1));
            if !tied {
                units.push(total.saturating_add(2));
            }
        }
        units
    }

    pub(crate) fn unit_tensors(&self, unit: usize) -> Vec<&TensorInfo> {
        let total = self.config().num_hidden_layers;
        let names: Vec<String> = match unit.checked_sub(total) {
            None => layout::layer(self.config(), unit).into_iter().map(|want| want.name).collect(),
            Some(0) => vec![layout::EMBED.to_owned()],
            Some(1) => vec![layout::NORM.to_owned()],
            Some(2) if !self.config().tie_word_embeddings => vec![layout::HEAD.to_owned()],
            Some(_) => Vec::new(),
        };
        names.iter().filter_map(|name| self.tensor(name)).collect()
    }

    /// A unit of this model, as somebody says that it hashes. `None` when there is no such unit, or its files are whole.
    pub fn unit(&self, unit: usize, root: [u8; 32]) -> Option<Unit> {
        let part = |info: &TensorInfo| {
            let stored = self.sources().get(info.source)?.stored()?;
            Some((stored.remote.path.clone(), info.offset..info.offset.saturating_add(info.bytes)))
        };
        let parts: Option<Vec<_>> = self.unit_tensors(unit).into_iter().map(part).collect();
        parts.filter(|parts| !parts.is_empty()).map(|parts| Unit { parts, root })
    }

    /// What a unit hashes to by the list of what is here; `None` unless it is here whole, piece by piece. Reads no weights.
    pub fn unit_root(&self, unit: usize) -> Option<[u8; 32]> {
        let tensors = self.unit_tensors(unit);
        let mut digests = Vec::new();
        for info in &tensors {
            let stored = self.sources().get(info.source)?.stored()?;
            let range = info.offset..info.offset.saturating_add(info.bytes);
            for piece in store::cut(std::slice::from_ref(&range)) {
                digests.push(stored.digest(&piece)?);
            }
        }
        (!tensors.is_empty()).then(|| root(digests.into_iter()))
    }

    /// From now on `supplier` is asked for bytes before the Hub is. `None` when nothing can be missing.
    pub fn attach(&self, supplier: Arc<dyn Supplier>) -> Option<Attached> {
        let folder = self.sources().iter().find_map(|source| source.stored())?.folder.clone();
        folder.attach(supplier.clone());
        Some(Attached { folder, supplier })
    }
}
