//! The engine: everything above this room sees a model that answers, and nothing of how it is spread.

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded, unbounded};
use swarm_kernels::{KvType, Quant};
use swarm_link::Identity;
use swarm_ring::{Objective, Placement, Split};
use swarm_text::{ChatTemplate, Tokenizer};
use swarm_weights::Checkpoint;

use crate::coordinator::Command;
use crate::deadlines::ADMISSION;
use crate::error::NodeError;
use crate::generation::{Answering, Generation, Prompt, Request};
use crate::heal::Live;
use crate::lend::Lender;
use crate::refusals::Refusals;
use crate::search::{SearchEvent, WorkerSearch};
use crate::setup;
use crate::watch::{EngineWatch, Meter};
use swarm_wire::LoadSource;

/// Prompt rows in one frame on one node: more of them share each pass over the weights.
pub const CHUNK_ALONE: usize = 256;
/// The same where stages follow each other: while the first chunk is on its way to the last stage, and the last one after
/// it, not all of them work, so shorter chunks gain more than each loses.
pub const CHUNK_IN_RING: usize = 64;

/// How an engine is started.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// What the user typed: a path, a preset, or a repository id.
    pub model: String,
    /// Another node that the model is from, where the Hub cannot be asked.
    pub lender: Option<Lender>,
    /// Positions a session may have; by default the model's own maximum, at most 4096.
    pub context: Option<usize>,
    /// How KV rows are stored.
    pub kv_type: KvType,
    /// Compute threads of this node; all cores by default.
    pub threads: Option<usize>,
    /// Cores to pin them to.
    pub cores: Option<Vec<usize>>,
    /// Compute threads of every worker; by default each decides.
    pub worker_threads: Option<usize>,
    /// Most bytes to use here; by default what is free.
    pub memory_bytes: Option<u64>,
    /// The layers of each node, coordinator first, instead of a placement by speed and memory.
    pub cut: Option<Vec<std::ops::Range<usize>>>,
    /// Whom to share the layers with.
    pub search: WorkerSearch,
    /// Sessions open at once.
    pub sessions_max: usize,
    /// Prompt rows in one frame; by default [`CHUNK_ALONE`], and [`CHUNK_IN_RING`] where stages follow each other.
    pub chunk: Option<usize>,
    /// What this node calls itself.
    pub name: String,
    /// Where reached peers are remembered.
    pub state_dir: Option<PathBuf>,
    /// Measured read bandwidth of this node, if it was measured.
    pub read_gb_s: Option<f64>,
    /// Whether the layers may be shared.
    pub split: Split,
    /// What the placement is best at; by default one user's speed, and a fair share of the work where a split was
    /// asked for.
    pub objective: Option<Objective>,
    /// Names of the nodes of `cut`, this one first; empty: in ring order.
    pub cut_nodes: Vec<String>,
    /// Measure nodes and links before layers are placed; else hellos and heartbeats must do. What each node has of the
    /// model is asked with it: without, nobody is a source for others, and where this node has to fetch, workers count as having nothing.
    /// For programs that place layers themselves; no command and no setting of the Python package turns it off.
    pub measure: bool,
    /// Where this node keeps what it learned of its speed; nowhere when absent.
    pub profile_dir: Option<PathBuf>,
    /// A start that would fetch more bytes than this, over all nodes, is refused; any number when absent.
    pub fetch_bytes_max: Option<u64>,
    /// What float matrices become while they are loaded, on every node; what they are when absent.
    pub quant: Option<Quant>,
    /// This node keeps on its disk what it quantized, so that the next start only reads it.
    pub keep_quantized: bool,
}

impl EngineConfig {
    /// Alone, with the defaults, for `model`.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            lender: None,
            context: None,
            kv_type: KvType::F16,
            threads: None,
            cores: None,
            worker_threads: None,
            memory_bytes: None,
            cut: None,
            search: WorkerSearch::default(),
            sessions_max: 16,
            chunk: None,
            name: crate::machine::host_name(),
            state_dir: None,
            read_gb_s: None,
            split: Split::Auto,
            objective: None,
            cut_nodes: Vec::new(),
            measure: true,
            profile_dir: None,
            fetch_bytes_max: None,
            quant: None,
            keep_quantized: false,
        }
    }
}

/// What happens while an engine starts.
#[derive(Clone, Debug)]
pub enum EngineEvent {
    /// The search for workers.
    Search(SearchEvent),
    /// The layers have their places.
    Placed(Placement),
    /// A node fetches its weights, then reads them. `node` is its index in the ring.
    Loading { node: usize, bytes_done: u64, bytes_total: u64, from: LoadSource },
}

/// Receives the events of a starting engine.
pub type EngineObserver<'a> = &'a dyn Fn(EngineEvent);

/// One node of a running ring.
#[derive(Clone, Debug)]
pub struct NodeReport {
    /// Its name, safe to print.
    pub name: String,
    /// Its layers.
    pub layers: std::ops::Range<usize>,
    /// Bytes of weights in its memory.
    pub bytes_loaded: u64,
    /// Bytes of weights one decode step reads.
    pub weight_bytes_per_token: u64,
    /// Bytes of KV rows that one position takes; known of this node itself.
    pub kv_bytes_per_position: Option<u64>,
    /// Shortest control round trip measured lately; `None` for this node itself.
    pub round_trip_us: Option<u64>,
    /// What its heartbeats say.
    pub state: NodeState,
}

/// Whether a node is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeState {
    /// It answers heartbeats.
    #[default]
    Up,
    /// It has not answered for a second.
    Suspect,
    /// It left, or has not answered for three seconds.
    Lost,
}

/// A model ready to answer, on one node or many. Any number of threads may generate at once.
///
/// A ring that lost a node is placed anew, on those who are left, when the next answer is asked for; a node that came
/// back in the meantime takes part again.
pub struct Engine {
    model: Arc<Model>,
    live: Mutex<Live>,
    info: Arc<RwLock<Arc<Info>>>,
}

/// The logits of a prompt, as they are computed.
pub struct LogitsParts {
    /// Rows in all.
    pub positions: usize,
    /// Columns.
    pub vocab: usize,
    parts: Receiver<Result<Vec<f32>, String>>,
}

impl LogitsParts {
    /// Waits for the next rows, `within` at most: `[rows, vocab]`; empty when there are none yet.
    ///
    /// # Errors
    /// The model could not go on, or the engine was stopped.
    pub fn wait(&self, within: std::time::Duration) -> Result<Vec<f32>, NodeError> {
        match self.parts.recv_timeout(within) {
            Ok(rows) => rows.map_err(NodeError::Stopped),
            Err(RecvTimeoutError::Timeout) => Ok(Vec::new()),
            Err(RecvTimeoutError::Disconnected) => Err(NodeError::Stopped("it was shut down".into())),
        }
    }
}

/// What never changes, whoever holds which layers.
pub(crate) struct Model {
    pub config: EngineConfig,
    pub identity: Identity,
    pub checkpoint: Checkpoint,
    /// Of the files.
    pub fingerprint: [u8; 32],
    /// Of what is computed with.
    pub held_fingerprint: [u8; 32],
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub context: usize,
    pub refusals: Arc<Refusals>,
}

/// What one placement knows and never changes.
pub(crate) struct Info {
    pub model: Arc<Model>,
    pub plan: swarm_ring::Plan,
    pub nodes: Vec<NodeReport>,
    pub pulses: Vec<Arc<crate::room::Pulse>>,
    pub fault: Arc<Mutex<Option<String>>>,
    pub meter: Arc<Meter>,
    /// KV rows of this node in use.
    pub kv_bytes: Arc<AtomicU64>,
}

impl Info {
    /// The nodes as they stand now.
    pub fn reports(&self) -> Vec<NodeReport> {
        let mut nodes = self.nodes.clone();
        for (node, pulse) in nodes.iter_mut().skip(1).zip(&self.pulses) {
            node.round_trip_us = lock(&pulse.clock).round_trip_us();
            node.state = match (pulse.is_lost(), pulse.is_suspect()) {
                (true, _) => NodeState::Lost,
                (false, true) => NodeState::Suspect,
                (false, false) => NodeState::Up,
            };
        }
        nodes
    }

    pub fn fault(&self) -> Option<String> {
        lock(&self.fault).clone()
    }
}

impl Engine {
    /// Opens the model, finds workers, places the layers, loads them everywhere, and connects the ring.
    ///
    /// # Errors
    /// [`NodeError`]; nothing is left running then, and workers wait for somebody else.
    pub fn start(
        config: &EngineConfig,
        identity: &Identity,
        observer: EngineObserver<'_>,
    ) -> Result<Self, NodeError> {
        let checkpoint = setup::open_for(config)?;
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint)?;
        let template = ChatTemplate::from_checkpoint(&checkpoint, &tokenizer)?;
        let context = setup::context(config, &checkpoint)?;
        let model = Arc::new(Model {
            fingerprint: checkpoint.fingerprint()?,
            held_fingerprint: checkpoint.held_fingerprint()?,
            config: config.clone(),
            identity: identity.clone(),
            checkpoint,
            tokenizer,
            template,
            context,
            refusals: Arc::default(),
        });
        let (live, info) = Live::start(&model, observer)?;
        Ok(Self { model, live: Mutex::new(live), info: Arc::new(RwLock::new(info)) })
    }

    /// Places the layers anew where that is called for: a node was lost, or one that was lost is back and nobody is
    /// being answered. True when it did. [`Engine::generate`] does it by itself; a caller who wants to show what
    /// happens meanwhile calls this first. Takes as long as loading takes.
    ///
    /// # Errors
    /// [`NodeError`] when the layers have no home any more, or the nodes that are left were lost as well; the next
    /// call tries again.
    pub fn heal(&self, observer: EngineObserver<'_>) -> Result<bool, NodeError> {
        let mut live = lock(&self.live);
        let now = self.now();
        if now.fault().is_none() && !live.may_grow() {
            return Ok(false);
        }
        let info = live.heal(&self.model, &now, observer)?;
        *self.info.write().unwrap_or_else(PoisonError::into_inner) = info;
        Ok(true)
    }

    /// Starts an answer. Tokens come as the ring produces them; dropping the generation ends it everywhere.
    ///
    /// # Errors
    /// A request that can never succeed (empty, too long, parameters out of range), or a ring that is down and cannot
    /// be placed anew. Comes back within the time that takes, or within 130 s of a compute thread that does not answer.
    pub fn generate(&self, request: Request) -> Result<Generation, NodeError> {
        let asked_us = crate::clock::now_us();
        let ids = self.ids(&request.prompt)?;
        let session = request.session(ids.clone(), &self.model.tokenizer, self.model.context);
        self.heal(&|_| {})?;
        // A ring may be lost between the look at it and the request.
        let (info, commands, busy) = {
            let live = lock(&self.live);
            (self.now(), live.commands.clone(), live.busy.clone())
        };
        let (events, news) = unbounded();
        let (reply, answer) = bounded(1);
        let stopped = || NodeError::Stopped(info.fault().unwrap_or_else(|| "it was shut down".into()));
        let (trace, keep) = (request.trace, request.keep);
        commands
            .send(Command::Open { request: Box::new(session), trace, keep, events, reply })
            .map_err(|_| stopped())?;
        let session = match answer.recv_timeout(ADMISSION).map_err(|_| stopped())? {
            Ok(session) => session,
            Err(swarm_ring::OpenError::RingDown) => return Err(stopped()),
            Err(error) => return Err(NodeError::Request(error.to_string())),
        };
        Ok(Generation::new(Answering { session, commands, news, info, busy }, request, ids.len(), asked_us))
    }

    /// The logits after every position of a prompt, in parts, as `[rows, vocab]` of f32 in order of position; together
    /// `[tokens, vocab]`. Only of an engine whose layers are all here. Costs one prefill and a pass over the head per
    /// position; other answers wait meanwhile. Dropping the parts ends it.
    ///
    /// # Errors
    /// A prompt that is empty or does not fit the context, or layers that are elsewhere. A part is an error where
    /// there is no memory for the KV rows.
    pub fn logits(&self, prompt: &Prompt) -> Result<LogitsParts, NodeError> {
        let ids = self.ids(prompt)?;
        let refuse = |text: String| Err(NodeError::Request(text));
        if ids.is_empty() {
            return refuse("the prompt is empty; give at least one token".into());
        }
        if ids.len() > self.model.context {
            let (tokens, context) = (ids.len(), self.model.context);
            return refuse(format!(
                "a prompt of {tokens} tokens does not fit a context of {context}; shorten it"
            ));
        }
        let vocab = self.model.checkpoint.config().vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return refuse(format!("token id {id} is not below the vocabulary size of {vocab}"));
        }
        if self.now().nodes.len() > 1 {
            return refuse(
                "the layers are spread over several nodes, and logits stay with the last one".into(),
            );
        }
        let (positions, (reply, parts)) = (ids.len(), bounded(1));
        let commands = lock(&self.live).commands.clone();
        commands
            .send(Command::Logits { ids, reply })
            .map_err(|_| NodeError::Stopped("it was shut down".into()))?;
        Ok(LogitsParts { positions, vocab, parts })
    }

    fn now(&self) -> Arc<Info> {
        self.info.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The token ids a prompt becomes.
    ///
    /// # Errors
    /// A text or template the model's tokenizer cannot take.
    pub fn ids(&self, prompt: &Prompt) -> Result<Vec<u32>, NodeError> {
        prompt.ids(&self.model.tokenizer, self.model.template.as_ref())
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.model.tokenizer
    }

    /// The model's name.
    pub fn model_name(&self) -> &str {
        self.model.checkpoint.name()
    }

    /// Digest of the model's headers and samples of its weights, and of what they are quantized to.
    pub fn fingerprint(&self) -> [u8; 32] {
        let Model { held_fingerprint, .. } = &*self.model;
        *held_fingerprint
    }

    /// What float matrices became while they were loaded.
    pub fn quant(&self) -> Option<Quant> {
        self.model.checkpoint.quant()
    }

    /// The model has a chat template.
    pub fn can_chat(&self) -> bool {
        self.model.template.is_some()
    }

    /// Positions a session may have.
    pub fn context(&self) -> usize {
        self.model.context
    }

    /// Which layers are where, and why.
    pub fn placement(&self) -> Placement {
        self.now().plan.placement.clone()
    }

    /// The placement with what it was compared to.
    pub fn plan(&self) -> swarm_ring::Plan {
        self.now().plan.clone()
    }

    /// The nodes of the ring, coordinator first.
    pub fn nodes(&self) -> Vec<NodeReport> {
        self.now().reports()
    }

    /// A look at the engine for another thread.
    pub fn watch(&self) -> EngineWatch {
        EngineWatch { model: self.model.clone(), info: self.info.clone() }
    }

    /// Why the ring is down; `None` while it is up.
    pub fn fault(&self) -> Option<String> {
        self.now().fault()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A placement that was made but not loaded, for `plan`.
pub struct Plan {
    pub model: Checkpoint,
    pub plan: swarm_ring::Plan,
    pub context: usize,
    /// What each stage of the placement would fetch, in ring order.
    pub to_fetch: Vec<ToFetch>,
}

/// What a stage would fetch before it starts, from other nodes or the Hub.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ToFetch {
    pub bytes: u64,
    /// The node said what it has; else it is at most so much.
    pub known: bool,
}

/// Finds workers and places the layers, loads nothing, and lets the workers go again.
pub fn plan(
    config: &EngineConfig,
    identity: &Identity,
    observer: EngineObserver<'_>,
) -> Result<Plan, NodeError> {
    let model = setup::open_for(config)?;
    let context = setup::context(config, &model)?;
    let room = setup::find_members(config, identity, observer, &model)?;
    let setup::Placed { plan, to_fetch, .. } =
        setup::place_layers(config, identity, &model, context, &room, 0)?;
    Ok(Plan { model, plan, context, to_fetch })
}

/// Opens a model by what the user typed.
pub fn open_model(name: &str) -> Result<Checkpoint, NodeError> {
    setup::open_model(name)
}

/// Where a model name leads on this computer.
pub fn resolve_model(name: &str) -> Result<PathBuf, NodeError> {
    Ok(swarm_weights::cache::resolve(name)?)
}
