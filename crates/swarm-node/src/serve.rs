//! One stage of a worker, from the order to the last frame.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use swarm_kernels::KvType;
use swarm_link::{Closer, Connection, LinkError, LinkSettings, dial};
use swarm_model::{LoadProgress, Stage};
use swarm_ring::Gate;
use swarm_text::Tokenizer;
use swarm_weights::{Attached, Checkpoint, Store};
use swarm_wire::{
    Blame, CloseCode, Control, DataHello, DataKind, Epoch, Limits, LoadSource, Loading, ModelId, NextHop,
    NodeId, Prepare, Ready, Refused, Stats, Supply,
};

use crate::ask::{LinkSupplier, SourceNode, catalogue};
use crate::control::{self, ControlSender};
use crate::deadlines::{ASSEMBLY, DIAL, FRAME_WRITE, LOADING_NEWS, STAGE_TURN, SUPPLY_COMES};
use crate::error::NodeError;
use crate::inbox::{Beside, Inbox, InboxEnd, Upstream, receive_frames};
use crate::machine;
use crate::outbox::Outbox;
use crate::refusals::Refusals;
use crate::runner::StageRunner;
use crate::shelf::HeldModel;
use crate::stage_loop::{Downstream, StageCounters, StageLoop, StepDone};
use crate::stage_setup::{
    StageNeed, StageOrder, Supplied, WantedModel, fetch, find_model, load, load_source, meter, own_quant,
};
use crate::watch::StageStatus;
use crate::worker::{DataLink, Owner, Shared, WorkerEvent, spawn};

/// What happens to a worker's stage.
#[derive(Clone, Debug)]
pub enum StageEvent {
    /// Weights are being fetched, then read.
    Loading {
        layers: std::ops::Range<usize>,
        layers_total: usize,
        bytes_done: u64,
        bytes_total: u64,
        /// Where they come from.
        from: LoadSource,
    },
    /// The stage is part of a ring. `held_bytes_max` is what it and the coordinator's sessions can make this node hold:
    /// weights, KV rows, buffers and frames, by the limits of the order. An order for more was refused.
    Running {
        layers: std::ops::Range<usize>,
        layers_total: usize,
        weight_bytes: u64,
        held_bytes_max: u64,
        tail: bool,
    },
    /// A frame was served. `text` is what the sampled tokens say, on the tail; a stranger's text, not yet escaped.
    Step { done: StepDone, layers: std::ops::Range<usize>, text: Vec<String> },
    /// The stage has ended, and why.
    Ended { why: String },
}

/// A stage in the making or at work. Dropping it ends it.
pub(crate) struct StageHandle {
    epoch: Epoch,
    layers: std::ops::Range<usize>,
    links: Sender<DataLink>,
    supplies: Sender<(Connection, Supply)>,
    begin: Sender<()>,
    joined: Mutex<Vec<DataKind>>,
    closers: Arc<Mutex<Closers>>,
    counters: Arc<StageCounters>,
}

#[derive(Default)]
struct Closers {
    closed: bool,
    /// Set with `closed`: a stage that is still being loaded stops.
    abort: Arc<AtomicBool>,
    links: Vec<Closer>,
}

impl Closers {
    /// Remembers a link to close at the end; closes it at once when the end has come already.
    fn add(closers: &Mutex<Self>, closer: Closer) {
        let mut closers = closers.lock().unwrap_or_else(PoisonError::into_inner);
        if closers.closed {
            closer.close();
        }
        closers.links.push(closer);
    }
}

impl Closers {
    /// Ends all links, and those to come.
    fn close(closers: &Mutex<Self>) {
        let mut closers = closers.lock().unwrap_or_else(PoisonError::into_inner);
        closers.closed = true;
        closers.abort.store(true, Ordering::Relaxed);
        closers.links.drain(..).for_each(|closer| closer.close());
    }
}

impl StageHandle {
    /// Begins to load on a thread of its own.
    pub fn begin(
        shared: &Arc<Shared>,
        control: ControlSender,
        order: Prepare,
        owner: Owner,
        coordinator: Closer,
    ) -> Result<Self, NodeError> {
        let (links, incoming) = unbounded();
        let (supplies, supplied) = bounded(1);
        let (begin, started) = bounded(1);
        let (alive, ended) = bounded(0);
        let before = shared.last_stage.lock().unwrap_or_else(PoisonError::into_inner).replace(ended);
        let closers = Arc::new(Mutex::new(Closers::default()));
        let counters = Arc::new(StageCounters::default());
        let (epoch, layers) = (order.epoch, order.layers.into());
        let body = StageBody {
            shared: shared.clone(),
            control,
            order,
            owner,
            incoming,
            supplied,
            started,
            before,
            _alive: alive,
            closers: closers.clone(),
            counters: counters.clone(),
        };
        spawn("stage", move || body.run(&coordinator))?;
        Ok(Self { epoch, layers, links, supplies, begin, joined: Mutex::default(), closers, counters })
    }

    /// Gives the stage a data connection, one of each kind; a second one is closed.
    pub fn connect(&self, kind: DataKind, mut connection: Connection, refusals: &Refusals) {
        let mut joined = self.joined.lock().unwrap_or_else(PoisonError::into_inner);
        if joined.contains(&kind) {
            tracing::warn!("a data connection is closed: the stage has one of its kind");
            return refusals.tell(&mut connection.sender, self.epoch, CloseCode::Taken);
        }
        joined.push(kind);
        drop(joined);
        Closers::add(&self.closers, connection.closer.clone());
        let _ = self.links.send((kind, connection));
    }

    /// Gives the stage the connection that its coordinator serves bytes on; one more than was asked for is closed.
    pub fn supply(&self, connection: Connection, supply: Supply) {
        Closers::add(&self.closers, connection.closer.clone());
        let _ = self.supplies.try_send((connection, supply));
    }

    /// All stages are loaded: the next one may be dialled.
    pub fn start(&self) {
        let _ = self.begin.try_send(());
    }

    /// What the stage shows of itself.
    pub fn status(&self) -> StageStatus {
        let stats = self.stats(0);
        StageStatus {
            layers: [self.layers.start, self.layers.end],
            epoch: self.epoch.0,
            sessions: stats.sessions,
            frames: stats.frames,
            tokens: stats.tokens,
            frames_stale: stats.frames_stale,
            kv_bytes: stats.kv_bytes,
            bytes_in: stats.bytes_in,
            bytes_out: stats.bytes_out,
        }
    }

    /// What the stage has counted.
    pub fn stats(&self, id: u64) -> Stats {
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        Stats {
            id,
            epoch: Some(self.epoch),
            sessions: u32::try_from(read(&counters.sessions)).unwrap_or(u32::MAX),
            frames: read(&counters.frames),
            tokens: read(&counters.tokens),
            frames_stale: read(&counters.frames_stale),
            bytes_in: read(&counters.bytes_in),
            bytes_out: read(&counters.bytes_out),
            kv_bytes: read(&counters.kv_bytes),
            ..Stats::default()
        }
    }
}

impl Drop for StageHandle {
    fn drop(&mut self) {
        Closers::close(&self.closers);
    }
}

/// A stage in memory.
struct Loaded {
    runner: StageRunner,
    /// On the tail.
    tokenizer: Option<Tokenizer>,
    /// What all of it may come to.
    held_bytes_max: u64,
    /// What its weights are kept under.
    model: HeldModel,
}

/// What the stage's thread owns.
struct StageBody {
    shared: Arc<Shared>,
    control: ControlSender,
    order: Prepare,
    owner: Owner,
    incoming: Receiver<DataLink>,
    supplied: Receiver<(Connection, Supply)>,
    started: Receiver<()>,
    /// Closes when the stage before this one has ended and its memory is free.
    before: Option<Receiver<()>>,
    _alive: Sender<()>,
    closers: Arc<Mutex<Closers>>,
    counters: Arc<StageCounters>,
}

impl StageBody {
    fn run(self, coordinator: &Closer) {
        let panicked = || NodeError::Bug("the thread of the stage panicked".to_owned());
        let served = catch_unwind(AssertUnwindSafe(|| self.serve())).unwrap_or_else(|_| Err(panicked()));
        // A stage that was taken down on purpose has nothing to say to the coordinator: it may be loading the next.
        let why = match served {
            Err(error) if !self.torn_down() => {
                let reason = error.chain();
                let refused = Refused::new(error.blame(), &reason).of(self.order.epoch);
                let refused = match (&error, &self.order.next) {
                    (NodeError::Broken { .. }, Some(next)) => refused.towards(next.node_id),
                    _ => refused.with_code(error.code()),
                };
                if self.control.send(&Control::Refused(refused)).is_err() {
                    // The coordinator cannot be told; make sure that it notices.
                    coordinator.close();
                }
                reason
            }
            _ => "the ring was taken down".to_owned(),
        };
        // Threads that read receipts hold its links as well.
        Closers::close(&self.closers);
        self.tell(StageEvent::Ended { why });
    }

    fn torn_down(&self) -> bool {
        self.closers.lock().unwrap_or_else(PoisonError::into_inner).closed
    }

    fn abort(&self) -> Arc<AtomicBool> {
        self.closers.lock().unwrap_or_else(PoisonError::into_inner).abort.clone()
    }

    /// Waits until the stage before this one has given its memory back: both might not fit.
    fn await_turn(&self) -> Result<(), NodeError> {
        match self.before.as_ref().map(|before| before.recv_timeout(STAGE_TURN)) {
            Some(Err(RecvTimeoutError::Timeout)) => Err(assembly("the end of the stage before it")),
            _ if self.torn_down() => Err(assembly("a ring that was taken down")),
            _ => Ok(()),
        }
    }

    fn tell(&self, event: StageEvent) {
        (self.shared.observer)(WorkerEvent::Stage(event));
    }

    fn layers(&self) -> std::ops::Range<usize> {
        self.order.layers.into()
    }

    /// Load, connect, then frames until the ring ends. The weights stay for the coordinator's next placement.
    fn serve(&self) -> Result<(), NodeError> {
        self.await_turn()?;
        let Loaded { runner, tokenizer, held_bytes_max, model } = self.load()?;
        let (runner, ended) = match self.join(runner.stage(), held_bytes_max) {
            Ok((inbox, downstream)) => self.frames(runner, tokenizer.as_ref(), &inbox, downstream),
            Err(error) => (runner, Err(error)),
        };
        self.shared.shelf.put(self.owner.number, model, runner.into_stage().into());
        ended
    }

    /// Says that the stage is in memory, and connects it.
    fn join(&self, stage: &Stage, held_bytes_max: u64) -> Result<(Inbox, Downstream), NodeError> {
        let weight_bytes = stage.weight_bytes() as u64;
        self.say(&Control::Ready(Ready {
            epoch: self.order.epoch,
            bytes_loaded: weight_bytes,
            weight_bytes_per_token: stage.bytes_per_token() as u64,
        }))?;
        let (upstream, downstream) = self.connect()?;
        let inbox = receive_frames(upstream, &self.order.limits, Beside::Nothing)?;
        self.say(&Control::Started { epoch: self.order.epoch })?;
        let (layers, layers_total) = (self.layers(), self.order.layers_total as usize);
        let tail = self.order.tail;
        self.tell(StageEvent::Running { layers, layers_total, weight_bytes, held_bytes_max, tail });
        Ok((inbox, downstream))
    }

    /// Serves frames until the ring ends; gives the runner back.
    fn frames(
        &self,
        runner: StageRunner,
        tokenizer: Option<&Tokenizer>,
        inbox: &Inbox,
        downstream: Downstream,
    ) -> (StageRunner, Result<(), NodeError>) {
        let observer = |done: StepDone| {
            let text = done.sampled.iter().map(|&id| token_text(tokenizer, id)).collect();
            self.tell(StageEvent::Step { done, layers: self.layers(), text });
        };
        let mut stage = StageLoop {
            runner,
            limits: self.order.limits,
            gate: Gate::new(self.order.epoch, self.order.limits),
            id: control::wire_id(self.shared.identity.node_id()),
            downstream,
            counters: self.counters.clone(),
            observer: &observer,
            out: Vec::new(),
            segments: Vec::new(),
            trail: Vec::new(),
        };
        let ended = stage.run(inbox).and_then(|()| match inbox.end() {
            // Ours, or the coordinator's own end: nobody is to blame.
            None | Some(InboxEnd::Link(LinkError::ClosedHere | LinkError::Closed)) => Ok(()),
            Some(end) => Err(end.into_error("the stage before this one")),
        });
        if let Err(Some(code)) = ended.as_ref().map_err(NodeError::code) {
            inbox.refuse(&self.shared.refusals, self.order.epoch, code);
        }
        (stage.runner, ended)
    }

    fn say(&self, message: &Control) -> Result<(), NodeError> {
        self.control.send(message).map_err(|error| NodeError::Lost {
            node: "the coordinator".to_owned(),
            what: format!("cannot be reached: {}", crate::error::chain(&error)),
        })
    }

    fn load(&self) -> Result<Loaded, NodeError> {
        let (order, config) = (&self.order, &self.shared.config);
        let quant = order.quant.map(own_quant);
        let ours = swarm_kernels::numerics(quant);
        if order.numerics != ours {
            let theirs = order.numerics.escape_debug().to_string();
            return Err(NodeError::Numerics { node: "the coordinator".into(), theirs, ours });
        }
        let wanted = WantedModel {
            named: &order.model,
            fingerprint: &order.fingerprint.0,
            origin: order.origin.as_ref(),
        };
        // As long as the other node is asked first, which ends with the loading.
        let (checkpoint, _adopted) = find_model(config.model.as_ref(), &wanted, || self.supplied())?;
        let checkpoint = checkpoint.quantized(quant);
        self.check_model(&checkpoint)?;
        let stage_order = StageOrder {
            layers: self.layers(),
            context: order.context as usize,
            kv_type: kv_type(order.kv_type),
            sessions_max: order.sessions_max as usize,
            limits: order.limits,
            keep_quantized: config.keep_quantized,
        };
        let _sources = self.sources(&checkpoint);
        let need = StageNeed::of(&checkpoint, &stage_order)?;
        let model = HeldModel { fingerprint: order.fingerprint.0, quant };
        let mut kept = self.shared.shelf.take(&model);
        kept.trim(checkpoint.config(), &stage_order.layers);
        let memory = control::memory_offered_with(config.memory_bytes, kept.weight_bytes() as u64);
        let kv_bytes = need.kv_budget(&stage_order.layers, memory, stage_order.sessions_max)?;
        let mut last = None;
        let mut progress = |bytes_done: u64, bytes_total: u64, from: LoadSource| {
            let is_due = last.is_none_or(|last: Instant| last.elapsed() > LOADING_NEWS);
            if is_due || bytes_done == bytes_total {
                last = Some(Instant::now());
                // A coordinator that has gone is noticed by the control thread.
                let _ = self.control.send(&Control::Loading(Loading { bytes_done, bytes_total, from }));
                let layers_total = order.layers_total as usize;
                let layers = self.layers();
                self.tell(StageEvent::Loading { layers, layers_total, bytes_done, bytes_total, from });
            }
        };
        // A coordinator may ask for fewer threads than this worker has, not for more.
        let own = config.threads.unwrap_or_else(machine::cores);
        let threads = order.threads.map_or(own, |asked| own.min(asked as usize));
        if !kept.is_whole(checkpoint.config(), &stage_order.layers) {
            fetch(&checkpoint, &stage_order.layers, &self.abort(), &mut |done| {
                progress(done.bytes_done, done.bytes_total, load_source(done.from));
            })?;
        }
        let mut read = |done: LoadProgress| progress(done.bytes_done, done.bytes_total, LoadSource::Disk);
        let loaded = load(&checkpoint, &stage_order, threads, Some(self.abort()), &mut kept, &mut read);
        if loaded.is_err() {
            // The next order may want them.
            self.shared.shelf.put(self.owner.number, model, kept);
        }
        let stage = loaded?;
        let meter = meter(&checkpoint, &stage_order, threads, config.profile_dir.as_deref());
        let tokenizer = if order.tail { Tokenizer::from_checkpoint(&checkpoint).ok() } else { None };
        machine::pin_caller(config.cores.as_deref());
        let pool = machine::pool(threads, config.cores.clone());
        let sessions_max = stage_order.sessions_max;
        let runner = StageRunner::new(stage, pool, stage_order.kv_type, kv_bytes, sessions_max);
        let held_bytes_max = need.weights.saturating_add(need.buffers).saturating_add(kv_bytes);
        Ok(Loaded { runner: runner.with_meter(meter), tokenizer, held_bytes_max, model })
    }

    /// Asks the coordinator to serve bytes of its model, and takes the connection that it dials. Nothing when it does not,
    /// or has the model in the cache that this worker has, too.
    fn supplied(&self) -> Option<Supplied> {
        self.say(&Control::Wanting { epoch: self.order.epoch }).ok()?;
        let (link, supply) = self.supplied.recv_timeout(SUPPLY_COMES).ok()?;
        let number = || Store::of_user().number().ok();
        if supply.fingerprint != self.order.fingerprint
            || supply.cache.is_some_and(|cache| number() == Some(cache.0))
        {
            return None;
        }
        let catalogue = catalogue(&supply, self.owner.key);
        Some((catalogue, Arc::new(LinkSupplier::new("the coordinator".to_owned(), &supply, link))))
    }

    /// Attaches the other nodes that the coordinator named; they are dialled when bytes of theirs are missing.
    fn sources(&self, checkpoint: &Checkpoint) -> Vec<Attached> {
        let order = &self.order;
        let id = ModelId {
            name: order.model.clone(),
            fingerprint: order.fingerprint,
            origin: order.origin.clone(),
        };
        let node = |source| SourceNode::new(&self.shared.identity, checkpoint, &id, source);
        let nodes = order.sources.iter().filter_map(node);
        nodes.filter_map(|node| checkpoint.attach(Arc::new(node))).collect()
    }

    /// The order must fit the model and the limits must be the model's.
    fn check_model(&self, checkpoint: &swarm_weights::Checkpoint) -> Result<(), NodeError> {
        let (order, model) = (&self.order, checkpoint.config());
        let fits = order.layers_total as usize == model.num_hidden_layers
            && order.tail == (order.layers.end == order.layers_total)
            && order.limits.width as usize == model.hidden_size
            && order.limits.vocab as usize == model.vocab_size
            && order.limits.context_max == order.context;
        if fits {
            return Ok(());
        }
        let what = "it ordered a stage that does not fit the model".to_owned();
        Err(NodeError::BadPeer { node: "the coordinator".into(), what, code: CloseCode::Unexpected })
    }

    /// Waits for the upstream (and on the tail for the coordinator's connection), and dials the next stage when told
    /// to: by then it is loaded, so it takes us at once.
    fn connect(&self) -> Result<(Upstream, Downstream), NodeError> {
        let deadline = Instant::now() + ASSEMBLY;
        let (mut upstream, mut downstream) = (None, None);
        if let Some(next) = &self.order.next {
            self.started.recv_deadline(deadline).map_err(|_| assembly("the order to start"))?;
            let link = self.dial(next)?;
            downstream = Some(Downstream::Next(self.outbox(link, "the next stage", Some(next.node_id))?));
        }
        loop {
            (upstream, downstream) = match (upstream, downstream) {
                (Some(upstream), Some(downstream)) => return Ok((upstream, downstream)),
                part => part,
            };
            match self.incoming.recv_deadline(deadline) {
                Ok((DataKind::Hidden, link)) if upstream.is_none() => {
                    upstream = Some(Upstream { receiver: link.receiver, receipts: link.sender });
                }
                Ok((DataKind::Tokens, link)) if self.order.tail && downstream.is_none() => {
                    downstream = Some(Downstream::Coordinator(self.outbox(link, "the coordinator", None)?));
                }
                Ok(_) => return Err(assembly("connections of its own kind, but another came")),
                Err(RecvTimeoutError::Timeout) => return Err(assembly("the other stages")),
                Err(RecvTimeoutError::Disconnected) => return Err(assembly("a ring that was taken down")),
            }
        }
    }

    fn dial(&self, next: &NextHop) -> Result<Connection, NodeError> {
        let link = dial_data(&self.shared.identity, next, self.order.epoch, DataKind::Hidden);
        let link = link.map_err(|error| broken_on(&error))?;
        Closers::add(&self.closers, link.closer.clone());
        Ok(link)
    }

    /// The sending end of a data connection to `whom`, a worker's where `towards` says which. When that one does not take
    /// what it is sent, the coordinator is told and the stage ends.
    fn outbox(
        &self,
        link: Connection,
        whom: &'static str,
        towards: Option<NodeId>,
    ) -> Result<Outbox, NodeError> {
        let (control, closers, epoch) = (self.control.clone(), self.closers.clone(), self.order.epoch);
        let silent = move |why: String| {
            let reason = format!("{whom} {why}");
            // A coordinator that has gone is noticed by the control thread.
            let refused = Refused { towards, ..Refused::new(Blame::Link, &reason).of(epoch) };
            let _ = control.send(&Control::Refused(refused));
            Closers::close(&closers);
        };
        Outbox::new(link.sender, link.receiver, epoch, &self.order.limits, Box::new(silent))
    }
}

/// The link to the next stage is gone.
pub(crate) fn broken_on(error: &dyn std::error::Error) -> NodeError {
    let link = "the link to the next stage".to_owned();
    NodeError::Broken { link, reason: crate::error::chain(error) }
}

/// Connects to a stage for `kind` and greets it.
pub(crate) fn dial_data(
    identity: &swarm_link::Identity,
    next: &NextHop,
    epoch: Epoch,
    kind: DataKind,
) -> Result<Connection, NodeError> {
    let settings = LinkSettings { write_timeout: FRAME_WRITE, ..LinkSettings::default() };
    let mut link = dial(&next.addresses, identity, &settings, DIAL)?;
    if control::wire_id(link.peer.node) != next.node_id {
        return Err(NodeError::BadPeer {
            node: format!("the node at {}", link.peer.address),
            what: "it is another one than the coordinator named".to_owned(),
            code: CloseCode::Unexpected,
        });
    }
    let hello = DataHello { epoch, kind, from: control::wire_id(identity.node_id()) };
    link.sender.send(&[&hello.encode()])?;
    Ok(link)
}

/// Lets a data connection send frames as long as the limits allow.
pub(crate) fn limit_sender(
    mut sender: swarm_link::Sender,
    limits: &Limits,
) -> Result<swarm_link::Sender, NodeError> {
    let bytes = limits.frame_bytes_max().map_err(|error| NodeError::Request(error.to_string()))?;
    sender.set_message_bytes_max(usize::try_from(bytes).unwrap_or(usize::MAX));
    Ok(sender)
}

pub(crate) fn kv_type(wire: swarm_wire::KvType) -> KvType {
    match wire {
        swarm_wire::KvType::F16 => KvType::F16,
        swarm_wire::KvType::F32 => KvType::F32,
    }
}

fn assembly(what: &str) -> NodeError {
    NodeError::Refused {
        node: "this worker".into(),
        blame: Blame::Link,
        reason: format!("it waited in vain for {what}"),
    }
}

fn token_text(tokenizer: Option<&Tokenizer>, id: u32) -> String {
    let bytes = tokenizer.and_then(|tokenizer| tokenizer.token_bytes(id));
    bytes.map_or_else(|| format!("#{id}"), |bytes| String::from_utf8_lossy(bytes).into_owned())
}
