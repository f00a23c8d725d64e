//! Turning a checked order for a stage into a loaded one: model, fingerprint, memory, weights.

use std::ops::Range;
use std::path::PathBuf;

use swarm_kernels::KvType;
use swarm_model::{LoadOptions, LoadProgress, Stage, stage_size};
use swarm_weights::{Checkpoint, cache};

use crate::error::NodeError;

/// What a stage is loaded for.
#[derive(Clone, Debug)]
pub(crate) struct StageOrder {
    pub layers: Range<usize>,
    pub context: usize,
    pub kv_type: KvType,
    pub sessions_max: usize,
    pub tokens_max: usize,
}

/// Bytes a stage will take, before anything is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StageNeed {
    pub weights: u64,
    /// KV rows of one full session: more sessions share what is left beyond this.
    pub kv_session: u64,
    pub buffers: u64,
}

impl StageNeed {
    pub fn of(checkpoint: &Checkpoint, order: &StageOrder) -> Result<Self, NodeError> {
        let size = stage_size(checkpoint, order.layers.clone(), order.kv_type)
            .map_err(|source| NodeError::Load { layers: order.layers.clone(), source: Box::new(source) })?;
        Ok(Self {
            weights: size.weight_bytes,
            kv_session: size.kv_bytes_per_position.saturating_mul(kv_positions(order.context)),
            buffers: size
                .scratch_bytes(order.tokens_max, order.sessions_max)
                .saturating_add(size.rope_bytes(order.context)),
        })
    }

    fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv_session).saturating_add(self.buffers)
    }

    /// Bytes for KV rows when `memory` may be used in all: one full session at least, `sessions` at most.
    pub fn kv_budget(&self, layers: &Range<usize>, memory: u64, sessions: usize) -> Result<u64, NodeError> {
        if self.total() > memory {
            return Err(NodeError::Memory {
                layers: layers.clone(),
                weights: self.weights,
                kv: self.kv_session,
                buffers: self.buffers,
                have: memory,
            });
        }
        let left = memory - self.weights - self.buffers;
        Ok(left.min(self.kv_session.saturating_mul(sessions.max(1) as u64)))
    }
}

/// Positions that a session of `context` positions takes memory for: KV rows come in whole pages.
pub(crate) fn kv_positions(context: usize) -> u64 {
    context.next_multiple_of(swarm_kernels::TILE) as u64
}

/// Finds the worker's own copy of the model a coordinator names: the one given at start, else by name among the
/// models of this computer, else any of them with the same fingerprint. Paths of a peer are never opened.
pub(crate) fn find_model(
    own: Option<&PathBuf>,
    named: &str,
    fingerprint: &[u8; 32],
) -> Result<Checkpoint, NodeError> {
    let matches = |path: &PathBuf| -> Option<Checkpoint> {
        let checkpoint = Checkpoint::open(path).ok()?;
        (checkpoint.fingerprint().ok()? == *fingerprint).then_some(checkpoint)
    };
    if let Some(path) = own {
        let checkpoint = Checkpoint::open(path)?;
        if checkpoint.fingerprint()? == *fingerprint {
            return Ok(checkpoint);
        }
        return Err(NodeError::Request(format!(
            "this worker holds {}, which is not the coordinator's {}; start both with the same files",
            checkpoint.name().escape_debug(),
            named.escape_debug()
        )));
    }
    let by_name = if std::path::Path::new(named).exists() { None } else { cache::resolve(named).ok() };
    let mut candidates: Vec<PathBuf> = by_name.into_iter().collect();
    candidates.extend(cache::list().into_iter().map(|entry| entry.path));
    candidates.iter().find_map(matches).ok_or_else(|| {
        NodeError::Request(format!(
            "no model on this worker has the same weights as the coordinator's {}; copy its files here and start the worker with --model PATH",
            named.escape_debug()
        ))
    })
}

/// Reads the stage's own tensors and nothing else.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    order: &StageOrder,
    threads: usize,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Stage, NodeError> {
    let options = LoadOptions { context: Some(order.context), threads };
    Stage::load(checkpoint, order.layers.clone(), &options, progress)
        .map_err(|source| NodeError::Load { layers: order.layers.clone(), source: Box::new(source) })
}
