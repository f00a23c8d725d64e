//! A model that is quantized while it is loaded: which tensors, and what they become. The bytes stay those of the files;
//! whoever reads them turns them into what [`TensorInfo::held`](crate::TensorInfo::held) says.

use std::collections::BTreeMap;

use swarm_kernels::{DType, NUMERICS, Quant};

use crate::checkpoint::Checkpoint;
use crate::error::WeightsError;
use crate::layout::{EMBED, TensorInfo};

/// Changes whenever equal names mean other weights.
const DOMAIN: &[u8] = b"swarm-os quantized model 1";

/// Matrices that become, or stay, the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantGroup {
    /// As stored.
    pub from: DType,
    /// As held.
    pub to: DType,
    /// Values in a row of each.
    pub cols: usize,
    /// How many there are.
    pub matrices: usize,
}

impl Checkpoint {
    /// The same model, whose float matrices are quantized while they are loaded: those of the layers, and the head.
    /// Norms and biases stay f32, and rows of the embedding are looked up as they are stored, also where it is the head.
    #[must_use]
    pub fn quantized(mut self, quant: Option<Quant>) -> Self {
        self.quant = quant;
        let tied = self.config().tie_word_embeddings;
        for info in self.tensors.values_mut() {
            info.held = match quant {
                Some(quant) if is_multiplied(info, tied) => quant.applied(info.dtype, info.cols),
                _ => info.dtype,
            };
        }
        self
    }

    /// What float matrices become while they are loaded, if that is not what is stored.
    pub fn quant(&self) -> Option<Quant> {
        self.quant
    }

    /// What the matrices that are multiplied by become, and how many of them.
    pub fn quant_groups(&self) -> Vec<QuantGroup> {
        let mut groups: BTreeMap<(DType, DType, usize), usize> = BTreeMap::new();
        let tied = self.config().tie_word_embeddings;
        for info in self.tensors().filter(|info| is_multiplied(info, tied)) {
            *groups.entry((info.dtype, info.held, info.cols)).or_default() += 1;
        }
        let group = |((from, to, cols), matrices)| QuantGroup { from, to, cols, matrices };
        groups.into_iter().map(group).collect()
    }

    /// The identity of what a stage of this computes with: that of the files, and what they are turned into.
    ///
    /// # Errors
    /// As [`Checkpoint::fingerprint`].
    pub fn held_fingerprint(&self) -> Result<[u8; 32], WeightsError> {
        let files = self.fingerprint()?;
        let Some(quant) = self.quant else { return Ok(files) };
        let mut hash = blake3::Hasher::new();
        for part in [DOMAIN, &files, quant.name().as_bytes(), NUMERICS.as_bytes()] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Ok(*hash.finalize().as_bytes())
    }
}

/// True for the matrices of layers and the head.
fn is_multiplied(info: &TensorInfo, tied: bool) -> bool {
    let is_vector = info.rows == 1 || info.name.ends_with("norm.weight") || info.name.ends_with(".bias");
    !is_vector && (tied || info.name != EMBED)
}
