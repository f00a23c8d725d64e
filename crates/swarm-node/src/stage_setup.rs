//! Turning a checked order for a stage into a loaded one: model, fingerprint, memory, weights.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use swarm_kernels::{KvType, Quant};
use swarm_model::{Kept, LoadOptions, LoadProgress, Stage, WeightSizes, stage_size, weight_sizes};
use swarm_ring::ModelShape;
use swarm_weights::{
    Adopted, Catalogue, Checkpoint, FetchControl, FetchProgress, FetchSource, ModelRef, Needs,
    QuantizedStore, Store, Supplier, cache,
};
use swarm_wire::{Limits, LoadSource, Origin};

use crate::error::NodeError;
use crate::inbox::queue;
use crate::profile::{Meter, Profiles, layer_shape};

/// Frames of the largest size that a stage holds at once beside those that wait: one being received, one being
/// computed, its rows, and the one being sent.
const FRAMES_AT_WORK: u64 = 4;

/// About what a decode frame has beside its row: heads, times of the stages, encryption.
const FRAME_BYTES: u64 = 160;

/// What a stage is loaded for.
#[derive(Clone, Debug)]
pub(crate) struct StageOrder {
    pub layers: Range<usize>,
    pub context: usize,
    pub kv_type: KvType,
    pub sessions_max: usize,
    /// What a peer may send; checked when the order was.
    pub limits: Limits,
    /// Weights that are quantized while they are loaded stay on the disk in that form.
    pub keep_quantized: bool,
}

/// Bytes of frames and their rows, and of the token ids that the tail keeps of each session.
pub(crate) fn link_bytes(limits: &Limits, sessions_max: usize) -> u64 {
    let held = (queue(limits) as u64).saturating_add(FRAMES_AT_WORK);
    let frames = limits.frame_bytes_max().unwrap_or(u64::MAX).saturating_mul(held);
    let history = u64::from(limits.context_max).saturating_mul(4).saturating_mul(sessions_max as u64);
    frames.saturating_add(history)
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
    /// By the numbers that the planner places by.
    pub fn of(checkpoint: &Checkpoint, order: &StageOrder) -> Result<Self, NodeError> {
        let StageOrder { layers, context, kv_type, sessions_max, limits, .. } = order;
        // Refuses what is no stage of this model.
        stage_size(checkpoint, layers.clone(), *kv_type)
            .map_err(|source| NodeError::Load { layers: layers.clone(), source: Box::new(source) })?;
        let memory = model_shape(checkpoint, *context, *kv_type, limits, *sessions_max)?.stage_memory(layers);
        Ok(Self { weights: memory.weight_bytes, kv_session: memory.kv_bytes, buffers: memory.buffer_bytes })
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

/// The sizes of a model, for the planner and for the loader.
pub(crate) fn model_shape(
    checkpoint: &Checkpoint,
    context: usize,
    kv_type: KvType,
    limits: &Limits,
    sessions_max: usize,
) -> Result<ModelShape, NodeError> {
    let layers = checkpoint.config().num_hidden_layers;
    let size = stage_size(checkpoint, 0..layers, kv_type)
        .map_err(|source| NodeError::Load { layers: 0..layers, source: Box::new(source) })?;
    let WeightSizes { layers: layer_bytes, norm, head } = weight_sizes(checkpoint);
    let kv_session = size.kv_bytes_per_position.saturating_mul(kv_positions(context));
    Ok(ModelShape {
        layer_bytes,
        embed_bytes: 0, // rows are read from the file
        norm_bytes: norm,
        head_bytes: head,
        tied: checkpoint.config().tie_word_embeddings,
        kv_bytes_per_layer: kv_session / layers.max(1) as u64,
        buffer_bytes: size
            .scratch_bytes(limits.tokens_max as usize, 0)
            .saturating_add(size.rope_bytes(context))
            .saturating_add(link_bytes(limits, sessions_max)),
        tail_buffer_bytes: size.scratch_bytes(0, sessions_max),
        hidden_bytes: u64::from(limits.width).saturating_mul(4).saturating_add(FRAME_BYTES),
        token_bytes: FRAME_BYTES,
        context: context as u64,
    })
}

/// The stage's layers, each weighed against the mean layer of the model.
fn mean_layers(shape: &ModelShape, layers: &Range<usize>) -> f64 {
    let sum = |layers: &[u64]| layers.iter().map(|&bytes| bytes as f64).sum::<f64>();
    let part = sum(shape.layer_bytes.get(layers.clone()).unwrap_or_default());
    part * shape.layer_bytes.len() as f64 / sum(&shape.layer_bytes).max(1.0)
}

/// What learns from the stage how fast this node is; nothing where that could not be kept.
pub(crate) fn meter(
    checkpoint: &Checkpoint,
    order: &StageOrder,
    threads: usize,
    profile_dir: Option<&Path>,
) -> Option<Meter> {
    let StageOrder { layers, context, kv_type, sessions_max, limits, .. } = order;
    let profiles = Profiles::new(Some(profile_dir?));
    let shape = model_shape(checkpoint, *context, *kv_type, limits, *sessions_max).ok()?;
    Some(Meter::new(profiles, &layer_shape(checkpoint)?, threads, mean_layers(&shape, layers)))
}

/// Positions that a session of `context` positions takes memory for: KV rows come in whole pages.
pub(crate) fn kv_positions(context: usize) -> u64 {
    context.next_multiple_of(swarm_kernels::TILE) as u64
}

/// Which published model a checkpoint is, as the wire spells it.
pub(crate) fn origin(checkpoint: &Checkpoint) -> Option<Origin> {
    let from = checkpoint.origin()?;
    Some(Origin {
        repository: from.id.clone(),
        commit: from.commit.clone(),
        file: from.file.clone(),
        fingerprint: swarm_wire::Fingerprint(checkpoint.origin_fingerprint()?),
    })
}

/// What weights are quantized to, as the wire spells it.
pub(crate) fn wire_quant(quant: Quant) -> swarm_wire::Quant {
    match quant {
        Quant::Q8_0 => swarm_wire::Quant::Q8_0,
        Quant::Q4_0 => swarm_wire::Quant::Q4_0,
        Quant::Q4_K => swarm_wire::Quant::Q4_K,
    }
}

/// The same as this program has it.
pub(crate) fn own_quant(wire: swarm_wire::Quant) -> Quant {
    match wire {
        swarm_wire::Quant::Q8_0 => Quant::Q8_0,
        swarm_wire::Quant::Q4_0 => Quant::Q4_0,
        swarm_wire::Quant::Q4_K => Quant::Q4_K,
    }
}

/// A model that a worker was ordered to open.
pub(crate) struct WantedModel<'a> {
    /// What the coordinator's user called it.
    pub named: &'a str,
    pub fingerprint: &'a [u8; 32],
    pub origin: Option<&'a Origin>,
}

impl WantedModel<'_> {
    fn is(&self, checkpoint: &Checkpoint) -> Result<bool, NodeError> {
        let same = |hash: &[u8; 32]| checkpoint.is_model(hash);
        Ok(same(self.fingerprint)?
            || self.origin.is_some_and(|origin| matches!(same(&origin.fingerprint.0), Ok(true))))
    }
}

/// The model where it is on this computer whole: the one given at start, and no other then; else by commit, by name, or,
/// where `all` are looked at, any with the same fingerprint. That reads samples of every model here.
pub(crate) fn whole_here(
    own: Option<&PathBuf>,
    wanted: &WantedModel<'_>,
    all: bool,
) -> Result<Option<Checkpoint>, NodeError> {
    if let Some(path) = own {
        let checkpoint = Checkpoint::open(path)?;
        return Ok(wanted.is(&checkpoint)?.then_some(checkpoint));
    }
    let matches = |path: &PathBuf| -> Option<Checkpoint> {
        let checkpoint = Checkpoint::open(path).ok()?;
        wanted.is(&checkpoint).ok()?.then_some(checkpoint)
    };
    let named = wanted.named;
    let by_name = if Path::new(named).exists() { None } else { cache::resolve_here(named).ok() };
    let published = wanted.origin.and_then(published);
    let by_commit = published.as_ref().and_then(|name| cache::resolve_here(name).ok());
    let mut candidates: Vec<PathBuf> = by_commit.into_iter().chain(by_name).collect();
    if all {
        candidates.extend(cache::list().into_iter().map(|entry| entry.path));
    }
    Ok(candidates.iter().find_map(matches))
}

/// A peer's word of where a model comes from, as the store takes it.
pub(crate) fn known_origin(origin: &Origin) -> swarm_weights::Origin {
    swarm_weights::Origin {
        id: origin.repository.clone(),
        commit: origin.commit.clone(),
        file: origin.file.clone(),
    }
}

/// Bytes of a model from another node: how it describes the model, and the way to ask it.
pub(crate) type Supplied = (Catalogue, Arc<dyn Supplier>);

/// Finds the worker's own copy of the model a coordinator names: the one given at start, else by name among the
/// models of this computer, else any of them with the same fingerprint; else what `supplied` gives, which is asked only
/// then; else what a repository published and this worker can fetch. Paths of a peer are never opened.
pub(crate) fn find_model(
    own: Option<&PathBuf>,
    wanted: &WantedModel<'_>,
    supplied: impl FnOnce() -> Option<Supplied>,
) -> Result<(Checkpoint, Option<Adopted>), NodeError> {
    let &WantedModel { named, origin, .. } = wanted;
    if let Some(found) = whole_here(own, wanted, true)? {
        return Ok((found, None));
    }
    let is_it = |checkpoint: &Checkpoint| wanted.is(checkpoint);
    if let Some(path) = own {
        return Err(NodeError::Request(format!(
            "this worker holds {}, which is not the coordinator's {}; start both with the same files",
            Checkpoint::open(path)?.name().escape_debug(),
            named.escape_debug()
        )));
    }
    let published = origin.and_then(published);
    let mut adopted = None;
    if let Some((catalogue, supplier)) = supplied() {
        match adopt(&catalogue, supplier, &is_it) {
            Ok(found) => return Ok(found),
            Err(error) => {
                tracing::warn!(
                    "the coordinator's {} is not taken over: {}",
                    named.escape_debug(),
                    error.chain()
                );
                adopted = Some(error);
            }
        }
    }
    let none_here =
        format!("no model on this worker has the same weights as the coordinator's {}", named.escape_debug());
    let Some(published) = published else {
        if let Some(error) = adopted {
            return Err(error);
        }
        return Err(NodeError::Request(format!(
            "{none_here}; copy its files here and start the worker with --model PATH"
        )));
    };
    let checkpoint = Checkpoint::open(&cache::resolve_for(&published, Needs::WeightsOnly)?)?;
    if is_it(&checkpoint)? {
        return Ok((checkpoint, None));
    }
    Err(NodeError::Request(format!(
        "{none_here}, and {} has other tensors here; are both nodes of one version?",
        published.escape_debug()
    )))
}

/// Opens a model that another node describes and supplies.
fn adopt(
    catalogue: &Catalogue,
    supplier: Arc<dyn Supplier>,
    is_it: &dyn Fn(&Checkpoint) -> Result<bool, NodeError>,
) -> Result<(Checkpoint, Option<Adopted>), NodeError> {
    let layers = 0..0;
    let failed = |source| NodeError::Fetch { layers, source: Box::new(source) };
    let adopted = Store::of_user().adopt(catalogue, supplier).map_err(failed)?;
    let checkpoint = Checkpoint::open(&adopted.path)?;
    if is_it(&checkpoint)? {
        return Ok((checkpoint, Some(adopted)));
    }
    Err(NodeError::Request(format!(
        "what the coordinator handed over of {} is another model than it named; are both nodes of one version?",
        catalogue.name
    )))
}

/// The name of a peer's model, to the commit; nothing when it is no name.
fn published(origin: &Origin) -> Option<String> {
    let file = origin.file.as_ref().map_or_else(String::new, |file| format!(":{file}"));
    let name = ModelRef::parse(&format!("{}@{}{file}", origin.repository, origin.commit))?;
    // A branch would be another model tomorrow.
    (name.id == origin.repository && name.is_pinned()).then(|| name.to_string())
}

/// Where fetched bytes come from, as the wire spells it.
pub(crate) fn load_source(from: FetchSource) -> LoadSource {
    match from {
        FetchSource::Hub => LoadSource::Hub,
        FetchSource::Peer => LoadSource::Peer,
    }
}

/// Fetches what the stage needs and what is not on this computer.
pub(crate) fn fetch(
    checkpoint: &Checkpoint,
    layers: &Range<usize>,
    abort: &AtomicBool,
    progress: &mut dyn FnMut(FetchProgress),
) -> Result<(), NodeError> {
    checkpoint
        .fetch(layers.clone(), &mut FetchControl { progress, abort })
        .map_err(|source| NodeError::Fetch { layers: layers.clone(), source: Box::new(source) })
}

/// Reads the stage's own tensors and nothing else, and of these only what `kept` lacks.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    order: &StageOrder,
    threads: usize,
    abort: Option<Arc<AtomicBool>>,
    kept: &mut Kept,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Stage, NodeError> {
    let quantized = quantized(checkpoint, order.keep_quantized);
    let context = Some(order.context);
    let options = LoadOptions { context, threads, abort, quantized: quantized.clone(), dequantized: false };
    let loaded = Stage::load_rest(checkpoint, order.layers.clone(), &options, kept, progress)
        .map_err(|source| NodeError::Load { layers: order.layers.clone(), source: Box::new(source) });
    if let Some(error) = quantized.and_then(|store| store.trouble()) {
        tracing::warn!("quantized weights are not kept on the disk: {}", crate::error::chain(&error));
    }
    loaded
}

/// The quantized form of a model on this computer's disk. Where it cannot be named, it is neither used nor kept.
pub(crate) fn quantized(checkpoint: &Checkpoint, keeps: bool) -> Option<Arc<QuantizedStore>> {
    QuantizedStore::of_user(checkpoint, keeps).ok().flatten().map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_may_send_counts_as_memory() {
        let limits = Limits {
            width: 1024,
            vocab: 1000,
            context_max: 256,
            tokens_max: 128,
            segments_max: 4,
            stages_max: 2,
        };
        let frame = limits.frame_bytes_max().unwrap();
        assert!(frame > 128 * 1024 * 4);
        // Three batches of two stages, eight words about four sessions, and four at work.
        assert_eq!(link_bytes(&limits, 4), 15 * frame + 4 * 256 * 4);
    }
}
