//! From a configuration to a connected ring, step by step: open, find, place, order, load, connect.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use swarm_link::Identity;
use swarm_model::{Kept, LoadProgress, Stage};
use swarm_ring::{
    CutStage, Downloads, Missing, NodeProfile, Objective, Placement, Plan, RoomProfile, Scheduler,
    SchedulerConfig, Split, Timers, plan_cut, plan_frugally,
};
use swarm_weights::{Attached, Checkpoint, Promise, Share};
use swarm_wire::{
    Control, DataKind, Epoch, Fingerprint, Held, KvType, Limits, LoadSource, NextHop, NodeId, Prepare, Role,
    UnitRoot, WeightSource,
};

use crate::ask::SourceNode;
use crate::control;
use crate::coordinator::Ring;
use crate::deadlines::{CONNECTING, LOADING_SILENT};
use crate::engine::{
    CHUNK_ALONE, CHUNK_IN_RING, EngineConfig, EngineEvent, EngineObserver, NodeReport, NodeState, ToFetch,
};
use crate::error::NodeError;
use crate::give::{self, Gift, Giving};
use crate::holdings;
use crate::inbox::{Beside, Upstream, receive_frames};
use crate::machine;
use crate::measure::Survey;
use crate::outbox::Outbox;
use crate::profile::layer_shape;
use crate::room::{Member, Note, NoteKind, Room, gather};
use crate::runner::StageRunner;
use crate::serve::dial_data;
use crate::shelf::{HeldModel, OWN, Shelf};
use crate::stage_setup::{
    StageNeed, StageOrder, fetch, load, load_source, meter, model_shape, origin, wire_quant,
};

/// The context used when nobody asks for one.
const CONTEXT_DEFAULT: usize = 4096;

/// A placement that is loaded and connected.
pub(crate) struct Assembled {
    pub runner: StageRunner,
    pub limits: Limits,
    pub ring: Option<Ring>,
    pub plan: Plan,
    pub nodes: Vec<NodeReport>,
    /// Where those are who were there and are not needed.
    pub left_out: Vec<Vec<std::net::SocketAddr>>,
}

/// What a ring is made of, each time.
pub(crate) struct Ground<'a> {
    pub config: &'a EngineConfig,
    pub identity: &'a Identity,
    pub observer: EngineObserver<'a>,
    pub model: &'a Checkpoint,
    pub context: usize,
    pub fingerprint: [u8; 32],
    /// This node's own stage of the placement before.
    pub shelf: &'a Shelf,
}

pub(crate) fn open_model(name: &str) -> Result<Checkpoint, NodeError> {
    Ok(Checkpoint::open(&swarm_weights::cache::resolve(name)?)?)
}

/// The model of a configuration, quantized while it is loaded where that is asked for.
pub(crate) fn open_for(config: &EngineConfig) -> Result<Checkpoint, NodeError> {
    let model = match &config.lender {
        // It is open already, and nobody has to be asked again what the name means.
        Some(lender) => Checkpoint::open(lender.path())?,
        None => open_model(&config.model)?,
    };
    Ok(model.quantized(config.quant))
}

pub(crate) fn context(config: &EngineConfig, model: &Checkpoint) -> Result<usize, NodeError> {
    let max = model.config().max_position_embeddings;
    match config.context {
        Some(context) if context == 0 || context > max => Err(NodeError::Request(format!(
            "a context of {context} positions was asked for, but the model was made for 1 to {max}"
        ))),
        asked => Ok(asked.unwrap_or(CONTEXT_DEFAULT.min(max))),
    }
}

fn own_id(identity: &Identity) -> NodeId {
    control::wire_id(identity.node_id())
}

fn threads(config: &EngineConfig) -> usize {
    config.threads.unwrap_or_else(machine::cores)
}

/// What this node says of itself to workers.
pub(crate) fn own_hello(config: &EngineConfig, identity: &Identity) -> swarm_wire::Hello {
    let memory = control::memory_offered(config.memory_bytes);
    let (id, threads) = (own_id(identity), threads(config));
    control::hello(id, &config.name, Role::Coordinator, threads, memory, config.read_gb_s)
}

pub(crate) fn find_members(
    config: &EngineConfig,
    identity: &Identity,
    observer: EngineObserver<'_>,
    model: &Checkpoint,
) -> Result<Room, NodeError> {
    let own = own_hello(config, identity);
    let mut search = config.search.clone();
    // A node without a layer has nothing to do.
    let layers = model.config().num_hidden_layers;
    if search.at_least >= layers {
        return Err(swarm_ring::PlaceError::TooManyNodes { nodes: search.at_least + 1, layers }.into());
    }
    search.at_most = search.at_most.min(layers.saturating_sub(1));
    if let Some(cut) = &config.cut {
        search.at_least = cut.len().saturating_sub(1);
        // A cut that names its nodes may have to wait for the right ones.
        if config.cut_nodes.is_empty() {
            search.at_most = search.at_least;
        }
    } else if config.split == Split::Never {
        (search.at_least, search.at_most) = (0, 0);
    }
    gather(&search, identity, &own, config.state_dir.as_deref(), &|event| {
        observer(EngineEvent::Search(event))
    })
}

/// Measures everybody and chooses who gets which layers.
pub(crate) fn place_layers(
    config: &EngineConfig,
    identity: &Identity,
    model: &Checkpoint,
    context: usize,
    room: &Room,
    held_bytes: u64,
) -> Result<Placed, NodeError> {
    let limits = limits(config, model, context, room.members.len() + 1)?;
    let shape = model_shape(model, context, config.kv_type, &limits, config.sessions_max)?;
    // A model that cannot be named is looked for nowhere.
    let id = holdings::model_id(&config.model, model).ok();
    let survey = Survey { config, identity, shape: layer_shape(model), model: &shape, id, held_bytes };
    let (room, held) = survey.room(room)?;
    let missing = |held: &Option<Held>| match held {
        Some(held) => holdings::missing(model, held),
        None => holdings::assumed_missing(model),
    };
    let own = std::iter::once(Some(holdings::own(model)));
    let held: Vec<Option<Held>> = own.chain(held).collect();
    let missing: Vec<Missing> = held.iter().map(missing).collect();
    // Who asks for a split wants the work shared; one user's speed alone would leave most of it on the fastest node.
    let split = if config.cut.is_some() { Split::Always } else { config.split };
    let usual = if split == Split::Always { Objective::Throughput } else { Objective::Latency };
    let objective = config.objective.unwrap_or(usual);
    // A cut is for so many nodes; once there are others, the layers are placed anew.
    let nodes = room.nodes.len();
    let named = !config.cut_nodes.is_empty();
    let cut = config.cut.as_ref();
    let plan = match cut.filter(|cut| cut.len() == nodes || named && cut.len() < nodes) {
        Some(cut) => plan_cut(&room, &shape, objective, &named_cut(cut, &config.cut_nodes, &room)?)?,
        None => plan_frugally(&room, &shape, objective, split, Downloads(&missing))?,
    };
    let to_fetch = |(index, stage): (usize, &swarm_ring::PlacedStage)| {
        let node = room.nodes.iter().position(|node| node.id == stage.node)?;
        // Of this node itself it is known to the piece.
        let bytes = match index {
            0 => model.missing_bytes(stage.layers.clone()),
            _ => Downloads(&missing).bytes(node, &stage.layers, &shape),
        };
        let known = held.get(node).is_some_and(Option::is_some);
        Some(ToFetch { bytes, known })
    };
    let to_fetch = plan.placement.stages.iter().enumerate().filter_map(to_fetch).collect();
    let sources = stage_sources(model, &plan.placement, &room, &held);
    Ok(Placed { plan, to_fetch, sources })
}

/// Which other nodes each stage may take weights from: of a published model, whose bytes are the same everywhere.
fn stage_sources(
    model: &Checkpoint,
    placement: &Placement,
    room: &RoomProfile,
    held: &[Option<Held>],
) -> Vec<Vec<(NodeId, Vec<UnitRoot>)>> {
    let of = |stage: &swarm_ring::PlacedStage| {
        let who = room.nodes.iter().position(|node| node.id == stage.node);
        let Some(who) = who.filter(|_| model.origin().is_some()) else { return Vec::new() };
        let units = model.stage_units(stage.layers.clone());
        let units: Vec<u32> = units.into_iter().filter_map(|unit| u32::try_from(unit).ok()).collect();
        let sources = holdings::sources(&units, who, held);
        sources.into_iter().filter_map(|(node, roots)| Some((room.nodes.get(node)?.id, roots))).collect()
    };
    placement.stages.iter().map(of).collect()
}

/// A placement, and what each of its stages would fetch, in ring order.
pub(crate) struct Placed {
    pub plan: Plan,
    pub to_fetch: Vec<ToFetch>,
    /// Other nodes that have weights of each stage.
    pub sources: Vec<Vec<(NodeId, Vec<UnitRoot>)>>,
}

/// The cut with the nodes it names, `here` being this one; without names, those of the ring in order.
fn named_cut(
    cut: &[std::ops::Range<usize>],
    names: &[String],
    room: &RoomProfile,
) -> Result<Vec<CutStage>, NodeError> {
    if names.is_empty() {
        return Ok(cut.iter().cloned().enumerate().collect());
    }
    let short = |node: &NodeProfile| control::node_name(&node.name, &node.id);
    let find = |name: &String| {
        let called = |node: &NodeProfile| node.name == *name || short(node) == *name;
        let mut found = (0..).zip(&room.nodes).filter(|(_, node)| called(node)).map(|(index, _)| index);
        match (found.next(), found.next()) {
            (Some(index), None) => Ok(index),
            (Some(_), Some(_)) => {
                Err(format!("several nodes are called {name:?}; say which by its full name"))
            }
            (None, _) if name == "here" => Ok(0),
            (None, _) => Err(format!("no node is called {name:?}")),
        }
    };
    let here: Vec<String> = room.nodes.iter().map(short).collect();
    let stage = |(name, layers): (&String, &std::ops::Range<usize>)| {
        let node = find(name)
            .map_err(|why| NodeError::Request(format!("--layers: {why}; there are {}", here.join(", "))))?;
        Ok::<CutStage, NodeError>((node, layers.clone()))
    };
    let mut stages = names.iter().zip(cut).map(stage).collect::<Result<Vec<_>, _>>()?;
    stages.sort_by_key(|(_, layers)| layers.start);
    Ok(stages)
}

/// Places the layers on the room's members, lets the others go, has the layers loaded, and connects the ring under
/// `epoch`.
pub(crate) fn assemble(ground: &Ground<'_>, room: &mut Room, epoch: Epoch) -> Result<Assembled, NodeError> {
    let &Ground { config, identity, observer, model, context, fingerprint, shelf } = ground;
    let Placed { plan, to_fetch, sources } =
        place_layers(config, identity, model, context, room, shelf.bytes())?;
    let placement = &plan.placement;
    observer(EngineEvent::Placed(placement.clone()));
    check_fetch(config, &to_fetch, placement)?;
    let limits = limits(config, model, context, room.members.len() + 1)?;
    let order: Vec<NodeId> = placement.stages.iter().skip(1).map(|stage| stage.node).collect();
    let sources = ways(room, placement, &sources);
    let left_out = room.keep(&order);
    let assembly = Assembly {
        config,
        identity,
        observer,
        limits,
        model,
        context,
        placement,
        epoch,
        fingerprint,
        shelf,
        sources,
    };
    let share = assembly.share(room);
    // From before anybody can ask for them until they are here, or cannot be had.
    let own = placement.stages.first().map_or(0..0, |stage| stage.layers.clone());
    let promise = share.as_ref().map(|share| share.promise(model, own));
    let _giving = share.as_ref().and_then(|share| assembly.give(room, share));
    assembly.order_stages(room)?;
    let runner = assembly.load_own(promise)?;
    match assembly.join(room, &runner) {
        Ok((nodes, ring)) => Ok(Assembled { runner, limits, ring, plan, nodes, left_out }),
        Err(error) => {
            // The next try may have some of the same layers here.
            shelf.put(OWN, held_model(model, fingerprint), runner.into_stage().into());
            Err(error)
        }
    }
}

/// The scheduler of a ring's first placement; or the one of earlier placements goes on with this one.
pub(crate) fn scheduler(
    config: &EngineConfig,
    earlier: Option<Scheduler>,
    epoch: Epoch,
    parts: &Assembled,
) -> Result<Scheduler, NodeError> {
    let failed = |error: swarm_ring::ConfigError| NodeError::Request(crate::error::chain(&error));
    let stages = parts.plan.placement.stages.len();
    let chunk = config.chunk.unwrap_or(if stages > 1 { CHUNK_IN_RING } else { CHUNK_ALONE });
    let [stages, chunk] = [stages, chunk].map(|count| u32::try_from(count).unwrap_or(u32::MAX));
    if let Some(mut scheduler) = earlier {
        scheduler.start_epoch(epoch, parts.limits).map_err(failed)?;
        scheduler.set_ring(stages, chunk);
        return Ok(scheduler);
    }
    Scheduler::new(SchedulerConfig {
        epoch,
        limits: parts.limits,
        sessions_max: u32::try_from(config.sessions_max).unwrap_or(u32::MAX),
        chunk,
        stages,
        frames_in_flight_max: stages.saturating_add(1),
        timers: Timers::default(),
    })
    .map_err(failed)
}

/// The number of a coordinator's first placement; it rises from there. Random, because workers tell links by it: one
/// that a stage of a ring that is no more dials late must not be taken for part of another coordinator's.
pub(crate) fn first_epoch() -> Epoch {
    let random = RandomState::new().build_hasher().finish();
    Epoch(1 + (random as u32 >> 2))
}

fn limits(
    config: &EngineConfig,
    model: &Checkpoint,
    context: usize,
    stages: usize,
) -> Result<Limits, NodeError> {
    let small = |what: &str, value: usize| {
        u32::try_from(value).map_err(|_| NodeError::Request(format!("{what} is {value}, which is too large")))
    };
    let limits = Limits {
        width: small("the model's width", model.config().hidden_size)?,
        vocab: small("the vocabulary", model.config().vocab_size)?,
        context_max: small("the context", context)?,
        tokens_max: small("the prompt chunk", config.chunk.unwrap_or(CHUNK_ALONE).max(config.sessions_max))?,
        segments_max: small("the number of sessions", config.sessions_max)?,
        stages_max: small("the number of nodes", stages)?,
    };
    limits.validate().map_err(|error| NodeError::Request(error.to_string()))?;
    Ok(limits)
}

/// Refuses a placement that would fetch more than was agreed to.
fn check_fetch(config: &EngineConfig, to_fetch: &[ToFetch], placement: &Placement) -> Result<(), NodeError> {
    let Some(max) = config.fetch_bytes_max else { return Ok(()) };
    let bytes: Vec<u64> = to_fetch.iter().map(|stage| stage.bytes).collect();
    if bytes.iter().sum::<u64>() <= max {
        return Ok(());
    }
    let names = placement.stages.iter().map(|stage| crate::error::printable(&stage.name));
    let nodes = names.zip(bytes).filter(|(_, bytes)| *bytes > 0).collect();
    Err(NodeError::MuchToFetch { nodes, max })
}

/// What this node's own weights are kept under.
pub(crate) fn held_model(model: &Checkpoint, fingerprint: [u8; 32]) -> HeldModel {
    HeldModel { fingerprint, quant: model.quant() }
}

struct Assembly<'a> {
    config: &'a EngineConfig,
    identity: &'a Identity,
    observer: EngineObserver<'a>,
    model: &'a Checkpoint,
    context: usize,
    placement: &'a Placement,
    limits: Limits,
    epoch: Epoch,
    fingerprint: [u8; 32],
    shelf: &'a Shelf,
    /// Other nodes that have weights of each stage.
    sources: Vec<Vec<WeightSource>>,
}

/// The addresses of each stage's sources, as its node may reach them. A node that the ring does without is one as well.
fn ways(
    room: &Room,
    placement: &Placement,
    sources: &[Vec<(NodeId, Vec<UnitRoot>)>],
) -> Vec<Vec<WeightSource>> {
    let member = |id: NodeId| room.members.iter().find(|member| member.id() == id);
    let stage = |(stage, sources): (&swarm_ring::PlacedStage, &Vec<(NodeId, Vec<UnitRoot>)>)| {
        let way = |(id, units): &(NodeId, Vec<UnitRoot>)| {
            let other = member(*id)?;
            let node = match member(stage.node) {
                Some(from) => from.way_to(other),
                None => NextHop { node_id: *id, addresses: other.addresses.clone() },
            };
            Some(WeightSource { node, units: units.clone() })
        };
        sources.iter().filter_map(way).collect()
    };
    placement.stages.iter().zip(sources).map(stage).collect()
}

impl Assembly<'_> {
    /// Tells every worker which stage it becomes. They load at the same time as this node.
    fn order_stages(&self, room: &Room) -> Result<(), NodeError> {
        let fingerprint = Fingerprint(self.fingerprint);
        let layers_total = self.placement.stages.last().map_or(0, |stage| stage.layers.end);
        let small = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        for (index, (member, stage)) in room.members.iter().zip(&self.placement.stages[1..]).enumerate() {
            let order = Prepare {
                epoch: self.epoch,
                model: self.config.model.chars().take(swarm_wire::MODEL_CHARS_MAX).collect(),
                fingerprint,
                origin: origin(self.model),
                layers: stage
                    .layers
                    .clone()
                    .try_into()
                    .map_err(|_| NodeError::Request("too many layers".into()))?,
                layers_total: small(layers_total),
                tail: index + 1 == room.members.len(),
                quant: self.model.quant().map(wire_quant),
                kv_type: match self.config.kv_type {
                    swarm_kernels::KvType::F16 => KvType::F16,
                    swarm_kernels::KvType::F32 => KvType::F32,
                },
                context: small(self.context),
                sessions_max: small(self.config.sessions_max),
                limits: self.limits,
                next: room.members.get(index + 1).map(|next| member.way_to(next)),
                threads: self.config.worker_threads.map(small),
                numerics: swarm_kernels::numerics(self.model.quant()),
                sources: self.sources.get(index + 1).cloned().unwrap_or_default(),
            };
            say(member, &Control::Prepare(Box::new(order)))?;
        }
        Ok(())
    }

    /// The model's files, open to be served to workers. Nothing without workers, or where the files cannot be described:
    /// then they have to have the model, or fetch it themselves.
    fn share(&self, room: &Room) -> Option<Arc<Share>> {
        if room.members.is_empty() {
            return None;
        }
        let share = self.model.share();
        let told =
            |error| tracing::warn!("the model is not served to workers: {}", crate::error::chain(&error));
        share.map_err(told).ok().map(Arc::new)
    }

    /// Begins to serve workers that want bytes.
    fn give(&self, room: &Room, share: &Arc<Share>) -> Option<Giving> {
        let supply = give::supply_of(self.model, share, self.epoch);
        let hop = |member: &Member| NextHop { node_id: member.id(), addresses: member.addresses.clone() };
        let started = supply.and_then(|supply| {
            Giving::start(Gift {
                identity: self.identity.clone(),
                supply,
                share: share.clone(),
                members: room.members.iter().map(hop).collect(),
                wants: room.wants(),
            })
        });
        started.map_err(|error| tracing::warn!("workers are served no bytes: {}", error.chain())).ok()
    }

    /// Loads this node's own stage. What was promised to others is let go once it is here.
    fn load_own(&self, promise: Option<Promise<'_>>) -> Result<StageRunner, NodeError> {
        let layers = self.placement.stages.first().map_or(0..0, |stage| stage.layers.clone());
        let order = StageOrder {
            layers,
            context: self.context,
            kv_type: self.config.kv_type,
            sessions_max: self.config.sessions_max,
            limits: self.limits,
            keep_quantized: self.config.keep_quantized,
        };
        let need = StageNeed::of(self.model, &order)?;
        let mut kept = self.shelf.take(&held_model(self.model, self.fingerprint));
        kept.trim(self.model.config(), &order.layers);
        let memory = control::memory_offered_with(self.config.memory_bytes, kept.weight_bytes() as u64);
        let kv_bytes = need.kv_budget(&order.layers, memory, order.sessions_max)?;
        let stage = self.read(&order, &mut kept, promise)?;
        let pool = machine::pool(threads(self.config), self.config.cores.clone());
        let profile_dir = self.config.profile_dir.as_deref();
        let meter = meter(self.model, &order, threads(self.config), profile_dir);
        Ok(StageRunner::new(stage, pool, order.kv_type, kv_bytes, order.sessions_max).with_meter(meter))
    }

    /// Attaches the workers that have weights of this node's own stage.
    fn own_sources(&self) -> Vec<Attached> {
        let Ok(id) = holdings::model_id(&self.config.model, self.model) else { return Vec::new() };
        let sources = self.sources.first().map_or(&[][..], Vec::as_slice);
        let node = |source| SourceNode::new(self.identity, self.model, &id, source);
        sources.iter().filter_map(node).filter_map(|node| self.model.attach(Arc::new(node))).collect()
    }

    /// Fetches what is not on this computer, and reads the layers that are not in memory.
    fn read(
        &self,
        order: &StageOrder,
        kept: &mut Kept,
        promise: Option<Promise<'_>>,
    ) -> Result<Stage, NodeError> {
        let tell = |bytes_done: u64, bytes_total: u64, from: LoadSource| {
            (self.observer)(EngineEvent::Loading { node: 0, bytes_done, bytes_total, from });
        };
        if !kept.is_whole(self.model.config(), &order.layers) {
            let _sources = self.own_sources();
            fetch(self.model, &order.layers, &AtomicBool::new(false), &mut |done| {
                tell(done.bytes_done, done.bytes_total, load_source(done.from));
            })?;
        }
        drop(promise);
        let mut progress = |done: LoadProgress| tell(done.bytes_done, done.bytes_total, LoadSource::Disk);
        load(self.model, order, threads(self.config), None, kept, &mut progress)
    }

    fn own_report(&self, runner: &StageRunner) -> NodeReport {
        NodeReport {
            name: control::node_name(&self.config.name, &own_id(self.identity)),
            layers: runner.stage().layers(),
            bytes_loaded: runner.stage().weight_bytes() as u64,
            weight_bytes_per_token: runner.stage().bytes_per_token() as u64,
            kv_bytes_per_position: Some(
                runner.stage().kv_layout(self.config.kv_type).bytes_per_position() as u64
            ),
            round_trip_us: None,
            state: NodeState::Up,
        }
    }

    /// Waits for the other stages and connects them.
    fn join(&self, room: &Room, runner: &StageRunner) -> Result<(Vec<NodeReport>, Option<Ring>), NodeError> {
        let mut nodes = self.await_ready(room)?;
        nodes.insert(0, self.own_report(runner));
        Ok((nodes, self.connect(room)?))
    }

    /// Waits until every worker has its stage in memory.
    fn await_ready(&self, room: &Room) -> Result<Vec<NodeReport>, NodeError> {
        let mut reports: Vec<Option<NodeReport>> = room.members.iter().map(|_| None).collect();
        let mut heard = Instant::now();
        while reports.iter().any(Option::is_none) {
            let silent = || NodeError::Lost {
                node: "a worker".into(),
                what: format!("said nothing for {} s while loading", LOADING_SILENT.as_secs()),
            };
            let note = room.notes.recv_deadline(heard + LOADING_SILENT).map_err(|_| silent())?;
            let Some((index, member, message)) = read_note(room, note, self.epoch)? else { continue };
            heard = Instant::now();
            match message {
                Control::Loading(loading) => (self.observer)(EngineEvent::Loading {
                    node: index + 1,
                    bytes_done: loading.bytes_done,
                    bytes_total: loading.bytes_total,
                    from: loading.from,
                }),
                Control::Ready(ready) if ready.epoch == self.epoch => {
                    reports[index] = Some(NodeReport {
                        name: member.name.clone(),
                        layers: self.placement.stages[index + 1].layers.clone(),
                        bytes_loaded: ready.bytes_loaded,
                        weight_bytes_per_token: ready.weight_bytes_per_token,
                        kv_bytes_per_position: None,
                        round_trip_us: None,
                        state: NodeState::Up,
                    });
                }
                _ => {}
            }
        }
        Ok(reports.into_iter().flatten().collect())
    }

    /// Connects the ring: hidden rows to the first worker, tokens from the tail; the workers connect to each other.
    fn connect(&self, room: &Room) -> Result<Option<Ring>, NodeError> {
        let (Some(first), Some(tail)) = (room.members.first(), room.members.last()) else { return Ok(None) };
        for member in &room.members {
            say(member, &Control::Start { epoch: self.epoch })?;
        }
        let link = |member: &Member, kind| {
            let target = NextHop { node_id: member.id(), addresses: member.addresses.clone() };
            let link = dial_data(self.identity, &target, self.epoch, kind)?;
            room.add_data_link(link.closer.clone());
            Ok::<_, NodeError>(link)
        };
        let tokens = link(tail, DataKind::Tokens)?;
        let hidden = link(first, DataKind::Hidden)?;
        let deadline = Instant::now() + CONNECTING;
        let mut started = vec![false; room.members.len()];
        while !started.iter().all(|&started| started) {
            let note = room.notes.recv_deadline(deadline).map_err(|_| {
                let missing = started.iter().position(|&started| !started).unwrap_or(0);
                let node = room.members.get(missing).map_or_else(String::new, |member| member.name.clone());
                let what = "could not connect to its neighbour in time; check that no firewall is between the workers";
                NodeError::Lost { node, what: what.into() }
            })?;
            if let Some((index, _, Control::Started { epoch })) = read_note(room, note, self.epoch)?
                && epoch == self.epoch
            {
                started[index] = true;
            }
        }
        let upstream = Upstream { receiver: tokens.receiver, receipts: tokens.sender };
        let inbox = receive_frames(upstream, &self.limits, Beside::Others)?;
        let silent = room.on_silence(first);
        let next = Outbox::new(hidden.sender, hidden.receiver, self.epoch, &self.limits, silent)?;
        Ok(Some(Ring { next, inbox }))
    }
}

fn say(member: &Member, message: &Control) -> Result<(), NodeError> {
    member.control.send(message).map_err(|error| NodeError::Lost {
        node: member.name.clone(),
        what: format!("cannot be reached: {}", crate::error::chain(&error)),
    })
}

/// What a member says, or the error that its news is. Nothing, when it is of an earlier placement or of somebody who is
/// not in this one.
fn read_note(room: &Room, note: Note, epoch: Epoch) -> Result<Option<(usize, &Member, Control)>, NodeError> {
    let Some(index) = room.members.iter().position(|member| member.id() == note.node) else {
        return Ok(None);
    };
    let member = &room.members[index];
    let node = member.name.clone();
    match note.what {
        NoteKind::Lost(why) => {
            Err(NodeError::Lost { node, what: format!("was lost while it loaded: {why}") })
        }
        NoteKind::Says(message) => match *message {
            Control::Refused(refused) if refused.epoch.is_some_and(|of| of != epoch) => Ok(None),
            Control::Refused(refused) => {
                let reason = crate::error::printable(&refused.reason);
                let at = |id| room.members.iter().position(|member| member.id() == id);
                if let Some(other) = refused.towards.and_then(at) {
                    room.note_broken(member.id(), other);
                    let link = format!("the link from {node} to {}", room.members[other].name);
                    return Err(NodeError::Broken { link, reason });
                }
                Err(NodeError::Refused { node, blame: refused.blame, reason })
            }
            message => Ok(Some((index, member, message))),
        },
    }
}
