//! The engine: everything above this room sees a model that answers, and nothing of how it is spread.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Sender, bounded, unbounded};
use swarm_kernels::KvType;
use swarm_link::Identity;
use swarm_ring::Placement;
use swarm_text::{ChatTemplate, Tokenizer};
use swarm_weights::Checkpoint;

use crate::coordinator::{Command, Coordinator};
use crate::error::NodeError;
use crate::generation::{Generation, Prompt, Request};
use crate::room::{SearchEvent, WorkerSearch};
use crate::setup;

/// How an engine is started.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// What the user typed: a path, a preset, or a repository id.
    pub model: String,
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
    /// Prompt rows in one frame.
    pub chunk: usize,
    /// What this node calls itself.
    pub name: String,
    /// Where reached peers are remembered.
    pub state_dir: Option<PathBuf>,
    /// Measured read bandwidth of this node, if it was measured.
    pub read_gb_s: Option<f64>,
}

impl EngineConfig {
    /// Alone, with the defaults, for `model`.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            context: None,
            kv_type: KvType::F16,
            threads: None,
            cores: None,
            worker_threads: None,
            memory_bytes: None,
            cut: None,
            search: WorkerSearch::default(),
            sessions_max: 16,
            chunk: 128,
            name: crate::machine::host_name(),
            state_dir: None,
            read_gb_s: None,
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
    /// A node reads its weights. `node` is its index in the ring.
    Loading { node: usize, bytes_done: u64, bytes_total: u64 },
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
    /// Shortest control round trip measured lately; `None` for this node itself.
    pub round_trip_us: Option<u64>,
}

/// A model ready to answer, on one node or many. Any number of threads may generate at once.
pub struct Engine {
    commands: Sender<Command>,
    thread: Option<std::thread::JoinHandle<()>>,
    info: Arc<Info>,
}

/// What a running engine knows and never changes.
pub(crate) struct Info {
    pub model_name: String,
    pub fingerprint: [u8; 32],
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub context: usize,
    pub placement: Placement,
    pub nodes: Vec<NodeReport>,
    pub round_trips: Vec<Arc<crate::room::Pulse>>,
    pub fault: Arc<Mutex<Option<String>>>,
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
        let assembled = setup::assemble(config, identity, observer)?;
        let setup::Assembled { runner, scheduler, limits, ring, room, info } = assembled;
        let (commands, inbox) = unbounded();
        let mut coordinator = Coordinator::new(runner, scheduler, limits, ring, room, inbox);
        coordinator.fault = info.fault.clone();
        let cores = config.cores.clone();
        let body = move || {
            crate::machine::pin_caller(cores.as_deref());
            coordinator.run();
        };
        let thread = std::thread::Builder::new()
            .name("coordinator".into())
            .spawn(body)
            .map_err(|source| NodeError::System { what: "a thread cannot be started".into(), source })?;
        Ok(Self { commands, thread: Some(thread), info: Arc::new(info) })
    }

    /// Starts an answer. Tokens come as the ring produces them; dropping the generation ends it everywhere.
    ///
    /// # Errors
    /// A request that can never succeed (empty, too long, parameters out of range), or a ring that is down.
    pub fn generate(&self, request: Request) -> Result<Generation, NodeError> {
        let asked_us = crate::clock::now_us();
        let ids = self.ids(&request.prompt)?;
        let session = request.session(ids.clone(), &self.info.tokenizer, self.info.context);
        let (events, news) = unbounded();
        let (reply, answer) = bounded(1);
        let stopped = || NodeError::Stopped(self.fault().unwrap_or_else(|| "it was shut down".into()));
        self.commands
            .send(Command::Open { request: Box::new(session), events, reply })
            .map_err(|_| stopped())?;
        let session = match answer.recv().map_err(|_| stopped())? {
            Ok(session) => session,
            Err(swarm_ring::OpenError::RingDown) => return Err(stopped()),
            Err(error) => return Err(NodeError::Request(error.to_string())),
        };
        Ok(Generation::new(
            session,
            self.commands.clone(),
            news,
            self.info.clone(),
            request,
            ids.len(),
            asked_us,
        ))
    }

    /// The token ids a prompt becomes.
    ///
    /// # Errors
    /// A text or template the model's tokenizer cannot take.
    pub fn ids(&self, prompt: &Prompt) -> Result<Vec<u32>, NodeError> {
        prompt.ids(&self.info.tokenizer, self.info.template.as_ref())
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.info.tokenizer
    }

    /// The model's name.
    pub fn model_name(&self) -> &str {
        &self.info.model_name
    }

    /// Digest of the model's headers and samples of its weights.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.info.fingerprint
    }

    /// The model has a chat template.
    pub fn can_chat(&self) -> bool {
        self.info.template.is_some()
    }

    /// Positions a session may have.
    pub fn context(&self) -> usize {
        self.info.context
    }

    /// Which layers are where, and why.
    pub fn placement(&self) -> &Placement {
        &self.info.placement
    }

    /// The nodes of the ring, coordinator first.
    pub fn nodes(&self) -> Vec<NodeReport> {
        let mut nodes = self.info.nodes.clone();
        for (node, pulse) in nodes.iter_mut().skip(1).zip(&self.info.round_trips) {
            node.round_trip_us = pulse.clock.lock().unwrap_or_else(PoisonError::into_inner).round_trip_us();
        }
        nodes
    }

    /// Why the ring is down; `None` while it is up.
    pub fn fault(&self) -> Option<String> {
        self.info.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A placement that was made but not loaded, for `plan`.
pub struct Plan {
    pub model: Checkpoint,
    pub placement: Placement,
    pub context: usize,
}

/// Finds workers and places the layers, loads nothing, and lets the workers go again.
pub fn plan(
    config: &EngineConfig,
    identity: &Identity,
    observer: EngineObserver<'_>,
) -> Result<Plan, NodeError> {
    let model = setup::open_model(&config.model)?;
    let context = setup::context(config, &model)?;
    let room = setup::find_members(config, identity, observer, &model)?;
    let placement = setup::place_layers(config, identity, &model, context, &room)?;
    Ok(Plan { model, placement, context })
}

/// Opens a model by what the user typed.
pub fn open_model(name: &str) -> Result<Checkpoint, NodeError> {
    setup::open_model(name)
}

/// Where a model name leads on this computer.
pub fn resolve_model(name: &str) -> Result<PathBuf, NodeError> {
    Ok(swarm_weights::cache::resolve(name)?)
}
